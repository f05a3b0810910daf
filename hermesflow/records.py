"""The records that stages pass as JSON lines: their fields, checks, readers and writers.

records.jsonl → 01 → samples.jsonl → 02 → scores.jsonl, pairs.jsonl → 03
"""

import json
import os
import typing
import unicodedata
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path

import torch

from hermesflow.files import InputError, load_tensors, parse_json, read_text, write_text

CAPTION_QUESTION = "Give a caption for this image."  # the released captioning prompt


@dataclass
class Question:
    question: str
    choices: list[str]
    answer: str
    element: str = ""  # what the question is about: color, counting, spatial, …


@dataclass
class Record:
    """One homologous input (x, y): an image, its caption, and questions about drawings of it."""

    id: str
    image: str  # path, relative to the records file
    caption: str
    prompt: str = ""  # the text to draw from; empty: the caption
    questions: list[Question] = field(default_factory=list)

    @property
    def drawing_text(self) -> str:
        return self.prompt or self.caption


@dataclass
class Sample(Record):
    """A record with the policy's captions.

    Token ids and image codes are in samples.safetensors under the same id.
    """

    captions: list[str] = field(default_factory=list)


@dataclass
class Score:
    """The scores of one sampled record; `answers[k][q]` is the policy's answer about image k."""

    id: str
    questions: list[Question]
    caption_scores: list[float]
    image_scores: list[float]
    answers: list[list[str]]
    dropped: str = ""  # why the record gives no pair; empty: it does


@dataclass
class Pair:
    """One homologous preference record (x, y, y_w, y_l, x_w, x_l), with the tokens to train on."""

    id: str
    image: str
    caption: str
    prompt: str
    image_codes: list[int]
    win_caption: str
    lose_caption: str
    win_caption_ids: list[int]
    lose_caption_ids: list[int]
    win_caption_score: float
    lose_caption_score: float
    win_image_codes: list[int]
    lose_image_codes: list[int]
    win_image_score: float
    lose_image_score: float
    win_image_wrong: list[str]  # the questions that the policy answered wrong about it
    lose_image_wrong: list[str]

    @property
    def drawing_text(self) -> str:
        return self.prompt or self.caption


def vqa_question(question: Question) -> str:
    """A multiple-choice question as the original asks it, with its choices as a Python list."""
    return f"Question:{question.question} Choice:{question.choices}"


# ----------------------------------------------------------------------------------------- checking


def parse_record(kind: type, value, where: str):
    """Build dataclass `kind` from JSON, checking every field.

    Raises InputError naming `where` and the field.
    """
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected an object, found {type(value).__name__}")
    values = {}
    for f in fields(kind):
        if f.name in value:
            values[f.name] = parse_value(f.type, value[f.name], f"{where}: field '{f.name}'")
        elif f.default is MISSING and f.default_factory is MISSING:
            raise InputError(f"{where}: field '{f.name}' is missing")
    return kind(**values)


def parse_value(kind, value, where: str):
    """`value` as a `kind`: str, int, float, bool, a list of these, or a dataclass.

    Raises InputError.
    """
    if typing.get_origin(kind) is list:
        if not isinstance(value, list):
            raise InputError(f"{where} should be a list, found {type(value).__name__}")
        element = typing.get_args(kind)[0]
        return [parse_value(element, v, where) for v in value]
    if is_dataclass(kind):
        return parse_record(kind, value, where)
    fits = type(value) is kind or (kind is float and type(value) is int)  # so true is no number
    if fits and kind is float:
        fits = abs(value) <= 1e300
    if fits and kind is int:
        fits = abs(value) < 2**63  # a tensor holds no more
    if fits and kind is str:
        fits = value.isascii() or not has_lone_surrogate(value)
    if not fits:
        raise InputError(f"{where} should be {kind.__name__}, found {json.dumps(value)[:60]}")
    return kind(value)


def has_lone_surrogate(text: str) -> bool:
    """Half of a surrogate pair is legal in JSON and cannot be written to a file again."""
    return any("\ud800" <= c <= "\udfff" for c in text)


def validate_records(build, values: list, path, skipped: list[str] | None) -> list:
    """build(value, where) for each (where, value), with unique ids, texts and answerable questions.

    skipped: a list that takes the reasons of bad records, which are left out; None: the first one
    raises InputError.
    """
    records = []
    ids = set()
    for where, value in values:
        with skipping(skipped):
            record = build(value, where)
            check_id(record.id, ids, where)
            if isinstance(record, Record) and not record.drawing_text.strip():
                raise InputError(f"{where}: field 'caption' is empty")
            for question in getattr(record, "questions", []):
                check_question(question, where)
            ids.add(unicodedata.normalize("NFC", record.id))
            records.append(record)
    if not records:
        raise InputError(f"{path}: no records" + (f"; {skipped[0]}" if skipped else ""))
    return records


def check_id(id: str, known: set[str], where: str) -> None:
    """Ids join the stages and name files: unique, non-empty, and safe as a file name."""
    unsafe = any(c in "/\\" or not c.isprintable() for c in id)
    if id in ("", ".", "..") or len(id.encode()) > 200 or unsafe:
        raise InputError(f"{where}: field 'id': {id[:60]!r} cannot be used as a file name")
    if unicodedata.normalize("NFC", id) in known:
        raise InputError(f"{where}: field 'id': {id!r} occurs twice")


