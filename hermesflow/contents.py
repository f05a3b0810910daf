"""What files contain, in 16 hexadecimal digits: how a rerun knows that it was given the same.

Imports nothing heavy.
"""

import ast
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from hermesflow.files import InputError, reading, write_text
from hermesflow.hub import fetch

ROOT = Path(__file__).resolve().parent.parent


Item = tuple[str | Path, ...]  # texts, and files that are read


def digest(path) -> str:
    """The content of a file or of all files below a folder; of a hub repository its revision."""
    path = Path(path)
    if not path.exists():
        return revision(str(path))
    if path.is_file():
        return content(lambda: [(path,)])

    def items():
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            name = file.relative_to(path)
            if not any(part.startswith(".") for part in name.parts):
                yield str(name), file

    return content(items)


def revision(repository: str) -> str:
    """The revision of a hub repository that will be loaded."""
    config = fetch(repository, "config.json")  # …/snapshots/REVISION/config.json
    return Path(config).parent.name[:16]


def content(items: Callable[[], Iterable[Item]]) -> str:
    """The content of texts and files, in this order, in 16 hexadecimal digits.

    Large files are read once: their content is remembered beside what the system says of them.
    """
    seen = hashlib.sha256()
    newest = 0
    files = False
    for piece in pieces(items):
        known = piece
        if isinstance(piece, Path):
            files = True
            known, changed = identity(piece)
            newest = max(newest, changed)
        seen.update(f"{len(known)} {known}\n".encode(errors="surrogatepass"))
    seen = seen.hexdigest()[:32]
    if not files:
        return seen[:16]
    contents = remembered()
    if seen not in contents:
        contents[seen] = content_of(items)
        # a file that changes within its clock's resolution looks unchanged: as git, wait for that
        if time.time() - newest > 2:
            remember(contents)
    return contents[seen]


def pieces(items: Callable[[], Iterable[Item]]) -> Iterator[str | Path]:
    for item in items():
        yield from item


def content_of(items: Callable[[], Iterable[Item]]) -> str:
    total = hashlib.sha256()
    for piece in pieces(items):
        if isinstance(piece, Path):
            piece = file_content(piece) if piece.is_file() else "missing"
        total.update(f"{len(piece)} {piece}\n".encode(errors="surrogatepass"))
    return total.hexdigest()[:16]


def identity(file: Path) -> tuple[str, float]:
    """What the system says of a file, and when it was changed."""
    try:
        s = os.stat(file)
    except (OSError, ValueError):
        return f"missing {file}", 0
    name = os.path.abspath(file)
    return f"{name} {s.st_size} {s.st_mtime_ns} {s.st_ctime_ns} {s.st_ino}", s.st_ctime


def file_content(path: Path) -> str:
    with reading(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remembered_file() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "hermesflow" / "contents.json"


def remembered() -> dict[str, str]:
    """identity -> content, of files that were read before."""
    with suppress(Exception):  # a damaged cache is none
        values = json.loads(remembered_file().read_text())
        return {str(k): str(v) for k, v in values.items()}
    return {}


def remember(contents: dict[str, str]) -> None:
    recent = dict(list(contents.items())[-2000:])
    with suppress(InputError):  # a home that cannot be written
        write_text(remembered_file(), json.dumps(recent))


def code_of(files: Iterable[str]) -> dict[str, str]:
    """file -> content, of code and of everything in this repository that it imports."""
    todo = [Path(f).resolve() for f in files]
    found = {}
    while todo:
        file = todo.pop()
        name = os.path.relpath(file, ROOT)
        if name in found:
            continue
        text = file.read_bytes()
        found[name] = hashlib.sha256(text).hexdigest()[:16]
        for node in ast.walk(ast.parse(text)):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom) and node.module:
                modules = [node.module, *(f"{node.module}.{a.name}" for a in node.names)]
            if isinstance(node, ast.Constant) and str(node.value).startswith("hermesflow."):
                modules = [node.value]  # for import_module
            paths = [ROOT / (module.replace(".", "/") + ".py") for module in modules]
            todo += [p for p in paths if p.is_file()]
    return dict(sorted(found.items()))
