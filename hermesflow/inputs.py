"""Homologous inputs from the files that people have, some of them or all, with their questions."""

import copy
import json
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from hermesflow.contents import Item
from hermesflow.datasets import (Source, array_rows, id_of, journeydb_questions, of_journeydb,
                                 source_of)
from hermesflow.files import InputError, parse_json, read_text, reading
from hermesflow.jsonl import Lines, ids_of, lines_of, resolve_image
from hermesflow.records import Question, Record, check_question, parse_record, skipping, validated


def read_records(path, questions=None, skipped: list[str] | None = None, image_folder=None,
                 skip: int = 0, limit: int | None = None) -> Sequence[Record]:
    """Homologous inputs from a file or folder in any format of `datasets.py`.

    questions: a file of them, joined **by id**. skipped: as in `validated`. image_folder: where
    relative names of images are looked up, instead of the file's folder. skip, limit: leave out
    the first records of the file, bad ones too, and read so many.
    """
    source = source_of(path)
    build = builder(source, image_folder)
    with names_of_the_file(source, skipped):
        if source.rows is None:
            with reading(source.file):
                records = RecordLines(source.file, build, skip, limit, skipped)
        else:
            rows = selected(source.rows, path, skip, limit)
            records = [record for record, _ in validated(build, rows, path, skipped)]
    if questions is None:
        return records
    among_all = not skip and limit is None
    asked = read_questions(questions, set(ids_of(records)), path if among_all else None, skipped)
    if not asked and not any(r.questions for r in records):
        why = f"; {skipped[-1]}" if skipped else ""
        raise InputError(f"{questions}: no question about any record of {path}{why}")

    def with_questions(record: Record) -> Record:
        record.questions += asked.get(record.id, [])
        return record

    if isinstance(records, Lines):
        records.complete = with_questions
        return records
    return [with_questions(r) for r in records]


def builder(source: Source, image_folder) -> Callable:
    """A function of a value of the file, and where it stands: its record."""
    folder = images_of(source, image_folder)

    def build(value, where: str) -> Record:
        if isinstance(value, dict) and None in value:  # what csv calls them
            raise InputError(f"{where}: more columns than the first line names; a text that holds a "
                             "comma needs quotes")
        fields = source.fields(value) if isinstance(value, dict) else value
        record = parse_record(Record, fields, where)
        record.image = resolve_image(record.image, folder)
        return record

    return build


@contextmanager
def names_of_the_file(source: Source, skipped: list[str] | None):
    """Messages of the block, and those it adds to `skipped`, name a field as the file does."""

    def renamed(message: str) -> str:
        return re.sub(r"(?<=: field ')\w+(?=')", lambda m: source.names.get(m[0], m[0]), message,
                      count=1)

    before = len(skipped or ())
    try:
        yield
    except InputError as error:
        raise InputError(renamed(str(error))) from None
    finally:
        if skipped:
            skipped[before:] = map(renamed, skipped[before:])


def images_of(source: Source, image_folder) -> Path:
    if image_folder and not Path(image_folder).is_dir():
        raise InputError(f"--image-folder {image_folder}: no such folder")
    return Path(image_folder or source.file.parent)


class RecordLines(Lines):
    """Records of a file that holds one a line, read when they are asked for."""

    def __init__(self, path, make: Callable, skip: int, limit: int | None, skipped):
        self.make = make
        self.part = (skip, limit)
        super().__init__(path, Record, skipped)

    def scan(self) -> Iterator[tuple]:
        return selected(super().scan(), self.path, *self.part)

    def build(self, line: str, where: str) -> Record:
        return self.make(parse_json(line, where), where)


def selected(values: Iterable, path, skip: int, limit: int | None) -> Iterator:
    """Those after the first `skip`, at most `limit`. Raises InputError if there are no such."""
    number = 0
    for number, value in enumerate(values, 1):
        if number > skip:
            yield value
        if limit is not None and number >= skip + limit:
            return
    if number <= skip and skip:
        raise InputError(f"{path}: --skip {skip} leaves none of its {number} records")


