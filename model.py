"""Show-o: one transformer that reads and draws, with its image tokenizer, prompts, decoding and log-probabilities.

The four stages share this file. From top to bottom: errors and seeds, records on disk, images, the MAGVIT-v2 image
tokenizer, the token layout, the backbone with its log-probabilities, image decoding, text decoding, loading and saving.

Shapes in comments: B batch rows, K samples per prompt, T sequence, N image tokens, V vocabulary, C image codes,
S segments behind one prefix, D hidden size.
"""

import dataclasses
import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
import socket
import sys
import textwrap
import time
import typing
import unicodedata
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from PIL import Image, ImageDraw, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoTokenizer, DynamicCache, PhiConfig, PhiForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface
from transformers.models.phi.modeling_phi import PhiRotaryEmbedding
from transformers.utils import cached_file

CAPTION_QUESTION = "Give a caption for this image."  # the released captioning prompt
IGNORE = -100  # "no label here"
FORMAT = "2"  # of all files that stages write; another number than in OUT/settings.json stops a rerun


# ---------------------------------------------------------------------------------------------- errors and seeds


class InputError(Exception):
    """Something the user gave us is wrong. The message names the file, the line or id, and the field."""


def reason(error: Exception) -> str:
    """The first line of what a library says went wrong, or at least the kind of error."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def run(main, if_memory_runs_out: str = "a smaller --batch or --dtype bfloat16"):
    """Run a stage: bad input, a full disk and exhausted memory end in one line on stderr and exit code 2."""
    try:
        main()
    except InputError as error:
        message = str(error)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        message = f"{error.filename or 'output'}: {error.strerror}; rerun the same command to continue"
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "can't allocate memory" not in str(error):
            raise
        message = f"out of memory ({reason(error)[:120]}); {if_memory_runs_out} helps"
    else:
        return
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(2)


def processes() -> PartialState:
    """The processes that share this run: those of accelerate launch or torchrun; without an accelerator, CPUs."""
    return PartialState(cpu=not torch.accelerator.is_available())


def seed_of(*parts) -> int:
    """A 63-bit seed from (seed, round, id, sample, …), the same on every machine and in every process."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def uniforms(seed: int, *shape) -> torch.Tensor:
    """float32 numbers in (0, 1) that depend on the seed alone, drawn on the CPU so that every device sees the same."""
    draw = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    return draw.clamp(1e-7, 1 - 1e-7)


# ----------------------------------------------------------------------------------------------- records on disk


@dataclass
class Question:
    question: str
    choices: list[str]
    answer: str
    element: str = ""  # what the question is about: color, counting, spatial, …


@dataclass
class Record:
    """One homologous input (x, y): an image and its caption, with the questions that judge drawings of it."""

    id: str
    image: str  # path, relative to the records file
    caption: str
    prompt: str = ""  # the text to draw from; empty: the caption
    questions: list[Question] = field(default_factory=list)

    @property
    def drawing_text(self) -> str:
        return self.prompt or self.caption


@dataclass
class Sample(Record):
    """A record with what the policy said and drew. Token ids and codes are in samples.safetensors under the same id."""

    captions: list[str] = field(default_factory=list)


@dataclass
class Score:
    """What 02_score.py found for one sampled record; `answers[k][q]` is the policy's answer about image k."""

    id: str
    questions: list[Question]
    caption_scores: list[float]
    image_scores: list[float]
    answers: list[list[str]]
    dropped: str = ""  # why the record gives no pair; empty: it does


@dataclass
class Pair:
    """One homologous preference record (x, y, y_w, y_l, x_w, x_l), complete with the tokens to train on."""

    id: str
    image: str
    caption: str
    prompt: str
    image_codes: list[int]
    win_caption: str
    lose_caption: str
    win_caption_ids: list[int]
    lose_caption_ids: list[int]
    win_caption_score: float
    lose_caption_score: float
    win_image_codes: list[int]
    lose_image_codes: list[int]
    win_image_score: float
    lose_image_score: float
    win_image_wrong: list[str]  # the questions that the policy answered wrong about it
    lose_image_wrong: list[str]

    @property
    def drawing_text(self) -> str:
        return self.prompt or self.caption


def parse_record(kind: type, value, where: str):
    """Build dataclass `kind` from JSON, checking every field. Raises InputError naming `where` and the field."""
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected an object, found {type(value).__name__}")
    values = {}
    for f in dataclasses.fields(kind):
        if f.name in value:
            values[f.name] = parse_value(f.type, value[f.name], f"{where}: field '{f.name}'")
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise InputError(f"{where}: field '{f.name}' is missing")
    return kind(**values)


def parse_value(kind, value, where: str):
    if typing.get_origin(kind) is list:
        if not isinstance(value, list):
            raise InputError(f"{where} should be a list, found {type(value).__name__}")
        return [parse_value(typing.get_args(kind)[0], v, where) for v in value]
    if dataclasses.is_dataclass(kind):
        return parse_record(kind, value, where)
    fits = type(value) is kind or (kind is float and type(value) is int)
    if not fits or (kind is float and abs(value) > 1e300) or (kind is str and not value.isascii() and unpaired(value)):
        raise InputError(f"{where} should be {kind.__name__}, found {json.dumps(value)[:60]}")
    return kind(value)


def unpaired(text: str) -> bool:
    """Half of a surrogate pair is legal in JSON and cannot be written to a file again."""
    return any("\ud800" <= c <= "\udfff" for c in text)


