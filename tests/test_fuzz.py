"""10,000 random inputs to every kind of reader: a value or an InputError of one line, never another exception."""

import io
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import benchmarks as rules
from conftest import stage
from model import InputError, Pair, Record, Sample, Score, load_image, load_tensors, read_jsonl, read_object, read_records

score = stage("02_score")


def fuzz(examples: int):
    """The same inputs on every machine and in every run."""
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None,
                    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large])


def survives(reader, *arguments):
    try:
        return reader(*arguments)
    except InputError as error:
        assert str(error).strip() and "\n" not in str(error)


FIELDS = ["id", "image", "caption", "prompt", "questions", "question", "choices", "answer", "element", "img_path", "captions", "scores",
          "caption_scores", "image_scores", "answers", "image_codes", "win_caption", "win_caption_ids", "label", "text", "question_id",
          "annotations", "images", "split", "sentences", "raw", "tag", "include", "exclude", "class", "count", "options", "prompts"]
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12) | st.sampled_from(["a", "yes", "1", "test", "[]"])
VALUES = st.recursive(SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), v, max_size=6), max_leaves=12)
GOOD = {"id": "a", "image": "0.png", "caption": "a ring", "questions": [{"question": "q", "choices": ["a", "b"], "answer": "a"}]}


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


LINES = st.lists(json_text(VALUES | st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=8)) | damaged(json.dumps(GOOD).encode())
                 | st.binary(max_size=40), max_size=4).map(b"\n".join)


@fuzz(2500)
@given(LINES, st.sampled_from([Record, Sample, Score, Pair]), st.booleans())
def test_jsonl(tmp_path, text, kind, skip):
    (tmp_path / "x.jsonl").write_bytes(text)
    found = survives(read_jsonl, tmp_path / "x.jsonl", kind, [] if skip else None)
    assert found is None or all(type(r) is kind for r in found)


@fuzz(1000)
@given(json_text(VALUES | st.lists(st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=5), max_size=3)), LINES)
def test_original_records(tmp_path, records, questions):
    (tmp_path / "x.json").write_bytes(records)
    (tmp_path / "q.json").write_bytes(questions)
    survives(read_records, tmp_path / "x.json")
    (tmp_path / "good.json").write_text(json.dumps([GOOD]))
    survives(read_records, tmp_path / "good.json", tmp_path / "q.json")
    survives(read_object, tmp_path / "x.json")


def encoded(kind: str, mode: str = "RGB") -> bytes:
    data = io.BytesIO()
    Image.fromarray(np.arange(20 * 24 * 3, dtype=np.uint8).reshape(20, 24, 3)).convert(mode).save(data, format=kind)
    return data.getvalue()


@fuzz(2500)
@pytest.mark.filterwarnings("ignore")
@given(st.one_of(*(damaged(encoded(*k)) for k in (("PNG",), ("JPEG",), ("GIF", "P"), ("BMP",), ("WEBP",), ("TIFF",), ("PNG", "LA")))) | st.binary(max_size=80))
def test_images(tmp_path, data):
    (tmp_path / "x.png").write_bytes(data)
    pixels = survives(load_image, tmp_path / "x.png", 16)
    assert pixels is None or (pixels.shape == (3, 16, 16) and bool(pixels.isfinite().all()))


TIFA = "About ring (object):\nQ: is there a ring?\nChoices: yes, no\nA: yes\nAbout red (color):\nQ: what color?\nChoices: red, blue\nA: red\n"


@fuzz(2500)
@given(st.text(max_size=200) | st.lists(st.sampled_from(TIFA.splitlines() + ["", "A:", "Q:", "Choices: ,", "About (", "About x ()"]), max_size=9)
       .map("\n".join) | damaged(TIFA.encode()).map(lambda b: b.decode(errors="replace")), st.text(max_size=30))
def test_tifa_answers(text, said):
    questions = score.parse_questions(text)
    assert all(q.question and q.element and q.answer in q.choices for q in questions)
    kept = score.keep_questions(questions, [said] * len(questions), [q.answer for q in questions])
    assert {q.question for q in kept} <= {q.question for q in questions}
    for q in questions:
        assert score.nearest_text(said, q.choices) in q.choices


READERS = {"pope": (rules.read_pope, "coco_pope_random.json"), "vqa": (rules.read_vqa, "v2_OpenEnded_mscoco_val2014_questions.json"),
           "gqa": (rules.read_gqa, "testdev_balanced_questions.json"), "mmmu": (rules.read_mmmu, "x.jsonl"),
           "flickr": (rules.read_flickr, "dataset_flickr30k.json"), "tifa": (rules.read_tifa, "tifa.json"),
           "geneval": (rules.read_geneval, "evaluation_metadata.jsonl"), "names": (rules.read_object_names, "object_names.txt"),
           "dpg": (rules.read_dpg, "dpg_bench.csv"), "fid": (rules.read_fid_statistics, "x.npz"), "tensors": (load_tensors, "x.safetensors")}


@fuzz(1100)
@given(st.sampled_from(sorted(READERS)), LINES | json_text(VALUES) | st.binary(max_size=60) | st.text(max_size=80).map(str.encode))
def test_benchmark_files(tmp_path, name, data):
    reader, file = READERS[name]
    (tmp_path / file).write_bytes(data)
    if name == "pope":
        for other in ("popular", "adversarial"):
            (tmp_path / f"coco_pope_{other}.json").write_bytes(data)
    survives(reader, tmp_path if name == "pope" else tmp_path / file)


@fuzz(900)
@given(st.text(max_size=60), st.lists(st.text(max_size=8), min_size=1, max_size=5))
def test_benchmark_answers(said, options):
    assert rules.pope_answer(said) in ("yes", "no") and isinstance(rules.mme_answer(said), str)
    assert 0 <= rules.vqa_accuracy(said, options * 2) <= 1 and isinstance(rules.gqa_answer(said), str)
    letters = dict(zip("ABCDE", options))
    assert rules.mmmu_choice(said, letters) in (None, *letters)
    assert rules.mmmu_right(said, options) in (True, False)
    assert isinstance(rules.ptb_words(said), str) and isinstance(rules.text_list(said), (list, type(None)))
