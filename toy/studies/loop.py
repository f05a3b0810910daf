"""What all studies share: rounds of the repository's own stages, each result computed once.

A stage's folder below runs/studies is named after everything that goes into it, its code included,
so variants that begin alike share their beginning: all training recipes of one seed see the same
samples and pairs. An interrupted study continues; after a change of code, what it changes is new.
While a study runs, edit another copy: a stage reads its code when it starts.

    python toy/studies/recipes.py             # run what is missing, two jobs at a time
    python toy/studies/recipes.py --tables    # only write picture and tables again

Results: toy/results/recipes.json; picture and tables: recipes.svg and recipes.md beside it. A new
study is a file like recipes.py; its page begins with the tables.
"""

import fcntl
import functools
import hashlib
import json
import multiprocessing
import os
import runpy
import shlex
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "toy" / "studies")]
import switches
from evals.metrics import EvalRecord
from hermesflow.contents import code_of, digest
from hermesflow.files import InputError, parse_json, read_object, read_text, write_text
from hermesflow.jsonl import read_jsonl
from hermesflow.options import COUNT, stage_parser
from hermesflow.outputs import run_main
from hermesflow.records import Pair, Sample
from hermesflow.tables import tensors_of
from model import load
from tables import RESULTS, forest, publish, tables
from toy import world

RUNS = Path("runs/studies")
ARRAYS = ("SAMPLE", "SCORE", "DPO", "EVAL")  # in configs/toy.sh
STAGES = {"01": "01_sample.py", "02": "02_score.py", "03": "03_pair_dpo.py", "04": "04_eval.py"}

# ------------------------------------------------------------------------------------------- stages


def load_stage(number: str) -> dict:
    """The globals of a stage's file.

    run_path returns a copy of them; the functions look names up in the original.
    """
    main = runpy.run_path(str(ROOT / STAGES[number]), run_name="stage")["main"]
    return main.__globals__


def default_options(array: str) -> str:
    """A stage's options in configs/toy.sh, from the array of that name."""
    script = f'source configs/toy.sh; printf "%s\\n" "${{{array}[@]}}"'
    # options in the environment would be appended
    environment = {k: v for k, v in os.environ.items() if k not in ARRAYS}
    output = subprocess.run(["bash", "-c", script], cwd=ROOT, env=environment, check=True,
                            capture_output=True, text=True).stdout
    return shlex.join(output.splitlines())


DEFAULTS = {array: default_options(array) for array in ARRAYS}
for stage_number in STAGES:
    load_stage(stage_number)  # imports, in the fork server, what its children need
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["loop"])
os.environ["PYTHONPATH"] = str(Path(__file__).parent)  # where the server finds this file


def run_stage(number: str, switch: str, arguments: list[str], out: Path) -> None:
    """In a process of its own: a stage, with a switch of switches.py, unless it is complete.

    Several studies may want the same folder at once, or a killed one has left its stage running:
    the others wait for the first.
    """
    with exclusive(out):
        if done_mark(out).exists():
            return
        sys.stdout = sys.stderr = open(f"{out}.log", "w", encoding="utf-8")
        torch.set_num_threads(1)
        stages = {name: load_stage(name) for name in STAGES}
        if switch:
            name, *values = switch.split()
            getattr(switches, name)(stages, *values)
        stage = stages[number]
        run_main(lambda: stage["main"](stage["parse_args"](arguments)))
        done_mark(out).touch()


def done_mark(out: Path) -> Path:
    return Path(f"{out}.done")


@contextmanager
def exclusive(out: Path):
    """Of all processes, one at a time is inside for the same folder."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{out}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@functools.cache
def code(*files: str) -> dict[str, str]:
    """Files and what they import, with their contents."""
    return code_of(ROOT / file for file in files)


def name_of(*parts) -> str:
    """A short name of all that goes into a folder."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def identity(path) -> str:
    """A folder below RUNS is named after what went into it; others are known by their content."""
    return str(path) if RUNS in Path(path).parents else digest(path)


def step(number: str, options: str, switch: str = "", **paths) -> Path:
    """Run a stage unless it is complete; returns its folder. paths: its --model, --records, …

    Raises InputError with the last line that the stage has written, if it fails.
    """
    files = [STAGES[number]] + (["toy/studies/switches.py"] if switch else [])
    inputs = {name: identity(path) for name, path in paths.items()}
    out = RUNS / f"{number}-{name_of(options, switch, inputs, code(*files))}"
    if not done_mark(out).exists():
        arguments = [*shlex.split(options), "--out", str(out)]
        arguments += [f"--{name}={path}" for name, path in paths.items()]
        process = FORKS.Process(target=run_stage, args=(number, switch, arguments, out))
        process.start()
        process.join()
        if process.exitcode:
            raise InputError(f"{out}.log: {read_text(f'{out}.log').splitlines()[-1]}")
    return out


