"""Stage 4, evaluation: understanding, generation and the gap between them, on held-out records.

reads   records with questions, and a checkpoint
writes  OUT/answers.jsonl   per record: the caption, all answers about the real image (the model's)
                            and about the drawn image (the judge's), and which of them are right;
                            the drawings' codes (N,) are in OUT/answers-00000.safetensors, …
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

import os
from functools import cache
from pathlib import Path

from evals.benchmarks import (CLIP, COMPARED, GENERATION, UNDERSTANDING, VQA, check_subject,
                              deciding, judging_models, note_scored_images, scored_images)
from evals.metrics import EvalRecord, evaluate, finished_table
from evals.official import files_below
from hermesflow.contents import ROOT
from hermesflow.datasets import source_of
from hermesflow.files import InputError
from hermesflow.inputs import read_records, record_items, those_with_questions, unread_questions
from hermesflow.options import (COUNT, SEED, add_dry_run, add_model_options, add_record_options,
                                add_sampling_options, folder, integer, model_inputs, part_of,
                                sampling_from, stage_parser, unless_dry_run)
from hermesflow.outputs import Output, complete, finish, run_main
from hermesflow.records import CAPTION_QUESTION, Record, about, parse_record


def parse_args(argv=None):
    parser = stage_parser(__doc__)
    group = parser.add_argument_group("what to evaluate: held-out records with questions")
    add_record_options(group)
    add = group.add_argument
    add("--out", type=folder, help="folder for the results")
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
    add("--data", type=folder, help="folder with the benchmark's official files")
    add("--detector", default="facebook/mask2former-swin-small-coco-instance", help="for geneval")
    add("--clip", help=f"for {', '.join(CLIP)} [what each is defined with]")
    add("--vqa", help=f"for {', '.join(VQA)} [what each is defined with]")
    add = parser.add_argument_group("compare and report").add_argument
    add("--compare", type=folder, nargs="+", metavar="OUT", help="compare finished evaluations")
    add("--across", type=lambda text: text.replace("-", "_"), nargs="+", default=[],
        choices=COMPARED, metavar="NAME",
        help=f"settings in which they may differ: {', '.join(COMPARED)}")
    add("--report", type=folder, metavar="RUN", help="of run_selfplay.sh: write RUN/report.html")
    add("--show", type=integer(0), default=12, help="records in the pictures")
    add = parser.add_argument_group("run").add_argument
    add("--max-new-tokens", type=COUNT, default=20, help="per answer")
    add("--seed", type=SEED, default=0, help="of the drawn images")
    add("--batch", type=COUNT, default=4, help="records at a time; does not change results")
    add_dry_run(parser)
    args = parser.parse_args(argv)
    check_subject(parser, args)
    args.clip = args.clip or CLIP.get(args.benchmark)
    args.vqa = args.vqa or VQA.get(args.benchmark)
    for name in ("model", "judge", "caption_scorer", "matcher", "detector", "clip", "vqa"):
        if getattr(args, name) is not None and not getattr(args, name).strip():
            parser.error(f"--{name.replace('_', '-')} is empty")
    return unless_dry_run(args, **model_inputs(args), **judging_models(args.benchmark, vars(args)))


def output_of(args, writes=("answers.jsonl", "images")) -> Output:
    """What decides the results."""
    options = {**vars(args), "images": scored_images(args.benchmark, args.out)}
    inputs = {**model_inputs(args), **judging_models(args.benchmark, options)}
    code = [__file__]
    if args.benchmark:
        inputs["data"] = lambda: files_below(args.data)
        code.append(str(ROOT / "evals" / f"{args.benchmark}.py"))
    else:
        source_of(args.records)  # a mistake is said at once
        inputs["records"] = lambda: record_items(args.records, args.questions, **part_of(args))
    derived = ("images",) if args.benchmark else ("show",)
    free = options.keys() - deciding(args.benchmark) - set(derived)
    return Output(args.out, "04_eval", "metrics.json", (*writes, "metrics.json"), options,
                  tuple(free), derived, inputs, tuple(code))


def exit_if_complete(args) -> None:
    if not (args.report or args.compare) and complete(output_of(args)):
        if os.environ.get("RANK", "0") == "0":
            print(finished_table(args.out))
        raise SystemExit


# before the heavy imports, so that --help, a mistake and a complete output are answered at once
if __name__ == "__main__":
    ARGS = parse_args()
    run_main(lambda: exit_if_complete(ARGS))

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib import import_module
from itertools import islice

import torch

from evals.compare import compare
from evals.judges import ModelNames, load_judge
from evals.policy import asker, drawer
from evals.report import report
from hermesflow.files import write_text
from hermesflow.pictures import record_image, save_picture, to_pil
from hermesflow.runs import Earlier, Results, map_records, prepare_output, say
from hermesflow.sampling import ImageSampling, TextRequest, stable_seed
from hermesflow.scoring import answer_matcher, answer_questions, caption_scorer, are_right, meanings
from hermesflow.tables import tensors_of, write_table
from model import Model, load_from

# ----------------------------------------------------------------------------------- gap protocol


def evaluator(model: Model, load_tools, sampling: ImageSampling, seed: int, max_new_tokens: int):
    """A function of a few records: one caption, one drawing and all answers about each of them.

    load_tools() -> score_captions(captions, truth) -> scores; match(answer, choices) -> choice;
    the judge.
    """

    def evaluate_chunk(records: list[Record]) -> list[dict]:
        score_captions, match, judge = load_tools()

        # understanding: the model about the real image
        pixels = torch.stack([record_image(model, r) for r in records])
        real = model.looked_at([r.image for r in records], model.encode_image(pixels))
        requests = [TextRequest(i, CAPTION_QUESTION) for i in range(len(records))]
        captions = [model.decode_text(text.ids) for text in model.generate_text(real, requests)]
        answers = answer_questions(model, real, [r.questions for r in records], max_new_tokens)

        # generation: the judge about one drawn image
        seeds = [stable_seed(seed, "eval", r.id) for r in records]
        drawn = model.generate_images([r.drawing_text for r in records], seeds, sampling)  # (B, N)
        pictures = to_pil(model.decode_image(drawn))

        results = []
        for i, r in enumerate(records):
            with about(f"id {r.id!r}"):
                caption_score = score_captions([captions[i]], r.caption)[0]
                if not math.isfinite(caption_score):
                    raise InputError(f"the score of its caption is {caption_score}")
                und_matched = meanings(answers[i], r.questions, match)
                gen_answers = judge.answer(pictures[i], r.questions)
                gen_matched = judge.meanings(gen_answers, r.questions)
            gen_right = are_right(gen_matched, r.questions)
            record = EvalRecord(
                id=r.id,
                image=r.image,
                text=r.drawing_text,
                questions=r.questions,
                caption=captions[i],
                caption_score=caption_score,
                und_answers=answers[i],
                und_matched=und_matched,
                und_right=are_right(und_matched, r.questions),
                gen_answers=gen_answers,
                gen_matched=gen_matched,
                gen_right=gen_right,
                all_right=judge.all_correct(pictures[i], r, gen_right),
            )
            results.append({**asdict(record), "codes": drawn[i].tolist()})
        return results

    return evaluate_chunk


def as_result(record: EvalRecord) -> dict:
    """A line of answers.jsonl as `evaluate_chunk` returned it."""
    return {**asdict(record), "image": str(record.image),
            "codes": tensors_of(record)["codes"].tolist()}


def evaluated(records: Sequence[Record], results: Results) -> Iterator[tuple[EvalRecord, dict]]:
    """Every record with its answers, and the codes of its drawing."""
    for r, result in zip(records, results):
        record = parse_record(EvalRecord, result, f"id {r.id!r}")
        record.image = r.image  # as it stands in the records' file
        yield record, {"codes": torch.tensor(result["codes"])}  # (N,)


def save_evaluation(model: Model, records: Sequence[Record], results: Results, out: Path,
                    show: int) -> dict:
    """OUT/images and OUT/answers.jsonl; returns the metrics."""
    shown = islice(evaluated(records, results), show)
    while some := list(islice(shown, 16)):
        codes = torch.stack([tensors["codes"] for _, tensors in some])  # (B, N)
        for (record, _), picture in zip(some, to_pil(model.decode_image(codes))):
            save_picture(picture, out / "images" / f"{record.id}.png")
    write_table(out / "answers.jsonl", evaluated(records, results))
    return evaluate(record for record, _ in evaluated(records, results))


# -------------------------------------------------------------------------------------------- main


def read_held_out(args) -> Sequence[Record]:
    """The records that have questions. Raises InputError if none has."""
    bad = []
    records = read_records(args.records, args.questions, bad, **part_of(args))
    asked = those_with_questions(records)
    if not asked:
        raise InputError(f"{args.records}: no record has questions; `python -m "
                         "hermesflow.questions` writes them, for --questions")
    if len(asked) < len(records):
        say(f"left out: {len(records) - len(asked)} records without questions")
    if bad:
        say(f"left out: {len(bad)} bad records or questions; the first: {bad[0]}")
    unread = unread_questions(args.records, records, **part_of(args))
    if unread:
        say(unread)
    return asked


def main(args):
    if args.report:
        return report(args.report, args.show)
    if args.compare:
        return compare(args.compare, args.out, args.show, args.across)

    if args.benchmark:
        benchmark = import_module(f"evals.{args.benchmark}")
        output = output_of(args, writes=benchmark.WRITES)
        subject = f"benchmark {args.benchmark} of {args.data}"
    else:
        records = read_held_out(args)
        output = output_of(args)
        subject = f"{len(records)} records of {args.records}, judge {args.judge}"
    if not prepare_output(output):
        return say(finished_table(args.out))
    say(f"evaluating {args.model} on {subject}")
    model = load_from(args)

    if args.benchmark in UNDERSTANDING:
        # captions are longer than answers
        max_new_tokens = getattr(benchmark, "MAX_NEW_TOKENS", args.max_new_tokens)
        ask = asker(model, args.out, args.batch, args.benchmark, max_new_tokens)
        metrics = {"benchmark": args.benchmark, **benchmark.run(args.data, args.out, ask)}
    elif args.benchmark in GENERATION:
        draw = drawer(model, args.out, args.batch, args.benchmark, args.seed,
                      sampling_from(args))
        if args.benchmark == "tifa":
            match = answer_matcher(args.matcher, model.device)
            judge = load_judge(args.judge, model, match, args.max_new_tokens)
            scores = benchmark.run(args.data, args.out, draw, judge, match)
        else:
            scores = benchmark.run(args.data, args.out, draw, model.device,
                                   ModelNames(args.detector, args.clip, args.vqa))
        metrics = {"benchmark": args.benchmark, **scores}
    else:
        @cache
        def load_tools():  # if there is a record to evaluate
            match = answer_matcher(args.matcher, model.device)
            judge = load_judge(args.judge, model, match, args.max_new_tokens)
            return caption_scorer(args.caption_scorer, model.device), match, judge

        evaluate_chunk = evaluator(model, load_tools, sampling_from(args), args.seed,
                                   args.max_new_tokens)
        results = map_records(evaluate_chunk, records, args.out, args.batch, "evaluate",
                              lambda r: model.prompt_length(r.drawing_text),
                              Earlier(args.out / "answers.jsonl", EvalRecord, as_result))
        if results is None:
            return  # the main process writes
        metrics = save_evaluation(model, records, results, args.out, args.show)

    write_text(args.out / "metrics.json", json.dumps(metrics, indent=1, allow_nan=False) + "\n")
    note_scored_images(output)
    finish(output)
    print(finished_table(args.out))


if __name__ == "__main__":
    run_main(lambda: main(ARGS))
