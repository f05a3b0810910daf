"""10,000 random inputs to every kind of reader.

A value or an InputError of one line, never another exception.
"""

import io
import json
import os
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from evals import dpg, fid, flickr30k, geneval, gqa, mme, mmmu, pope, tifa, vqav2
from hermesflow.contents import content, digest, remembered_file
from hermesflow.files import PRIVATE, InputError, read_object, write_text, written_files
from hermesflow.inputs import read_records, record_items
from hermesflow.jsonl import lines_of, read_jsonl
from hermesflow.outputs import Output, complete, finish, prepare, read_mark
from hermesflow.pictures import load_image
from hermesflow.questions import keep_questions, parse_questions
from hermesflow.records import Pair, Question, Record, Sample, Score
from hermesflow.scoring import NOTHING, nearest_text
from hermesflow.tables import check_pairs, check_samples, load_tensors, tensors_of, write_table


def fuzz(examples: int):
    """The same inputs on every machine and in every run."""
    unhelpful = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow,
                 HealthCheck.data_too_large]
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None,
                    suppress_health_check=unhelpful)


def survives(reader, *arguments):
    try:
        return reader(*arguments)
    except InputError as error:
        assert str(error).strip() and "\n" not in str(error)


FIELDS = ["id", "image", "caption", "prompt", "questions", "question", "choices", "answer",
          "element", "img_path", "captions", "scores", "caption_scores", "image_scores", "answers",
          "win_caption", "win_image_wrong", "matched", "ended", "shard", "row", "digest",
          "label", "text", "question_id",
          "annotations", "images", "split", "sentences", "raw", "tag", "include", "exclude",
          "class", "count", "options", "prompts"]
NAMES = st.sampled_from(FIELDS)
SCALARS = (st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12)
           | st.sampled_from(["a", "yes", "1", "test", "[]"]))


def containers(values) -> st.SearchStrategy:
    return st.lists(values, max_size=3) | st.dictionaries(NAMES, values, max_size=6)


VALUES = st.recursive(SCALARS, containers, max_leaves=12)
GOOD = {"id": "a", "image": "0.png", "caption": "a ring",
        "questions": [{"question": "q", "choices": ["a", "b"], "answer": "a"}]}


