"""A training run around its steps: processes, order, signals, the reference's log-probs."""

import math
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator, PartialState
from tqdm import tqdm

from hermesflow.files import InputError, reason, remove
from hermesflow.records import Pair
from hermesflow.runs import PATIENCE, Parts, from_main
from hermesflow.sampling import stable_seed
from hermesflow.states import State, undamaged
from hermesflow.tables import load_tensors, save_tensors

FLUSH_SECONDS = 5.0  # of the reference pass that a kill may cost


def start_accelerator(batch: int, micro_batch: int, device: str | None, precision: str,
                      **settings) -> Accelerator:
    """An Accelerator that makes a step of `batch` records out of all processes' micro-batches.

    Raises InputError if it cannot.
    """
    on_cpu = device == "cpu" or not torch.accelerator.is_available()
    PartialState(cpu=on_cpu, timeout=PATIENCE)  # before Accelerator, which would wait for minutes
    if precision == "fp16" and on_cpu:
        raise InputError("--precision fp16 needs an accelerator; bf16 does not")
    try:
        accelerator = Accelerator(cpu=on_cpu, mixed_precision=precision, **settings)
    except ValueError as error:
        raise InputError(f"--precision {precision}: {reason(error)}") from None
    at_once = micro_batch * accelerator.num_processes
    if batch % at_once:
        raise InputError(f"--batch {batch} is not a multiple of --micro-batch {micro_batch} times "
                         f"{accelerator.num_processes} processes")
    accelerator.gradient_accumulation_steps = batch // at_once
    return accelerator


