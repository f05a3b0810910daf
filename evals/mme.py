"""MME: 14 tasks, two yes-or-no questions per image.

source       MME_Benchmark_release_version (eval_tool/calculation.py)
DATA         that folder: one folder per task, with images/ and questions_answers_YN/, or both
             kinds of files side by side
writes       OUT/mme_results/<task>.txt, which calculation.py reads
exact        parsing of answers, scores, totals
approximated nothing

    python 04_eval.py --benchmark mme --data MME --model toy/base --out runs/mme
"""

import re
from dataclasses import dataclass
from pathlib import Path

from evals.official import SHORT_ANSWER, expected, percent, require
from hermesflow.files import read_text, write_text

TASKS = {
    "Perception": ["existence", "count", "position", "color", "posters", "celebrity", "scene",
                   "landmark", "artwork", "OCR"],
    "Cognition": ["commonsense_reasoning", "numerical_calculation", "text_translation",
                  "code_reasoning"],
}

WRITES = ("mme_results",)


@dataclass
class Question:
    image: str  # path
    question: str
    label: str  # Yes or No


def read(folder) -> dict[str, list[Question]]:
    """Questions per task, two per image in a row."""
    folder = expected(folder, "the folder MME_Benchmark_release_version with one folder per task")
    tasks = {}
    for names in TASKS.values():
        for task in names:
            tasks[task] = read_task(expected(folder / task, f"the MME task '{task}'"))
    return tasks


def read_task(folder: Path) -> list[Question]:
    texts = folder
    images = folder
    if (folder / "questions_answers_YN").is_dir():
        texts = folder / "questions_answers_YN"
        images = folder / "images"
    files = sorted(texts.glob("*.txt"))
    require(files, texts, "no *.txt; expected here: one text per image, "
                          "lines question<TAB>Yes or No")
    pictures = {}
    for path in sorted(images.glob("*")):
        if path.suffix.lower() in (".jpg", ".jpeg", ".png"):
            pictures[path.stem] = path

    questions = []
    for file in files:
        require(file.stem in pictures, images / f"{file.stem}.jpg",
                f"not found; expected here: the image of {file}")
        lines = list(enumerate(read_text(file).split("\n"), 1))
        lines = [(n, line) for n, line in lines if line.strip()]
        require(len(lines) == 2, file, f"expected two questions, found {len(lines)}")
        for n, line in lines:
            question, _, label = line.partition("\t")
            label = label.strip()
            require(label in ("Yes", "No"), f"{file}: line {n}",
                    "expected question<TAB>Yes or No")
            questions.append(Question(str(pictures[file.stem]), question.strip(), label))
    return questions


def prompt(question: Question) -> str:
    # some questions have two spaces before the sentence
    asked = question.question.replace(" Please answer yes or no.", "").strip()
    return asked + SHORT_ANSWER


def parse_answer(answer: str) -> str:
    """yes, no or other, from the first four characters in lower case."""
    start = answer.lower()[:4]
    if "yes" in start:
        return "yes"
    if "no" in start:
        return "no"
    return "other"


def task_score(labels: list[str], answers: list[str]) -> dict[str, float]:
    """One task, percent: acc, acc_plus (share of images with both questions right), their sum."""
    correct = []
    for label, answer in zip(labels, answers, strict=True):
        correct.append(parse_answer(answer) == label.lower())
    pairs = zip(correct[::2], correct[1::2], strict=True)
    acc = percent(correct)
    acc_plus = percent([first and second for first, second in pairs])
    return {"acc": acc, "acc_plus": acc_plus, "score": acc + acc_plus}


def total_scores(tasks: dict[str, dict]) -> dict[str, dict]:
    """Perception and Cognition: the scores of their tasks (at most 200 each), and the total."""
    totals = {}
    for group, names in TASKS.items():
        scores = {task: tasks[task]["score"] for task in names if task in tasks}
        totals[group] = {"tasks": scores, "total": sum(scores.values())}
    return totals


def write(folder, tasks: dict[str, list[Question]], answers: dict[str, list[str]]) -> None:
    """A file per task; every line holds image, question, label and answer between tabs."""
    for task, questions in tasks.items():
        lines = []
        for q, answer in zip(questions, answers[task], strict=True):
            row = (Path(q.image).name, q.question, q.label, re.sub(r"[\t\r\n]", " ", answer))
            lines.append("\t".join(row) + "\n")
        write_text(Path(folder) / f"{task}.txt", "".join(lines))


def run(data: Path, out: Path, ask) -> dict:
    """Task scores and totals of Perception and Cognition."""
    tasks = read(data)
    requests = []
    for questions in tasks.values():
        requests += [(q.image, prompt(q)) for q in questions]

    # all tasks are asked at once, so the answers are dealt out again
    remaining = iter(ask(requests))
    answers = {}
    scores = {}
    for task, questions in tasks.items():
        answers[task] = [next(remaining) for _ in questions]
        scores[task] = task_score([q.label for q in questions], answers[task])
    write(out / "mme_results", tasks, answers)
    return total_scores(scores)
