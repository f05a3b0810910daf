"""What all studies share: self-play rounds made of the repository's own stages, each result kept and never computed twice.

A stage's folder below runs/studies is named after everything that goes into it, so variants that begin alike share their
beginning: all training recipes of one seed see the same samples and pairs. Interrupted studies continue.
"""

import fcntl
import hashlib
import json
import multiprocessing
import os
import re
import shlex
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "toy" / "studies")]
from conftest import stage  # noqa: E402
import switches  # noqa: E402
from model import run  # noqa: E402
from toy import world  # noqa: E402

RUNS, RESULTS = Path("runs/studies"), Path("toy/results")
STAGES = {name[:2]: stage(name) for name in ("01_sample", "02_score", "03_pair_dpo", "04_eval")}
DEFAULTS = dict(re.findall(r"^(\w+)=\$\{\w+:-(-.*)\}$", (ROOT / "run_selfplay.sh").read_text(), re.M))
COLUMNS = ["understood", "drawn right", "questions", "everything right", "caption score", "caption words"]


def work(number: str, switch: str, arguments: list[str], log: str) -> None:
    """In a process of its own: a stage, with a switch of switches.py thrown."""
    sys.stdout = sys.stderr = open(log, "w")
    import torch
    torch.set_num_threads(1)
    if switch:
        name, *values = switch.split()
        getattr(switches, name)(STAGES, *values)
    sys.argv = [STAGES[number].__file__, *arguments]
    run(STAGES[number].main)


@contextmanager
def alone(out: Path):
    """Several studies may want the same at once: the others wait for the first."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{out}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def step(number: str, options: str, switch: str = "", **paths) -> Path:
    """Run a stage unless it has been run. paths: its --model, --records, … ; returns its folder."""
    inputs = [f"--{name}={path}" for name, path in paths.items()]
    name = hashlib.sha256(repr((options, switch, inputs)).encode()).hexdigest()[:12]
    out = RUNS / f"{number}-{name}"
    with alone(out):
        if not Path(f"{out}.done").exists():
            arguments = [*shlex.split(options), *inputs, "--out", str(out)]
            process = multiprocessing.get_context("forkserver").Process(
                target=work, args=(number, switch, arguments, f"{out}.log"))
            process.start()
            process.join()
            if process.exitcode:
                raise RuntimeError(f"{out}.log: {Path(f'{out}.log').read_text()[-600:]}")
            Path(f"{out}.done").touch()
    return out


def records(split: str, n: int, seed: int) -> Path:
    folder = RUNS / f"{split}-{n}-{seed}"
    with alone(folder):
        if not (folder / "records.jsonl").exists():
            world.records(split, n, seed, str(folder))
    return folder / "records.jsonl"


def evaluate(model, seed: int, options: str = "") -> list[list]:
    """Held-out counts of every record, as COLUMNS."""
    out = step("04", f"--seed {seed} {DEFAULTS['EVAL']} {options}", model=model, records=records("eval", 600, 0))
    with open(out / "answers.jsonl", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [[sum(r["und_right"]), sum(r["gen_right"]), len(r["questions"]), int(r["all_right"]),
             round(r["caption_score"], 4), len(r["caption"].split())] for r in rows]


def training(folder: Path) -> dict:
    """What to watch: means over the last tenth of the steps."""
    rows = [json.loads(line) for line in open(folder / "train.jsonl")]
    last = rows[-max(1, len(rows) // 10):]
    return {k: round(sum(r[k] for r in last) / len(last), 4) for k in rows[0] if k != "step"} | {"steps": len(rows)}


def rounds(seed: int, n: int = 1, base="toy/base", sample="", score="", dpo="", evals=("",), switch="", n_records=512,
           fixed_reference=False, self_play=True) -> dict:
    """n rounds of self-play with some settings changed: {round: {"eval OPTIONS": records, "train": figures}}."""
    policy, previous, found = Path(base), {}, {}
    train = records("preference", n_records, seed)
    for r in range(1, n + 1):
        samples = step("01", f"--round {r} --seed {seed} {DEFAULTS['SAMPLE']} {sample}", model=policy, records=train)
        pairs = step("02", f"{DEFAULTS['SCORE']} {score}", switch, model=policy, samples=samples, **previous)
        trained = step("03", f"--round {r} --seed {seed} {DEFAULTS['DPO']} {dpo}", switch, model=policy,
                       pairs=pairs / "pairs.jsonl", **(dict(reference=base) if fixed_reference and r > 1 else {}))
        policy, previous = trained / "checkpoint", dict(previous=pairs / "pairs.jsonl") if self_play else {}
        found[f"round{r}"] = {o: evaluate(policy, seed, o) for o in evals} | {"train": training(trained)}
        found[f"round{r}"]["train"]["pairs"] = sum(1 for _ in open(pairs / "pairs.jsonl"))
    return found
