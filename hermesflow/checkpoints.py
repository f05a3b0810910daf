"""Checkpoint files: configs, tokenizers, and whatever transformers loads. Weights: weights.py.

No code in a file ever runs: transformers loads everything with trust_remote_code=False.
"""

import json
import os
import reprlib
from contextlib import contextmanager, suppress
from pathlib import Path

from transformers import AutoTokenizer, PhiConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.utils import logging

from hermesflow import hub
from hermesflow.files import InputError, read_object, reading, reason, require_regular

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
    return hub.find(str(folder), name)


def absent_file(folder, name: str) -> str:
    """What to say of a file that `find_file` did not find."""
    return f"{name} is missing" if os.path.exists(folder) else hub.absent(name)


def read_config(folder) -> dict:
    """The config.json of a folder or hub repository. Raises InputError if there is none."""
    path = find_file(folder, "config.json")
    if path is None:
        raise InputError(f"{folder}: {absent_file(folder, 'config.json')}")
    return read_object(path)


def refuse_clip_vit(config: dict, folder) -> None:
    """Raises InputError for the variant of Show-o that sees images without codes."""
    if config.get("w_clip_vit"):
        what = "understands images by continuous CLIP-ViT features, not by the codes that it draws"
        message = f"this Show-o {what}; take one of codes only, such as showlab/show-o-512x512"
        raise InputError(f"{folder}/config.json: field 'w_clip_vit' is true: {message}")


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


def some_of(names: list[str]) -> str:
    shown = [n if n.isprintable() and len(n) < 200 else SHORT.repr(n) for n in names[:8]]
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(shown) + more


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

# what transformers needs of a hub repository: of each group one file
CONFIG = ("config.json",)
MODEL = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
         "pytorch_model.bin.index.json")
PROCESSOR = ("processor_config.json", "preprocessor_config.json")
TOKENIZER = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model")
NEEDED = {"AutoConfig": (CONFIG,), "AutoTokenizer": (TOKENIZER,), "AutoProcessor": (PROCESSOR,),
          "AutoImageProcessor": (PROCESSOR,)}
OPTIONAL = "pooler"  # a head that encoders may lack, and that nobody here uses


def load_tokenizer(folder):
    """The text tokenizer. Raises InputError unless it has a token for both ends of a text."""
    path = find_file(folder, "tokenizer_config.json")
    config = read_object(path) if path else {}
    if config.get("model_max_length") is not None:  # the one number, and transformers looks at none
        check_fields(config, {"model_max_length": (float, 1e31)}, path)
    tokenizer = load_hf(AutoTokenizer, folder)
    for name in ("bos_token", "eos_token"):
        if getattr(tokenizer, f"{name}_id") is None:
            raise InputError(f"{folder}: the text tokenizer has no {name} (tokenizer_config.json)")
    return tokenizer


def save_tokenizer(tokenizer, folder: Path) -> None:
    """Write a tokenizer so that transformers 4, which the original needs, reads it, too."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = read_object(path)
    if config.get("tokenizer_class") == "TokenizersBackend":  # the new name of this class
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    # how it was loaded, which would make the folder's content depend on a connection
    for name in ("backend", "is_local", "local_files_only"):
        config.pop(name, None)
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    # the merges of a BPE as "a b", where the new form is ["a", "b"]
    path = folder / "tokenizer.json"
    content = read_object(path) if path.exists() else {"model": {}}
    merges = content["model"].get("merges", [])
    if merges and not any(isinstance(m, str) or " " in "".join(m) for m in merges):
        content["model"]["merges"] = [" ".join(m) for m in merges]
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")


def load_hf(kind, name: str, **settings):
    """A model or processor of any transformers class. Raises InputError if it does not load whole.

    Code that its folder may hold is neither asked about nor run.
    """
    is_model = kind.__name__.startswith("AutoModel") or issubclass(kind, PreTrainedModel)
    hub.require(name)
    if is_model:
        settings["output_loading_info"] = True
    try:
        with only_errors():
            loaded = kind.from_pretrained(name, trust_remote_code=False, **settings)
    except Exception as error:
        why = reason(error)
    else:
        why = missing_parameters(*loaded) if is_model else missing_words(loaded)
    if why:
        for file in filter(Path.is_file, Path(name).glob("*")):
            with reading(file):
                require_regular(file)  # one that Git LFS has yet to fetch
        needed = (CONFIG, MODEL) if is_model else NEEDED.get(kind.__name__, ())
        why = (not os.path.exists(name) and hub.lacks(str(name), needed)) or why
        raise InputError(f"{name}: cannot load as {kind.__name__} ({why})")
    return loaded[0] if is_model else loaded


@contextmanager
def only_errors():
    """Without the tables in which transformers reports what a file lacks, or has besides.

    And without its bar over weights; those over downloads are of the hub's library, and stay.
    """
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    hook = logging.set_tqdm_hook(lambda make, args, how: make(*args, **how | {"disable": True}))
    try:
        yield
    finally:
        logging.set_verbosity(before)
        logging.set_tqdm_hook(hook)


def missing_parameters(model: PreTrainedModel, info: dict) -> str:
    """Those that transformers draws at random; what else is missing is computed and not learnt."""
    parameters = {name for name, _ in model.named_parameters()}
    missing = [n for n in info["missing_keys"] if n in parameters and OPTIONAL not in n]
    if not missing:
        return ""
    return f"{len(missing)} of {len(parameters)} parameters are missing: {some_of(sorted(missing))}"


def missing_words(processor) -> str:
    """Without the file of a vocabulary, transformers makes a tokenizer of special tokens only."""
    tokenizer = getattr(processor, "tokenizer", processor)
    if not hasattr(tokenizer, "get_vocab"):
        return ""
    words = tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens)
    return "" if len(words) > 1 else "the vocabulary of its tokenizer is missing"
