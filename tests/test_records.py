"""Records on disk: reading, checking and writing them, output folders, interrupted runs."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from conftest import ROOT
from evals.metrics import EvalRecord
from hermesflow.files import InputError, atomic
from hermesflow.pictures import load_image
from hermesflow.records import (Pair, Question, Record, Sample, Score, read_jsonl, read_records,
                                write_jsonl)
from hermesflow.runs import map_records, prepare_output


def error(call, *args) -> str:
    """The message of the InputError that the call must raise; it has to fit on one line."""
    with pytest.raises(InputError) as caught:
        call(*args)
    message = str(caught.value)
    assert message and "\n" not in message and len(message) < 500
    return message


# -------------------------------------------------------------------------------------- round trips

ODD = ("tab\tquote\"back\\slash, new\nline, \u2028 line separator, \x85, \r\n, {brace}, "
       "日本語 🙂 é")
QUESTIONS = [Question("what color?", ["red", "blue, dark"], "red", "color"),
             Question(ODD, [ODD], ODD)]
RECORDS = {
    Record: [Record("0", "a.png", "a cat"), Record("ü 1", "b c.png", ODD, ODD, QUESTIONS)],
    Sample: [Sample("a", "a.png", "a cat", "p", QUESTIONS, ["one", "", ODD]),
             Sample("b", "b.png", "c")],
    Score: [Score("a", QUESTIONS, [0.1, 1 / 3], [1.0, 0.0], [["red", ODD], ["", "x"]]),
            Score("b", [], [], [], [], "no questions")],
    Pair: [Pair("a", "a.png", "y", "", [0, 8191], "w", ODD, [1, 2], [], 0.1 + 0.2, 1e-30,
                [3], [4], 1.0, -0.5, [ODD], [])],
    EvalRecord: [EvalRecord("a", "a.png", "t", QUESTIONS, ODD, 0.5, ["red"], [True, False],
                            ["x", ""], [False, False], True, [7])],
}


@pytest.mark.parametrize("kind", RECORDS, ids=lambda kind: kind.__name__)
def test_round_trip(tmp_path, kind):
    path = tmp_path / "new folder" / "records.jsonl"
    write_jsonl(path, RECORDS[kind])
    assert read_jsonl(path, kind) == RECORDS[kind]
    assert len(path.read_bytes().strip().split(b"\n")) == len(RECORDS[kind])  # one line each
    assert os.listdir(path.parent) == ["records.jsonl"]


def test_whole_numbers_are_fine_as_scores(tmp_path):
    path = tmp_path / "scores.jsonl"
    path.write_text('{"id": "a", "questions": [], "caption_scores": [1, 0], "image_scores": [], '
                    '"answers": []}')
    scores = read_jsonl(path, Score)[0].caption_scores
    assert scores == [1.0, 0.0] and all(type(s) is float for s in scores)


@pytest.mark.parametrize("before, end", [
    (b"\xef\xbb\xbf", b"\n"),
    (b"", b"\r\n"),
    (b"\xef\xbb\xbf", b"\r\n"),
    (b"\n\n", b"\n \n"),
])
def test_byte_order_mark_crlf_and_blank_lines(tmp_path, before, end):
    path = tmp_path / "records.jsonl"
    records = [{"id": i, "image": "é.png", "caption": "x y"} for i in "ab"]
    lines = [json.dumps(r, ensure_ascii=False).encode() for r in records]
    path.write_bytes(before + end.join(lines) + end)
    assert read_jsonl(path, Record) == [Record("a", "é.png", "x y"), Record("b", "é.png", "x y")]


# ---------------------------------------------------------------------------------------- bad files

GOOD = '{"id": "a", "image": "a.png", "caption": "c"}'
BAD_LINES = {  # name: (kind, second line, what the message must say)
    "malformed": (Record, '{"id": "b", "image": ', ["line 2", "not valid JSON"]),
    "trailing comma": (Record, '{"id": "b", "image": "b.png", "caption": "c",}',
                       ["line 2", "not valid JSON"]),
    "no object": (Record, '["b"]', ["line 2", "list"]),
    "null": (Record, "null", ["line 2"]),
    "deep": (Record, "[" * 100_000, ["line 2", "not valid JSON"]),
    "wrong type": (Record, '{"id": "b", "image": "b.png", "caption": 3}',
                   ["line 2", "'caption'", "str", "3"]),
    "null field": (Record, '{"id": "b", "image": null, "caption": "c"}',
                   ["line 2", "'image'", "null"]),
    "number as id": (Record, '{"id": 7, "image": "b.png", "caption": "c"}',
                     ["line 2", "'id'", "7"]),
    "text as list": (Sample, '{"id": "b", "image": "b", "caption": "c", "captions": "one"}',
                     ["line 2", "'captions'", "list"]),
    "missing field": (Record, '{"id": "b", "caption": "c"}', ["line 2", "'image'", "missing"]),
    "in a question": (Record, '{"id": "b", "image": "b", "caption": "c", "questions": '
                              '[{"question": "q", "choices": ["x", 2], "answer": "x"}]}',
                      ["line 2", "'questions'", "'choices'", "2"]),
    "missing in a question": (Record, '{"id": "b", "image": "b", "caption": "c", '
                                      '"questions": [{"question": "q"}]}',
                              ["line 2", "'questions'", "'choices'", "missing"]),
    "lone surrogate": (Record, '{"id": "b", "image": "b", "caption": "\\ud83d"}',
                       ["line 2", "'caption'"]),
}
SCORE = '{"id": "b", "questions": [], "caption_scores": [%s], "image_scores": [], "answers": []}'
NO_SCORES = {"too large": "1e999", "huge whole number": "1" + "0" * 400, "true": "true",
             "text": '"1.0"'}
for number in ("NaN", "Infinity", "-Infinity"):
    BAD_LINES[number] = Score, SCORE % number, ["line 2", number]
for name, number in NO_SCORES.items():
    BAD_LINES[name] = Score, SCORE % number, ["line 2", "'caption_scores'"]


@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_line(tmp_path, name):
    kind, line, parts = BAD_LINES[name]
    path = tmp_path / "bad.jsonl"
    path.write_text(f"{GOOD if kind in (Record, Sample) else SCORE % 0}\n{line}\n")
    message = error(read_jsonl, path, kind)
    assert all(part in message for part in [str(path), *parts]), message


def test_true_is_no_code(tmp_path):
    path = tmp_path / "pairs.jsonl"
    write_jsonl(path, RECORDS[Pair])
    text = path.read_text()
    path.write_text(text.replace('"win_image_codes": [3]', '"win_image_codes": [true]'))
    message = error(read_jsonl, path, Pair)
    assert "line 1" in message and "'win_image_codes'" in message


@pytest.mark.parametrize("content, part", [
    (None, "No such file"),
    (b"", "no records"),
    (b"\n \n", "no records"),
    (b"\xef\xbb\xbf", "no records"),
    (GOOD.encode() + b"\n\xff\xfe", "UTF-8"),
    (GOOD.encode("utf-16"), "UTF-8"),
])
@pytest.mark.parametrize("read", [read_records, lambda path: read_jsonl(path, Record)],
                         ids=["records", "jsonl"])
def test_bad_file(tmp_path, content, part, read):
    path = tmp_path / "bad.jsonl"
    if content is not None:
        path.write_bytes(content)
    message = error(read, path)
    assert str(path) in message and part in message


def test_folder_instead_of_a_file(tmp_path):
    assert str(tmp_path) in error(lambda: read_jsonl(tmp_path, Record))


HOSTILE = ["", ".", "..", "../x", "a/b", "/etc/passwd", "..\\x", "a\0b", "line\nbreak", "x" * 300,
           "é" * 200]


@pytest.mark.parametrize("id", HOSTILE, ids=[ascii(i)[:16] for i in HOSTILE])
def test_hostile_ids(tmp_path, id):
    """An id becomes part of a file name: it must not leave the folder, nor be too long."""
    path = tmp_path / "records.jsonl"
    line = json.dumps({"id": id, "image": "b.png", "caption": "c"})
    path.write_text(f"{GOOD}\n{line}\n")
    message = error(read_records, path)
    assert all(part in message for part in [str(path), "line 2", "'id'"]), message


def test_ordinary_ids_are_fine(tmp_path):
    ids = ["0", "a b", "é", "...", "x" * 200, "train-0-00001", "日本", "a:b", "-"]
    write_jsonl(tmp_path / "records.jsonl", [Record(i, "a.png", "c") for i in ids])
    assert [r.id for r in read_records(tmp_path / "records.jsonl")] == ids
    for i in ids:
        with atomic(tmp_path / "images" / f"{i}.png") as temporary:
            temporary.write_text(i)
    assert sorted(os.listdir(tmp_path / "images")) == sorted(f"{i}.png" for i in ids)


def test_the_same_id_twice(tmp_path):
    path = tmp_path / "records.jsonl"
    other_id = GOOD.replace('"a"', '"b"')
    other_image = GOOD.replace("a.png", "other.png")
    path.write_text("\n".join([GOOD, other_id, other_image]))
    message = error(read_records, path)
    assert all(part in message for part in [str(path), "line 3", "'id'", "'a'", "twice"]), message


def test_an_impossible_image_path_is_no_crash(tmp_path):
    """Such a path is bad input at the latest when the image is opened."""
    for image in ("x" * 5000, "a\0b.png", ""):
        write_jsonl(tmp_path / "records.jsonl", [Record("a", image, "c")])
        with pytest.raises(InputError):
            load_image(read_records(tmp_path / "records.jsonl")[0].image, 16)


# --------------------------------------------------------------------------- the original's formats


@pytest.fixture
def original(tmp_path):
    """initial_data.json and vqa_data.json as the original writes them.

    The questions are in another order than the records.
    """
    records = [
        {"id": 7, "img_path": "images/7.jpg", "prompt": "a cat, 4k", "caption": "A cat.",
         "split": "train"},
        {"id": "x9", "img_path": "images/9.jpg", "prompt": "", "caption": "A dog.", "score": 0.5},
        {"id": 10, "img_path": "images/10.jpg", "prompt": "a fox", "caption": "A fox."},
    ]

    def question(id, text):
        return {"caption": "c", "element": "cat", "question": text, "choices": ["yes", "no"],
                "answer": "yes", "id": id, "img_path": "elsewhere.jpg", "prompt": "other"}

    questions = [question("x9", "dog?"), question(10, "fox?"), question(7, "cat?"),
                 question("x9", "one dog?"), question("7", "furry?")]

    def write(records=records, questions=questions):
        paths = tmp_path / "initial_data.json", tmp_path / "vqa_data.json"
        for path, value in zip(paths, (records, questions)):
            path.write_text(json.dumps(value, indent=4))
        return paths

    return SimpleNamespace(write=write, records=records, questions=questions, folder=tmp_path)


def test_original_formats(original):
    def question(text):
        return Question(text, ["yes", "no"], "yes", "cat")

    folder = original.folder
    assert read_records(*original.write()) == [
        Record("7", str(folder / "images/7.jpg"), "A cat.", "a cat, 4k",
               [question("cat?"), question("furry?")]),
        Record("x9", str(folder / "images/9.jpg"), "A dog.", "",
               [question("dog?"), question("one dog?")]),
        Record("10", str(folder / "images/10.jpg"), "A fox.", "a fox", [question("fox?")]),
    ]


def test_drawing_text_is_the_prompt_or_else_the_caption(original):
    texts = [r.drawing_text for r in read_records(*original.write())]
    assert texts == ["a cat, 4k", "A dog.", "a fox"]


def test_questions_join_our_own_records_too(original):
    path = original.folder / "records.jsonl"
    write_jsonl(path, [Record("10", "a.png", "c", questions=[QUESTIONS[0]]),
                       Record("7", "b.png", "c"), Record("x9", "b.png", "c")])
    joined = {}
    for r in read_records(path, original.write()[1]):
        joined[r.id] = [q.question for q in r.questions]
    assert joined == {"10": ["what color?", "fox?"], "7": ["cat?", "furry?"],
                      "x9": ["dog?", "one dog?"]}


def test_image_paths(original, monkeypatch):
    """Relative to the records file, or (as in the original) to the working directory.

    The latter if the file exists there alone.
    """
    folder = original.folder
    elsewhere = folder / "elsewhere"
    for path in (elsewhere / "images/7.jpg", elsewhere / "images/9.jpg", folder / "images/9.jpg"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    monkeypatch.chdir(elsewhere)
    assert [r.image for r in read_records(original.write()[0])] == [
        str(elsewhere / "images/7.jpg"),
        str(folder / "images/9.jpg"),
        str(folder / "images/10.jpg"),
    ]


@pytest.mark.parametrize("change, parts", [
    (dict(caption=None), ["record 2", "'caption'", "null"]),
    (dict(id="7"), ["record 2", "'id'", "twice"]),  # the number 7 and the text "7" are one id
    (dict(id="../x"), ["record 2", "'id'"]),
    (dict(id=1.5), ["record 2", "'id'", "1.5"]),
    (dict(id=True), ["record 2", "'id'", "true"]),
    (dict(img_path=3), ["record 2", "3"]),
])
def test_bad_original_record(original, change, parts):
    records = [original.records[0], {**original.records[1], **change}]
    paths = original.write(records=records, questions=[])
    message = error(read_records, *paths)
    assert all(part in message for part in [str(paths[0]), *parts]), message


@pytest.mark.parametrize("change, parts", [
    (dict(id=8), ["'id'", "8"]),
    (dict(id="nobody"), ["'id'", "nobody"]),
    (dict(id=None), ["'id'", "None"]),
    (dict(choices="yes, no"), ["'choices'", "list"]),
    (dict(answer=1), ["'answer'", "1"]),
])
def test_bad_original_question(original, change, parts):
    questions = [original.questions[0], {**original.questions[1], **change}]
    paths = original.write(questions=questions)
    message = error(read_records, *paths)
    assert all(part in message for part in [str(paths[1]), "record 2", *parts]), message


@pytest.mark.parametrize("text, part", [
    ('[{"id": 1, "img_path": "a", "caption": "c"},]', "not valid JSON"),
    ('{"id": 1}', "array"),
    ("[]", "no records"),
    ("", "not valid JSON"),
])
def test_bad_original_file(original, text, part):
    path, _ = original.write()
    path.write_text(text)
    message = error(read_records, path)
    assert str(path) in message and part in message


# ------------------------------------------------------------------------------------------- atomic


def test_atomic_keeps_the_old_file_when_the_block_fails(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic(path) as temporary:
        temporary.write_text("half")
        assert path.read_text() == "old"
        1 / 0
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file.txt"]
    with atomic(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["file.txt"]


def test_atomic_keeps_the_old_folder_when_the_block_fails(tmp_path):
    folder = tmp_path / "folder"
    for name, fails in (("old", False), ("half", True), ("new", False)):
        try:
            with atomic(folder) as temporary:
                temporary.mkdir()
                (temporary / name).write_text(name)
                if fails:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            assert os.listdir(folder) == ["old"]
    assert os.listdir(folder) == ["new"] and os.listdir(tmp_path) == ["folder"]


@pytest.mark.parametrize("inside", ["file.txt/out.json", "file.txt/deeper/out.json"])
def test_atomic_cannot_write(tmp_path, inside):
    (tmp_path / "file.txt").write_text("in the way")

    def write():
        with atomic(tmp_path / inside) as temporary:
            temporary.write_text("x")

    message = error(write)
    assert str(tmp_path / inside) in message and "cannot write" in message
    assert os.listdir(tmp_path) == ["file.txt"]
    assert (tmp_path / "file.txt").read_text() == "in the way"


# ----------------------------------------------------------------------------------- output folders

SETTINGS = dict(model="toy/base", seed=0, steps=50, out="o", device=None, batch=4)


def prepare(out, settings: dict, overwrite: bool = False) -> bool:
    return prepare_output(out, {**settings, "overwrite": overwrite}, "done.json", {})


def test_output_folder_continues_with_the_same_settings(tmp_path):
    out = tmp_path / "out"
    assert prepare(out, SETTINGS)
    (out / "half").write_text("x")
    same_results = {"device": "cuda", "batch": 1, "out": "./o"}
    assert prepare(out, SETTINGS | same_results)
    assert (out / "half").exists()
    (out / "done.json").write_text("x")
    assert not prepare(out, SETTINGS)  # nothing left to do


def test_output_folder_names_the_setting_that_differs(tmp_path):
    out = tmp_path / "out"
    prepare(out, SETTINGS)
    message = error(prepare, out, SETTINGS | {"seed": 1})
    assert str(out) in message and "seed 0 -> 1" in message and "steps" not in message
    assert prepare(out, SETTINGS)  # the refused run left the folder as it was


def test_output_folder_is_overwritten(tmp_path):
    out = tmp_path / "out"
    prepare(out, SETTINGS)
    (out / "done.json").write_text("x")
    assert prepare(out, SETTINGS | {"seed": 1}, overwrite=True)
    assert sorted(os.listdir(out)) == [".lock", "settings.json"]
    assert "seed 1 -> 0" in error(prepare, out, SETTINGS)


def test_output_folder_below_a_file(tmp_path):
    (tmp_path / "out").write_text("a file")
    assert str(tmp_path / "out") in error(prepare, tmp_path / "out", SETTINGS)


# --------------------------------------------------------------------------------- interrupted runs


def results_of(records: list) -> list[dict]:
    return [dict(id=r.id, value=ODD + r.caption, number=[1, 2.5]) for r in records]


@pytest.mark.parametrize("batch_again", [2, 3])
def test_map_records_continues(tmp_path, batch_again):
    records = [Record(i, "", f"caption {i}") for i in "ecadbfg"]
    seen = []

    def work(chunk, fail_at=None):
        if len(seen) == fail_at:
            raise RuntimeError("power cut")
        seen.append([r.id for r in chunk])
        return results_of(chunk)

    with pytest.raises(RuntimeError):
        map_records(lambda chunk: work(chunk, fail_at=1), records, tmp_path, 2, "work")
    assert seen == [["e", "c"]]
    assert map_records(work, records, tmp_path, batch_again, "work") == results_of(records)
    assert [len(c) for c in seen[1:]] == {2: [2, 2, 1], 3: [3, 2]}[batch_again]
    assert sum(seen, []) == list("ecadbfg")  # every record once
    calls = len(seen)
    assert map_records(work, records, tmp_path, 2, "work") == results_of(records)
    assert len(seen) == calls  # all finished: nothing is computed


# -------------------------------------------------------------------------------------- whole stage


def test_stage_ends_in_one_line_and_exit_code_2(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text(f'{GOOD}\n{{"id": "b", "image": "b.png", "caption": 3}}\n')
    command = [sys.executable, ROOT / "01_sample.py", "--records", path,
               "--out", tmp_path / "out", "--strict"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    expected = f"error: {path}: line 2: field 'caption' should be str, found 3\n"
    assert done.stderr == expected
    assert not (tmp_path / "out").exists()