def read_text(path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from None


def parse_json(text: str, where: str):
    def reject(name):
        raise ValueError(f"{name} is not a JSON number")

    try:
        return json.loads(text, parse_constant=reject)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not valid JSON ({error})") from None


def collect(build, values: list, path, skipped: list[str] | None) -> list:
    """build(value, where) of all (where, value). A bad one raises InputError, or is left out and noted in `skipped`.

    Ids join the stages and name files: they must be unique, non-empty, and safe as a file name.
    """
    kept, seen = [], set()
    for where, value in values:
        with skipping(skipped):
            r = build(value, where)
            if r.id in ("", ".", "..") or len(r.id.encode()) > 200 or any(c in "/\\" or not c.isprintable() for c in r.id):
                raise InputError(f"{where}: field 'id': {r.id[:60]!r} cannot be used as a file name")
            if unicodedata.normalize("NFC", r.id) in seen:
                raise InputError(f"{where}: field 'id': {r.id!r} occurs twice")
            if isinstance(r, Record) and not r.drawing_text.strip():
                raise InputError(f"{where}: field 'caption' is empty")
            for q in getattr(r, "questions", []):
                check_question(q, where)
            seen.add(unicodedata.normalize("NFC", r.id))
            kept.append(r)
    if not kept:
        raise InputError(f"{path}: no records" + (f"; {skipped[0]}" if skipped else ""))
    return kept


@contextmanager
def skipping(skipped: list[str] | None):
    """With a list, bad input inside the block ends the block alone, and its reason is noted."""
    try:
        yield
    except InputError as error:
        if skipped is None:
            raise
        skipped.append(str(error))


def check_question(q: Question, where: str) -> None:
    if not q.choices:
        raise InputError(f"{where}: field 'choices' is empty: {q.question[:40]!r}")
    if q.answer not in q.choices:
        raise InputError(f"{where}: field 'answer': {q.answer[:40]!r} is not among the choices of {q.question[:40]!r}")


def read_jsonl(path, kind: type, skipped: list[str] | None = None) -> list:
    """The records of a JSONL file, every field checked against dataclass `kind`."""
    lines = [(f"{path}: line {n}", line) for n, line in enumerate(read_text(path).split("\n"), 1) if line.strip()]
    return collect(lambda line, where: parse_record(kind, parse_json(line, where), where), lines, path, skipped)


def write_jsonl(path, records: list) -> None:
    write_file(path, "".join(json.dumps(dataclasses.asdict(r), ensure_ascii=False) + "\n" for r in records))


def read_records(path, questions=None, skipped: list[str] | None = None) -> list[Record]:
    """Homologous inputs from our JSONL, or from the original `initial_data.json` with its `vqa_data.json`.

    The original's ids are numbers or strings; questions are joined **by id**. Image paths are made absolute: relative
    to the records file, or (as in the original) to the working directory if they exist there.
    skipped: a list that takes the reasons of bad records, which are left out; without it, the first one raises.
    """
    path = Path(path)
    if path.suffix == ".jsonl":
        records = read_jsonl(path, Record, skipped)
    else:
        records = collect(original_record, read_array(path), path, skipped)
    by_id = {r.id: r for r in records}
    for where, value in read_array(questions) if questions is not None else ():
        with skipping(skipped):
            question = parse_record(Question, value, where)
            check_question(question, where)
            owner = by_id.get(str(value.get("id")))
            if owner is None:
                raise InputError(f"{where}: field 'id': {value.get('id')!r} is not in {path}")
            owner.questions.append(question)
    for r in records:
        beside = path.parent / r.image
        r.image = os.path.abspath(r.image if os.path.exists(r.image) and not os.path.exists(beside) else beside)
    return records


def read_array(path):
    value = parse_json(read_text(path), str(path))
    if not isinstance(value, list):
        raise InputError(f"{path}: expected an array of records, found {type(value).__name__}")
    return [(f"{path}: record {n}", v) for n, v in enumerate(value, 1)]


def original_record(value, where: str) -> Record:
    if isinstance(value, dict):
        value = {**value, "image": value.get("image", value.get("img_path"))}
        if type(value.get("id")) is int:
            value["id"] = str(value["id"])
    return parse_record(Record, value, where)


@contextmanager
def writing(path):
    """What goes wrong while writing (no space, read-only, no permission) becomes one line that names `path`."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error) and "iostream" not in str(error):
            raise
        why = getattr(error, "strerror", None) or reason(error)
        raise InputError(f"{path}: cannot write: {why}; the same command continues from here") from None


@contextmanager
def atomic(path):
    """Yield a temporary sibling of `path` (file or folder) that takes the final name only if the block succeeds."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            if temporary.is_dir() and path.is_dir():
                shutil.rmtree(path)
            os.replace(temporary, path)
    finally:
        with suppress(OSError):
            shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink(missing_ok=True)


def write_file(path, text: str) -> None:
    """Write a text file whole or not at all."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def digest(path) -> str:
    """The contents of a file, of all files of a folder or of a list of files, in 16 hexadecimal digits; of a hub
    repository its revision."""
    if isinstance(path, list):
        return hashlib.sha256("".join(digest(p) if Path(p).is_file() else "missing" for p in path).encode()).hexdigest()[:16]
    path = Path(path)
    if not path.exists():
        config = find_file(path, "config.json")  # …/snapshots/REVISION/config.json
        return Path(config).parent.name[:16] if config else ""
    found = hashlib.sha256()
    try:
        for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
            with open(file, "rb") as content:
                hashed = hashlib.file_digest(content, "sha256").hexdigest()
            found.update(f"{file.relative_to(path)} {hashed}\n".encode())
    except OSError as error:
        raise InputError(f"{error.filename}: {error.strerror}") from None
    return found.hexdigest()[:16]


LOCKS = {}  # output folder -> its lock file, open as long as this process lives


def lock(out: Path) -> None:
    """Hold `out` until this process ends, however it ends. Raises InputError naming the process that holds it."""
    if out.resolve() in LOCKS:
        return
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        file = open(out / ".lock", "a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system releases it with the process: none is ever stale
    except OSError:
        file.seek(0)
        raise InputError(f"{out}: in use by {file.read().strip() or 'another process'}") from None
    with writing(out):
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        file.flush()
    LOCKS[out.resolve()] = file


def claim(out, args, finished: str, inputs: dict) -> bool:
    """Prepare output folder `out` for a run with `args`; False if the file `finished` shows it is complete.

    inputs: name -> path (or list of files) of everything that is read; None: not given. A folder that was made with other
    settings, other contents of these, or by another version of the formats is an error that says what differs, unless
    --overwrite empties it. One run at a time holds the folder; what a killed one left half-written is removed.
    """
    out, state = Path(out), processes()
    if state.is_main_process:
        lock(out)
        known, others = out / "settings.json", [p for p in out.iterdir() if p.name != ".lock"]
        if args.overwrite and others:
            if not known.exists():
                raise InputError(f"{out}: not made by a stage (no settings.json), so --overwrite does not empty it")
            remove(*others)
        settings = {k: str(v) for k, v in vars(args).items() if k not in ("out", "overwrite", "device", "batch", "strict")}
        settings |= {"format": FORMAT} | {f"content of {k}": digest(v) for k, v in inputs.items() if v is not None}
        if known.exists():
            before = read_object(known)
            changed = [f"{k} {before.get(k)} -> {v}" for k, v in settings.items() if before.get(k) != v]
            if changed:
                raise InputError(f"{out}: made with other settings ({'; '.join(changed)}); "
                                 "use --overwrite or another --out")
        write_file(known, json.dumps(settings, indent=1) + "\n")
        remove(*out.rglob(".*.tmp"))
        if (out / finished).exists():
            remove(out / "parts", out / "state", out / "state.new")
    state.wait_for_everyone()
    return not (out / finished).exists()


def remove(*paths: Path) -> None:
    """Files and folders, if they are there."""
    for path in paths:
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def map_records(function, records: list, out, batch: int, label: str, length=None) -> list[dict] | None:
    """function(chunk) of all chunks of `batch` records, joined; it returns one JSON object with `id` per record.

    length(record): chunks hold records of similar length, so that their prompts can run together.

    Every finished chunk is a file below OUT/parts, so an interrupted run continues, and several processes (accelerate
    launch) share the work. Returns the results in the order of the records on the main process, None on the others.
    """
    state, parts = processes(), Path(out) / "parts"

    def finished() -> dict:
        lines = ((f, line) for f in sorted(parts.glob("*.jsonl")) for line in read_text(f).splitlines())
        return {value["id"]: value for value in (parse_json(line, str(f)) for f, line in lines)}

    done = finished()
    state.wait_for_everyone()  # all processes see the same `done` before anyone adds to it
    todo = [r for r in records if r.id not in done]
    todo = (sorted(todo, key=length) if length else todo)[state.process_index :: state.num_processes]
    with tqdm(total=len(todo), desc=label, disable=not state.is_main_process) as bar:
        for start in range(0, len(todo), batch):
            results = function(todo[start : start + batch])
            part = parts / f"{seed_of(results[0]['id']):016x}.jsonl"
            write_file(part, "".join(json.dumps(r) + "\n" for r in results))
            bar.update(len(results))
    state.wait_for_everyone()
    return [done[r.id] for r in records] if state.is_main_process and (done := finished()) else None


def save_tensors(path, tensors: dict) -> None:
    with atomic(path) as temporary:
        save_file({k: v.contiguous() for k, v in tensors.items()}, temporary)


def load_tensors(path) -> dict:
    try:
        return load_file(path)
    except Exception as error:  # safetensors raises its own type, the file system OSError
        raise InputError(f"{path}: cannot read: {error}") from None


# -------------------------------------------------------------------------------------------------------- images


def load_image(path, size: int) -> torch.Tensor:
    """(3, size, size) in [-1, 1]: shorter side to `size` (bicubic, antialiased), centre crop, as the original does."""
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I"):  # 16 bits per pixel: convert() would clip instead of scale
                image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
            image = image.convert("RGB")
    except Exception as error:  # Pillow raises OSError, ValueError, SyntaxError, … for broken files
        raise InputError(f"{path}: cannot read image: {error}") from None
    short, long = sorted(image.size)
    if long > 100 * short:
        raise InputError(f"{path}: an image of {image.size[0]}x{image.size[1]} pixels has no usable centre")
    width, height = (int(size * side / short) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    pixels = np.asarray(image.crop((left, top, left + size, top + size)), dtype=np.float32)
    return torch.from_numpy(pixels / 255).permute(2, 0, 1) * 2 - 1


def to_pil(pixels: torch.Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [-1, 1] to B pictures."""
    array = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(a) for a in array]