def check_question(q: Question, where: str) -> None:
    asked = repr(q.question[:40])
    if not q.choices:
        raise InputError(f"{where}: field 'choices' is empty: {asked}")
    if q.answer not in q.choices:
        answer = repr(q.answer[:40])
        raise InputError(f"{where}: field 'answer': {answer} is not among the choices of {asked}")


@contextmanager
def skipping(skipped: list[str] | None):
    """With a list, bad input inside the block ends the block alone, and its reason is noted."""
    try:
        yield
    except InputError as error:
        if skipped is None:
            raise
        skipped.append(str(error))


def check_samples(model, samples: list[Sample], tensors: dict, folder) -> None:
    """Raises InputError if the codes or token ids of samples were made with another model."""
    for s in samples:
        where = f"{folder}/samples.safetensors: id {s.id!r}:"
        model.check_codes(tensors[f"{s.id}/image"], f"{where} image")
        model.check_codes(tensors[f"{s.id}/images"], f"{where} images")
        captions = tensors[f"{s.id}/captions"]  # -1 pads
        model.check_text_ids(captions[captions != -1], f"{where} captions")


def check_pairs(model, pairs: list[Pair], path) -> None:
    """Raises InputError if the codes or token ids of pairs were made with another model."""
    for p in pairs:
        where = f"{path}: id {p.id!r}: field"
        for name in ("image_codes", "win_image_codes", "lose_image_codes"):
            model.check_codes(torch.tensor(getattr(p, name)), f"{where} '{name}'")
        for name in ("win_caption_ids", "lose_caption_ids"):
            model.check_text_ids(torch.tensor(getattr(p, name)), f"{where} '{name}'")


# ------------------------------------------------------------------------------ reading and writing


def read_jsonl(path, kind: type, skipped: list[str] | None = None) -> list:
    """The records of a JSONL file, every field checked against dataclass `kind`."""
    lines = enumerate(read_text(path).split("\n"), 1)
    values = [(f"{path}: line {n}", line) for n, line in lines if line.strip()]

    def build(line, where):
        return parse_record(kind, parse_json(line, where), where)

    return validate_records(build, values, path, skipped)


def write_jsonl(path, records: list) -> None:
    lines = [json.dumps(asdict(r), ensure_ascii=False) + "\n" for r in records]
    write_text(path, "".join(lines))


def read_samples(folder) -> tuple[list[Sample], dict]:
    """The samples of stage 1, and their tensors by name. Raises InputError if one is missing."""
    samples = read_jsonl(f"{folder}/samples.jsonl", Sample)
    tensors = load_tensors(f"{folder}/samples.safetensors")
    for s in samples:
        for name in ("image", "images", "captions"):
            if f"{s.id}/{name}" not in tensors:
                raise InputError(f"{folder}/samples.safetensors: no '{name}' for id {s.id!r}")
        if len(tensors[f"{s.id}/captions"]) != len(s.captions):
            message = f"{len(s.captions)} captions but other token ids"
            raise InputError(f"{folder}: id {s.id!r}: {message}")
    return samples, tensors


def read_records(path, questions=None, skipped: list[str] | None = None) -> list[Record]:
    """Homologous inputs from our JSONL, or from the original's initial_data.json and vqa_data.json.

    The original's ids are numbers or strings; questions are joined **by id**. Image paths are made
    absolute: relative to the records file, or (as in the original) to the working directory if they
    exist there alone. skipped: as in `validate_records`.
    """
    path = Path(path)
    if path.suffix == ".jsonl":
        records = read_jsonl(path, Record, skipped)
    else:
        records = validate_records(original_record, read_array(path), path, skipped)
    if questions is not None:
        join_questions(records, path, questions, skipped)
    for r in records:
        beside = path.parent / r.image
        only_here = os.path.exists(r.image) and not os.path.exists(beside)
        r.image = os.path.abspath(r.image if only_here else beside)
    return records


def join_questions(records: list[Record], path, questions, skipped: list[str] | None) -> None:
    """Append the questions of a `vqa_data.json` to the records of the same id."""
    by_id = {r.id: r for r in records}
    for where, value in read_array(questions):
        with skipping(skipped):
            question = parse_record(Question, value, where)
            check_question(question, where)
            owner = by_id.get(str(value.get("id")))
            if owner is None:
                raise InputError(f"{where}: field 'id': {value.get('id')!r} is not in {path}")
            owner.questions.append(question)


def read_array(path) -> list[tuple]:
    """(where, value) of every element of a JSON array."""
    value = parse_json(read_text(path), str(path))
    if not isinstance(value, list):
        raise InputError(f"{path}: expected an array of records, found {type(value).__name__}")
    return [(f"{path}: record {n}", v) for n, v in enumerate(value, 1)]


def original_record(value, where: str) -> Record:
    """A record of the original: its image is named img_path, its id may be a number."""
    if isinstance(value, dict):
        value = {**value, "image": value.get("image", value.get("img_path"))}
        if type(value.get("id")) is int:
            value["id"] = str(value["id"])
    return parse_record(Record, value, where)
