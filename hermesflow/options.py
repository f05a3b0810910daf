"""Command-line options that several stages share.

Imports nothing heavy, so that --help answers at once.
"""

import argparse
from dataclasses import dataclass, fields


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


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The docstring as it is, and every default that the help does not state in brackets."""

    def _get_help_string(self, action):
        no_default = action.default is None or action.default is False
        if no_default or (action.help or "").endswith("]"):
            return action.help
        return super()._get_help_string(action)


def stage_parser(description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=description, formatter_class=HelpFormatter)


def add_model_options(parser) -> None:
    group = parser.add_argument_group("model")
    add = group.add_argument
    add("--model", default="toy/base", help="folder or hub id, such as showlab/show-o-512x512")
    add("--image-tokenizer", help="folder or hub id [the checkpoint's own, or showlab/magvitv2]")
    add("--text-tokenizer", help="folder or hub id [the checkpoint's own, or microsoft/phi-1_5]")
    add("--device", help="cpu, cuda, cuda:1, … [what accelerate finds]")
    add("--dtype", default="float32", choices=["float32", "bfloat16", "float16"],
        help="of the backbone")


def model_inputs(args) -> dict:
    """What a checkpoint consists of, for `prepare_output`."""
    return {"model": args.model, "image tokenizer": args.image_tokenizer,
            "text tokenizer": args.text_tokenizer}


def add_sampling_options(parser) -> None:
    default = ImageSampling()
    group = parser.add_argument_group("image decoding")
    add = group.add_argument
    add("--steps", type=int, default=default.steps, help="decoding steps per image")
    add("--guidance", type=float, default=default.guidance_scale, help="(1 + g)·cond − g·uncond")
    add("--temperature", type=float, default=default.temperature, help="of the confidence noise")
    add("--anneal", choices=["compound", "maskgit"], default=default.anneal,
        help="of that temperature: as the original, or as MaskGIT")
    add("--guidance-interval", type=float, nargs=2, metavar="SHARE",
        default=default.guidance_interval,
        help="approximation: guidance only from this to that share of the steps")


def sampling_from(args) -> ImageSampling:
    """The decoding options of a parsed command line."""
    values = {f.name: getattr(args, f.name) for f in fields(ImageSampling) if hasattr(args, f.name)}
    return ImageSampling(**values, guidance_scale=args.guidance)


def require_positive(parser, args, *names: str) -> None:
    """End with a usage error that names the first of these options that is below 1."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
