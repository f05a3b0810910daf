"""Bad input, one table per kind: handled as a user would expect, or refused.

Refused: one line that names file, place and field, exit code 2, no traceback, and nothing under a
final name.
"""

import io
import json
import os
import shutil
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from bench import kills
from conftest import GOLDEN, main, stage
from hermesflow.files import InputError
from hermesflow.pictures import load_image
from hermesflow.inputs import read_records
from hermesflow.jsonl import read_jsonl
from hermesflow.outputs import run_main
from hermesflow.records import Pair, Record, Sample
from hermesflow.showo import Tokens
from hermesflow.tables import tensors_of, write_table
from model import load, save
from tiny import tiny_model

sample = stage("01_sample")
score = stage("02_score")
dpo = stage("03_pair_dpo")
FINAL = ("samples.jsonl", "samples-00000.safetensors", "pairs.jsonl", "pairs-00000.safetensors",
         "checkpoint", "metrics.json", "answers.jsonl", "answers-00000.safetensors")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile") / "base"
    save(tiny_model(), folder)
    return folder


def refusal(capsys, module, *arguments) -> str:
    """The one line in which a stage ends."""
    capsys.readouterr()
    out = arguments[arguments.index("--out") + 1]
    with pytest.raises(SystemExit) as ended:
        run_main(lambda: main(module, *arguments))
    printed = capsys.readouterr().err.replace("\r", "\n").strip().split("\n")
    assert ended.value.code == 2
    assert printed[-1].startswith("error: ") and len(printed[-1]) < 1000
    assert not any("Traceback" in line for line in printed)
    assert not any((out / name).exists() for name in FINAL)
    assert not list(out.rglob("*.tmp"))
    return printed[-1]


def sampling(folder, base, records, *more):
    return (sample, "--records", records, "--model", base, "--captions", 2, "--max-new-tokens", 3,
            "--images", 2, "--steps", 2, "--guidance", 0, "--show", 1, "--out", folder / "out",
            *more)


def picture(path, size=(40, 30), mode="RGB", **how):
    pixels = np.random.default_rng(0).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(size).convert(mode).save(path, **how)


POINTER = ("version https://git-lfs.github.com/spec/v1\n"
           f"oid sha256:{'0' * 64}\nsize 2900000000\n")

# ----------------------------------------------------------------------------------- JSON and JSONL

GOOD = b'{"id": "a", "image": "0.png", "caption": "a big red ring"}'
QUESTION = '{"question": "is it?", "choices": ["yes", "no"], "answer": "yes"}'


def line(**fields) -> bytes:
    return json.dumps({"id": "b", "image": "0.png", "caption": "blue", **fields}).encode()


def asking(question: str) -> bytes:
    fields = '"id": "b", "image": "0.png", "caption": "blue"'
    return f'{{{fields}, "questions": [{question}]}}'.encode()


BAD_LINES = {  # the second line of a file -> what the message must name
    "open object": (b"{", "line 2"),
    "trailing comma": (b'{"id": "b",}', "line 2"),
    "single quotes": (b"{'id': 'b'}", "line 2"),
    "bare word": (b"hello", "line 2"),
    "two objects": (GOOD + GOOD, "line 2"),
    "list": (b"[]", "expected an object"),
    "number": (b"3", "expected an object"),
    "string": (b'"a"', "expected an object"),
    "null": (b"null", "expected an object"),
    "boolean": (b"true", "expected an object"),
    "deep": (b"[" * 100_000, "line 2"),
    "NaN": (line()[:-1] + b', "x": NaN}', "NaN"),
    "infinity": (line()[:-1] + b', "x": -Infinity}', "Infinity"),
    "torn": (GOOD[:30], "line 2"),
    "raw control character": (b'{"id": "b\x01"}', "line 2"),
    "half a surrogate": (b'{"id": "b", "image": "0.png", "caption": "\\ud800"}', "'caption'"),
    "half a surrogate in a path": (b'{"id": "b", "image": "\\udc80", "caption": "c"}', "'image'"),
    "no id": (b'{"image": "0.png", "caption": "c"}', "'id' is missing"),
    "no image": (b'{"id": "b", "caption": "c"}', "'image' is missing"),
    "no caption": (b'{"id": "b", "image": "0.png"}', "'caption' is missing"),
    "id number": (line(id=3), "'id'"),
    "id null": (line(id=None), "'id'"),
    "id list": (line(id=["b"]), "'id'"),
    "image list": (line(image=["0.png"]), "'image'"),
    "caption number": (line(caption=3), "'caption'"),
    "caption object": (line(caption={}), "'caption'"),
    "caption boolean": (line(caption=True), "'caption'"),
    "prompt number": (line(prompt=1.5), "'prompt'"),
    "questions object": (line(questions={}), "'questions'"),
    "questions text": (line(questions="why?"), "'questions'"),
    "question null": (asking("null"), "'questions'"),
    "question without answer": (asking('{"question": "q", "choices": []}'), "'answer'"),
    "choices text": (asking('{"question": "q", "choices": "yes no", "answer": "yes"}'),
                     "'choices'"),
    "choice number": (asking('{"question": "q", "choices": [1], "answer": "1"}'), "'choices'"),
    "answer null": (asking('{"question": "q", "choices": ["a"], "answer": null}'), "'answer'"),
    "no choices": (asking('{"question": "q", "choices": [], "answer": "a"}'),
                   "'choices' is empty"),
    "answer not among the choices": (
        asking('{"question": "q", "choices": ["a", "b"], "answer": "c"}'), "not among the choices"),
    "the same id": (GOOD, "twice"),
    "empty caption": (line(caption=""), "'caption' is empty"),
    "blank caption": (line(caption=" \n\t "), "'caption' is empty"),
}
for bad in ("", ".", "..", "../x", "a/b", "/etc/passwd", "..\\x", "a\0b", "a\nb", "x" * 300,
            "é" * 150, "\u202egnp.exe", "zero\u200bwidth", "\x7f", "a\u2028b"):
    BAD_LINES[f"id {ascii(bad)[:20]}"] = (line(id=bad), "'id'")


