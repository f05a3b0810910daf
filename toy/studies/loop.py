"""What all studies share: self-play rounds made of the repository's own stages, every result kept and never computed twice.

A stage's folder below runs/studies is named after everything that goes into it, so variants that begin alike share their
beginning: all training recipes of one seed see the same samples and pairs. An interrupted study continues.

    python toy/studies/recipes.py             # runs what is missing, two at a time, into toy/results/recipes.json
    python toy/studies/recipes.py --tables    # only the picture and the tables of the results that are there

Picture (toy/results/recipes.svg) and tables (toy/RESULTS.md, between the marks of that name) are written by the scripts alone.
"""

import argparse
import fcntl
import functools
import hashlib
import json
import multiprocessing
import os
import re
import shlex
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "toy" / "studies")]
import switches  # noqa: E402
from tables import RESULTS, forest, publish, tables  # noqa: E402
from model import load, run  # noqa: E402
from toy import world  # noqa: E402

RUNS = Path("runs/studies")
STAGES = {name[:2]: import_module(name) for name in ("01_sample", "02_score", "03_pair_dpo", "04_eval")}
DEFAULTS = dict(re.findall(r"^(\w+)=\$\{\w+:-(-.*)\}$", (ROOT / "run_selfplay.sh").read_text(), re.M))
UNSEEN, TRAINING = "the other 101 held-out captions", "training captions"  # evaluations on other records
FORKS = multiprocessing.get_context("forkserver")  # its children have imported everything already
FORKS.set_forkserver_preload(["loop"])
os.environ["PYTHONPATH"] = str(Path(__file__).parent)  # where the server looks for it


# ---------------------------------------------------------------------------------------------------------------- stages


def work(number: str, switch: str, arguments: list[str], log: str) -> None:
    """In a process of its own: a stage, with a switch of switches.py thrown."""
    sys.stdout = sys.stderr = open(log, "w")
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
            process = FORKS.Process(target=work, args=(number, switch, arguments, f"{out}.log"))
            process.start()
            process.join()
            if process.exitcode:
                raise RuntimeError(f"{out}.log: {Path(f'{out}.log').read_text()[-600:]}")
            Path(f"{out}.done").touch()
    return out


def records(split: str, n: int, seed: int, start: int = 0) -> Path:
    """The first n records of a split in the order of a seed, or those from `start` on."""
    folder = RUNS / f"{split}-{n}-{seed}"
    with alone(folder):
        file = folder / "records.jsonl"
        if not file.exists():
            world.records(split, n, seed, str(folder))
        part = folder / f"from-{start}.jsonl"
        if start and not part.exists():
            part.write_text("".join(file.read_text().splitlines(keepends=True)[start:]))
    return part if start else file


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ---------------------------------------------------------------------------------------------------------------- rounds


