"""Checkpoint files: config, weights in the published layouts, tokenizers.

No code in a file ever runs: .bin files are read with weights_only=True, and transformers loads
everything with trust_remote_code=False.
"""

import math
import os
import reprlib
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoTokenizer, PhiConfig
from transformers.activations import ACT2FN
from transformers.utils import cached_file

from hermesflow.files import InputError, read_object, reason

WEIGHTS = ("pytorch_model.safetensors", "model.safetensors", "pytorch_model.bin",
           "pytorch_model.safetensors.index.json", "model.safetensors.index.json",
           "pytorch_model.bin.index.json")
READ_AT_ONCE = 2**25  # bytes of a weights file in memory, beside the weights that stay

# fields of config files: their type, and the largest number that makes sense; all are above 0
SIZE = (int, 2**24)
PHI_FIELDS = {
    "hidden_size": SIZE,
    "intermediate_size": SIZE,
    "num_hidden_layers": (int, 1000),
    "num_attention_heads": SIZE,
    "num_key_value_heads": SIZE,
    "layer_norm_eps": (float, 1),
    "hidden_act": (str, None),
    "max_position_embeddings": SIZE,
    "vocab_size": SIZE,
}
ROPE_FIELDS = {
    "rope_theta": (float, 1e12),
    "partial_rotary_factor": (float, 1),
}
SHORT = reprlib.Repr()  # of values from files, in messages
SHORT.maxstring = 100


def find_file(folder, name: str) -> str | None:
    """The path of a file in a folder or hub repository, or None if it has no such file.

    Raises InputError if `folder` is neither a folder here nor a repository that can be reached.
    """
    if os.path.exists(folder):
        path = os.path.join(folder, name)
        return path if os.path.isfile(path) else None
    try:
        return cached_file(str(folder), name, _raise_exceptions_for_missing_entries=False)
    except Exception as error:  # a name that is no repository id, a repository that does not exist
        message = f"{folder}: neither a folder here nor reachable on the hub ({reason(error)})"
        raise InputError(message) from None


def read_config(folder) -> dict:
    """The config.json of a folder or hub repository. Raises InputError if there is none."""
    path = find_file(folder, "config.json")
    if path is None and os.path.exists(folder):
        raise InputError(f"{folder}: config.json is missing")
    if path is None:
        raise InputError(f"{folder}: neither a folder here nor reachable on the hub")
    return read_object(path)


def refuse(where: str, field: str, wanted: str, value) -> None:
    raise InputError(f"{where}: field '{field}' should be {wanted}, found {SHORT.repr(value)}")


def check_fields(config: dict, fields: dict, where: str) -> None:
    """Raises InputError unless each field has its type, and numbers are in their range."""
    for name, (kind, most) in fields.items():
        value = config.get(name)
        if kind is str:
            right = isinstance(value, str)
            wanted = "a text"
        elif kind is int:
            right = type(value) is int and 0 < value <= most  # bool is an int, too
            wanted = f"a whole number from 1 to {most}"
        else:
            right = type(value) in (int, float) and 0 < value <= most
            wanted = f"a number above 0 and at most {most}"
        if not right:
            refuse(where, name, wanted, value)


# ------------------------------------------------------------------------------------------ weights


def load_checkpoint(module: nn.Module, folder, dtype=torch.float32) -> None:
    """Put the weights of a folder or hub repository into a module built on the meta device.

    Raises InputError unless all names and shapes match, and all values are finite in `dtype`.
    """
    path, files = find_weights(folder)
    shapes = {}
    for file in files:  # mapped into memory: this reads no weights
        shapes |= {name: value.shape for name, value in read_tensors(file).items()}
    check_names(module, shapes, path)
    fill(module, chain.from_iterable(map(each_tensor, files)), path, dtype)


def load_weights(module: nn.Module, weights: dict, path: str, dtype=torch.float32) -> None:
    """The same for weights in memory; path: where they are from."""
    check_names(module, {name: value.shape for name, value in weights.items()}, path)
    fill(module, weights.items(), path, dtype)


def fill(module: nn.Module, tensors: Iterable[tuple[str, torch.Tensor]], path: str, dtype) -> None:
    """One tensor after the other, so that there are never two copies of all weights."""
    expected = module.state_dict()
    converted = {}
    for name, value in tensors:
        converted[name] = convert(value, expected[name], dtype, f"{path}: parameter {name}")
    module.load_state_dict(converted, assign=True)


def find_weights(folder) -> tuple[str, list[str]]:
    """The weights file or the index of a checkpoint, and the files that hold its tensors."""
    candidates = (find_file(folder, name) for name in WEIGHTS)
    path = next((p for p in candidates if p), None)
    if path is None:
        raise InputError(f"{folder}: no weights; looked for {', '.join(WEIGHTS)}")
    return path, shards(folder, path) if path.endswith(".index.json") else [path]


