"""Stage 4, evaluation: what a checkpoint understands, what it draws, and the gap between the two, on held-out records.

reads   records with questions, and a checkpoint
writes  OUT/answers.jsonl   per record: the caption, every answer about the real image (the model's) and about the drawn
                            image (the judge's), and what was right
        OUT/metrics.json    understanding, caption score, generation, gap; each with a bootstrap 95 % interval
        OUT/images          the first drawings, for people

    python 04_eval.py --model toy/base --records runs/toy/eval/records.jsonl --judge toy --out runs/toy/eval/base
    python 04_eval.py --compare runs/toy/eval/base runs/toy/eval/round1 --out runs/toy/eval    # table and picture

understanding   accuracy of the model's answers about the real image
generation      accuracy of a judge's answers about one drawn image (the paper: GPT-4o): --judge toy is the toy world's
                exact oracle, self the checkpoint itself, any other name a transformers image-text-to-text model
everything right  share of drawings without any mistake: by the oracle, or all questions answered right
gap             understanding − generation
"""

import argparse
import json
import shutil
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import AutoModelForImageTextToText, AutoProcessor

from model import (CAPTION_QUESTION, Ask, InputError, Question, Record, add_model_arguments, atomic, claim, draw_images,
                   load_from, load_image, map_records, parse_json, parse_record, read_jsonl, read_records, read_text,
                   run, seed_of, sheet, to_pil, write_jsonl, write_text)

sampling, scoring = import_module("01_sample"), import_module("02_score")


@dataclass
class Verdict:
    """Everything that was said about one record, and what of it was right."""

    id: str
    image: str
    text: str  # what was drawn
    questions: list[Question]
    caption: str  # the model's
    caption_score: float
    und_answers: list[str]
    und_right: list[bool]
    gen_answers: list[str]
    gen_right: list[bool]
    all_right: bool
    codes: list[int]  # of the drawn image


# ------------------------------------------------------------------------------------------------------------ judges


class ToyJudge:
    """The toy world's oracle reads the pixels."""

    def __init__(self):
        self.world = import_module("toy.world")

    def answer(self, picture: Image.Image, questions: list[Question]) -> list[str]:
        return [self.world.answer(picture, q.question) for q in questions]

    def all_right(self, picture, record: Record, right: list[bool]) -> bool:
        try:
            return self.world.judge(picture, record.drawing_text)["correct"]
        except ValueError as error:
            raise InputError(f"id {record.id!r}: {error}; --judge self knows any caption") from None


class SelfJudge:
    """The policy itself looks at its pictures, as in stage 2 with --reencode."""

    def __init__(self, model, vq, match, max_new_tokens: int):
        self.model, self.vq, self.match, self.max_new_tokens = model, vq, match, max_new_tokens

    @torch.inference_mode()
    def answer(self, picture, questions):
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1
        codes = self.vq.encode(pixels[None].to(self.model.device))
        answers = scoring.answer_questions(self.model, codes, [questions], self.max_new_tokens)[0]
        return [self.match(a, q.choices) for a, q in zip(answers, questions)]

    def all_right(self, picture, record, right):
        return all(right)


class ModelJudge:
    """Any transformers image-text-to-text model; its answer is matched to the nearest choice."""

    def __init__(self, name: str, match, device):
        self.processor = scoring.load_hf(AutoProcessor, name)
        self.model = scoring.load_hf(AutoModelForImageTextToText, name).to(device).eval()
        self.match = match

    @torch.inference_mode()
    def answer(self, picture, questions):
        return [self.match(self.ask(picture, q), q.choices) for q in questions]

    def ask(self, picture, question: Question) -> str:
        text = f"{question.question} Choose one of: {', '.join(question.choices)}. Answer with the choice only."
        chat = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": text}]}]
        inputs = self.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True,
                                                    return_tensors="pt").to(self.model.device)
        out = self.model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        return self.processor.decode(out, skip_special_tokens=True).strip()

    def all_right(self, picture, record, right):
        return all(right)