@st.composite
def damaged(draw, whole: bytes):
    """A good file with bytes replaced, removed, inserted or cut off."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        kind = draw(st.sampled_from(["replace", "remove", "insert", "cut"]))
        if kind == "replace" and data:
            data[at] = draw(st.integers(0, 255))
        elif kind == "remove":
            del data[at : at + draw(st.integers(1, 9))]
        elif kind == "insert":
            data[at:at] = draw(st.binary(max_size=9))
        elif kind == "cut":
            del data[at:]
    return bytes(data)


def json_text(values) -> st.SearchStrategy:
    return values.map(lambda v: json.dumps(v).encode())


ASKED = [Question("q?", ["a", "b"], "a")]
GOOD_RECORDS = [
    Sample("a", "0.png", "a ring", "", ASKED, ["one", "two"], [True, False], "s-00000.safetensors",
           1, "0" * 16),
    Score("a", ASKED, [0.5], [1.0, 0.0], [["a"], ["b"]], [["a"], [""]]),
    Pair("a", "0.png", "c", "", "w", "l", 1.0, 0.5, 1.0, 0.0, "", "q?", True, False,
         "p-00000.safetensors", 2),
]
GOOD_LINES = [json.dumps(value).encode() for value in (GOOD, *map(asdict, GOOD_RECORDS))]
LINE = (json_text(VALUES | st.dictionaries(NAMES, VALUES, max_size=8))
        | st.one_of(*map(damaged, GOOD_LINES))
        | st.sampled_from(GOOD_LINES)
        | st.sampled_from([b"[" * 5000, b'{"id": "b", "image": "\\udc80", "caption": "c"}'])
        | st.binary(max_size=40))
LINES = st.lists(LINE, max_size=4).map(b"\n".join)
ARRAYS = st.lists(st.dictionaries(NAMES, VALUES, max_size=5), max_size=3)


@fuzz(2500)
@given(LINES, st.sampled_from([Record, Sample, Score, Pair]), st.booleans())
def test_jsonl(tmp_path, text, kind, skip):
    (tmp_path / "x.jsonl").write_bytes(text)
    records = survives(read_jsonl, tmp_path / "x.jsonl", kind, [] if skip else None)
    if records is not None:
        assert all(type(r) is kind for r in records)
        assert [r.id for r in records] == records.ids
        assert list(records[::-1]) == [records[i] for i in reversed(range(len(records)))]
    survives(lambda: list(lines_of(tmp_path / "x.jsonl")))
    survives(content, lambda: record_items(tmp_path / "x.jsonl"))


@fuzz(1000)
@given(json_text(VALUES | ARRAYS), LINES)
def test_original_records(tmp_path, records, questions):
    (tmp_path / "x.json").write_bytes(records)
    (tmp_path / "q.json").write_bytes(questions)
    survives(read_records, tmp_path / "x.json")
    (tmp_path / "good.json").write_text(json.dumps([GOOD]))
    survives(read_records, tmp_path / "good.json", tmp_path / "q.json")
    survives(read_object, tmp_path / "x.json")


# ----------------------------------------------------------------------- tables and output folders

SHARD = "x-00000.safetensors"
ANY_MODEL = SimpleNamespace(image_tokens=4, code_count=8192, vocab_size=50)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """x.jsonl with three samples and its shard, as bytes, and the tensors of each."""
    folder = tmp_path_factory.mktemp("table")
    rows = []
    for i in range(3):
        tensors = {"image": torch.arange(4) + i, "images": torch.arange(8).view(2, 4) * i,
                   "captions": torch.arange(2 * i).view(2, i)}
        rows.append((Sample(f"r{i}", "0.png", "c"), tensors))
    write_table(folder / "x.jsonl", rows)
    by_digest = {}
    for sample, (_, tensors) in zip(read_jsonl(folder / "x.jsonl", Sample), rows):
        by_digest[sample.digest] = tensors
    return (folder / "x.jsonl").read_bytes(), (folder / SHARD).read_bytes(), by_digest


DTYPES = [torch.int32, torch.int64, torch.uint8, torch.bool, torch.float32, torch.bfloat16,
          torch.float8_e4m3fn, torch.complex64]
SHAPES = st.lists(st.integers(0, 3), max_size=3)


@st.composite
def other_tensors(draw):
    """A sound file with any tensors, as of another program."""
    names = st.sampled_from(["image", "images", "captions", "w"])
    tensors = {}
    for name in draw(st.lists(names, unique=True)):
        tensors[name] = torch.zeros(draw(SHAPES)).to(draw(st.sampled_from(DTYPES)))
    return save(tensors)


@fuzz(1000)
@pytest.mark.filterwarnings("ignore:Casting complex")
@given(st.data())
def test_tables(tmp_path, table, data):
    """Whatever harms the lines or the shard: a record's own tensors, or an error."""
    lines, shard, by_digest = table
    kind = data.draw(st.sampled_from(["lines", "shard", "header", "both", "other"]))
    if kind in ("lines", "both"):
        lines = data.draw(damaged(lines))
    if kind in ("shard", "both"):
        shard = data.draw(damaged(shard))
    if kind == "header":
        end = 8 + int.from_bytes(shard[:8], "little")
        shard = data.draw(damaged(shard[:end])) + shard[end:]
    if kind == "other":
        shard = data.draw(other_tensors() | st.binary(max_size=60))
    (tmp_path / "x.jsonl").write_bytes(lines)
    (tmp_path / SHARD).unlink(missing_ok=True)
    (tmp_path / SHARD).write_bytes(shard)
    survives(load_tensors, tmp_path / SHARD)
    samples = survives(read_jsonl, tmp_path / "x.jsonl", Sample)
    if samples is None:
        return
    survives(check_samples, ANY_MODEL, samples)
    survives(check_pairs, ANY_MODEL, samples)
    for sample in samples:
        tensors = survives(tensors_of, sample)
        if tensors is not None:
            expected = by_digest[sample.digest]
            assert sorted(tensors) == sorted(expected)
            assert all(torch.equal(tensors[name], expected[name]) for name in expected)


