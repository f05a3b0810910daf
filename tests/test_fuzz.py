"""10,000 random inputs to every kind of reader.

A value or an InputError of one line, never another exception.
"""

import io
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from evals import dpg, fid, flickr30k, geneval, gqa, mme, mmmu, pope, tifa, vqav2
from hermesflow.files import InputError, load_tensors, read_object
from hermesflow.pictures import load_image
from hermesflow.records import Pair, Record, Sample, Score, read_jsonl, read_records
from hermesflow.scoring import keep_questions, nearest_text, parse_questions


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
          "image_codes", "win_caption", "win_caption_ids", "label", "text", "question_id",
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


LINE = (json_text(VALUES | st.dictionaries(NAMES, VALUES, max_size=8))
        | damaged(json.dumps(GOOD).encode())
        | st.binary(max_size=40))
LINES = st.lists(LINE, max_size=4).map(b"\n".join)
ARRAYS = st.lists(st.dictionaries(NAMES, VALUES, max_size=5), max_size=3)


@fuzz(2500)
@given(LINES, st.sampled_from([Record, Sample, Score, Pair]), st.booleans())
def test_jsonl(tmp_path, text, kind, skip):
    (tmp_path / "x.jsonl").write_bytes(text)
    records = survives(read_jsonl, tmp_path / "x.jsonl", kind, [] if skip else None)
    assert records is None or all(type(r) is kind for r in records)


@fuzz(1000)
@given(json_text(VALUES | ARRAYS), LINES)
def test_original_records(tmp_path, records, questions):
    (tmp_path / "x.json").write_bytes(records)
    (tmp_path / "q.json").write_bytes(questions)
    survives(read_records, tmp_path / "x.json")
    (tmp_path / "good.json").write_text(json.dumps([GOOD]))
    survives(read_records, tmp_path / "good.json", tmp_path / "q.json")
    survives(read_object, tmp_path / "x.json")


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
        assert nearest_text(answer, q.choices) in q.choices


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
