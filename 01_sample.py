"""Stage 1, sampling: the policy writes n captions of every image and draws K images of every caption.

reads   records (our JSONL, or the original initial_data.json with vqa_data.json) and a checkpoint
writes  OUT/samples.jsonl         the records with the captions as text
        OUT/samples.safetensors   `ID/image` (N,), `ID/images` (K, N) and `ID/captions` (n, L; -1 pads) under each id:
                                  exactly the tokens that were sampled, which stages 2 and 3 score and train on
        OUT/images, OUT/sheet.png pictures of the first records, for people

    python 01_sample.py --model toy/base --records runs/toy/preference/records.jsonl --out runs/toy/round1/samples
    python 01_sample.py --model toy/base --prompt "a big red ring"      # try a checkpoint by eye
    python 01_sample.py --model toy/base --image photo.jpg
"""

import argparse
import shutil
from pathlib import Path

import torch

from model import (CAPTION_QUESTION, Ask, InputError, Record, Sample, add_drawing_arguments, add_model_arguments, claim,
                   draw_images, drawing, load_from, load_image, map_records, model_inputs, read_records, run, save_picture,
                   save_tensors, seed_of, sheet, skipping, to_pil, vqa_question, write_file, write_jsonl, write_text)

# The released captioning: greedy, then top-k 2, 3, 4 at temperature 0.1, 0.7, 2.0 each.
RELEASED_SETTINGS = ["1:1.0"] + [f"{k}:{t}" for k in (2, 3, 4) for t in (0.1, 0.7, 2.0)]


def encode_images(model, vq, pictures: list[torch.Tensor]) -> torch.Tensor:
    """(B, N) codes of images as load_image gives them."""
    with torch.inference_mode():
        return vq.encode(torch.stack(pictures).to(model.device))


def read_image(model, vq, record: Record) -> torch.Tensor:
    """The record's image. Raises InputError if it or one of its questions cannot be used."""
    room = model.showo.config.max_position_embeddings - model.tokens.image_tokens - 3
    for q in record.questions:
        if len(model.tokens.ask(vqa_question(q))) > room:
            raise InputError(f"id {record.id!r}: field 'questions': {q.question[:40]!r} does not fit into {room} tokens")
    return load_image(record.image, image_size(model, vq))


def image_size(model, vq) -> int:
    return int(model.tokens.image_tokens**0.5) * vq.downsampling


def sample_captions(model, codes, records: list[Record], args) -> list[list[list[int]]]:
    """n captions per image as token ids; caption k uses setting k (cycling) and its own seed."""
    prompt = model.tokens.ask(CAPTION_QUESTION)
    asks = []
    for i, r in enumerate(records):
        for k in range(args.captions):
            top_k, temperature = args.caption_settings[k % len(args.caption_settings)]
            asks.append(Ask(i, prompt, top_k, temperature, seed_of(args.seed, args.round, r.id, "caption", k)))
    answers = write_text(model, codes, asks, args.max_new_tokens)
    return [answers[i : i + args.captions] for i in range(0, len(answers), args.captions)]


def sample_images(model, records: list[Record], args) -> torch.Tensor:
    """(B, K, N) codes of K drawings per record."""
    K = args.images
    texts = [r.drawing_text for r in records for _ in range(K)]
    seeds = [seed_of(args.seed, args.round, r.id, "image", k) for r in records for k in range(K)]
    codes = draw_images(model, texts, seeds, drawing(args))
    return codes.view(len(records), K, -1)


def save_samples(records, results: list[dict], tokens, out: Path) -> None:
    tensors, samples = {}, []
    for r, found in zip(records, results):
        longest = max(map(len, found["captions"]), default=0)
        tensors[f"{r.id}/image"] = torch.tensor(found["image"], dtype=torch.int32)
        tensors[f"{r.id}/images"] = torch.tensor(found["images"], dtype=torch.int32)
        tensors[f"{r.id}/captions"] = torch.tensor([c + [-1] * (longest - len(c)) for c in found["captions"]],
                                                   dtype=torch.int32)
        captions = [tokens.decode(c) for c in found["captions"]]
        samples.append(Sample(r.id, r.image, r.caption, r.prompt, r.questions, captions))
    save_tensors(out / "samples.safetensors", tensors)
    write_jsonl(out / "samples.jsonl", samples)  # last: its presence says that the stage is complete


def save_pictures(model, vq, records, results, out: Path) -> None:
    """Real image and drawings of a few records, as files and as one contact sheet."""
    rows = []
    for r, found in zip(records, results):
        with torch.inference_mode():
            drawn = to_pil(vq.decode(torch.tensor(found["images"], device=model.device)))
        for k, picture in enumerate(drawn):
            save_picture(picture, out / "images" / r.id / f"{k:02d}.png")
        rows.append([*to_pil(load_image(r.image, image_size(model, vq))[None]), *drawn])
    save_picture(sheet(rows, [r.drawing_text for r in records], 96), out / "sheet.png")


