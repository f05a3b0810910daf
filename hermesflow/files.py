"""Files read with one clear line for whatever is wrong, and written whole or not at all.

Imports nothing heavy: a stage that has nothing left to do says so before torch is loaded.
"""

import fcntl
import json
import os
import re
import shutil
import socket
import stat
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

PRIVATE = ".run"  # in an output folder: its lock, and the names of the files that stages wrote
POINTER = b"version https://git-lfs.github.com/spec/v1"  # begins a file that is still to be fetched
UMASK = os.umask(0)
os.umask(UMASK)


class InputError(Exception):
    """Something the user gave us is wrong.

    The message names the file, the line or id, and the field.
    """


def reason(error: Exception) -> str:
    """The first line of a library's message, or at least the kind of error."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0]


# ------------------------------------------------------------------------------------------ reading


@contextmanager
def reading(path):
    """What prevents reading (absent, no permission, not UTF-8) becomes one line naming `path`."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or error}") from None


def require_regular(path) -> None:
    """Raises OSError for anything but a file: a named pipe would be waited for, for ever.

    And for a pointer in whose place Git LFS has yet to put the file.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        raise OSError("is a folder" if stat.S_ISDIR(mode) else "not a regular file")
    with open(path, "rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise OSError("a Git LFS pointer, not the file itself: `git lfs pull` fetches it")


def read_text(path) -> str:
    """A UTF-8 file. Raises InputError if it cannot be read or is not UTF-8."""
    with reading(path):
        require_regular(path)
        return Path(path).read_text(encoding="utf-8-sig")


def parse_json(text: str, where: str):
    """The value of a JSON text. Raises InputError naming `where`; NaN and Infinity are not JSON."""

    def reject(name):
        raise ValueError(f"{name} is not a JSON number")

    try:
        return json.loads(text, parse_constant=reject)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not valid JSON ({error})") from None


def read_object(path) -> dict:
    """The JSON object in a file. Raises InputError if it is anything else."""
    value = parse_json(read_text(path), str(path))
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected an object, found {type(value).__name__}")
    return value


# ---------------------------------------------------------------------- output folders of this run

def written_files(folder: Path) -> set[str]:
    """The names, relative to an output folder, of all files that stages wrote there."""
    names = set()
    for file in (folder / PRIVATE).glob("written-*"):
        names |= set(read_text(file).split("\n"))
    # a crash of the system may leave anything in a file that was written to last
    return {name for name in names if name and is_below(name)}


def is_below(name: str) -> bool:
    """Whether a name relative to a folder stays inside it."""
    return "\0" not in name and not os.path.isabs(name) and ".." not in Path(name).parts


HELD = {}  # absolute output folder -> its Holding, as long as this process lives


class Holding:
    """An output folder that this process writes into, and the files that stages wrote there.

    Only these are ever replaced or removed. Every process keeps a manifest of its own, so that no
    line of one is mixed into another's.
    """

    def __init__(self, folder: Path, rank: int):
        self.folder = Path(os.path.abspath(folder))
        self.private = self.folder / PRIVATE
        self.private.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.private / "lock", "a+", encoding="utf-8")
        self.manifest = self.private / f"written-{rank}"
        self.read_manifests()

    def read_manifests(self) -> None:
        self.written = written_files(self.folder)

    def check(self) -> None:
        """Raises InputError if the folder was removed or replaced under this process."""
        try:
            ours = os.path.samestat(os.stat(self.private / "lock"), os.fstat(self.lock.fileno()))
        except OSError:
            ours = False
        if not ours:
            message = f"removed or replaced while process {os.getpid()} was running, which stops"
            raise InputError(f"{self.folder}: {message}")

    def claim(self, path: Path) -> None:
        """Note that `path` will be written. Raises InputError if it is there and not ours."""
        self.check()
        name = path.relative_to(self.folder)
        if str(name) in self.written or any(finished_path(p) != p for p in name.parents):
            return  # ours already, or inside a folder that will be renamed
        name = str(name)
        if os.path.lexists(path):
            raise InputError(f"{path}: is there already, and no stage wrote it; move it away")
        with open(self.manifest, "a", encoding="utf-8") as manifest:
            manifest.write(name + "\n")
        self.written.add(name)

    def remove_temporaries(self) -> None:
        """Remove what a killed run left half-written: temporary siblings of files it wrote."""
        for folder in {(self.folder / name).parent for name in self.written}:
            for file in folder.glob(".*.tmp"):
                if str(finished_path(file).relative_to(self.folder)) in self.written:
                    remove(file)


def holdings(path) -> list[Holding]:
    """The output folders of this run that `path` is in."""
    path = Path(os.path.abspath(path))
    return [holding for folder, holding in HELD.items() if folder in path.parents]


def claim(path) -> None:
    """`Holding.claim` of the output folder that `path` is in; other paths are free."""
    for holding in holdings(path):
        holding.claim(Path(os.path.abspath(path)))


def is_ours(path) -> bool:
    """Whether a stage wrote `path`, as far as its output folder is held and knows."""
    path = Path(os.path.abspath(path))
    return all(str(path.relative_to(h.folder)) in h.written for h in holdings(path))


def lock(out: Path) -> Holding:
    """Hold `out` until this process ends, however it ends.

    Raises InputError naming the process that holds it.
    """
    folder = Path(os.path.abspath(out))
    with suppress(InputError, KeyError):
        HELD[folder].check()
        HELD[folder].read_manifests()
        return HELD[folder]
    with writing(out):
        holding = Holding(folder, 0)
    try:
        # the system releases it with the process: no lock is ever stale
        fcntl.flock(holding.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holding.lock.seek(0)
        holder = holding.lock.read().strip() or "another process"
        raise InputError(f"{out}: in use by {holder}") from None
    except OSError as error:  # some network file systems have no locks
        print(f"note: {out}: cannot be locked ({error.strerror}); run one stage at a time in it")
    with writing(out):
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        holding.lock.truncate(0)
        holding.lock.write(f"process {os.getpid()} on {socket.gethostname()} since {now}")
        holding.lock.flush()
    HELD[folder] = holding
    return holding


def share(out: Path, rank: int) -> None:
    """Hold `out` in another process of the run that has locked it."""
    folder = Path(os.path.abspath(out))
    HELD[folder] = Holding(folder, rank)


# ------------------------------------------------------------------------------------------ writing


@contextmanager
def writing(path):
    """What prevents writing (no space, read-only, no permission) becomes one line naming `path`."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch reports a full disk as a RuntimeError; any other RuntimeError is a bug, not the disk
        text = str(error)
        from_torch = any(s in text for s in ("PytorchStreamWriter", "iostream", "inline_container"))
        if isinstance(error, RuntimeError) and not from_torch:
            raise
        why = getattr(error, "strerror", None) or reason(error)
        if from_torch:
            why = f"no space left, or the disk failed ({why})"
        message = f"{path}: cannot write: {why}; the same command continues from here"
        raise InputError(message) from None


def temporary_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def finished_path(path: Path) -> Path:
    """What a temporary file would have been renamed to; any other path as it is."""
    of = re.fullmatch(r"\.(.+)\.\d+\.tmp", path.name)
    return path.with_name(of[1]) if of else path


@contextmanager
def atomic(path):
    """Yield a temporary sibling of `path` (file or folder), renamed if the block succeeds.

    Below an output folder that this process holds, files that no stage wrote are not replaced.
    """
    path = Path(path)
    temporary = temporary_path(path)
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            claim(path)
            yield temporary
            written = [temporary]
            if temporary.is_dir():
                written = sorted(p for p in temporary.rglob("*") if p.is_file())
                for file in written:
                    claim(path / file.relative_to(temporary))
            for file in written:
                file.chmod(0o666 & ~UMASK)  # safetensors writes files that only their owner reads
            if temporary.is_dir() and path.is_dir():
                shutil.rmtree(path)
            os.replace(temporary, path)
    finally:
        with suppress(OSError):
            remove(temporary)


def write_text(path, text: str) -> None:
    """Write a text file whole or not at all."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def remove(*paths: Path) -> None:
    """Remove files and folders that may or may not be there."""
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