def save_picture(picture: Image.Image, path) -> None:
    with atomic(path) as temporary:
        picture.save(temporary, format="PNG")


def sheet(rows: list[list], labels: list[str], cell: int = 128, columns: int = 1) -> Image.Image:
    """A contact sheet: blocks of one row of pictures under its label, `columns` blocks side by side."""
    letters, line = cell * max(map(len, rows)) // 6, 14  # the default font is about 6 px wide
    texts = [[piece for part in label.split("\n") for piece in textwrap.wrap(part, letters)] for label in labels]
    height, width = line * max(map(len, texts)) + cell + 14, max(map(len, rows)) * (cell + 4) + 12
    canvas = Image.new("RGB", (columns * width, math.ceil(len(rows) / columns) * height), "white")
    draw = ImageDraw.Draw(canvas)
    for i, (pictures, text) in enumerate(zip(rows, texts)):
        left, top = i % columns * width + 6, i // columns * height + 4
        draw.text((left, top), "\n".join(text), fill="black", spacing=2)
        for c, picture in enumerate(pictures):
            picture = picture.convert("RGB").resize((cell, cell), Image.Resampling.BICUBIC)
            canvas.paste(picture, (left + c * (cell + 4), top + height - cell - 10))
    return canvas


# ------------------------------------------------------------------------------- MAGVIT-v2, the image tokenizer


@dataclass
class MagvitConfig:
    """Defaults are the published `showlab/magvitv2`: 16 px per token, 2^13 codes, 95.4 M parameters."""

    ch: int = 128
    bits: int = 13
    encoder_mult: tuple = (1, 2, 2, 4, 4)
    encoder_blocks: tuple = (4, 3, 4, 3, 4)
    decoder_mult: tuple = (1, 1, 2, 2, 4)
    decoder_blocks: tuple = (4, 4, 3, 4, 3)


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResBlock(nn.Module):
    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1, self.conv1 = norm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = norm(c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.nin_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class PixelAttention(nn.Module):
    """Single-head attention over all positions of the coarsest map."""

    def __init__(self, c):
        super().__init__()
        self.norm = norm(c)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x):
        n = self.norm(x)
        q, k, v = (f(n).flatten(2).transpose(1, 2) for f in (self.q, self.k, self.v))  # (B, h*w, c)
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(h.transpose(1, 2).view_as(x))


class Level(nn.Module):
    """Residual blocks at one resolution, and the step to the next one."""

    def __init__(self, c_in, c_out, blocks, step=None):
        super().__init__()
        self.block = nn.ModuleList(ResBlock(c_in if i == 0 else c_out, c_out) for i in range(blocks))
        if step is not None:
            setattr(self, step, nn.ModuleDict({"conv": nn.Conv2d(c_out, c_out, 3, 2 if step == "downsample" else 1,
                                                                 0 if step == "downsample" else 1)}))

    def forward(self, x):
        for block in self.block:
            x = block(x)
        if hasattr(self, "downsample"):  # the border is padded at the right and the bottom only
            x = self.downsample["conv"](F.pad(x, (0, 1, 0, 1)))
        if hasattr(self, "upsample"):
            x = self.upsample["conv"](F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return x


class Middle(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.block_1, self.attn_1, self.block_2 = ResBlock(c, c), PixelAttention(c), ResBlock(c, c)

    def forward(self, x):
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    def __init__(self, config: MagvitConfig):
        super().__init__()
        widths = [config.ch * m for m in config.encoder_mult]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, config.ch, 3, padding=1)
        self.down = nn.ModuleList(
            Level(c_in, c_out, blocks, "downsample" if i < last else None)
            for i, (c_in, c_out, blocks) in enumerate(zip([config.ch, *widths], widths, config.encoder_blocks)))
        self.mid, self.norm_out = Middle(widths[-1]), norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.bits, 3, padding=1)
        self.quant_conv = nn.Conv2d(config.bits, config.bits, 1)

    def forward(self, x):  # (B, 3, H, W) -> (B, bits, H/16, W/16), before the sign
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.quant_conv(self.conv_out(F.silu(self.norm_out(self.mid(x)))))


