"""JSON lines: checked as a whole, read one at a time, so that memory stays flat."""

import codecs
import copy
import json
import os
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from hermesflow.files import InputError, atomic, parse_json, reading, require_regular
from hermesflow.records import parse_record, validated


SHARD = r"[^/\\\0\n]+-\d{5}\.safetensors"  # beside the file


class RelativePath(str):
    """An image path that stood in its file relative to it, and is written so again."""


class Lines(Sequence):
    """The records of a JSONL file: all checked at once, and read again when they are asked for.

    Memory holds their ids and places alone. skipped: as in `validated`.
    """

    def __init__(self, path, kind: type, skipped: list[str] | None = None):
        self.path = Path(path)
        self.kind = kind
        self.complete = lambda record: record  # what a reader adds to every record
        self.ids = []
        self.places = array("q")  # bytes from the start of the file
        self.shards = set()
        require_regular(path)
        self.file = open(path, "rb")
        self.version = self.changed()
        for record, place in validated(self.build, self.scan(), path, skipped):
            self.ids.append(record.id)
            self.places.append(place)
            self.shards.add(getattr(record, "shard", ""))

    def changed(self) -> tuple[int, int]:
        now = os.fstat(self.file.fileno())
        return now.st_size, now.st_mtime_ns

    def scan(self) -> Iterator[tuple]:
        """(where, line, place) of every line that is not blank."""
        place = 0
        for number, line in enumerate(self.file, 1):
            start = len(codecs.BOM_UTF8) if number == 1 and line.startswith(codecs.BOM_UTF8) else 0
            try:
                text = line[start:].decode()
            except UnicodeDecodeError as error:
                error.start += place + start
                raise
            if text.strip():
                yield f"{self.path}: line {number}", text, place
            place += len(line)

    def build(self, line: str, where: str):
        record = parse_record(self.kind, parse_json(line, where), where)
        record.folder = self.path.parent
        if hasattr(record, "image"):
            record.image = resolve_image(record.image, record.folder)
        if getattr(record, "shard", "") and not re.fullmatch(SHARD, record.shard):
            raise InputError(f"{where}: field 'shard': {record.shard[:60]!r} is no name of a shard")
        return record

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i):
        if isinstance(i, slice):
            part = copy.copy(self)
            part.ids = self.ids[i]
            part.places = self.places[i]
            return part
        if self.changed() != self.version:
            raise InputError(f"{self.path}: changed while it was read")
        self.file.seek(self.places[i])
        line = self.file.readline().decode("utf-8-sig")
        return self.complete(self.build(line, f"{self.path}: id {self.ids[i]!r}"))


def lines_of(path) -> Iterator[tuple[str]]:
    """The lines as they are, for `Output.inputs`: a file that may grow."""
    with reading(path):
        require_regular(path)
        with open(path, encoding="utf-8") as lines:
            for line in lines:
                yield (line,)


def ids_of(records) -> list[str]:
    return records.ids if hasattr(records, "ids") else [r.id for r in records]


def resolve_image(image: str, folder: Path) -> str:
    """An absolute path: relative to `folder`, or (as in the original) to the working directory if
    the image exists there alone."""
    if os.path.isabs(image):
        return image
    beside = folder / image
    if os.path.exists(image) and not os.path.exists(beside):
        return os.path.abspath(image)
    return RelativePath(os.path.abspath(beside))


def read_jsonl(path, kind: type, skipped: list[str] | None = None) -> Lines:
    """The records of a JSONL file, every field checked against dataclass `kind`."""
    with reading(path):
        return Lines(path, kind, skipped)


def require_among(some: Lines, others: Lines) -> None:
    """Raises InputError unless all of `some` have their id among `others`."""
    absent = sorted(set(some.ids) - set(others.ids))
    if absent:
        raise InputError(f"{some.path}: field 'id': {absent[0]!r} is not among the samples in "
                         f"{others.path.parent}")


def to_line(record, folder) -> str:
    """A record as a line of a JSONL file in `folder`."""
    values = asdict(record)
    if isinstance(values.get("image"), RelativePath):
        values["image"] = os.path.relpath(values["image"], folder)
    return json.dumps(values, ensure_ascii=False, allow_nan=False) + "\n"


def write_jsonl(path, records) -> None:
    path = Path(path)
    with atomic(path) as temporary, open(temporary, "w", encoding="utf-8") as lines:
        for record in records:
            lines.write(to_line(record, path.parent))
