"""A stage at the published size: where its time and memory go. bench/rehearsal.sh runs all four.

    python bench/rehearsal.py --make runs/rehearsal                   # random weights, 8 GB
    python bench/rehearsal.py --log LOG --stage 01_sample.py --records …
    python bench/rehearsal.py --table LOG

--make writes Show-o at 512 px with random weights in the published layout (float32, shards of 5 GB
and their index), MAGVIT-v2, two encoders of the sizes of bert-large and mpnet-base, and records.
A stage runs as its command does. The functions at the borders of its phases are replaced by ones
that take the time, so a phase is what is inside them, and not inside another one:

    start      interpreter and imports
    inputs     records are read, inputs hashed and compared with what OUT was made from
    loading    weights and tokenizers
    work       the rest
    writing    results, pictures, checkpoints

Peaks are of resident memory, code and mapped files with it, as Linux counts it.
"""

import json
import re
import subprocess
import sys
import time
from argparse import REMAINDER, SUPPRESS
from functools import wraps
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from hermesflow.options import COUNT, folder, stage_parser

PHASES = ("start", "inputs", "loading", "work", "writing")
# module:function -> the phase that it is; the first ones are there before torch is imported
LIGHT = {
    "hermesflow.outputs:complete": "inputs", "hermesflow.outputs:prepare": "inputs",
    "hermesflow.inputs:read_records": "inputs", "hermesflow.jsonl:read_jsonl": "inputs",
    "hermesflow.jsonl:write_jsonl": "writing", "hermesflow.outputs:finish": "writing",
    "hermesflow.outputs:run_main": "work",
}
HEAVY = {
    "model:load": "loading", "model:load_from": "loading", "model:save": "writing",
    "model:Model.decode_image": "work", "hermesflow.scoring:caption_scorer": "loading",
    "hermesflow.scoring:answer_matcher": "loading", "hermesflow.tables:write_table": "writing",
    "hermesflow.pictures:save_picture": "writing", "hermesflow.runs:Parts.append": "writing",
    "hermesflow.states:State.save": "writing",
}
SHARD = 5 * 10**9  # bytes, as transformers splits
ENCODERS = {"bert": (1024, 24, 16), "mpnet": (768, 12, 12)}  # width, layers, heads
CAPTIONS = ("an old fisherman mends a blue net beside his red boat at dawn",
            "two small blue squares left of a big red ring")
QUESTIONS = ("is there a boat?", "is the net blue?", "is it dawn?", "is there a ring?")


def parse_args(argv=None):
    parser = stage_parser(__doc__)
    add = parser.add_argument
    add("--make", type=folder, metavar="FOLDER", help="write checkpoint, encoders and records")
    add("--records", type=COUNT, default=2, help="that are written")
    add("--log", type=Path, help="where a stage's figures are added")
    add("--table", type=Path, metavar="LOG", help="print its figures")
    add("--stage", nargs=REMAINDER, help="a stage and its options")
    add("--figures", type=Path, help=SUPPRESS)  # the process of the stage itself
    return parser.parse_args(argv)


# ------------------------------------------------------------------------------- inside the process


class Phases:
    """Seconds of CPU and of the clock, and peak bytes of each phase; the innermost one counts."""

    def __init__(self):
        self.figures = {name: [0.0, 0.0, 0] for name in PHASES}
        self.now = ["start"]
        self.cpu = 0.0  # of this process, from its start
        self.clock = time.perf_counter()

    def note(self) -> None:
        """What has passed since the last call belongs to the phase that it is now."""
        figures = self.figures[self.now[-1]]
        cpu, clock = time.process_time(), time.perf_counter()
        figures[0] += cpu - self.cpu
        figures[1] += clock - self.clock
        figures[2] = max(figures[2], peak_bytes())
        self.cpu, self.clock = cpu, clock

    def during(self, phase: str, function):
        @wraps(function)
        def timed(*args, **kwargs):
            self.note()
            self.now.append(phase)
            try:
                return function(*args, **kwargs)
            finally:
                self.note()
                self.now.pop()

        return timed

    def replace(self, functions: dict[str, str]) -> None:
        """Time these functions. Ends with one line where a name is no longer there."""
        for name, phase in functions.items():
            module, _, path = name.partition(":")
            *owners, last = path.split(".")
            owner = import_module(module)
            for part in owners:
                owner = getattr(owner, part, None)
            if not callable(getattr(owner, last, None)):
                sys.exit(f"error: {name} is no longer there; {__file__} names it")
            setattr(owner, last, self.during(phase, getattr(owner, last)))


