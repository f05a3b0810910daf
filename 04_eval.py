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
import base64
import io
import json
import shutil
import subprocess
from dataclasses import dataclass
from html import escape
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import (MODEL_FOR_VISUAL_QUESTION_ANSWERING_MAPPING, AutoConfig, AutoModelForImageTextToText,
                          AutoModelForVisualQuestionAnswering, AutoProcessor)

from model import (CAPTION_QUESTION, Ask, InputError, Pair, Question, Record, add_model_arguments, atomic, claim, draw_images,
                   load_from, load_image, map_records, parse_json, parse_record, read_jsonl, read_records, read_text,
                   run, save_picture, seed_of, sheet, to_pil, write_jsonl, write_text)

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
    """Any transformers image-text-to-text model (by chat) or VQA model (by question); nearest choice, as the policy's."""

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
        return self.processor.decode(self.model.generate(**inputs, max_new_tokens=20)[0], skip_special_tokens=True).strip()


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
            elements.setdefault(q.element or "other", []).append((und, gen))
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
            gen_right = judge.right(judged, r.questions)
            results.append(vars(Verdict(
                r.id, r.image, r.drawing_text, [vars(q) for q in r.questions], caption,
                similarity([caption], r.caption)[0], said,
                scoring.answered_right(said, r.questions, match),
                judged, gen_right, judge.all_right(picture, r, gen_right), drawn)))
        return results

    results = map_records(examine, records, args.out, args.batch, "evaluate")
    if results is None:
        return
    verdicts = [parse_record(Verdict, v, f"{args.out}: id {v['id']!r}") for v in results]
    with torch.inference_mode():
        pictures = to_pil(vq.decode(torch.tensor([v.codes for v in verdicts[: args.show]], device=model.device)))
    for v, picture in zip(verdicts, pictures):
        save_picture(picture, args.out / "images" / f"{v.id}.png")
    write_jsonl(args.out / "answers.jsonl", verdicts)
    metrics = evaluate(verdicts)
    with atomic(args.out / "metrics.json") as temporary:
        temporary.write_text(json.dumps(metrics, indent=1) + "\n")
    shutil.rmtree(args.out / "parts")
    print(table({args.out.name: metrics}))


def compare(args) -> None:
    """Table, paired differences and picture of evaluations of the same records: real image, then the drawings."""
    runs = {folder.name: read_jsonl(folder / "answers.jsonl", Verdict) for folder in args.compare}
    name, first = next(iter(runs.items()))
    for other, verdicts in runs.items():
        if [v.id for v in verdicts] != [v.id for v in first]:
            raise InputError(f"{other}/answers.jsonl: other records than {name}/answers.jsonl")
    text = f"{len(first)} records, {len({v.text for v in first})} different texts; mean over records [95 % interval]\n\n"
    text += table({n: evaluate(verdicts) for n, verdicts in runs.items()})
    if len(runs) > 1:
        text += f"\n\nPaired difference to {name}:\n\n" + table(
            {n: paired_difference(first, verdicts) for n, verdicts in list(runs.items())[1:]}, "+")
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
    save_picture(sheet(rows, labels, 96, columns=3), args.out / "comparison.png")
    print(text)
    print(f"\n{args.out / 'table.md'}; {args.out / 'comparison.png'}: the real image, then {', '.join(runs)}; "
          "green frame: everything right")


