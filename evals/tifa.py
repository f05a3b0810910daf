"""TIFA: multiple-choice questions about drawings of captions, answered by a VQA model.

source       Yushi-Hu/tifa (tifascore/tifa_score.py)
DATA         tifa_v1.0_question_answers.json
writes       OUT/images/<caption id>.png, OUT/answers.json: every answer and the choice it means
exact        the scores
approximated the VQA model is --judge, and an answer that is no choice goes to the nearest by
             --matcher (the official one: all-mpnet-base-v2)

    python 04_eval.py --benchmark tifa --data TIFA --model toy/base --judge self --out runs/tifa
"""

import json
import statistics
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from evals.official import read_json, read_picture, require
from hermesflow.files import write_text
from hermesflow.records import Question, about, check_id, parse_record

WRITES = ("answers.json",)
FILE = "tifa_v1.0_question_answers.json"


@dataclass
class TifaQuestion:
    id: str  # of the caption
    caption: str
    question: str
    choices: list[str]
    answer: str
    element_type: str


def read(path) -> list[TifaQuestion]:
    questions = []
    captions = {}  # by id
    for n, record in enumerate(read_json(path, f"{FILE} of Yushi-Hu/tifa", list), 1):
        where = f"{path}: record {n}"
        question = parse_record(TifaQuestion, record, where)
        require(question.choices, where, "field 'choices' is empty")
        check_id(question.id, set(), where)
        require(question.caption.strip(), where, "field 'caption' is empty")
        same = captions.setdefault(question.id, question.caption) == question.caption
        require(same, where, f"field 'caption': another one of id {question.id!r} stands above")
        questions.append(question)
    return questions


def score(questions: list[TifaQuestion], chosen: list[str]) -> dict:
    """Shares of right choices per caption, their mean and sample deviation, and shares per type."""
    captions = defaultdict(list)
    types = defaultdict(list)
    for q, choice in zip(questions, chosen, strict=True):
        captions[q.id].append(choice == q.answer)
        types[q.element_type].append(choice == q.answer)
    scores = {id: sum(correct) / len(correct) for id, correct in captions.items()}
    deviation = statistics.stdev(scores.values()) if len(scores) > 1 else 0.0
    return {
        "tifa_average": statistics.mean(scores.values()),
        "tifa_stdev": deviation,
        "accuracy_by_type": {t: sum(correct) / len(correct) for t, correct in types.items()},
        "caption_scores": scores,
    }


def run(data: Path, out: Path, draw, judge, match) -> dict:
    """Draw every caption, let the judge answer its questions, score the choices.

    judge.answer(picture, questions) -> [answer], as in judges.py; match(answer, choices) -> choice,
    the nearest one.
    """
    questions = read(data / FILE)
    by_caption = defaultdict(list)
    for q in questions:
        by_caption[q.id].append(q)
    files = {id: out / "images" / f"{id}.png" for id in by_caption}
    draw([(id, asked[0].caption, [files[id]]) for id, asked in by_caption.items()])

    results = []
    for id, asked in by_caption.items():
        picture = read_picture(files[id])
        plain = [Question(q.question, q.choices, q.answer, q.element_type) for q in asked]
        with about(f"id {id!r}"):
            answers = judge.answer(picture, plain)
            for q, answer in zip(asked, answers, strict=True):
                choice = answer if answer in q.choices else match(answer, q.choices)
                results.append({"id": id, "question": q.question, "answer": answer,
                                "choice": choice})
    write_text(out / "answers.json", json.dumps(results, indent=1) + "\n")

    # a caption's questions need not stand together in the file
    ordered = [q for asked in by_caption.values() for q in asked]
    scores = score(ordered, [r["choice"] for r in results])
    del scores["caption_scores"]  # thousands; answers.json has what they are made of
    return scores
