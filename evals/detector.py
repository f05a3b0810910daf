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
        self.processor = load_hf(AutoImageProcessor, detector, size=MMDET_SIZE, size_divisor=0)
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
        height, width = resized(image.size[::-1])
        size = {"height": height, "width": width}
        inputs = self.processor(images=image, size=size, return_tensors="pt")
        pixels = inputs["pixel_values"].to(self.model.device)  # (1, 3, height, width)
        # the processor would stretch to multiples of 32; mmdet pads
        pixels = F.pad(pixels, (0, -width % 32, 0, -height % 32))
        out = self.model(pixel_values=pixels)
        require_finite(out.class_queries_logits, self.name)
        require_finite(out.masks_queries_logits, self.name)
        classes = out.class_queries_logits[0].softmax(-1)[:, :-1]  # (Q, 80), without "nothing"
        values, index = classes.flatten().topk(min(top, classes.numel()))
        # up to the padded input, without the padding, then to the image
        masks = bilinear(out.masks_queries_logits, pixels.shape[-2:])
        masks = bilinear(masks[..., :height, :width], image.size[::-1])[0]  # (Q, H, W)
        detections = []
        for value, i in zip(values, index.tolist()):
            query, label = divmod(i, classes.shape[1])
            logits = masks[query]  # (H, W)
            mask = logits > 0
            if mask.any():
                mean = logits[mask].sigmoid().sum() / (mask.sum() + 1e-6)
                score = (value * mean).item()  # a float32
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


def resized(size: tuple[int, int]) -> tuple[int, int]:
    """As mmcv: short side to 800, unless the long one gets more than 1333; halves round up."""
    scale = min(MMDET_SIZE["longest_edge"] / max(size), MMDET_SIZE["shortest_edge"] / min(size))
    return tuple(int(side * scale + 0.5) for side in size)


def bilinear(masks: torch.Tensor, size) -> torch.Tensor:
    """(1, Q, h, w) to (1, Q, *size)."""
    return F.interpolate(masks, tuple(size), mode="bilinear", align_corners=False)


def bounding_box(mask: torch.Tensor) -> tuple[int, int, int, int]:
    """(x0, y0, x1, y1) around the True pixels of (H, W); x1 and y1 exclusive."""
    rows, columns = torch.nonzero(mask, as_tuple=True)
    left, top = columns.min().item(), rows.min().item()
    return left, top, columns.max().item() + 1, rows.max().item() + 1


def iou(a, b) -> float:
    """Intersection over union of two boxes, which include their last pixel."""
    def area(x0, y0, x1, y1):
        return max(x1 - x0 + 1, 0) * max(y1 - y0 + 1, 0)

    both = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    return both / (area(*a) + area(*b) - both or 1)