# ------------------------------------------------------------------------------------------------------------ report

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1f2937;max-width:1080px;margin:0 auto;padding:16px}
h1{font-size:1.6em}h2{font-size:1.2em;margin-top:2em;border-bottom:1px solid #e5e7eb}
svg{width:100%;max-width:640px;height:auto}.wide{overflow-x:auto}.small{color:#6b7280;font-size:.87em}
table{border-collapse:collapse;font-size:.87em}td,th{padding:4px 10px;border-bottom:1px solid #e5e7eb;text-align:left;
white-space:nowrap}.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(320px,1fr));gap:14px}
.card{border:1px solid #e5e7eb;border-radius:8px;padding:10px;min-width:0;overflow-wrap:anywhere}
.row{display:flex;flex-wrap:wrap;gap:6px}figure{margin:0;width:88px;font-size:.75em}
figure img{width:88px;height:88px;object-fit:cover;box-sizing:border-box;border:3px solid #d1d5db}
.right img{border-color:#16a34a}.wrong img{border-color:#dc2626}pre{overflow-x:auto;font-size:.8em}
@media(max-width:480px){.grid{grid-template-columns:1fr}}
"""
COLORS = ("#2563eb", "#ea580c", "#6b7280", "#16a34a", "#9333ea", "#0891b2")


def chart(series: dict[str, list[tuple]], ticks: list[str] | None = None) -> str:
    """Lines as SVG. series: name -> [(x, y) or (x, y, low, high)]; ticks: names of x = 0, 1, 2, …"""
    points = [p for line in series.values() for p in line]
    ys, right = [y for p in points for y in p[1:]], max(p[0] for p in points) or 1
    bottom, top = min(0.0, *ys), max(*ys, min(0.0, *ys) + 1e-9)

    def place(x, y):
        return 46 + 570 * x / right, 216 - 190 * (y - bottom) / (top - bottom)

    parts = ['<svg viewBox="0 0 640 262" role="img">']
    for i in range(5):
        value = bottom + (top - bottom) * i / 4
        y = place(0, value)[1]
        parts.append(f'<path d="M46 {y:.1f}H616" stroke="#e5e7eb"/><text x="40" y="{y + 4:.1f}" font-size="11" '
                     f'text-anchor="end">{value:.2f}</text>')
    names = enumerate(ticks) if ticks else [(0, "0"), (right, f"step {right:g}")]
    parts += [f'<text x="{place(x, 0)[0]:.1f}" y="234" font-size="11" text-anchor="middle">{escape(t)}</text>' for x, t in names]
    for i, (name, line) in enumerate(series.items()):
        color, dots = COLORS[i % len(COLORS)], [place(*p[:2]) for p in line]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in dots)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        for (x, y), p in zip(dots, line):
            if len(p) == 4:
                low, high = place(p[0], p[2])[1], place(p[0], p[3])[1]
                parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{color}"/><path '
                             f'd="M{x:.1f} {low:.1f}V{high:.1f}" stroke="{color}" stroke-width="1.5"/>')
        parts.append(f'<text x="{50 + 148 * (i % 4)}" y="{248 + 12 * (i // 4)}" font-size="11" fill="{color}">● {escape(name)}</text>')
    return "".join(parts) + "</svg>"


def html_table(markdown: str) -> str:
    """The Markdown tables of `table` as HTML."""
    rows = [[escape(c.strip()) for c in line.strip("|").split("|")] for line in markdown.splitlines() if "---" not in line]
    cells = ["".join(f"<{tag}>{c}</{tag}>" for c in row) for tag, row in zip(["th", *["td"] * len(rows)], rows)]
    return '<div class="wide"><table>' + "".join(f"<tr>{c}</tr>" for c in cells) + "</table></div>"


def figure(path: Path, caption: str, kind: str = "") -> str:
    if not path.is_file():
        return ""
    picture = Image.open(path).convert("RGB")
    picture.thumbnail((256, 256))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<figure class="{kind}"><img src="data:image/png;base64,{data}" alt=""><figcaption>{escape(caption)}</figcaption></figure>'


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
        cards.append(f'<div class="card">{escape(p.caption)}<div class="row">{"".join(figures)}</div><div class="small">'
                     f"<b>win {p.win_caption_score:.2f}</b>: {escape(p.win_caption)}<br><b>lose {p.lose_caption_score:.2f}</b>: "
                     f'{escape(p.lose_caption)}<br>{"".join(wrong)}</div></div>')
    return f'<div class="grid">{"".join(cards)}</div>'


def training(folder: Path) -> str:
    """Curves of one round."""
    log = [parse_json(line, f"{folder}/train.jsonl") for line in read_text(folder / "train.jsonl").splitlines()]
    sets = {"losses": ("loss_und", "loss_gen", "nll_und", "nll_gen"), "accuracy": ("accuracy_und", "accuracy_gen"),
            "log-prob changes": ("win_change_und", "lose_change_und", "win_change_gen", "lose_change_gen")}
    charts = [f"<div>{title}{chart({k: [(r['step'], r[k]) for r in log] for k in keys})}</div>" for title, keys in sets.items()]
    return f'<div class="grid">{"".join(charts)}</div>'


def report(args) -> None:
    """OUT/report.html, one self-contained page about a run of run_selfplay.sh in folder OUT."""
    rounds = sorted(args.report.glob("round*/train/train.jsonl"), key=lambda p: int(p.parts[-3].removeprefix("round")))
    names = ["base", *(p.parts[-3] for p in rounds)]
    evaluations = {n: (args.report / "eval" / n, read_jsonl(args.report / "eval" / n / "answers.jsonl", Verdict))
                   for n in names if (args.report / "eval" / n / "answers.jsonl").exists()}
    if "base" not in evaluations:
        raise InputError(f"{args.report}/eval/base/answers.jsonl: missing; --report wants the folder of run_selfplay.sh")
    metrics = {n: evaluate(verdicts) for n, (_, verdicts) in evaluations.items()}
    lines = {m: [(i, *metrics[n][m].values()) for i, n in enumerate(metrics)]
             for m in ("understanding", "generation", "gap", "everything right")}
    first, last = metrics["base"], list(metrics.values())[-1]
    elements = "\n".join(["| | questions | understanding: base | last round | generation: base | last round |"] + [
        f"| {e} | {b['questions']} | {b['understanding']:.3f} | {last['by element'][e]['understanding']:.3f} | "
        f"{b['generation']:.3f} | {last['by element'][e]['generation']:.3f} |" for e, b in first["by element"].items()])
    differences = {n: paired_difference(evaluations["base"][1], v) for n, (_, v) in evaluations.items() if n != "base"}
    settings = {str(p.parent.relative_to(args.report)): read_text(p) for p in sorted(args.report.glob("**/settings.json"))}
    parts = [f"<h1>HermesFlow: {escape(args.report.name)}</h1><p class=small>{first['records']} held-out records, "
             f"{first['different texts']} different texts; mean over records, 95 % bootstrap intervals; code {revision()}</p>",
             "<h2>Understanding, generation and the gap</h2>", chart(lines, list(metrics)), html_table(table(metrics)),
             "<p>Paired difference to the base:</p>" + html_table(table(differences, "+")) if differences else "",
             "<h2>By what the questions are about</h2>", html_table(elements),
             "<h2>Held-out prompts</h2><p class=small>Green: everything right. Numbers: questions that the judge answers "
             "right about the drawing.</p>", drawings(evaluations, args.show)]
    for log in rounds:
        name, folder = log.parts[-3], log.parent.parent
        parts += [f"<h2>{name}: preference pairs</h2>", gallery(folder / "pairs"), f"<h2>{name}: training</h2>",
                  training(folder / "train")]
    parts += ["<h2>Settings</h2>"] + [f"<details><summary>{escape(n)}</summary><pre>{escape(s)}</pre></details>"
                                      for n, s in settings.items()]
    page = (f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, '
            f'initial-scale=1"><title>HermesFlow: {escape(args.report.name)}</title><style>{STYLE}</style>{"".join(parts)}</html>\n')
    with atomic(args.report / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")
    print(args.report / "report.html")


def revision() -> str:
    """The code's git revision, with "-dirty" if files were changed."""
    done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return escape(done.stdout.strip()) or "unknown"


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--records", help="held-out records with questions")
    parser.add_argument("--questions", help="the original vqa_data.json, joined to the records by id")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--overwrite", action="store_true", help="empty OUT first")
    parser.add_argument("--compare", type=Path, nargs="+", metavar="OUT", help="compare finished evaluations instead")
    parser.add_argument("--report", type=Path, metavar="RUN", help="write RUN/report.html about a run of run_selfplay.sh")
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
    if not (args.report or (args.out and (args.records or args.compare))):
        parser.error("--report, or --out with --records or --compare, is needed")
    return args


def main():
    args = parse_args()
    (report if args.report else compare if args.compare else evaluate_checkpoint)(args)


if __name__ == "__main__":
    run(main)
