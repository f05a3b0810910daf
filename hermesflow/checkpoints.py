"""Checkpoint files: config, weights in the published layouts, tokenizers.

Nothing in a file is executed: .bin files are read with weights_only=True.
"""

from pathlib import Path

import torch
from torch import nn
from transformers import AutoTokenizer, PhiConfig

from hermesflow.files import InputError, find_file, load_tensors, read_object, reason

WEIGHTS = ("pytorch_model.safetensors", "model.safetensors", "pytorch_model.bin",
           "pytorch_model.safetensors.index.json", "model.safetensors.index.json",
           "pytorch_model.bin.index.json")
PHI_FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
              "num_key_value_heads", "layer_norm_eps", "hidden_act", "max_position_embeddings",
              "vocab_size")


def read_config(folder) -> dict:
    """The config.json of a folder or hub repository. Raises InputError if there is none."""
    path = find_file(folder, "config.json")
    if path is None and Path(folder).exists():
        raise InputError(f"{folder}: config.json is missing")
    if path is None:
        raise InputError(f"{folder}: neither a folder here nor reachable on the hub")
    return read_object(path)


def read_weights(folder) -> tuple[dict, str]:
    """All tensors of a checkpoint (whole or sharded), and the file they came from."""
    candidates = (find_file(folder, name) for name in WEIGHTS)
    path = next((p for p in candidates if p), None)
    if path is None:
        raise InputError(f"{folder}: no weights; looked for {', '.join(WEIGHTS)}")
    files = shards(folder, path) if path.endswith(".index.json") else [path]
    weights = {}
    for file in files:
        weights.update(read_bin(file) if file.endswith(".bin") else load_tensors(file))
    return weights, path


def shards(folder, index: str) -> list[str]:
    """The files of a sharded checkpoint."""
    weight_map = read_object(index).get("weight_map")
    usable = isinstance(weight_map, dict) and weight_map
    if not usable or not all(isinstance(name, str) for name in weight_map.values()):
        raise InputError(f"{index}: field 'weight_map' should name a file for every parameter")
    names = sorted(set(weight_map.values()))
    files = [find_file(folder, name) for name in names]
    if None in files:
        raise InputError(f"{index}: field 'weight_map': {names[files.index(None)]} is missing")
    return files


def read_bin(file: str) -> dict:
    """name -> tensor of a .bin file. Raises InputError for anything but plain tensors."""
    try:
        weights = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip, end of file, code that was not run, …
        raise InputError(f"{file}: not a file of plain tensors ({reason(error)})") from None
    values = weights.values() if isinstance(weights, dict) else [weights]
    if not isinstance(weights, dict) or not all(isinstance(v, torch.Tensor) for v in values):
        raise InputError(f"{file}: expected a dictionary of parameter names and tensors")
    return weights


def load_weights(module: nn.Module, weights: dict, path: str, dtype=torch.float32) -> None:
    """Put `weights` into a module built on the meta device.

    Raises InputError unless all names and shapes match.
    """
    expected = module.state_dict()
    problems = [("missing", sorted(expected.keys() - weights.keys())),
                ("unexpected", sorted(weights.keys() - expected.keys())),
                ("wrong shape", wrong_shapes(expected, weights))]
    messages = [f"{what}: {some_of(names)}" for what, names in problems if names]
    if messages:
        raise InputError(f"{path}: parameters do not fit the model; {'; '.join(messages)}")
    for name, value in weights.items():
        same_kind = value.is_floating_point() == expected[name].is_floating_point()
        if not same_kind or not value.isfinite().all():
            message = "holds values that are not finite numbers, or another dtype"
            raise InputError(f"{path}: parameter {name} {message} ({value.dtype})")
    converted = {k: v.to(dtype) if v.is_floating_point() else v for k, v in weights.items()}
    module.load_state_dict(converted, assign=True)


def wrong_shapes(expected: dict, weights: dict) -> list[str]:
    wrong = []
    for name, value in expected.items():
        if name in weights and weights[name].shape != value.shape:
            wrong.append(f"{name} {tuple(weights[name].shape)} instead of {tuple(value.shape)}")
    return wrong


def some_of(names: list[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more


def full_precision(weights: dict) -> dict:
    """Weights as they are saved: float32 on the CPU."""
    saved = {}
    for name, value in weights.items():
        value = value.detach().cpu()
        saved[name] = value.float().contiguous() if value.is_floating_point() else value
    return saved


def phi_config(folder, name: str) -> PhiConfig:
    """The language model's sizes: a file beside the checkpoint, or Phi-1.5 (the defaults)."""
    where = f"{folder}/config.json: field 'llm_model_path'"
    if not isinstance(name, str) or not name:
        raise InputError(f"{where} should be a name, found {name!r}")
    path = find_file(folder, Path(name).name)
    if path is not None:
        return PhiConfig.from_dict(read_object(path))
    if Path(name).name == "phi-1_5":
        return PhiConfig()
    try:
        return PhiConfig.from_pretrained(name)
    except Exception:
        raise InputError(f"{where}: no Phi configuration at {name!r}") from None


def phi_fields(phi: PhiConfig) -> dict:
    """The sizes of a language model as they are saved."""
    sizes = {name: getattr(phi, name) for name in PHI_FIELDS}
    sizes |= {"model_type": "phi", "qk_layernorm": True}
    for name in ("rope_theta", "partial_rotary_factor"):
        sizes[name] = phi.rope_parameters[name]
    return sizes


def load_tokenizer(folder):
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        message = f"{folder}: cannot load the text tokenizer ({reason(error)})"
        raise InputError(message) from None


def load_hf(kind, name: str, **settings):
    """A model or processor of any transformers class. Raises InputError if it does not load."""
    try:
        return kind.from_pretrained(name, **settings)
    except Exception as error:
        raise InputError(f"{name}: cannot load as {kind.__name__} ({reason(error)})") from None
