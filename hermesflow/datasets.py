"""Images with captions in the formats that people have, as the fields of our own records.

A format is recognised by what a file holds:

    our JSONL              lines with `image` and `caption`
    JourneyDB              lines with `img_path`, `Task2` and `Task3` (train_anno.jsonl, …)
    imagefolder            metadata.jsonl or metadata.csv with `file_name`
    the original           an array of objects with `img_path` and `caption` (initial_data.json)
    COCO captions          one object with `images` and `annotations`

Lines are read one at a time, everything else whole. Imports nothing heavy.
"""

import csv
import io
import json
import os
import re
from collections.abc import Callable
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from hermesflow.files import InputError, parse_json, read_text, reading, require_regular
from hermesflow.records import skipping

READ = ("our JSONL, JourneyDB's annotation lines, the original's array (initial_data.json), COCO's "
        "captions, or a folder with metadata.csv or metadata.jsonl (`file_name` and `text`)")
METADATA = ("metadata.csv", "metadata.jsonl")  # of the `datasets` library's imagefolder
TEXTS = ("text", "caption", "prompt")  # its column with captions: the first of these
HEAD = 100  # lines that are looked at, as some of JourneyDB have no `Task2`;
LONG = 2**20  # one of more bytes is a whole file of another format


class Source(NamedTuple):
    """A file of records."""

    file: Path
    fields: Callable[[dict], dict]  # of our record, from one of the file's
    rows: list[tuple] | None  # (where, value, number) of every record; None: the file's lines
    names: dict[str, str]  # a field of ours -> what messages call it: its name in the file


# ------------------------------------------------------------------------- fields of a record, each


def ours(value: dict) -> dict:
    return value


def of_original(value: dict) -> dict:
    """The image is named img_path, the id may be a number.

    It draws the caption; its `prompt` is what the image was once made from, by another model.
    """
    value = {**value, "image": value.get("image", value.get("img_path")), "prompt": ""}
    if type(value.get("id")) is int:
        value["id"] = str(value["id"])
    return value


def of_journeydb(value: dict) -> dict:
    """Its own caption and questions, by GPT-3.5; what is drawn is the caption, as above."""
    about_caption = value.get("Task2")
    fields = {"id": id_of(value.get("img_path")), "image": value.get("img_path"),
              "questions": journeydb_questions(value.get("Task3"), [])}
    if isinstance(about_caption, dict) and "Caption" in about_caption:
        fields["caption"] = about_caption["Caption"]
    return fields


def of_imagefolder(value: dict) -> dict:
    fields = {"id": id_of(value.get("file_name")), "image": value.get("file_name")}
    text = next((name for name in TEXTS if name in value), None)
    return fields | ({"caption": value[text]} if text else {})


def id_of(image):
    """The name of an image as an id: ./000/a.jpg is 000-a."""
    if not isinstance(image, str):
        return image
    return os.path.splitext(os.path.normpath(image))[0].strip("/").replace("/", "-")


def names_of(fields: Callable, value: dict) -> dict[str, str]:
    """`Source.names` of a format, of which `value` is a record."""
    if fields is of_original:
        return {"image": "image" if "image" in value else "img_path"}
    if fields is of_journeydb:
        return {"id": "img_path", "image": "img_path", "caption": "Task2.Caption",
                "questions": "Task3"}
    if fields is of_imagefolder:
        text = next((name for name in TEXTS if name in value), TEXTS[0])
        return {"id": "file_name", "image": "file_name", "caption": text}
    return {}


# what a line or an element must have, how it is read, and whether one at a time
FORMATS = (
    ({"image", "caption"}, ours, True),
    ({"img_path", "Task2"}, of_journeydb, True),
    ({"img_path", "caption"}, of_original, False),
    ({"file_name"}, of_imagefolder, True),
)


def format_of(value) -> tuple[Callable, bool] | None:
    for needed, fields, one_at_a_time in FORMATS:
        if isinstance(value, dict) and needed <= value.keys():
            return fields, one_at_a_time
    return None


# ---------------------------------------------------------------------------- JourneyDB's questions

LETTER = re.compile(r"\(?([A-Za-z])(?:\)?\s*[:.)]\s*|\)?$)(.*)", re.DOTALL)  # A: yes, (B) no, C


def journeydb_questions(task, unread: list[str]) -> list[dict]:
    """Of `Task3`: lists of questions by topic.

    unread: takes why questions are left out, which cannot be read or answered.
    """
    if task and not isinstance(task, dict):
        unread.append("expected an object of topics")
    questions = []
    for topic, asked in task.items() if isinstance(task, dict) else ():
        if asked and not isinstance(asked, list):
            unread.append(f"{topic[:40]!r}: expected a list of questions")
        for value in asked if isinstance(asked, list) else ():
            with skipping(unread):
                question = journeydb_question(value)
                questions.append({**question, "element": topic.split(" ")[0].lower()})
    return questions