def peak_bytes() -> int:
    """The peak of resident memory since the last call."""
    status = Path("/proc/self/status").read_text()
    Path("/proc/self/clear_refs").write_text("5")  # the next peak begins here
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])


def run_stage(script: str, options: list[str], figures: Path) -> None:
    """Run a stage in this process as its command does, and write the figures of its phases."""
    import runpy

    phases = Phases()
    phases.replace(LIGHT)
    outputs = import_module("hermesflow.outputs")
    complete = outputs.complete

    def complete_or_not(output) -> bool:  # before the stage's heavy imports
        nothing_to_do = complete(output)
        if not nothing_to_do and "model" not in sys.modules:
            phases.during("start", phases.replace)(HEAVY)
            multiply_in_float32()
        return nothing_to_do

    outputs.complete = complete_or_not
    sys.argv = [script, *options]
    sys.path[0] = str(ROOT)
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        phases.note()
        figures.write_text(json.dumps(phases.figures | {"device": device_bytes()}))


def device_bytes() -> int:
    torch = sys.modules.get("torch")
    return torch.cuda.max_memory_allocated() if torch and torch.cuda.is_available() else 0


def multiply_in_float32() -> None:
    """Products of bfloat16 on a processor that has none: as exact, and six times as fast."""
    import torch
    import torch.nn.functional as F

    if torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported():
        return
    linear = F.linear

    class Linear(torch.autograd.Function):
        """It keeps what the product of bfloat16 keeps, and no copies of weights in float32."""

        @staticmethod
        def forward(ctx, x, weight, bias):
            ctx.save_for_backward(x, weight)
            return linear(x.float(), weight.float(), bias).to(x.dtype)

        @staticmethod
        def backward(ctx, grad):
            x, weight = ctx.saved_tensors
            grads = [None, None, None]
            if ctx.needs_input_grad[0]:
                grads[0] = (grad.float() @ weight.float()).to(x.dtype)
            if ctx.needs_input_grad[1]:
                rows = grad.flatten(0, -2).float().T @ x.flatten(0, -2).float()
                grads[1] = rows.to(weight.dtype)
            if ctx.needs_input_grad[2]:
                grads[2] = grad.flatten(0, -2).float().sum(0)
            return tuple(grads)

    def in_float32(x, weight, bias=None):
        autocast = torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if autocast else x.dtype
        if dtype != torch.bfloat16 or x.numel() < 32 * x.shape[-1]:
            return linear(x, weight, bias)
        with torch.autocast("cpu", enabled=False):
            bias = None if bias is None else bias.float()
            return Linear.apply(x.to(dtype), weight.to(dtype), bias)

    F.linear = in_float32


# ------------------------------------------------------------------------------ outside the process


def measure(command: list[str], log: Path) -> None:
    """Run a stage in a process of its own and add its figures to a log; ends as the stage does."""
    figures = log.with_suffix(".figures")
    own = [sys.executable, __file__, "--figures", figures, "--stage", *command]
    start = time.perf_counter()
    done = subprocess.run(list(map(str, own)))
    seconds = time.perf_counter() - start
    if done.returncode:
        sys.exit(done.returncode)
    phases = json.loads(figures.read_text())
    figures.unlink()
    device = phases.pop("device")
    # what the process could not see of itself: its first moments and its last
    phases["start"][1] += seconds - sum(figures[1] for figures in phases.values())
    again = not phases["loading"][1]
    untimed = [name for name in PHASES if not again and not phases[name][1]]
    if untimed:
        sys.exit(f"error: {command[0]} has no {untimed[0]}; its phases are those of {__file__}?")
    with open(log, "a") as file:
        file.write(json.dumps({"stage": Path(command[0]).stem, "again": again, "phases": phases,
                               "device": device}) + "\n")


