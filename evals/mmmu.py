"""MMMU: college-level questions over 30 subjects, multiple-choice or open.

source       MMMU-Benchmark/MMMU (configs of LLaVA-1.5, mmmu/utils/eval_utils.py)
DATA         one *.jsonl: the dataset MMMU/MMMU exported as JSON lines, with its images as files;
             image_1 to image_7 are paths relative to the file (or null)
writes       OUT/mmmu_predictions.json for main_eval_only.py and the evaluation server
exact        prompts, parsing, scores
approximated nothing; as in the official code, only a question's first image is shown

    python 04_eval.py --benchmark mmmu --data MMMU --model toy/base --out runs/mmmu
"""

import ast
import json
import os
import random
import re
from collections import defaultdict
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from evals.letters import LETTER_ANSWER
from evals.official import (PREDICTIONS_ONLY, SHORT_ANSWER, get, note_id, only, percent,
                            read_json_lines, require)
from hermesflow.files import write_text

WRITES = ("mmmu_predictions.json",)


@dataclass
class Question:
    id: str  # validation_Accounting_1
    question: str  # names its images <image 1>, <image 2>, …
    options: dict[str, str]  # letter -> text; empty for open questions
    images: list[str]  # paths
    answer: list[str]  # any of them is right; "?" in the test split

    @property
    def subject(self) -> str:
        return "_".join(self.id.split("_")[1:-1])


def read(path) -> list[Question]:
    questions = []
    ids = set()
    for where, record in read_json_lines(path, "MMMU/MMMU exported as JSON lines"):
        texts = text_list(get(record, "options", str, where))
        require(texts is not None, where, "field 'options' should be the text of a list")
        answer = get(record, "answer", str, where)
        kind = get(record, "question_type", str, where)
        require(kind in ("multiple-choice", "open"), where, f"field 'question_type' is {kind!r}")
        require(texts or kind == "open", where, "field 'options' is empty (multiple-choice)")
        options = {}
        answers = [answer]
        if kind == "multiple-choice":
            options = {chr(ord("A") + i): text for i, text in enumerate(texts)}
            require(answer in ("?", *options), where, f"field 'answer': {answer!r} is no option")
        elif text_list(answer) is not None:
            answers = text_list(answer)
        require(answers and all(map(str.strip, answers)), where, "field 'answer' is empty")
        names = [f"image_{i}" for i in range(1, 8) if record.get(f"image_{i}") is not None]
        paths = [os.path.join(os.path.dirname(path), get(record, n, str, where)) for n in names]
        require(paths, where, "field 'image_1' is missing")
        id = get(record, "id", str, where)
        note_id(ids, id, where, "id")
        questions.append(Question(id, get(record, "question", str, where), options, paths, answers))
    return questions


def text_list(text: str) -> list[str] | None:
    """The list whose Python text this is, or None."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    return [str(v) for v in value] if isinstance(value, list) else None


def prompt(question: Question) -> str:
    """The official configs, in which YAML folds each blank line into one line break."""
    if not question.options:
        return question.question + SHORT_ANSWER
    options = "".join(f"({letter}) {text}\n" for letter, text in question.options.items())
    return f"{question.question}\n{options}{LETTER_ANSWER}"


def parse_choice(response: str, options: dict[str, str]) -> str | None:
    """The letter that a response means, or None.

    "(A)" anywhere, else "A" between spaces, else (more than five words) an option's text; of
    several the last one.
    """
    for mark in ",.!?;:'":
        response = response.strip(mark)
    response = f" {response} "
    bracketed = {letter: f"({letter})" for letter in options}
    spaced = {letter: f" {letter} " for letter in options}
    attempts = [(response, bracketed), (response, spaced)]
    if len(response.split()) > 5:
        texts = {letter: text.lower() for letter, text in options.items()}
        attempts.append((response.lower(), texts))
    for text, wanted in attempts:
        places = {letter: text.rfind(w) for letter, w in wanted.items() if w in text}
        if places:
            return max(places, key=places.get)
    return None


def normalise(text: str) -> list:
    """[number with two decimals], or [lower-case text]; one character gets a space on a side."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",  # 1,060
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",  # 2.6e3
    r"-?(?:\d*\.\d+|\d+\b)(?![eE][+-]?\d|[,\d])",  # 3.5 or 12
)
ANNOUNCEMENTS = ["could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result "]


def parse_open(response: str) -> list:
    """What an open response may mean, texts and numbers, each once.

    From every line the shortest text behind a phrase that announces an answer; without one the
    whole response. Numbers are then read out of these texts.
    """
    response = response.strip().strip(".").lower()
    lines = response.split("\n")
    texts = []
    for n, line in enumerate(lines, 1):
        tail = ""
        signs = ANNOUNCEMENTS + ["="] if n == len(lines) else ANNOUNCEMENTS
        for sign in signs:
            text = line.split(sign)[-1].strip()
            # an empty text is replaced by the next one, as in the official code
            if sign in line and (not tail or len(text) < len(tail)):
                tail = text
        if tail and tail not in list(":,.!?;'"):
            texts.append(tail)
    texts = texts or [response]
    numbers = []
    for text in texts:
        for pattern in NUMBERS:
            numbers += re.findall(pattern, text)
    return list(dict.fromkeys(chain.from_iterable(map(normalise, texts + numbers))))


def is_correct(response: str, truth: list[str]) -> bool:
    """Open questions: a right text inside one of the response's texts, or an equal number."""
    right = list(chain.from_iterable(map(normalise, truth)))
    right_texts = [value for value in right if isinstance(value, str)]
    for value in parse_open(response):
        contains_one = isinstance(value, str) and any(text in value for text in right_texts)
        if contains_one or value in right:
            return True
    return False


def predictions(questions: list[Question], responses: list[str], seed: int = 42) -> list[str]:
    """Letters (a random one where none can be read, drawn in question order), open responses."""
    rng = random.Random(seed)
    predicted = []
    for q, response in zip(questions, responses, strict=True):
        if q.options:
            response = parse_choice(response, q.options) or rng.choice(list(q.options))
        predicted.append(response)
    return predicted


def score(questions: list[Question], predicted: list[str]) -> dict:
    """Percent over all questions and per subject; those without a public answer do not count."""
    subjects = defaultdict(list)
    for q, p in zip(questions, predicted, strict=True):
        if q.answer != ["?"]:
            correct = p in q.answer if q.options else is_correct(p, q.answer)
            subjects[q.subject].append(correct)
    if not subjects:
        return PREDICTIONS_ONLY
    shares = {name: percent(s) for name, s in subjects.items()}
    return {"overall": percent(list(chain(*subjects.values()))), "subjects": shares}


def write(path, questions: list[Question], predicted: list[str]) -> None:
    """{id: letter or text}"""
    write_text(path, json.dumps({q.id: p for q, p in zip(questions, predicted, strict=True)}))


def run(data: Path, out: Path, ask) -> dict:
    """Overall and subject scores, in percent."""
    questions = read(only(data, "*.jsonl"))
    predicted = predictions(questions, ask([(q.images[0], prompt(q)) for q in questions]))
    write(out / "mmmu_predictions.json", questions, predicted)
    return score(questions, predicted)
