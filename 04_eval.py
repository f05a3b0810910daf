"""Stage 4, evaluation: what a checkpoint understands, what it draws, and the gap between the two, on held-out records.

reads   records with questions, and a checkpoint
writes  OUT/answers.jsonl   per record: the caption, every answer about the real image (the model's) and about the drawn
                            image (the judge's), and what was right
        OUT/metrics.json    understanding, caption score, generation, gap; each with a bootstrap 95 % interval
        OUT/images          the first drawings, for people

    python 04_eval.py --model toy/base --records runs/toy/held_out/records.jsonl --steps 16 --guidance 0 --out runs/base
    python 04_eval.py --compare runs/toy/eval/base runs/toy/eval/round1 --out runs/toy/eval    # table and picture
    python 04_eval.py --report runs/toy                                                       # report.html of a run
    python 04_eval.py --benchmark pope --data POPE --model runs/toy/round2/train/checkpoint --out runs/pope

understanding   accuracy of the model's answers about the real image
generation      accuracy of a judge's answers about one drawn image (the paper: GPT-4o): --judge toy is the toy world's
                exact oracle, self the checkpoint itself, any other name a transformers image-text-to-text or VQA model
everything right  share of drawings without any mistake: by the oracle, or all questions answered right
gap             understanding − generation

From top to bottom: judges, metrics, the gap protocol, understanding benchmarks, generation benchmarks (official rules:
benchmarks.py), the report.
"""

import argparse
import base64
import io
import json
import math
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from html import escape
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from tqdm import tqdm
from transformers import (MODEL_FOR_VISUAL_QUESTION_ANSWERING_MAPPING, AutoConfig, AutoImageProcessor,
                          AutoModelForImageTextToText, AutoModelForVisualQuestionAnswering, AutoProcessor, CLIPModel,
                          Mask2FormerForUniversalSegmentation)
from transformers.models.mask2former import modeling_mask2former

import benchmarks as rules
from model import (CAPTION_QUESTION, Ask, InputError, Pair, Question, Record, add_drawing_arguments, add_model_arguments,
                   claim, draw_images, drawing, fill, load_from, load_image, map_records, model_inputs, parse_json,
                   parse_record, processes, read_bin, read_jsonl, read_object, read_records, read_text, run, save_picture,
                   seed_of, sheet, to_pil, write_file, write_jsonl, write_text)

sampling, scoring = import_module("01_sample"), import_module("02_score")
modeling_mask2former.requires_backends = lambda *_: None  # asks for scipy, which only its training loss uses


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
    """The toy world's oracle reads the pixels; its answers are exact and not matched to anything."""

    def __init__(self):
        self.world = import_module("toy.world")

    def answer(self, picture: Image.Image, questions: list[Question]) -> list[str]:
        return [self.world.answer(picture, q.question) for q in questions]

    def right(self, answers: list[str], questions: list[Question]) -> list[bool]:
        return [a == q.answer for a, q in zip(answers, questions)]

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
        return scoring.answer_questions(self.model, codes, [questions], self.max_new_tokens)[0]

    def right(self, answers, questions):
        return scoring.answered_right(answers, questions, self.match)

    def all_right(self, picture, record, right):
        return all(right)


class ModelJudge(SelfJudge):
    """Any transformers image-text-to-text model (by chat) or VQA model (plain questions), matched as the policy."""

    def __init__(self, name: str, match, device):
        self.match, self.processor = match, scoring.load_hf(AutoProcessor, name)
        self.is_vqa = type(scoring.load_hf(AutoConfig, name)) in MODEL_FOR_VISUAL_QUESTION_ANSWERING_MAPPING
        kind = AutoModelForVisualQuestionAnswering if self.is_vqa else AutoModelForImageTextToText
        self.model = scoring.load_hf(kind, name).to(device).eval()

    @torch.inference_mode()
    def answer(self, picture, questions):
        return [self.ask(picture, q.question) if self.is_vqa else self.chat(picture, q) for q in questions]

    def chat(self, picture, question: Question) -> str:
        text = f"{question.question} Choose one of: {', '.join(question.choices)}. Answer with the choice only."
        chat = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": text}]}]
        inputs = self.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True,
                                                    return_tensors="pt").to(self.model.device)
        out = self.model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        return self.processor.decode(out, skip_special_tokens=True).strip()

    def ask(self, picture, question: str) -> str:
        inputs = self.processor(images=picture, text=question, return_tensors="pt").to(self.model.device)
        if hasattr(self.model.config, "id2label") and not self.model.can_generate():  # an answer is a class (ViLT)
            return self.model.config.id2label[int(self.model(**inputs).logits.argmax(-1))]
        out = self.model.generate(**inputs, max_new_tokens=20)[0]
        return self.processor.decode(out, skip_special_tokens=True).strip()


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
    """All metrics with their intervals, and both accuracies by what the questions are about."""
    elements = {}
    for v in verdicts:
        for q, und, gen in zip(v.questions, v.und_right, v.gen_right):
            elements.setdefault(q.element.replace("|", "/") or "other", []).append((und, gen))
    means = {e: [float(m) for m in np.mean(rows, 0)] for e, rows in sorted(elements.items())}
    by_element = {e: dict(questions=len(elements[e]), understanding=u, generation=g) for e, (u, g) in means.items()}
    metrics = {name: dict(zip(("mean", "low", "high"), bootstrap(v))) for name, v in per_record(verdicts).items()}
    texts = len({v.text for v in verdicts})
    return {"records": len(verdicts), "different texts": texts, **metrics, "by element": by_element}


