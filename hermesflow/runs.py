"""A run of a stage: its processes, its output folder, and work that is resumed where it stopped."""

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from functools import cached_property
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from hermesflow.files import InputError, holdings, parse_json, reason, share, writing
from hermesflow.jsonl import ids_of, read_jsonl
from hermesflow.outputs import Output, complete, prepare

# that a process waits for another: a slow disk or a long caption is no failure
PATIENCE = timedelta(hours=24)
SETTLING = 120  # seconds that a shared disk may take to show what another process has written
PART_BYTES = 2**30  # at which a process starts another file


def processes() -> PartialState:
    """The processes of this run (accelerate launch, torchrun); on CPUs without an accelerator."""
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=PATIENCE)


def say(message: str) -> None:
    """One line on stdout, from the main process."""
    if processes().is_main_process:
        print(message, flush=True)


def from_main(make: Callable):
    """make() of the main process, on all of them; an InputError too.

    A shared disk may show other processes older files, on which they must not decide anything.
    """
    found = error = None
    if processes().is_main_process:
        try:
            found = make()
        except InputError as raised:
            error = raised
    found, error = broadcast_object_list([found, error])
    if error:
        raise error
    return found


def wait_until(there: Callable[[], bool], path: Path) -> None:
    """Wait for what another process has written to `path`.

    Raises InputError if it is still not there after SETTLING seconds.
    """
    end = time.monotonic() + SETTLING
    while not there():
        if time.monotonic() > end:
            message = f"what another process has written is not seen here after {SETTLING} seconds"
            raise InputError(f"{path}: {message}; is the folder shared? The same command continues "
                             "from here")
        time.sleep(1)


def prepare_output(output: Output) -> bool:
    """Take the output folder for this run; False if there is nothing to do.

    Raises InputError as `outputs.prepare`, and if --device is not there.
    """
    check_device(output.args.get("device"))
    state = processes()

    def take() -> bool:
        if complete(output):
            return False
        prepare(output)
        return True

    if not from_main(take):
        return False
    if not state.is_main_process:
        share(output.folder, state.process_index)
    return True


def check_device(name: str | None) -> None:
    if name is None:
        return
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"--device {name}: {reason(error)}") from None


# ----------------------------------------------------------------------------------- resumable work


class Earlier(Sequence):
    """The results that a finished run left in a JSONL file; as_result(record) makes them again."""

    def __init__(self, file: Path, kind: type, as_result: Callable):
        self.lines = read_jsonl(file, kind) if file.exists() else ()
        self.ids = ids_of(self.lines)
        self.as_result = as_result

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i) -> dict:
        return self.as_result(self.lines[i])


class Results(Sequence):
    """One JSON object per record, in the order of the records; read when asked for."""

    def __init__(self, ids: list[str], earlier, parts: "Parts"):
        self.ids = ids
        self.earlier = earlier
        self.earlier_places = {id: i for i, id in enumerate(earlier.ids)} if earlier else {}
        self.parts = parts

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[k] for k in range(len(self))[i]]
        id = self.ids[i]
        if id in self.earlier_places and id not in self.parts.places:
            return self.earlier[self.earlier_places[id]]
        if id not in self.parts.places:  # another process has written it
            self.parts.wait_for(id for id in self.ids if id not in self.earlier_places)
        return self.parts.read(id)


class Parts:
    """Results of an unfinished stage: a folder of files that processes append to.

    A line is an id, a tab and a JSON object. Every process of every run has files of its own; the
    line that a kill cut is not counted.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.own = None

    @cached_property
    def places(self) -> dict[str, int]:
        """id -> number of the file, and bytes from its start; of the results that are seen now."""
        self.files = sorted(self.folder.glob("*.log"))
        self.opened = {}
        places = {}
        for number, file in enumerate(self.files):
            for id, place in self.scan(file):
                places[id] = number << 40 | place
        return places

    def wait_for(self, ids: Iterable[str]) -> None:
        """Raises InputError if results that other processes have written are not seen in time."""
        ids = set(ids)

        def there() -> bool:
            del self.places  # look again
            return ids <= self.places.keys()

        if not ids <= self.places.keys():
            wait_until(there, self.folder)

    def scan(self, file: Path) -> Iterator[tuple[str, int]]:
        place = 0
        with open(file, "rb") as lines:
            for line in lines:
                if line.endswith(b"\n"):
                    yield line.partition(b"\t")[0].decode(), place
                place += len(line)

    def read(self, id: str) -> dict:
        number, place = divmod(self.places[id], 1 << 40)
        if number not in self.opened:
            self.opened[number] = open(self.files[number], "rb")
        self.opened[number].seek(place)
        line = self.opened[number].readline().partition(b"\t")[2]
        return parse_json(line.decode(), f"{self.files[number]}: id {id!r}")

    def append(self, results: list[dict], rank: int) -> None:
        """Raises InputError if the output folder was removed or replaced, or the disk is full."""
        lines = [f"{r['id']}\t{json.dumps(r, allow_nan=False)}\n" for r in results]
        with writing(self.folder):
            if self.own and self.own.tell() > PART_BYTES:
                self.close()
            if self.own is None:
                self.own = self.new_file(rank)
            for holding in holdings(self.folder):
                holding.check()
            self.own.write("".join(lines).encode())
            self.own.flush()

    def close(self) -> None:
        """On a shared disk, others see what a file holds when it is closed."""
        if self.own:
            with writing(self.folder):
                os.fsync(self.own.fileno())
                self.own.close()
        self.own = None

    def new_file(self, rank: int):
        self.folder.mkdir(parents=True, exist_ok=True)
        number = 0
        while True:
            try:
                return open(self.folder / f"{rank}-{os.getpid()}-{number}.log", "xb")
            except FileExistsError:  # of an earlier process with this number
                number += 1


def map_records(function: Callable[[list], list[dict]], records: Sequence, out, batch: int,
                label: str, length=None, earlier: Earlier | None = None) -> Results | None:
    """function(chunk) of all chunks of `batch` records: one JSON object with `id` per record.

    length(record): chunks hold records of similar length, so that their prompts can run together.
    earlier: results that are there already.

    Finished chunks are appended to OUT/parts, so an interrupted run continues, and several
    processes (accelerate launch) share the work. Returns the results in the order of the records on
    the main process, None on the others.
    """
    state = processes()
    folder = Path(out) / "parts" / label.replace(" ", "-")
    parts = Parts(folder)
    known = set(earlier.ids) if earlier else set()
    ids = ids_of(records)

    def missing() -> list[int]:
        return [i for i, id in enumerate(ids) if id not in parts.places and id not in known]

    todo = from_main(missing)
    if length:
        lengths = [length(records[i]) for i in todo]
        todo = [i for _, i in sorted(zip(lengths, todo))]
    # process p of P takes records p, p + P, p + 2P, …
    own = todo[state.process_index :: state.num_processes]
    everybody = state.num_processes if state.num_processes > 1 else False
    with tqdm(total=len(own), desc=label, unit="record", unit_scale=everybody,
              disable=not state.is_main_process) as bar:
        for start in range(0, len(own), batch):
            chunk = [records[i] for i in own[start : start + batch]]
            parts.append(function(chunk), state.process_index)
            bar.update(len(chunk))
    parts.close()
    state.wait_for_everyone()
    if not state.is_main_process:
        return None
    return Results(ids, earlier, Parts(folder))
