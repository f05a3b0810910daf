"""Stage 1, sampling: the policy writes n captions of every image, draws K images of every caption.

reads   records (our JSONL, or the original initial_data.json with vqa_data.json) and a checkpoint
writes  OUT/samples.jsonl         the records with the captions as text
        OUT/samples.safetensors   ID/image (N,), ID/images (K, N), ID/captions (n, L; -1 pads):
                                  exactly the tokens that were sampled, to be scored and trained on
        OUT/images, OUT/sheet.png pictures of the first records, for people
        OUT/skipped.txt           why records were left out

    python 01_sample.py --records runs/toy/preference/records.jsonl --out runs/try/samples
    python 01_sample.py --prompt "a big red ring" --steps 16 --guidance 0.5     # OUT/prompt.png
    python 01_sample.py --image runs/toy/held_out/images/eval-0-00000.png       # prints captions
"""

from pathlib import Path

from hermesflow.options import (add_model_options, add_sampling_options, model_inputs,
                                require_positive, sampling_from, stage_parser)

# The released captioning: greedy, then top-k 2, 3, 4 at temperature 0.1, 0.7, 2.0 each.
RELEASED_SETTINGS = [(1, 1.0), (2, 0.1), (2, 0.7), (2, 2.0), (3, 0.1), (3, 0.7), (3, 2.0), (4, 0.1),
                     (4, 0.7), (4, 2.0)]


def decoding_setting(text: str) -> tuple[int, float]:
    """K:T as (top_k, temperature)."""
    top_k, _, temperature = text.partition(":")
    if int(top_k) < 0 or not float(temperature) > 0:
        raise ValueError(text)
    return int(top_k), float(temperature)


def parse_args(argv=None):
    parser = stage_parser(__doc__)
    add = parser.add_argument_group("input and output").add_argument
    add("--records", help="records.jsonl, or the original initial_data.json")
    add("--questions", help="the original vqa_data.json, joined to the records by id")
    add("--out", type=Path, default=Path("runs/try"), help="output folder")
    add("--overwrite", action="store_true", help="empty OUT first")
    add("--strict", action="store_true", help="stop at a bad record instead of skipping it")
    add("--show", type=int, default=8, help="records to write pictures of")
    add = parser.add_argument_group("instead of records").add_argument
    add("--prompt", help="draw this text and stop")
    add("--image", help="caption this file and stop")
    add_model_options(parser)
    add = parser.add_argument_group("captions").add_argument
    add("--captions", type=int, default=10, help="per image")
    add("--caption-settings", type=decoding_setting, nargs="+", metavar="K:T",
        default=RELEASED_SETTINGS,
        help="top-k:temperature, in turn; top-k 1: greedy, 0: all tokens [the ten released]")
    add("--max-new-tokens", type=int, default=100, help="per caption")
    add = parser.add_argument_group("images").add_argument
    add("--images", type=int, default=16, help="per caption")
    add_sampling_options(parser)
    add = parser.add_argument_group("run").add_argument
    add("--round", type=int, default=1, help="self-play round: enters all seeds")
    add("--seed", type=int, default=0, help="enters all seeds")
    add("--batch", type=int, default=4, help="records at a time; does not change results")
    args = parser.parse_args(argv)
    if args.records is None and args.prompt is None and args.image is None:
        parser.error("one of --records, --prompt, --image is needed")
    require_positive(parser, args, "captions", "images", "batch", "max_new_tokens", "steps")
    return args


if __name__ == "__main__":
    ARGS = parse_args()  # before the heavy imports, so that --help answers at once

import shutil
from functools import partial

import torch
from tqdm import tqdm

from hermesflow.files import InputError, save_tensors, write_text
from hermesflow.pictures import image_grid, load_image, record_image, save_picture, to_pil
from hermesflow.records import (CAPTION_QUESTION, Record, Sample, read_records, skipping,
                                write_jsonl)
from hermesflow.runs import map_records, prepare_output, run_main, say
from hermesflow.sampling import ImageSampling, TextRequest, stable_seed
from model import Model, load_from

# ------------------------------------------------------------ the two halves of homologous sampling


def sample_captions(model: Model, images, ids: list[str], count: int, settings: list[tuple],
                    max_new_tokens: int, seed: tuple, progress=iter) -> list[list[list[int]]]:
    """x -> n captions as token ids, for each of B images (B, N).

    Caption k takes decoding setting k (in turn) and its own seed from (seed, round, id, k).
    """
    requests = []
    for i, id in enumerate(ids):
        for k in range(count):
            top_k, temperature = settings[k % len(settings)]
            own_seed = stable_seed(*seed, id, "caption", k)
            requests.append(TextRequest(i, CAPTION_QUESTION, top_k, temperature, own_seed))
    texts = model.generate_text(images, requests, max_new_tokens, progress)
    captions = [text.ids for text in texts]
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