def journeydb_question(value) -> dict:
    """`Question`, `Options` and `Answer`, which is a letter, an option, or both.

    Options are by letter, or a list of texts that may begin with theirs. Raises InputError if it
    cannot be read or answered.
    """
    if not isinstance(value, dict) or not isinstance(value.get("Question"), str):
        raise InputError(f"no object with a text 'Question': {json.dumps(value)[:60]}")
    asked = repr(value["Question"][:40])
    if not isinstance(value.get("Answer"), str):
        raise InputError(f"{asked}: no text 'Answer'")
    options = value.get("Options")
    if isinstance(options, list):
        options = dict(zip("ABCDEFGHIJ", options))
    texts = list(options.values()) if isinstance(options, dict) else []
    if len(texts) < 2 or not all(isinstance(text, str) for text in texts):
        raise InputError(f"{asked}: 'Options' should be two texts or more")
    letters = [letter.strip().upper() for letter in options]
    choices = [text.strip() for text in texts]
    lettered = [LETTER.fullmatch(text) for text in choices]
    if all(m and m[1].upper() == letter for m, letter in zip(lettered, letters)):
        choices = [m[2].strip() for m in lettered]
    if not all(choices):
        raise InputError(f"{asked}: 'Options' holds an empty text")
    answer = value["Answer"].strip()
    if answer.lower() not in [choice.lower() for choice in choices]:
        letter = LETTER.fullmatch(answer)
        answer = dict(zip(letters, choices)).get(letter[1].upper() if letter else answer)
    if not answer:
        raise InputError(f"{asked}: 'Answer' {value['Answer'][:40]!r} is none of its options")
    return {"question": value["Question"], "choices": choices, "answer": answer}


# --------------------------------------------------------------------------------- the file of them


def source_of(path) -> Source:
    """What is in a file or folder of records. Raises InputError if it is in none of the formats."""
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in METADATA if (path / name).is_file()]
        if not found:
            raise InputError(f"{path}: a folder without {' or '.join(METADATA)}; read are {READ}")
        path = found[0]
    with reading(path):
        require_regular(path)
        about = os.stat(path)
    return recognised(path, about.st_size, about.st_mtime_ns)


@lru_cache(maxsize=2)  # a stage asks several times what its inputs are
def recognised(path: Path, _size: int, _changed: int) -> Source:
    head = first_values(path)
    of_lines = path.suffix == ".jsonl"
    for value in head if of_lines else head[:1]:
        if found := format_of(value):
            fields, one_at_a_time = found
            rows = None if one_at_a_time else array_rows(path)
            return Source(path, fields, rows, names_of(fields, value))
    if not of_lines:
        return whole(path)
    # what is wrong with a line of ours is said of each; lines of something else have none of this
    known = {"id", "image", "caption"}
    if head and all(isinstance(v, dict) and not v.keys() & known for v in head):
        raise unknown(path)
    return Source(path, ours, None, {})


def first_values(path: Path) -> list:
    """What the first lines of a file are as JSON; None where they are not."""
    with reading(path), open(path, "rb") as file:
        lines = [line for line in islice(file, HEAD) if line.strip()]
    values = []
    for line in lines:
        text = line.decode("utf-8-sig", "replace").strip().rstrip(",")
        try:
            values.append(json.loads(text) if len(line) < LONG else None)
        except (ValueError, RecursionError):
            values.append(None)
    return values


def whole(path: Path) -> Source:
    """A file that is read as one: an array, COCO's object, or a table."""
    text = read_text(path)
    if text.lstrip()[:1] not in ("[", "{"):
        return of_rows(path, of_imagefolder, table_rows(path, text))
    try:
        value = parse_json(text, str(path))
    except InputError:
        return of_rows(path, of_original, array_rows(path))
    if isinstance(value, list):
        fields, _ = next(filter(None, map(format_of, value[:HEAD])), (ours, True))
        # an array with our names is one of the original, whose `prompt` is not drawn
        return of_rows(path, of_original if fields is ours else fields, array_rows(path))
    if isinstance(value.get("images"), list) and isinstance(value.get("annotations"), list):
        return Source(path, ours, coco_rows(path, value), {"image": "file_name"})
    raise unknown(path)


def of_rows(path: Path, fields: Callable, rows: list[tuple]) -> Source:
    first = next((value for _, value, _ in rows if isinstance(value, dict)), {})
    return Source(path, fields, rows, names_of(fields, first))


def unknown(path: Path) -> InputError:
    return InputError(f"{path}: not records in a format that is read: {READ}")


def table_rows(path: Path, text: str) -> list[tuple]:
    """The rows of a CSV file with a column `file_name`."""
    rows = []
    try:
        table = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        if "file_name" not in (table.fieldnames or ()):
            raise unknown(path)
        for row in table:
            rows.append((f"{path}: line {table.line_num}", row, len(rows) + 1))
    except csv.Error as error:
        raise InputError(f"{path}: after record {len(rows)}: not valid CSV ({error})") from None
    return rows


def coco_rows(path: Path, value: dict) -> list[tuple]:
    """An image a row, with its first caption: that of the lowest annotation id."""
    captions = {}  # image id -> (annotation id, caption)
    for annotation in value["annotations"]:
        if not isinstance(annotation, dict) or "caption" not in annotation:
            continue
        owner = str(annotation.get("image_id"))
        number = annotation.get("id")
        number = number if type(number) is int else 2**63
        if owner not in captions or number < captions[owner][0]:
            captions[owner] = number, annotation["caption"]
    rows = []
    for n, image in enumerate(value["images"], 1):
        row = image
        if isinstance(image, dict):
            own_id = image.get("id")
            row = {"id": str(own_id) if type(own_id) is int else own_id}
            row |= {"image": image["file_name"]} if "file_name" in image else {}
            row |= {"caption": captions[str(own_id)][1]} if str(own_id) in captions else {}
        rows.append((f"{path}: image {n}", row, n))
    return rows


def array_rows(path) -> list[tuple]:
    """(where, value, number) of every element of a JSON array.

    The original's programs write objects with a comma behind each, and no brackets.
    """
    text = read_text(path)
    try:
        value = parse_json(text, str(path))
    except InputError:
        value = objects_of(text)
        if not value:
            raise
    if isinstance(value, dict):  # one of them, without a comma
        value = [value]
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