def paired_difference(before: list[Verdict], after: list[Verdict]) -> dict:
    """after − before on the same records and seeds, resampled by record: far narrower than two separate intervals."""
    old, new = per_record(before), per_record(after)
    return {name: dict(zip(("mean", "low", "high"), bootstrap(new[name] - old[name]))) for name in METRICS}


def interval(m: dict, sign: str = "") -> str:
    return f"{m['mean']:{sign}.3f} [{m['low']:{sign}.3f}, {m['high']:{sign}.3f}]"


def table(named: dict[str, dict], sign: str = "") -> str:
    """A Markdown table: one line per checkpoint, or per difference."""
    lines = ["| | " + " | ".join(METRICS) + " |", "|---" * (len(METRICS) + 1) + "|"]
    return "\n".join(lines + [f"| {name} | " + " | ".join(interval(m[n], sign) for n in METRICS) + " |"
                              for name, m in named.items()])


# ------------------------------------------------------------------------------------------------------ gap protocol


def evaluate_checkpoint(args) -> None:
    records = read_records(args.records, args.questions)[: args.n]
    without = [r.id for r in records if not r.questions]
    if without:
        raise InputError(f"{args.records}: id {without[0]!r}: field 'questions' is empty; evaluation needs questions")
    inputs = {"records": args.records, "questions": args.questions, "images": [r.image for r in records]}
    if not claim(args.out, args, "metrics.json", inputs | model_inputs(args)):
        return print(table({args.out.name: read_object(args.out / "metrics.json")}))
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
        real = sampling.encode_images(model, vq, [sampling.read_image(model, vq, r) for r in chunk])
        captions = write_text(model, real, [Ask(i, model.tokens.ask(CAPTION_QUESTION)) for i in range(len(chunk))])
        answers = scoring.answer_questions(model, real, [r.questions for r in chunk], args.max_new_tokens)
        seeds = [seed_of(args.seed, "eval", r.id) for r in chunk]
        codes = draw_images(model, [r.drawing_text for r in chunk], seeds, drawing(args))
        results = []
        for r, ids, said, drawn, picture in zip(chunk, captions, answers, codes.tolist(), to_pil(vq.decode(codes))):
            caption, judged = model.tokens.decode(ids), judge.answer(picture, r.questions)
            gen_right = judge.right(judged, r.questions)
            results.append(vars(Verdict(
                r.id, r.image, r.drawing_text, [vars(q) for q in r.questions], caption,
                similarity([caption], r.caption)[0], said,
                scoring.answered_right(said, r.questions, match),
                judged, gen_right, judge.all_right(picture, r, gen_right), drawn)))
        return results

    results = map_records(examine, records, args.out, args.batch, "evaluate",
                          length=lambda r: len(model.tokens.draw(r.drawing_text)))
    if results is None:
        return
    verdicts = [parse_record(Verdict, v, f"{args.out}: id {v['id']!r}") for v in results]
    with torch.inference_mode():
        pictures = to_pil(vq.decode(torch.tensor([v.codes for v in verdicts[: args.show]], device=model.device)))
    for v, picture in zip(verdicts, pictures):
        save_picture(picture, args.out / "images" / f"{v.id}.png")
    write_jsonl(args.out / "answers.jsonl", verdicts)
    metrics = evaluate(verdicts)
    write_file(args.out / "metrics.json", json.dumps(metrics, indent=1) + "\n")
    shutil.rmtree(args.out / "parts")
    print(table({args.out.name: metrics}))


def read_verdicts(folders: list[Path]) -> dict[str, list[Verdict]]:
    """The verdicts of several evaluations by folder (its name, if that tells them apart); all of the same records."""
    alike = len({f.name for f in folders}) < len(folders)
    runs = {str(f) if alike else f.name: read_jsonl(f / "answers.jsonl", Verdict) for f in folders}
    base, first = next(iter(runs.items()))
    for name, verdicts in runs.items():
        if [(v.id, v.text) for v in verdicts] != [(v.id, v.text) for v in first]:
            raise InputError(f"{name}/answers.jsonl: other records than {base}/answers.jsonl")
    return runs


def compare(args) -> None:
    """Table, paired differences and picture of evaluations of the same records: real image, then the drawings."""
    runs = read_verdicts(args.compare)
    name, first = next(iter(runs.items()))
    texts = len({v.text for v in first})
    text = f"{len(first)} records, {texts} different texts; mean over records [95 % interval]\n\n"
    text += table({n: evaluate(verdicts) for n, verdicts in runs.items()})
    if len(runs) > 1:
        text += f"\n\nPaired difference to {name}:\n\n" + table(
            {n: paired_difference(first, verdicts) for n, verdicts in list(runs.items())[1:]}, "+")
    write_file(args.out / "table.md", text + "\n")
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
    print(text)
    if rows:
        save_picture(sheet(rows, labels, 96, columns=3), args.out / "comparison.png")
        print(f"\n{args.out / 'table.md'}; {args.out / 'comparison.png'}: the real image, then {', '.join(runs)}; "
              "green frame: everything right")


