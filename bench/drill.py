"""Kill everything, many times, at random moments; then compare with uninterrupted runs, byte by byte.

    python bench/drill.py --kills 100            # about 10 minutes on 2 cores

Stages 1 to 4 are killed at a random moment or at a random file write (half written, written, renamed); one of two processes of
stages 1 and 3, at a random moment; run_selfplay.sh with everything below it, at a random moment. After every kill the same
command runs again. With the rights to mount, stages 1 and 3 also run into a full and a read-only tmpfs.
"""

import argparse
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

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from conftest import torchrun  # noqa: E402
from kills import MOMENTS, finish, start, tree  # noqa: E402

MODEL = ["--model", str(ROOT / "toy" / "base")]
SAMPLE = "--captions 4 --caption-settings 0:2.0 --max-new-tokens 16 --images 4 --steps 4 --guidance 0 --batch 4 --show 2".split()
TRAIN = "--steps 12 --batch 4 --micro-batch 2 --lr 1e-4 --save-every 3 --device cpu".split()
EVAL = "--steps 4 --guidance 0 --batch 4 --show 2".split()


def stages(folder: Path) -> dict[str, list]:
    """The command of every stage without --out; each reads what uninterrupted runs wrote."""
    records = ["--records", folder / "world" / "records.jsonl"]
    return {"01_sample": [*MODEL, *records, *SAMPLE], "02_score": [*MODEL, "--samples", folder / "01_sample", "--batch", 4],
            "03_pair_dpo": [*MODEL, "--pairs", folder / "02_score" / "pairs.jsonl", *TRAIN],
            "04_eval": [*MODEL, *records, *EVAL]}


