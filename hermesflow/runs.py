"""A run of a stage: its processes, its output folder, resuming, and errors in one line."""

import errno
import fcntl
import hashlib
import json
import os
import socket
import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from tqdm import tqdm

from hermesflow.files import (InputError, digest, parse_json, read_object, read_text, reason,
                              remove, write_text, writing)

FORMAT = "2"  # of all files that stages write; another one than in OUT/settings.json stops a rerun
NO_EFFECT = ("out", "overwrite", "device", "batch", "strict")  # settings that do not change results
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)


def run_main(main, if_memory_runs_out: str = "a smaller --batch or --dtype bfloat16") -> None:
    """Run a stage: bad input, a full disk and exhausted memory end in one line and exit code 2."""
    try:
        main()
    except InputError as error:
        message = str(error)
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        path = error.filename or "output"
        message = f"{path}: {error.strerror}; rerun the same command to continue"
    except (MemoryError, RuntimeError) as error:
        out_of_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not out_of_memory and "can't allocate memory" not in str(error):
            raise
        message = f"out of memory ({reason(error)[:120]}); {if_memory_runs_out} helps"
    else:
        return
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(2)


def processes() -> PartialState:
    """The processes of this run (accelerate launch, torchrun); on CPUs without an accelerator."""
    return PartialState(cpu=not torch.accelerator.is_available())


def say(message: str) -> None:
    """One line on stdout, from the main process."""
    if processes().is_main_process:
        print(message, flush=True)


# ----------------------------------------------------------------------------------- output folders

LOCKS = {}  # output folder -> its lock file, open as long as this process lives


def lock(out: Path) -> None:
    """Hold `out` until this process ends, however it ends.

    Raises InputError naming the process that holds it.
    """
    if out.resolve() in LOCKS:
        return
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        file = open(out / ".lock", "a+", encoding="utf-8")
    try:
        # the system releases it with the process: no lock is ever stale
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        raise InputError(f"{out}: in use by {holder}") from None
    with writing(out):
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {now}")
        file.flush()
    LOCKS[out.resolve()] = file


def prepare_output(out, settings: dict, finished: str, inputs: dict) -> bool:
    """Prepare folder `out` for a run with `settings`; False if the file `finished` is there.

    inputs: name -> path (or list of files) of everything that is read; None: not given. Raises
    InputError if the folder was made with other settings, other contents of the inputs or by
    another version of the formats, unless settings["overwrite"] empties it; and if another run
    holds it. What a killed run left half-written is removed.
    """
    out = Path(out)
    state = processes()
    if state.is_main_process:
        lock(out)
        if settings["overwrite"]:
            empty(out)
        check_settings(out / "settings.json", describe(settings, inputs))
        remove(*out.rglob(".*.tmp"))
        if (out / finished).exists():
            remove(out / "parts", out / "state", out / "state.new")
    state.wait_for_everyone()
    return not (out / finished).exists()


def empty(out: Path) -> None:
    """Remove everything in `out` but the lock, if a stage made it."""
    others = [p for p in out.iterdir() if p.name != ".lock"]
    if others and not (out / "settings.json").exists():
        message = "not made by a stage (no settings.json), so --overwrite does not empty it"
        raise InputError(f"{out}: {message}")
    remove(*others)


def describe(settings: dict, inputs: dict) -> dict[str, str]:
    """Everything that decides what a stage writes."""
    described = {name: str(value) for name, value in settings.items() if name not in NO_EFFECT}
    described["format"] = FORMAT
    for name, path in inputs.items():
        if path is not None:
            described[f"content of {name}"] = digest(path)
    return described


def check_settings(file: Path, settings: dict[str, str]) -> None:
    """Write `settings` to `file`. Raises InputError if other ones are there."""
    if file.exists():
        before = read_object(file)
        changed = [f"{name} {before.get(name)} -> {value}" for name, value in settings.items()
                   if before.get(name) != value]
        if changed:
            message = f"made with other settings ({'; '.join(changed)})"
            raise InputError(f"{file.parent}: {message}; use --overwrite or another --out")
    write_text(file, json.dumps(settings, indent=1) + "\n")


# ----------------------------------------------------------------------------------- resumable work


