"""The policy under test in the benchmarks: it answers about image files, or generates image files.

Both are resumable, and several processes share the work; only the main process returns, to score
and write.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from evals.official import require
from hermesflow.files import remove
from hermesflow.inputs import read_records
from hermesflow.options import ImageSampling
from hermesflow.pictures import save_picture, to_pil
from hermesflow.records import Record
from hermesflow.runs import from_main, map_records, processes, wait_until
from hermesflow.sampling import TextRequest, stable_seed


@dataclass
class ImageQuestion:
    """One prompt about one image file."""

    id: str
    image: str  # path
    prompt: str


@dataclass
class ImageFiles:
    """One text to draw, and the files that its images belong in."""

    id: str
    text: str
    files: list[Path]


def asker(model, out: Path, batch: int, label: str, max_new_tokens: int):
    """A function ask([(image file, prompt)]) -> [answer], greedy."""

    def answer(chunk: list[ImageQuestion]) -> list[dict]:
        files = list(dict.fromkeys(q.image for q in chunk))  # each image is read and prefilled once
        images = model.looked_at(files)
        requests = [TextRequest(files.index(q.image), q.prompt) for q in chunk]
        generated = model.generate_text(images, requests, max_new_tokens)
        answers = [model.decode_text(g.ids).strip() for g in generated]
        return [{"id": q.id, "answer": a} for q, a in zip(chunk, answers)]

    def ask(prompts: list[tuple]) -> list[str]:
        require_images([file for file, _ in prompts], label)
        questions = [ImageQuestion(str(n), str(f), p) for n, (f, p) in enumerate(prompts)]
        results = map_records(answer, questions, out, batch, label)
        leave_to_the_main_process()
        return [r["answer"] for r in results]

    return ask


def require_images(files: list, label: str) -> None:
    """Raises InputError about the first image that is not there, before any is asked about."""
    files = list(dict.fromkeys(map(str, files)))
    missing = [file for file in files if not os.path.exists(file)]
    if missing:
        number = f"{len(missing)} of {len(files)} are missing"
        require(False, missing[0], f"not found; expected here: an image of {label} ({number})")


def drawer(model, out: Path, batch: int, label: str, seed: int, sampling: ImageSampling):
    """A function draw([(id, text, [file])]) that generates missing files, each from its own seed.

    Files that are there are kept, so images of any other model can be scored in the same layout.
    """

    def generate(chunk: list[ImageFiles]) -> list[dict]:
        texts = []
        seeds = []
        files = []
        for images in chunk:
            for k, file in enumerate(images.files):
                texts.append(images.text)
                seeds.append(stable_seed(seed, label, images.id, k))
                files.append(file)
        codes = model.generate_images(texts, seeds, sampling)  # (B, N)
        for file, picture in zip(files, to_pil(model.decode_image(codes))):
            if not file.exists():
                save_picture(picture, file)
        return [{"id": images.id} for images in chunk]

    def draw(wanted: list[tuple]) -> None:
        for id, text, files in wanted:
            require(text.strip(), files[0], f"the text to draw here is empty ({label}, id {id!r})")

        def absent() -> list[ImageFiles]:
            return [ImageFiles(*w) for w in wanted if not all(f.exists() for f in w[-1])]

        missing = from_main(absent)
        if missing:
            # the files say what is drawn: one that was removed since is drawn again
            from_main(lambda: remove(out / "parts" / f"draw-for-{label}"))
            map_records(generate, missing, out, batch, f"draw for {label}",
                        length=lambda images: model.prompt_length(images.text))
        leave_to_the_main_process()
        wait_until(lambda: not absent(), out)

    return draw


def draw_records(data: Path, out: Path, draw) -> list[tuple[Record, Path]]:
    """Draw one image of every record's text, OUT/images/<id>.png; returns records and files."""
    drawn = [(r, out / "images" / f"{r.id}.png") for r in read_records(data)]
    draw([(r.id, r.drawing_text, [file]) for r, file in drawn])
    return drawn


def leave_to_the_main_process() -> None:
    """Several processes answer and generate; one scores and writes, the others end here."""
    if not processes().is_main_process:
        sys.exit()