@pytest.fixture
def output(tmp_path, monkeypatch) -> Output:
    """A finished stage that reads a file and lines."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = tmp_path / "model"
    model.write_text("weights")
    args = {"records": "r", "model": str(model), "seed": 0, "show": 8, "overwrite": False}
    output = Output(tmp_path / "out", "stage", "out.txt", ("out.txt",), args, free=(),
                    derived=("show",), code=(),
                    inputs={"records": lambda: [("a",), ("b", model)], "model": str(model)})
    prepare(output)
    write_text(output.folder / "out.txt", "result")
    write_text(output.folder / "images" / "0.png", "picture")
    finish(output)
    assert complete(output)
    return output


def reuse(output: Output) -> None:
    """What a rerun asks of its folder; the result stays as it was."""
    survives(written_files, output.folder)
    survives(read_mark, output)
    survives(complete, output)
    survives(prepare, output)
    assert (output.folder / "out.txt").read_text() == "result"
    assert (output.folder / "images" / "0.png").read_text() == "picture"


MARK_FIELDS = ["stage", "format", "complete", "settings", "inputs", "derived", "code"]


@st.composite
def other_marks(draw, mark: dict):
    """The object of settings.json with fields, or fields of its fields, changed or left out."""
    mark = {**mark}
    for name in draw(st.lists(st.sampled_from(MARK_FIELDS), max_size=3)):
        value = draw(VALUES)
        if isinstance(mark.get(name), dict) and mark[name] and draw(st.booleans()):
            mark[name] = {**mark[name], draw(st.sampled_from(sorted(mark[name]))): value}
        elif draw(st.booleans()):
            mark[name] = value
        else:
            mark.pop(name, None)
    return json.dumps(mark).encode()


@fuzz(600)
@given(st.data())
def test_damaged_settings(output, data):
    file = output.folder / "settings.json"
    good = file.read_bytes()
    try:
        file.write_bytes(data.draw(damaged(good) | other_marks(json.loads(good)) | FILES))
        reuse(output)
    finally:
        file.write_bytes(good)
    assert complete(output)


@fuzz(600)
@given(st.data())
def test_damaged_list_of_files(output, data):
    file = output.folder / PRIVATE / "written-0"
    good = file.read_bytes()
    try:
        file.write_bytes(data.draw(damaged(good) | st.binary(max_size=40)))
        reuse(output)
    finally:
        file.write_bytes(good)


@fuzz(600)
@given(st.data())
def test_damaged_cache_of_contents(output, data):
    """It is as good as none: contents are read again."""
    model = output.inputs["model"]
    os.utime(model, (0, 0))  # long ago, or it is not remembered
    expected = digest(model), content(output.inputs["records"])
    cache = remembered_file()
    known = json.dumps({name: "0" * 16 for name in "abc"}).encode()
    damage = damaged(known) | json_text(VALUES) | st.binary(max_size=40)
    cache.parent.mkdir(parents=True, exist_ok=True)
    cache.write_bytes(data.draw(damage))
    assert (digest(model), content(output.inputs["records"])) == expected
    cache.unlink()
    cache.mkdir()
    assert (digest(model), content(output.inputs["records"])) == expected
    cache.rmdir()


# ------------------------------------------------------------------------------ images and answers


def encoded(kind: str, mode: str = "RGB") -> bytes:
    data = io.BytesIO()
    array = np.arange(20 * 24 * 3, dtype=np.uint8).reshape(20, 24, 3)
    Image.fromarray(array).convert(mode).save(data, format=kind)
    return data.getvalue()


KINDS = [("PNG",), ("JPEG",), ("GIF", "P"), ("BMP",), ("WEBP",), ("TIFF",), ("PNG", "LA")]
DAMAGED_IMAGES = st.one_of(*(damaged(encoded(*kind)) for kind in KINDS))


@fuzz(2500)
@pytest.mark.filterwarnings("ignore")
@given(DAMAGED_IMAGES | st.binary(max_size=80))
def test_images(tmp_path, data):
    (tmp_path / "x.png").write_bytes(data)
    pixels = survives(load_image, tmp_path / "x.png", 16)
    assert pixels is None or (pixels.shape == (3, 16, 16) and bool(pixels.isfinite().all()))


TIFA = ("About ring (object):\nQ: is there a ring?\nChoices: yes, no\nA: yes\n"
        "About red (color):\nQ: what color?\nChoices: red, blue\nA: red\n")
TIFA_LINES = TIFA.splitlines() + ["", "A:", "Q:", "Choices: ,", "About (", "About x ()"]
SHUFFLED_TIFA = st.lists(st.sampled_from(TIFA_LINES), max_size=9).map("\n".join)
DAMAGED_TIFA = damaged(TIFA.encode()).map(lambda b: b.decode(errors="replace"))


@fuzz(2500)
@given(st.text(max_size=200) | SHUFFLED_TIFA | DAMAGED_TIFA, st.text(max_size=30))
def test_tifa_answers(text, answer):
    questions = parse_questions(text)
    assert all(q.question and q.element and q.answer in q.choices for q in questions)
    kept = keep_questions(questions, [answer] * len(questions), [q.answer for q in questions])
    assert {q.question for q in kept} <= {q.question for q in questions}
    for q in questions:
        assert nearest_text(answer, q.choices) in (NOTHING, *q.choices)
        assert all(nearest_text(choice, q.choices) == choice for choice in q.choices)


READERS = {
    "pope": (pope.read, "coco_pope_random.json"),
    "vqa": (vqav2.read, "v2_OpenEnded_mscoco_val2014_questions.json"),
    "gqa": (gqa.read, "testdev_balanced_questions.json"),
    "mmmu": (mmmu.read, "x.jsonl"),
    "flickr": (flickr30k.read, "dataset_flickr30k.json"),
    "tifa": (tifa.read, "tifa.json"),
    "geneval": (geneval.read, "evaluation_metadata.jsonl"),
    "names": (geneval.read_object_names, "object_names.txt"),
    "dpg": (dpg.read, "dpg_bench.csv"),
    "fid": (fid.read_statistics, "x.npz"),
    "tensors": (load_tensors, "x.safetensors"),
}
FILES = LINES | json_text(VALUES) | st.binary(max_size=60) | st.text(max_size=80).map(str.encode)


@fuzz(1100)
@given(st.sampled_from(sorted(READERS)), FILES)
def test_benchmark_files(tmp_path, name, data):
    reader, file = READERS[name]
    (tmp_path / file).write_bytes(data)
    if name == "pope":
        for other in ("popular", "adversarial"):
            (tmp_path / f"coco_pope_{other}.json").write_bytes(data)
    survives(reader, tmp_path if name == "pope" else tmp_path / file)


@fuzz(900)
@given(st.text(max_size=60), st.lists(st.text(max_size=8), min_size=1, max_size=5))
def test_benchmark_answers(answer, options):
    assert pope.parse_answer(answer) in ("yes", "no")
    assert isinstance(mme.parse_answer(answer), str)
    assert 0 <= vqav2.accuracy(answer, options * 2) <= 1
    assert isinstance(gqa.parse_answer(answer), str)
    letters = dict(zip("ABCDE", options))
    assert mmmu.parse_choice(answer, letters) in (None, *letters)
    assert mmmu.is_correct(answer, options) in (True, False)
    assert isinstance(flickr30k.ptb_words(answer), str)
    assert isinstance(mmmu.text_list(answer), (list, type(None)))