# --------------------------------------------------------------------- understanding benchmarks: ask, write, score


@dataclass
class Job:
    """One question about an image, or one text to draw."""

    id: str
    image: str
    text: str


def asker(model, vq, args):
    """A function [(image file, prompt)] -> [answer], greedy, resumable. Only the main process returns from it."""

    @torch.inference_mode()
    def examine(jobs: list[Job]) -> list[dict]:
        files = list(dict.fromkeys(j.image for j in jobs))  # each image is read and prefilled once
        codes = sampling.encode_images(model, vq, [load_image(f, sampling.image_size(model, vq)) for f in files])
        asks = [Ask(files.index(j.image), model.tokens.ask(j.text)) for j in jobs]
        said = write_text(model, codes, asks, 64 if args.benchmark == "flickr30k" else args.max_new_tokens)
        return [dict(id=j.id, answer=model.tokens.decode(ids).strip()) for j, ids in zip(jobs, said)]

    def ask(pairs: list[tuple]) -> list[str]:
        jobs = [Job(str(n), str(image), prompt) for n, (image, prompt) in enumerate(pairs)]
        results = map_records(examine, jobs, args.out, args.batch, args.benchmark)
        leave_to_the_main_process()
        return [r["answer"] for r in results]

    return ask


def leave_to_the_main_process() -> None:
    """Several processes ask and draw; one scores and writes."""
    if not processes().is_main_process:
        sys.exit()


def pope(data: Path, out: Path, ask) -> dict:
    splits = rules.read_pope(data)
    said = ask([(data / "val2014" / q.image, q.text + rules.SHORT_ANSWER) for qs in splits.values() for q in qs])
    said, scores = iter(said), {}
    for split, questions in splits.items():
        answers = [next(said) for _ in questions]
        rules.write_pope(out / f"coco_pope_{split}_answers.jsonl", questions, answers)
        scores[split] = rules.pope_score([q.label for q in questions], answers)
    return {"mean": rules.pope_mean(scores), **scores}


def mme(data: Path, out: Path, ask) -> dict:
    tasks = rules.read_mme(data)
    said = ask([(q.image, rules.mme_prompt(q.question)) for qs in tasks.values() for q in qs])
    said = iter(said)
    answers = {task: [next(said) for _ in questions] for task, questions in tasks.items()}
    rules.write_mme(out / "mme_results", tasks, answers)
    return rules.mme_score({t: rules.mme_task([q.label for q in qs], answers[t]) for t, qs in tasks.items()})


def vqav2(data: Path, out: Path, ask) -> dict:
    """DATA holds the questions file, the annotations file (not for test splits) and a folder of images."""
    questions = rules.read_vqa(only(data, "v2_OpenEnded_mscoco_*_questions.json"),
                               next(iter(sorted(data.glob("v2_mscoco_*_annotations.json"))), None))
    answers = ask([(data / "images" / q.image, q.question + rules.SHORT_ANSWER) for q in questions])
    rules.write_vqa(out / "vqa_results.json", questions, answers)
    return rules.vqa_score(questions, answers) if questions[0].answers else {}


def gqa(data: Path, out: Path, ask) -> dict:
    questions = rules.read_gqa(data / "testdev_balanced_questions.json")
    answers = ask([(data / "images" / f"{q.imageId}.jpg", q.question + rules.SHORT_ANSWER) for q in questions])
    rules.write_gqa(out / "testdev_balanced_predictions.json", questions, answers)
    return {"accuracy": rules.gqa_score(questions, answers)}


def mmmu(data: Path, out: Path, ask) -> dict:
    """Show-o sees one image: a question's first."""
    questions = rules.read_mmmu(only(data, "*.jsonl"))
    for q in questions:
        if not q.images:
            raise InputError(f"{data}: id {q.id!r}: field 'image_1' is missing")
    answers = ask([(q.images[0], rules.mmmu_prompt(q)) for q in questions])
    predictions = rules.mmmu_predictions(questions, answers)
    rules.write_mmmu(out / "mmmu_predictions.json", questions, predictions)
    return rules.mmmu_score(questions, predictions)


def flickr30k(data: Path, out: Path, ask) -> dict:
    """CIDEr-D over the 1,000 test images; words by an approximation of the PTB tokeniser, which is Java."""
    references = rules.read_flickr(data / "dataset_flickr30k.json")
    captions = ask([(data / "images" / name, rules.FLICKR_PROMPT) for name in references])
    results = [{"image_id": name, "caption": c} for name, c in zip(references, captions)]
    write_file(out / "flickr30k_captions.json", json.dumps(results, indent=1) + "\n")
    score = rules.cider_d({r["image_id"]: rules.ptb_words(r["caption"]) for r in results},
                          {name: [rules.ptb_words(t) for t in texts] for name, texts in references.items()})
    return {"CIDEr-D x 100 (PTB tokeniser approximated)": 100 * score["cider_d"]}