def map_records(function, records: list, out, batch: int, label: str,
                length=None) -> list[dict] | None:
    """function(chunk) of all chunks of `batch` records: one JSON object with `id` per record.

    length(record): chunks hold records of similar length, so that their prompts can run together.

    Every finished chunk is a file below OUT/parts, so an interrupted run continues, and several
    processes (accelerate launch) share the work. Returns the results in the order of the records on
    the main process, None on the others.
    """
    state = processes()
    parts = Path(out) / "parts"
    done = read_parts(parts)
    state.wait_for_everyone()  # all processes see the same `done` before anyone adds to it
    todo = [r for r in records if r.id not in done]
    if length:
        todo.sort(key=length)
    # process p of P takes records p, p + P, p + 2P, … ; everybody knows the chunks of everybody
    chunks = []
    sizes = {}
    for process in range(state.num_processes):
        own = todo[process :: state.num_processes]
        chunks.append([own[i : i + batch] for i in range(0, len(own), batch)])
        sizes |= {part_name(chunk): len(chunk) for chunk in chunks[-1]}

    with tqdm(total=len(todo), desc=label, disable=not state.is_main_process) as bar:
        for chunk in chunks[state.process_index]:
            lines = [json.dumps(result) + "\n" for result in function(chunk)]
            write_text(parts / part_name(chunk), "".join(lines))
            if state.is_main_process:
                show_progress(bar, parts, sizes)
        state.wait_for_everyone()
        if state.is_main_process:
            show_progress(bar, parts, sizes)
    if not state.is_main_process:
        return None
    done = read_parts(parts)
    return [done[r.id] for r in records]


def part_name(chunk: list) -> str:
    return hashlib.sha256(chunk[0].id.encode()).hexdigest()[:16] + ".jsonl"


def read_parts(parts: Path) -> dict[str, dict]:
    """id -> result of all finished chunks."""
    results = {}
    for file in sorted(parts.glob("*.jsonl")):
        for line in read_text(file).splitlines():
            result = parse_json(line, str(file))
            results[result["id"]] = result
    return results


def show_progress(bar, parts: Path, sizes: dict[str, int]) -> None:
    """Count the records that all processes have finished."""
    finished = sum(sizes.get(file.name, 0) for file in parts.glob("*.jsonl"))
    bar.update(finished - bar.n)


# ------------------------------------------------------------------------------- resumable training


def start_accelerator(batch: int, micro_batch: int, device: str | None, **settings):
    """An Accelerator that makes a step of `batch` records out of all processes' micro-batches.

    Raises InputError if it cannot.
    """
    on_cpu = device == "cpu" or not torch.accelerator.is_available()
    accelerator = Accelerator(cpu=on_cpu, **settings)
    at_once = micro_batch * accelerator.num_processes
    if batch % at_once:
        raise InputError(f"--batch {batch} is not a multiple of --micro-batch {micro_batch} times "
                         f"{accelerator.num_processes} processes")
    accelerator.gradient_accumulation_steps = batch // at_once
    return accelerator


def micro_batches(step: int, batch: int, size: int, accelerator) -> list[range]:
    """The visits that this process sees in a step, one range per forward pass."""
    first = step * batch + accelerator.process_index * size
    stride = size * accelerator.num_processes
    return [range(start, start + size) for start in range(first, (step + 1) * batch, stride)]


def write_log(log: dict, accelerator, out: Path) -> None:
    """Append a step to OUT/train.jsonl, and to the trackers."""
    accelerator.log({k: v for k, v in log.items() if k != "step"}, step=log["step"])
    if accelerator.is_main_process:
        file = out / "train.jsonl"
        with writing(file), open(file, "a", encoding="utf-8") as lines:
            lines.write(json.dumps(log) + "\n")


def save_state(accelerator, out: Path, step: int) -> None:
    """Model, optimizer, schedule and random state; a state without `step` is incomplete."""
    state = out / "state"
    new = out / "state.new"
    with writing(state):
        accelerator.save_state(str(new))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            write_text(new / "step", str(step))
            remove(state)
            new.rename(state)
    accelerator.wait_for_everyone()


def resume(accelerator, out: Path) -> int:
    """Load the last state; the step to start at.

    Log lines of steps to be done again are removed.
    """
    state = out / "state"
    if (out / "state.new" / "step").exists():  # killed while it replaced the old one
        state = out / "state.new"
    start = 0
    if (state / "step").exists():
        start = int(read_text(state / "step"))
        accelerator.load_state(str(state))
    log = out / "train.jsonl"
    if accelerator.is_main_process and log.exists():
        lines = read_text(log).splitlines(keepends=True)[:start]
        write_text(log, "".join(lines))
    return start