def table(log: Path) -> str:
    """Seconds of CPU / by the clock, and GB; a run that was skipped is a column of the first."""
    runs = [json.loads(line) for line in log.read_text().splitlines()]
    skipped = {run["stage"]: total(run["phases"]) for run in runs if run["again"]}
    lines = [f"| CPU s / clock s | {' | '.join(PHASES)} | all | again | peak | of loading |",
             "|---" * (len(PHASES) + 5) + "|"]
    for run in runs:
        if run["again"]:
            continue
        phases = run["phases"]
        seconds = [pair(*phases[name][:2]) for name in PHASES]
        peak = f"{max(p[2] for p in phases.values()) / 1e9:.1f} GB"
        if run["device"]:
            peak += f", GPU {run['device'] / 1e9:.1f} GB"
        again = pair(*skipped[run["stage"]]) if run["stage"] in skipped else ""
        cells = [*seconds, pair(*total(phases)), again, peak,
                 f"{phases['loading'][2] / 1e9:.1f} GB"]
        lines.append(f"| {run['stage']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def total(phases: dict) -> tuple[float, float]:
    return sum(p[0] for p in phases.values()), sum(p[1] for p in phases.values())


def pair(cpu: float, clock: float) -> str:
    return f"{cpu:.1f} / {clock:.1f}"


# --------------------------------------------------------------------------------- what it runs on


def make(out: Path, records: int) -> None:
    """OUT/show-o, OUT/magvitv2, OUT/bert, OUT/mpnet and OUT/records, all random, from one seed."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizer

    from bench.bench import random_model
    from hermesflow.magvit import Magvit, MagvitConfig

    model = random_model("1.3b", "cpu", torch.float32)
    config = model.config | {"_class_name": "Showo", "w_clip_vit": False,
                             "llm_model_path": "microsoft/phi-1_5",
                             "mask_token_id": model.tokens.mask}
    write_published(out / "show-o", config, model.net.state_dict(), SHARD)
    del model

    torch.manual_seed(0)
    vq = Magvit(MagvitConfig())
    write_published(out / "magvitv2", vars(vq.config), vq.state_dict(), SHARD)
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] yes no a big red ring".split()
    for name, (width, layers, heads) in ENCODERS.items():
        sizes = BertConfig(hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
                           intermediate_size=4 * width)
        BertModel(sizes).save_pretrained(out / name)
        vocabulary = out / name / "vocab.txt"
        vocabulary.write_text("\n".join(words) + "\n")
        BertTokenizer(str(vocabulary)).save_pretrained(out / name)
    write_records(out / "records", records)


def write_published(out: Path, config: dict, weights: dict, shard_bytes: int) -> None:
    """config.json and pytorch_model.bin; in shards with an index, if it is larger than one."""
    import torch

    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    shards = [{}]
    size = 0
    for name, value in weights.items():
        if shards[-1] and size + value.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = value
        size += value.nbytes
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        file = f"pytorch_model-{i:05d}-of-{len(shards):05d}.bin"
        file = "pytorch_model.bin" if len(shards) == 1 else file
        torch.save(shard, out / file)
        weight_map |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        total_size = sum(value.nbytes for value in weights.values())
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        (out / "pytorch_model.bin.index.json").write_text(json.dumps(index, indent=1) + "\n")


def write_records(out: Path, count: int) -> None:
    """OUT/records.jsonl and pictures of noise, 512 px."""
    import numpy as np
    from PIL import Image

    out.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    lines = []
    for i in range(count):
        noise = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((512, 512)).save(out / f"{i}.png")
        questions = [{"question": q, "choices": ["yes", "no"], "answer": "yes"} for q in QUESTIONS]
        lines.append(json.dumps({"id": f"record-{i}", "image": f"{i}.png",
                                 "caption": CAPTIONS[i % 2], "questions": questions}) + "\n")
    (out / "records.jsonl").write_text("".join(lines))


def main(args):
    if args.make:
        make(args.make, args.records)
    elif args.table:
        print(table(args.table))
    elif args.stage and args.figures:
        run_stage(args.stage[0], args.stage[1:], args.figures)
    elif args.stage and args.log:
        measure(args.stage, args.log)
    else:
        sys.exit("error: --make, --table, or --log with --stage is needed (--help explains)")


if __name__ == "__main__":
    main(parse_args())