def shards(folder, index: str) -> list[str]:
    """The files of a sharded checkpoint, none outside its folder."""
    where = f"{index}: field 'weight_map'"
    weight_map = read_object(index).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or not all(isinstance(n, str) and n and Path(n).name == n for n in names):
        raise InputError(f"{where} should name a file of this folder for every parameter")
    names = sorted(set(names))
    files = [find_file(folder, name) for name in names]
    if None in files:
        raise InputError(f"{where}: {SHORT.repr(names[files.index(None)])} is missing")
    return files


def each_tensor(file: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of a weights file, each to be used before the next one is asked for."""
    weights = read_tensors(file)
    read = 0
    for name in list(weights):
        if read and read + weights[name].nbytes > READ_AT_ONCE and is_mapped(file):
            # what was read of a mapped file stays in memory for as long as the file is open
            weights = read_tensors(file)
            read = 0
        value = weights.pop(name)
        read += value.nbytes
        yield name, value


def read_tensors(file: str) -> dict:
    """name -> tensor of a weights file."""
    return read_bin(file) if file.endswith(".bin") else read_safetensors(file)


def is_mapped(file: str) -> bool:
    """Whether values are read from the file where they are used; old .bin files are read whole."""
    return not file.endswith(".bin") or zipfile.is_zipfile(file)


def read_safetensors(file: str) -> dict:
    """name -> tensor of a safetensors file. Raises InputError if it cannot be read."""
    try:
        with safe_open(file, framework="pt") as weights:
            tensors = {name: weights.get_tensor(name) for name in weights.keys()}
    except Exception as error:  # safetensors raises its own type, the file system OSError
        raise InputError(f"{file}: cannot read: {reason(error)}") from None
    return todays_names(tensors)


def read_bin(file: str) -> dict:
    """name -> tensor of a .bin file. Raises InputError for anything but plain tensors."""
    try:
        mmap = zipfile.is_zipfile(file)
        weights = torch.load(file, map_location="cpu", mmap=mmap, weights_only=True)
    except Exception as error:  # pickle, zip, end of file, code that was not run, …
        raise InputError(f"{file}: not a file of plain tensors ({reason(error)})") from None
    if isinstance(weights, dict) and isinstance(weights.get("state_dict"), dict):
        weights = weights["state_dict"]  # a file of a training program
    entries = weights.items() if isinstance(weights, dict) else [(None, weights)]
    if not all(isinstance(name, str) and is_plain(value) for name, value in entries):
        raise InputError(f"{file}: expected a dictionary of parameter names and tensors")
    return todays_names(weights)


def is_plain(value) -> bool:
    """Whether this is a dense tensor that has values."""
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        return False
    return value.device.type == "cpu" and not value.is_quantized


def todays_names(weights: dict) -> dict:
    """Parameters as the network names them now.

    Wrappers for several GPUs put `module.` before every name. Older versions of transformers saved
    the frequencies of the rotary embedding, which are constants.
    """
    prefix = "module." if all(name.startswith("module.") for name in weights) else ""
    names = [name for name in weights if not name.endswith(".inv_freq")]
    return {name.removeprefix(prefix): weights[name] for name in names}


def check_names(module: nn.Module, shapes: dict, path: str) -> None:
    """Raises InputError unless names and shapes are those of the module."""
    expected = module.state_dict()
    wrong = []
    for name, value in expected.items():
        if name in shapes and shapes[name] != value.shape:
            wrong.append(f"{name} {tuple(shapes[name])} instead of {tuple(value.shape)}")
    problems = [("missing", sorted(expected.keys() - shapes.keys())),
                ("unexpected", sorted(shapes.keys() - expected.keys())),
                ("wrong shape", wrong)]
    messages = [f"{what}: {some_of(names)}" for what, names in problems if names]
    if messages:
        raise InputError(f"{path}: parameters do not fit the model; {'; '.join(messages)}")


def some_of(names: list[str]) -> str:
    shown = [n if n.isprintable() and len(n) < 200 else SHORT.repr(n) for n in names[:8]]
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(shown) + more


def convert(value: torch.Tensor, expected: torch.Tensor, dtype, where: str) -> torch.Tensor:
    """A copy in the model's dtype. Raises InputError unless all values are finite there."""
    is_float = expected.is_floating_point()
    if value.is_floating_point() != is_float or value.is_complex():
        raise InputError(f"{where} is {value.dtype}, which is another kind of number")
    if not is_float:
        return value.to(expected.dtype, copy=True)
    # a copy even of the same dtype: otherwise it would stay mapped to the file
    copy = value.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)
    extremes = copy.aminmax() if copy.numel() else ()  # needs no memory, unlike copy.isfinite()
    if not all(map(math.isfinite, extremes)):
        too_large = f"holds values that are too large for {dtype}"
        why = too_large if value.isfinite().all() else "holds values that are not finite numbers"
        raise InputError(f"{where} {why}")
    return copy