def only(folder: Path, pattern: str) -> Path:
    files = sorted(folder.glob(pattern))
    if len(files) != 1:
        raise InputError(f"{folder}: expected one file {pattern}, found {len(files)}")
    return files[0]


# ----------------------------------------------------------------------- generation benchmarks: draw, look, score


def drawer(model, vq, args):
    """A function [(id, text, [files])] that draws what is missing, resumably; every image has its own seed.

    Files that are there already are kept, so images of any other model can be scored in the same layout.
    """

    @torch.inference_mode()
    def paint(jobs: list[Job]) -> list[dict]:
        files = [json.loads(j.image) for j in jobs]
        texts = [j.text for j, f in zip(jobs, files) for _ in f]
        seeds = [seed_of(args.seed, args.benchmark, j.id, k) for j, f in zip(jobs, files) for k in range(len(f))]
        codes = draw_images(model, texts, seeds, drawing(args))
        for file, picture in zip([name for f in files for name in f], to_pil(vq.decode(codes))):
            if not Path(file).exists():
                save_picture(picture, file)
        return [dict(id=j.id) for j in jobs]

    def draw(wanted: list[tuple]) -> None:
        jobs = [Job(id, json.dumps([str(f) for f in files]), text) for id, text, files in wanted
                if not all(f.exists() for f in files)]
        if jobs:
            map_records(paint, jobs, args.out, args.batch, f"draw for {args.benchmark}",
                        length=lambda j: len(model.tokens.draw(j.text)))
        leave_to_the_main_process()

    return draw