def save_samples(model: Model, records: list[Record], results: list[dict], out: Path) -> None:
    """samples.safetensors, then samples.jsonl, whose presence says that the stage is complete."""
    tensors = {}
    samples = []
    for r, result in zip(records, results):
        captions = result["captions"]
        longest = max(map(len, captions), default=0)
        padded = [ids + [-1] * (longest - len(ids)) for ids in captions]
        tensors[f"{r.id}/image"] = torch.tensor(result["image"], dtype=torch.int32)
        tensors[f"{r.id}/images"] = torch.tensor(result["images"], dtype=torch.int32)
        tensors[f"{r.id}/captions"] = torch.tensor(padded, dtype=torch.int32)
        texts = [model.decode_text(ids) for ids in captions]
        samples.append(Sample(r.id, r.image, r.caption, r.prompt, r.questions, texts))
    save_tensors(out / "samples.safetensors", tensors)
    write_jsonl(out / "samples.jsonl", samples)


def save_pictures(model: Model, records: list[Record], results: list[dict], out: Path) -> None:
    """Real image and drawings of a few records, as files and as one contact sheet."""
    rows = []
    for r, result in zip(records, results):
        drawings = to_pil(model.decode_image(torch.tensor(result["images"])))
        for k, picture in enumerate(drawings):
            save_picture(picture, out / "images" / r.id / f"{k:02d}.png")
        real = to_pil(load_image(r.image, model.image_size)[None])
        rows.append([*real, *drawings])
    if rows:  # not with --show 0
        sheet = image_grid(rows, [r.drawing_text for r in records], 96)
        save_picture(sheet, out / "sheet.png")


def report_skipped(reasons: list[str], out: Path) -> None:
    if reasons:
        file = out / "skipped.txt"
        write_text(file, "\n".join(reasons) + "\n")
        print(f"{len(reasons)} bad records skipped, for reasons in {file}; the first: {reasons[0]}")


# --------------------------------------------------------------------------------------- try by eye


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
    file = out / "prompt.png"
    save_picture(image_grid(rows, [prompt] * len(rows), 160), file)
    print(f"{count} images of {prompt!r}: {file}")


def caption_image(model: Model, file: str, count: int, settings: list[tuple], max_new_tokens: int,
                  seed: tuple) -> None:
    """Print `count` captions of one image file."""
    pixels = load_image(file, model.image_size)[None]
    codes = model.encode_image(pixels)
    tokens = partial(tqdm, desc="caption", unit="token")
    captions = sample_captions(model, codes, ["image"], count, settings, max_new_tokens, seed,
                               progress=tokens)[0]
    for k, ids in enumerate(captions):
        top_k, temperature = settings[k % len(settings)]
        print(f"top-k {top_k:<3} temperature {temperature:<4} {model.decode_text(ids)}")


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
    records = read_records(args.records, args.questions, skipped)
    inputs = {"records": args.records, "questions": args.questions,
              "images": [r.image for r in records], **model_inputs(args)}
    if not prepare_output(args.out, vars(args), "samples.jsonl", inputs):
        return say(f"{args.out / 'samples.jsonl'} is complete")
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
            captions = sample_captions(model, codes, [r.id for r in good], args.captions,
                                       args.caption_settings, args.max_new_tokens, seed)
            images = sample_images(model, good, args.images, sampling, seed)
            for i, r in enumerate(good):
                results.append({"id": r.id, "image": codes[i].tolist(), "captions": captions[i],
                                "images": images[i].tolist()})
        return results

    results = map_records(sample, records, args.out, args.batch, "sample",
                          length=lambda r: model.prompt_length(r.drawing_text))
    if results is None:
        return  # the main process writes
    reasons = (skipped or []) + [r["skipped"] for r in results if "skipped" in r]
    report_skipped(reasons, args.out)
    good = [(r, result) for r, result in zip(records, results) if "skipped" not in result]
    if not good:
        raise InputError(f"{args.records}: no record left; {reasons[0]}")
    records, results = zip(*good)
    save_pictures(model, records[: args.show], results[: args.show], args.out)
    save_samples(model, records, results, args.out)
    shutil.rmtree(args.out / "parts")
    counts = f"{args.captions} captions and {args.images} images each"
    print(f"{len(records)} records, {counts}: {args.out}")


if __name__ == "__main__":
    run_main(lambda: main(ARGS))
