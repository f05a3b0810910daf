"""Files read with one clear line for whatever is wrong, and written whole or not at all."""

import hashlib
import json
import os
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.utils import cached_file


class InputError(Exception):
    """Something the user gave us is wrong.

    The message names the file, the line or id, and the field.
    """


def reason(error: Exception) -> str:
    """The first line of a library's message, or at least the kind of error."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0]


# ------------------------------------------------------------------------------------------ reading


def read_text(path) -> str:
    """A UTF-8 file. Raises InputError if it cannot be read or is not UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from None


def parse_json(text: str, where: str):
    """The value of a JSON text. Raises InputError naming `where`; NaN and Infinity are not JSON."""

    def reject(name):
        raise ValueError(f"{name} is not a JSON number")

    try:
        return json.loads(text, parse_constant=reject)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not valid JSON ({error})") from None


def read_object(path) -> dict:
    """The JSON object in a file. Raises InputError if it is anything else."""
    value = parse_json(read_text(path), str(path))
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected an object, found {type(value).__name__}")
    return value


def load_tensors(path) -> dict:
    """name -> tensor of a safetensors file. Raises InputError if it cannot be read."""
    try:
        return load_file(path)
    except Exception as error:  # safetensors raises its own type, the file system OSError
        raise InputError(f"{path}: cannot read: {error}") from None


def find_file(folder, name: str) -> str | None:
    """The path of a file in a folder or hub repository, or None if it has no such file.

    Raises InputError if `folder` is neither a folder here nor a repository that can be reached.
    """
    if Path(folder).exists():
        path = Path(folder) / name
        return str(path) if path.is_file() else None
    try:
        return cached_file(str(folder), name, _raise_exceptions_for_missing_entries=False)
    except Exception as error:  # a name that is no repository id, a repository that does not exist
        message = f"{folder}: neither a folder here nor reachable on the hub ({reason(error)})"
        raise InputError(message) from None


def digest(path) -> str:
    """The content of what a stage reads, in 16 hexadecimal digits.

    path: a file, a folder (all files below it) or a list of files. Of a hub repository: its
    revision.
    """
    if isinstance(path, list):
        contents = [digest(p) if Path(p).is_file() else "missing" for p in path]
        return hashlib.sha256("".join(contents).encode()).hexdigest()[:16]
    path = Path(path)
    if not path.exists():
        config = find_file(path, "config.json")  # …/snapshots/REVISION/config.json
        return Path(config).parent.name[:16] if config else ""
    files = [path]
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file())
    total = hashlib.sha256()
    try:
        for file in files:
            with open(file, "rb") as content:
                one = hashlib.file_digest(content, "sha256").hexdigest()
            total.update(f"{file.relative_to(path)} {one}\n".encode())
    except OSError as error:
        raise InputError(f"{error.filename}: {error.strerror}") from None
    return total.hexdigest()[:16]


# ------------------------------------------------------------------------------------------ writing


@contextmanager
def writing(path):
    """What prevents writing (no space, read-only, no permission) becomes one line naming `path`."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch reports a full disk as a RuntimeError; any other RuntimeError is a bug, not the disk
        from_torch = "PytorchStreamWriter" in str(error) or "iostream" in str(error)
        if isinstance(error, RuntimeError) and not from_torch:
            raise
        why = getattr(error, "strerror", None) or reason(error)
        message = f"{path}: cannot write: {why}; the same command continues from here"
        raise InputError(message) from None


@contextmanager
def atomic(path):
    """Yield a temporary sibling of `path` (file or folder), renamed if the block succeeds."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            if temporary.is_dir() and path.is_dir():
                shutil.rmtree(path)
            os.replace(temporary, path)
    finally:
        with suppress(OSError):
            if temporary.is_dir():
                shutil.rmtree(temporary)
            else:
                temporary.unlink(missing_ok=True)


def write_text(path, text: str) -> None:
    """Write a text file whole or not at all."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_tensors(path, tensors: dict) -> None:
    """Write a safetensors file whole or not at all."""
    with atomic(path) as temporary:
        save_file({name: t.contiguous() for name, t in tensors.items()}, temporary)


def remove(*paths: Path) -> None:
    """Remove files and folders that may or may not be there."""
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