class Decoder(nn.Module):
    def __init__(self, config: MagvitConfig):
        super().__init__()
        widths = [config.ch * m for m in config.decoder_mult]
        self.post_quant_conv = nn.Conv2d(config.bits, config.bits, 1)
        self.conv_in = nn.Conv2d(config.bits, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList(
            Level(c_in, c_out, blocks, "upsample" if i > 0 else None)
            for i, (c_in, c_out, blocks) in enumerate(zip([*widths[1:], widths[-1]], widths, config.decoder_blocks)))
        self.norm_out = norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, bits):  # (B, bits, h, w) of ±1 -> (B, 3, 16h, 16w)
        x = self.mid(self.conv_in(self.post_quant_conv(bits)))
        for level in reversed(self.up):  # the coarsest level has the highest number
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Magvit(nn.Module):
    """MAGVIT-v2 with lookup-free quantisation: a code is the signs of `bits` channels, most significant first."""

    def __init__(self, config: MagvitConfig):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        powers = 2 ** torch.arange(config.bits - 1, -1, -1)
        codebook = ((torch.arange(2**config.bits)[:, None] & powers) > 0).float() * 2 - 1  # (C, bits)
        self.quantize = nn.Module()
        self.quantize.register_buffer("embedding", codebook)
        self.quantize.register_buffer("power_vals", powers)

    @property
    def downsampling(self) -> int:
        return 2 ** (len(self.config.encoder_mult) - 1)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, N) codes, row by row."""
        bits = self.encoder(pixels.to(self.encoder.conv_in.weight.dtype)) > 0
        return (bits.flatten(2).transpose(1, 2) * self.quantize.power_vals).sum(-1)

    def decode(self, codes: torch.Tensor, height: int | None = None) -> torch.Tensor:
        """(B, N) codes -> (B, 3, H, W) pixels, about [-1, 1]; `height` in tokens, by default a square."""
        height = height or math.isqrt(codes.shape[1])
        bits = self.quantize.embedding[codes].to(self.decoder.conv_in.weight.dtype)  # (B, N, bits)
        return self.decoder(bits.transpose(1, 2).unflatten(2, (height, -1)))


# -------------------------------------------------------------------------------------------------- token layout


class Tokens:
    """The one vocabulary: text, ten special tokens, image codes, the mask token. Nobody else knows an id.

    The special tokens are numbers, not strings in the tokenizer: a caption that contains "<|eoi|>" stays plain text.
    """

    SPECIAL = ("[PAD]", "<|soi|>", "<|eoi|>", "<|sov|>", "<|eov|>", "<|t2i|>", "<|mmu|>", "<|t2v|>", "<|v2v|>",
               "<|lvg|>")

    def __init__(self, tokenizer, codes: int, image_tokens: int, window: int = 129):
        self.tokenizer, self.codes, self.image_tokens, self.window = tokenizer, codes, image_tokens, window
        self.text_size = len(tokenizer)
        ids = {name: self.text_size + i for i, name in enumerate(self.SPECIAL)}
        self.pad, self.soi, self.eoi = ids["[PAD]"], ids["<|soi|>"], ids["<|eoi|>"]
        self.t2i, self.mmu = ids["<|t2i|>"], ids["<|mmu|>"]
        self.sot, self.eot = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.first_code = self.text_size + len(self.SPECIAL)
        self.mask = self.first_code + codes
        self.vocab_size = self.mask + 1

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids

    def decode(self, ids) -> str:
        """The text of an answer; tokens that are not text are left out, as in the original."""
        return self.tokenizer.decode([i for i in ids if i < self.text_size], skip_special_tokens=True)

    def draw(self, caption: str) -> list[int]:
        """`<|t2i|> <|sot|> text <|eot|>`, cut to the text window; without padding, which nobody sees."""
        ids = [self.t2i, self.sot, *self.encode(caption), self.eot]
        return ids if len(ids) <= self.window else [*ids[: self.window - 1], self.eot]

    def image(self, codes) -> list[int]:
        """`<|soi|> codes <|eoi|>`; a code of -1 becomes the mask token."""
        return [self.soi, *(self.mask if c < 0 else self.first_code + c for c in codes), self.eoi]

    def look(self, codes) -> list[int]:
        """`<|mmu|> <|soi|> codes <|eoi|>`: the image that captions and answers are about."""
        return [self.mmu, *self.image(codes)]

    def ask(self, question: str) -> list[int]:
        """`<|sot|> USER: \\n{question} ASSISTANT:`, one format for sampling, scoring and training."""
        return [self.sot, *self.encode(f"USER: \n{question} ASSISTANT:")]


def vqa_question(question: Question) -> str:
    """A multiple-choice question as the original asks it, with its choices as a Python list."""
    return f"Question:{question.question} Choice:{question.choices}"


# ------------------------------------------------------------------------- the backbone and its log-probabilities


class Layout(NamedTuple):
    """How packed rows attend: a prefix of width P, behind it S branches of equal width n that do not see one another."""

    prefix: int
    branches: int
    causal: bool  # whether the prefix is text
    mask: torch.Tensor | None  # (B·S, 1, 1 or n, P+n), True where a branch may look at prefix and itself; None: all


def attention(module, query, key, value, mask, is_causal=False, layout=None, images=None, **kwargs):
    """transformers' SDPA; "everything is visible" without a mask, packed rows with a layout, texts behind shared images.

    Packed rows need no (T, T) mask: the prefix attends to itself, each branch to the prefix and itself.
    """
    if images is not None:
        return images.attend(module.layer_idx, query, key, value, mask, kwargs["scaling"]), None
    if layout is None:
        return sdpa_attention_forward(module, query, key, value, mask, is_causal=is_causal, **kwargs)
    P, S = layout.prefix, layout.branches

    def divide(x):  # (B, H, P+S*n, d) -> (B, H, P, d), (B*S, H, n, d)
        prefix, branches = x.split([P, x.shape[2] - P], 2)
        return prefix, branches.unflatten(2, (S, -1)).transpose(1, 2).flatten(0, 1)

    (query, own_query), (key, own_key), (value, own_value) = map(divide, (query, key, value))
    all_keys = torch.cat([key.repeat_interleave(S, 0), own_key], 2)  # (B*S, H, P+n, d)
    all_values = torch.cat([value.repeat_interleave(S, 0), own_value], 2)
    first, _ = sdpa_attention_forward(module, query, key, value, None, is_causal=layout.causal, **kwargs)  # (B, P, H, d)
    rest, _ = sdpa_attention_forward(module, own_query, all_keys, all_values, layout.mask, is_causal=False, **kwargs)
    return torch.cat([first, rest.unflatten(0, (-1, S)).flatten(1, 2)], 1), None  # rest: (B*S, n, H, d)


AttentionInterface.register("showo", attention)


@dataclass
class Segment:
    """A stretch of a packed row: token ids, what each position should predict (IGNORE: nothing), and how it attends."""

    ids: list[int]
    targets: list[int] | None = None
    bidirectional: bool = False


def answer_segment(prompt: list[int], answer: list[int]) -> Segment:
    """Prompt and answer; each answer token (its `<|eot|>` included) is predicted by the position before it."""
    targets = [IGNORE] * (len(prompt) - 1) + answer + [IGNORE]
    return Segment(prompt + answer, targets)


def image_segment(tokens: Tokens, codes: list[int], masked: list[bool]) -> Segment:
    """An image block with some slots masked; each masked slot predicts its own code."""
    ids = tokens.image([-1 if m else c for c, m in zip(codes, masked)])
    targets = [IGNORE, *(tokens.first_code + c if m else IGNORE for c, m in zip(codes, masked)), IGNORE]
    return Segment(ids, targets, bidirectional=True)


def pack(rows: list[list[Segment]], pad: int, device=None) -> dict:
    """Rows of segments as tensors. The first segment of a row is the prefix that all others see; the others, its
    branches, do not see one another, so a row is worth as many separate sequences, at the price of one prefix.

    All rows have equally many branches; prefixes are all text or all image, branches, too. Each is padded on the right.
    Returns ids, targets, positions and segments, all (B, T) with T = P + S·n, and the layout.
    """
    prefixes, branches = [row[0] for row in rows], [segment for row in rows for segment in row[1:]]
    S = len(rows[0]) - 1
    P, n = (max(len(s.ids) for s in part) for part in (prefixes, branches))
    causal, within = ({not s.bidirectional for s in part} for part in (prefixes, branches))
    uneven = causal == {False} and len({len(s.ids) for s in prefixes}) > 1
    if len(causal) + len(within) > 2 or uneven or any(len(row) != S + 1 for row in rows):
        raise ValueError("rows of one pack must be of one kind")
    filled = np.zeros((4, len(rows), P + S * n), dtype=np.int64)  # ids, targets, positions, segment number
    filled[0], filled[1], filled[3] = pad, IGNORE, -1
    for b, row in enumerate(rows):
        for s, segment in enumerate(row):
            width, start = len(segment.ids), P + (s - 1) * n if s else 0
            positions = np.arange(width) + (len(row[0].ids) if s else 0)
            filled[:, b, start : start + width] = np.stack([segment.ids, segment.targets or [IGNORE] * width, positions,
                                                            np.full(width, s)])
    ids, targets, positions, segments = torch.from_numpy(filled).to(device)
    real = torch.cat([(segments[:, :P] == 0).repeat_interleave(S, 0), segments[:, P:].reshape(-1, n) > 0], 1)
    mask = None if real.all() else real[:, None, None]  # (B*S, 1, 1, P+n)
    if within == {True}:
        mask = real[:, None, None] & torch.ones(n, P + n, dtype=torch.bool, device=ids.device).tril(P)
    return dict(ids=ids, targets=targets, positions=positions, segments=segments, layout=Layout(P, S, True in causal, mask))


class Showo(nn.Module):
    """Show-o over transformers' Phi. Parameter names are those of the published checkpoints (`showo.model…`).

    config: the fields of the published config.json; phi: the language model's sizes; tokens: the vocabulary.
    """

    def __init__(self, config: dict, phi: PhiConfig, tokens: Tokens):
        super().__init__()
        phi.qk_layernorm, phi.vocab_size = True, tokens.vocab_size  # the original forces both
        phi.embd_pdrop = phi.resid_pdrop = phi.attention_dropout = 0.0  # policy and reference must agree at step 0
        phi._attn_implementation = "showo"
        phi.pad_token_id = None  # padding is masked; no embedding row is special
        self.config, self.tokens = config, tokens
        self.showo = PhiForCausalLM(phi)
        if phi.hidden_act == "gelu_new":  # the same function in one kernel, which also keeps one tensor instead of six
            for layer in self.showo.model.layers:
                layer.mlp.activation_fn = nn.GELU(approximate="tanh")

    @property
    def device(self):
        return self.showo.lm_head.weight.device

    def hidden(self, ids, positions, cache=None, mask=None, **how) -> torch.Tensor:
        """(B, T) token ids -> (B, T, D). mask None: everything is visible, unless `how` says is_causal or layout."""
        return self.showo.model(input_ids=ids, position_ids=positions, past_key_values=cache, attention_mask=mask,
                                use_cache=cache is not None, **how).last_hidden_state

    def forward(self, *packs: dict) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Log-probabilities of packed rows: per pack, sums and label counts per segment, both (B, S+1) float32."""
        return [self.segment_logprobs(**p) for p in packs]

    def segment_logprobs(self, ids, targets, positions, segments, layout, untold=None,
                         guidance=0.0) -> tuple[torch.Tensor, torch.Tensor]:
        """log softmax over the whole vocabulary, as in training; the head runs only where there is a label.

        untold: the pack of the same images behind an empty text. With it, the log-probs are those of the guided policy that
        `unmask` draws from: log softmax over image codes of (1 + guidance)·cond − guidance·uncond.
        """
        labelled = targets != IGNORE
        hidden, labels = self.hidden(ids, positions, layout=layout)[labelled], targets[labelled]  # (M, D), (M,), M labels
        head = self.showo.lm_head
        if untold:
            without = self.hidden(untold["ids"], untold["positions"], layout=untold["layout"])[untold["targets"] != IGNORE]
            hidden, labels, head = hidden + guidance * (hidden - without), labels - self.tokens.first_code, self.code_logits
        logprobs = self.label_logprobs(hidden, labels, head)  # (M,)
        B, S = len(ids), layout.branches + 1
        slot = (torch.arange(B, device=ids.device)[:, None] * S + segments)[labelled]  # (M,)
        sums = torch.zeros(B * S, device=ids.device).index_add(0, slot, logprobs)
        counts = torch.zeros(B * S, device=ids.device).index_add(0, slot, torch.ones_like(logprobs))
        return sums.view(B, S), counts.view(B, S)

    def label_logprobs(self, hidden, labels, head, at_once: int = 2048) -> torch.Tensor:
        """(M, D), (M,) -> (M,) log-probs. (at_once, V) logits exist at a time: backward computes them again."""
        def some(hidden, labels):
            return -F.cross_entropy(head(hidden).float(), labels, reduction="none")

        if len(labels) <= at_once:
            return some(hidden, labels)
        return torch.cat([checkpoint(some, *part, use_reentrant=False)
                          for part in zip(hidden.split(at_once), labels.split(at_once))])

    def code_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(…, D) -> (…, C) float32 logits of the image codes alone."""
        first, head = self.tokens.first_code, self.showo.lm_head
        rows = slice(first, first + self.tokens.codes)
        return F.linear(hidden, head.weight[rows], head.bias[rows]).float()

    def logprobs(self, rows: list[list[Segment]]) -> tuple[torch.Tensor, torch.Tensor]:
        return self(pack(rows, self.tokens.pad, self.device))[0]


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Optimizer groups: weight decay on matrices only, not on biases and norms."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def random_mask(n: int, seed: int) -> list[bool]:
    """The mask of a training image: t ~ U(0, 1), round(n·cos(πt/2)) slots but at least one, drawn from the seed."""
    draws = uniforms(seed, n + 1)
    count = max(1, round(n * math.cos(math.pi / 2 * draws[0].item())))
    return (draws[1:].argsort().argsort() < count).tolist()


# ------------------------------------------------------------------------------------------------ drawing images


def pick(probs: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Sample from (…, V) probabilities with one uniform number per draw (inverse cumulative distribution)."""
    cumulative = probs.cumsum(-1)
    u = u.unsqueeze(-1).to(cumulative) * cumulative[..., -1:]
    return torch.searchsorted(cumulative, u, right=True).squeeze(-1).clamp(max=probs.shape[-1] - 1)