# ----------------------------------------------------------------------------------------------------------- metrics

METRICS = ("understanding", "caption score", "generation", "everything right", "gap")


def per_record(verdicts: list[Verdict]) -> dict[str, np.ndarray]:
    """One value per record and metric; all that follows is a mean over records."""
    und = np.array([np.mean(v.und_right) for v in verdicts])
    gen = np.array([np.mean(v.gen_right) for v in verdicts])
    return {"understanding": und, "caption score": np.array([v.caption_score for v in verdicts]), "generation": gen,
            "everything right": np.array([float(v.all_right) for v in verdicts]), "gap": und - gen}


def bootstrap(values: np.ndarray, seed: int = 0, draws: int = 10_000) -> tuple[float, float, float]:
    """Mean and the 95 % percentile interval over resampled records."""
    rng = np.random.default_rng(seed)
    means = np.array([values[rng.integers(len(values), size=len(values))].mean() for _ in range(draws)])
    low, high = np.percentile(means, [2.5, 97.5])
    return float(values.mean()), float(low), float(high)


def evaluate(verdicts: list[Verdict]) -> dict:
    metrics = {name: dict(zip(("mean", "low", "high"), bootstrap(v))) for name, v in per_record(verdicts).items()}
    return {"records": len(verdicts), "different texts": len({v.text for v in verdicts}), **metrics}