@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_line(tmp_path, base, capsys, name):
    """It stops a strict run.

    Otherwise it is skipped, counted and named, and the good line is sampled.
    """
    text, named = BAD_LINES[name]
    records = tmp_path / "records.jsonl"
    picture(tmp_path / "0.png")
    records.write_bytes(GOOD + b"\n" + text + b"\n")
    message = refusal(capsys, *sampling(tmp_path, base, records, "--strict"))
    assert f"{records}: line 2" in message and named in message
    main(*sampling(tmp_path, base, records))
    assert "1 bad records skipped" in capsys.readouterr().out
    assert named in (tmp_path / "out" / "skipped.txt").read_text()
    assert [s.id for s in read_jsonl(tmp_path / "out" / "samples.jsonl", Record)] == ["a"]


BAD_FILES = {
    "empty": b"",
    "blank lines": b"\n\n \n",
    "not UTF-8": b"\xff\xfe\x00" + GOOD,
    "latin-1": GOOD.replace(b"big", b"b\xe9g"),
    "UTF-16": GOOD.decode().encode("utf-16"),
    "NUL bytes": b"\0" * 100,
    "all lines bad": b"{}\n[]\n",
}


@pytest.mark.parametrize("name", BAD_FILES)
@pytest.mark.parametrize("end", ["jsonl", "json"])
def test_bad_file(tmp_path, base, capsys, name, end):
    records = tmp_path / f"records.{end}"
    records.write_bytes(BAD_FILES[name])
    message = refusal(capsys, *sampling(tmp_path, base, records))
    assert f"records.{end}" in message


def test_missing_file_and_folder_instead_of_file(tmp_path, base, capsys):
    records = tmp_path / "records.jsonl"
    assert "records.jsonl" in refusal(capsys, *sampling(tmp_path, base, records))
    records.mkdir()
    assert "records.jsonl" in refusal(capsys, *sampling(tmp_path, base, records))


MANY_CHOICES = {"question": "q", "choices": [str(i) for i in range(50)], "answer": "49"}
FINE_FILES = {
    "BOM": b"\xef\xbb\xbf" + GOOD,
    "CRLF": GOOD + b"\r\n" + line() + b"\r\n",
    "no newline at the end": GOOD,
    "blank lines between": b"\n" + GOOD + b"\n\n\n" + line(),
    "other fields": line(score=1e400 > 1, extra=[None]),
    "escapes": line(caption='tab\tquote" \u2028 日本 🙂'),
    "10 MB line": line(caption="red " * 2_500_000),
    "one choice": asking('{"question": "q", "choices": ["a"], "answer": "a"}'),
    "fifty choices": asking(json.dumps(MANY_CHOICES)),
    "look-alikes": line(id="a") + b"\n" + line(id="\u0430"),
}


@pytest.mark.parametrize("name", FINE_FILES)
def test_unusual_file(tmp_path, name):
    (tmp_path / "records.jsonl").write_bytes(FINE_FILES[name])
    records = read_records(tmp_path / "records.jsonl")
    assert len(records) == len([t for t in FINE_FILES[name].split(b"\n") if t.strip()])


def test_one_name_in_two_spellings_is_one_id(tmp_path):
    (tmp_path / "records.jsonl").write_bytes(line(id="\u00e9") + b"\n" + line(id="e\u0301"))
    with pytest.raises(InputError, match="twice"):
        read_records(tmp_path / "records.jsonl")


