"""Stages as processes that can be killed: at a moment, or at a given point of a given file write.

tests/test_interruptions.py and bench/drill.py use it. Processes are forked from a server that has imported everything, so
that one starts in a tenth of a second.
"""

import multiprocessing
import os
import signal
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
from conftest import stage  # noqa: E402
from model import run  # noqa: E402

STAGES = {name: stage(name) for name in ("01_sample", "02_score", "03_pair_dpo", "04_eval")}
MOMENTS = ("half", "before", "after")  # a temporary file half written; complete, not renamed; renamed


def die_at(number: int, moment: str) -> None:
    """Kill this process at its number-th (from 0) rename of a finished file or folder."""
    real, seen = os.replace, []

    def replace(source, target):
        seen.append(source)
        if len(seen) <= number:
            return real(source, target)
        if moment == "after":
            real(source, target)
        if moment == "half":
            files = [source] if os.path.isfile(source) else sorted(p for p in Path(source).rglob("*") if p.is_file())
            os.truncate(files[-1], os.path.getsize(files[-1]) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace


def work(name: str, arguments: list[str], log: str, death, largest_file: int | None) -> None:
    sys.stdout = sys.stderr = open(log, "w")
    os.dup2(sys.stdout.fileno(), 1)
    os.dup2(sys.stdout.fileno(), 2)
    import torch
    torch.set_num_threads(1)
    if death:
        die_at(*death)
    if largest_file is not None:  # a full disk, for those who may not mount one
        import resource
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    sys.argv = [f"{name}.py", *arguments]
    run(STAGES[name].main)


def start(name: str, arguments, log, death: tuple[int, str] | None = None, largest_file: int | None = None):
    """The running process of a stage."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["kills"])
    os.environ["PYTHONPATH"] = f"{Path(__file__).parent}{os.pathsep}{Path(__file__).parent.parent}"  # the server finds it
    process = context.Process(target=work, args=(name, [str(a) for a in arguments], str(log), death, largest_file))
    process.start()
    return process


def finish(name: str, arguments, log, **how) -> int:
    process = start(name, arguments, log, **how)
    process.join()
    return process.exitcode


def tree(folder) -> dict[str, bytes]:
    """Every file below a folder, but for the lock."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*"))
            if p.is_file() and p.name != ".lock"}
