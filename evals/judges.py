"""Judges of generated images: each answers questions about a picture.

A judge has three methods: `answer(picture, questions)` gives one answer per question, `meanings`
the choice that each of them means, `all_correct` says whether the picture has no mistake at all.
The paper's is GPT-4o.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from transformers import AutoProcessor, CLIPModel

from evals.judge_models import ModelJudge, require_finite
from hermesflow.checkpoints import load_hf
from hermesflow.files import InputError
from hermesflow.records import Question, Record
from hermesflow.scoring import NOTHING, answer_questions, meanings


class ModelNames(NamedTuple):
    """The models that score generation benchmarks, by hub id or folder."""

    detector: str  # Mask2Former
    clip: str | None  # of geneval and clipscore
    vqa: str


def load_judge(name: str, model, match, max_new_tokens: int):
    """The judge `name`: toy, self (the policy `model`), or a transformers model by id or folder.

    match(answer, choices) -> the choice that an answer means; max_new_tokens: per answer of `self`.
    """
    if name == "toy":
        return ToyJudge()
    if name == "self":
        return SelfJudge(model, match, max_new_tokens)
    return ModelJudge(name, match, model.device)


class ToyJudge:
    """The toy world's oracle reads the pixels; its answers are exact and need no matcher."""

    def __init__(self):
        from toy import world  # here, so that other judges do not need the toy world

        self.world = world

    def answer(self, picture: Image.Image, questions: list[Question]) -> list[str]:
        return [self.world.answer(picture, q.question) for q in questions]

    def meanings(self, answers: list[str], questions: list[Question]) -> list[str]:
        return [a if a in q.choices else NOTHING for a, q in zip(answers, questions)]

    def all_correct(self, picture: Image.Image, record: Record, correct: list[bool]) -> bool:
        """Whether the picture is exactly the scene of the record's text.

        Raises InputError if the text is no caption of the toy world.
        """
        try:
            return self.world.judge(picture, record.drawing_text)["correct"]
        except ValueError as error:
            message = f"id {record.id!r}: {error}; --judge self knows any caption"
            raise InputError(message) from None


class SelfJudge:
    """The policy answers about its own pictures, as in stage 2 with --reencode."""

    def __init__(self, model, match, max_new_tokens: int):
        self.model = model
        self.match = match
        self.max_new_tokens = max_new_tokens

    def answer(self, picture: Image.Image, questions: list[Question]) -> list[str]:
        # a picture of another model may have another size; for the policy's own this is a copy
        side = self.model.image_size
        picture = ImageOps.fit(picture, (side, side), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]  # (1, 3, H, W)
        pixels = pixels.float() / 127.5 - 1
        return answer_questions(self.model, pixels, [questions], self.max_new_tokens)[0]

    def meanings(self, answers: list[str], questions: list[Question]) -> list[str]:
        return meanings(answers, questions, self.match)

    def all_correct(self, picture: Image.Image, record: Record, correct: list[bool]) -> bool:
        return all(correct)


class Clip:
    """Unit vectors of images and texts."""

    def __init__(self, name: str, device):
        self.name = name
        self.processor = load_hf(AutoProcessor, name)
        self.model = load_hf(CLIPModel, name).to(device).eval()

    @torch.inference_mode()
    def images(self, pictures: list[Image.Image]) -> torch.Tensor:
        """B pictures -> (B, D)."""
        inputs = self.processor(images=pictures, return_tensors="pt").to(self.model.device)
        return self.normalize(self.model.get_image_features(**inputs))

    @torch.inference_mode()
    def texts(self, texts: list[str]) -> torch.Tensor:
        """B texts -> (B, D); a text that is too long is cut."""
        inputs = self.processor(text=texts, return_tensors="pt", padding=True, truncation=True)
        return self.normalize(self.model.get_text_features(**inputs.to(self.model.device)))

    def normalize(self, features) -> torch.Tensor:
        # transformers 5 returns an output object, earlier versions the tensor itself
        features = getattr(features, "pooler_output", features)
        return F.normalize(require_finite(features, self.name), dim=-1)  # (B, D)