ONE_RECORD = [{"id": 1, "img_path": "0.png", "caption": "c"}]
BAD_ORIGINAL = {  # initial_data.json, vqa_data.json -> what the message must name
    "object": ({"id": 1}, [], "array"),
    "text": ("x", [], "array"),
    "id fraction": ([{"id": 1.5, "img_path": "0.png", "caption": "c"}], [], "'id'"),
    "id boolean": ([{"id": True, "img_path": "0.png", "caption": "c"}], [], "'id'"),
    "no image": ([{"id": 1, "caption": "c"}], [], "'img_path'"),
    "questions text": (ONE_RECORD, "why?", "vqa_data.json: expected an array"),
    "questions empty": (ONE_RECORD, {}, "vqa_data.json: record 1: field 'question'"),
    "question of nobody": (
        ONE_RECORD, [{"id": 2, "question": "q", "choices": ["a"], "answer": "a"}],
        "record 1: field 'id'"),
    "question without choices": (
        ONE_RECORD, [{"id": 1, "question": "q", "choices": [], "answer": "a"}], "'choices'"),
    "question with another answer": (
        ONE_RECORD, [{"id": 1, "question": "q", "choices": ["a"], "answer": "b"}], "'answer'"),
}


@pytest.mark.parametrize("name", BAD_ORIGINAL)
def test_bad_original_files(tmp_path, base, capsys, name):
    records, questions, named = BAD_ORIGINAL[name]
    (tmp_path / "initial_data.json").write_text(json.dumps(records))
    (tmp_path / "vqa_data.json").write_text(json.dumps(questions))
    message = refusal(capsys, *sampling(tmp_path, base, tmp_path / "initial_data.json", "--strict",
                                        "--questions", tmp_path / "vqa_data.json"))
    assert named in message and str(tmp_path) in message


# ------------------------------------------------------------------------------------------- images


