"""The records that stages pass as JSON lines: their fields, and how they are checked.

records.jsonl → 01 → samples.jsonl → 02 → scores.jsonl, pairs.jsonl → 03

Read and written by jsonl.py; their tensors are in shards beside them (tables.py).
"""

import json
import typing
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields, is_dataclass

from hermesflow.files import InputError

CAPTION_QUESTION = "Give a caption for this image."  # the released captioning prompt


@dataclass
class Question:
    question: str
    choices: list[str]
    answer: str
    element: str = ""  # what the question is about: color, counting, spatial, …

    def __post_init__(self):
        """The answer in other letters is the choice: "Yes" is "yes"."""
        if self.answer not in self.choices:
            alike = [c for c in self.choices if c.strip().lower() == self.answer.strip().lower()]
            self.answer = alike[0] if alike else self.answer


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

    Tensors: image (N,), images (K, N), captions (n, L), exactly the tokens that were sampled.
    """

    captions: list[str] = field(default_factory=list)
    ended: list[bool] = field(default_factory=list)  # false: cut at --max-new-tokens
    shard: str = ""  # file that holds the tensors
    row: int = 0  # in it
    digest: str = ""  # of them


@dataclass
class Score:
    """The scores of one sampled record; `answers[k][q]` is the policy's answer about image k."""

    id: str
    questions: list[Question]
    caption_scores: list[float]
    image_scores: list[float]
    answers: list[list[str]]
    matched: list[list[str]]  # the choice that each of them means; empty: none
    dropped: str = ""  # why the record gives no pair; empty: it does


@dataclass
class Pair:
    """One homologous preference record (x, y, y_w, y_l, x_w, x_l).

    Tensors, the tokens to train on: image, win_image, lose_image (N,) codes, and win_caption,
    lose_caption (L,) token ids.
    """

    id: str
    image: str
    caption: str
    prompt: str
    win_caption: str
    lose_caption: str
    win_caption_score: float
    lose_caption_score: float
    win_image_score: float
    lose_image_score: float
    win_image_wrong: str  # the questions that the policy answered wrong about it, one a line
    lose_image_wrong: str
    win_ended: bool = True  # false: the caption was cut at --max-new-tokens
    lose_ended: bool = True
    shard: str = ""
    row: int = 0
    digest: str = ""

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


def validated(build, values, path, skipped: list[str] | None) -> Iterator[tuple]:
    """(build(value, where), place) for each (where, value, place), with unique ids, texts and
    answerable questions.

    skipped: a list that takes the reasons of bad records, which are left out; None: the first one
    raises InputError.
    """
    ids = set()
    for where, value, place in values:
        with skipping(skipped):
            record = build(value, where)
            check_id(record.id, ids, where)
            if isinstance(record, Record) and not record.drawing_text.strip():
                raise InputError(f"{where}: field 'caption' is empty")
            for question in getattr(record, "questions", []):
                check_question(question, where)
            ids.add(unicodedata.normalize("NFC", record.id))
            yield record, place
    if not ids:
        raise InputError(f"{path}: no records" + (f"; {skipped[0]}" if skipped else ""))


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
    if not all(c.strip() for c in q.choices):
        raise InputError(f"{where}: field 'choices' holds an empty one: {asked}")
    if q.answer not in q.choices:
        answer = repr(q.answer[:40])
        raise InputError(f"{where}: field 'answer': {answer} is not among the choices of {asked}")


@contextmanager
def about(where: str):
    """Bad input inside the block is said to be about `where`."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


@contextmanager
def skipping(skipped: list[str] | None):
    """With a list, bad input inside the block ends the block alone, and its reason is noted."""
    try:
        yield
    except InputError as error:
        if skipped is None:
            raise
        skipped.append(str(error))
