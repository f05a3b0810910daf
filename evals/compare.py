"""Finished evaluations of the same records side by side, as a table and a picture."""

import os
from itertools import islice
from pathlib import Path

from PIL import Image, ImageDraw

from evals.html import COLORS
from evals.metrics import (EvalRecord, Summary, metrics_of, paired_difference, summarize, table)
from evals.official import read_picture
from hermesflow.files import InputError, read_object, remove, write_text, written_files
from hermesflow.jsonl import Lines, read_jsonl
from hermesflow.outputs import FORMAT, lock
from hermesflow.pictures import image_grid, load_image, save_picture, to_pil

EVALUATED = ("model", "image_tokenizer", "text_tokenizer")  # what a comparison is about
CELL, TITLE, FRAME = 120, 16, 4  # pixels of the picture: a cell, the name in it, a frame


def read_evaluations(folders: list[Path]) -> dict[str, Lines]:
    """The records of several evaluations, by folder (by its name, if that tells them apart)."""
    alike = len({f.name for f in folders}) < len(folders)
    runs = {}
    for folder in folders:
        name = str(folder) if alike else folder.name
        if name in runs:
            raise InputError(f"{folder}: is given twice")
        runs[name] = read_jsonl(folder / "answers.jsonl", EvalRecord)
    return runs


def summarize_all(runs: dict[str, Lines]) -> dict[str, Summary]:
    """Raises InputError if the evaluations are not of the same records."""
    summaries = {name: summarize(records) for name, records in runs.items()}
    base = next(iter(summaries))
    for name, summary in summaries.items():
        if summary.order != summaries[base].order:
            raise InputError(f"{name}/answers.jsonl: other records than {base}/answers.jsonl")
    return summaries


def differences_to(base: str, summaries: dict[str, Summary]) -> dict[str, dict]:
    """Paired differences of all evaluations but `base` to it."""
    return {n: paired_difference(summaries[base], s) for n, s in summaries.items() if n != base}


# ---------------------------------------------------------------------------------------- settings


def read_settings(folder: Path) -> dict:
    """The settings.json of a finished evaluation."""
    file = folder / "settings.json"
    for needed in (folder / "answers.jsonl", file):
        if not needed.exists():
            raise InputError(f"{needed}: missing; {folder} holds no finished evaluation of records")
    mark = read_object(file)
    if mark.get("format") != FORMAT:
        raise InputError(f"{file}: of another version (format {mark.get('format')}, not {FORMAT})")
    if mark.get("stage") != "04_eval" or mark.get("complete") is not True:
        raise InputError(f"{folder}: holds no finished evaluation of records")
    for name in ("settings", "inputs", "code"):
        if not isinstance(mark.get(name), dict):
            raise InputError(f"{file}: field '{name}' should be an object")
    return mark


def other_settings(folder: Path, base: Path) -> dict[str, str]:
    """Of all that decides answers but the evaluated model, name -> how `folder` differs."""
    old = read_settings(base)
    new = read_settings(folder)
    old = {**old["settings"], **old["inputs"]}
    new = {**new["settings"], **new["inputs"]}
    different = {}
    for name in {**old, **new}:
        before = old.get(name)
        after = new.get(name)
        if name not in EVALUATED and before != after:
            texts = isinstance(before, str) and isinstance(after, str)
            flag = f"--{name.replace('_', '-')}"
            different[name] = f"{flag} {before} -> {after}" if texts else f"content of {flag}"
    return different


def require_alike(folders: list[Path], across: list[str]) -> None:
    """Raises InputError naming the settings, not among `across`, in which evaluations differ."""
    base = folders[0]
    for folder in folders:
        different = other_settings(folder, base)
        refused = [name for name in different if name not in across]
        if refused:
            names = " ".join(name.replace("_", "-") for name in refused)
            raise InputError(f"{folder}: evaluated with other settings than {base} "
                             f"({'; '.join(different[name] for name in refused)}); "
                             f"if these are compared, --across {names}")
        code = read_settings(folder)["code"].items() - read_settings(base)["code"].items()
        if code:
            files = ", ".join(sorted(file for file, _ in code))
            print(f"note: {folder} was evaluated by other code than {base}: {files}")