def decay_groups(net: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Optimizer groups: weight decay on matrices only, not on biases and norms."""
    matrices = [p for p in net.parameters() if p.ndim >= 2]
    others = [p for p in net.parameters() if p.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay},
            {"params": others, "weight_decay": 0.0}]


# -------------------------------------------------------------------------------------------- order


class Visit(NamedTuple):  # of a record, in one epoch
    pair: Pair
    epoch: int


def training_order(pairs: Sequence[Pair], steps: int, batch: int, seed: int) -> torch.Tensor:
    """(steps·batch, 2) positions of pairs and epochs: a new seeded permutation every epoch."""
    order = []
    for epoch in range(math.ceil(steps * batch / len(pairs))):
        generator = torch.Generator().manual_seed(stable_seed(seed, epoch, "order"))
        shuffled = torch.randperm(len(pairs), generator=generator)
        order.append(torch.stack([shuffled, torch.full_like(shuffled, epoch)], 1))
    return torch.cat(order)[: steps * batch]


def micro_batches(visits: range, size: int, accelerator: Accelerator) -> list[range]:
    """The visits that this process sees of a step, one range per forward pass."""
    return cut(visits, size)[accelerator.process_index :: accelerator.num_processes]


def cut(visits: range, size: int) -> list[range]:
    return [range(start, start + size) for start in range(visits.start, visits.stop, size)]


# ------------------------------------------------------------------------------------------ signals


class Interruptions:
    """SIGINT and SIGTERM end a run between two steps, when all processes know of one.

    While models are loaded, and for the second time, they end a process at once. A launcher may
    repeat the first one: within a second, that is no other one.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.waits = False  # for the end of a step
        self.received = 0  # the number of the signal
        self.since = 0.0
        self.message = ""
        self.before = {}

    def __enter__(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            self.before[number] = signal.signal(number, self.note)
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.message and self.accelerator.is_main_process:
            print(self.message, file=sys.stderr, flush=True)  # below the bar, which has closed

    def note(self, number: int, _frame) -> None:
        if not self.received:
            self.received = number
            self.since = time.monotonic()
            if not self.waits:
                self.end(number, "between two steps")
        elif time.monotonic() - self.since > 1:
            self.__exit__()
            signal.raise_signal(number)

    def agreed(self) -> int:
        """The signal that a process of this run has received, or 0; the same on all of them."""
        if self.accelerator.num_processes == 1:
            return self.received
        received = torch.tensor([self.received], device=self.accelerator.device)
        return int(self.accelerator.gather(received).max())

    def end(self, number: int, when: str) -> None:
        """End this process as a shell expects it of one that a signal ended."""
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.message = f"error: interrupted {when}; the same command continues from here"
        sys.exit(128 + number)


# ---------------------------------------------------------------------------------------- reference


class ReferenceFile:
    """OUT/reference.safetensors: log-probs (visits, 2 halves, 2) that are computed once.

    Until it is complete, they are gathered in OUT/reference, and a killed run goes on from there.
    """

    def __init__(self, out: Path, visits: int, own: bool, accelerator: Accelerator):
        self.path = out / "reference.safetensors"
        self.folder = out / "reference"
        self.visits = visits
        self.own = own  # of the policy that training starts from
        self.accelerator = accelerator
        self.parts = None
        self.pending = []
        self.flushed = time.monotonic()

    def exists(self) -> bool:
        return from_main(self.path.exists)

    def load(self) -> torch.Tensor:
        return from_main(self.read)

    def read(self) -> torch.Tensor:
        with undamaged(self.path):
            logps = load_tensors(self.path)["logps"]
            if logps.shape != (self.visits, 2, 2) or not logps.isfinite().all():
                raise ValueError(f"not {self.visits} x 2 x 2 finite numbers")
        return logps

    def missing(self, size: int, interruptions: Interruptions) -> Iterator[range]:
        """The micro-batches of this process that are still to be computed."""
        rank = self.accelerator.process_index
        processes = self.accelerator.num_processes
        self.parts = Parts(self.folder)
        todo = from_main(lambda: self.todo(size))
        bar = tqdm(range(0, len(todo), processes), desc="reference",
                   disable=not self.accelerator.is_main_process)
        interruptions.waits = True
        for first in bar:
            # processes that share out a network call it together: one may do the last again
            yield todo[min(first + rank, len(todo) - 1)]
            number = interruptions.agreed()
            if number:
                self.flush()
                interruptions.end(number, "while the reference was computed")
        interruptions.waits = False
        self.flush()

    def todo(self, size: int) -> list[range]:
        """The micro-batches of all processes that are still to be computed."""
        with undamaged(self.folder):
            known = self.parts.places
        everything = cut(range(self.visits), size)
        return [at for at in everything if not all(str(visit) in known for visit in at)]

    def add(self, at: range, logps: torch.Tensor, ids: list[str]) -> None:
        """logps: (B, 2, 2) of the visits `at`, of the records `ids`."""
        self.pending.append((at, logps, ids))
        if time.monotonic() - self.flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        results = []
        for at, logps, ids in self.pending:
            if not logps.isfinite().all():
                raise InputError(f"reference: log-probs of records {', '.join(ids)} are not finite "
                                 "numbers; --precision no may help")
            for visit, values in zip(at, logps.tolist()):
                results.append({"id": str(visit), "logps": values})
        if results:
            self.parts.append(results, self.accelerator.process_index)
        self.pending = []
        self.flushed = time.monotonic()

    def save(self) -> None:
        """Put together what all processes have found."""
        self.parts.close()
        self.accelerator.wait_for_everyone()
        from_main(self.put_together)

    def put_together(self) -> None:
        parts = Parts(self.folder)
        parts.wait_for(map(str, range(self.visits)))
        logps = torch.zeros(self.visits, 2, 2)
        with undamaged(self.folder):
            for visit in range(self.visits):
                logps[visit] = torch.tensor(parts.read(str(visit))["logps"])
        save_tensors(self.path, {"logps": logps})
        remove(self.folder)


# ------------------------------------------------------------------------------------------- steps


def remaining_steps(steps: int, save_every: int, state: State,
                    interruptions: Interruptions) -> tqdm:
    """A bar over the numbers of the steps that the last state has left to do.

    Between two, states are saved, and signals end the run.
    """
    if 0 < save_every < steps:
        state.say_size(save_every)
    start = state.resume(steps)

    def numbers() -> Iterator[int]:
        interruptions.waits = True
        for step in range(start, steps):
            yield step
            if step + 1 == steps:
                return
            signal_number = interruptions.agreed()
            if signal_number or save_every and (step + 1) % save_every == 0:
                state.save(step + 1)
            if signal_number:
                interruptions.end(signal_number, f"after step {step}, whose state is saved")

    return tqdm(numbers(), desc="Pair-DPO", initial=start, total=steps,
                disable=not interruptions.accelerator.is_main_process)