def fault(grid, caption: str) -> str:
    """What is wrong with a drawing that is wrong."""
    spec, found = world.parse(caption), sorted(grid[grid != world.EMPTY].tolist())
    if len(found) != spec.number:
        return "objects too many" if len(found) > spec.number else "objects missing"
    return "relation" if found == sorted(spec.types * (spec.number // len(spec.types))) else "another object"


@functools.cache
def evaluate(model, seed: int, how: str = "") -> dict:
    """Per held-out record, in their order: questions right about real image and drawing, of how many; whole drawing right;
    caption score in thousandths. Then the mean number of words of a caption, and the faults of the drawings that are wrong.
    how: UNSEEN, TRAINING, or options of 04."""
    data = {UNSEEN: ("eval", 701, 0, 600), TRAINING: ("preference", 512, seed)}.get(how, ("eval", 600, 0))
    options = "" if how in (UNSEEN, TRAINING) else how
    out = step("04", f"--seed {seed} {DEFAULTS['EVAL']} {options}", model=model, records=records(*data))
    rows = read(out / "answers.jsonl")
    wrong = [r for r in rows if not r["all_right"]]
    grids = switches.grids(load(str(model))[1], torch.tensor([r["codes"] for r in wrong])) if wrong else []
    return {"understood": [sum(r["und_right"]) for r in rows], "drawn": [sum(r["gen_right"]) for r in rows],
            "questions": [len(r["questions"]) for r in rows], "everything": [int(r["all_right"]) for r in rows],
            "caption": [round(1000 * r["caption_score"]) for r in rows],
            "words": round(sum(len(r["caption"].split()) for r in rows) / len(rows), 3),
            "faults": Counter(fault(g, r["text"]) for g, r in zip(grids, wrong))}


def figures(folder: Path, pairs: Path) -> dict:
    """What to watch: means over the last tenth of the steps."""
    rows = read(folder / "train.jsonl")
    last = rows[-max(1, len(rows) // 10) :]
    means = {k: round(sum(r[k] for r in last) / len(last), 4) for k in rows[0] if k not in ("step", "lr")}
    return {"pairs": len(read(pairs)), "steps": len(rows)} | means


def play(seed: int, n: int, base="toy/base", sample="", score="", dpo="", sampling="", scoring="", training="",
         fixed_reference=False, self_play=False, captions=512, renewed=False):
    """n rounds of self-play. sample, score, dpo: options that differ from run_selfplay.sh; sampling, scoring, training: what is
    thrown of switches.py; renewed: every round has `captions` of its own.
    Yields, for every round, the policy it starts from and the folders of samples, pairs and training."""
    policy, previous = Path(base), {}
    for r in range(1, n + 1):
        train = records("preference", captions * r, seed, captions * (r - 1)) if renewed else records("preference", captions, seed)
        samples = step("01", f"--round {r} --seed {seed} {DEFAULTS['SAMPLE']} {sample}", sampling, model=policy, records=train)
        pairs = step("02", f"{DEFAULTS['SCORE']} {score}", scoring, model=policy, samples=samples, **previous)
        reference = dict(reference=base) if fixed_reference and r > 1 else {}
        trained = step("03", f"--round {r} --seed {seed} {DEFAULTS['DPO']} {dpo}", training, model=policy,
                       pairs=pairs / "pairs.jsonl", **reference)
        yield policy, samples, pairs, trained
        policy, previous = trained / "checkpoint", dict(previous=pairs / "pairs.jsonl") if self_play else {}


def rounds(seed: int, n: int = 1, base="toy/base", evals=("",), **how) -> dict:
    """The evaluations of n rounds (see `play`) and of the base.

    Returns {"base" or "round1", …: {options of the evaluation: what `evaluate` returns, "training": figures}}.
    """
    found = {"base": {o: evaluate(base, seed, o) for o in evals}}
    for r, (_, _, pairs, trained) in enumerate(play(seed, n, base, **how), 1):
        found[f"round{r}"] = {o: evaluate(trained / "checkpoint", seed, o) for o in evals}
        found[f"round{r}"]["training"] = figures(trained, pairs / "pairs.jsonl")
    return found


# ----------------------------------------------------------------------------------------------------------------- study


def study(name: str, variants: dict[str, dict], against: str, seeds=(0, 1, 2), more=lambda results: []) -> None:
    """Run all variants (name -> settings of `rounds`) with all seeds, write toy/results/NAME.json, then picture and tables;
    more: further tables of the results."""
    parser = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", action="store_true", help="picture and tables of the results that are there")
    parser.add_argument("--seeds", type=int, nargs="+", default=seeds)
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    file = RESULTS / f"{name}.json"
    torch.set_num_threads(1)  # beside its processes
    if not args.tables:
        jobs = [(v, s) for v in variants for s in args.seeds]
        with ThreadPoolExecutor(args.jobs) as pool:
            found = pool.map(lambda job: rounds(job[1], **variants[job[0]]), jobs)
            results = {v: {} for v in variants}
            for (v, s), result in zip(jobs, tqdm(found, total=len(jobs), desc=name)):
                results[v][str(s)] = result
        RESULTS.mkdir(exist_ok=True)
        text = json.dumps({"defaults": DEFAULTS, "variants": variants, "results": results}, separators=(",", ":"))
        file.write_text(text + "\n", encoding="utf-8")
    results = json.loads(file.read_text(encoding="utf-8"))["results"]
    (RESULTS / f"{name}.svg").write_text(forest(results, against), encoding="utf-8")
    publish(name, [*tables(results, against), *more(results)])