def table(named: dict[str, dict]) -> str:
    """A Markdown table: one line per checkpoint."""
    lines = ["| | records | " + " | ".join(METRICS) + " |", "|---" * (len(METRICS) + 2) + "|"]
    for name, m in named.items():
        cells = [f"{m[n]['mean']:.3f} [{m[n]['low']:.3f}, {m[n]['high']:.3f}]" for n in METRICS]
        lines.append(f"| {name} | {m['records']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------ stages


def evaluate_checkpoint(args) -> None:
    records = read_records(args.records, args.questions)[: args.n]
    without = [r.id for r in records if not r.questions]
    if without:
        raise InputError(f"{args.records}: id {without[0]!r}: field 'questions' is empty; evaluation needs questions")
    if not claim(args.out, vars(args), "metrics.json", args.overwrite):
        return print(table({args.out.name: parse_json(read_text(args.out / "metrics.json"), "metrics.json")}))
    model, vq = load_from(args)
    similarity = scoring.caption_scorer(args.caption_scorer, model.device)
    match = scoring.answer_matcher(args.matcher, model.device)
    if args.judge == "toy":
        judge = ToyJudge()
    elif args.judge == "self":
        judge = SelfJudge(model, vq, match, args.max_new_tokens)
    else:
        judge = ModelJudge(args.judge, match, model.device)

    @torch.inference_mode()
    def examine(chunk: list[Record]) -> list[dict]:
        real = sampling.encode_images(model, vq, chunk)
        captions = write_text(model, real, [Ask(i, model.tokens.ask(CAPTION_QUESTION)) for i in range(len(chunk))])
        answers = scoring.answer_questions(model, real, [r.questions for r in chunk], args.max_new_tokens)
        seeds = [seed_of(args.seed, "eval", r.id) for r in chunk]
        codes = draw_images(model, [r.drawing_text for r in chunk], seeds, args.steps, args.guidance, args.temperature,
                            args.anneal == "compound")
        results = []
        for r, ids, said, drawn, picture in zip(chunk, captions, answers, codes.tolist(), to_pil(vq.decode(codes))):
            caption, judged = model.tokens.decode(ids), judge.answer(picture, r.questions)
            gen_right = [a == q.answer for a, q in zip(judged, r.questions)]
            results.append(vars(Verdict(
                r.id, r.image, r.drawing_text, [vars(q) for q in r.questions], caption,
                similarity([caption], r.caption)[0], said,
                [match(a, q.choices) == q.answer for a, q in zip(said, r.questions)],
                judged, gen_right, judge.all_right(picture, r, gen_right), drawn)))
        return results

    results = map_records(examine, records, args.out, args.batch, "evaluate")
    if results is None:
        return
    verdicts = [parse_record(Verdict, v, f"{args.out}: id {v['id']!r}") for v in results]
    with torch.inference_mode():
        pictures = to_pil(vq.decode(torch.tensor([v.codes for v in verdicts[: args.show]], device=model.device)))
    for v, picture in zip(verdicts, pictures):
        sampling.save_picture(picture, args.out / "images" / f"{v.id}.png")
    write_jsonl(args.out / "answers.jsonl", verdicts)
    metrics = evaluate(verdicts)
    with atomic(args.out / "metrics.json") as temporary:
        temporary.write_text(json.dumps(metrics, indent=1) + "\n")
    shutil.rmtree(args.out / "parts")
    print(table({args.out.name: metrics}))


def compare(args) -> None:
    """Table and picture of several evaluations of the same records: real image, then each checkpoint's drawing."""
    runs = {folder.name: read_jsonl(folder / "answers.jsonl", Verdict) for folder in args.compare}
    first = next(iter(runs.values()))
    for name, verdicts in runs.items():
        if [v.id for v in verdicts] != [v.id for v in first]:
            raise InputError(f"{name}/answers.jsonl: other records than {args.compare[0]}/answers.jsonl")
    text = table({name: evaluate(verdicts) for name, verdicts in runs.items()})
    with atomic(args.out / "table.md") as temporary:
        temporary.write_text(text + "\n")
    rows, labels = [], []
    for i, shown in enumerate(first[: args.show]):
        if not all((folder / "images" / f"{shown.id}.png").exists() for folder in args.compare):
            continue  # an evaluation with a smaller --show
        drawn = [Image.open(folder / "images" / f"{shown.id}.png").convert("RGB") for folder in args.compare]
        row = to_pil(load_image(shown.image, drawn[0].size[0])[None])
        for verdicts, picture in zip(runs.values(), drawn):
            frame = "#2a2" if verdicts[i].all_right else "#d33"
            row.append(ImageOps.expand(picture.resize((240, 240), Image.Resampling.NEAREST), 8, frame))
        rows.append(row)
        labels.append(shown.text)
    sampling.save_picture(sheet(rows, labels, 96, columns=3), args.out / "comparison.png")
    print(text)
    print(f"\n{args.out / 'table.md'}; {args.out / 'comparison.png'}: the real image, then {', '.join(runs)}; "
          "green frame: everything right")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--records", help="held-out records with questions")
    parser.add_argument("--questions", help="the original vqa_data.json, joined to the records by id")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--overwrite", action="store_true", help="empty OUT first")
    parser.add_argument("--compare", type=Path, nargs="+", metavar="OUT", help="compare finished evaluations instead")
    parser.add_argument("--judge", default="toy", help="toy, self, or an image-text-to-text model by id or folder")
    parser.add_argument("--caption-scorer", default="token-f1", help="token-f1, or an encoder: its [CLS] vectors")
    parser.add_argument("--matcher", default="text", help="text, or a sentence encoder that matches answers to choices")
    parser.add_argument("--n", type=int, help="only the first N records")
    parser.add_argument("--steps", type=int, default=50, help="decoding steps per image")
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--temperature", type=float, default=1.0, help="of the confidence noise")
    parser.add_argument("--anneal", choices=["compound", "maskgit"], default="compound", help="original, MaskGIT's")
    parser.add_argument("--max-new-tokens", type=int, default=20, help="per answer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=4, help="records at a time; does not change results")
    parser.add_argument("--show", type=int, default=12, help="records in the picture")
    args = parser.parse_args()
    if not (args.records or args.compare):
        parser.error("one of --records, --compare is needed")
    return args


def main():
    args = parse_args()
    compare(args) if args.compare else evaluate_checkpoint(args)


if __name__ == "__main__":
    run(main)