def full_precision(weights: dict) -> dict:
    """Weights as they are saved: float32 on the CPU."""
    saved = {}
    for name, value in weights.items():
        value = value.detach().cpu()
        saved[name] = value.float().contiguous() if value.is_floating_point() else value
    return saved


# ------------------------------------------------------------------------------- the language model


def phi_config(folder, name: str) -> PhiConfig:
    """The language model's sizes: a file beside the checkpoint, or Phi-1.5 (the defaults)."""
    where = f"{folder}/config.json"
    if not isinstance(name, str) or not name:
        refuse(where, "llm_model_path", "a name", name)
    path = find_file(folder, Path(name).name)
    if path is None and Path(name).name == "phi-1_5":
        return PhiConfig()
    with suppress(InputError):  # raised where it is neither a folder nor on the hub
        path = path or (name if os.path.isfile(name) else find_file(name, "config.json"))
    if path is None:
        refuse(where, "llm_model_path", "the place of a Phi configuration", name)
    return read_phi(path)


def read_phi(path) -> PhiConfig:
    """The sizes in a Phi configuration. Raises InputError naming the field that is wrong."""
    config = read_object(path)
    if config.get("model_type", "phi") != "phi":
        refuse(path, "model_type", "'phi'", config["model_type"])
    default = PhiConfig()
    sizes = {name: config.get(name, getattr(default, name)) for name in PHI_FIELDS}
    if config.get("num_key_value_heads") is None:  # absent, or null
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    check_fields(sizes, PHI_FIELDS, path)
    sizes["layer_norm_eps"] = float(sizes["layer_norm_eps"])
    if sizes["hidden_act"] not in ACT2FN:
        refuse(path, "hidden_act", "an activation that transformers has", sizes["hidden_act"])

    # the rotary embedding's numbers stand beside the others, or, in new files, in an object
    rope = {name: config.get(name, default.rope_parameters[name]) for name in ROPE_FIELDS}
    for field in ("rope_scaling", "rope_parameters"):
        value = {} if config.get(field) is None else config[field]
        usable = isinstance(value, dict)
        if not usable or value.get("rope_type", value.get("type", "default")) != "default":
            refuse(path, field, "absent, or an object of rope_type 'default'", value)
        rope |= {name: value[name] for name in ROPE_FIELDS if name in value}
    check_fields(rope, ROPE_FIELDS, path)

    for field, part in (("hidden_size", "num_attention_heads"),
                        ("num_attention_heads", "num_key_value_heads")):
        if sizes[field] % sizes[part]:
            refuse(path, field, f"a multiple of '{part}' {sizes[part]}", sizes[field])
    head = sizes["hidden_size"] // sizes["num_attention_heads"]
    rotated = int(head * rope["partial_rotary_factor"])  # dimensions, which turn in pairs
    if rotated < 2 or rotated % 2:
        wanted = f"such that an even number of {head} dimensions is rotated"
        refuse(path, "partial_rotary_factor", wanted, rope["partial_rotary_factor"])
    return PhiConfig(**sizes, rope_parameters={"rope_type": "default", **rope})


def phi_fields(phi: PhiConfig) -> dict:
    """The sizes of a language model as they are saved."""
    sizes = {name: getattr(phi, name) for name in PHI_FIELDS}
    sizes |= {"model_type": "phi", "qk_layernorm": True}
    return sizes | {name: phi.rope_parameters[name] for name in ROPE_FIELDS}


# ------------------------------------------------------------------- tokenizers and other libraries


def load_tokenizer(folder):
    """The text tokenizer. Raises InputError unless it has a token for both ends of a text."""
    path = find_file(folder, "tokenizer_config.json")
    config = read_object(path) if path else {}
    if config.get("model_max_length") is not None:  # the one number, which transformers does not look at
        check_fields(config, {"model_max_length": (float, 1e31)}, path)
    tokenizer = load_hf(AutoTokenizer, folder)
    for name in ("bos_token", "eos_token"):
        if getattr(tokenizer, f"{name}_id") is None:
            raise InputError(f"{folder}: the text tokenizer has no {name} (tokenizer_config.json)")
    return tokenizer


def load_hf(kind, name: str, **settings):
    """A model or processor of any transformers class. Raises InputError if it does not load.

    Code that its folder may hold is neither asked about nor run.
    """
    try:
        return kind.from_pretrained(name, trust_remote_code=False, **settings)
    except Exception as error:
        raise InputError(f"{name}: cannot load as {kind.__name__} ({reason(error)})") from None
