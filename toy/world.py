"""A world of coloured shapes, small enough to train on a laptop and exact enough to judge.

A scene is a 4x4 grid of 16-px cells on a plain background; each cell is empty or holds one of 40
object types (2 sizes x 5 colours x 4 shapes). A caption names one object, a number of equal
objects, or two or three different ones in a row or a column:

    a big red ring | three small green triangles | a big red ring left of a small blue square
    a big red ring above a small blue square above a small green cross

Everything a model draws can be read back from the pixels (`read`), so captions and questions have
exact answers.

    python toy/world.py --split preference --n 512 --seed 0 --out runs/toy/preference
    python toy/world.py --sheet sheet.png
"""

import hashlib
import json
import os
import re
import sys
from collections import namedtuple
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).parent.parent))
from hermesflow.files import InputError, atomic, write_text
from hermesflow.options import COUNT, SEED, folder, stage_parser
from hermesflow.outputs import Output, finish, prepare, run_main

GRID, CELL = 4, 16
SIDE = GRID * CELL
SIZES = {"big": 14, "small": 9}  # width in pixels
COLORS = {
    "red": (215, 20, 40),
    "green": (0, 185, 70),
    "blue": (40, 80, 240),
    "yellow": (250, 205, 0),
    "black": (10, 10, 15),
}
# word -> plural
SHAPES = {"square": "squares", "ring": "rings", "triangle": "triangles", "cross": "crosses"}
NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4}
RELATIONS = ("left of", "above")
# where the objects of a row or a column are: first, last, and between them
SIDES = {"left of": ("on the left", "on the right"), "above": ("at the top", "at the bottom")}
MIDDLE = "in the middle"
BACKGROUND = (244, 243, 238)
# per cent of the captions: for the base, for self-play, to choose settings on, to report on
SPLITS = {"train": 50, "preference": 30, "validation": 7, "test": 13}
EMPTY, UNKNOWN = -1, -2  # grid entries that are not a type
THRESHOLD = 45.0  # RMS distance (0..255) beyond which a cell is an unknown object

Type = namedtuple("Type", "size color shape")
TYPES = [Type(*t) for t in product(SIZES, COLORS, SHAPES)]
# kind: single, count, pair or triple; types: (a,), (a, b) or (a, b, c) as indices into TYPES;
# relation: None or one of RELATIONS, between neighbours
Spec = namedtuple("Spec", "kind types relation number")


# ----------------------------------------------------------------------------------------- captions

def name(index, plural=False):
    """Type index -> words, e.g. 'big red ring' or 'big red rings'."""
    size, color, shape = TYPES[index]
    return f"{size} {color} {SHAPES[shape] if plural else shape}"


NAMES = {name(i): i for i in range(len(TYPES))}
PLURALS = {name(i, plural=True): i for i in range(len(TYPES))}


def phrase(spec):
    """Spec -> caption."""
    if spec.kind == "count":
        word = next(w for w, n in NUMBERS.items() if n == spec.number)
        return f"{word} {name(spec.types[0], plural=True)}"
    return f" {spec.relation} ".join(f"a {name(t)}" for t in spec.types)


def specs():
    """All captions of the world as specs, in a fixed order."""
    everything = range(len(TYPES))
    for a in everything:
        yield Spec("single", (a,), None, 1)
    for a in everything:
        for b in everything:
            for relation in RELATIONS:
                if a != b:
                    yield Spec("pair", (a, b), relation, 2)
    for a in everything:
        for number in (2, 3, 4):
            yield Spec("count", (a,), None, number)
    for a in everything:
        for b in everything:
            for relation in RELATIONS:
                if a != b:
                    for c in thirds(a, b, relation):
                        yield Spec("triple", (a, b, c), relation, 3)


def thirds(a, b, relation):
    """Up to two types that come behind a and b: all of them would be 118,560 captions."""
    chosen = {_hash("third", name(a), name(b), relation, i) % len(TYPES) for i in (0, 1)}
    return sorted(chosen - {a, b})


