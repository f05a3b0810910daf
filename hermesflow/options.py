"""Command-line options that several scripts share, and the ranges of their values.

Imports nothing heavy, so that --help and a mistake are answered at once.
"""

import argparse
import math
import os
import re
import sys
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path

from hermesflow.files import InputError, read_object
from hermesflow.hub import find, require

# what options name that is no model
BUILT_IN = {"judge": ("toy", "self"), "caption_scorer": ("token-f1",), "matcher": ("text",)}
IMAGE_TOKENIZER = "showlab/magvitv2"  # where a checkpoint has none of its own
TEXT_TOKENIZER = "microsoft/phi-1_5"
# model_type in config.json -> the module that loads such a checkpoint; all others are Show-o
BACKBONES = {"janus": "hermesflow.janus"}


@dataclass
class ImageSampling:
    """How images are decoded; the defaults are the paper's.

    The last is an approximation, off by default.
    """

    steps: int = 50
    guidance_scale: float = 5.0  # classifier-free: (1 + g)·cond − g·uncond
    temperature: float = 1.0  # of the confidence noise
    anneal: str = "compound"  # the original: times 1 − (step+1)/steps at every step; or "maskgit"
    guidance_interval: tuple[float, float] = (0.0, 1.0)  # guidance in this part of the steps only


# ------------------------------------------------------------------------------------------- values


def number_type(convert, low, high, what: str):
    """A function of an option's text that refuses what is no such number, or out of range."""

    def parse(text: str):
        try:
            value = convert(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}") from None
        # a comparison with NaN is false
        if not low <= value <= high:
            upto = " or more" if value < low and high >= 2**31 - 1 else f" to {high:g}"
            least = "above 0" if 0 < low < 1e-300 else f"{low:g}"
            raise argparse.ArgumentTypeError(f"{text} should be {least}{upto}")
        return value

    return parse


def integer(low: int, high: int = 2**31 - 1):
    return number_type(int, low, high, "a whole number")


def number(low: float, high: float):
    return number_type(float, low, high, "a number")


def above_zero(high: float):
    return number(math.nextafter(0, 1), high)


COUNT = integer(1)
SEED = integer(0, 2**63 - 1)
SHARE = number(0, 1)
GUIDANCE = number(0, 1000)  # more is the same choice, until it overflows


def folder(text: str) -> Path:
    """A path; an unset variable of a shell is none."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty")
    return Path(text)


def device(text: str) -> str:
    if not re.fullmatch(r"(cpu|cuda|mps|xpu|npu)(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not cpu, cuda, cuda:1, …")
    return text


class Interval(argparse.Action):
    """Two numbers, the first below the second."""

    def __call__(self, parser, namespace, values, option=None):
        if values[0] >= values[1]:
            parser.error(f"argument {option}: the first share should be below the second")
        setattr(namespace, self.dest, tuple(values))


# ------------------------------------------------------------------------------------------ parsing


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The docstring as it is, and every default that the help does not state in brackets."""

    def _get_help_string(self, action):
        no_default = action.default is None or action.default is False
        if no_default or (action.help or "").endswith("]"):
            return action.help
        return super()._get_help_string(action)


class StageParser(argparse.ArgumentParser):
    """Mistakes end in one line and exit code 2."""

    def error(self, message: str):
        self.exit(2, f"error: {' '.join(message.split())} (--help explains)\n")

    def parse_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        for text in (*args, os.getcwd()):
            try:
                text.encode()
            except UnicodeEncodeError:
                self.error(f"{text!r} is not UTF-8")
        return super().parse_args(args, namespace)


def stage_parser(description: str) -> StageParser:
    return StageParser(description=description, formatter_class=HelpFormatter, allow_abbrev=False)


