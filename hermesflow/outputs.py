"""Output folders: what they were made from, whether they are complete, and what may be removed.

OUT/settings.json holds the settings, the contents of all inputs and the code that decide what a
stage writes. Imports nothing heavy: a complete stage says so before torch is loaded.
"""

import errno
import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from pathlib import Path

from hermesflow.contents import ROOT, code_of, content, digest, pieces
from hermesflow.files import (Holding, InputError, finished_path, lock, read_object, reason, remove,
                              write_text, written_files)
from hermesflow.hub import require

FORMAT = "3"  # of all files that stages write
# what a stage continues from; removed when it is complete
TEMPORARY = ("parts", "reference", "state", "state.new")
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)


def run_main(main, if_memory_runs_out: str = "a smaller --batch or --dtype bfloat16") -> None:
    """Run a stage: bad input, a full disk and exhausted memory end in one line and exit code 2."""
    code = 2
    try:
        return main()
    except InputError as error:
        message = str(error)
    except KeyboardInterrupt:
        message = "interrupted; the same command continues from here"
        code = 130
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        path = error.filename or "output"
        message = f"{path}: {error.strerror}; rerun the same command to continue"
    except (MemoryError, RuntimeError) as error:
        out_of_memory = type(error).__name__ in ("MemoryError", "OutOfMemoryError")
        if not out_of_memory and "can't allocate memory" not in str(error):
            raise
        message = f"out of memory ({reason(error)[:120]}); {if_memory_runs_out} helps"
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(code)


# -------------------------------------------------------------------------- what a stage is made of


@dataclass
class Output:
    """An output folder, and everything that decides what a stage writes into it."""

    folder: Path
    stage: str  # such as "01_sample"
    finished: str  # the file whose presence says that the stage is complete
    writes: tuple[str, ...]  # names that it writes directly below the folder
    args: dict  # the options; all of them decide the results, except these:
    free: tuple[str, ...]  # change no result
    derived: tuple[str, ...]  # change only what is made from finished results in seconds
    # option -> what is compared by content: a file or folder, a hub id (by revision), None, or a
    # function that iterates over items of texts and files, which may grow at their end
    inputs: dict[str, str | Path | Callable | None]
    code: tuple[str, ...]  # the stage's files
    made_from: dict = field(default_factory=dict)  # inputs that only derived files are made from


def describe(output: Output) -> dict:
    """The content of settings.json."""
    settings = {}
    derived = {}
    for name, value in output.args.items():
        if name in output.derived:
            derived[name] = str(value)
        elif name not in (*output.free, *output.inputs, *output.made_from, "out", "overwrite"):
            settings[name] = str(value)
    derived |= {name: describe_input(value) for name, value in output.made_from.items()}
    inputs = {name: describe_input(value) for name, value in output.inputs.items()}
    return {"stage": output.stage, "format": FORMAT, "complete": False, "settings": settings,
            "inputs": inputs, "derived": derived, "code": code_of(output.code)}


def describe_input(value) -> dict | None:
    if value is None:
        return None
    if callable(value):
        items = 0

        def counted():
            nonlocal items
            items = 0
            for item in value():
                items += 1
                yield item

        return {"content": content(counted), "items": items}
    return {"content": digest(value)}


def changes(output: Output, before: dict, now: dict) -> tuple[list[str], list[str]]:
    """What differs and is refused; what differs and is made from the results that are there."""
    refused = []
    for name in {**before["settings"], **now["settings"]}:
        old = before["settings"].get(name)
        new = now["settings"].get(name)
        if old != new:
            refused.append(f"--{name.replace('_', '-')} {old} -> {new}")
    grown = []
    for name in {**before["inputs"], **now["inputs"]}:
        old = before["inputs"].get(name)
        new = now["inputs"].get(name)
        if old == new:
            continue
        if isinstance(old, dict) and new and has_grown(output.inputs[name], old, new):
            grown.append(f"{name}: {old['items']} -> {new['items']}")
        else:
            refused.append(f"content of --{name.replace('_', '-')}")
    again = [name for name in now["derived"] if before["derived"].get(name) != now["derived"][name]]
    return refused, again + grown


