"""Stage 4, evaluation: understanding, generation and the gap between them, on held-out records.

reads   records with questions, and a checkpoint
writes  OUT/answers.jsonl   per record: the caption, all answers about the real image (the model's)
                            and about the drawn image (the judge's), and which of them are right
        OUT/metrics.json    understanding, caption score, generation, everything right, gap; each
                            with a bootstrap 95 % interval (evals/metrics.py)
        OUT/images          the first drawings, for people

    python 04_eval.py --records runs/toy/held_out/records.jsonl --out runs/try/eval
    python 04_eval.py --compare runs/toy/eval/base runs/toy/eval/round1 --out runs/try/compare
    python 04_eval.py --report runs/toy                             # report.html of a run
    python 04_eval.py --benchmark pope --data POPE --model toy/base --out runs/pope

understanding   accuracy of the model's answers about the real image
generation      accuracy of a judge's answers about one drawn image (the paper's judge: GPT-4o)
gap             understanding − generation

Benchmarks are in evals/, one file each, which names its official files. Those of generation score
the images that are in OUT/images and draw only those that are missing, so images of another model
can be put there.
"""

from pathlib import Path

from hermesflow.options import (add_model_options, add_sampling_options, model_inputs,
                                require_positive, sampling_from, stage_parser)

# file names in evals/
UNDERSTANDING = ("pope", "mme", "vqav2", "gqa", "mmmu", "flickr30k")
GENERATION = ("geneval", "dpg", "clipscore", "fid", "tifa")


def parse_args(argv=None):
    parser = stage_parser(__doc__)
    add = parser.add_argument_group("what to evaluate").add_argument
    add("--records", help="held-out records with questions")
    add("--questions", help="the original vqa_data.json, joined to the records by id")
    add("--n", type=int, help="only the first N records")
    add("--out", type=Path, help="folder for the results")
    add("--overwrite", action="store_true", help="empty OUT first")
    add_model_options(parser)
    add = parser.add_argument_group("judging").add_argument
    add("--judge", default="toy",
        help="of drawn images: toy (the toy world's exact oracle), self (the model), or a "
             "transformers image-text-to-text or VQA model by id or folder")
    add("--caption-scorer", default="token-f1", help="token-f1, or an encoder: its [CLS] vectors")
    add("--matcher", default="text",
        help="text, or a sentence encoder that matches answers to choices")
    add_sampling_options(parser)
    add = parser.add_argument_group("benchmarks").add_argument
    add("--benchmark", choices=[*UNDERSTANDING, *GENERATION], help="instead of --records")
    add("--data", type=Path, help="folder with the benchmark's official files")
    add("--detector", default="facebook/mask2former-swin-small-coco-instance", help="for geneval")
    add("--clip", help="for geneval [openai/clip-vit-large-patch14] and "
                       "clipscore [openai/clip-vit-base-patch32]")
    add("--vqa", default="Salesforce/blip-vqa-capfilt-large", help="for dpg")
    add = parser.add_argument_group("compare and report").add_argument
    add("--compare", type=Path, nargs="+", metavar="OUT", help="compare finished evaluations")
    add("--report", type=Path, metavar="RUN",
        help="write RUN/report.html about a run of run_selfplay.sh")
    add("--show", type=int, default=12, help="records in the pictures")
    add = parser.add_argument_group("run").add_argument
    add("--max-new-tokens", type=int, default=20, help="per answer")
    add("--seed", type=int, default=0, help="of the drawn images")
    add("--batch", type=int, default=4, help="records at a time; does not change results")
    args = parser.parse_args(argv)
    subject = args.records or args.compare or (args.benchmark and args.data)
    if not (args.report or (args.out and subject)):
        parser.error("--report, or --out with --records, --compare, or --benchmark and --data, "
                     "is needed")
    if args.benchmark == "tifa" and args.judge == "toy":
        parser.error("--benchmark tifa needs another --judge: toy answers about toy images alone")
    require_positive(parser, args, "steps", "batch", "n", "max_new_tokens")
    return args


if __name__ == "__main__":
    ARGS = parse_args()  # before the heavy imports, so that --help answers at once

import json
import shutil
from dataclasses import asdict
from importlib import import_module

import torch

from evals.compare import compare
from evals.judges import ModelNames, load_judge
from evals.metrics import EvalRecord, evaluate, flat_table, table
from evals.policy import asker, drawer
from evals.report import report
from hermesflow.files import InputError, read_object, write_text
from hermesflow.pictures import record_image, save_picture, to_pil
from hermesflow.records import (CAPTION_QUESTION, Record, parse_record, read_records,
                                write_jsonl)
from hermesflow.runs import map_records, prepare_output, run_main, say
from hermesflow.sampling import ImageSampling, TextRequest, stable_seed
from hermesflow.scoring import answer_matcher, answer_questions, caption_scorer, is_correct
from model import Model, load_from

# ----------------------------------------------------------------------------------- gap protocol


def read_held_out(path, questions, n: int | None) -> list[Record]:
    """The first n records. Raises InputError if one has no questions."""
    records = read_records(path, questions)[:n]
    for r in records:
        if not r.questions:
            message = "field 'questions' is empty; evaluation needs questions"
            raise InputError(f"{path}: id {r.id!r}: {message}")
    return records


