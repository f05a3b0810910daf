"""DPG-Bench: yes-or-no questions about drawings of dense prompts, some depending on others.

source       TencentQQGYLab/ELLA, dpg_bench (compute_dpg_bench.py)
DATA         dpg_bench.csv, prompts/<item>.txt
writes       OUT/images/<item>.png, a 2x2 grid of four images: the official layout; OUT/answers.json
exact        the scores, corrected and with the official code's two bugs, by name
approximated the judge: mPLUG-large has no transformers port; the scores of another one (--vqa) do
             not compare with published ones

    python 04_eval.py --benchmark dpg --data DPG --model toy/base --out runs/dpg
"""

import json
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from evals.judges import ModelJudge, ModelNames
from evals.official import get, percent, read_picture, read_table, require
from hermesflow.files import read_text, write_text
from hermesflow.pictures import save_picture
from hermesflow.records import check_id

WRITES = ("answers.json",)
COLUMNS = ("item_id", "proposition_id", "dependency", "tuple", "question_natural_language")


@dataclass
class DpgQuestion:
    item: str  # the prompt is prompts/<item>.txt, the image <item>.png
    number: int
    parents: list[int]  # the questions that it depends on
    category: str  # "attribute - color"; its first part is the broad category
    question: str


def read(path) -> list[DpgQuestion]:
    """Every row of dpg_bench.csv."""
    rows = read_table(path, "dpg_bench.csv of TencentQQGYLab/ELLA (dpg_bench)")
    return [parse_row(row, where) for where, row in rows]


def parse_row(row: dict, where: str) -> DpgQuestion:
    item, number, parents, proposition, question = (get(row, c, str, where) for c in COLUMNS)
    check_id(item, set(), where)
    require(re.fullmatch(r"\s*\d+\s*", number, re.ASCII), where,
            f"field 'proposition_id' should be a whole number, found {number!r}")
    require(re.fullmatch(r"\s*\d+(\s*,\s*\d+)*\s*", parents, re.ASCII), where,
            f"field 'dependency' should be whole numbers, found {parents!r}")
    numbers = [p for p in map(int, parents.split(",")) if p]  # 0: no parent
    category = proposition.split("(")[0].strip()
    return DpgQuestion(item, int(number), numbers, category, question)


# --------------------------------------------------------------------------------------------- rule


def image_score(questions: list[DpgQuestion], crops: list[dict[int, str]]) -> dict | None:
    """One image. crops: per crop the answers by question number.

    A question scores 1 if the answer is exactly "yes"; then, in question order, one with a parent
    at 0 becomes 0. Returns the image's score, every question's mean over crops, and the scores on
    the last crop before dependencies; None without questions, or where a parent is not among them:
    the official code leaves such an image out.
    """
    if not questions:
        return None
    scores = []
    for answers in crops:
        plain = {q.number: float(answers[q.number] == "yes") for q in questions}
        score = dict(plain)
        for q in questions:
            for parent in q.parents:
                if parent not in score:
                    return None
                if score[parent] == 0:
                    score[q.number] = 0.0
                    break
        scores.append(score)
    crop_means = [sum(s.values()) / len(s) for s in scores]
    question_means = {}
    for q in questions:
        question_means[q.number] = sum(s[q.number] for s in scores) / len(scores)
    return {"score": sum(crop_means) / len(crop_means), "last_crop": plain,
            "questions": question_means}


def score(questions: list[DpgQuestion], answers: dict[str, list[dict[int, str]]],
          skip_first_row: bool = False, last_crop_categories: bool = False) -> dict:
    """In percent: "dpg_score", "L1" and "L2" categories; also "per_image" and the "failed" items.

    answers[item][crop][question number]. "dpg_score" is None if every image failed. The switches
    are the official code's bugs: it never sees the first row, and its category scores take the last
    crop without dependencies.
    """
    items = defaultdict(dict)  # item -> number -> question; of a number that occurs twice the last
    for q in questions[1:] if skip_first_row else questions:
        items[q.item][q.number] = q
    broad = defaultdict(list)
    detailed = defaultdict(list)
    per_image = {}
    for item, crops in answers.items():
        result = image_score(list(items[item].values()), crops)
        if result is None:
            continue
        per_image[item] = result
        values = result["last_crop" if last_crop_categories else "questions"]
        for q in items[item].values():
            broad[q.category.split("-")[0].strip()].append(values[q.number])
            detailed[q.category].append(values[q.number])
    image_scores = [r["score"] for r in per_image.values()]
    return {
        "dpg_score": percent(image_scores) if image_scores else None,
        "per_image": per_image,
        "failed": [item for item in answers if item not in per_image],
        "L1": {category: percent(values) for category, values in broad.items()},
        "L2": {category: percent(values) for category, values in detailed.items()},
    }


def both_scores(questions: list[DpgQuestion], answers: dict) -> dict[str, dict]:
    """The score as defined and as the official code computes it, by name."""
    official = score(questions, answers, skip_first_row=True, last_crop_categories=True)
    return {"correct": score(questions, answers), "official-bug-compatible": official}


# ------------------------------------------------------------------------------------------ the run


def draw_grids(data: Path, out: Path, draw, grids: dict[str, Path]) -> None:
    """Draw four images of every item whose grid is missing, and join them."""
    crops = {}
    for item, grid in grids.items():
        if not grid.exists():
            crops[item] = [out / "crops" / item / f"{k}.png" for k in range(4)]
    wanted = []
    for item, files in crops.items():
        prompt = data / "prompts" / f"{item}.txt"
        text = read_text(prompt).strip()
        require(text, prompt, "is empty; expected here: the text to draw")
        wanted.append((item, text, files))
    draw(wanted)
    for item, files in crops.items():
        pictures = [read_picture(f) for f in files]
        width, height = pictures[0].size
        grid = Image.new("RGB", (2 * width, 2 * height))
        for k, picture in enumerate(pictures):  # top left, top right, bottom left, bottom right
            grid.paste(picture, (k % 2 * width, k // 2 * height))
        save_picture(grid, grids[item])


def split_grid(file: Path) -> list[Image.Image]:
    """The four crops of a grid, in the order above."""
    grid = read_picture(file)
    x, y = grid.size[0] // 2, grid.size[1] // 2
    corners = ((0, 0), (x, 0), (0, y), (x, y))
    return [grid.crop((left, top, left + x, top + y)) for left, top in corners]


def run(data: Path, out: Path, draw, device, names: ModelNames) -> dict:
    """Both scores, each with the items that have none."""
    questions = read(data / "dpg_bench.csv")
    judge = ModelJudge(names.vqa, None, device)
    require(judge.is_vqa, names.vqa, "DPG-Bench needs a VQA model (plain questions), such as BLIP")
    by_item = defaultdict(list)
    for q in questions:
        by_item[q.item].append(q)
    grids = {item: out / "images" / f"{item}.png" for item in by_item}
    draw_grids(data, out, draw, grids)

    answers = defaultdict(list)
    for item, file in tqdm(grids.items(), desc="ask"):
        for crop in split_grid(file):
            answered = judge.vqa_answers(crop, [q.question for q in by_item[item]])
            answers[item].append({q.number: a for q, a in zip(by_item[item], answered)})
    write_text(out / "answers.json", json.dumps(answers) + "\n")

    scores = both_scores(questions, answers)
    metrics = {"judge": f"{names.vqa} (the official one is mPLUG-large)"}
    for name, result in scores.items():
        metrics[name] = {key: result[key] for key in ("dpg_score", "L1", "L2", "failed")}
        metrics[name]["failed_count"] = len(result["failed"])
    return metrics
