"""Tables: JSON lines for people, and their tensors in safetensors shards beside them.

NAME.jsonl holds a record a line; its `shard` and `row` say where its tensors are, and `digest` is
their content. NAME-00000.safetensors, NAME-00001.safetensors, … hold int32 tensors of many
records, stacked: (R, …), padded with -1. Both are written and read a record at a time, so memory
does not grow with their number; no shard grows beyond SHARD_BYTES and a record.
"""

import hashlib
import itertools
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hermesflow.files import InputError, atomic, is_ours, reason, remove, require_regular
from hermesflow.jsonl import Lines, to_line

SHARD_BYTES = 64 * 2**20  # at which another shard is begun,
SHARD_ROWS = 4096  # or at these many records: they are in memory until then
Tensors = dict[str, torch.Tensor]


def load_tensors(path) -> Tensors:
    """name -> tensor of a safetensors file. Raises InputError if it cannot be read."""
    try:
        require_regular(path)
        return load_file(path)
    except Exception as error:  # safetensors raises its own type, the file system OSError
        raise InputError(f"{path}: cannot read: {error}") from None


def save_tensors(path, tensors: Tensors, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file whole or not at all."""
    with atomic(path) as temporary:
        save_file({name: t.contiguous() for name, t in tensors.items()}, temporary, metadata)


# ------------------------------------------------------------------------------------------ writing


def write_table(path, rows) -> int:
    """Write (record, its tensors) pairs to `path` and shards beside it; returns their number.

    The shards first: the presence of `path` says that the table is complete.
    """
    path = Path(path)
    shard = Shard(path, 0)
    count = 0
    with atomic(path) as temporary, open(temporary, "w", encoding="utf-8") as lines:
        for record, tensors in rows:
            if shard.bytes >= SHARD_BYTES or len(shard.rows) == SHARD_ROWS:
                shard.save()
                shard = Shard(path, shard.number + 1)
            lines.write(to_line(shard.add(record, tensors), path.parent))
            count += 1
        shard.save()
    for number in itertools.count(shard.number + 1):  # of an earlier, longer table
        stale = shard_path(path, number)
        if not stale.exists() or not is_ours(stale):
            return count
        remove(stale)


def shard_path(path: Path, number: int) -> Path:
    return path.with_name(f"{path.stem}-{number:05d}.safetensors")


class Shard:
    """A shard while it is filled."""

    def __init__(self, path: Path, number: int):
        self.path = shard_path(path, number)
        self.number = number
        self.rows = []
        self.bytes = 0

    def add(self, record, tensors: Tensors):
        """The record with the place of its tensors."""
        tensors = {name: t.to("cpu", torch.int32) for name, t in tensors.items()}
        placed = replace(record, shard=self.path.name, row=len(self.rows), digest=digest(tensors))
        self.rows.append(tensors)
        self.bytes += sum(t.nbytes for t in tensors.values())
        return placed

    def save(self) -> None:
        stacked = {}
        for name in self.rows[0] if self.rows else ():
            stacked[name] = stack([tensors[name] for tensors in self.rows])  # (R, …)
        save_tensors(self.path, stacked)


def stack(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Tensors of different last sizes, padded with -1."""
    longest = max(t.shape[-1] for t in tensors)
    stacked = torch.full((len(tensors), *tensors[0].shape[:-1], longest), -1, dtype=torch.int32)
    for row, t in zip(stacked, tensors):
        row[..., : t.shape[-1]] = t
    return stacked


def unpad(tensor: torch.Tensor) -> torch.Tensor:
    """Without the columns at the end that hold nothing but -1."""
    used = (tensor != -1).flatten(0, -2).any(0) if tensor.ndim > 1 else tensor != -1  # (L,)
    return tensor[..., : int(used.nonzero().max()) + 1 if used.any() else 0]


def digest(tensors: Tensors) -> str:
    """The content of a record's tensors in 16 hexadecimal digits."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        values = unpad(tensors[name]).contiguous()
        total.update(f"{name} {list(values.shape)} ".encode())
        total.update(values.numpy().tobytes())
    return total.hexdigest()[:16]


# ------------------------------------------------------------------------------------------ reading


@lru_cache(maxsize=4)  # what is read of them counts as memory of this process
def open_shard(path: Path, _changed: int):
    """The tensors of a shard, which are read from the disk when they are sliced."""
    shard = safe_open(path, "pt")
    return {name: shard.get_slice(name) for name in shard.keys()}


def tensors_of(record) -> Tensors:
    """name -> int64 tensor of a record that was read from a table, without padding.

    Raises InputError if the shard is missing, damaged or of another table.
    """
    path = Path(record.folder, record.shard)
    where = f"{path}: row {record.row} (id {record.id!r})"
    try:
        require_regular(path)
        slices = open_shard(path, path.stat().st_mtime_ns)
        tensors = {name: unpad(t[record.row].int()) for name, t in slices.items()}
    except Exception as error:  # safetensors raises its own type, IndexError, OSError, …
        raise InputError(f"{where}: cannot read: {reason(error)}") from None
    if digest(tensors) != record.digest:
        raise InputError(f"{where}: not the tensors of this record; was the file made again?")
    return {name: t.long() for name, t in tensors.items()}


def sample_tensors(sample) -> Tensors:
    """The tensors of a sample. Raises InputError, too, if it has other captions than its line."""
    tensors = tensors_of(sample)
    counts = {len(sample.captions), len(sample.ended), len(tensors.get("captions", ()))}
    if len(counts) > 1:
        raise InputError(f"{sample.folder / 'samples.jsonl'}: id {sample.id!r}: fields 'captions' "
                         f"and 'ended' do not belong to the token ids in {sample.shard}")
    return tensors


def check_table(model, records: Lines, codes: tuple[str, ...], ids: tuple[str, ...]) -> None:
    """Raises InputError if image codes or token ids of a table were made with another model.

    codes, ids: names of the tensors that hold them. One shard at a time is in memory.
    """
    if "" in records.shards:
        raise InputError(f"{records.path}: field 'shard' is missing: where are the tensors?")
    for shard in sorted(records.shards):
        path = records.path.parent / shard
        tensors = load_tensors(path)
        absent = [name for name in (*codes, *ids) if name not in tensors]
        if absent:
            raise InputError(f"{path}: no tensor '{absent[0]}'")
        for name in codes:
            check_codes(model, tensors[name], f"{path}: '{name}'")
        for name in ids:
            values = tensors[name]
            check_text_ids(model, values[values != -1], f"{path}: '{name}'")


def check_codes(model, codes: torch.Tensor, where: str) -> None:
    """Raises InputError unless these are (…, N) codes of this model."""
    N = model.image_tokens
    whole = codes.numel() and codes.shape[-1:] == (N,) and not codes.is_floating_point()
    if not whole or codes.min() < 0 or codes.max() >= model.code_count:
        raise InputError(f"{where} should be {N} codes below {model.code_count}; were they made "
                         "with another model?")


def check_text_ids(model, ids: torch.Tensor, where: str) -> None:
    """Raises InputError if a token id is outside the vocabulary."""
    outside = ids.numel() and (ids.min() < 0 or ids.max() >= model.vocab_size)
    if ids.numel() and ids.is_floating_point() or outside:
        raise InputError(f"{where}: a token is outside the vocabulary")


def check_samples(model, samples: Lines) -> None:
    check_table(model, samples, ("image", "images"), ("captions",))


def check_pairs(model, pairs: Lines) -> None:
    check_table(model, pairs, ("image", "win_image", "lose_image"),
                ("win_caption", "lose_caption"))
