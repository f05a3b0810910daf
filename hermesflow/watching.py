"""What is watched of training: figures and their guards, gradients, previews, trackers.

Nothing of it changes the weights.
"""

import json
import math
from collections.abc import Iterable
from copy import copy
from functools import partial
from pathlib import Path
from uuid import uuid4

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch.distributed.tensor import DTensor

from hermesflow.files import InputError, claim, holdings, read_text, write_text, writing
from hermesflow.options import ImageSampling
from hermesflow.outputs import Output
from hermesflow.pictures import image_grid, save_picture, to_pil
from hermesflow.sampling import stable_seed
from hermesflow.training import ReferenceFile

ROUNDING = {"no": 1e-4, "bf16": 1e-2, "fp16": 2e-3}  # relative, of log-probs computed twice
LOWEST_SCALE = 2.0**-4  # of float16 gradients: it starts at 2^16, and an overflow halves it
PREVIEWS = 8  # different texts on a sheet
PREVIEW_STEPS = 16  # of decoding


def due(step: int, every: int) -> bool:
    """Whether something that is done every so many steps (0: never) is due after `step` of them."""
    return every > 0 and step % every == 0


# ----------------------------------------------------------------------------------------- figures


def figures(half: str, loss, nll, delta, logps, reference, beta: float) -> dict:
    """What to watch of one half: falling log-probs of winners are likelihood displacement.

    logps: sums and counts (B, 2) of win and lose; reference: its sums.
    """
    change = (logps.sums - reference).mean(0)  # (2,)
    return {f"loss_{half}": loss, f"nll_{half}": nll, f"margin_{half}": beta * delta.mean(),
            f"accuracy_{half}": (delta > 0).float().mean(),
            f"win_change_{half}": change[0], f"lose_change_{half}": change[1],
            f"win_length_{half}": logps.counts[:, 0].mean(),
            f"lose_length_{half}": logps.counts[:, 1].mean()}


