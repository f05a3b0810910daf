"""POPE: is an object in the image? Yes or no, over three ways to choose absent objects.

source       RUCAIBox/POPE (output/coco, evaluate.py)
DATA         coco_pope_{random,popular,adversarial}.json, 3,000 questions each, and val2014/ of COCO
writes       OUT/coco_pope_<split>_answers.jsonl, which evaluate.py reads
exact        parsing of answers, all scores
approximated nothing

    python 04_eval.py --benchmark pope --data POPE --model toy/base --out runs/pope
"""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from evals.official import SHORT_ANSWER, note_id, read_json_lines, require
from hermesflow.files import write_text
from hermesflow.records import parse_record

SPLITS = ("random", "popular", "adversarial")
WRITES = tuple(f"coco_pope_{split}_answers.jsonl" for split in SPLITS)


@dataclass
class Question:
    question_id: int
    image: str  # file name in COCO val2014
    text: str
    label: str  # yes or no


def read(folder) -> dict[str, list[Question]]:
    """Questions per split, from JSON lines."""
    splits = {}
    for split in SPLITS:
        name = f"coco_pope_{split}.json"
        lines = read_json_lines(Path(folder) / name, f"{name} of RUCAIBox/POPE (output/coco)")
        splits[split] = []
        known = set()
        for where, record in lines:
            question = parse_record(Question, record, where)
            note_id(known, question.question_id, where, "question_id")
            label = question.label
            require(label in ("yes", "no"), where,
                    f"field 'label' should be yes or no, found {label!r}")
            splits[split].append(question)
    return splits


def prompt(question: Question) -> str:
    return question.text + SHORT_ANSWER


def parse_answer(answer: str) -> str:
    """"no" if one of the first sentence's words is exactly No, not or no; else "yes"."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def score(labels: list[str], answers: list[str]) -> dict[str, float]:
    """One split, "yes" being the positive class; shares. A ratio without cases is 0."""
    count = Counter()
    for label, answer in zip(labels, answers, strict=True):
        count[label, parse_answer(answer)] += 1
    tp = count["yes", "yes"]
    fp = count["no", "yes"]
    tn = count["no", "no"]
    fn = count["yes", "no"]
    precision = tp / max(tp + fp, 1)
    recall = tp / max(tp + fn, 1)
    return {
        "TP": tp,
        "FP": fp,
        "TN": tn,
        "FN": fn,
        "accuracy": (tp + tn) / len(answers),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if tp else 0.0,
        "yes_ratio": (tp + fp) / len(answers),
    }


def mean_scores(splits: dict[str, dict]) -> dict[str, float]:
    """Means over the splits' scores; papers print the accuracy or the F1 as "POPE"."""
    means = {}
    for name in ("accuracy", "precision", "recall", "f1", "yes_ratio"):
        means[name] = sum(s[name] for s in splits.values()) / len(splits)
    return means


def write(path, questions: list[Question], answers: list[str]) -> None:
    """JSON lines; evaluate.py reads the field `answer` in the order of the questions."""
    lines = []
    for q, answer in zip(questions, answers, strict=True):
        record = {"question_id": q.question_id, "question": q.text, "answer": answer}
        lines.append(json.dumps(record) + "\n")
    write_text(path, "".join(lines))


def run(data: Path, out: Path, ask) -> dict:
    """Scores of every split, and their mean."""
    splits = read(data)
    requests = []
    for questions in splits.values():
        requests += [(data / "val2014" / q.image, prompt(q)) for q in questions]

    # all splits are asked at once, so the answers are dealt out again
    answers = iter(ask(requests))
    scores = {}
    for split, questions in splits.items():
        split_answers = [next(answers) for _ in questions]
        write(out / f"coco_pope_{split}_answers.jsonl", questions, split_answers)
        scores[split] = score([q.label for q in questions], split_answers)
    return {"mean": mean_scores(scores), **scores}
