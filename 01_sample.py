"""Stage 1, sampling: the policy writes n captions of every image, draws K images of every caption.

reads   records in any format of hermesflow/datasets.py, questions about them, and a checkpoint
writes  OUT/samples.jsonl         the records with the captions as text; their tensors are in
        OUT/samples-00000.safetensors, …   image (N,), images (K, N), captions (n, L; -1 pads) of
                                  many records each: exactly the tokens that were sampled
        OUT/images, OUT/sheet.png pictures of the first records, for people
        OUT/skipped.txt           why records were left out

    python 01_sample.py --records runs/toy/preference/records.jsonl --out runs/try/samples
    python 01_sample.py --prompt "a big red ring" --steps 16 --guidance 0.5     # OUT/prompt.png
    python 01_sample.py --image runs/toy/held_out/images/test-0-00000.png       # prints captions
"""

import argparse
from pathlib import Path

from hermesflow.datasets import source_of
from hermesflow.hub import require
from hermesflow.inputs import read_records, record_items, unread_questions
from hermesflow.jsonl import lines_of
from hermesflow.options import (COUNT, SEED, add_dry_run, add_model_options, add_record_options,
                                add_sampling_options, folder, integer, model_inputs, number,
                                part_of, sampling_from, stage_parser, unless_dry_run)
from hermesflow.outputs import Output, exit_if_complete, finish, run_main

# The released captioning: greedy, then top-k 2, 3, 4 at temperature 0.1, 0.7, 2.0 each.
RELEASED_SETTINGS = [(1, 1.0), (2, 0.1), (2, 0.7), (2, 2.0), (3, 0.1), (3, 0.7), (3, 2.0), (4, 0.1),
                     (4, 0.7), (4, 2.0)]


def decoding_setting(text: str) -> tuple[int, float]:
    """K:T as (top_k, temperature)."""
    top_k, colon, temperature = text.partition(":")
    if not colon:
        raise argparse.ArgumentTypeError(f"{text!r} should be K:T, such as 50:1.0")
    return integer(0)(top_k), number(0.001, 1000)(temperature)


def parse_args(argv=None):
    parser = stage_parser(__doc__)
    group = parser.add_argument_group("input and output")
    add_record_options(group)
    add = group.add_argument
    add("--out", type=folder, default=Path("runs/try"), help="output folder")
    add("--overwrite", action="store_true", help="empty OUT first")
    add("--strict", action="store_true", help="stop at a bad record instead of skipping it")
    add("--show", type=integer(0), default=8, help="records to write pictures of")
    add = parser.add_argument_group("instead of records").add_argument
    add("--prompt", help="draw this text and stop")
    add("--image", help="caption this file and stop")
    add_model_options(parser)
    add = parser.add_argument_group("captions").add_argument
    add("--captions", type=COUNT, default=10, help="per image")
    add("--caption-settings", type=decoding_setting, nargs="+", metavar="K:T",
        default=RELEASED_SETTINGS,
        help="top-k:temperature, in turn; top-k 1: greedy, 0: all tokens [the ten released]")
    add("--max-new-tokens", type=COUNT, default=100, help="per caption")
    add = parser.add_argument_group("images").add_argument
    add("--images", type=COUNT, default=16, help="per caption")
    add_sampling_options(parser)
    add = parser.add_argument_group("run").add_argument
    add("--round", type=COUNT, default=1, help="self-play round: enters all seeds")
    add("--seed", type=SEED, default=0, help="enters all seeds")
    add("--batch", type=COUNT, default=4, help="records at a time; does not change results")
    add_dry_run(parser)
    args = parser.parse_args(argv)
    if args.records is None and args.prompt is None and args.image is None:
        parser.error("one of --records, --prompt, --image is needed")
    return unless_dry_run(args, **model_inputs(args))


def output_of(args) -> Output:
    """What decides the samples; questions are only passed on."""
    source_of(args.records)  # a mistake is said at once
    inputs = {"records": lambda: record_items(args.records, **part_of(args)), **model_inputs(args)}
    questions = args.questions and (lambda: lines_of(args.questions))
    return Output(args.out, "01_sample", "samples.jsonl",
                  writes=("samples.jsonl", "images", "sheet.png", "skipped.txt"), args=vars(args),
                  inputs=inputs, made_from={"questions": questions}, derived=("show",),
                  free=("image_folder", "skip", "limit", "prompt", "image", "device", "batch",
                        "strict"), code=(__file__,))


