"""Stages as processes that can be killed: at any moment, or at a given point of a file write.

tests/test_interruptions.py and bench/drill.py use it. Processes are forked from a server that has
imported the heavy packages, so that one starts in a tenth of a second.
"""

import hashlib
import multiprocessing
import os
import resource
import runpy
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PRIVATE = ".run"  # of hermesflow/files.py
# a temporary file half written; not yet renamed; renamed; and results half appended
MOMENTS = ("half", "before", "after", "append")
PRELOAD = ["accelerate", "transformers.models.phi.modeling_phi", "model", "hermesflow.scoring",
           "hermesflow.runs", "evals.judges", "evals.metrics", "evals.policy", "toy.world"]


def start(stage: str, arguments, log, death: tuple[int, str] | None = None,
          largest_file: int | None = None):
    """Start a stage, such as "01_sample", and return its running process.

    log: the file that takes its output. death: kill it at this rename (from 0) at this of MOMENTS.
    largest_file: bytes that a file may have, like a full disk, but without the right to mount one.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    # the server and its children find the packages by this
    os.environ["PYTHONPATH"] = str(ROOT)
    arguments = [str(a) for a in arguments]
    process = context.Process(target=run, args=(stage, arguments, str(log), death, largest_file))
    process.start()
    return process


def finish(stage: str, arguments, log, **how) -> int:
    """Run a stage to its end; its exit code, -9 if it was killed. how: as in `start`."""
    process = start(stage, arguments, log, **how)
    process.join()
    return process.exitcode


def run(stage: str, arguments: list[str], log: str, death, largest_file: int | None) -> None:
    """What the process of a stage does: run its file as the command line does."""
    sys.stdout = sys.stderr = open(log, "w")
    os.dup2(sys.stdout.fileno(), 1)
    os.dup2(sys.stdout.fileno(), 2)
    import torch

    torch.set_num_threads(1)
    if death:
        die_at(*death)
    if largest_file is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    script = str(ROOT / f"{stage}.py")
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def die_at(number: int, moment: str) -> None:
    """Kill this process at its number-th (from 0) rename of a finished file, or append to a part."""
    count = 0

    def is_time() -> bool:
        nonlocal count
        count += 1
        return count > number

    real_replace = os.replace

    def replace(source, target):
        if not is_time():
            return real_replace(source, target)
        if moment == "after":
            real_replace(source, target)
        if moment == "half":
            last = last_file(Path(source))
            os.truncate(last, os.path.getsize(last) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    from hermesflow.runs import Parts

    real_append = Parts.append

    def append(parts, results, rank):
        before = parts.own.tell() if parts.own else 0
        real_append(parts, results, rank)
        if is_time():
            os.truncate(parts.own.name, (before + parts.own.tell()) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    if moment == "append":
        Parts.append = append
    else:
        os.replace = replace


def last_file(path: Path) -> Path:
    """A file itself, or the last file of a folder."""
    if path.is_file():
        return path
    return max(p for p in path.rglob("*") if p.is_file())


def tree(folder, but=()) -> dict[str, str]:
    """Digests of all files below a folder, except locks, lists of what was written, and `but`.

    Digests, because pytest's comparison of unequal files themselves can take hours.
    """
    files = {}
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file() and path.parent.name != PRIVATE and path.name not in but:
            files[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return files


def torchrun(processes: int, *arguments) -> list[str]:
    """The command that runs a script in several gloo processes.

    (accelerate launch starts processes on CPUs through MPI only.)
    """
    command = [sys.executable, "-m", "torch.distributed.run"]
    # a free port, so that several can run at once
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    return [*command, "--nproc-per-node", str(processes), *map(str, arguments)]
