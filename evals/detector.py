"""GenEval's detector without mmdet: Mask2Former for objects, CLIP for their colours."""

from functools import cache
from unittest.mock import patch

import torch
import torch.nn.functional as F
from PIL import Image
from transformers import Mask2FormerForUniversalSegmentation
# from the package itself, transformers 5.5 to 5.17 ask for torchvision
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.mask2former import modeling_mask2former

from evals.judges import Clip, require_finite
from hermesflow.checkpoints import load_hf

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
MMDET_SIZE = {"shortest_edge": 800, "longest_edge": 1333}  # the hub's default squashes to 384 x 384
GREY = "#999999"


def load_mask2former(name: str):
    """The segmentation model `name`, in evaluation mode.

    transformers builds the training loss with every Mask2Former, and the loss asks for scipy, which
    only its matching of predictions to targets calls. Detection computes no loss, so the check is
    off while the model is built, and only then.
    """
    with patch.object(modeling_mask2former, "requires_backends"):
        return load_hf(Mask2FormerForUniversalSegmentation, name).eval()


class Detector:
    """Objects in an image, and their colours. names: of the model's classes, in order."""

    def __init__(self, detector: str, clip: str, names: list[str], device):
        self.processor = load_hf(AutoImageProcessor, detector, size=MMDET_SIZE)
        self.model = load_mask2former(detector).to(device)
        self.clip = Clip(clip, device)
        self.name = detector
        self.names = names

    @torch.inference_mode()
    def objects(self, image: Image.Image, top: int = 100) -> list[dict]:
        """As mmdet: the best `top` of query × class, each {"class", "score", "box", "mask"}.

        score: class probability × mean mask probability inside the mask; box: (x0, y0, x1, y1) in
        pixels, x1 and y1 exclusive; mask: (H, W) bool. A query with an empty mask is left out.
        """
        inputs = self.processor(images=image, return_tensors="pt").to(self.model.device)
        out = self.model(**inputs)
        require_finite(out.class_queries_logits, self.name)
        require_finite(out.masks_queries_logits, self.name)
        classes = out.class_queries_logits[0].softmax(-1)[:, :-1]  # (Q, 80), without "nothing"
        values, index = classes.flatten().topk(min(top, classes.numel()))
        masks = out.masks_queries_logits  # (1, Q, h, w)
        masks = F.interpolate(masks, image.size[::-1], mode="bilinear", align_corners=False)[0]
        detections = []
        for value, i in zip(values.tolist(), index.tolist()):
            query, label = divmod(i, classes.shape[1])
            logits = masks[query]  # (H, W)
            mask = logits > 0
            if mask.any():
                score = value * logits[mask].sigmoid().mean().item()
                detections.append({"class": self.names[label], "score": score,
                                   "box": bounding_box(mask), "mask": mask.cpu()})
        return detections

    def color(self, image: Image.Image, detection: dict) -> str:
        """The nearest of COLORS in CLIP, of the crop of the object before a grey background."""
        grey = Image.new("RGB", image.size, GREY)
        mask = Image.fromarray(detection["mask"].numpy())
        cut = Image.composite(image, grey, mask).crop(detection["box"])
        similarity = self.prototypes(detection["class"]) @ self.clip.images([cut])[0]  # (10,)
        return COLORS[int(similarity.argmax())]

    @cache
    def prototypes(self, name: str) -> torch.Tensor:
        """(10, D) unit vectors of the colours of a class, each the mean of three texts."""
        means = []
        for color in COLORS:
            texts = [f"a photo of a {color} {name}", f"a photo of a {color}-colored {name}",
                     f"a photo of a {color} object"]
            means.append(self.clip.texts(texts).mean(0))  # (D,)
        return F.normalize(torch.stack(means), dim=-1)


def bounding_box(mask: torch.Tensor) -> tuple[int, int, int, int]:
    """(x0, y0, x1, y1) around the True pixels of (H, W); x1 and y1 exclusive."""
    rows, columns = torch.nonzero(mask, as_tuple=True)
    left, top = columns.min().item(), rows.min().item()
    return left, top, columns.max().item() + 1, rows.max().item() + 1
