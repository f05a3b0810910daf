"""CLIPScore of drawings of captions, in the two variants that are in use, by name.

source       jmhessel/clipscore; papers' COCO "CLIP-Score"
DATA         a records file with captions; no images are needed
writes       OUT/images/<id>.png, one image per record
exact        both scores
approximated nothing

    python 04_eval.py --benchmark clipscore --data records.jsonl --model toy/base --out runs/clip
"""

from pathlib import Path

import numpy as np
from tqdm import tqdm

from evals.judges import Clip, ModelNames
from evals.official import read_picture
from evals.policy import draw_records
from hermesflow.records import about

WRITES = ()  # but the images
PREFIX = "A photo depicts "


def clip_score(cosines) -> np.ndarray:
    """jmhessel/clipscore: 2.5 · max(cos, 0), the caption behind PREFIX, with CLIP."""
    return 2.5 * np.maximum(np.asarray(cosines, float), 0)


def plain_cosine(cosines) -> np.ndarray:
    """The papers' variant: 100 · cos, the caption without prefix."""
    return 100 * np.asarray(cosines, float)


def run(data: Path, out: Path, draw, device, names: ModelNames) -> dict:
    """Means over the records."""
    drawn = draw_records(data, out, draw)
    clip = Clip(names.clip, device)
    without_prefix = []
    with_prefix = []
    for record, file in tqdm(drawn, desc="CLIP"):
        with about(f"id {record.id!r}"):
            texts = clip.texts([record.drawing_text, PREFIX + record.drawing_text])  # (2, D)
            image = clip.images([read_picture(file)])[0]  # (D,)
        plain, prefixed = (texts @ image).tolist()
        without_prefix.append(plain)
        with_prefix.append(prefixed)
    return {
        "CLIPScore (2.5 max(cos, 0), with prefix)": float(clip_score(with_prefix).mean()),
        "100 x cosine (no prefix, as in papers)": float(plain_cosine(without_prefix).mean()),
    }
