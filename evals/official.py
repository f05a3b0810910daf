"""What the readers of official benchmark files share.

Wrong or missing files raise InputError, which names the file, the line or record, the field, and
the official file that belongs there.
"""

import csv
import io
import json
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from hermesflow.contents import Item
from hermesflow.files import (InputError, parse_json, read_object, read_text, reason,
                              require_regular, write_text)
from hermesflow.records import parse_value

# LLaVA's wording, for POPE, MME, VQAv2 and GQA
SHORT_ANSWER = "\nAnswer the question using a single word or phrase."

PREDICTIONS_ONLY = {"answers": "none in DATA: predictions only"}  # metrics of a test split

TEXTS_AND_WEIGHTS = (".json", ".jsonl", ".csv", ".txt", ".npz", ".pth")
MANY = 10_000  # files, at which hashing the images would take longer than a rerun may


def require(condition, where, problem: str) -> None:
    """Raise InputError "where: problem" unless the condition holds."""
    if not condition:
        raise InputError(f"{where}: {problem}")


def expected(path, what: str) -> Path:
    """`path`, or an InputError that says which official file belongs there."""
    require(os.path.exists(path), path, f"not found; expected here: {what}")
    return Path(path)


def only(folder: Path, pattern: str) -> Path:
    """The one file of a folder that matches a glob pattern."""
    files = sorted(folder.glob(pattern))
    names = f": {', '.join(file.name for file in files[:5])}" if files else ""
    require(len(files) == 1, folder, f"expected one file {pattern}, found {len(files)}{names}")
    return files[0]


def read_json(path, what: str, kind: type):
    """The JSON of an official file; its outermost value is a `kind` (dict or list), not empty."""
    value = parse_json(read_text(expected(path, what)), str(path))
    if not isinstance(value, kind) or not value:
        actual = type(value).__name__ if value else "nothing"
        raise InputError(f"{path}: expected a {kind.__name__} ({what}), found {actual}")
    return value


def read_json_lines(path, what: str) -> list[tuple[str, dict]]:
    """(where, record) of every line of an official JSON lines file; blank lines are skipped."""
    records = []
    for n, line in enumerate(read_text(expected(path, what)).split("\n"), 1):
        if line.strip():
            where = f"{path}: line {n}"
            record = parse_json(line, where)
            require_object(record, where)
            records.append((where, record))
    require(records, path, f"no records; expected here: {what}")
    return records


def read_table(path, what: str, delimiter: str = ",") -> Iterator[tuple[str, dict]]:
    """(where, row) of every row below the first of an official table; fields may be long."""
    reader = csv.DictReader(io.StringIO(read_text(expected(path, what))), delimiter=delimiter)
    limit = csv.field_size_limit(sys.maxsize)
    where = ""
    try:
        for row in reader:  # blank lines are skipped
            where = f"{path}: line {reader.line_num}"
            yield where, row
    except csv.Error as error:
        raise InputError(f"{path}: line {reader.line_num}: not a table ({error})") from None
    finally:
        csv.field_size_limit(limit)
    require(where, path, f"no rows; expected here: {what}")


def require_object(record, where: str) -> None:
    actual = type(record).__name__
    require(isinstance(record, dict), where, f"expected an object, found {actual}")


def get(record: dict, name: str, kind, where: str):
    """A field of an official record, of the type `kind` (such as str or list[dict])."""
    require_object(record, where)
    require(name in record, where, f"field '{name}' is missing")
    return parse_value(kind, record[name], f"{where}: field '{name}'")


def note_id(known: set, id, where: str, name: str) -> None:
    """Add the id of a record to those before it. Raises InputError if it is one of them."""
    require(id not in known, where, f"field '{name}': {id!r} occurs twice")
    known.add(id)


def percent(values) -> float:
    """Mean of shares, in percent."""
    return 100 * sum(values) / len(values)


def read_picture(path, upright: bool = False) -> Image.Image:
    """An image file in RGB; upright: turned as its EXIF says. Raises InputError if it is none."""
    from hermesflow import pictures  # here: it imports torch

    try:
        require_regular(path)
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            image = pictures.upright(image) if upright else image
            return pictures.eight_bits(image).convert("RGB")
    except Exception as error:  # Pillow raises OSError, ValueError, SyntaxError, …
        raise InputError(f"{path}: cannot read image: {reason(error)}") from None


def write_prompt(file: Path, record: dict) -> None:
    """A record beside the images of its prompt, unless one came with another model's images.

    Raises InputError if that is of another prompt.
    """
    if file.exists():
        theirs = read_object(file).get("prompt")
        require(theirs == record["prompt"], file, f"of {theirs!r}, not of {record['prompt']!r}")
    else:
        write_text(file, json.dumps(record) + "\n")


def files_below(folder: Path) -> Iterator[Item]:
    """A file, or all files of a folder, for `Output.inputs`; of MANY, images by their size alone.

    The number comes first, so that a folder with more files is another one, not one that has grown.
    """
    if not folder.is_dir():
        yield (folder,)
        return
    files = sorted(walk(folder))
    yield (f"{len(files)} files",)
    for file in files:
        name = file[len(str(folder)) :]
        if len(files) <= MANY or file.endswith(TEXTS_AND_WEIGHTS):
            yield name, Path(file)
        else:
            yield (f"{name} {os.path.getsize(file)}",)


def walk(folder) -> Iterator[str]:
    """The files below a folder, also behind links, without hidden ones."""
    seen = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        folders[:] = [n for n in folders if not n.startswith(".") and real not in seen]
        if real not in seen:
            seen.add(real)
            yield from (os.path.join(parent, n) for n in names if not n.startswith("."))
