"""What an interrupted training continues from.

A state holds tensors whole and by name, so a run may go on in another number of processes, with
another micro-batch, sharded or not. Nothing random is drawn in training, so it holds no generator.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from hermesflow.files import (InputError, claim, parse_json, read_object, read_text, reason, remove,
                              write_text, writing)
from hermesflow.runs import from_main, say, wait_until
from hermesflow.tables import load_tensors, save_tensors

FILE_BYTES = 2**28  # of a state: of a sharded network, so much is put together at once


def require_finite(parameters: Iterable[torch.Tensor], when: str,
                   accelerator: Accelerator) -> None:
    """Raises InputError, on all processes, if an update has spoilt the weights of any."""
    extremes = []
    for p in parameters:
        values = p.to_local() if isinstance(p, DTensor) else p
        if values.numel():
            extremes += values.detach().aminmax()  # needs no memory, unlike isfinite()
    spoilt = (~torch.stack(extremes).isfinite()).float().sum()
    if accelerator.reduce(spoilt, "sum").item():
        raise InputError(f"{when}: the update left parameters that are not finite numbers; nothing "
                         "is saved of it, a lower --lr may help")


def final_weights(net: torch.nn.Module, steps: int, accelerator: Accelerator) -> dict:
    """All weights, on the main process. Raises InputError if they are not finite."""
    require_finite(net.parameters(), f"step {steps - 1}", accelerator)
    return accelerator.get_state_dict(net)


@contextmanager
def undamaged(path):
    """What a damaged file of this run leads to becomes one line that names it."""
    try:
        yield
    except InputError as error:  # it names the file
        raise InputError(f"{error}; use --overwrite to begin again") from None
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        message = f"damaged ({reason(error)}); use --overwrite to begin again"
        raise InputError(f"{path}: {message}") from None


class State:
    """OUT/state: weights, optimizer and schedule after a step; its file `step` is written last.

    Of weights, those that are trained: with adapters, these alone.
    """

    def __init__(self, out: Path, net: torch.nn.Module, optimizer, scheduler,
                 accelerator: Accelerator):
        self.out = out
        self.folder = out / "state"
        self.new = out / "state.new"
        net = accelerator.unwrap_model(net)
        for module in net.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # a forward pass leaves whole parameters behind
        self.names = {p: name for name, p in net.named_parameters()}
        self.parameters = {name: p for p, name in self.names.items() if p.requires_grad}
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.accelerator = accelerator

    def say_size(self, every: int) -> None:
        """The disk that states need: weights, and the two moments of AdamW."""
        size = 3 * sum(p.numel() * p.element_size() for p in self.parameters.values())
        size = f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
        say(f"state: {size} every {every} steps, twice while it is replaced")

    def values(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The weights, and all that the optimizer keeps of them, by "KEY NAME"."""
        for name, p in self.parameters.items():
            for key, value in {"weight": p, **self.optimizer.state.get(p, {})}.items():
                if isinstance(value, DTensor):
                    value = value.full_tensor()  # by all processes together
                if value is not None:
                    yield f"{key} {name}", torch.as_tensor(value).detach()

    def files(self) -> Iterator[dict[str, torch.Tensor]]:
        tensors = {}
        size = 0
        for name, value in self.values():
            tensors[name] = value
            size += value.nbytes
            if size > FILE_BYTES:
                yield tensors
                tensors = {}
                size = 0
        yield tensors

    def save(self, step: int) -> None:
        """Raises InputError if the weights are not finite, or the disk is full."""
        require_finite(self.parameters.values(), f"step {step - 1}", self.accelerator)
        main = self.accelerator.is_main_process
        if main:
            remove(self.new)  # that a killed run left
        count = 0
        for number, tensors in enumerate(self.files()):
            if main:
                on_cpu = {name: value.cpu() for name, value in tensors.items()}
                save_tensors(self.new / f"{number:05d}.safetensors", on_cpu)
            count += len(tensors)
        if main:
            scaler = self.accelerator.scaler
            rest = {"tensors": count, "scheduler": self.scheduler.state_dict(),
                    "scaler": scaler and scaler.state_dict()}
            write_text(self.new / "rest.json", json.dumps(rest) + "\n")
            write_text(self.new / "step", str(step))
            self.replace()
        self.accelerator.wait_for_everyone()

    def replace(self) -> None:
        for file in self.new.iterdir():
            claim(self.folder / file.name)
        remove(self.folder)
        with writing(self.folder):
            self.new.rename(self.folder)

    def resume(self, steps: int) -> int:
        """Load the last state; the step to start at, below `steps`.

        Log lines of steps to be done again are removed.
        """
        step = from_main(lambda: self.last_step(steps))
        if step:
            wait_until(lambda: self.shows(step), self.folder)
            with undamaged(self.folder):
                self.load(read_object(self.folder / "rest.json"))
        from_main(lambda: cut_log(self.out / "train.jsonl", step))
        return step

    def last_step(self, steps: int) -> int:
        """The step of the last state, or 0 if there is none."""
        if (self.new / "step").exists():
            self.replace()  # it was killed while it did
        if not self.folder.exists():
            return 0
        with undamaged(self.folder):
            step = int(read_text(self.folder / "step"))
            if not 0 < step < steps:
                raise ValueError(f"step {step} of {steps}")
        return step

    def shows(self, step: int) -> bool:
        """Whether the state that this process sees is the one of `step`."""
        with suppress(InputError, ValueError):  # not there yet, or just replaced
            return int(read_text(self.folder / "step")) == step
        return False

    @torch.no_grad()
    def load(self, rest: dict) -> None:
        order = [self.names[p] for group in self.optimizer.param_groups for p in group["params"]]
        kept = {name: {} for name in order}  # of the optimizer
        count = 0
        for file in sorted(self.folder.glob("*.safetensors")):
            for what, value in load_tensors(file).items():
                key, _, name = what.partition(" ")
                p = self.parameters[name]
                if key == "weight" and value.shape != p.shape:
                    raise ValueError(f"{what} has another shape")
                value = like(p, value)
                if key == "weight":
                    p.copy_(value)
                else:
                    kept[name][key] = value.clone()  # not mapped to the file
                count += 1
        if count != rest["tensors"]:
            raise ValueError(f"{count} tensors instead of {rest['tensors']}")
        state = self.optimizer.state_dict()
        state["state"] = {i: kept[name] for i, name in enumerate(order) if kept[name]}
        self.optimizer.load_state_dict(state)
        self.scheduler.load_state_dict(rest["scheduler"])
        for group, lr in zip(self.optimizer.param_groups, self.scheduler.get_last_lr()):
            group["lr"] = lr
        if self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(rest["scaler"])


def like(p: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """A value of the parameter's shape, sharded as this is; any other one as it is."""
    if not isinstance(p, DTensor) or value.shape != p.shape:
        return value
    return distribute_tensor(value.to(p.device), p.device_mesh, p.placements, src_data_rank=None)


def cut_log(file: Path, steps: int) -> None:
    """Keep the first `steps` lines. Raises InputError if they are not there."""
    lines = []
    if steps:
        with undamaged(file):
            lines = read_text(file).splitlines(keepends=True)[:steps]
            found = [parse_json(line, str(file))["step"] for line in lines]
            if found != list(range(steps)):
                raise ValueError(f"not the {steps} steps that OUT/state has done")
    if file.exists():
        write_text(file, "".join(lines))