def has_grown(value, old: dict, new: dict) -> bool:
    """Whether the first items are the old ones."""
    count = old.get("items")
    if not callable(value) or type(count) is not int or not 0 <= count < new["items"]:
        return False
    return content(lambda: islice(value(), count)) == old.get("content")


# ------------------------------------------------------------------------------- before any work


def complete(output: Output) -> bool:
    """Whether nothing is left to do; then it says so. Raises InputError as `prepare` does."""
    finished = output.folder / output.finished
    if output.args["overwrite"] or not finished.exists():
        return False
    before = read_mark(output)
    if before is None or not before["complete"]:
        return False
    if compare(output, before, describe(output)):
        return False
    if os.environ.get("RANK", "0") == "0":
        remove_temporary(output)  # if it was killed while it removed them
        print(f"{finished} is complete", flush=True)
    return True


def exit_if_complete(output: Output) -> None:
    """What a stage does before its heavy imports: its models can be found, or it has ended.

    Several processes, which may see different files, decide that together in `prepare_output`.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1" and complete(output):
        sys.exit()
    require(*(value for value in output.inputs.values() if isinstance(value, str)))


def compare(output: Output, before: dict, now: dict) -> list[str]:
    """What is to be made again from results that are there; says which code has changed.

    Raises InputError if the folder was made with anything else that changes its results.
    """
    refused, again = changes(output, before, now)
    if refused:
        message = f"made with other settings ({'; '.join(refused)})"
        raise InputError(f"{output.folder}: {message}; use --overwrite or another --out")
    for name, size in before.get("files", {}).items():
        file = output.folder / name
        if file.is_file() and file.stat().st_size != size:
            raise InputError(f"{file}: changed since {output.stage} wrote it; --overwrite makes it "
                             "again, another --out keeps it")
    code = sorted(n for n, text in now["code"].items() if before["code"].get(n) != text)
    if code:
        say_once(f"note: {output.folder} was begun by other code: {', '.join(code)} changed since; "
                 "--overwrite makes it again")
    return again


@cache
def say_once(message: str) -> None:
    """One line on stdout, from the first process."""
    if os.environ.get("RANK", "0") == "0":
        print(message, flush=True)


def prepare(output: Output) -> Holding:
    """Take the folder: empty it if asked to, or check that it was made from the same.

    Raises InputError, before anything is touched, if the folder is not the stage's, holds its own
    input, is in use, or was made from something else.
    """
    check_place(output)
    if read_mark(output) is None or output.args["overwrite"]:
        refuse_others_files(output)
    holding = lock(output.folder)
    holding.remove_temporaries()
    if output.args["overwrite"]:
        empty(holding)
    before = read_mark(output)
    now = describe(output)
    if before is not None:
        again = compare(output, before, now)
        now["code"] = before["code"]  # what it was begun with
        now["complete"] = before["complete"] and not again
        if again and "images" in output.writes:  # no picture of what was before
            remove(*(output.folder / n for n in holding.written if n.startswith("images/")))
        if again and before["complete"]:
            print(f"{output.folder}: made again from its results: {', '.join(again)}", flush=True)
    if before != now:
        write_mark(output, now)
    return holding


def finish(output: Output) -> None:
    """Say in the folder that the stage is complete, and remove what it continued from."""
    mark = read_object(output.folder / "settings.json")
    names = written_files(output.folder) - {"settings.json"}
    files = [name for name in sorted(names) if not name.startswith("images/")]
    paths = {name: output.folder / name for name in files}
    sizes = {name: path.stat().st_size for name, path in paths.items() if path.is_file()}
    write_mark(output, mark | {"complete": True, "files": sizes})
    remove_temporary(output)


def remove_temporary(output: Output) -> None:
    remove(*(output.folder / name for name in TEMPORARY))


def write_mark(output: Output, mark: dict) -> None:
    write_text(output.folder / "settings.json", json.dumps(mark, indent=1) + "\n")


def read_mark(output: Output) -> dict | None:
    """settings.json, or None where no stage has left results.

    Raises InputError if another stage or another version has.
    """
    file = output.folder / "settings.json"
    if "settings.json" not in written_files(output.folder) or not has_results(output.folder):
        # a folder of an earlier version has no list of files
        mark = {}
        with suppress(InputError):  # no JSON: somebody else's file, or none
            mark = read_object(file)
        if mark.get("format", FORMAT) != FORMAT:
            message = f"made by another version (format {mark['format']} -> {FORMAT})"
            raise InputError(f"{output.folder}: {message}; use another --out")
        return None
    try:
        mark = read_object(file)
        kinds = dict.fromkeys(("settings", "inputs", "derived", "code"), dict)
        for name, kind in {"stage": str, "format": str, "complete": bool, **kinds}.items():
            if not isinstance(mark.get(name), kind):
                raise InputError(f"{file}: field '{name}' is damaged")
        if mark["format"] != FORMAT:
            message = f"made by another version (format {mark['format']} -> {FORMAT})"
            raise InputError(f"{output.folder}: {message}")
    except InputError as error:
        if output.args["overwrite"]:
            return None
        raise InputError(f"{error}; use --overwrite to begin again, or another --out") from None
    if mark.get("stage") != output.stage:
        message = f"holds the results of {mark.get('stage')}; {output.stage} needs another --out"
        raise InputError(f"{output.folder}: {message}")
    return mark


def has_results(folder: Path) -> bool:
    """Whether anything would be lost with this folder but its settings."""
    names = written_files(folder) - {"settings.json"}
    if any((folder / name).is_file() for name in names):
        return True
    return any(p.is_file() for name in TEMPORARY for p in (folder / name).rglob("*"))


# -------------------------------------------------------------------------------- what is not ours


def check_place(output: Output) -> None:
    """Raises InputError if the folder is, holds or lies inside something that is not a result."""
    place = Path(os.path.realpath(output.folder))
    for name, path in (("the home folder", Path.home()), ("this program", ROOT)):
        path = Path(os.path.realpath(path))
        if place == path or place in path.parents:
            raise InputError(f"--out {output.folder}: is or holds {name}")
    if (place / ".git").exists():
        raise InputError(f"--out {output.folder}: is a git checkout")
    for name, paths in read_paths(output).items():
        for path in paths:
            if path == place or place in path.parents:
                message = f"is or holds its own input (--{name.replace('_', '-')}: {path})"
                raise InputError(f"--out {output.folder}: {message}")
            if path in place.parents and path.is_dir():
                message = f"lies inside its own input (--{name.replace('_', '-')}: {path})"
                raise InputError(f"--out {output.folder}: {message}")


def read_paths(output: Output) -> dict[str, set[Path]]:
    """option -> the files and folders it reads; of many files in a folder, one."""
    inputs = {**output.inputs, **output.made_from}
    named = {n: v for n, v in output.args.items() if isinstance(v, Path) and n != "out"}
    found = {}
    for name, value in (*named.items(), *inputs.items()):
        paths = [value] if value and not callable(value) else []
        if callable(value):
            paths = {p.parent: p for p in pieces(value) if isinstance(p, Path)}.values()
        there = {Path(os.path.realpath(p)) for p in paths if os.path.exists(p)}
        found[name] = found.get(name, set()) | there
    return found


def refuse_others_files(output: Output) -> None:
    """Raises InputError if what the stage will write is there and no stage wrote it."""
    ours = written_files(output.folder)
    kept = () if ours else TEMPORARY  # below these, no file is listed
    for name in (*output.writes, "settings.json", *kept):
        path = output.folder / name
        found = [path] if os.path.lexists(path) else []
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if not p.is_dir())
        names = {p: str(finished_path(p).relative_to(output.folder)) for p in found}
        theirs = [p for p in found if names[p] not in ours]
        if theirs:
            message = "is there already, and no stage wrote it; use another --out"
            raise InputError(f"{theirs[0]}: {message}")


def empty(holding: Holding) -> None:
    """Remove what stages wrote, and the folders that are empty then; everything else stays."""
    folder = holding.folder
    files = [folder / name for name in sorted(holding.written) if name != "settings.json"]
    remove(*(file for file in files if not file.is_dir()))
    remove(*(folder / name for name in TEMPORARY))
    for file in sorted(files, reverse=True):
        for parent in (file, *file.parents):
            if folder in parent.parents:
                with suppress(OSError):  # not empty, or not a folder
                    parent.rmdir()
    remove(folder / "settings.json", *holding.private.glob("written-*"))
    holding.written = set()
