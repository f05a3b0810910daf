"""Image files to pixels, pixels to pictures, and sheets of pictures for people."""

import math
import textwrap
import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageDraw, ImageOps

from hermesflow.files import InputError, atomic, require_regular
from hermesflow.records import Record, vqa_question

LINE = 14  # height of a line in the default font
LETTER = 6  # its width, about
SRGB = ImageCms.createProfile("sRGB")


def open_image(path) -> Image.Image:
    """An image file as an upright sRGB picture.

    Raises InputError if the file is no image, or more than a hundred times as long as wide.
    """
    try:
        require_regular(path)
        # Pillow warns of broken metadata in pictures that it reads
        with warnings.catch_warnings(action="ignore"), Image.open(path) as file:
            image = to_srgb(upright(file))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except Exception as error:  # Pillow raises OSError, ValueError, SyntaxError, … for broken files
        raise InputError(f"{path}: cannot read image: {error}") from None
    short, long = sorted(image.size)
    if long > 100 * short:
        width, height = image.size
        raise InputError(f"{path}: an image of {width}x{height} pixels has no usable centre")
    return image


def load_image(path, size: int) -> torch.Tensor:
    """An image file as (3, size, size) pixels in [-1, 1].

    As the original does: shorter side to `size` (bicubic, antialiased), centre crop.
    """
    image = open_image(path)
    short = min(image.size)
    width, height = (int(size * side / short) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left = round((width - size) / 2)
    top = round((height - size) / 2)
    pixels = np.asarray(image.crop((left, top, left + size, top + size)), dtype=np.float32)
    return torch.from_numpy(pixels / 255).permute(2, 0, 1) * 2 - 1  # (3, size, size)


def upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF data says; as it is, if they are broken."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # whatever the broken bytes look like to a parser
        return image


def eight_bits(image: Image.Image) -> Image.Image:
    """With numbers of 16 bits scaled. Raises InputError on those of 32."""
    if image.mode.startswith("I;16") or image.mode == "I" and image.format == "PNG":
        image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
    if image.mode in ("I", "F"):
        message = f"a picture of 32-bit numbers (mode {image.mode}) has no known range"
        raise InputError(f"{message}; save it with 8 or 16 bits")
    return image


def to_srgb(image: Image.Image) -> Image.Image:
    """8-bit RGB as a viewer shows it: a colour profile is converted to sRGB."""
    image = eight_bits(image)
    try:
        profile = ImageCms.ImageCmsProfile(BytesIO(image.info["icc_profile"]))
        mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}[profile.profile.xcolor_space.strip()]
        if "sRGB" in profile.profile.profile_description:
            return image.convert("RGB")
        source = image.convert(mode)
        return ImageCms.profileToProfile(source, profile, SRGB, outputMode="RGB")
    except (KeyError, OSError, TypeError, ImageCms.PyCMSError):  # none, or a broken one
        return image.convert("RGB")


def record_image(model, record: Record) -> torch.Tensor:
    """(3, H, W) pixels of a record. Raises InputError if its image or a question is unusable."""
    for q in record.questions:
        where = f"id {record.id!r}: field 'questions': {q.question[:40]!r}"
        model.check_prompt(vqa_question(q), where)
    return load_image(record.image, model.image_size)


def to_pil(pixels: torch.Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [-1, 1] to B pictures."""
    array = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    array = array.permute(0, 2, 3, 1).cpu().numpy()  # (B, H, W, 3)
    return [Image.fromarray(a) for a in array]


def save_picture(picture: Image.Image, path) -> None:
    with atomic(path) as temporary:
        picture.save(temporary, format="PNG")


def image_grid(rows: list[list], labels: list[str], cell: int = 128, columns: int = 1):
    """A contact sheet: rows of pictures, each under its label, in so many columns of rows."""
    longest = max(map(len, rows))
    texts = [wrap(label, cell * longest // LETTER) for label in labels]
    width = longest * (cell + 4) + 12
    height = LINE * max(map(len, texts)) + cell + 14
    canvas = Image.new("RGB", (columns * width, math.ceil(len(rows) / columns) * height), "white")
    draw = ImageDraw.Draw(canvas)
    for i, (pictures, text) in enumerate(zip(rows, texts)):
        left = i % columns * width + 6
        top = i // columns * height + 4
        draw.text((left, top), "\n".join(text), fill="black", spacing=2)
        for c, picture in enumerate(pictures):
            picture = picture.convert("RGB").resize((cell, cell), Image.Resampling.BICUBIC)
            canvas.paste(picture, (left + c * (cell + 4), top + height - cell - 10))
    return canvas


def wrap(label: str, letters: int) -> list[str]:
    """The lines of a label, none longer than `letters`."""
    lines = []
    for part in label.split("\n"):
        lines += textwrap.wrap(part, letters)
    return lines


def save_pair_gallery(model, pairs, out: Path) -> None:
    """Real image, winner, loser of (Pair, its tensors), with captions and scores: one sheet, and
    files for the report."""
    rows = []
    labels = []
    for p, tensors in pairs:
        codes = torch.stack([tensors[n] for n in ("image", "win_image", "lose_image")])  # (3, N)
        pictures = to_pil(model.decode_image(codes))
        for name, picture in zip(("real", "win", "lose"), pictures):
            save_picture(picture, out / "images" / f"{p.id}-{name}.png")
        rows.append(pictures)
        labels.append(f"{p.caption}\nwin {p.win_caption_score:.2f}: {p.win_caption}\n"
                      f"lose {p.lose_caption_score:.2f}: {p.lose_caption}\n"
                      f"images: real, win {p.win_image_score:.2f}, lose {p.lose_image_score:.2f}")
    if rows:  # not with --show 0
        save_picture(image_grid(rows, labels, columns=2), out / "pairs.png")
