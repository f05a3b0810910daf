"""SEED-Bench: multiple-choice questions about single images, in nine dimensions, by letter.

source       AILab-CVC/SEED-Bench (DATASET.md, eval.py), LLaVA (docs/Evaluation.md) for the prompt
DATA         SEED-Bench.json of SEED-Bench-1, SEED-Bench-image/; questions about videos (dimensions
             10 to 12) are left out
writes       OUT/results.json, as eval.py: one object a line
exact        prompt, both ways to mark letters
approximated the official evaluation ranks the options by likelihood; papers' answers by letter,
             which these are, do not compare with its leaderboard

    python 04_eval.py --benchmark seedbench --data SEED --model toy/base --out runs/seedbench
"""

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from evals.letters import letter_prompt, parse_letter
from evals.official import get, note_id, percent, read_json, require
from hermesflow.files import write_text
from hermesflow.records import parse_record

WRITES = ("results.json",)
LETTERS = "ABCD"


@dataclass
class Question:
    """One of the official file's `questions`, with its names."""

    question_id: str
    question: str
    choice_a: str
    choice_b: str
    choice_c: str
    choice_d: str
    answer: str  # a letter
    data_id: str  # name of the image file
    question_type_id: int
    dimension: str = ""  # name of the type

    @property
    def options(self) -> dict[str, str]:
        return dict(zip(LETTERS, (self.choice_a, self.choice_b, self.choice_c, self.choice_d)))


def read(path) -> list[Question]:
    """The questions about images."""
    data = read_json(path, "SEED-Bench.json of AILab-CVC/SEED-Bench", dict)
    types = get(data, "question_type", dict, str(path))
    names = {get(types, name, int, f"{path}: field 'question_type'"): name for name in types}
    questions = []
    known = set()
    for n, record in enumerate(get(data, "questions", list[dict], str(path)), 1):
        where = f"{path}: question {n}"
        kind = get(record, "data_type", str, where)
        require(kind in ("image", "video"), where, f"field 'data_type' is {kind!r}")
        if kind == "image":
            question = parse_record(Question, record, where)
            note_id(known, question.question_id, where, "question_id")
            require(question.answer in tuple(LETTERS), where,
                    f"field 'answer' is {question.answer!r}")
            number = question.question_type_id
            require(number in names, where, f"field 'question_type_id': {number} has no name")
            question.dimension = names[number]
            questions.append(question)
    require(questions, path, "no questions about images (field 'data_type')")
    return questions


def prompt(question: Question) -> str:
    return letter_prompt(question.question, question.options)


def score(questions: list[Question], answers: list[str]) -> dict:
    """Percent overall and per dimension with the letter that an answer means; and, overall, of
    answers that are the letter and nothing else."""
    dimensions = defaultdict(list)
    exact = []
    for q, answer in zip(questions, answers, strict=True):
        dimensions[q.dimension].append(parse_letter(answer, q.options) == q.answer)
        exact.append(answer == q.answer)
    return {
        "accuracy (letter read by VLMEvalKit's rule)": percent(sum(dimensions.values(), [])),
        "accuracy (answer is the letter, LLaVA's rule)": percent(exact),
        "dimensions": {name: percent(correct) for name, correct in dimensions.items()},
    }


def write(path, questions: list[Question], answers: list[str]) -> None:
    """The names of eval.py; a prediction is empty if no letter could be read."""
    lines = []
    for q, answer in zip(questions, answers, strict=True):
        record = {"q_id": q.question_id, "prediction": parse_letter(answer, q.options) or "",
                  "gt": q.answer, "q_type_id": q.question_type_id}
        lines.append(json.dumps(record) + "\n")
    write_text(path, "".join(lines))


def run(data: Path, out: Path, ask) -> dict:
    """Accuracies in percent."""
    questions = read(data / "SEED-Bench.json")
    answers = ask([(data / "SEED-Bench-image" / q.data_id, prompt(q)) for q in questions])
    write(out / "results.json", questions, answers)
    return score(questions, answers)