def _hash(*parts):
    """A large integer that depends on the parts only; Python's own hash differs between runs."""
    digest = hashlib.sha256("|".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big")


CAPTIONS = {phrase(s): s for s in specs()}  # all 9,093 captions -> spec


def parse(caption):
    """Caption -> Spec; ValueError if it is not one of this world's (a model may write anything)."""
    text = " ".join(caption.lower().split())
    if text not in CAPTIONS:
        raise ValueError(f"not a caption of this world: {caption!r}")
    return CAPTIONS[text]


def split(caption):
    """Caption -> 'train', 'preference', 'validation' or 'test'.

    Pairs and triples are hashed without order and relation: all captions of the same types land in
    the same split, so a held-out combination is never trained on in any arrangement.
    """
    spec = parse(caption)
    names = sorted(name(t) for t in spec.types)
    number = _hash("toy world", spec.kind, spec.number, *names) % 100
    for word, share in SPLITS.items():
        if number < share:
            return word
        number -= share


def captions(which=None):
    """All captions, or those of one split, in a fixed order."""
    return [c for c in CAPTIONS if which is None or split(c) == which]


# ----------------------------------------------------------------------------------------- pictures

def _mask(size, shape):
    """(16, 16) bool: the pixels of one object, hard-edged, centred in its cell."""
    width = SIZES[size]
    start = (CELL - width) // 2
    y, x = np.mgrid[:width, :width] - (width - 1) / 2
    inside = {
        "square": np.ones((width, width), bool),
        "ring": (np.hypot(x, y) <= width / 2) & (np.hypot(x, y) >= width / 4),
        "triangle": np.abs(x) <= (y + (width - 1) / 2 + 1) / 2,
        "cross": np.minimum(np.abs(x), np.abs(y)) < 0.17 * width,
    }
    mask = np.zeros((CELL, CELL), bool)
    mask[start : start + width, start : start + width] = inside[shape]
    return mask


def _templates():
    """(41, 16, 16, 3) uint8: every type, and the empty cell last, so that index -1 finds it."""
    cells = np.empty((len(TYPES) + 1, CELL, CELL, 3), np.uint8)
    cells[:] = BACKGROUND
    for i, t in enumerate(TYPES):
        cells[i][_mask(t.size, t.shape)] = COLORS[t.color]
    return cells


TEMPLATES = _templates()


def scene(caption, rng):
    """Caption and numpy Generator -> (4, 4) int grid that shows exactly what the caption says."""
    spec = parse(caption)
    grid = np.full((GRID, GRID), EMPTY)
    if spec.relation:
        line = rng.integers(GRID)
        places = np.sort(rng.choice(GRID, len(spec.types), replace=False))
        grid[line, places] = spec.types
        return grid if spec.relation == "left of" else grid.T.copy()
    grid.flat[rng.choice(GRID * GRID, spec.number, replace=False)] = spec.types[0]
    return grid


def render(grid):
    """(4, 4) grid of types -> (64, 64, 3) uint8 image."""
    cells = TEMPLATES[np.asarray(grid)]  # (4, 4, 16, 16, 3)
    return cells.transpose(0, 2, 1, 3, 4).reshape(SIDE, SIDE, 3)


# ---------------------------------------------------------------------------------------- questions

def _question(text, choices, answer, element):
    return {"question": text, "choices": list(choices), "answer": answer, "element": element}


def questions(caption, variant=""):
    """Caption -> 8 to 12 multiple-choice questions whose answers can be seen in the image alone.

    The same caption always gets the same questions, another variant of them asks about other
    objects; half of the yes/no questions are answered 'yes'.
    """
    spec = parse(caption)

    def pick(what, options):
        options = list(options)
        return options[_hash("question", caption, what, variant) % len(options)]

    def absent(what):
        """A type that is not in the scene but differs from one that is in just one attribute."""
        near = TYPES[pick(what, spec.types)]
        options = []
        for i, t in enumerate(TYPES):
            differing = sum(u != v for u, v in zip(t, near))
            if i not in spec.types and differing == 1:
                options.append(i)
        return pick(what + " near", options)

    asked = []
    if spec.relation:
        first, last = SIDES[spec.relation]
        sides = (first, last) if spec.kind == "pair" else (first, MIDDLE, last)
        for side, index in zip(sides, spec.types):
            t = TYPES[index]
            asked += [
                _question(f"what color is the shape {side}?", COLORS, t.color, "color"),
                _question(f"what shape is {side}?", SHAPES, t.shape, "shape"),
                _question(f"what size is the shape {side}?", SIZES, t.size, "attribute"),
            ]
        if spec.kind == "pair":
            which = pick("where", (0, 1))
            text = f"where is the {name(spec.types[which])}?"
            answer = sides[which].split()[-1]
            asked.append(_question(text, ("left", "right", "top", "bottom"), answer, "spatial"))
    else:
        t = TYPES[spec.types[0]]
        one = spec.kind == "single"
        shapes = "is the shape" if one else "are the shapes"
        it = "is it" if one else "are they"
        asked += [
            _question(f"what color {shapes}?", COLORS, t.color, "color"),
            _question(f"what shape {it}?", SHAPES, t.shape, "shape"),
            _question(f"what size {shapes}?", SIZES, t.size, "attribute"),
        ]
        color = pick("color", [c for c in COLORS if c != t.color])
        shape = pick("shape", [s for s in SHAPES if s != t.shape])
        if pick("swap", (True, False)):
            asked += [
                _question(f"is there a {t.color} shape?", ("yes", "no"), "yes", "color"),
                _question(f"is there a {shape}?", ("yes", "no"), "no", "object"),
            ]
        else:
            asked += [
                _question(f"is there a {color} shape?", ("yes", "no"), "no", "color"),
                _question(f"is there a {t.shape}?", ("yes", "no"), "yes", "object"),
            ]
        if not one:
            word = caption.split()[0]
            plural = name(spec.types[0], plural=True)
            asked.append(_question(f"how many {plural} are there?", NUMBERS, word, "counting"))

    word = next(w for w, n in NUMBERS.items() if n == spec.number)
    present = name(pick("present", spec.types))
    missing = name(absent("absent"))
    asked += [
        _question("how many shapes are there?", NUMBERS, word, "counting"),
        _question(f"is there a {present}?", ("yes", "no"), "yes", "object"),
        _question(f"is there a {missing}?", ("yes", "no"), "no", "object"),
    ]
    return asked


# --------------------------------------------------------------------------------------- the oracle

def read(image):
    """Image -> (4, 4) grid of types, EMPTY or UNKNOWN.

    image: PIL or uint8 array of any size, or a grid already read. Each cell becomes its nearest
    template in RGB; too far from all of them it is an unknown object, right for nothing.
    """
    if isinstance(image, np.ndarray) and image.shape == (GRID, GRID):
        return image
    if not isinstance(image, Image.Image):
        image = Image.fromarray(np.asarray(image, np.uint8))
    image = image.convert("RGB")
    if image.size != (SIDE, SIDE):
        image = image.resize((SIDE, SIDE), Image.BICUBIC)
    cells = np.asarray(image, np.float32).reshape(GRID, CELL, GRID, CELL, 3)
    cells = cells.transpose(0, 2, 1, 3, 4).reshape(GRID * GRID, 1, -1)  # (16, 1, 768)
    templates = TEMPLATES.reshape(1, len(TEMPLATES), -1)  # (1, 41, 768)
    distance = np.sqrt(((cells - templates) ** 2).mean(2))  # (16, 41)
    best = distance.argmin(1)
    grid = np.where(best == len(TYPES), EMPTY, best)
    grid[distance.min(1) > THRESHOLD] = UNKNOWN
    return grid.reshape(GRID, GRID)


def judge(image, caption):
    """Does the image show what the caption says? -> dict of bools.

    objects: the same set of sized shapes, in whatever colour; colours: the same set of colours;
    counts: as many; positions: the relation holds between neighbours in the caption; correct:
    exactly the scene of the caption.
    """
    grid = read(image)
    spec = parse(caption)
    found = [int(t) for t in grid.flat if t != EMPTY]
    seen = [TYPES[t] if t != UNKNOWN else None for t in found]
    wanted = [TYPES[t] for t in spec.types]
    positions = True
    if spec.relation:
        places = [np.argwhere(grid == t) for t in spec.types]
        positions = all(len(p) == 1 for p in places)
        if positions:
            rows, columns = np.concatenate(places).T
            line, along = (rows, columns) if spec.relation == "left of" else (columns, rows)
            positions = bool((line == line[0]).all() and (np.diff(along) > 0).all())

    number_of_each = spec.number // len(spec.types)
    shapes = {t and (t.size, t.shape) for t in seen}
    colours = {t and t.color for t in seen}
    return {
        "objects": shapes == {(t.size, t.shape) for t in wanted},
        "colours": colours == {t.color for t in wanted},
        "counts": len(found) == spec.number,
        "positions": positions,
        "correct": positions and sorted(found) == sorted(spec.types * number_of_each),
    }


def answer(image, question):
    """The exact answer to one of this world's questions, or 'none' if it does not apply.

    question: its text or its dict.
    """
    grid = read(image)
    text = question["question"] if isinstance(question, dict) else question
    text = text.lower().strip(" ?")
    places = np.argwhere(grid != EMPTY)  # (objects, 2) row, column
    found = [int(grid[row, column]) for row, column in places]

    def attribute(index, what):
        return getattr(TYPES[index], what) if index != UNKNOWN else "none"

    def number(count):
        return next((w for w, n in NUMBERS.items() if n == count), "none")

    if text == "how many shapes are there":
        return number(len(found))
    if match := re.fullmatch(r"how many (.+) are there", text):
        return number(found.count(PLURALS[match[1]])) if match[1] in PLURALS else "none"
    if match := re.fullmatch(r"is there a (.+)", text):
        if match[1] in NAMES:
            return "yes" if NAMES[match[1]] in found else "no"
        word = match[1].removesuffix(" shape")
        if word in COLORS or word in SHAPES:
            return "yes" if any(i != UNKNOWN and word in TYPES[i] for i in found) else "no"
        return "none"
    if match := re.fullmatch(r"where is the (.+)", text):
        # one object relative to the only other one
        which = NAMES.get(match[1])
        if len(found) != 2 or found.count(which) != 1:
            return "none"
        (row, column), (row2, column2) = places if found[0] == which else places[::-1]
        if (row == row2) == (column == column2):  # in neither one row nor one column
            return "none"
        if row == row2:
            return "left" if column < column2 else "right"
        return "top" if row < row2 else "bottom"
    if match := re.fullmatch(rf"what (color|shape|size) is (?:the shape )?{MIDDLE}", text):
        # the second of exactly three objects in one row or column
        rows, columns = places.T
        if len(found) != 3 or len(set(rows)) > 1 and len(set(columns)) > 1:
            return "none"
        return attribute(found[1], match[1])
    where = r"(?:the shape )?(?:on|at) the (left|right|top|bottom)"
    if match := re.fullmatch(rf"what (color|shape|size) is {where}", text):
        # the one object farthest on that side, if the objects spread in that direction at all
        along = places[:, 1 if match[2] in ("left", "right") else 0]
        if len(along) == 0 or along.min() == along.max():
            return "none"
        farthest = along.min() if match[2] in ("left", "top") else along.max()
        at = np.flatnonzero(along == farthest)
        return attribute(found[at[0]], match[1]) if len(at) == 1 else "none"
    if match := re.fullmatch(r"what (color|shape|size) (?:is|are) (?:the shapes?|it|they)", text):
        values = {attribute(i, match[1]) for i in found}
        return values.pop() if len(values) == 1 else "none"
    return "none"


# ------------------------------------------------------------------------------------------ records

def records(which, n, seed, out_dir):
    """Write n records of a split: out_dir/images/<id>.png and out_dir/records.jsonl; returns them.

    Captions are all different until the split is used up; only then do they come again, with other
    placements. records.jsonl comes last: where it is, all images are.
    """
    rng = np.random.default_rng(seed)
    pool = captions(which)
    order = rng.permutation(len(pool))
    rows = []
    for i in range(n):
        caption = pool[order[i % len(pool)]]
        identifier = f"{which}-{seed}-{i:05d}"
        row = {
            "id": identifier,
            "image": f"images/{identifier}.png",
            "caption": caption,
            "questions": questions(caption),
        }
        _save_png(Image.fromarray(render(scene(caption, rng))), Path(out_dir) / row["image"])
        rows.append(row)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    write_text(Path(out_dir) / "records.jsonl", text)
    return rows


def _save_png(picture, path):
    with atomic(path) as temporary:
        picture.save(temporary, format="PNG")


def vocabulary():
    """Every word of the captions, questions, choices and the prompts around them, sorted."""
    text = ["USER: ASSISTANT: Give a caption for this image. Question: Choice: none"]
    for caption in CAPTIONS:
        text.append(caption)
        for q in questions(caption):
            text += [q["question"], q["answer"], *q["choices"]]
    return sorted(set(re.findall(r"\w+", " ".join(text).lower())))


def sheet(path, zoom=2):
    """Draw all 40 objects and one scene for each of some captions, with labels, to look at."""
    rng = np.random.default_rng(0)
    chosen = [captions()[i] for i in rng.choice(len(CAPTIONS), 8, replace=False)]
    chosen += [c for c in captions() if parse(c).kind == "pair"][::331][:4]
    chosen += [c for c in captions() if parse(c).kind == "single"][:1]
    chosen += [c for c in captions() if parse(c).kind == "count"][::31][:3]
    tiles = [(name(i), TEMPLATES[i]) for i in range(len(TYPES))]
    tile = CELL * zoom * 2
    scene_tile = SIDE * zoom
    page = Image.new("RGB", (8 * (tile + 48), 5 * (tile + 22) + 4 * (scene_tile + 40)), "white")
    draw = ImageDraw.Draw(page)

    # the objects, eight in a row
    for i, (label, cell) in enumerate(tiles):
        x, y = i % 8 * (tile + 48), i // 8 * (tile + 22)
        page.paste(Image.fromarray(cell).resize((tile, tile), Image.NEAREST), (x + 8, y + 4))
        draw.text((x + 4, y + tile + 5), label, fill="black")

    # the scenes below them, four in a row
    top = 5 * (tile + 22)
    width = page.width // 4
    for i, caption in enumerate(chosen[:16]):
        x, y = i % 4 * width, top + i // 4 * (scene_tile + 40)
        picture = Image.fromarray(render(scene(caption, rng)))
        picture = picture.resize((scene_tile, scene_tile), Image.NEAREST)
        page.paste(picture, (x + 8, y + 6))
        words = caption.replace(" left of ", "\nleft of ").replace(" above ", "\nabove ")
        draw.text((x + 8, y + scene_tile + 8), words, fill="black")
    _save_png(page, path)


# --------------------------------------------------------------------------------------------- main

def parse_args(argv=None):
    parser = stage_parser(__doc__)
    add = parser.add_argument_group("records").add_argument
    add("--split", choices=list(SPLITS), help="which captions")
    add("--n", type=COUNT, default=512, help="number of records")
    add("--seed", type=SEED, default=0, help="order and placements")
    add("--out", type=folder, help="folder for records.jsonl and images/")
    add("--overwrite", action="store_true", help="empty OUT first")
    add = parser.add_argument_group("a look at the world").add_argument
    add("--sheet", type=folder, metavar="PNG", help="draw a contact sheet instead")
    args = parser.parse_args(argv)
    if args.sheet and (args.split or args.out):
        parser.error("--sheet draws no records: give it without --split and --out")
    if not args.sheet and not (args.split and args.out):
        parser.error("--split and --out, or --sheet, are needed")
    return args


def main(args):
    if args.sheet:
        if os.path.lexists(args.sheet):
            raise InputError(f"--sheet {args.sheet}: is there already")
        return sheet(args.sheet)
    output = Output(args.out, "toy/world", "records.jsonl", writes=("records.jsonl", "images"),
                    args=vars(args), free=("sheet",), derived=(), inputs={}, code=(__file__,))
    prepare(output)
    # also where they are complete: the same bytes, and images that were removed
    rows = records(args.split, args.n, args.seed, args.out)
    finish(output)
    different = len({row["caption"] for row in rows})
    print(f"{len(rows)} records, {different} different captions -> {args.out}")


if __name__ == "__main__":
    ARGS = parse_args()
    run_main(lambda: main(ARGS))
