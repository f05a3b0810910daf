"""The public benchmarks, and what decides the results of an evaluation.

Imports nothing heavy.
"""

from pathlib import Path

from evals.official import files_below
from hermesflow.contents import content
from hermesflow.options import BUILT_IN
from hermesflow.outputs import Output, read_mark, write_mark

# file names in this folder
UNDERSTANDING = ("pope", "mme", "vqav2", "gqa", "mmmu", "mmbench", "seedbench", "flickr30k")
GENERATION = ("geneval", "geneval2", "dpg", "t2i_compbench", "clipscore", "pickscore", "fid",
              "tifa")

# the models that the benchmarks are defined with
CLIP = {"geneval": "openai/clip-vit-large-patch14",  # the official colour classifier
        "clipscore": "openai/clip-vit-base-patch32",
        "pickscore": "yuvalkirstain/PickScore_v1"}
BLIP = "Salesforce/blip-vqa-capfilt-large"
VQA = {"dpg": BLIP, "t2i_compbench": BLIP, "geneval2": "Qwen/Qwen3-VL-8B-Instruct"}

# None: the gap protocol
DRAWING = ("steps", "guidance", "temperature", "anneal", "guidance_interval", "seed")
MODELS = {None: ("judge", "caption_scorer", "matcher"), "tifa": ("judge", "matcher"),
          "geneval": ("detector", "clip"), "dpg": ("vqa",), "clipscore": ("clip",),
          "geneval2": ("vqa",), "t2i_compbench": ("vqa",), "pickscore": ("clip",)}

COMPARED = (*DRAWING, *MODELS[None], "max_new_tokens", "dtype", "records")  # as --compare wants


# what 04_eval.py does, and the options that belong to it alone
SUBJECTS = {"records": ("questions", "image_folder", "skip", "limit"),
            "benchmark": ("data", "clip", "vqa"), "compare": ("across",), "report": ()}


def check_subject(parser, args) -> None:
    """Refuse options that say two things, or nothing."""
    named = [f"--{subject}" for subject in SUBJECTS if getattr(args, subject)]
    if len(named) != 1:
        said = " and ".join(named) or "nothing"
        parser.error(f"one of --{', --'.join(SUBJECTS)} is needed, not {said}")
    for subject, options in SUBJECTS.items():
        for option in options:
            if getattr(args, option) and not getattr(args, subject):
                parser.error(f"--{option.replace('_', '-')} goes with --{subject}")
    if args.benchmark and not args.data:
        parser.error("--benchmark needs --data, the folder of its official files")
    if not args.report and not args.out:
        parser.error(f"{named[0]} needs --out")
    if args.benchmark == "tifa" and args.judge == "toy":
        parser.error("--benchmark tifa needs another --judge: toy answers about toy images alone")


def deciding(benchmark: str | None) -> set[str]:
    """The options that change the results, besides the evaluated model."""
    options = {"benchmark", "dtype", *MODELS.get(benchmark, ())}
    if benchmark not in UNDERSTANDING:
        options |= set(DRAWING)
    if benchmark in (None, "tifa", *UNDERSTANDING):
        options |= {"max_new_tokens"}
    return options


def judging_models(benchmark: str | None, options: dict) -> dict[str, str]:
    """option -> the model that it names, of those that judge."""
    named = {name: options[name] for name in MODELS.get(benchmark, ())}
    return {name: value for name, value in named.items() if value not in BUILT_IN.get(name, ())}


def scored_images(benchmark: str | None, out: Path) -> str | None:
    """The content of the images that a benchmark of generation scores: drawn, or put there."""
    folder = out / "images"
    if benchmark not in GENERATION or not folder.is_dir():
        return None
    return content(lambda: files_below(folder))


def note_scored_images(output: Output) -> None:
    """Remember which images were scored, so that a rerun notices if others have replaced them."""
    images = scored_images(output.args["benchmark"], output.folder)
    if images is not None:
        mark = read_mark(output)
        mark["derived"]["images"] = images
        write_mark(output, mark)