# before the heavy imports, so that --help, a mistake and a complete output are answered at once
if __name__ == "__main__":
    ARGS = parse_args()
    if ARGS.records:
        run_main(lambda: exit_if_complete(output_of(ARGS)))
    run_main(lambda: require(*model_inputs(ARGS).values()))

from collections.abc import Sequence
from itertools import chain, count, islice

import torch
from tqdm import tqdm

from hermesflow.files import InputError, write_text
from hermesflow.pictures import image_grid, load_image, record_image, save_picture, to_pil
from hermesflow.records import CAPTION_QUESTION, Record, Sample, skipping
from hermesflow.runs import Earlier, Results, map_records, prepare_output, say
from hermesflow.sampling import Generated, ImageSampling, TextRequest, stable_seed
from hermesflow.tables import tensors_of, write_table
from model import Model, load_from

# ------------------------------------------------------------ the two halves of homologous sampling


def sample_captions(model: Model, images, ids: list[str], count: int, settings: list[tuple],
                    max_new_tokens: int, seed: tuple, progress=iter) -> list[list[Generated]]:
    """x -> n captions, for each of B images (B, N).

    Caption k takes decoding setting k (in turn) and its own seed from (seed, round, id, k).
    """
    requests = []
    for i, id in enumerate(ids):
        for k in range(count):
            top_k, temperature = settings[k % len(settings)]
            own_seed = stable_seed(*seed, id, "caption", k)
            requests.append(TextRequest(i, CAPTION_QUESTION, top_k, temperature, own_seed))
    captions = model.generate_text(images, requests, max_new_tokens, progress)
    return [captions[i : i + count] for i in range(0, len(captions), count)]


def sample_images(model: Model, records: list[Record], count: int, sampling: ImageSampling,
                  seed: tuple) -> torch.Tensor:
    """y -> K images as (B, K, N) codes; image k has its own seed from (seed, round, id, k)."""
    prompts = []
    seeds = []
    for r in records:
        for k in range(count):
            prompts.append(r.drawing_text)
            seeds.append(stable_seed(*seed, r.id, "image", k))
    codes = model.generate_images(prompts, seeds, sampling)  # (B·K, N)
    return codes.view(len(records), count, -1)


# --------------------------------------------------------------------------------- input and output


def as_result(sample: Sample) -> dict:
    """What `main` had sampled for a record, from the finished table."""
    tensors = tensors_of(sample)
    captions = [[t for t in ids if t >= 0] for ids in tensors["captions"].tolist()]
    return {"id": sample.id, "image": tensors["image"].tolist(), "captions": captions,
            "ended": sample.ended, "images": tensors["images"].tolist()}


def sampled(model: Model, records: Sequence[Record], results: Results):
    """Every record that was sampled, and its tensors."""
    for r, result in zip(records, results):
        if "skipped" in result:
            continue
        captions = result["captions"]
        longest = max(map(len, captions))
        padded = [ids + [-1] * (longest - len(ids)) for ids in captions]
        texts = [model.decode_text(ids) for ids in captions]
        ended = result["ended"]
        yield Sample(r.id, r.image, r.caption, r.prompt, r.questions, texts, ended), {
            "image": torch.tensor(result["image"]),  # (N,)
            "images": torch.tensor(result["images"]),  # (K, N)
            "captions": torch.tensor(padded, dtype=torch.long)}  # (n, L)


def save_pictures(model: Model, samples, out: Path) -> None:
    """Real image and drawings of a few samples, as files and as one contact sheet."""
    rows = []
    labels = []
    for sample, tensors in samples:
        drawings = to_pil(model.decode_image(tensors["images"]))
        for k, picture in enumerate(drawings):
            save_picture(picture, out / "images" / sample.id / f"{k:02d}.png")
        real = to_pil(load_image(sample.image, model.image_size)[None])
        rows.append([*real, *drawings])
        labels.append(sample.drawing_text)
    if rows:  # not with --show 0
        save_picture(image_grid(rows, labels, 96), out / "sheet.png")


def report_cut(model: Model, records: Sequence[Record]) -> None:
    cut = [r.id for r in records if model.prompt_length(r.drawing_text) > model.longest_prompt]
    if cut:
        more = ", …" if len(cut) > 5 else ""
        print(f"{len(cut)} texts were cut at {model.longest_prompt} tokens before they were drawn: "
              f"{', '.join(cut[:5])}{more}")


def report_skipped(reasons: list[str], unread: str, out: Path) -> None:
    if reasons:
        file = out / "skipped.txt"
        write_text(file, "\n".join(reasons) + "\n")
        print(f"{len(reasons)} bad records skipped, for reasons in {file}; the first: {reasons[0]}")
    if unread:
        print(unread)