def slots_to_mask(step: int, steps: int, n: int) -> int:
    """floor(n·cos(π/2·(step+1)/steps)), in float32 as the original computes it (it differs at exact integers)."""
    ratio = torch.tensor((step + 1) / steps)
    return int(torch.floor(n * torch.cos(ratio * math.pi * 0.5)))


def mask_least_confident(probs, gumbel, count, temperature: float) -> torch.Tensor:
    """(B, N) probabilities of the sampled codes -> True where a slot is masked again.

    Confidence is log p + temperature·Gumbel; `count` (B, 1) slots with the lowest become masks.
    """
    confidence = probs.log() + temperature * gumbel
    cut = confidence.sort(-1).values.gather(1, count)
    return confidence < cut


class TextPrefix:
    """Keys and values of text prompts, computed once; the image block is then run against them step after step.

    Text never sees the image, so its keys and values are the same in all decoding steps. Prompts of one batch have
    equal length, so there is neither padding nor a mask.
    """

    def __init__(self, model: Showo, prompts: list[list[int]]):
        unique = sorted(set(map(tuple, prompts)))
        ids = torch.tensor(unique, device=model.device)
        self.row = torch.tensor([unique.index(tuple(p)) for p in prompts], device=model.device)  # (B,)
        self.model, self.length, self.unique, self.cache = model, ids.shape[1], len(unique), DynamicCache()
        model.hidden(ids, torch.arange(self.length, device=model.device)[None], self.cache, is_causal=True)
        block = model.tokens.image_tokens + 2
        self.positions = torch.arange(self.length, self.length + block, device=model.device)[None]
        self.one_per_prompt = True

    def hidden(self, block: torch.Tensor, alike: bool) -> torch.Tensor:
        """(B, N+2) image block -> (B, N, D) at the image slots. Where all blocks are alike, as they are in the first
        step, one per prompt is enough."""
        if self.one_per_prompt and not alike:
            self.cache.batch_select_indices(self.row)
            self.one_per_prompt = False
        hidden = self.model.hidden(block[: self.unique] if alike else block, self.positions, self.cache)[:, 1:-1]
        self.cache.crop(-block.shape[1])  # forget the image block again
        return hidden[self.row] if alike else hidden