# ------------------------------------------------------------------------------------------ results


def take(out: Path, *names: str) -> None:
    """Hold a folder, and replace nothing in it that somebody else has written there.

    Raises InputError if one of the names is such a file. The folder may hold the inputs.
    """
    ours = written_files(out)
    for name in names:
        if os.path.lexists(out / name) and name not in ours:
            raise InputError(f"{out / name}: is there already, and no stage wrote it; move it away")
    lock(out).remove_temporaries()


def compare(folders: list[Path], out: Path, show: int, across: list[str]) -> None:
    """OUT/table.md with paired differences, OUT/comparison.png with real image and drawings."""
    require_alike(folders, across)
    take(out, "table.md", "comparison.png")
    runs = read_evaluations(folders)
    summaries = summarize_all(runs)
    base = next(iter(runs))
    metrics = {name: metrics_of(summary) for name, summary in summaries.items()}
    text = (f"{metrics[base]['records']} records, {metrics[base]['different texts']} different "
            f"texts; mean over records [95 % interval]\n\n{table(metrics)}")
    differences = differences_to(base, summaries)
    if differences:
        text += f"\n\nPaired difference to {base}:\n\n" + table(differences, "+")
    write_text(out / "table.md", text + "\n")
    print(text)

    rows = []
    labels = []
    for records in islice(zip(*runs.values()), show):
        files = [folder / "images" / f"{records[0].id}.png" for folder in folders]
        if all(f.exists() for f in files):  # not in an evaluation with a smaller --show
            rows.append(comparison_row(files, list(runs), records))
            labels.append(records[0].text)
    if rows:
        save_picture(image_grid(rows, labels, CELL, columns=3), out / "comparison.png")
        print(f"\n{out / 'table.md'}; {out / 'comparison.png'}: the real image, then "
              f"{', '.join(runs)}; solid green frame: everything right")
    else:
        remove(out / "comparison.png")  # of an earlier comparison


def comparison_row(files: list[Path], names: list[str],
                   records: tuple[EvalRecord, ...]) -> list[Image.Image]:
    """The real image and the drawings of one record, each under its name."""
    drawn = [read_picture(f) for f in files]
    real = to_pil(load_image(records[0].image, drawn[0].size[0])[None])[0]
    row = [titled(real, "real")]
    for name, record, picture in zip(names, records, drawn):
        row.append(titled(picture, name, record.all_right))
    return row


def titled(picture: Image.Image, name: str, right: bool | None = None) -> Image.Image:
    """A cell of the comparison. Right: a whole green frame and a check mark; wrong: a dashed red
    frame and a cross."""
    side = CELL - TITLE
    left = TITLE // 2
    cell = Image.new("RGB", (CELL, CELL), "white")
    draw = ImageDraw.Draw(cell)
    draw.text((left, 1), name[-12:], fill="black")
    if right is None:
        cell.paste(picture.resize((side, side), Image.Resampling.BICUBIC), (left, TITLE))
        return cell
    color = COLORS["right" if right else "wrong"]
    x = CELL - left - 12
    check = [[(x, 7), (x + 3, 11), (x + 10, 2)]]
    cross = [[(x + 1, 2), (x + 10, 11)], [(x + 1, 11), (x + 10, 2)]]
    for stroke in check if right else cross:
        draw.line(stroke, fill=color, width=2)
    draw.rectangle((left, TITLE, CELL - left - 1, CELL - 1), fill=color)
    if not right:  # gaps in the frame
        for at in range(4, side, 13):
            draw.rectangle((left + at, TITLE, left + at + 5, CELL), fill="white")
            draw.rectangle((left, TITLE + at, CELL - left, TITLE + at + 5), fill="white")
    inner = picture.resize((side - 2 * FRAME,) * 2, Image.Resampling.BICUBIC)
    cell.paste(inner, (left + FRAME, TITLE + FRAME))
    return cell