def try_by_eye(model, vq, args) -> None:
    """One prompt or one image from the command line."""
    if args.prompt is not None:
        codes = sample_images(model, [Record("prompt", "", args.prompt)], args)[0]
        with torch.inference_mode():
            pictures = to_pil(vq.decode(codes))
        rows = [pictures[i : i + 8] for i in range(0, len(pictures), 8)]
        save_picture(sheet(rows, [args.prompt] * len(rows), 160), args.out / "prompt.png")
        print(f"{args.images} images of {args.prompt!r}: {args.out / 'prompt.png'}")
    if args.image is not None:
        record = Record("image", args.image, "")
        captions = sample_captions(model, encode_images(model, vq, [read_image(model, vq, record)]), [record], args)[0]
        for k, caption in enumerate(captions):
            top_k, temperature = args.caption_settings[k % len(args.caption_settings)]
            print(f"top-k {top_k:<3} temperature {temperature:<4} {model.tokens.decode(caption)}")


def setting(text: str) -> tuple[int, float]:
    top_k, _, temperature = text.partition(":")
    if int(top_k) < 0 or not float(temperature) > 0:
        raise ValueError(text)
    return int(top_k), float(temperature)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--records", help="records.jsonl, or the original initial_data.json")
    parser.add_argument("--questions", help="the original vqa_data.json, joined to the records by id")
    parser.add_argument("--out", type=Path, default=Path("runs/try"))
    parser.add_argument("--overwrite", action="store_true", help="empty OUT first")
    parser.add_argument("--strict", action="store_true", help="stop at a bad record instead of skipping it")
    parser.add_argument("--prompt", help="draw this text and stop")
    parser.add_argument("--image", help="caption this file and stop")
    parser.add_argument("--captions", type=int, default=10, help="captions per image")
    parser.add_argument("--caption-settings", type=setting, nargs="+", metavar="K:T",
                        default=[setting(s) for s in RELEASED_SETTINGS],
                        help="top-k:temperature, in turn; top-k 1 is greedy, 0 the whole vocabulary [the ten released]")
    parser.add_argument("--max-new-tokens", type=int, default=100)
    parser.add_argument("--images", type=int, default=16, help="images per caption")
    add_drawing_arguments(parser)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--round", type=int, default=1, help="self-play round: enters all seeds")
    parser.add_argument("--batch", type=int, default=4, help="records at a time; does not change results")
    parser.add_argument("--show", type=int, default=8, help="records to write pictures of")
    args = parser.parse_args()
    if not (args.records or args.prompt is not None or args.image):
        parser.error("one of --records, --prompt, --image is needed")
    if min(args.captions, args.images, args.batch, args.max_new_tokens) < 1:
        parser.error("--captions, --images, --batch and --max-new-tokens must be at least 1")
    return args


def main():
    args = parse_args()
    if args.prompt is not None or args.image:
        return try_by_eye(*load_from(args), args)
    skipped = None if args.strict else []
    records = read_records(args.records, args.questions, skipped)
    inputs = {"records": args.records, "questions": args.questions, "images": [r.image for r in records]}
    if not claim(args.out, args, "samples.jsonl", inputs | model_inputs(args)):
        return print(f"{args.out / 'samples.jsonl'} is complete")
    model, vq = load_from(args)

    def sample(chunk: list[Record]) -> list[dict]:
        good, pictures, results = [], [], []
        for r in chunk:
            why = None if args.strict else []
            with skipping(why):
                pictures.append(read_image(model, vq, r))
                good.append(r)
            results += [dict(id=r.id, skipped=reason) for reason in why or []]
        if not good:
            return results
        codes = encode_images(model, vq, pictures)
        captions = sample_captions(model, codes, good, args)
        images = sample_images(model, good, args).tolist()
        return results + [dict(id=r.id, image=c, captions=t, images=i)
                          for r, c, t, i in zip(good, codes.tolist(), captions, images)]

    results = map_records(sample, records, args.out, args.batch, "sample",
                          length=lambda r: len(model.tokens.draw(r.drawing_text)))
    if results is None:
        return
    good = [(r, found) for r, found in zip(records, results) if "skipped" not in found]
    reasons = (skipped or []) + [found["skipped"] for found in results if "skipped" in found]
    if reasons:
        write_file(args.out / "skipped.txt", "\n".join(reasons) + "\n")
        print(f"{len(reasons)} bad records skipped, for reasons in {args.out / 'skipped.txt'}; the first: {reasons[0]}")
    if not good:
        raise InputError(f"{args.records}: no record left; {reasons[0]}")
    records, results = zip(*good)
    save_pictures(model, vq, records[: args.show], results[: args.show], args.out)
    save_samples(records, results, model.tokens, args.out)
    shutil.rmtree(args.out / "parts")
    print(f"{len(records)} records, {args.captions} captions and {args.images} images each: {args.out}")


if __name__ == "__main__":
    run(main)