class Detector:
    """GenEval's eyes without mmdet: Mask2Former for objects, CLIP for their colours."""

    def __init__(self, detector: str, clip: str, names: list[str], device):
        size = {"shortest_edge": 800, "longest_edge": 1333}  # mmdet's; the hub's default squashes to 384×384
        self.processor = scoring.load_hf(AutoImageProcessor, detector, size=size)
        self.model = scoring.load_hf(Mask2FormerForUniversalSegmentation, detector).to(device).eval()
        self.clip, self.names = Clip(clip, device), names

    @torch.inference_mode()
    def objects(self, image: Image.Image, top: int = 100) -> list[dict]:
        """As mmdet does: the best 100 of query × class; score = class probability × mean mask probability inside."""
        inputs = self.processor(images=image, return_tensors="pt").to(self.model.device)
        out = self.model(**inputs)
        classes = out.class_queries_logits[0].softmax(-1)[:, :-1]  # (Q, 80), without "nothing"
        values, index = classes.flatten().topk(min(top, classes.numel()))
        masks = F.interpolate(out.masks_queries_logits, image.size[::-1], mode="bilinear", align_corners=False)[0]
        found = []
        for value, i in zip(values.tolist(), index.tolist()):
            mask = masks[i // classes.shape[1]]
            rows, columns = torch.nonzero(mask > 0, as_tuple=True)
            if len(rows):
                score = value * mask[mask > 0].sigmoid().mean().item()
                box = (columns.min().item(), rows.min().item(), columns.max().item() + 1, rows.max().item() + 1)
                name = self.names[i % classes.shape[1]]
                found.append({"class": name, "score": score, "box": box, "mask": (mask > 0).cpu()})
        return found

    def color(self, image: Image.Image, found: dict) -> str:
        """Background painted grey, box cropped, nearest of ten colours in CLIP."""
        grey = Image.new("RGB", image.size, "#999999")
        cut = Image.composite(image, grey, Image.fromarray(found["mask"].numpy())).crop(found["box"])
        return rules.GENEVAL_COLORS[int((self.prototypes(found["class"]) @ self.clip.images([cut])[0]).argmax())]

    @cache
    def prototypes(self, name: str) -> torch.Tensor:
        """(10, D) unit vectors of the colours of a class, each the mean of three texts."""
        texts = [[f"a photo of a {c} {name}", f"a photo of a {c}-colored {name}", f"a photo of a {c} object"]
                 for c in rules.GENEVAL_COLORS]
        return F.normalize(torch.stack([self.clip.texts(t).mean(0) for t in texts]), dim=-1)


class Clip:
    """Unit vectors of images and texts."""

    def __init__(self, name: str, device):
        self.processor = scoring.load_hf(AutoProcessor, name)
        self.model = scoring.load_hf(CLIPModel, name).to(device).eval()

    @torch.inference_mode()
    def images(self, pictures: list[Image.Image]) -> torch.Tensor:
        inputs = self.processor(images=pictures, return_tensors="pt").to(self.model.device)
        return self.unit(self.model.get_image_features(**inputs))

    @torch.inference_mode()
    def texts(self, texts: list[str]) -> torch.Tensor:
        inputs = self.processor(text=texts, return_tensors="pt", padding=True, truncation=True).to(self.model.device)
        return self.unit(self.model.get_text_features(**inputs))

    def unit(self, features):
        return F.normalize(getattr(features, "pooler_output", features), dim=-1)  # (B, D)


def geneval(data: Path, out: Path, draw, args, device) -> dict:
    """Official layout: OUT/images/<index>/metadata.jsonl and samples/0000<k>.png, four images per prompt."""
    prompts = rules.read_geneval(data / "evaluation_metadata.jsonl")
    names = rules.read_object_names(data / "object_names.txt")
    folders = [out / "images" / f"{i:05d}" for i in range(len(prompts))]
    files = [[folder / "samples" / f"{k:05d}.png" for k in range(4)] for folder in folders]
    draw([(f.name, p["prompt"], samples) for f, p, samples in zip(folders, prompts, files)])
    detector, results = Detector(args.detector, args.clip or "openai/clip-vit-large-patch14", names, device), []
    for folder, prompt, samples in zip(tqdm(folders, desc="detect"), prompts, files):
        write_file(folder / "metadata.jsonl", json.dumps(prompt) + "\n")
        for file in samples:
            image = ImageOps.exif_transpose(Image.open(file)).convert("RGB")
            objects = rules.geneval_objects(detector.objects(image), prompt["tag"])
            for found in rules.geneval_colored(prompt, objects):
                found["color"] = detector.color(image, found)
            results.append((prompt, file, rules.geneval_check(prompt, objects)))
    lines = [{"filename": str(f), "tag": p["tag"], "prompt": p["prompt"], **r} for p, f, r in results]
    write_file(out / "results.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    return rules.geneval_summary([(p, r["correct"]) for p, _, r in results])


def dpg(data: Path, out: Path, draw, args, device) -> dict:
    """Official layout: OUT/images/<item>.png, a 2×2 grid of four images.

    The official judge, mPLUG-large, has no transformers port; scores of another one do not compare with published ones.
    """
    questions, of_item = rules.read_dpg(data / "dpg_bench.csv"), {}
    for q in questions:
        of_item.setdefault(q.item, []).append(q)
    grids = {item: out / "images" / f"{item}.png" for item in of_item}
    missing = [item for item, grid in grids.items() if not grid.exists()]
    crops = {item: [out / "crops" / item / f"{k}.png" for k in range(4)] for item in missing}
    draw([(i, read_text(data / "prompts" / f"{i}.txt").strip(), files) for i, files in crops.items()])
    for item, files in crops.items():
        pictures = [Image.open(f) for f in files]
        width, height = pictures[0].size
        grid = Image.new("RGB", (2 * width, 2 * height))
        for k, picture in enumerate(pictures):  # top left, top right, bottom left, bottom right
            grid.paste(picture, (k % 2 * width, k // 2 * height))
        save_picture(grid, grids[item])
    judge, answers = ModelJudge(args.vqa, None, device), {}
    for item, file in tqdm(grids.items(), desc="ask"):
        grid = Image.open(file).convert("RGB")
        x, y = grid.size[0] // 2, grid.size[1] // 2
        four = [grid.crop((left, top, left + x, top + y)) for top in (0, y) for left in (0, x)]
        answers[item] = [{q.number: judge.ask(c, q.question) for q in of_item[item]} for c in four]
    write_file(out / "answers.json", json.dumps(answers) + "\n")
    scores = rules.dpg_scores(questions, answers)
    return {"judge": f"{args.vqa} (the official one is mPLUG-large)", "failed": scores["correct"]["failed"],
            **{name: {k: s[k] for k in ("dpg_score", "L1", "L2")} for name, s in scores.items()}}


def draw_records(data: Path, out: Path, draw) -> list[tuple[Record, Path]]:
    """One image of every record's text: OUT/images/<id>.png."""
    files = [(r, out / "images" / f"{r.id}.png") for r in read_records(data)]
    draw([(r.id, r.drawing_text, [file]) for r, file in files])
    return files


def clip_scores(data: Path, out: Path, draw, args, device) -> dict:
    """DATA: records with captions. Both variants, by name."""
    drawn = draw_records(data, out, draw)
    clip = Clip(args.clip or "openai/clip-vit-base-patch32", device)
    cosines = {"plain": [], "prefix": []}
    for record, file in tqdm(drawn, desc="CLIP"):
        texts = clip.texts([record.drawing_text, f"A photo depicts {record.drawing_text}"])
        plain, prefix = (texts @ clip.images([Image.open(file).convert("RGB")])[0]).tolist()
        cosines["plain"].append(plain), cosines["prefix"].append(prefix)
    return {"CLIPScore (2.5 max(cos, 0), with prefix)": float(rules.clipscore(cosines["prefix"]).mean()),
            "100 x cosine (no prefix, as in papers)": float(rules.plain_cosine(cosines["plain"]).mean())}


@torch.inference_mode()
def fid(data: Path, out: Path, draw, args, device) -> dict:
    """DATA: records.jsonl, MS-COCO_val2014_fid_stats.npz and pt_inception-2015-12-05-6726825d.pth."""
    theirs = rules.read_fid_statistics(data / "MS-COCO_val2014_fid_stats.npz")
    with torch.device("meta"):
        network = rules.Inception()
    weights = rules.expected(data / "pt_inception-2015-12-05-6726825d.pth", "the Inception weights of pytorch-fid")
    counters = {k: torch.tensor(0) for k in network.state_dict() if k.endswith("num_batches_tracked")}  # may be missing
    fill(network, counters | read_bin(str(weights)), str(weights))
    drawn = draw_records(data / "records.jsonl", out, draw)
    network, features = network.to(device).eval(), []
    for start in tqdm(range(0, len(drawn), 32), desc="Inception"):
        pixels = torch.stack([load_image(file, 299) for _, file in drawn[start : start + 32]])
        features.append(network(pixels.to(device)).double().cpu())
    return {"FID": rules.fid(rules.fid_statistics(torch.cat(features).numpy()), theirs), "images": len(drawn)}


UNDERSTANDING = {"pope": pope, "mme": mme, "vqav2": vqav2, "gqa": gqa, "mmmu": mmmu, "flickr30k": flickr30k}
GENERATION = {"geneval": geneval, "dpg": dpg, "clipscore": clip_scores, "fid": fid}


def run_benchmark(args) -> None:
    """One official benchmark: official files in, prediction files and OUT/metrics.json out."""
    texts = sorted(p for p in args.data.rglob("*") if p.suffix in (".json", ".jsonl", ".csv", ".txt"))  # not the images
    if not claim(args.out, args, "metrics.json", {"data": texts or [args.data]} | model_inputs(args)):
        metrics = read_object(args.out / "metrics.json")
        return print(flat_table(metrics.pop("benchmark"), metrics))
    model, vq = load_from(args)
    if args.benchmark in UNDERSTANDING:
        metrics = UNDERSTANDING[args.benchmark](args.data, args.out, asker(model, vq, args))
    else:
        metrics = GENERATION[args.benchmark](args.data, args.out, drawer(model, vq, args), args, model.device)
    write_file(args.out / "metrics.json", json.dumps({"benchmark": args.benchmark, **metrics}, indent=1) + "\n")
    shutil.rmtree(args.out / "parts", ignore_errors=True)
    print(flat_table(args.benchmark, metrics))


def flat_table(name: str, metrics: dict) -> str:
    """Nested metrics as one Markdown table."""
    def rows(prefix, value):
        if isinstance(value, dict):
            return [row for k, v in value.items() for row in rows(f"{prefix} {k}", v)]
        return [f"| {prefix} | {value:.4f} |" if isinstance(value, float) else f"| {prefix} | {value} |"]

    return "\n".join(["| metric | value |", "|---|---|", *rows(name, metrics)])


# ------------------------------------------------------------------------------------------------------------ report

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1f2937;max-width:1080px;margin:0 auto;padding:16px}
h1{font-size:1.6em}h2{font-size:1.2em;margin-top:2em;border-bottom:1px solid #e5e7eb}
svg{width:100%;max-width:600px;height:auto}.wide{overflow-x:auto}.small{color:#6b7280;font-size:.87em}
table{border-collapse:collapse;font-size:.87em}td,th{padding:4px 10px;border-bottom:1px solid #e5e7eb;text-align:left;
white-space:nowrap}.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(320px,1fr));gap:14px}
.card{border:1px solid #e5e7eb;border-radius:8px;padding:10px;min-width:0;overflow-wrap:anywhere}
.row{display:flex;flex-wrap:wrap;gap:6px}figure{margin:0;flex:1 1 62px;max-width:120px;font-size:.72em}
figure img{width:100%;aspect-ratio:1;object-fit:cover;box-sizing:border-box;border:3px solid #d1d5db}
.right img{border-color:#16a34a}.wrong img{border-color:#dc2626}pre{overflow-x:auto;font-size:.8em}
@media(max-width:480px){.grid{grid-template-columns:1fr}}
"""
COLORS = ("#2563eb", "#ea580c", "#6b7280", "#16a34a", "#9333ea", "#0891b2")


def chart(series: dict[str, list[tuple]], ticks: list[str] | None = None) -> str:
    """Lines as SVG. series: name -> [(x, y) or (x, y, low, high)]; ticks: names of x = 0, 1, 2, …"""
    points = [p for line in series.values() for p in line]
    ys, right = [0.0, *(y for p in points for y in p[1:])], max(p[0] for p in points) or 1
    rough = max(max(ys) - min(ys), 1e-6) / 5
    grid = next(m * 10 ** math.floor(math.log10(rough)) for m in (1, 2, 5, 10)
                if m * 10 ** math.floor(math.log10(rough)) >= rough)
    bottom, top = math.floor(min(ys) / grid) * grid, math.ceil(max(ys) / grid) * grid

    def place(x, y):
        return 40 + 370 * x / right, 216 - 200 * (y - bottom) / (top - bottom)

    parts = ['<svg viewBox="0 0 440 276" role="img">']
    for i in range(round((top - bottom) / grid) + 1):
        value = bottom + i * grid
        y = place(0, value)[1]
        parts.append(f'<path d="M40 {y:.1f}H410" stroke="#e5e7eb"/><text x="34" y="{y + 4:.1f}" font-size="11" '
                     f'text-anchor="end">{value:.3g}</text>')
    names = enumerate(ticks) if ticks else [(0, "0"), (right, f"step {right:g}")]
    parts += [f'<text x="{place(x, 0)[0]:.1f}" y="234" font-size="11" text-anchor="middle">{escape(t)}</text>'
              for x, t in names]
    for i, (name, line) in enumerate(series.items()):
        color, dots = COLORS[i % len(COLORS)], [place(*p[:2]) for p in line]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in dots)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        for (x, y), p in zip(dots, line):
            if len(p) == 4:
                low, high = place(p[0], p[2])[1], place(p[0], p[3])[1]
                parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{color}"/><path '
                             f'd="M{x:.1f} {low:.1f}V{high:.1f}" stroke="{color}" stroke-width="1.5"/>')
        parts.append(f'<text x="{50 + 190 * (i % 2)}" y="{254 + 15 * (i // 2)}" font-size="12" fill="{color}">'
                     f"● {escape(name)}</text>")
    return "".join(parts) + "</svg>"


def html_table(markdown: str) -> str:
    """The Markdown tables of `table` as HTML."""
    lines = [line.strip("|").split("|") for line in markdown.splitlines() if "---" not in line]
    rows = [[escape(c.strip()) for c in line] for line in lines]
    cells = ["".join(f"<{tag}>{c}</{tag}>" for c in row) for tag, row in zip(["th", *["td"] * len(rows)], rows)]
    return '<div class="wide"><table>' + "".join(f"<tr>{c}</tr>" for c in cells) + "</table></div>"


def figure(path: Path, caption: str, kind: str = "") -> str:
    if not path.is_file():
        return ""
    picture = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    picture.thumbnail((256, 256))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return (f'<figure class="{kind}"><img src="data:image/png;base64,{data}" alt="">'
            f"<figcaption>{escape(caption)}</figcaption></figure>")


def drawings(evaluations: dict[str, tuple], shown: int) -> str:
    """Held-out prompts: the real image and every round's drawing, with the judge's verdict."""
    cards, first = [], next(iter(evaluations.values()))[1]
    for i, v in enumerate(first[:shown]):
        figures = [figure(Path(v.image), "real")]
        for name, (folder, verdicts) in evaluations.items():
            right = verdicts[i].gen_right
            figures.append(figure(folder / "images" / f"{v.id}.png", f"{name}: {sum(right)}/{len(right)}",
                                  "right" if verdicts[i].all_right else "wrong"))
        cards.append(f'<div class="card">{escape(v.text)}<div class="row">{"".join(figures)}</div></div>')
    return f'<div class="grid">{"".join(cards)}</div>'


def gallery(folder: Path) -> str:
    """The pairs that have pictures: captions and images, winner and loser, with scores and what was answered wrong."""
    cards = []
    for p in read_jsonl(folder / "pairs.jsonl", Pair):
        if not (folder / "images" / f"{p.id}-real.png").is_file():
            continue
        figures = [figure(folder / "images" / f"{p.id}-{side}.png", text, kind) for side, text, kind in (
            ("real", "real", ""), ("win", f"win {p.win_image_score:.2f}", "right"),
            ("lose", f"lose {p.lose_image_score:.2f}", "wrong"))]
        wrong = [f"<b>{side} got wrong</b>: {escape('; '.join(questions) or 'nothing')}<br>" for side, questions in
                 (("win", p.win_image_wrong), ("lose", p.lose_image_wrong))]
        captions = [f"<b>{side} {s:.2f}</b>: {escape(text)}<br>" for side, s, text in (
            ("win", p.win_caption_score, p.win_caption), ("lose", p.lose_caption_score, p.lose_caption))]
        cards.append(f'<div class="card">{escape(p.caption)}<div class="row">{"".join(figures)}</div>'
                     f'<div class="small">{"".join(captions + wrong)}</div></div>')
    return f'<div class="grid">{"".join(cards)}</div>'


def training(folder: Path) -> str:
    """Curves of one round."""
    log = [parse_json(line, f"{folder}/train.jsonl") for line in read_text(folder / "train.jsonl").splitlines()]
    sets = {"losses": ("loss_und", "loss_gen", "nll_und", "nll_gen"), "accuracy": ("accuracy_und", "accuracy_gen"),
            "log-prob changes": ("win_change_und", "lose_change_und", "win_change_gen", "lose_change_gen")}
    lines = {title: {k: [(r["step"], r[k]) for r in log] for k in keys} for title, keys in sets.items()}
    charts = [f'<div class="card">{title}{chart(series)}</div>' for title, series in lines.items()]
    return f'<div class="grid">{"".join(charts)}</div>'


def report(args) -> None:
    """OUT/report.html, one self-contained page about a run of run_selfplay.sh in folder OUT."""
    rounds = sorted(args.report.glob("round*/train/train.jsonl"), key=lambda p: int(p.parts[-3].removeprefix("round")))
    names = ["base", *(p.parts[-3] for p in rounds)]
    folders = [f for f in (args.report / "eval" / n for n in names) if (f / "answers.jsonl").exists()]
    if not folders or folders[0].name != "base":
        raise InputError(f"{args.report}/eval/base/answers.jsonl: missing; --report wants a run of run_selfplay.sh")
    evaluations = {n: (args.report / "eval" / n, verdicts) for n, verdicts in read_verdicts(folders).items()}
    metrics = {n: evaluate(verdicts) for n, (_, verdicts) in evaluations.items()}
    lines = {m: [(i, *metrics[n][m].values()) for i, n in enumerate(metrics)]
             for m in ("understanding", "generation", "gap", "everything right")}
    first, last = metrics["base"], list(metrics.values())[-1]
    elements = "\n".join(["| | questions | understanding: base | last round | generation: base | last round |"] + [
        f"| {e} | {b['questions']} | {b['understanding']:.3f} | {last['by element'][e]['understanding']:.3f} | "
        f"{b['generation']:.3f} | {last['by element'][e]['generation']:.3f} |" for e, b in first["by element"].items()])
    differences = {n: paired_difference(evaluations["base"][1], v) for n, (_, v) in evaluations.items() if n != "base"}
    files = sorted(args.report.glob("**/settings.json"))
    settings = {str(p.parent.relative_to(args.report)): read_text(p) for p in files}
    parts = [f"<h1>HermesFlow: {escape(args.report.name)}</h1><p class=small>{first['records']} held-out records, "
             f"{first['different texts']} different texts; mean over records, 95 % bootstrap intervals; "
             f"code {revision()}</p>",
             "<h2>Understanding, generation and the gap</h2>", chart(lines, list(metrics)), html_table(table(metrics)),
             "<p>Paired difference to the base:</p>" + html_table(table(differences, "+")) if differences else "",
             "<h2>By what the questions are about</h2>", html_table(elements),
             "<h2>Held-out prompts</h2><p class=small>Green: everything right. Numbers: questions that the judge "
             "answers right about the drawing.</p>", drawings(evaluations, args.show)]
    for log in rounds:
        name, folder = log.parts[-3], log.parent.parent
        parts += [f"<h2>{name}: preference pairs</h2>", gallery(folder / "pairs"), f"<h2>{name}: training</h2>",
                  training(folder / "train")]
    parts += ["<h2>Settings</h2>"] + [f"<details><summary>{escape(n)}</summary><pre>{escape(s)}</pre></details>"
                                      for n, s in settings.items()]
    page = ('<!doctype html><html lang="en"><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<title>HermesFlow: {escape(args.report.name)}</title><style>{STYLE}</style>{"".join(parts)}</html>\n')
    write_file(args.report / "report.html", page)
    print(args.report / "report.html")


def revision() -> str:
    """The code's git revision, with "-dirty" if files were changed."""
    done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True,
                          cwd=Path(__file__).parent)
    return escape(done.stdout.strip()) or "unknown"


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--records", help="held-out records with questions")
    parser.add_argument("--questions", help="the original vqa_data.json, joined to the records by id")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--overwrite", action="store_true", help="empty OUT first")
    parser.add_argument("--compare", type=Path, nargs="+", metavar="OUT", help="compare finished evaluations instead")
    parser.add_argument("--benchmark", choices=[*UNDERSTANDING, *GENERATION], help="instead of --records")
    parser.add_argument("--data", type=Path, help="folder with the benchmark's official files; see the README")
    parser.add_argument("--detector", default="facebook/mask2former-swin-small-coco-instance", help="for geneval")
    parser.add_argument("--clip", help="for geneval [openai/clip-vit-large-patch14], clipscore [-base-patch32]")
    parser.add_argument("--vqa", default="Salesforce/blip-vqa-capfilt-large", help="for dpg")
    parser.add_argument("--report", type=Path, metavar="RUN", help="write report.html about a run of run_selfplay.sh")
    parser.add_argument("--judge", default="toy", help="toy, self, or an image-text-to-text model by id or folder")
    parser.add_argument("--caption-scorer", default="token-f1", help="token-f1, or an encoder: its [CLS] vectors")
    parser.add_argument("--matcher", default="text", help="text, or a sentence encoder that matches answers to choices")
    parser.add_argument("--n", type=int, help="only the first N records")
    add_drawing_arguments(parser)
    parser.add_argument("--max-new-tokens", type=int, default=20, help="per answer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=4, help="records at a time; does not change results")
    parser.add_argument("--show", type=int, default=12, help="records in the picture")
    args = parser.parse_args()
    if not (args.report or (args.out and (args.records or args.compare or (args.benchmark and args.data)))):
        parser.error("--report, or --out with --records, --compare, or --benchmark and --data, is needed")
    return args


def main():
    args = parse_args()
    if args.report:
        report(args)
    elif args.compare:
        compare(args)
    elif args.benchmark:
        run_benchmark(args)
    else:
        evaluate_checkpoint(args)


if __name__ == "__main__":
    run(main)