def distance(policy: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """How far log-probs have gone from the reference's, relative to their size."""
    return (policy - reference).abs().mean() / reference.abs().mean().clamp(min=1)


def gradient_norm(net: torch.nn.Module, accelerator: Accelerator) -> float:
    """The norm of the gradient that all processes have, without float16's scale."""
    # the cosine of two halves is a small difference of large squares
    dtype = torch.float32 if accelerator.device.type == "mps" else torch.float64
    norms = []
    for p in net.parameters():
        if p.grad is not None:
            norm = torch.linalg.vector_norm(p.grad, dtype=dtype)
            norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    scale = accelerator.scaler.get_scale() if accelerator.scaler else 1.0
    return torch.linalg.vector_norm(torch.stack(norms)).item() / scale


def half_norms(net, optimizer, gradient_of, loss_fn, accelerator: Accelerator) -> list[float]:
    """Norms of a step's gradient of each half alone, understanding and generation, which costs two
    more passes over its micro-batches and no memory.

    gradient_of(loss_fn): adds the gradient of the step to those of the parameters.
    """
    norms = []
    for other in ("gen_weight", "und_weight"):
        gradient_of(loss_fn=partial(loss_fn, **{other: 0.0}))
        norms.append(gradient_norm(net, accelerator))
        optimizer.zero_grad()
    return norms


def gradient_figures(net, alone: list[float], accelerator: Accelerator) -> dict[str, float]:
    """Norms of the halves' gradients u and g, and their cosine, by |u + g|² = |u|² + |g|² + 2 u·g.

    u + g is the gradient that the parameters have. The cosine is 0 where a half has none.
    """
    und, gen = alone
    cosine = 0.0
    if und and gen:
        whole = gradient_norm(net, accelerator)
        cosine = (whole**2 - und**2 - gen**2) / (2 * und * gen)
    return {"grad_norm_und": und, "grad_norm_gen": gen, "grad_cosine": min(1.0, max(-1.0, cosine))}


def mean_figures(watched: list[dict[str, torch.Tensor]], norms: dict[str, float], optimizer,
                 accelerator: Accelerator) -> dict[str, float]:
    """Of the micro-batches of a step, over all processes; and norms of the gradient."""
    rows = [torch.stack([v.detach().float() for v in log.values()]) for log in watched]
    mean = accelerator.reduce(torch.stack(rows).mean(0), "mean").tolist()
    log = {**dict(zip(watched[0], mean)), **norms}
    scaler = accelerator.scaler
    if scaler is not None:  # of float16: if gradients overflow, the step is skipped
        log |= {"skipped": float(optimizer.step_was_skipped), "scale": scaler.get_scale()}
        if optimizer.step_was_skipped:
            log |= dict.fromkeys(norms, 0.0)
    return log


def assert_healthy(log: dict, ids: list[str], reference: ReferenceFile) -> None:
    """Abort on NaN or infinity, on lasting overflows, or if the reference is of another policy."""
    step = f"step {log['step']}"
    wrong = [f"{name} {value}" for name, value in log.items() if not math.isfinite(value)]
    if wrong:
        raise InputError(f"{step}: {', '.join(wrong)}; records {', '.join(ids)}; the last state is "
                         "kept, a lower --lr or --precision no may help")
    if log.get("scale", 1.0) <= LOWEST_SCALE:
        raise InputError(f"{step}: gradients overflow even if they are scaled by {log['scale']}; "
                         "the last state is kept, --precision bf16 or no may help")
    rounding = ROUNDING[reference.accelerator.mixed_precision]
    if log["step"] == 0 and reference.own and log["distance"] > rounding:
        raise InputError(f"{step}: log-probs are {log['distance']:.1e} of their size away from "
                         f"{reference.path}, which is of another policy (use --overwrite)")


# -------------------------------------------------------------------------------------------- log


def start_trackers(output: Output, step: int, accelerator: Accelerator) -> None:
    """Begin to log to what --track names, if it does, or continue at `step`; files go into OUT.

    wandb, swanlab and trackio continue the run of OUT, tensorboard and dvclive its files.
    """
    if not accelerator.log_with or not accelerator.is_main_process:
        return
    name = str(output.folder)
    folder = output.folder.absolute()
    same = {"id": run_id(output.folder), "resume": "allow"}
    settings = {"wandb": {"name": name, "dir": str(folder), **same},
                "swanlab": {"experiment_name": name, "logdir": str(folder / "swanlog"), **same},
                "trackio": {"name": name, "resume": "allow"},
                "tensorboard": {"purge_step": step},
                "dvclive": {"dir": str(folder / "dvclive"), "resume": step > 0},
                "mlflow": {"run_name": name}}
    config = {option: str(value) for option, value in output.args.items()}
    accelerator.init_trackers("hermesflow", config, settings)


def run_id(out: Path) -> str:
    """The run of an output folder at a tracker; --overwrite begins another."""
    file = out / "run_id"
    if not file.exists():
        write_text(file, uuid4().hex[:21])  # swanlab wants 21 characters
    return read_text(file)


def write_log(log: dict, accelerator: Accelerator, out: Path) -> None:
    """Append a step to OUT/train.jsonl, and to the trackers."""
    file = out / "train.jsonl"
    for holding in holdings(file):
        holding.check()  # on all processes: none should wait for one that has stopped
    log = {k: v for k, v in log.items() if k != "distance"}
    accelerator.log({k: v for k, v in log.items() if k != "step"}, step=log["step"])
    if accelerator.is_main_process:
        claim(file)
        with writing(file), open(file, "a", encoding="utf-8") as lines:
            lines.write(json.dumps(log, allow_nan=False) + "\n")


def log_picture(name: str, picture: Image.Image, step: int, accelerator: Accelerator) -> None:
    """To the trackers that show pictures."""
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            pixels = np.asarray(picture)[None]  # (1, H, W, 3)
            tracker.log_images({name: pixels}, step=step, dataformats="NHWC")
        elif tracker.name in ("wandb", "swanlab"):
            tracker.log_images({name: [picture]}, step=step)


# --------------------------------------------------------------------------------------- previews


class Previews:
    """OUT/previews/000100.png: what the policy draws after 100 updates, on the main process.

    The texts are the first different ones of the pairs. Each has its seed, of (seed, id).
    """

    def __init__(self, model, pairs: Iterable, every: int, guidance_scale: float, seed: int,
                 accelerator: Accelerator, out: Path):
        self.model = copy(model)
        self.model.net = accelerator.unwrap_model(model.net)
        self.every = every  # steps; 0: never
        self.sampling = ImageSampling(PREVIEW_STEPS, guidance_scale)
        self.accelerator = accelerator
        self.folder = out / "previews"
        self.seeds = {}  # text -> seed, on the main process
        if not every or not accelerator.is_main_process:
            return
        model.vq.to(accelerator.device)
        for pair in pairs:
            self.seeds.setdefault(pair.drawing_text, stable_seed(seed, pair.id, "preview"))
            if len(self.seeds) == PREVIEWS:
                break

    def draw(self, step: int) -> None:
        """After so many updates, if it is time to and has not been done before an interruption."""
        file = self.folder / f"{step:06d}.png"
        if not self.seeds or not due(step, self.every) or file.exists():
            return
        net = self.model.net
        training = net.training
        net.eval()  # checkpointed layers keep no keys and values
        with self.accelerator.autocast():
            codes = self.model.generate_images([*self.seeds], [*self.seeds.values()], self.sampling)
        net.train(training)
        pictures = to_pil(self.model.decode_image(codes))
        sheet = image_grid([[picture] for picture in pictures], [*self.seeds], columns=4)
        save_picture(sheet, file)
        log_picture("preview", sheet, step, self.accelerator)
