"""GenEval 2: how sure is a judge of the right answer to every question about a prompt's drawing?

source       facebookresearch/GenEval2 (README); evaluation.py, soft_tifa_analysis.py and the data
             were read in copies of that repository
DATA         geneval2_data.jsonl, 800 prompts
writes       OUT/images/<index>.png, one image per prompt; OUT/image_paths.json, prompt -> file, for
             evaluation.py; OUT/score_lists.json for soft_tifa_analysis.py
exact        questions, accepted answers, Soft-TIFA scores
approximated nothing with the official judge, --vqa Qwen/Qwen3-VL-8B-Instruct; with another one the
             scores do not compare

    python 04_eval.py --benchmark geneval2 --data GENEVAL2 --model toy/base --out runs/geneval2
"""

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from evals.judges import ModelJudge, ModelNames
from evals.official import get, percent, read_json_lines, read_picture, require
from hermesflow.files import write_text
from hermesflow.records import about

WRITES = ("image_paths.json", "score_lists.json")  # and the images
SKILLS = ("object", "attribute", "count", "position", "verb")
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


@dataclass
class Prompt:
    """A line, with the official names."""

    prompt: str
    atom_count: int
    vqa_list: list[tuple[str, str]]  # question, answer
    skills: list[str]  # of each question


def read(path) -> list[Prompt]:
    prompts = []
    what = "geneval2_data.jsonl of facebookresearch/GenEval2"
    for where, record in read_json_lines(path, what):
        pairs = get(record, "vqa_list", list[list[str]], where)
        require(pairs and all(len(pair) == 2 for pair in pairs), where,
                "field 'vqa_list' should be pairs of a question and an answer")
        require(all(text.strip() for pair in pairs for text in pair), where,
                "field 'vqa_list': a question or an answer is empty")
        skills = get(record, "skills", list[str], where)
        require(len(skills) == len(pairs), where,
                f"field 'skills' has {len(skills)} entries for {len(pairs)} questions")
        unknown = [skill for skill in skills if skill not in SKILLS]
        require(not unknown, where, f"field 'skills': {unknown[:1]} is none of {', '.join(SKILLS)}")
        prompt = get(record, "prompt", str, where)
        require(prompt.strip(), where, "field 'prompt' is empty")
        atom_count = get(record, "atom_count", int, where)
        prompts.append(Prompt(prompt, atom_count, [tuple(pair) for pair in pairs], skills))
    return prompts


def question_text(question: str) -> str:
    return f"{question} Answer in one word."


def accepted(question: str, answer: str) -> list[str]:
    """The answers whose first tokens count: yes, or a number in words and digits.

    A number that is no word up to ten has "other" for its digits, as in the official code.
    """
    if not question.startswith("How many"):
        return ["Yes", "yes", " yes", " Yes"]
    digits = str(NUMBERS.index(answer) + 1) if answer in NUMBERS else "other"
    words = [answer, answer.capitalize(), f" {answer}", f" {answer.capitalize()}"]
    return [*words, digits, f" {digits}"]


def probabilities(judge: ModelJudge, picture: Image.Image, asked: list[tuple]) -> list[float]:
    """Per (question, answer): that the judge's first token is the first one of any accepted one."""
    rows = judge.first_tokens(picture, [question_text(question) for question, _ in asked])  # (B, V)
    values = []
    for row, (question, answer) in zip(rows, asked):
        # the official judge's tokenizer keeps all answers apart; another one may not
        first = {first_token(judge.processor.tokenizer, a) for a in accepted(question, answer)}
        values.append(sum(row[token].item() for token in sorted(first)))
    return values


def first_token(tokenizer, text: str) -> int:
    return tokenizer.encode(text, add_special_tokens=False)[0]


def geometric_mean(values: list[float]) -> float:
    with np.errstate(divide="ignore"):  # log 0 is −inf, and the mean 0
        return float(np.exp(np.log(values).mean()))


def score(prompts: list[Prompt], scores: list[list[float]]) -> dict:
    """Soft-TIFA in percent: AM and GM over prompts, AM per skill, GM per number of atoms."""
    skills = defaultdict(list)
    atoms = defaultdict(list)
    for p, own in zip(prompts, scores, strict=True):
        atoms[p.atom_count].append(geometric_mean(own))
        for skill, value in zip(p.skills, own, strict=True):
            skills[skill].append(value)
    return {
        "Soft-TIFA AM": percent([sum(own) / len(own) for own in scores]),
        "Soft-TIFA GM": percent([geometric_mean(own) for own in scores]),
        "skills (AM)": {skill: percent(skills[skill]) for skill in SKILLS if skill in skills},
        "atoms (GM)": {str(count): percent(atoms[count]) for count in sorted(atoms)},
    }


def run(data: Path, out: Path, draw, device, names: ModelNames) -> dict:
    """The scores, and the judge that gave them."""
    prompts = read(data / "geneval2_data.jsonl")
    judge = ModelJudge(names.vqa, None, device)
    require(not judge.is_vqa, names.vqa, "GenEval 2 needs an image-text-to-text model (by chat)")
    files = [out / "images" / f"{i:05d}.png" for i in range(len(prompts))]
    draw([(file.stem, p.prompt, [file]) for p, file in zip(prompts, files)])

    scores = []
    for p, file in zip(tqdm(prompts, desc="ask"), files):
        picture = read_picture(file, upright=True)
        with about(str(file)):
            scores.append(probabilities(judge, picture, p.vqa_list))
    paths = {p.prompt: str(file) for p, file in zip(prompts, files)}
    write_text(out / "image_paths.json", json.dumps(paths, indent=1) + "\n")
    write_text(out / "score_lists.json", json.dumps(scores) + "\n")
    return {"judge": names.vqa, **score(prompts, scores)}
