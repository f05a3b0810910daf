"""CLIPScore of drawings of captions, in the two variants that are in use, by name.

source       jmhessel/clipscore; papers' COCO "CLIP-Score"
DATA         a records file with captions; no images are needed
writes       OUT/images/<id>.png, one image per record
exact        both scores
approximated what ftfy does to wrongly decoded text; its quotes, widths, ligatures are as official

    python 04_eval.py --benchmark clipscore --data records.jsonl --model toy/base --out runs/clip
"""

import html
import unicodedata
from pathlib import Path

import numpy as np
from tqdm import tqdm

from evals.judges import Clip, ModelNames
from evals.official import read_picture
from evals.policy import draw_records
from hermesflow.records import about

WRITES = ()  # but the images
PREFIX = "A photo depicts "


# what ftfy.fix_text does to legible text
FIXED = dict.fromkeys([0x2BC, *range(0x2018, 0x201C)], "'")
FIXED |= dict.fromkeys(range(0x201C, 0x2020), '"')
WIDE_OR_JOINED = [0x3000, *range(0xFF01, 0xFFF0), *range(0xFB00, 0xFB05), 0xFB06]
FIXED |= {c: unicodedata.normalize("NFKC", chr(c)) for c in WIDE_OR_JOINED}


def clip_text(text: str) -> str:
    """What OpenAI's tokeniser does first, and that of transformers not: straight quotes, no HTML.

    An ellipsis stays one character.
    """
    if "<" not in text:  # else it may be HTML, to ftfy
        text = html.unescape(text)
    text = unicodedata.normalize("NFC", text.translate(FIXED))
    return html.unescape(html.unescape(text)).strip()


def clip_score(cosines) -> np.ndarray:
    """jmhessel/clipscore: 2.5 · max(cos, 0), the caption behind PREFIX, with CLIP."""
    return 2.5 * np.maximum(np.asarray(cosines, float), 0)


def plain_cosine(cosines) -> np.ndarray:
    """The papers' variant: 100 · cos, the caption without prefix."""
    return 100 * np.asarray(cosines, float)


def run(data: Path, out: Path, draw, device, names: ModelNames) -> dict:
    """Means over the records."""
    clip = Clip(names.clip, device)  # first: a wrong one is said before anything is drawn
    drawn = draw_records(data, out, draw)
    without_prefix = []
    with_prefix = []
    for record, file in tqdm(drawn, desc="CLIP"):
        with about(f"id {record.id!r}"):
            captions = [record.drawing_text, PREFIX + record.drawing_text]
            texts = clip.texts([clip_text(caption) for caption in captions])  # (2, D)
            image = clip.images([read_picture(file)])[0]  # (D,)
        plain, prefixed = (texts @ image).tolist()
        without_prefix.append(plain)
        with_prefix.append(prefixed)
    return {
        "CLIPScore (2.5 max(cos, 0), with prefix)": float(clip_score(with_prefix).mean()),
        "100 x cosine (no prefix, as in papers)": float(plain_cosine(without_prefix).mean()),
    }