def evaluator(model: Model, judge, score_captions, match, sampling: ImageSampling, seed: int,
              max_new_tokens: int):
    """A function of a few records: one caption, one drawing and all answers about each of them.

    score_captions(captions, truth) -> scores; match(answer, choices) -> the choice that it means.
    """

    def evaluate_chunk(records: list[Record]) -> list[dict]:
        # understanding: the model about the real image
        pixels = torch.stack([record_image(model, r) for r in records])
        real = model.encode_image(pixels)  # (B, N)
        requests = [TextRequest(i, CAPTION_QUESTION) for i in range(len(records))]
        captions = [model.decode_text(text.ids) for text in model.generate_text(real, requests)]
        answers = answer_questions(model, real, [r.questions for r in records], max_new_tokens)

        # generation: the judge about one drawn image
        seeds = [stable_seed(seed, "eval", r.id) for r in records]
        drawn = model.generate_images([r.drawing_text for r in records], seeds, sampling)  # (B, N)
        pictures = to_pil(model.decode_image(drawn))

        results = []
        for i, r in enumerate(records):
            gen_answers = judge.answer(pictures[i], r.questions)
            gen_correct = judge.is_correct(gen_answers, r.questions)
            result = EvalRecord(
                id=r.id,
                image=r.image,
                text=r.drawing_text,
                questions=r.questions,
                caption=captions[i],
                caption_score=score_captions([captions[i]], r.caption)[0],
                und_answers=answers[i],
                und_right=is_correct(answers[i], r.questions, match),
                gen_answers=gen_answers,
                gen_right=gen_correct,
                all_right=judge.all_correct(pictures[i], r, gen_correct),
                codes=drawn[i].tolist(),
            )
            results.append(asdict(result))
        return results

    return evaluate_chunk


def save_evaluation(model: Model, results: list[dict], out: Path, show: int) -> dict:
    """OUT/images and OUT/answers.jsonl; returns the metrics."""
    records = [parse_record(EvalRecord, r, f"{out}: id {r['id']!r}") for r in results]
    shown = records[:show]
    if shown:
        codes = torch.tensor([r.codes for r in shown])  # (B, N)
        for record, picture in zip(shown, to_pil(model.decode_image(codes))):
            save_picture(picture, out / "images" / f"{record.id}.png")
    write_jsonl(out / "answers.jsonl", records)
    return evaluate(records)


# -------------------------------------------------------------------------------------- benchmarks


def text_files(data: Path) -> list[Path]:
    """The official files of a benchmark without its images; a missing or other path as it is."""
    files = [p for p in data.rglob("*") if p.suffix in (".json", ".jsonl", ".csv", ".txt")]
    return sorted(files) or [data]


# -------------------------------------------------------------------------------------------- main


def print_table(out: Path) -> None:
    """The metrics of a finished evaluation."""
    metrics = read_object(out / "metrics.json")
    if "benchmark" in metrics:
        say(flat_table(metrics.pop("benchmark"), metrics))
    else:
        say(table({out.name: metrics}))


def main(args):
    if args.report:
        return report(args.report, args.show)
    if args.compare:
        return compare(args.compare, args.out, args.show)

    if args.benchmark:
        inputs = {"data": text_files(args.data)}
        subject = f"benchmark {args.benchmark} of {args.data}"
    else:
        records = read_held_out(args.records, args.questions, args.n)
        inputs = {"records": args.records, "questions": args.questions,
                  "images": [r.image for r in records]}
        subject = f"{len(records)} records of {args.records}, judge {args.judge}"
    inputs |= model_inputs(args)
    if not prepare_output(args.out, vars(args), "metrics.json", inputs):
        return print_table(args.out)
    say(f"evaluating {args.model} on {subject}")
    model = load_from(args)
    sampling = sampling_from(args)

    if args.benchmark in UNDERSTANDING:
        benchmark = import_module(f"evals.{args.benchmark}")
        # captions are longer than answers
        max_new_tokens = getattr(benchmark, "MAX_NEW_TOKENS", args.max_new_tokens)
        ask = asker(model, args.out, args.batch, args.benchmark, max_new_tokens)
        metrics = {"benchmark": args.benchmark, **benchmark.run(args.data, args.out, ask)}
    elif args.benchmark in GENERATION:
        benchmark = import_module(f"evals.{args.benchmark}")
        draw = drawer(model, args.out, args.batch, args.benchmark, args.seed, sampling)
        if args.benchmark == "tifa":
            match = answer_matcher(args.matcher, model.device)
            judge = load_judge(args.judge, model, match, args.max_new_tokens)
            scores = benchmark.run(args.data, args.out, draw, judge, match)
        else:
            names = ModelNames(args.detector, args.clip, args.vqa)
            scores = benchmark.run(args.data, args.out, draw, model.device, names)
        metrics = {"benchmark": args.benchmark, **scores}
    else:
        score_captions = caption_scorer(args.caption_scorer, model.device)
        match = answer_matcher(args.matcher, model.device)
        judge = load_judge(args.judge, model, match, args.max_new_tokens)
        evaluate_chunk = evaluator(model, judge, score_captions, match, sampling, args.seed,
                                   args.max_new_tokens)
        results = map_records(evaluate_chunk, records, args.out, args.batch, "evaluate",
                              length=lambda r: model.prompt_length(r.drawing_text))
        if results is None:
            return  # the main process writes
        metrics = save_evaluation(model, results, args.out, args.show)

    # last: its presence says that the stage is complete
    write_text(args.out / "metrics.json", json.dumps(metrics, indent=1) + "\n")
    shutil.rmtree(args.out / "parts", ignore_errors=True)
    print_table(args.out)


if __name__ == "__main__":
    run_main(lambda: main(ARGS))
