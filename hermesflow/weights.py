"""Weights of checkpoints: found in the layouts that people have, checked, and put into a module.

No code in a file ever runs: .bin files are read with weights_only=True.
"""

import math
import zipfile
from collections.abc import Iterable, Iterator
from itertools import chain, product
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from hermesflow.checkpoints import SHORT, absent_file, find_file, some_of
from hermesflow.files import InputError, read_object, reading, reason, require_regular

# Names of weights files, the first that is there is read: full precision before half, safetensors
# before pickles, one file before the index of many. Show-o's program and transformers begin them
# with the first two, diffusers with the last; `fp16` is what both call the variant of half
# precision.
BEGINNINGS = ("pytorch_model", "model", "diffusion_pytorch_model")
ENDS = ("safetensors", "bin", "safetensors.index.json", "bin.index.json",
        "fp16.safetensors", "fp16.bin", "safetensors.index.fp16.json", "bin.index.fp16.json")
WEIGHTS = [f"{beginning}.{end}" for end, beginning in product(ENDS, BEGINNINGS)]
READ_AT_ONCE = 2**28  # bytes of a weights file in memory, beside the weights that stay


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
        others = f"begin with {' or '.join(BEGINNINGS[1:])}, and end with {', '.join(ENDS[1:])}"
        message = f"{absent_file(folder, WEIGHTS[0])}; it could also {others}"
        raise InputError(f"{folder}: {message}")
    return path, shards(folder, path) if ".index." in Path(path).name else [path]


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
        missing = SHORT.repr(names[files.index(None)])
        raise InputError(f"{where}: {absent_file(folder, missing)}")
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
    with reading(file):
        require_regular(file)
    return read_safetensors(file) if is_safetensors(file) else read_bin(file)


def is_safetensors(file: str) -> bool:
    """By its name. A shard may have any, and is told by the header behind the first 8 bytes."""
    if file.endswith((".safetensors", ".bin")):
        return file.endswith(".safetensors")
    with reading(file), open(file, "rb") as content:
        return content.read(9)[8:] == b"{"


def is_mapped(file: str) -> bool:
    """Whether values are read from the file where they are used; old .bin files are read whole."""
    return is_safetensors(file) or zipfile.is_zipfile(file)


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
