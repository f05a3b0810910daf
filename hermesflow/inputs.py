"""Homologous inputs from the files that people have: our JSONL, the original's JSON."""

import json
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from hermesflow.contents import Item
from hermesflow.files import InputError, parse_json, read_text
from hermesflow.jsonl import Lines, ids_of, lines_of, read_jsonl, resolve_image
from hermesflow.records import Question, Record, check_question, parse_record, skipping, validated


def read_records(path, questions=None, skipped: list[str] | None = None) -> Sequence[Record]:
    """Homologous inputs from our JSONL, or from the original's initial_data.json and vqa_data.json.

    The original's ids are numbers or strings; questions are joined **by id**. skipped: as in
    `validated`.
    """
    path = Path(path)
    if path.suffix == ".jsonl":
        records = read_jsonl(path, Record, skipped)
    else:
        found = validated(original_record, read_array(path), path, skipped)
        records = [record for record, _ in found]
        for r in records:
            r.image = resolve_image(r.image, path.parent)
    if questions is None:
        return records
    asked = read_questions(questions, set(ids_of(records)), path, skipped)

    def with_questions(record: Record) -> Record:
        record.questions += asked.get(record.id, [])
        return record

    if isinstance(records, Lines):
        records.complete = with_questions
        return records
    return [with_questions(r) for r in records]


def record_items(path: Path, questions: Path | None, n: int | None = None) -> Iterator[Item]:
    """What the first n records say, and their images, for `Output.inputs`.

    Our JSONL is not checked, so that a complete stage answers at once with thousands.
    """
    if path.suffix != ".jsonl" or questions:
        for r in read_records(path, questions, [])[:n]:
            yield f"{r.id} {r.caption} {r.prompt} {r.questions}", Path(r.image)
        return
    lines = (line for (line,) in lines_of(path) if line.strip())
    for line in islice(lines, n):
        try:
            record = json.loads(line.lstrip("\ufeff"))
            said = [record.get(name) for name in ("id", "caption", "prompt", "questions")]
            yield repr(said), Path(resolve_image(record["image"], path.parent))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):  # said when records are read
            yield (line,)


def read_questions(path, ids: set[str], records_path,
                   skipped: list[str] | None) -> dict[str, list[Question]]:
    """The questions of a `vqa_data.json` by the id of their record."""
    questions = {}
    for where, value, _ in read_array(path):
        with skipping(skipped):
            question = parse_record(Question, value, where)
            check_question(question, where)
            owner = str(value.get("id"))
            if owner not in ids:
                message = f"field 'id': {value.get('id')!r} is not in {records_path}"
                raise InputError(f"{where}: {message}")
            questions.setdefault(owner, []).append(question)
    return questions


def read_array(path) -> list[tuple]:
    """(where, value, position) of every element of a JSON array.

    The original's programs write objects with a comma behind each, and no brackets.
    """
    text = read_text(path)
    try:
        value = parse_json(text, str(path))
    except InputError:
        value = objects_of(text)
        if not value:
            raise
    if not isinstance(value, list):
        raise InputError(f"{path}: expected an array of records, found {type(value).__name__}")
    return [(f"{path}: record {n}", v, n) for n, v in enumerate(value, 1)]


def objects_of(text: str) -> list | None:
    """JSON objects between commas, all in brackets or none; None if there is anything else."""
    text = text.strip()
    if text[:1] == "[" and text[-1:] == "]":
        text = text[1:-1]
    between = re.compile(r"[\s,]*")
    decoder = json.JSONDecoder()
    values = []
    place = between.match(text).end()
    while place < len(text):
        try:
            value, place = decoder.raw_decode(text, place)
        except (ValueError, RecursionError):
            return None
        values.append(value)
        place = between.match(text, place).end()
    return values


def original_record(value, where: str) -> Record:
    """A record of the original: its image is named img_path, its id may be a number.

    It draws the caption; its `prompt` is what the image was once made from, by another model.
    """
    if isinstance(value, dict):
        value = {**value, "image": value.get("image", value.get("img_path")), "prompt": ""}
        if type(value.get("id")) is int:
            value["id"] = str(value["id"])
    return parse_record(Record, value, where)