def children(pid: int) -> list[int]:
    """All processes below one, from /proc."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents.setdefault(int(stat.read_text().rpartition(")")[2].split()[1]), []).append(int(stat.parent.name))
        except OSError:
            continue
    found = parents.get(pid, [])
    return found + [grandchild for child in found for grandchild in children(child)]


def kill_once(name: str, command: list, out: Path, seconds: float, chance: random.Random) -> str:
    """Start a stage and kill it; what was killed, or "finished" if it was faster."""
    if chance.random() < 0.5:
        moment = chance.choice(MOMENTS)
        code = finish(name, [*command, "--out", out], out.parent / "log", death=(chance.randrange(12), moment))
        return f"write {moment}" if code == -signal.SIGKILL else "finished"
    process = start(name, [*command, "--out", out], out.parent / "log")
    process.join(chance.uniform(0.05, seconds))
    process.kill()
    process.join()
    return "moment" if process.exitcode == -signal.SIGKILL else "finished"


def several(name: str, command: list, out: Path) -> subprocess.Popen:
    return subprocess.Popen(torchrun(2, f"{name}.py", *command, "--out", out), cwd=ROOT, stdout=subprocess.DEVNULL,
                            stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True)


def loop(folder: Path, out: Path) -> subprocess.Popen:
    settings = {"OUT": out, "TRAIN": folder / "world" / "records.jsonl", "HELD_OUT": folder / "world" / "records.jsonl",
                "ROUNDS": 2, "SAMPLE": " ".join(SAMPLE), "SCORE": "--batch 4", "DPO": " ".join(TRAIN), "EVAL": " ".join(EVAL)}
    return subprocess.Popen(["bash", ROOT / "run_selfplay.sh"], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                            env={**os.environ, "OMP_NUM_THREADS": "1", **{k: str(v) for k, v in settings.items()}},
                            start_new_session=True)


def check(what: str, out: Path, whole: Path) -> None:
    named = ("report.html", "settings.json") if what == "loop" else ()  # these name the folder they are in
    ours, theirs = ({k: v for k, v in tree(f).items() if Path(k).name not in named} for f in (out, whole))
    different = sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k))
    if different:
        sys.exit(f"{what}: {out} differs from {whole}: {different[:5]}")
    shutil.rmtree(out)


def drill_disk(name: str, command: list, folder: Path) -> None:
    """A tmpfs that is too small, then made larger; and a read-only one."""
    disk = folder / "disk"
    disk.mkdir(exist_ok=True)
    for options, said in (("size=96k", "No space left"), ("ro", "Read-only")):
        if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk], capture_output=True).returncode:
            return print("no rights to mount a tmpfs: full and read-only disks are left to tests/test_interruptions.py")
        try:
            code = finish(name, [*command, "--out", disk / "out"], folder / "log")
            last = (folder / "log").read_text().replace("\r", "\n").strip().split("\n")[-1]
            if code != 2 or said not in last or not last.startswith("error: "):
                sys.exit(f"{name} on a disk with {options}: exit {code}: {last}")
            print(f"{name}, {options}: {last}")
            if options != "ro":
                subprocess.run(["mount", "-o", "remount,size=1g", disk], check=True)
                finish(name, [*command, "--out", disk / "out"], folder / "log")
                check(f"{name} after a full disk", disk / "out", folder / name)
        finally:
            subprocess.run(["umount", disk], check=True)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="of single stages; a tenth as many of processes and of the loop")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main():
    args = parse_args()
    chance, killed = random.Random(args.seed), Counter()
    folder = Path(tempfile.mkdtemp(prefix="drill-"))
    subprocess.run([sys.executable, ROOT / "toy" / "world.py", "--split", "preference", "--n", "24", "--out", folder / "world"],
                   check=True, stdout=subprocess.DEVNULL)
    seconds = {}
    for name, command in stages(folder).items():
        began = time.perf_counter()
        if finish(name, [*command, "--out", folder / name], folder / "log"):
            sys.exit((folder / "log").read_text())
        seconds[name] = time.perf_counter() - began
    for name, command in stages(folder).items():
        out, count, complete = folder / "killed", 0, 0
        while count < args.kills // 4 or out.exists():
            what = kill_once(name, command, out, seconds[name], chance) if count < args.kills // 4 else "finished"
            if what != "finished":
                count, killed[f"{name}, {what}"] = count + 1, killed[f"{name}, {what}"] + 1
                continue
            if finish(name, [*command, "--out", out], folder / "log"):
                sys.exit((folder / "log").read_text())
            check(name, out, folder / name)
            complete += 1
        print(f"{name}: {count} kills, {complete} runs completed, all equal", flush=True)
    for name in ("01_sample", "03_pair_dpo"):  # one of two processes
        command, out = stages(folder)[name], folder / "two"
        whole = several(name, command, folder / f"{name}-two")
        began = time.perf_counter()
        if whole.wait():
            sys.exit(f"{name} failed with two processes")
        took = time.perf_counter() - began
        for _ in range(max(1, args.kills // 20)):
            group = several(name, command, out)
            time.sleep(chance.uniform(0.4, 0.95) * took)
            workers = children(group.pid)
            if workers and group.poll() is None:
                os.kill(chance.choice(workers), signal.SIGKILL)
                killed[f"{name}, one of two processes"] += 1
            group.wait()
        if several(name, command, out).wait():
            sys.exit(f"{name} does not continue with two processes")
        check(f"{name} with two processes", out, folder / f"{name}-two")
        print(f"{name}, one of two processes: equal", flush=True)
    whole = loop(folder, folder / "loop")
    began = time.perf_counter()
    if whole.wait():
        sys.exit("the loop failed")
    took = time.perf_counter() - began
    for _ in range(max(1, args.kills // 10)):
        group = loop(folder, folder / "loop-killed")
        time.sleep(chance.uniform(0.05, 0.5) * took)
        if group.poll() is None:
            os.killpg(group.pid, signal.SIGKILL)
            killed["loop"] += 1
        group.wait()
    if loop(folder, folder / "loop-killed").wait():
        sys.exit("the loop does not continue")
    check("loop", folder / "loop-killed", folder / "loop")
    print("loop: equal", flush=True)
    for name in ("01_sample", "03_pair_dpo"):
        drill_disk(name, stages(folder)[name], folder)
    print(f"{sum(killed.values())} kills: {json.dumps(dict(sorted(killed.items())))}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