def png(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds nothing."""

    def chunk(name, data):
        checksum = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + checksum

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def encoded(kind: str) -> bytes:
    data = io.BytesIO()
    picture(data, (200, 150), format=kind)
    return data.getvalue()


BAD_IMAGES = {
    "truncated PNG": lambda p: p.write_bytes(encoded("PNG")[:2000]),
    "truncated JPEG": lambda p: p.write_bytes(encoded("JPEG")[:1000]),
    "JPEG header": lambda p: p.write_bytes(encoded("JPEG")[:100]),
    "zero bytes": lambda p: p.write_bytes(b""),
    "text": lambda p: p.write_text("hello"),
    "SVG": lambda p: p.write_text("<svg xmlns='http://www.w3.org/2000/svg'/>"),
    "missing": lambda p: None,
    "folder": lambda p: p.mkdir(),
    "bomb": lambda p: p.write_bytes(png(60_000, 60_000)),
    "empty PNG": lambda p: p.write_bytes(png(30, 30)),
    "30,000 px wide": lambda p: picture(p, (30_000, 20)),
    "30,000 px high": lambda p: picture(p, (3, 30_000)),
    "link to nowhere": lambda p: p.symlink_to(p.parent / "nowhere"),
    "link to itself": lambda p: p.symlink_to(p),
    "unreadable zeros": lambda p: p.write_bytes(b"\0" * 5000),
    "a pointer": lambda p: p.write_text(POINTER),
    "corrupt GIF": lambda p: p.write_bytes(encoded("GIF")[:60]),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_bad_image(tmp_path, base, capsys, name):
    records = tmp_path / "records.jsonl"
    picture(tmp_path / "0.png")
    BAD_IMAGES[name](tmp_path / "1.png")
    records.write_bytes(GOOD + b"\n" + line(image="1.png"))
    message = refusal(capsys, *sampling(tmp_path, base, records, "--strict"))
    assert f"{tmp_path}/1.png" in message
    main(*sampling(tmp_path, base, records))
    assert "1 bad records skipped" in capsys.readouterr().out
    samples = read_jsonl(tmp_path / "out" / "samples.jsonl", Sample)
    assert samples.ids == ["a"]
    assert sorted(tensors_of(samples[0])) == ["captions", "image", "images"]


def rotated(path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(path, (40, 30), format="JPEG", exif=exif)


def palette(path):
    image = Image.new("P", (40, 30), 1)
    image.putpalette([255, 0, 0, 0, 255, 0] + [0] * 762)
    image.save(path, format="PNG", transparency=0)


def animated(path):
    frames = [Image.new("RGB", (40, 30), c) for c in ("red", "blue")]
    frames[0].save(path, format="GIF", save_all=True, append_images=frames[1:])


def elsewhere(path):
    outside = path.parent.parent / f"{path.parent.name}-outside.png"
    picture(outside)
    path.symlink_to(outside)


def sixteen_bit(path):
    ramp = np.arange(1200, dtype=np.uint16) * 54
    Image.fromarray(ramp.reshape(30, 40)).save(path)


FINE_IMAGES = {
    "CMYK": lambda p: picture(p, mode="CMYK", format="JPEG"),
    "gray": lambda p: picture(p, mode="L"),
    "one bit": lambda p: picture(p, mode="1"),
    "16 bit": sixteen_bit,
    "alpha": lambda p: picture(p, mode="RGBA"),
    "gray alpha": lambda p: picture(p, mode="LA"),
    "palette": palette,
    "EXIF": rotated,
    "animated": animated,
    "1x1": lambda p: picture(p, (1, 1)),
    "link out of the tree": elsewhere,
    "progressive": lambda p: picture(p, format="JPEG", progressive=True),
    "WebP": lambda p: picture(p, format="WEBP"),
    "3,000 px wide": lambda p: picture(p, (3000, 40)),
}


@pytest.mark.parametrize("name", FINE_IMAGES)
def test_unusual_image(tmp_path, name):
    FINE_IMAGES[name](tmp_path / "0.png")
    pixels = load_image(tmp_path / "0.png", 16)
    assert pixels.shape == (3, 16, 16)
    assert -1 <= pixels.min() and pixels.max() <= 1
    if name == "palette":
        assert pixels[1].min() > 0.99 and pixels[0].max() < -0.99  # the visible colour, green
    if name == "animated":
        assert pixels[0].min() > 0.9  # the first frame, red
    if name == "16 bit":
        assert pixels.max() > 0.8 and pixels.min() < -0.8  # scaled, not clipped
    if name == "EXIF":
        picture(tmp_path / "1.png", (40, 30))
        upright = Image.open(tmp_path / "1.png").rotate(-90, expand=True)
        upright.save(tmp_path / "1.png")
        # turned as the camera says
        assert (pixels - load_image(tmp_path / "1.png", 16)).abs().mean() < 0.1


# ------------------------------------------------------------------------------ captions, questions


@pytest.fixture(scope="module")
def phi_tokens():
    return Tokens(AutoTokenizer.from_pretrained(GOLDEN / "phi-1_5-tokenizer"), 8192, 1024)


SPECIAL_TEXTS = [*Tokens.SPECIAL, "<|endoftext|>", "<|startoftext|>", "<|sot|>",
                 "a <|eoi|> b<|soi|>", "[PAD][PAD]"]


@pytest.mark.parametrize("text", SPECIAL_TEXTS)
def test_special_token_text_stays_text(phi_tokens, text):
    ids = phi_tokens.encode(text)
    assert all(0 <= i < phi_tokens.text_size and i != phi_tokens.eot for i in ids)
    assert phi_tokens.decode(ids) == text
    assert phi_tokens.t2i_prompt(text)[2:-1] == ids
    assert phi_tokens.eot not in phi_tokens.text_prompt(text)[1:]


UNUSUAL_CAPTIONS = ["word " * 10_000, "🙂🙃🫠" * 50, "\0", "עברית", "a\u200bb", "\n" * 500, "ß" * 5000]


@pytest.mark.parametrize("text", UNUSUAL_CAPTIONS)
def test_unusual_captions(tmp_path, base, phi_tokens, text):
    prompt = phi_tokens.t2i_prompt(text)
    assert len(prompt) <= 129 and prompt[-1] == phi_tokens.eot
    picture(tmp_path / "0.png")
    (tmp_path / "records.jsonl").write_bytes(line(caption="c " + text))
    main(*sampling(tmp_path, base, tmp_path / "records.jsonl", "--strict"))
    assert (tmp_path / "out" / "samples.jsonl").exists()


def test_a_question_that_does_not_fit(tmp_path, base, capsys):
    picture(tmp_path / "0.png")
    records = tmp_path / "records.jsonl"
    records.write_bytes(asking(QUESTION.replace("is it?", "is it? " * 300)))
    message = refusal(capsys, *sampling(tmp_path, base, records))
    assert "id 'b': field 'questions'" in message and "does not fit" in message


# -------------------------------------------------------------------------------------- checkpoints


class Code:
    """Pickled, this would create a folder when it is read."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


HEAD = "showo.lm_head.weight"
WEIGHTS = "pytorch_model.safetensors"


def edit(path, change):
    """Change the tensors of a file."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def edited(change, name=WEIGHTS):
    """Harm that changes the tensors of a file in a folder."""
    return lambda folder: edit(folder / name, change)


def configured(name="config.json", **changes):
    """Harm that changes fields of a JSON file; "gone" removes one."""

    def harm(folder):
        config = json.loads((folder / name).read_text()) | changes
        config = {k: v for k, v in config.items() if v != "gone"}
        (folder / name).write_text(json.dumps(config))

    return harm


def text_instead(name, text):
    """Harm that replaces a file by a text."""
    return lambda folder: (folder / name).write_text(text)


def truncated(name, length):
    return lambda folder: os.truncate(folder / name, length)


def removed(name):
    return lambda folder: (folder / name).unlink()


def pickled(folder, value):
    (folder / WEIGHTS).unlink()
    torch.save(value, folder / "pytorch_model.bin")


def bin_of_text(folder):
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_text("x")


def replace_tokenizer(folder):
    shutil.rmtree(folder / "tokenizer")
    shutil.copytree(GOLDEN / "phi-1_5-tokenizer", folder / "tokenizer")


BAD_CHECKPOINTS = {  # what is done to a good one -> what the message must name
    "missing tensor": (edited(lambda w: w.pop(HEAD)), HEAD),
    "extra tensor": (edited(lambda w: w.update(more=torch.zeros(2))), "more"),
    "transposed tensor": (edited(lambda w: w.update({HEAD: w[HEAD].T.contiguous()})), HEAD),
    "NaN": (edited(lambda w: w[HEAD][0].fill_(torch.nan)), HEAD),
    "infinity": (edited(lambda w: w[HEAD][0].fill_(torch.inf)), HEAD),
    "integers": (edited(lambda w: w.update({HEAD: w[HEAD].long()})), HEAD),
    "booleans": (edited(lambda w: w.update({HEAD: w[HEAD] > 0})), HEAD),
    "truncated": (truncated(WEIGHTS, 5000), WEIGHTS),
    "zero bytes": (truncated(WEIGHTS, 0), WEIGHTS),
    "text": (text_instead(WEIGHTS, "hello" * 100), WEIGHTS),
    "a pointer": (text_instead(WEIGHTS, POINTER), f"{WEIGHTS}: a Git LFS pointer, not the file"),
    "a pointer to a bin": (
        lambda f: (removed(WEIGHTS)(f), text_instead("pytorch_model.bin", POINTER)(f)),
        "pytorch_model.bin: a Git LFS pointer, not the file itself: `git lfs pull` fetches it"),
    "image tokenizer is a pointer": (text_instead(f"magvitv2/{WEIGHTS}", POINTER),
                                     f"magvitv2/{WEIGHTS}: a Git LFS pointer"),
    "no weights": (removed(WEIGHTS), "pytorch_model.safetensors is missing"),
    "pickled code": (lambda f: pickled(f, {HEAD: Code(f / "ran")}), "pytorch_model.bin"),
    "pickled code in a list": (lambda f: pickled(f, [Code(f / "ran")]), "pytorch_model.bin"),
    "pickled list": (lambda f: pickled(f, [torch.zeros(1)]), "pytorch_model.bin"),
    "bin of text": (bin_of_text, "pytorch_model.bin"),
    "no config": (removed("config.json"), "config.json"),
    "config of text": (text_instead("config.json", "hello"), "config.json"),
    "config list": (text_instead("config.json", "[]"), "config.json"),
    "other vocabulary": (configured(vocab_size=100), "'vocab_size'"),
    "other codebook": (configured(codebook_size=64), "config.json"),
    "other text size": (configured(llm_vocab_size=1000), "'llm_vocab_size'"),
    "text instead of a number": (configured(codebook_size="32"), "'codebook_size'"),
    "no image size": (configured(num_vq_tokens="gone"), "'num_vq_tokens'"),
    "images that are no square": (configured(num_vq_tokens=15), "'num_vq_tokens'"),
    "no images": (configured(num_vq_tokens=0), "'num_vq_tokens'"),
    "no rotation": (configured("phi_config.json", rope_theta=0), "'rope_theta'"),
    "scaled rotation": (
        configured("phi_config.json", rope_scaling={"type": "linear", "factor": 2}),
        "'rope_scaling'"),
    "NaN in a config": (configured("phi_config.json", layer_norm_eps=float("nan")), "phi_config"),
    "text instead of a width": (configured("phi_config.json", hidden_size="32"), "'hidden_size'"),
    "heads that do not divide": (
        configured("phi_config.json", num_attention_heads=3), "'hidden_size'"),
    "unknown activation": (configured("phi_config.json", hidden_act="swoosh"), "'hidden_act'"),
    "another width": (configured("phi_config.json", hidden_size=64), "wrong shape"),
    "more layers": (configured("phi_config.json", num_hidden_layers=3), "missing"),
    "fewer layers": (configured("phi_config.json", num_hidden_layers=1), "unexpected"),
    "larger tokenizer": (replace_tokenizer, "'llm_vocab_size'"),
    "no beginning of texts": (removed("tokenizer/tokenizer_config.json"), "no bos_token"),
    "no end of texts": (configured("tokenizer/tokenizer_config.json", eos_token="gone"),
                        "no eos_token"),
    "broken tokenizer": (text_instead("tokenizer/tokenizer.json", "{"), "tokenizer"),
    "tokenizer is a pointer": (text_instead("tokenizer/tokenizer.json", POINTER),
                               "tokenizer.json: a Git LFS pointer, not the file"),
    "config is a pointer": (text_instead("config.json", POINTER),
                            "config.json: a Git LFS pointer, not the file"),
    "image tokenizer truncated": (truncated(f"magvitv2/{WEIGHTS}", 99), "magvitv2"),
    "image tokenizer NaN": (
        edited(lambda w: w["decoder.conv_in.weight"].fill_(torch.nan), f"magvitv2/{WEIGHTS}"),
        "decoder.conv_in"),
    "image tokenizer of no bits": (configured("magvitv2/config.json", bits=0), "'bits'"),
    "image tokenizer of text": (configured("magvitv2/config.json", decoder_mult="1"),
                                "'decoder_mult'"),
    "image tokenizer of a level less": (
        configured("magvitv2/config.json", encoder_blocks=[0, 0, 0, 1]), "'encoder_blocks' 4"),
    "image tokenizer of other bits": (configured("magvitv2/config.json", bits=6), "magvitv2"),
}


@pytest.mark.parametrize("name", BAD_CHECKPOINTS)
def test_bad_checkpoint(tmp_path, base, capsys, name):
    harm, named = BAD_CHECKPOINTS[name]
    shutil.copytree(base, tmp_path / "base")
    harm(tmp_path / "base")
    picture(tmp_path / "0.png")
    (tmp_path / "records.jsonl").write_bytes(GOOD)
    message = refusal(capsys, *sampling(tmp_path, tmp_path / "base", tmp_path / "records.jsonl"))
    assert str(tmp_path / "base") in message and named in message
    assert not (tmp_path / "base" / "ran").exists()  # no code from a checkpoint ever runs


# ---------------------------------------------------------------------------- what stages hand over


@pytest.fixture(scope="module")
def handed(tmp_path_factory, base):
    """Samples and pairs of two records."""
    folder = tmp_path_factory.mktemp("handed")
    questions = []
    for word in ("red", "blue", "big"):
        question = {"question": word, "choices": ["left", "give ring"], "answer": "left"}
        questions.append(json.loads(QUESTION) | question)
    records = []
    for i in range(2):
        picture(folder / f"{i}.png", (30 + i, 30))
        records.append(line(id=f"r{i}", image=f"{i}.png", questions=questions))
    (folder / "records.jsonl").write_bytes(b"\n".join(records))
    main(*sampling(folder, base, folder / "records.jsonl", "--images", 4, "--captions", 4,
                   "--caption-settings", "0:3.0"))
    (folder / "out").rename(folder / "samples")
    sampled = read_jsonl(folder / "samples" / "samples.jsonl", Sample)[0]
    tensors = tensors_of(sampled)
    pair = Pair(
        id="r0",
        image=sampled.image,
        caption="blue",
        prompt="",
        win_caption="a",
        lose_caption="b",
        win_caption_score=1.0,
        lose_caption_score=0.0,
        win_image_score=1.0,
        lose_image_score=0.0,
        win_image_wrong="",
        lose_image_wrong="",
        win_ended=True,
        lose_ended=True,
    )
    tokens = {
        "image": tensors["image"],
        "win_image": tensors["images"][0],
        "lose_image": tensors["images"][1],
        "win_caption": torch.tensor([3]),
        "lose_caption": torch.tensor([4]),
    }
    write_table(folder / "pairs.jsonl", [(pair, tokens)])
    return folder


CODES = "samples/samples-00000.safetensors"
LINES = "samples/samples.jsonl"
PAIR_CODES = "pairs-00000.safetensors"


def cut(name, *index):
    """A change that keeps a part of a tensor."""
    return lambda tensors: tensors.update({name: tensors[name][index].clone()})


def one_row(tensors):
    for name in tensors:
        tensors[name] = tensors[name][:1].clone()


def swapped(tensors):
    for name in tensors:
        tensors[name] = tensors[name].flip(0).clone()


def one_bit(tensors):
    tensors["images"][1, 3, 15] ^= 1


def filled(name, value):
    return lambda tensors: tensors[name].fill_(value)


def fields(**changes):
    """Changes fields of every line; "gone" removes one; a function changes a value."""

    def change(text):
        lines = []
        for line in text.splitlines():
            record = json.loads(line)
            for name, value in changes.items():
                record[name] = value(record[name]) if callable(value) else value
                if value == "gone":
                    del record[name]
            lines.append(json.dumps(record))
        return "\n".join(lines)

    return change


def relined(name, change):
    """Harm that changes the text of a file."""

    def harm(folder):
        path = folder / name
        path.write_text(change(path.read_text()))

    return harm


def first_line_twice(text):
    first = text.split("\n")[0]
    return first + "\n" + first


BAD_SAMPLES = {
    "no codes file": (removed(CODES), CODES),
    "truncated codes": (truncated(CODES, 300), CODES),
    "codes of nothing": (truncated(CODES, 0), CODES),
    "stale codes": (edited(one_row, CODES), "row 1 (id 'r1'): cannot read"),
    "codes of others": (edited(swapped, CODES), "row 0 (id 'r0'): not the tensors of this record"),
    "one bit": (edited(one_bit, CODES), "row 1 (id 'r1'): not the tensors of this record"),
    "no captions": (edited(lambda t: t.pop("captions"), CODES), "no tensor 'captions'"),
    "other number of captions": (edited(cut("captions", slice(None), slice(2)), CODES),
                                 "row 0 (id 'r0'): not the tensors of this record"),
    "codes of another model": (edited(filled("images", 4000), CODES),
                               "'images' should be 16 codes below 32"),
    "image of another model": (edited(filled("image", 32), CODES),
                               "'image' should be 16 codes below 32"),
    "negative codes": (edited(filled("images", -1), CODES), "'images' should be 16 codes below 32"),
    "shorter images": (edited(cut("images", ..., slice(9)), CODES),
                       "'images' should be 16 codes below 32"),
    "tokens outside": (edited(filled("captions", 99_999), CODES),
                       "'captions': a token is outside the vocabulary"),
    "other lines": (relined(LINES, fields(row=lambda row: 1 - row)),
                    "row 1 (id 'r0'): not the tensors of this record"),
    "lines without codes": (relined(LINES, fields(shard="gone")), LINES),
    "codes elsewhere": (relined(LINES, fields(shard="../samples/samples-00000.safetensors")), ""),
    "captions without their ends": (relined(LINES, fields(ended="gone")), "'r0'"),
    "fewer captions": (relined(LINES, fields(captions=lambda texts: texts[:2])), "'r0'"),
    "more captions": (relined(LINES, fields(captions=lambda texts: texts * 2)), "'r0'"),
    "torn line": (relined(LINES, lambda t: t[:-20]), "line 2"),
    "no lines": (relined(LINES, lambda t: ""), "no records"),
    "the same line": (relined(LINES, first_line_twice), "twice"),
    "previous of others": (relined("pairs.jsonl", lambda t: t.replace('"r0"', '"r9"')),
                           "'r9' is not among the samples"),
    "previous torn": (relined("pairs.jsonl", lambda t: t[:100]), "pairs.jsonl: line 1"),
    "previous without codes": (removed(PAIR_CODES), PAIR_CODES),
    "previous of another model": (edited(filled("lose_image", 99), PAIR_CODES),
                                  "'lose_image' should be 16 codes below 32"),
    "previous changed": (edited(filled("win_caption", 4), PAIR_CODES),
                         "row 0 (id 'r0'): not the tensors of this record"),
}


@pytest.mark.parametrize("name", BAD_SAMPLES)
def test_bad_samples(tmp_path, base, handed, capsys, name):
    harm, named = BAD_SAMPLES[name]
    folder = tmp_path / "in"
    shutil.copytree(handed, folder)
    harm(folder)
    message = refusal(capsys, score, "--model", base, "--samples", folder / "samples",
                      "--previous", folder / "pairs.jsonl", "--out", tmp_path / "out")
    assert named in message and str(folder) in message


BAD_PAIRS = {
    "torn": (relined("pairs.jsonl", lambda t: t[:-30]), "line 1"),
    "empty": (relined("pairs.jsonl", lambda t: ""), "no records"),
    "short codes": (edited(cut("win_image", ..., slice(2)), PAIR_CODES),
                    "'win_image' should be 16 codes below 32"),
    "codes too high": (edited(filled("image", 32), PAIR_CODES),
                       "'image' should be 16 codes below 32"),
    "negative codes": (edited(filled("lose_image", -1), PAIR_CODES),
                       "'lose_image' should be 16 codes below 32"),
    "tokens outside": (edited(filled("win_caption", 10**6), PAIR_CODES),
                       "'win_caption': a token is outside the vocabulary"),
    "negative tokens": (edited(filled("lose_caption", -5), PAIR_CODES),
                        "'lose_caption': a token is outside the vocabulary"),
    "code fractions": (edited(lambda t: t.update(image=torch.full((1, 16), 0.5)), PAIR_CODES),
                       "'image'"),
    "other codes": (edited(filled("win_image", 7), PAIR_CODES),
                    "row 0 (id 'r0'): not the tensors of this record"),
    "no codes": (removed(PAIR_CODES), "No such file"),
    "cut codes": (truncated(PAIR_CODES, 200), "cannot read"),
    "no tokens": (edited(lambda t: t.pop("lose_caption"), PAIR_CODES),
                  "no tensor 'lose_caption'"),
    "row outside": (configured("pairs.jsonl", row=1), "row 1 (id 'r0'): cannot read"),
    "row text": (configured("pairs.jsonl", row="0"), "'row'"),
    "score text": (configured("pairs.jsonl", win_image_score="1"), "'win_image_score'"),
    "twice": (relined("pairs.jsonl", lambda t: t + t), "twice"),
}
TRAINING = ("--steps", 1, "--batch", 1, "--micro-batch", 1, "--device", "cpu")


@pytest.mark.parametrize("name", BAD_PAIRS)
def test_bad_pairs(tmp_path, base, handed, capsys, name):
    harm, named = BAD_PAIRS[name]
    shutil.copytree(handed, tmp_path / "in")
    harm(tmp_path / "in")
    message = refusal(capsys, dpo, "--model", base, "--pairs", tmp_path / "in" / "pairs.jsonl",
                      *TRAINING, "--out", tmp_path / "out")
    assert named in message and str(tmp_path / "in" / "pairs") in message


# ------------------------------------------------------------------------------------- named pipes


def ends(name: str, log, *arguments) -> tuple[int, str]:
    """Exit code and output of a stage that must not wait for a named pipe."""
    process = kills.start(name, arguments, log)
    process.join(60)
    if process.exitcode is None:
        process.kill()
        process.join()
        pytest.fail(f"{name} waits for a named pipe: {log.read_text()}")
    return process.exitcode, log.read_text()


def piped(path):
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def test_an_image_that_is_a_named_pipe_is_skipped(tmp_path, base):
    picture(tmp_path / "0.png")
    piped(tmp_path / "1.png")
    (tmp_path / "records.jsonl").write_bytes(GOOD + b"\n" + line(image="1.png"))
    command = sampling(tmp_path, base, tmp_path / "records.jsonl")[1:]
    code, text = ends("01_sample", tmp_path / "log", *command, "--strict")
    why = f"{tmp_path / '1.png'}: cannot read image: not a regular file"
    assert (code, text.splitlines()[-1]) == (2, f"error: {why}")
    for _ in range(2):  # and when it is complete
        code, text = ends("01_sample", tmp_path / "log", *command)
        assert code == 0, text
        assert (tmp_path / "out" / "skipped.txt").read_text() == f"{why}\n"
        assert read_jsonl(tmp_path / "out" / "samples.jsonl", Sample).ids == ["a"]
    assert f"{tmp_path / 'out' / 'samples.jsonl'} is complete" in text


PIPES = {  # stage, the file that is a pipe
    "records": ("01_sample", "records.jsonl"),
    "original records": ("01_sample", "initial_data.json"),
    "questions": ("01_sample", "vqa_data.json"),
    "samples": ("02_score", LINES),
    "codes": ("02_score", CODES),
    "previous": ("02_score", "pairs.jsonl"),
    "previous codes": ("02_score", PAIR_CODES),
    "pairs": ("03_pair_dpo", "pairs.jsonl"),
    "pair codes": ("03_pair_dpo", PAIR_CODES),
}


@pytest.mark.parametrize("name", PIPES)
def test_an_input_that_is_a_named_pipe_is_one_line(tmp_path, base, handed, name):
    stage_name, file = PIPES[name]
    folder = tmp_path / "in"
    shutil.copytree(handed, folder)
    (folder / "initial_data.json").write_text(json.dumps(ONE_RECORD))
    (folder / "vqa_data.json").write_text("[]")
    piped(folder / file)
    records = folder / ("records.jsonl" if name == "records" else "initial_data.json")
    commands = {
        "01_sample": sampling(tmp_path, base, records, "--questions", folder / "vqa_data.json")[1:],
        "02_score": ("--model", base, "--samples", folder / "samples", "--out", tmp_path / "out",
                     "--previous", folder / "pairs.jsonl"),
        "03_pair_dpo": ("--model", base, "--pairs", folder / "pairs.jsonl", *TRAINING,
                        "--out", tmp_path / "out"),
    }
    code, text = ends(stage_name, tmp_path / "log", *commands[stage_name])
    last = text.splitlines()[-1]
    assert code == 2 and last.startswith("error: ") and "Traceback" not in text
    assert str(folder / file) in last and "not a regular file" in last
    assert not any((tmp_path / "out" / name).exists() for name in FINAL)


def test_samples_that_become_a_named_pipe(tmp_path, base, handed):
    """A rerun compares the content of what it had read."""
    shutil.copytree(handed, tmp_path / "in")
    relined(LINES, fields(captions=["blue", "red", "", "big"]))(tmp_path / "in")  # so that one wins
    command = ("--model", base, "--samples", tmp_path / "in" / "samples", "--out", tmp_path / "out",
               "--image-scorer", "likelihood", "--min-image-score", -1)
    code, text = ends("02_score", tmp_path / "log", *command)
    assert code == 0, text
    piped(tmp_path / "in" / LINES)
    code, text = ends("02_score", tmp_path / "log", *command)
    assert code == 2 and text.startswith("error: ") and len(text.splitlines()) == 1
    assert str(tmp_path / "in" / LINES) in text and "not a regular file" in text


def test_no_pairs_says_why(tmp_path, base, handed, capsys):
    message = refusal(capsys, score, "--model", base, "--samples", handed / "samples",
                      "--min-image-score", 1.0, "--out", tmp_path / "out")
    assert "no pairs to train on" in message and "best" in message


def test_the_good_ones_are_good(tmp_path, base, handed):
    """What the tables harm works when it is left alone."""
    load(base)
    main(dpo, "--model", base, "--pairs", handed / "pairs.jsonl", *TRAINING,
         "--out", tmp_path / "train")
    assert (tmp_path / "train" / "checkpoint" / "config.json").exists()


def test_there_are_many():
    tables = (BAD_LINES, BAD_FILES, BAD_FILES, FINE_FILES, BAD_ORIGINAL, BAD_IMAGES, FINE_IMAGES,
              BAD_CHECKPOINTS, BAD_SAMPLES, BAD_PAIRS)
    assert sum(map(len, tables)) >= 120