def those_with_questions(records: Sequence[Record], wanted: bool = True) -> Sequence[Record]:
    """The records that have questions, or those that have none; still read one at a time."""
    kept = [i for i, r in enumerate(records) if bool(r.questions) == wanted]
    if not isinstance(records, Lines):
        return [records[i] for i in kept]
    part = copy.copy(records)
    part.ids = [records.ids[i] for i in kept]
    part.places = array("q", [records.places[i] for i in kept])
    return part


# ------------------------------------------------------------------------- what decides the results


def record_items(path, questions=None, image_folder=None, skip: int = 0,
                 limit: int | None = None) -> Iterator[Item]:
    """What records say, their images and their questions, for `Output.inputs`.

    They are not checked, so that a complete stage answers at once with thousands.
    """
    source = source_of(path)
    folder = images_of(source, image_folder)
    asked = question_items(questions) if questions else None
    for _, value in selected(values_of(source), path, skip, limit):
        try:
            record = json.loads(value) if source.rows is None else value
            record = source.fields(record)
            said = [record.get(name) for name in ("id", "caption", "prompt", "questions")]
            item = repr(said), Path(resolve_image(record["image"], folder))
            # as it is joined: what is asked about others changes nothing
            yield item if asked is None else (*item, *asked.get(str(said[0]), []))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            yield (str(value),)  # said when records are read


def values_of(source: Source) -> Iterator[tuple]:
    """(where, value) of every record; of JSON lines, the value is the text."""
    if source.rows is not None:
        yield from ((where, value) for where, value, _ in source.rows)
        return
    for number, (line,) in enumerate(lines_of(source.file), 1):
        text = line.lstrip("\ufeff")
        if text.strip():
            yield f"{source.file}: line {number}", text


def question_items(path) -> dict[str, list[str]]:
    """id of a record -> what is asked about it."""
    items = {}
    for where, value in question_values(path):
        try:
            value = parse_json(value, where) if isinstance(value, str) else value
            said = [value.get(name) for name in ("question", "choices", "answer", "element")]
            items.setdefault(str(value.get("id")), []).append(repr(said))
        except (InputError, AttributeError):  # said when questions are read
            continue
    return items


# ---------------------------------------------------------------------------------------- questions


def read_questions(path, ids: set[str], records_path,
                   skipped: list[str] | None) -> dict[str, list[Question]]:
    """The questions of a file by the id of their record.

    records_path: the file that must have all of these records; None: others are left out.
    """
    questions = {}
    for where, value in question_values(path):
        with skipping(skipped):
            value = parse_json(value, where) if isinstance(value, str) else value
            question = parse_record(Question, value, where)
            check_question(question, where)
            owner = str(value.get("id"))
            if owner in ids:
                questions.setdefault(owner, []).append(question)
            elif records_path:
                message = f"field 'id': {value.get('id')!r} is not in {records_path}"
                raise InputError(f"{where}: {message}")
    return questions


def unread_questions(path, records: Sequence[Record], image_folder=None, skip: int = 0,
                     limit: int | None = None) -> str:
    """How many of JourneyDB's records lost questions that cannot be read, and why; empty: none."""
    source = source_of(path)
    if source.fields is not of_journeydb:
        return ""
    ids = set(ids_of(records))
    reasons = {}  # id -> why the first of its questions was left out
    for where, value in selected(values_of(source), path, skip, limit):
        with suppress(InputError):  # said when records are read
            value = parse_json(value, where) if source.rows is None else value
        unread = []
        if isinstance(value, dict):
            journeydb_questions(value.get("Task3"), unread)
        if unread and str(id_of(value.get("img_path"))) in ids:
            reasons.setdefault(id_of(value["img_path"]), f"{where}: field 'Task3': {unread[0]}")
    if not reasons:
        return ""
    return (f"{len(reasons)} of {len(records)} records have questions that cannot be read, which "
            f"are left out; the first: {next(iter(reasons.values()))}")


def question_values(path) -> list[tuple]:
    """(where, value) of every question; of JSON lines, the value is the text.

    As `hermesflow.questions` writes them, or the original's vqa_data.json.
    """
    text = read_text(path)
    if Path(path).suffix != ".jsonl" or text.lstrip()[:1] == "[":
        return [(where, value) for where, value, _ in array_rows(path)]
    lines = enumerate(text.split("\n"), 1)
    return [(f"{path}: line {n}", line.strip().rstrip(",")) for n, line in lines if line.strip()]