def process_count() -> int:
    """How many processes the launcher (torchrun, accelerate launch) has started."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def check_batch(parser: StageParser, batch: int, micro_batch: int) -> None:
    """Refuse a step that is no whole number of micro-batches of all processes."""
    processes = process_count()
    if batch % (micro_batch * processes):
        several = f" times {processes} processes" if processes > 1 else ""
        parser.error(f"--batch {batch} is not a multiple of --micro-batch {micro_batch}{several}")


def add_dry_run(parser: StageParser) -> None:
    parser.add_argument("--dry-run", action="store_true",
        help="check options, number of processes and whether all models can be found, and exit")


def unless_dry_run(args, **models: str | None):
    """The options, which no longer hold --dry-run; where it was given, the end.

    models: option -> hub id or folder, or a word of ours, that it names.
    """
    if vars(args).pop("dry_run"):
        for option, name in models.items():
            try:
                require(None if name in BUILT_IN.get(option, ()) else name)
            except InputError as error:
                print(f"error: --{option.replace('_', '-')}: {error}", file=sys.stderr)
                sys.exit(2)
        sys.exit()
    return args


def add_record_options(group, questions: bool = True) -> None:
    add = group.add_argument
    add("--records", type=folder,
        help="our JSONL, the original's initial_data.json, annotations of JourneyDB or COCO, or a "
             "folder with metadata.csv or metadata.jsonl")
    if questions:
        add("--questions", type=folder,
            help="questions.jsonl of hermesflow.questions, or the original's vqa_data.json: "
                 "joined to the records by id")
    add("--image-folder", help="where relative names of images are looked up [beside the records]")
    add("--skip", type=integer(0), default=0, help="leave out the first N records of the file")
    add("--limit", type=COUNT, help="only the next N records; more of them continue from fewer")


def part_of(args) -> dict:
    """Which records of the file are meant, for `read_records` and `record_items`."""
    return {"image_folder": args.image_folder, "skip": args.skip, "limit": args.limit}


def add_checkpoint_options(group) -> None:
    add = group.add_argument
    add("--model", default="toy/base", help="folder or hub id, such as showlab/show-o-512x512")
    add("--image-tokenizer", help=f"folder or hub id [the checkpoint's own, or {IMAGE_TOKENIZER}]")
    add("--text-tokenizer", help=f"folder or hub id [the checkpoint's own, or {TEXT_TOKENIZER}]")


def add_model_options(parser) -> None:
    group = parser.add_argument_group("model")
    add_checkpoint_options(group)
    add = group.add_argument
    add("--device", type=device, help="cpu, cuda, cuda:1, … [what accelerate finds]")
    add("--dtype", default="float32", choices=["float32", "bfloat16", "float16"],
        help="of the backbone")


def model_inputs(args) -> dict:
    """What a checkpoint consists of, for `Output.inputs`; its own tokenizers are part of it."""
    whole = is_whole(args.model)
    own_image = whole or (Path(args.model) / "magvitv2").is_dir()
    own_text = whole or (Path(args.model) / "tokenizer").is_dir()
    return {"model": args.model,
            "image_tokenizer": args.image_tokenizer or (None if own_image else IMAGE_TOKENIZER),
            "text_tokenizer": args.text_tokenizer or (None if own_text else TEXT_TOKENIZER)}


def is_whole(model: str) -> bool:
    """Whether a checkpoint holds all its parts, as those of other backbones than Show-o do."""
    with suppress(InputError):  # of a name that is nothing: said when it is loaded
        file = os.path.join(model, "config.json")
        file = file if os.path.exists(model) else find(model, "config.json")
        return file is not None and str(read_object(file).get("model_type")) in BACKBONES
    return False


def add_sampling_options(parser) -> None:
    default = ImageSampling()
    group = parser.add_argument_group("image decoding")
    add = group.add_argument
    add("--steps", type=COUNT, default=default.steps, help="decoding steps per image")
    add("--guidance", type=GUIDANCE, default=default.guidance_scale,
        help="(1 + g)·cond − g·uncond")
    add("--temperature", type=number(0, 1000), default=default.temperature,
        help="of the confidence noise, or, of autoregressive images, of the softmax")
    add("--anneal", choices=["compound", "maskgit"], default=default.anneal,
        help="of that temperature: as the original, or as MaskGIT")
    add("--guidance-interval", type=SHARE, nargs=2, metavar="SHARE", action=Interval,
        default=default.guidance_interval,
        help="approximation: guidance only from this to that share of the steps")


def sampling_from(args) -> ImageSampling:
    """The decoding options of a parsed command line."""
    values = {f.name: getattr(args, f.name) for f in fields(ImageSampling) if hasattr(args, f.name)}
    return ImageSampling(**values, guidance_scale=args.guidance)