# --------------------------------------------------------------------------------------- try by eye


def unused(path: Path) -> Path:
    """`path`, or with the first number behind its name that no file has."""
    names = (path.with_stem(f"{path.stem}-{n}") for n in count(2))
    return next(p for p in chain([path], names) if not p.exists())


def draw_prompt(model: Model, prompt: str, count: int, sampling: ImageSampling, seed: tuple,
                out: Path) -> None:
    """OUT/prompt.png: `count` images of one prompt, four at a time."""
    pictures = []
    for start in tqdm(range(0, count, 4), desc="draw"):
        some = range(start, min(start + 4, count))
        seeds = [stable_seed(*seed, "prompt", "image", k) for k in some]
        codes = model.generate_images([prompt] * len(seeds), seeds, sampling)
        pictures += to_pil(model.decode_image(codes))
    rows = [pictures[i : i + 8] for i in range(0, count, 8)]
    file = unused(out / "prompt.png")
    save_picture(image_grid(rows, [prompt] * len(rows), 160), file)
    print(f"{count} images of {prompt!r}: {file}")


def caption_image(model: Model, file: str, count: int, settings: list[tuple], max_new_tokens: int,
                  seed: tuple) -> None:
    """Print `count` captions of one image file."""
    codes = model.encode_image(load_image(file, model.image_size)[None])
    captions = sample_captions(
        model, model.looked_at([file], codes), ["image"], count, settings, max_new_tokens, seed,
        progress=lambda steps: tqdm(steps, desc="caption", unit="token"))[0]
    for k, caption in enumerate(captions):
        top_k, temperature = settings[k % len(settings)]
        print(f"top-k {top_k:<3} temperature {temperature:<4} {model.decode_text(caption.ids)}")


# --------------------------------------------------------------------------------------------- main


def main(args):
    seed = (args.seed, args.round)
    sampling = sampling_from(args)
    if args.prompt is not None or args.image is not None:
        model = load_from(args)
        if args.prompt is not None:
            draw_prompt(model, args.prompt, args.images, sampling, seed, args.out)
        if args.image is not None:
            caption_image(model, args.image, args.captions, args.caption_settings,
                          args.max_new_tokens, seed)
        return

    skipped = None if args.strict else []
    records = read_records(args.records, args.questions, skipped, **part_of(args))
    output = output_of(args)
    if not prepare_output(output):
        return
    say(f"round {args.round}: sampling {len(records)} records with {args.model}")
    model = load_from(args)

    def sample(chunk: list[Record]) -> list[dict]:
        good = []
        pixels = []
        results = []
        for r in chunk:
            reasons = None if args.strict else []
            with skipping(reasons):
                pixels.append(record_image(model, r))
                good.append(r)
            results += [{"id": r.id, "skipped": reason} for reason in reasons or []]
        if good:
            codes = model.encode_image(torch.stack(pixels))
            seen = model.looked_at([r.image for r in good], codes)
            captions = sample_captions(model, seen, [r.id for r in good], args.captions,
                                       args.caption_settings, args.max_new_tokens, seed)
            images = sample_images(model, good, args.images, sampling, seed)
            for i, r in enumerate(good):
                ids, ended = zip(*captions[i])
                results.append({"id": r.id, "image": codes[i].tolist(), "captions": ids,
                                "ended": ended, "images": images[i].tolist()})
        return results

    file = args.out / "samples.jsonl"
    earlier = Earlier(file, Sample, as_result)
    results = map_records(sample, records, args.out, args.batch, "sample",
                          length=lambda r: model.prompt_length(r.drawing_text), earlier=earlier)
    if results is None:
        return  # the main process writes
    unusable = {r["id"]: r["skipped"] for r in results if "skipped" in r}
    unread = unread_questions(args.records, records, **part_of(args))
    report_skipped([*(skipped or []), *unusable.values()], unread, args.out)
    if len(unusable) == len(results):
        raise InputError(f"{args.records}: no record left; {next(iter(unusable.values()))}")
    save_pictures(model, islice(sampled(model, records, results), args.show), args.out)
    written = write_table(file, sampled(model, records, results))
    finish(output)
    report_cut(model, records)
    print(f"{written} records, {args.captions} captions and {args.images} images each: {args.out}")
    if not any(r.questions for r in records if r.id not in unusable):
        print("no record has questions: 02_score.py needs them (python -m hermesflow.questions "
              "writes them), or --image-scorer likelihood")


if __name__ == "__main__":
    run_main(lambda: main(ARGS))
