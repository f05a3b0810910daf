"""GQA: compositional questions about scenes, one exact answer each.

source       GQA (eval.py), LLaVA (convert_gqa_for_eval.py) for the predictions
DATA         testdev_balanced_questions.json, images/
writes       OUT/testdev_balanced_predictions.json for eval.py and the evaluation server
exact        accuracy
approximated nothing

    python 04_eval.py --benchmark gqa --data GQA --model toy/base --out runs/gqa
"""

import json
from dataclasses import dataclass
from pathlib import Path

from evals.official import SHORT_ANSWER, percent, read_json, require
from hermesflow.files import write_text
from hermesflow.records import parse_record

WRITES = ("testdev_balanced_predictions.json",)


@dataclass
class Question:
    """One value of the official file, with its names, and its key."""

    question: str
    imageId: str  # the image is <imageId>.jpg
    answer: str
    isBalanced: bool
    id: str = ""


def read(path) -> list[Question]:
    questions = []
    for id, record in read_json(path, "testdev_balanced_questions.json of GQA", dict).items():
        if isinstance(record, dict):
            record = {**record, "id": id}
        questions.append(parse_record(Question, record, f"{path}: question {id!r}"))
    return questions


def prompt(question: Question) -> str:
    return question.question + SHORT_ANSWER


def parse_answer(answer: str) -> str:
    """What convert_gqa_for_eval.py writes to the predictions file."""
    return answer.rstrip(".").lower()


def score(questions: list[Question], answers: list[str]) -> float:
    """eval.py: percent of exact matches over balanced questions."""
    correct = []
    for q, answer in zip(questions, answers, strict=True):
        if q.isBalanced:
            correct.append(parse_answer(answer) == q.answer)
    require(correct, "GQA", "no question has isBalanced true")
    return percent(correct)


def write(path, questions: list[Question], answers: list[str]) -> None:
    predictions = []
    for q, answer in zip(questions, answers, strict=True):
        predictions.append({"questionId": q.id, "prediction": parse_answer(answer)})
    write_text(path, json.dumps(predictions))


def run(data: Path, out: Path, ask) -> dict:
    """Accuracy in percent."""
    questions = read(data / "testdev_balanced_questions.json")
    answers = ask([(data / "images" / f"{q.imageId}.jpg", prompt(q)) for q in questions])
    write(out / "testdev_balanced_predictions.json", questions, answers)
    return {"accuracy": score(questions, answers)}
