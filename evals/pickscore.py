"""PickScore of drawings: how much people would like an image for its text, by a model of choices.

source       yuvalkirstain/PickScore (README)
DATA         a records file with captions; no images are needed
writes       OUT/images/<id>.png, one image per record; OUT/pickscores.json, the score of every id,
             so that two models can be compared image by image
exact        the score
approximated nothing, but the official prompts are Pick-a-Pic's; on others, scores compare between
             models alone

    python 04_eval.py --benchmark pickscore --data records.jsonl --model toy/base --out runs/pick
"""

import json
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm
from transformers import AutoProcessor, CLIPModel

from evals.judges import Clip, ModelNames
from evals.official import read_picture
from evals.policy import draw_records
from hermesflow.checkpoints import find_file, load_hf
from hermesflow.files import write_text
from hermesflow.records import about

WRITES = ("pickscores.json",)  # and the images
PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # of PickScore_v1, which comes without one
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")


class PickScore(Clip):
    """A CLIP model, its own processor or else the official one."""

    def __init__(self, name: str, device):
        self.name = name
        has_own = any(find_file(name, file) for file in PROCESSOR_FILES)
        self.processor = load_hf(AutoProcessor, name if has_own else PROCESSOR)
        self.model = load_hf(CLIPModel, name).to(device).eval()

    def score(self, picture: Image.Image, text: str) -> float:
        """exp(logit scale) · cos."""
        cosine = self.texts([text])[0] @ self.images([picture])[0]
        return pick_score(cosine, self.model.logit_scale).item()


def pick_score(cosine: torch.Tensor, logit_scale: torch.Tensor) -> torch.Tensor:
    return logit_scale.detach().exp() * cosine


def run(data: Path, out: Path, draw, device, names: ModelNames) -> dict:
    """The mean over the records."""
    model = PickScore(names.clip, device)
    drawn = draw_records(data, out, draw)
    scores = {}
    for record, file in tqdm(drawn, desc="PickScore"):
        with about(f"id {record.id!r}"):
            scores[record.id] = model.score(read_picture(file), record.drawing_text)
    write_text(out / "pickscores.json", json.dumps(scores, indent=1) + "\n")
    return {"PickScore": sum(scores.values()) / len(scores), "images": len(scores)}