def records(split: str, n: int, seed: int) -> Path:
    """The first n records of a split in the order of a seed."""
    folder = RUNS / f"{split}-{n}-{seed}-{name_of(code('toy/world.py'))}"
    with exclusive(folder):
        if not (folder / "records.jsonl").exists():
            world.records(split, n, seed, str(folder))
    return folder / "records.jsonl"


# -------------------------------------------------------------------------------------- evaluations

SCALES = (0, 0.25, 0.5, 1, 2)  # of guidance, from which every policy gets its own
NO_CAPTIONS = "--captions 1 --max-new-tokens 1 --batch 64 --show 0"


def fault(grid, caption: str) -> str:
    """What is wrong with a drawing that is wrong."""
    spec = world.parse(caption)
    drawn = sorted(grid[grid != world.EMPTY].tolist())
    if len(drawn) != spec.number:
        return "objects too many" if len(drawn) > spec.number else "objects missing"
    wanted = sorted(spec.types * (spec.number // len(spec.types)))
    return "relation" if drawn == wanted else "another object"


def faults_of(model, rows: list[EvalRecord]) -> Counter:
    """How many of the wrong drawings are wrong in which way."""
    wrong = [r for r in rows if not r.all_right]
    if not wrong:
        return Counter()
    codes = torch.stack([tensors_of(r)["codes"] for r in wrong])  # (wrong, N)
    grids = switches.grids(load(str(model)), codes)
    return Counter(fault(grid, r.text) for grid, r in zip(grids, wrong))


def rights(model, folder: Path) -> list[list[int]]:
    """Of all drawings that stage 1 sampled, 1 where everything is right: a list per record."""
    image_tokenizer = load(str(model))
    found = []
    for sample in read_jsonl(folder / "samples.jsonl", Sample):
        _, right = switches.oracle(image_tokenizer, sample, tensors_of(sample)["images"])
        found.append(right)
    return found


def drawn_right(model, folder: Path) -> int:
    """How many of the records have everything right in their first drawing; counted once."""
    counted = Path(f"{folder}.right")
    if not counted.exists():
        write_text(counted, str(sum(right[0] for right in rights(model, folder))))
    return int(counted.read_text())


@functools.cache
def best_guidance(model, seed: int) -> float:
    """Of SCALES, the one at which a checkpoint draws most of 300 validation captions right.

    One drawing each. If the highest is best, its double is tried, too. Of equals, the lowest.
    """
    right = {}
    scales = list(SCALES)
    for scale in scales:
        options = f"--seed {seed} {DEFAULTS['SAMPLE']} {NO_CAPTIONS} --images 1 --guidance {scale}"
        folder = step("01", options, model=model, records=records("validation", 300, 0))
        right[scale] = drawn_right(model, folder)
        if scale == scales[-1] == max(right, key=right.get):
            scales.append(2 * scale)
    return max(right, key=right.get)


@functools.cache
def evaluate(model, seed: int, evaluation: str = "") -> dict:
    """What a checkpoint does on 600 test records, which nothing was chosen on.

    evaluation: options of stage 4. Without a guidance, it draws at its own best one.
    Per record, in their order: questions answered right about real image and drawing, of how many;
    whole drawing right; caption score in thousandths. Then the guidance, the mean number of words
    of a caption, and the faults of wrong drawings.
    """
    options = evaluation
    if "--guidance" not in options:
        options += f" --guidance {best_guidance(model, seed)}"
    scale = float(options.split("--guidance")[1].split()[0])
    options = f"--seed {seed} {DEFAULTS['EVAL']} {options}"
    folder = step("04", options, model=model, records=records("test", 600, 0))
    rows = list(read_jsonl(folder / "answers.jsonl", EvalRecord))
    words = [len(r.caption.split()) for r in rows]
    return {
        "understood": [sum(r.und_right) for r in rows],
        "drawn": [sum(r.gen_right) for r in rows],
        "questions": [len(r.questions) for r in rows],
        "everything": [int(r.all_right) for r in rows],
        "caption": [round(1000 * r.caption_score) for r in rows],
        "guidance": scale,
        "words": round(sum(words) / len(rows), 3),
        "faults": faults_of(model, rows),
    }


def training_figures(folder: Path, pairs: Path) -> dict:
    """Means of train.jsonl over the last tenth of the steps."""
    file = folder / "train.jsonl"
    rows = [parse_json(line, str(file)) for line in read_text(file).splitlines()]
    last = rows[-max(1, len(rows) // 10) :]
    result = {"pairs": len(read_jsonl(pairs, Pair)), "steps": len(rows)}
    for name in rows[0]:
        if name not in ("step", "lr"):
            result[name] = round(sum(r[name] for r in last) / len(last), 4)
    return result


# ------------------------------------------------------------------------------------------- rounds


def play(seed: int, n: int, base="toy/base", preference=1024, sample="", score="", dpo="",
         without="", sampling="", scoring="", training="", fixed_reference=False, self_play=False):
    """n rounds of self-play.

    preference: how many records a round learns from; sample, score, dpo: options of the stages that
    differ from configs/toy.sh; without: an option of DPO there that is left out; sampling, scoring,
    training: switches of these stages. self_play: pairs by Eq. 9–10. Yields, for every round, the
    policy it starts from and the folders of samples, pairs and training.
    """
    policy = Path(base)
    previous = {}
    for r in range(1, n + 1):
        train = records("preference", preference, seed)
        run = f"--round {r} --seed {seed}"
        samples = step("01", f"{run} {DEFAULTS['SAMPLE']} {sample}", sampling,
                       model=policy, records=train)
        scored = step("02", f"{DEFAULTS['SCORE']} {score}", scoring,
                      model=policy, samples=samples, **previous)
        pairs = scored / "pairs.jsonl"
        reference = {"reference": base} if fixed_reference and r > 1 else {}
        options = DEFAULTS["DPO"].replace(without, "") + f" {dpo}"
        trained = step("03", f"{run} {options}", training,
                       model=policy, pairs=pairs, **reference)
        yield policy, samples, scored, trained
        policy = trained / "checkpoint"
        if self_play:
            previous = {"previous": pairs}


def rounds(seed: int, n: int = 1, base="toy/base", evals=("",), **settings) -> dict:
    """The evaluations of the base and of n rounds (see `play`).

    {"base" or "round1", …: {evaluation: what `evaluate` returns, "training": its figures}}
    """
    results = {"base": {e: evaluate(base, seed, e) for e in evals}}
    for r, (_, _, scored, trained) in enumerate(play(seed, n, base, **settings), 1):
        result = {e: evaluate(trained / "checkpoint", seed, e) for e in evals}
        result["training"] = training_figures(trained, scored / "pairs.jsonl")
        results[f"round{r}"] = result
    return results


# -------------------------------------------------------------------------------------------- study


def parse_args():
    parser = stage_parser(sys.modules["__main__"].__doc__)
    add = parser.add_argument_group("study").add_argument
    add("--tables", action="store_true", help="only write picture and tables again")
    add("--jobs", type=COUNT, default=2, help="processes at a time")
    return parser.parse_args()


def run_variants(name: str, variants: dict[str, dict], seeds, jobs: int) -> dict:
    """{variant: {seed: what `rounds` returns}}"""
    todo = list(product(variants, seeds))
    results = {variant: {} for variant in variants}
    with ThreadPoolExecutor(jobs) as pool:
        finished = pool.map(lambda job: rounds(job[1], **variants[job[0]]), todo)
        for (variant, seed), result in zip(todo, tqdm(finished, total=len(todo), desc=name)):
            results[variant][str(seed)] = result
    return results


def study(name: str, variants: dict[str, dict], against: str, seeds=(0, 1, 2),
          measure=None, more=None) -> None:
    """Run all variants (name -> settings of `rounds`) with all seeds, unless --tables is given.

    Writes toy/results/NAME.json, then the picture and the tables. against: the variant that others
    are compared with; measure(): further results for that file; more(content of the file): further
    tables.
    """
    if multiprocessing.current_process().name != "MainProcess":
        return  # a stage's process has imported the study that began it
    args = parse_args()
    os.chdir(ROOT)
    torch.set_num_threads(1)  # beside its processes
    file = RESULTS / f"{name}.json"

    def run():
        if not args.tables:
            results = run_variants(name, variants, seeds, args.jobs)
            content = {"defaults": DEFAULTS, "variants": variants, "results": results}
            if measure:
                content["measured"] = measure()
            write_text(file, json.dumps(content, separators=(",", ":")) + "\n")
        content = read_object(file)
        results = content["results"]
        write_text(RESULTS / f"{name}.svg", forest(results, against))
        publish(name, [*tables(results, against), *(more(content) if more else [])])

    run_main(run)
