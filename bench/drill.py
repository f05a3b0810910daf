"""Kill everything, many times, at random; the results must equal uninterrupted runs, byte by byte.

    python bench/drill.py --kills 100            # about 10 minutes on 2 CPU cores

Stages 1 to 4 are killed at a random moment or at a random file write (half written, written,
renamed); one of two processes of stages 1 and 3, at a random moment; run_selfplay.sh with
everything below it, at a random moment. After every kill the same command runs again. With the
right to mount, stages 1 and 3 also run into a full and a read-only disk.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bench.kills import MOMENTS, finish, start, torchrun, tree
from hermesflow.options import COUNT, SEED, stage_parser

MODEL = ["--model", str(ROOT / "toy" / "base")]
SAMPLE = ("--captions 4 --caption-settings 0:2.0 --max-new-tokens 16 --images 4 --steps 4 "
          "--guidance 0 --batch 4 --show 2").split()
SCORE = "--batch 4".split()
TRAIN = "--steps 12 --batch 4 --micro-batch 2 --lr 1e-4 --save-every 3 --device cpu".split()
EVAL = "--steps 4 --guidance 0 --batch 4 --show 2".split()
WITH_SEVERAL = ("01_sample", "03_pair_dpo")  # run in two processes, and on full disks


def parse_args(argv=None):
    parser = stage_parser(__doc__)
    add = parser.add_argument
    add("--kills", type=COUNT, default=100, help="of single stages, a quarter each; the loop and "
        "pairs of processes are killed a tenth as often")
    add("--seed", type=SEED, default=0, help="of what is killed when")
    return parser.parse_args(argv)


def stage_commands(folder: Path) -> dict[str, list]:
    """The arguments of every stage without --out; each reads what uninterrupted runs wrote."""
    records = ["--records", folder / "world" / "records.jsonl"]
    return {
        "01_sample": [*MODEL, *records, *SAMPLE],
        "02_score": [*MODEL, "--samples", folder / "01_sample", *SCORE],
        "03_pair_dpo": [*MODEL, "--pairs", folder / "02_score" / "pairs.jsonl", *TRAIN],
        "04_eval": [*MODEL, *records, *EVAL],
    }


def complete(stage: str, command: list, out: Path, log: Path) -> None:
    """Run a stage to its end, or end the drill with its output."""
    if finish(stage, [*command, "--out", out], log):
        sys.exit(log.read_text())


def require_equal(what: str, out: Path, uninterrupted: Path, except_files: tuple = ()) -> None:
    """End the drill unless both folders hold the same files; then remove `out`."""
    found = tree(out, except_files)
    expected = tree(uninterrupted, except_files)
    names = sorted(found.keys() | expected.keys())
    different = [n for n in names if found.get(n) != expected.get(n)]
    if different:
        sys.exit(f"{what}: {out} differs from {uninterrupted}: {different[:5]}")
    shutil.rmtree(out)


# ------------------------------------------------------------------------------------ single stages


def drill_stage(stage: str, command: list, folder: Path, kills: int, seconds: float,
                chance: random.Random) -> Counter:
    """Kill a stage this often. seconds: how long it takes."""
    killed = Counter()
    out = folder / "killed"
    log = folder / "log"
    completed = 0
    while killed.total() < kills:
        what = kill_once(stage, [*command, "--out", out], log, seconds, chance)
        if what is not None:
            killed[f"{stage}, {what}"] += 1
            continue
        # it was faster than its killer: look at what it wrote, and begin anew
        complete(stage, command, out, log)
        require_equal(stage, out, folder / stage)
        completed += 1
    if out.exists():
        complete(stage, command, out, log)
        require_equal(stage, out, folder / stage)
        completed += 1
    print(f"{stage}: {kills} kills, {completed} runs completed, all equal", flush=True)
    return killed


def kill_once(stage: str, command: list, log: Path, seconds: float,
              chance: random.Random) -> str | None:
    """Start a stage and kill it; what it was killed at, or None if it came to its end."""
    if chance.random() < 0.5:
        moment = chance.choice(MOMENTS)
        code = finish(stage, command, log, death=(chance.randrange(12), moment))
        return f"write {moment}" if code == -signal.SIGKILL else None
    process = start(stage, command, log)
    process.join(chance.uniform(0.05, seconds))
    process.kill()
    process.join()
    return "moment" if process.exitcode == -signal.SIGKILL else None


# -------------------------------------------------------------------- two processes, the whole loop


def launch(command: list, **environment) -> subprocess.Popen:
    """A command in a process group of its own."""
    environment = {name: str(value) for name, value in environment.items()}
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True,
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def timed(process: subprocess.Popen, what: str) -> float:
    """The seconds until a process ends well."""
    began = time.perf_counter()
    if process.wait():
        sys.exit(f"{what} failed")
    return time.perf_counter() - began


def children(pid: int) -> list[int]:
    """All processes below one, from /proc."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()  # state, parent, …
        except OSError:  # it has ended
            continue
        parents.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    below = []
    todo = [pid]
    while todo:
        direct = parents.get(todo.pop(), [])
        below += direct
        todo += direct
    return below