@dataclass
class Drawing:
    """How images are decoded; the defaults are the paper's. The last two are approximations, off by default."""

    steps: int = 50
    guidance: float = 5.0  # classifier-free: (1 + g)·cond − g·uncond
    temperature: float = 1.0  # of the confidence noise
    anneal: str = "compound"  # the original: times 1 − (step+1)/steps at every step; "maskgit": that, times the start
    guidance_interval: tuple[float, float] = (0.0, 1.0)  # guidance in this part of the steps only
    guidance_every: int = 1  # the unconditional half in every so many steps only; in between, its last difference


DRAW_AT_ONCE = 4096  # image tokens in one forward pass: enough to fill a processor, and logits stay small


@torch.inference_mode()
def draw_images(model: Showo, texts: list[str], seeds: list[int] | None, how: Drawing) -> torch.Tensor:
    """MaskGIT decoding: one image per text, (B, N) codes. Texts may repeat; prompts of one length run together.

    seeds: one per image, or None for greedy decoding (argmax, no Gumbel noise).
    """
    prompts, N = [model.tokens.draw(text) for text in texts], model.tokens.image_tokens
    codes = torch.empty(len(texts), N, dtype=torch.long, device=model.device)
    for length in sorted(set(map(len, prompts))):
        alike = torch.tensor([i for i, p in enumerate(prompts) if len(p) == length])
        for rows in alike.split(max(1, DRAW_AT_ONCE // N)):
            noise = seeds and torch.stack([uniforms(seeds[i], how.steps, 2, N) for i in rows]).to(model.device)
            codes[rows] = unmask(model, [prompts[i] for i in rows], noise, how)
    return codes


def unmask(model: Showo, prompts: list[list[int]], noise, how: Drawing) -> torch.Tensor:
    """The decoding loop of one batch of equal-length prompts; noise (B, steps, 2, N) or None. Returns (B, N) codes.

    Guidance is applied to hidden states: the head is linear, so this is guidance on logits, with one head instead of two.
    """
    tokens, N, B = model.tokens, model.tokens.image_tokens, len(prompts)
    cond = TextPrefix(model, prompts)
    uncond = TextPrefix(model, [tokens.draw("")] * B) if how.guidance else None
    block = torch.tensor(tokens.image([-1] * N), device=model.device).repeat(B, 1)  # (B, N+2)
    temperature, offset = how.temperature, None
    for step in range(how.steps):
        hidden = cond.hidden(block, step == 0)  # (B, N, D)
        if uncond and how.guidance_interval[0] <= step / how.steps < how.guidance_interval[1]:
            if offset is None or step % how.guidance_every == 0:
                offset = hidden - uncond.hidden(block, step == 0)
            hidden = hidden + how.guidance * offset
        slots = block[:, 1:-1]
        unknown = slots == tokens.mask  # (B, N), M of them
        probs = model.code_logits(hidden[unknown]).softmax(-1)  # (M, C)
        chosen = probs.argmax(-1) if noise is None else pick(probs, noise[:, step, 0][unknown])
        sampled = (slots - tokens.first_code).masked_scatter(unknown, chosen)
        if step == how.steps - 1:
            return sampled
        ratio = (step + 1) / how.steps
        temperature = (temperature if how.anneal == "compound" else how.temperature) * (1 - ratio)
        confidence = torch.full(unknown.shape, torch.inf, device=block.device)  # keep what is known
        confidence[unknown] = probs.gather(1, chosen[:, None])[:, 0]
        gumbel = torch.zeros_like(confidence) if noise is None else -(-noise[:, step, 1].log()).log()
        count = (unknown.sum(1, keepdim=True) - 1).clamp(max=slots_to_mask(step, how.steps, N)).clamp(min=1)
        again = mask_least_confident(confidence, gumbel, count, temperature)
        block[:, 1:-1] = torch.where(again, tokens.mask, tokens.first_code + sampled)


# -------------------------------------------------------------------------------------------------- writing text


@dataclass
class Ask:
    """One text to write: about image number `image`, answering `prompt`, with its own decoding setting and seed."""

    image: int
    prompt: list[int]
    top_k: int = 1  # 1: greedy; 0: the whole vocabulary
    temperature: float = 1.0
    seed: int = 0


class Images:
    """Keys and values of images, computed once. Any number of texts look at each of them, and none gets a copy."""

    def __init__(self, model: Showo, codes: torch.Tensor, image: torch.Tensor):
        """codes (I, N); image (R,): the one that each row of text looks at."""
        ids = torch.tensor([model.tokens.look(c) for c in codes.tolist()], device=model.device)
        self.cache, self.width = DynamicCache(), ids.shape[1]
        model.hidden(ids, torch.arange(self.width, device=model.device)[None], self.cache)  # an image sees itself whole
        self.choose(image)

    def choose(self, image: torch.Tensor) -> None:
        """Which image each row looks at, and the row's number among those of its image."""
        self.image, self.rank = image, (image[:, None] == image).tril(-1).sum(1)
        self.most = int(self.rank.max()) + 1

    def attend(self, layer: int, query, key, value, mask, scaling: float) -> torch.Tensor:
        """Attention to image and own text. query (R, H, Q, d), key and value (R, H, L, d), mask (R, 1, Q, L)."""
        far_key, far_value = self.cache.layers[layer].keys, self.cache.layers[layer].values  # (I, H, P, d)
        far = self.by_row(self.by_image(query) @ far_key.mT, query.shape[2])  # (R, H, Q, P)
        near = (query @ key.mT).masked_fill(~mask, -torch.inf)  # (R, H, Q, L)
        weights = (torch.cat([far, near], -1).float() * scaling).softmax(-1).to(value.dtype)
        far, near = weights.split([self.width, key.shape[2]], -1)
        out = self.by_row(self.by_image(far) @ far_value, query.shape[2]) + near @ value  # (R, H, Q, d)
        return out.transpose(1, 2)

    def by_image(self, x: torch.Tensor) -> torch.Tensor:
        """(R, H, Q, d) -> (I, H, S·Q, d): all rows of an image side by side, S of the image with the most."""
        out = x.new_zeros(len(self.cache.layers[0].keys), self.most, *x.shape[1:])
        out[self.image, self.rank] = x
        return out.transpose(1, 2).flatten(2, 3)

    def by_row(self, x: torch.Tensor, Q: int) -> torch.Tensor:
        """(I, H, S·Q, d) -> (R, H, Q, d)."""
        return x.unflatten(2, (-1, Q)).transpose(1, 2)[self.image, self.rank]


@torch.inference_mode()
def write_text(model: Showo, codes: torch.Tensor, asks: list[Ask], max_new_tokens: int = 100) -> list[list[int]]:
    """Answers as token ids without the final `<|eot|>`.

    codes (I, N): the images. Each image is prefilled once and shared by all its samples and questions; rows that have
    ended leave the batch.
    """
    tokens, device = model.tokens, model.device
    R, Q = len(asks), max(len(a.prompt) for a in asks)
    images = Images(model, codes, torch.tensor([a.image for a in asks], device=device))

    # Questions are padded on the left; nobody sees the padding.
    gap = torch.tensor([Q - len(a.prompt) for a in asks], device=device)  # (R,)
    ids = torch.tensor([[tokens.pad] * (Q - len(a.prompt)) + a.prompt for a in asks], device=device)
    column = torch.arange(Q + max_new_tokens, device=device)
    visible = column >= gap[:, None]  # (R, Q+max_new)
    square = visible[:, None, :Q] & (column[:Q] <= column[:Q, None])  # (R, Q, Q)
    positions = images.width + (column - gap[:, None]).clamp(min=0)  # (R, Q+max_new)
    cache = DynamicCache()
    hidden = model.hidden(ids, positions[:, :Q], cache, square[:, None], images=images)

    draws = torch.stack([uniforms(a.seed, max_new_tokens) for a in asks]).to(device)
    top_k = torch.tensor([a.top_k for a in asks], device=device)
    temperature = torch.tensor([a.temperature for a in asks], device=device)
    answers, alive = [[] for _ in asks], torch.arange(R, device=device)
    for step in range(max_new_tokens):
        logits = model.showo.lm_head(hidden[:, -1]).float()  # (R, V)
        new = sample_tokens(logits, top_k[alive], temperature[alive], draws[alive, step])
        for row, token in zip(alive.tolist(), new.tolist()):
            if token != tokens.eot:
                answers[row].append(token)
        going = new != tokens.eot
        if not going.any() or step == max_new_tokens - 1:
            break
        if not going.all():
            alive, new = alive[going], new[going]
            cache.batch_select_indices(going.nonzero()[:, 0])
            images.choose(images.image[going])
        end = Q + step + 1
        hidden = model.hidden(new[:, None], positions[alive, end - 1 : end], cache, visible[alive, None, None, :end],
                              images=images)
    return answers


def sample_tokens(logits, top_k, temperature, u) -> torch.Tensor:
    """(R, V) logits -> (R,) tokens: each row with its own top-k (0: all), temperature and uniform number."""
    greedy = logits.argmax(-1)
    if bool((top_k == 1).all()):
        return greedy
    most = logits.shape[-1] if bool((top_k == 0).any()) else int(top_k.max())
    values, ids = logits.topk(most, -1)
    beyond = torch.arange(most, device=logits.device) >= torch.where(top_k == 0, most, top_k)[:, None]
    probs = (values / temperature[:, None]).masked_fill(beyond, -torch.inf).softmax(-1)
    sampled = ids.gather(1, pick(probs, u)[:, None])[:, 0]
    return torch.where(top_k == 1, greedy, sampled)


# -------------------------------------------------------------------------------------------- loading and saving

WEIGHTS = ("pytorch_model.safetensors", "model.safetensors", "pytorch_model.bin",
           "pytorch_model.safetensors.index.json", "model.safetensors.index.json", "pytorch_model.bin.index.json")
SHOWO_FIELDS = ("vocab_size", "llm_vocab_size", "codebook_size", "num_vq_tokens")
PHI_FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
              "layer_norm_eps", "hidden_act", "max_position_embeddings", "vocab_size")


def find_file(folder, name: str) -> str | None:
    """The path of a file in a folder or hub repository, or None if it has no such file."""
    if Path(folder).exists():
        path = Path(folder) / name
        return str(path) if path.is_file() else None
    try:
        return cached_file(str(folder), name, _raise_exceptions_for_missing_entries=False)
    except Exception as error:  # a name that is no repository id, a repository that does not exist
        raise InputError(f"{folder}: neither a folder here nor reachable on the hub ({reason(error)})") from None


def read_object(path) -> dict:
    value = parse_json(read_text(path), str(path))
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected an object, found {type(value).__name__}")
    return value


def read_config(folder) -> dict:
    path = find_file(folder, "config.json")
    if path is None:
        known = "config.json is missing" if Path(folder).exists() else "neither a folder here nor reachable on the hub"
        raise InputError(f"{folder}: {known}")
    return read_object(path)


def read_weights(folder) -> tuple[dict, str]:
    """All tensors of a checkpoint (safetensors or .bin, whole or sharded) and the file they came from.

    .bin files are read with weights_only=True: nothing in them is executed.
    """
    path = next((p for p in (find_file(folder, name) for name in WEIGHTS) if p), None)
    if path is None:
        raise InputError(f"{folder}: no weights; looked for {', '.join(WEIGHTS)}")
    files = [path]
    if path.endswith(".index.json"):
        shards = read_object(path).get("weight_map")
        if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
            raise InputError(f"{path}: field 'weight_map' should name a file for every parameter")
        names = sorted(set(shards.values()))
        files = [find_file(folder, name) for name in names]
        if None in files:
            raise InputError(f"{path}: field 'weight_map': {names[files.index(None)]} is missing")
    weights = {}
    for file in files:
        weights.update(read_bin(file) if file.endswith(".bin") else load_tensors(file))
    return weights, path


def read_bin(file: str) -> dict:
    try:
        weights = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip, end of file, code that was not run, …
        raise InputError(f"{file}: not a file of plain tensors ({reason(error)})") from None
    if not isinstance(weights, dict) or not all(isinstance(v, torch.Tensor) for v in weights.values()):
        raise InputError(f"{file}: expected a dictionary of parameter names and tensors")
    return weights


def fill(module: nn.Module, weights: dict, path: str, dtype=torch.float32) -> None:
    """Put `weights` into a module built on the meta device; names and shapes must match exactly."""
    want, have = ({k: tuple(v.shape) for k, v in d.items()} for d in (module.state_dict(), weights))
    floating = {k: v.is_floating_point() for k, v in module.state_dict().items()}
    misshapen = [f"{k} {have[k]} instead of {want[k]}" for k in want if k in have and want[k] != have[k]]
    problems = [("missing", sorted(want.keys() - have.keys())), ("unexpected", sorted(have.keys() - want.keys())),
                ("wrong shape", misshapen)]
    found = [f"{what}: {', '.join(names[:8])}{f' and {len(names) - 8} more' if len(names) > 8 else ''}"
             for what, names in problems if names]
    if found:
        raise InputError(f"{path}: parameters do not fit the model; {'; '.join(found)}")
    broken = [k for k, v in weights.items() if v.is_floating_point() != floating[k] or not v.isfinite().all()]
    if broken:
        raise InputError(f"{path}: parameter {broken[0]} holds values that are not finite numbers, or another dtype "
                         f"({weights[broken[0]].dtype})")
    module.load_state_dict({k: v.to(dtype) if v.is_floating_point() else v for k, v in weights.items()}, assign=True)


def phi_config(folder, name: str) -> PhiConfig:
    """The language model's sizes: a file beside the checkpoint, or Phi-1.5, whose sizes are PhiConfig's defaults."""
    if not isinstance(name, str) or not name:
        raise InputError(f"{folder}/config.json: field 'llm_model_path' should be a name, found {name!r}")
    path = find_file(folder, Path(name).name)
    if path is not None:
        return PhiConfig.from_dict(read_object(path))
    if Path(name).name == "phi-1_5":
        return PhiConfig()
    try:
        return PhiConfig.from_pretrained(name)
    except Exception:
        raise InputError(f"{folder}/config.json: field 'llm_model_path': no Phi configuration at {name!r}") from None


def load_magvit(folder) -> Magvit:
    config = read_config(folder)
    known = {f.name: config[f.name] for f in dataclasses.fields(MagvitConfig) if f.name in config}
    with torch.device("meta"):
        vq = Magvit(MagvitConfig(**known))
    fill(vq, *read_weights(folder))
    return vq.eval().requires_grad_(False)


def save_magvit(vq: Magvit, folder) -> None:
    with atomic(folder) as temporary:
        temporary.mkdir()
        (temporary / "config.json").write_text(json.dumps(dataclasses.asdict(vq.config), indent=1) + "\n")
        save_file(full_precision(vq.state_dict()), temporary / "pytorch_model.safetensors", {"format": "pt"})


def load_tokenizer(folder):
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        raise InputError(f"{folder}: cannot load the text tokenizer ({reason(error)})") from None


def build(config: dict, phi: PhiConfig, tokenizer, where: str = "config.json") -> Showo:
    """An empty model on the meta device. Raises InputError if config and tokenizer disagree."""
    for name in SHOWO_FIELDS:
        if type(config.get(name)) is not int:
            raise InputError(f"{where}: field '{name}' should be a number, found {config.get(name)!r}")
    tokens = Tokens(tokenizer, config["codebook_size"], config["num_vq_tokens"])
    if config["llm_vocab_size"] != tokens.text_size:
        raise InputError(f"{where}: field 'llm_vocab_size' is {config['llm_vocab_size']}, "
                         f"the text tokenizer has {tokens.text_size} tokens")
    if config["vocab_size"] != tokens.vocab_size or config.get("mask_token_id", tokens.mask) != tokens.mask:
        raise InputError(f"{where}: field 'vocab_size' should be {tokens.vocab_size}, 'mask_token_id' {tokens.mask}: "
                         f"{tokens.text_size} text, {len(Tokens.SPECIAL)} special, {tokens.codes} image, 1 mask")
    with torch.device("meta"):
        return Showo(config, phi, tokens)


def load(folder, image_tokenizer=None, text_tokenizer=None, device="cpu", dtype=torch.float32) -> tuple[Showo, Magvit]:
    """Load a checkpoint folder or hub id: the published layout, or ours (which holds both tokenizers as well)."""
    config = read_config(folder)
    inside = {name: str(Path(folder) / name) if (Path(folder) / name).is_dir() else None
              for name in ("magvitv2", "tokenizer")}
    phi = phi_config(folder, config.get("llm_model_path", "microsoft/phi-1_5"))
    tokenizer = load_tokenizer(text_tokenizer or inside["tokenizer"] or "microsoft/phi-1_5")
    model = build(config, phi, tokenizer, f"{folder}/config.json")
    fill(model, *read_weights(folder), dtype)
    model.showo.model.rotary_emb = PhiRotaryEmbedding(phi)  # not among the weights, and float32 in every precision
    vq = load_magvit(image_tokenizer or inside["magvitv2"] or "showlab/magvitv2")
    if 2**vq.config.bits != model.tokens.codes:
        raise InputError(f"{folder}/config.json: field 'codebook_size' is {model.tokens.codes}, "
                         f"the image tokenizer has {2 ** vq.config.bits} codes")
    return model.to(device).eval(), vq.to(device)


def save(model: Showo, vq: Magvit, folder, weights: dict | None = None) -> None:
    """Write one self-contained checkpoint folder, under the published parameter names and file names.

    weights: the model's parameters if they are not in the model itself (sharded training).
    The original program reads config.json and pytorch_model.safetensors; the sub-folders are ours.
    """
    phi = model.showo.config
    config = {**model.config, "_class_name": "Showo"}
    with atomic(folder) as temporary:
        temporary.mkdir()
        if Path(config.get("llm_model_path", "")).name != "phi-1_5":
            config["llm_model_path"] = "phi_config.json"
            values = {name: getattr(phi, name) for name in PHI_FIELDS} | {"model_type": "phi", "qk_layernorm": True}
            values |= {k: phi.rope_parameters[k] for k in ("rope_theta", "partial_rotary_factor")}
            (temporary / "phi_config.json").write_text(json.dumps(values, indent=1) + "\n")
        (temporary / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        weights = full_precision(weights or model.state_dict())
        save_file(weights, temporary / "pytorch_model.safetensors", {"format": "pt"})
        save_magvit(vq, temporary / "magvitv2")
        model.tokens.tokenizer.save_pretrained(temporary / "tokenizer")


def full_precision(weights: dict) -> dict:
    return {k: v.detach().float().cpu().contiguous() if v.is_floating_point() else v.cpu() for k, v in weights.items()}


def add_model_arguments(parser) -> None:
    parser.add_argument("--model", default="toy/base", help="folder or hub id, such as showlab/show-o-512x512")
    parser.add_argument("--image-tokenizer", help="folder or hub id, if not in the checkpoint [showlab/magvitv2]")
    parser.add_argument("--text-tokenizer", help="folder or hub id, if not in the checkpoint [microsoft/phi-1_5]")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, … [what accelerate finds]")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="backbone")


def model_inputs(args) -> dict:
    """For `claim`: what a checkpoint consists of."""
    return {"model": args.model, "image tokenizer": args.image_tokenizer, "text tokenizer": args.text_tokenizer}


def load_from(args) -> tuple[Showo, Magvit]:
    device = args.device or processes().device  # one per process
    return load(args.model, args.image_tokenizer, args.text_tokenizer, device, getattr(torch, args.dtype))


def add_drawing_arguments(parser) -> None:
    default = Drawing()
    parser.add_argument("--steps", type=int, default=default.steps, help="decoding steps per image")
    parser.add_argument("--guidance", type=float, default=default.guidance)
    parser.add_argument("--temperature", type=float, default=default.temperature, help="of the confidence noise")
    parser.add_argument("--anneal", choices=["compound", "maskgit"], default=default.anneal, help="original, MaskGIT's")
    parser.add_argument("--guidance-interval", type=float, nargs=2, default=default.guidance_interval, metavar="SHARE",
                        help="approximation: guidance only from this to that share of the steps")
    parser.add_argument("--guidance-every", type=int, default=default.guidance_every, metavar="STEPS",
                        help="approximation: the unconditional half only in every so many steps")


def drawing(args) -> Drawing:
    if args.steps < 1 or args.guidance_every < 1:
        raise InputError("--steps and --guidance-every must be at least 1")
    return Drawing(**{f.name: getattr(args, f.name) for f in dataclasses.fields(Drawing)})
