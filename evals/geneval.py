"""GenEval: are the objects of a prompt in its images, in the right number, colour and place?

source       djghosh13/geneval (evaluate_images.py, summary_scores.py)
DATA         evaluation_metadata.jsonl (from prompts/), object_names.txt (from evaluation/)
writes       OUT/images/<index>/metadata.jsonl and samples/0000<k>.png beside it, four images per
             prompt: the official layout; OUT/results.jsonl
exact        all rules, mmdet's post-processing
approximated the detector is transformers' Mask2Former (detector.py); Pillow resizes images

    python 04_eval.py --benchmark geneval --data GENEVAL --model toy/base --out runs/geneval
"""

import json
from collections import defaultdict
from itertools import product
from operator import itemgetter
from pathlib import Path

import numpy as np
from tqdm import tqdm

from evals.detector import COLORS, Detector, iou
from evals.judges import ModelNames
from evals.official import expected, get, read_json_lines, read_picture, require, write_prompt
from hermesflow.files import read_text, write_text
from hermesflow.records import about

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
WRITES = ("results.jsonl",)


def read(path) -> list[dict]:
    """The 553 records of evaluation_metadata.jsonl, as they are."""
    lines = read_json_lines(path, "evaluation_metadata.jsonl of djghosh13/geneval (prompts)")
    for where, record in lines:
        require(get(record, "prompt", str, where).strip(), where, "field 'prompt' is empty")
        tag = get(record, "tag", str, where)
        require(tag in TAGS, where, f"field 'tag' is {tag!r}")
        check_clauses(get(record, "include", list[dict], where), f"{where}: field 'include'")
        if "exclude" in record:
            check_clauses(get(record, "exclude", list[dict], where), f"{where}: field 'exclude'")
    return [record for _, record in lines]


def check_clauses(clauses: list[dict], where: str) -> None:
    """A clause has a class, a count, perhaps a color, or a position relative to an earlier one."""
    for i, clause in enumerate(clauses):
        get(clause, "class", str, where)
        get(clause, "count", int, where)
        if "color" in clause:
            require(clause["color"] in COLORS, where, f"field 'color' is {clause['color']!r}")
        if "position" in clause:
            p = clause["position"]
            is_pair = isinstance(p, list) and len(p) == 2
            require(is_pair and type(p[1]) is int and 0 <= p[1] < i, where,
                    "field 'position' should be [relation, index of an earlier clause]")


def read_object_names(path) -> list[str]:
    """GenEval's names of the 80 COCO classes, in the order of the detector's labels."""
    what = "object_names.txt of djghosh13/geneval (evaluation)"
    lines = read_text(expected(path, what)).split("\n")
    names = [line.strip() for line in lines if line.strip()]
    require(len(names) == 80, path, f"expected 80 names ({what}), found {len(names)}")
    return names


def kept_objects(detections: list[dict], tag: str, threshold: float = 0.3,
                 counting_threshold: float = 0.9, max_objects: int = 16,
                 max_overlap: float = 1.0) -> dict[str, list[dict]]:
    """The detections that count, per class, best first.

    detections: {"class", "score", "box": (x0, y0, x1, y1) pixels, …}. max_overlap 1: no NMS.
    Scores compare in float32, as mmdet gives them: exactly 0.3 does not count.
    """
    least = np.float32(counting_threshold if tag == "counting" else threshold)
    objects = {}
    for name in dict.fromkeys(d["class"] for d in detections):
        own = [(np.float32(d["score"]), d) for d in detections if d["class"] == name]
        candidates = sorted([c for c in own if c[0] > least], key=itemgetter(0))
        kept = []
        for _, d in candidates[::-1][:max_objects]:
            if max_overlap == 1 or all(iou(k["box"], d["box"]) < max_overlap for k in kept):
                kept.append(d)
        if kept:
            objects[name] = kept
    return objects


def relative_position(a, b, threshold: float = 0.1) -> set[str]:
    """Where box a is relative to box b: any of left of, right of, above, below; y points down."""
    a0, a1 = np.reshape(a, (2, 2)).astype(float)  # corners (x, y)
    b0, b1 = np.reshape(b, (2, 2)).astype(float)
    offset = (a0 + a1 - b0 - b1) / 2  # between the centres
    dead_zone = threshold * (np.abs(a1 - a0) + np.abs(b1 - b0))
    revised = np.maximum(np.abs(offset) - dead_zone, 0) * np.sign(offset)
    if (np.abs(revised) < 1e-3).all():
        return set()
    x, y = revised / np.linalg.norm(offset)  # the official code divides by the unrevised length
    sides = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, holds in sides.items() if holds}


