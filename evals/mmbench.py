"""MMBench: multiple choice, right only if every rotation of the options is answered right.

source       open-compass/MMBench (README), VLMEvalKit (image_base.py, multiple_choice.py), LLaVA
             (model_vqa_mmbench.py) for the prompt
DATA         one *.tsv, such as mmbench_dev_20230712.tsv or MMBench_DEV_EN.tsv; both hold the
             rotations of question i as rows i + 1,000,000 k. A question without any gets them here
writes       OUT/images/<index>.jpg, decoded from the file; OUT/mmbench_predictions.tsv, the file's
             columns and `prediction`, which VLMEvalKit reads (the server wants it as .xlsx)
exact        prompt, circular rule, exact matching of letters
approximated an answer without a letter or an option's text is wrong; the server asks ChatGPT

    python 04_eval.py --benchmark mmbench --data MMBench --model toy/base --out runs/mmbench
"""

import base64
import binascii
import csv
import io
import string
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from evals.letters import letter_prompt, parse_letter
from evals.official import PREDICTIONS_ONLY, get, note_id, only, percent, read_table, require
from hermesflow.files import InputError, atomic, reason, write_text
from hermesflow.runs import processes

WRITES = ("images", "mmbench_predictions.tsv")
FILE = "a .tsv of MMBench, such as mmbench_dev_20230712.tsv"
STEP = 1_000_000  # between the indices of a question's rotations
# what pandas, with which the official code reads the file, takes for an empty field
EMPTY = {"", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN",
         "<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"}
IMAGE_LENGTH = 64  # up to which `image` is not an image, but the index of the row that has it


@dataclass
class Question:
    """One row."""

    index: int
    question: str
    hint: str
    options: dict[str, str]  # letter -> text
    answer: str  # a letter; empty in the test split
    category: str
    l2_category: str
    image: int  # index of the row whose image it is
    row: dict[str, str]  # as it stands in the file, without the image


def read(path) -> tuple[list[Question], dict[int, bytes]]:
    """The rows of the file, and its different images by the index of the first row with them."""
    questions = []
    owners = {}  # image -> index of the first row with it
    holders = {}  # index of a row with an image -> that index
    known = set()
    for where, row in read_table(path, FILE, delimiter="\t"):
        require(None not in row, where, "more fields than the first line has names")
        index = get(row, "index", str, where)
        require(index.isdecimal(), where, f"field 'index' is {index!r}, not a whole number")
        note_id(known, int(index), where, "index")
        image = get(row, "image", str, where)
        if len(image) > IMAGE_LENGTH:
            holders[int(index)] = owners.setdefault(decode(image, where), int(index))
            row["image"] = index
        questions.append(parse_row(row, where))
    has_answers = any(q.answer for q in questions)
    for q in questions:
        require(q.image in holders, path,
                f"index {q.index}: field 'image': row {q.image} has none, or is not there")
        require(q.answer or not has_answers, path,
                f"index {q.index}: field 'answer' is empty, and in other rows it is not")
        q.image = holders[q.image]
    return questions, {index: image for image, index in owners.items()}


def decode(text: str, where: str) -> bytes:
    """An image file from base64. Raises InputError if it is none."""
    try:
        data = base64.b64decode(text, validate=True)
        Image.open(io.BytesIO(data)).verify()
        return data
    except (binascii.Error, OSError, SyntaxError, ValueError) as error:
        message = f"{where}: field 'image': not an image in base64 ({reason(error)})"
        raise InputError(message) from None