def drill_processes(stage: str, command: list, folder: Path, kills: int,
                    chance: random.Random) -> Counter:
    """Kill one of two processes this often."""
    killed = Counter()
    out = folder / "two"
    uninterrupted = folder / f"{stage}-two"
    what = f"{stage} with two processes"
    script = f"{stage}.py"
    whole = torchrun(2, script, *command, "--out", uninterrupted)
    again = torchrun(2, script, *command, "--out", out)
    seconds = timed(launch(whole), what)
    for _ in range(kills):
        group = launch(again)
        time.sleep(chance.uniform(0.4, 0.95) * seconds)
        workers = children(group.pid)
        if workers and group.poll() is None:
            os.kill(chance.choice(workers), signal.SIGKILL)
            killed[f"{stage}, one of two processes"] += 1
        group.wait()
    timed(launch(again), f"continuing {what}")
    require_equal(what, out, uninterrupted)
    print(f"{stage}, one of two processes: equal", flush=True)
    return killed


def drill_loop(folder: Path, kills: int, chance: random.Random) -> Counter:
    """Kill run_selfplay.sh and everything below it this often."""
    killed = Counter()
    records = folder / "world" / "records.jsonl"
    settings = {"TRAIN": records, "HELD_OUT": records, "ROUNDS": 2, "SAMPLE": " ".join(SAMPLE),
                "SCORE": " ".join(SCORE), "DPO": " ".join([*TRAIN, "--epochs", "2"]),
                "EVAL": " ".join(EVAL)}
    loop = ["bash", str(ROOT / "run_selfplay.sh")]
    out = folder / "loop-killed"
    seconds = timed(launch(loop, OUT=folder / "loop", **settings), "the loop")
    for _ in range(kills):
        group = launch(loop, OUT=out, **settings)
        time.sleep(chance.uniform(0.05, 0.5) * seconds)
        if group.poll() is None:
            os.killpg(group.pid, signal.SIGKILL)
            killed["loop"] += 1
        group.wait()
    timed(launch(loop, OUT=out, **settings), "continuing the loop")
    # these name the folder that they are in
    require_equal("loop", out, folder / "loop", except_files=("report.html", "settings.json"))
    print("loop: equal", flush=True)
    return killed


# -------------------------------------------------------------------------------------------- disks


def drill_disk(stage: str, command: list, folder: Path) -> None:
    """A disk that is too small, then made larger; and a read-only one."""
    disk = folder / "disk"
    disk.mkdir(exist_ok=True)
    log = folder / "log"
    out = disk / "out"
    for options, message in (("size=96k", "No space left"), ("ro", "Read-only")):
        mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk]
        if subprocess.run(mount, capture_output=True).returncode:
            print("no right to mount: tests/test_interruptions.py has a full and a read-only disk")
            return
        try:
            code = finish(stage, [*command, "--out", out], log)
            last = log.read_text().replace("\r", "\n").strip().split("\n")[-1]
            if code != 2 or message not in last or not last.startswith("error: "):
                sys.exit(f"{stage} on a disk with {options}: exit {code}: {last}")
            print(f"{stage}, {options}: {last}", flush=True)
            if options != "ro":
                subprocess.run(["mount", "-o", "remount,size=1g", disk], check=True)
                complete(stage, command, out, log)
                require_equal(f"{stage} after a full disk", out, folder / stage)
        finally:
            subprocess.run(["umount", disk], check=True)


def main(args):
    chance = random.Random(args.seed)
    folder = Path(tempfile.mkdtemp(prefix="drill-"))
    world = [sys.executable, ROOT / "toy" / "world.py", "--split", "preference", "--n", "24"]
    subprocess.run([*world, "--out", folder / "world"], check=True, stdout=subprocess.DEVNULL)
    # absolute image paths, which are the same in outputs at any depth
    records = folder / "world" / "records.jsonl"
    records.write_text(records.read_text().replace('"images/', f'"{folder}/world/images/'))
    commands = stage_commands(folder)

    seconds = {}
    for stage, command in commands.items():
        began = time.perf_counter()
        complete(stage, command, folder / stage, folder / "log")
        seconds[stage] = time.perf_counter() - began

    killed = Counter()
    for stage, command in commands.items():
        kills = args.kills // 4
        killed += drill_stage(stage, command, folder, kills, seconds[stage], chance)
    for stage in WITH_SEVERAL:
        kills = max(1, args.kills // 20)
        killed += drill_processes(stage, commands[stage], folder, kills, chance)
    killed += drill_loop(folder, max(1, args.kills // 10), chance)
    for stage in WITH_SEVERAL:
        drill_disk(stage, commands[stage], folder)
    print(f"{killed.total()} kills: {json.dumps(dict(sorted(killed.items())))}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main(parse_args())
