"""Options of training alone: its length, adapters, and trackers. Imports nothing heavy."""

import argparse
import importlib.util
import math
import os
from pathlib import Path

from hermesflow.files import InputError
from hermesflow.jsonl import lines_of
from hermesflow.options import above_zero, check_batch, integer, number

TRACKERS = ("aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio",
            "wandb")  # accelerate's: names of modules and of pip packages
SCHEDULES = ("cosine", "linear", "constant_with_warmup")
WEIGHT = number(0, 1e6)  # of a term of the loss


class Epochs(float):
    """A number of passes over the pairs, in the place of a number of steps."""


def epochs(text: str) -> Epochs:
    return Epochs(above_zero(1e6)(text))


def number_of_steps(length: int | Epochs, pairs: Path, batch: int) -> int:
    """length: steps, or passes over the lines of `pairs`. Raises InputError if it is absurd."""
    steps = length
    if isinstance(length, Epochs):
        records = sum(1 for (line,) in lines_of(pairs) if line.strip())
        steps = max(1, math.ceil(length * records / batch))
    if steps * batch > 10**8:
        raise InputError(f"--batch {batch}: {steps} steps of it are more than 10^8 records")
    return steps


def tracker(text: str) -> str:
    """One of accelerate's trackers that is installed."""
    if text not in TRACKERS:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(TRACKERS)}")
    if importlib.util.find_spec(text) is None:
        raise argparse.ArgumentTypeError(f"{text} is not installed: pip install {text}")
    return text


def lora_rank(text: str) -> int:
    """The rank of adapters, which peft injects."""
    rank = integer(1, 2**16)(text)
    if importlib.util.find_spec("peft") is None:
        raise argparse.ArgumentTypeError("peft is not installed: pip install peft")
    return rank


def check_training(parser, args) -> None:
    """Refuse a batch that cannot be shared out, weights that leave nothing to learn, and previews
    of a sharded policy.
    """
    check_batch(parser, args.batch, args.micro_batch)
    if args.preview_every and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        parser.error("--preview-every draws with whole weights, which sharding (FSDP) leaves on no "
                     "process")
    if not args.und * (args.beta + args.nll_und) + args.gen * (args.beta + args.nll_gen):
        parser.error("--und, --gen, --beta, --nll-und and --nll-gen leave nothing to learn")