def parse_row(row: dict, where: str) -> Question:
    def field(name: str) -> str:
        text = get(row, name, str, where) if name in row else ""
        return "" if text in EMPTY else text

    letters = [name for name in row if name in list(string.ascii_uppercase)]
    options = {letter: field(letter) for letter in letters if field(letter)}
    # an option that says "None" is missing in the official program, too
    missing = [row[letter] for letter in letters if row[letter] and letter not in options]
    why = f"; {missing[0]!r} counts as missing, as pandas reads it officially" if missing else ""
    require(len(options) > 1, where, f"fewer than two options (fields 'A', 'B', …){why}")
    answer = field("answer")
    require(answer in ("", *options), where,
            f"field 'answer' is {answer!r}, which is no option{why}")
    image = row["image"]
    require(image.isdecimal(), where, f"field 'image' is {image!r}: neither an image nor an index")
    return Question(int(row["index"]), get(row, "question", str, where), field("hint"), options,
                    answer, field("category"), field("l2-category"), int(image),
                    {name: text for name, text in row.items() if name != "image"})


def with_rotations(questions: list[Question]) -> list[Question]:
    """The rows, and the rotations of questions that stand alone in the file."""
    rotations = defaultdict(int)
    for q in questions:
        rotations[q.index % STEP] += 1
    complete = []
    for q in questions:
        complete.append(q)
        for k in range(1, len(q.options) if rotations[q.index % STEP] == 1 else 0):
            letters = list(q.options)
            moved = dict(zip(letters, letters[k:] + letters[:k]))  # letter -> where its text was
            options = {letter: q.options[old] for letter, old in moved.items()}
            answer = next((letter for letter, old in moved.items() if old == q.answer), "")
            index = q.index % STEP + k * STEP
            row = {**q.row, **options, "index": str(index)}
            row |= {"answer": answer} if "answer" in row else {}
            complete.append(replace(q, index=index, options=options, answer=answer, row=row))
    return complete


def prompt(question: Question) -> str:
    hint = question.hint + "\n" if question.hint else ""
    return letter_prompt(hint + question.question, question.options)


def score(questions: list[Question], answers: list[str]) -> dict:
    """Percent of questions with all rows right, also by category; and of first rows alone."""
    rows_right = defaultdict(list)
    for q, answer in zip(questions, answers, strict=True):
        rows_right[q.index % STEP].append(parse_letter(answer, q.options) == q.answer)
    first = []
    circular = []
    groups = {"l2-category": defaultdict(list), "category": defaultdict(list)}
    for q, answer in zip(questions, answers):
        if q.index < STEP:
            correct = all(rows_right[q.index])
            first.append(parse_letter(answer, q.options) == q.answer)
            circular.append(correct)
            groups["l2-category"][q.l2_category].append(correct)
            groups["category"][q.category].append(correct)
    require(circular, "MMBench", f"no row has an index below {STEP}")
    scores = {"circular accuracy": percent(circular), "one-pass accuracy": percent(first),
              "questions": len(circular)}
    for name, group in groups.items():
        scores[name] = {key: percent(values) for key, values in sorted(group.items())}
    return scores


def write(path, questions: list[Question], answers: list[str]) -> None:
    text = io.StringIO()
    names = [*questions[0].row, "prediction"]
    writer = csv.DictWriter(text, names, delimiter="\t", lineterminator="\n")
    writer.writeheader()
    for q, answer in zip(questions, answers, strict=True):
        writer.writerow({**q.row, "prediction": answer})
    write_text(path, text.getvalue())


def write_images(images: dict[int, bytes], files: dict[int, Path]) -> None:
    """The main process writes the files that are missing; all return when they are there."""
    if processes().is_main_process:
        for index, data in images.items():
            if not (files[index].is_file() and files[index].read_bytes() == data):
                with atomic(files[index]) as temporary:
                    temporary.write_bytes(data)
    processes().wait_for_everyone()


def run(data: Path, out: Path, ask) -> dict:
    """Accuracies in percent; of a test split, whose answers are not public, predictions alone."""
    questions, images = read(only(data, "*.tsv"))
    questions = with_rotations(questions)
    files = {index: out / "images" / f"{index}.jpg" for index in images}
    write_images(images, files)
    answers = ask([(files[q.image], prompt(q)) for q in questions])
    write(out / "mmbench_predictions.tsv", questions, answers)
    return score(questions, answers) if questions[0].answer else PREDICTIONS_ONLY
