"""Finished evaluations of the same records side by side, as a table and a picture."""

from pathlib import Path

from PIL import Image, ImageOps

from evals.metrics import EvalRecord, evaluate, paired_difference, table
from hermesflow.files import InputError, write_text
from hermesflow.pictures import image_grid, load_image, save_picture, to_pil
from hermesflow.records import read_jsonl


def read_evaluations(folders: list[Path]) -> dict[str, list[EvalRecord]]:
    """The records of several evaluations, by folder (by its name, if that tells them apart).

    Raises InputError if they are not of the same records.
    """
    alike = len({f.name for f in folders}) < len(folders)
    runs = {}
    for folder in folders:
        name = str(folder) if alike else folder.name
        runs[name] = read_jsonl(folder / "answers.jsonl", EvalRecord)
    base = next(iter(runs))
    expected = [(r.id, r.text) for r in runs[base]]
    for name, records in runs.items():
        if [(r.id, r.text) for r in records] != expected:
            raise InputError(f"{name}/answers.jsonl: other records than {base}/answers.jsonl")
    return runs


def compare(folders: list[Path], out: Path, show: int) -> None:
    """OUT/table.md with paired differences, OUT/comparison.png with real image and drawings."""
    runs = read_evaluations(folders)
    base = next(iter(runs))
    first = runs[base]
    texts = len({r.text for r in first})
    text = f"{len(first)} records, {texts} different texts; mean over records [95 % interval]\n\n"
    text += table({name: evaluate(records) for name, records in runs.items()})
    differences = differences_to(base, runs)
    if differences:
        text += f"\n\nPaired difference to {base}:\n\n" + table(differences, "+")
    write_text(out / "table.md", text + "\n")
    print(text)

    rows = []
    labels = []
    for i, record in enumerate(first[:show]):
        files = [folder / "images" / f"{record.id}.png" for folder in folders]
        if all(f.exists() for f in files):  # not in an evaluation with a smaller --show
            rows.append(comparison_row(files, [records[i] for records in runs.values()]))
            labels.append(record.text)
    if rows:
        save_picture(image_grid(rows, labels, 96, columns=3), out / "comparison.png")
        print(f"\n{out / 'table.md'}; {out / 'comparison.png'}: the real image, then "
              f"{', '.join(runs)}; green frame: everything right")


def differences_to(base: str, runs: dict[str, list[EvalRecord]]) -> dict[str, dict]:
    """Paired differences of all evaluations but `base` to it."""
    return {n: paired_difference(runs[base], r) for n, r in runs.items() if n != base}


def comparison_row(files: list[Path], records: list[EvalRecord]) -> list[Image.Image]:
    """The real image and the drawings of one record, each in a green or red frame."""
    drawn = [Image.open(f).convert("RGB") for f in files]
    row = to_pil(load_image(records[0].image, drawn[0].size[0])[None])
    for record, picture in zip(records, drawn):
        frame = "#2a2" if record.all_right else "#d33"
        large = picture.resize((240, 240), Image.Resampling.NEAREST)
        row.append(ImageOps.expand(large, 8, frame))
    return row