def colored_objects(metadata: dict, objects: dict[str, list[dict]]) -> list[dict]:
    """The objects whose "color" `check_image` reads; the caller has CLIP write it into them."""
    colored = []
    for clause in [c for c in metadata.get("include", []) if "color" in c]:
        colored += objects.get(clause["class"], [])[: clause["count"]]
    return colored


def check_image(metadata: dict, objects: dict, position_threshold: float = 0.1) -> dict:
    """One image: {"correct", "categories", "reasons"}, the last two with one entry per failure.

    Only the best `count` objects of a clause count. A failed clause is no target for a position.
    """
    failures = []
    groups = []  # the objects of each clause so far; None: it failed
    for clause in metadata.get("include", []):
        top = objects.get(clause["class"], [])[: clause["count"]]
        failure = clause_failure(clause, top, groups, position_threshold)
        failures += [failure] if failure else []
        groups.append(None if failure else top)
    for clause in metadata.get("exclude", []):
        name, count = clause["class"], clause["count"]
        present = len(objects.get(name, []))
        if present >= count:
            failures.append(("excess", f"{name}: {present} found, fewer than {count} wanted"))
    categories = [category for category, _ in failures]
    reasons = [reason for _, reason in failures]
    return {"correct": not failures, "categories": categories, "reasons": reasons}


def clause_failure(clause: dict, top: list[dict], groups: list, threshold: float) -> tuple | None:
    """(category, reason) of a clause that fails, else None."""
    name, count = clause["class"], clause["count"]
    if len(top) < count:
        return "missing", f"{name}: {len(top)} found, at least {count} wanted"
    colors = [o.get("color") for o in top]
    if "color" in clause and colors.count(clause["color"]) < count:
        return "color", f"{name}: {', '.join(map(str, colors))}, wanted {clause['color']}"
    if "position" in clause:
        relation, target = clause["position"]
        if groups[target] is None:
            return "no_target", f"{name}: nothing to be {relation}"
        for o, t in product(top, groups[target]):
            sides = relative_position(o["box"], t["box"], threshold)
            if relation not in sides:
                where = " and ".join(sorted(sides)) or "no side"
                return "position", f"{name}: {where}, wanted {relation}"
    return None


def summary(results: list[tuple[dict, bool]]) -> dict:
    """Over (metadata, correct) of every image: the share of correct images per tag, their mean
    ("overall"), of all images, and of prompts with at least one."""
    tags = defaultdict(list)
    prompts = defaultdict(list)
    for metadata, correct in results:
        tags[metadata["tag"]].append(correct)
        prompts[json.dumps(metadata, sort_keys=True)].append(correct)
    shares = {tag: sum(correct) / len(correct) for tag, correct in tags.items()}
    return {"overall": sum(shares.values()) / len(shares), "tags": shares,
            "images": len(results), "prompts": len(prompts),
            "correct_images": sum(correct for _, correct in results) / len(results),
            "correct_prompts": sum(map(any, prompts.values())) / len(prompts)}


def run(data: Path, out: Path, draw, device, names: ModelNames) -> dict:
    """The summary over all images."""
    prompts = read(data / "evaluation_metadata.jsonl")
    classes = read_object_names(data / "object_names.txt")
    wanted = []
    for i, prompt in enumerate(prompts):
        files = [out / "images" / f"{i:05d}" / "samples" / f"{k:05d}.png" for k in range(4)]
        wanted.append((f"{i:05d}", prompt["prompt"], files))
    detector = Detector(names.detector, names.clip, classes, device)
    draw(wanted)
    results = []
    lines = []
    for prompt, (index, _, files) in zip(tqdm(prompts, desc="detect"), wanted):
        write_prompt(out / "images" / index / "metadata.jsonl", prompt)
        for file in files:
            image = read_picture(file, upright=True)
            with about(str(file)):
                objects = kept_objects(detector.objects(image), prompt["tag"])
                for detection in colored_objects(prompt, objects):
                    detection["color"] = detector.color(image, detection)
            result = check_image(prompt, objects)
            results.append((prompt, result["correct"]))
            # summary_scores.py groups by the text of the metadata
            line = dict(filename=str(file), tag=prompt["tag"], prompt=prompt["prompt"], **result,
                        metadata=json.dumps(prompt))
            lines.append(json.dumps(line) + "\n")
    write_text(out / "results.jsonl", "".join(lines))
    return summary(results)
