"""Records in every format that is read, parts of them, and what a rerun compares."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from conftest import ROOT, main, results_of, stage
from hermesflow import datasets
from hermesflow.contents import content
from hermesflow.files import HELD, InputError
from hermesflow.inputs import (RecordLines, read_records, record_items, those_with_questions,
                               unread_questions)
from hermesflow.jsonl import read_jsonl
from hermesflow.records import Question, Sample
from model import Model, save
from tiny import tiny_model

sample = stage("01_sample")
evaluation = stage("04_eval")

TEXTS = ("a big red ring", "a small blue square", "a ring left of a square")
NAMES = ("0.png", "sub/1.png", "2.png")

# -------------------------------------------------------------------------------------- the formats


def lines(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(v) + "\n" for v in values))
    return path


def our_jsonl(folder):
    rows = zip(("0", "sub-1", "2"), NAMES, TEXTS)
    return lines(folder / "records.jsonl", [dict(zip(("id", "image", "caption"), r)) for r in rows])


def original(folder):
    ids = (0, "sub-1", 2)
    rows = [{"id": i, "img_path": name, "caption": text, "prompt": "ring, 8k"}
            for i, name, text in zip(ids, NAMES, TEXTS)]
    path = folder / "initial_data.json"
    path.write_text(json.dumps(rows))
    return path


def journeydb(folder, questions=({},) * 3):
    return lines(folder / "train_anno.jsonl", [
        {"img_path": f"./{name}", "prompt": "ring, 8k --v 4", "Task1": {"Style": "flat"},
         "Task2": {"Caption": text}, "Task3": asked}
        for name, text, asked in zip(NAMES, TEXTS, questions)])


def coco(folder, indent=None):
    numbers = (30, 10, 20)
    images = [{"id": n, "file_name": name, "width": 9} for n, name in zip(numbers, NAMES)]
    captions = [{"id": 100 + n, "image_id": n, "caption": t} for n, t in zip(numbers, TEXTS)]
    later = [{"id": 200, "image_id": n, "caption": "another one"} for n in numbers]
    path = folder / "captions_val2014.json"
    value = {"info": {"year": 2014}, "licenses": [], "images": images,
             "annotations": [*later, *reversed(captions)]}
    path.write_text(json.dumps(value, indent=indent))
    return path


def image_folder(folder, column="text"):
    return lines(folder / "metadata.jsonl", [
        {"file_name": name, column: text} for name, text in zip(NAMES, TEXTS)]).parent


def image_table(folder, column="text"):
    folder.mkdir(exist_ok=True)
    with open(folder / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows([("file_name", "license", column),
                                    *((name, "none", text) for name, text in zip(NAMES, TEXTS))])
    return folder


IDS = {coco: ["30", "10", "20"]}
FORMATS = (our_jsonl, original, journeydb, coco, image_folder, image_table)


@pytest.mark.parametrize("write", FORMATS)
def test_every_format_is_read(tmp_path, write):
    """Its ids, images, texts, in the order of the file; other models' prompts are not drawn."""
    path = write(tmp_path)
    records = read_records(path)
    assert [r.id for r in records] == IDS.get(write, ["0", "sub-1", "2"])
    assert [r.image for r in records] == [str(tmp_path / name) for name in NAMES]
    assert [r.caption for r in records] == list(TEXTS)
    assert [r.drawing_text for r in records] == list(TEXTS)
    assert all(r.questions == [] for r in records)
    one_at_a_time = write in (our_jsonl, journeydb, image_folder)
    assert isinstance(records, RecordLines if one_at_a_time else list)


@pytest.mark.parametrize("write", FORMATS)
def test_images_are_looked_up_in_their_folder(tmp_path, write):
    path = write(tmp_path / "a" if write in (image_folder, our_jsonl) else tmp_path)
    (tmp_path / "images").mkdir()
    records = read_records(path, image_folder=tmp_path / "images")
    assert [r.image for r in records] == [str(tmp_path / "images" / name) for name in NAMES]
    files = [item[1] for item in record_items(path, image_folder=str(tmp_path / "images"))]
    assert files == [tmp_path / "images" / name for name in NAMES]
    for read in (read_records, lambda *a, **k: list(record_items(*a, **k))):
        with pytest.raises(InputError, match="--image-folder .*nowhere: no such folder"):
            read(path, image_folder=tmp_path / "nowhere")


@pytest.mark.parametrize("write", FORMATS)
def test_another_name_is_the_same_file(tmp_path, write):
    """Where the content says what it is. A file of lines is known as one by its name or its first
    line; the original's array is an array."""
    path = write(tmp_path)
    if path.is_dir():
        path = next(path.glob("metadata.*"))
    other = path.rename(path.with_name("data.json" if path.suffix != ".csv" else "data.txt"))
    assert [r.caption for r in read_records(other)] == list(TEXTS)


@pytest.mark.parametrize("write", FORMATS)
def test_a_part_counts_records_of_the_file(tmp_path, write):
    path = write(tmp_path)
    whole = list(read_records(path))
    for skip, limit, part in ((0, 2, whole[:2]), (1, None, whole[1:]), (1, 1, whole[1:2]),
                              (2, 9, whole[2:])):
        records = read_records(path, skip=skip, limit=limit)
        assert list(records) == part and list(records[:1]) == part[:1]
        assert len(list(record_items(path, skip=skip, limit=limit))) == len(part)
    for skip in (3, 4):
        with pytest.raises(InputError, match=f"--skip {skip} leaves none of its 3 records"):
            read_records(path, skip=skip)


def test_a_bad_record_does_not_shift_the_others(tmp_path):
    good = [json.dumps({"id": i, "image": "a.png", "caption": "c"}) for i in "abcdef"]
    path = tmp_path / "records.jsonl"
    path.write_text("\n".join([good[0], "", "{", good[2], good[3], "[]", good[5]]) + "\n")
    skipped = []
    assert read_records(path, None, skipped, limit=3).ids == ["a", "c"]
    assert read_records(path, None, skipped, skip=3).ids == ["d", "f"]
    assert [s.split(": ")[1] for s in skipped] == ["line 3", "line 6"]
    # nothing behind the part is read
    assert read_records(path, limit=1).ids == ["a"]
    with pytest.raises(InputError, match="line 3: not valid JSON"):
        read_records(path, limit=2)
    values = [{"id": 1, "img_path": "a.png", "caption": "c"}, {"id": 2}, 3,
              {"id": 4, "img_path": "a.png", "caption": "c"}]
    (tmp_path / "initial_data.json").write_text(json.dumps(values))
    found = read_records(tmp_path / "initial_data.json", None, skipped, skip=2)
    assert [r.id for r in found] == ["4"] and "record 3: expected an object" in skipped[-1]


@pytest.mark.parametrize("indent", [None, 2])
def test_coco_without_captions(tmp_path, indent):
    path = coco(tmp_path, indent)
    value = json.loads(path.read_text())
    value["annotations"] = [a for a in value["annotations"] if a["image_id"] != 10] + ["x", {}]
    value["images"] += [None, {"id": 7, "file_name": "7.png"}, {"id": 30, "file_name": "8.png"}]
    path.write_text(json.dumps(value, indent=indent))
    skipped = []
    assert [r.id for r in read_records(path, None, skipped)] == ["30", "20"]
    assert [s.split(": ", 1)[1] for s in skipped] == [
        "image 2: field 'caption' is missing", "image 4: expected an object, found NoneType",
        "image 5: field 'caption' is missing", "image 6: field 'id': '30' occurs twice"]


@pytest.mark.parametrize("write", [image_folder, image_table])
def test_the_column_with_texts(tmp_path, write):
    for column in ("text", "caption", "prompt"):
        assert [r.caption for r in read_records(write(tmp_path, column))] == list(TEXTS)
    with pytest.raises(InputError, match="(line 1|line 2): field 'text' is missing"):
        read_records(write(tmp_path, "alt"))


def test_the_first_column_of_texts_counts(tmp_path):
    value = {"file_name": "a.png", "prompt": "3", "caption": "2", "text": "1"}
    for name in ("text", "caption", "prompt"):
        lines(tmp_path / "metadata.jsonl", [value])
        assert read_records(tmp_path)[0].caption == value.pop(name)


def test_a_table_with_line_breaks_and_a_mark(tmp_path):
    path = tmp_path / "metadata.csv"
    path.write_bytes(b"\xef\xbb\xbffile_name,text\r\n"
                     b'a.png,"a ""big"" ring,\r\nred"\r\nb.png,two\r\n')
    assert [r.caption for r in read_records(path)] == ['a "big" ring,\nred', "two"]
    path.write_text('file_name,text\na.png\n"b')
    with pytest.raises(InputError, match="metadata.csv: after record 1: not valid CSV"):
        read_records(path)
    path.write_text("file_name,text\na.png\n")
    with pytest.raises(InputError, match="line 2: field 'text' should be str, found null"):
        read_records(path)
    path.write_text("file_name,text\na.png,one\nb.png,a ring, above a square\n")
    skipped = []
    assert [r.caption for r in read_records(path, skipped=skipped)] == ["one"]
    assert skipped == [f"{path}: line 3: more columns than the first line names; a text that holds "
                       "a comma needs quotes"]


@pytest.mark.parametrize("file, values, said", [
    ("metadata.jsonl", {"file_name": "b.png", "prompt": " "}, "line 2: field 'prompt' is empty"),
    ("metadata.jsonl", {"file_name": "a.png", "prompt": "p"},
     "line 2: field 'file_name': 'a' occurs twice"),
    ("metadata.jsonl", {"file_name": 3, "prompt": "p"},
     "line 2: field 'file_name' should be str, found 3"),
    ("train_anno.jsonl", {"img_path": "b.png", "Task2": {"Caption": 3}},
     "line 2: field 'Task2.Caption' should be str, found 3"),
    ("train_anno.jsonl", {"img_path": ["b.png"], "Task2": {"Caption": "c"}},
     "line 2: field 'img_path' should be str, found [\"b.png\"]"),
    ("initial_data.json", {"id": 2, "img_path": None, "caption": "c"},
     "record 2: field 'img_path' should be str, found null"),
    ("initial_data.json", {"id": 1, "img_path": "b.png", "caption": "c"},
     "record 2: field 'id': '1' occurs twice"),
    ("records.jsonl", {"id": "b", "image": 3, "caption": "c"},
     "line 2: field 'image' should be str, found 3"),
])
def test_messages_name_the_files_own_fields(tmp_path, file, values, said):
    """Whether a bad record stops or is skipped."""
    good = {"metadata.jsonl": {"file_name": "a.png", "prompt": "p"},
            "train_anno.jsonl": {"img_path": "a.png", "Task2": {"Caption": "c"}},
            "initial_data.json": {"id": 1, "img_path": "a.png", "caption": "c"},
            "records.jsonl": {"id": "a", "image": "a.png", "caption": "c"}}[file]
    path = lines(tmp_path / file, [good, values])
    if path.suffix == ".json":
        path.write_text(json.dumps([good, values]))
    with pytest.raises(InputError) as error:
        read_records(path)
    skipped = ["of another file: field 'image' is missing"]
    assert len(read_records(path, None, skipped)) == 1
    assert str(error.value) == skipped[1] == f"{path}: {said}"
    assert skipped[0] == "of another file: field 'image' is missing"


def test_messages_name_cocos_fields(tmp_path):
    value = {"images": [{"id": 1, "file_name": 3}],
             "annotations": [{"id": 1, "image_id": 1, "caption": "c"}]}
    (tmp_path / "coco.json").write_text(json.dumps(value))
    with pytest.raises(InputError, match="image 1: field 'file_name' should be str, found 3"):
        read_records(tmp_path / "coco.json")


NOT_READ = {  # name, content
    "other lines": ("data.jsonl", '{"picture": "a.png", "label": 3}\n'),
    "other object": ("data.json", '{"data": []}'),
    "other table": ("data.csv", "image,text\na.png,b\n"),
    "words": ("data.txt", "a big red ring\n"),
    "nothing": ("data", ""),
    "parquet": ("data.parquet", "PAR1\0\0PAR1"),
    "number": ("data.json", "3"),
}


@pytest.mark.parametrize("name", NOT_READ)
def test_anything_else_is_one_line(tmp_path, name):
    """Which names what is read."""
    file, text = NOT_READ[name]
    (tmp_path / file).write_text(text)
    with pytest.raises(InputError) as error:
        read_records(tmp_path / file)
    message = str(error.value)
    assert message.startswith(f"{tmp_path / file}: ") and "\n" not in message
    assert all(part in message for part in ("our JSONL", "JourneyDB", "initial_data.json", "COCO",
                                            "metadata.csv"))


def test_a_folder_without_metadata(tmp_path):
    with pytest.raises(InputError, match="a folder without metadata.csv or metadata.jsonl; read"):
        read_records(tmp_path)


# ---------------------------------------------------------------------------- JourneyDB's questions

TASK3 = {
    "Style Relevant Questions and Answers": [
        {"Question": "Which style?", "Options": {"A": "Oil", "B": "Ink"}, "Answer": "B"}],
    "Content Relevant Questions and Answers": [
        {"Question": "What is it?", "Options": ["A: Yes", "B: No"], "Answer": "A: Yes"},
        {"Question": "How many?", "Options": {"A": "One", "B": "Two"}, "Answer": "two"}]}


def test_journeydb_questions_are_homologous(tmp_path):
    records = read_records(journeydb(tmp_path, [TASK3, {}, "none"]))
    assert records[0].questions == [
        Question("Which style?", ["Oil", "Ink"], "Ink", "style"),
        Question("What is it?", ["Yes", "No"], "Yes", "content"),
        Question("How many?", ["One", "Two"], "Two", "content")]
    assert [len(r.questions) for r in records] == [3, 0, 0]


AB = {"A": "Red", "B": "Blue"}


@pytest.mark.parametrize("options, answer, expected", [
    (AB, "A", "Red"), (AB, "b", "Blue"), (AB, "(B)", "Blue"), (AB, "B.", "Blue"),
    (AB, "B) Blue", "Blue"), (AB, "(A): Red", "Red"), (AB, "Blue", "Blue"), (AB, " red ", "Red"),
    ({"A": "A. Red", "B": "B. Blue"}, "B", "Blue"), (["Red", "Blue"], "B", "Blue"),
    (["A) Red", "B) Blue"], "B) Blue", "Blue"), ({"1": "Red", "2": "Blue"}, "2", "Blue"),
    (["A cat", "A dog"], "A dog", "A dog"), (["A cat", "A dog"], "B", "A dog"),
    # what cannot be answered
    (AB, "C", None), (AB, "Green", None), (AB, "", None), (AB, 1, None), (AB, None, None),
    (["Red"], "Red", None), ({}, "A", None), ("Red, Blue", "Red", None), (["Red", 2], "Red", None),
    (["Red", ""], "Red", None), (None, "A", None), (AB, "A big one", None),
])
def test_options_and_answers_of_journeydb(options, answer, expected):
    value = {"Question": "q?", "Options": options, "Answer": answer}
    unread = []
    task = {"Content Relevant": [value, 3, {"Question": "q?"}]}
    found = datasets.journeydb_questions(task, unread)
    assert len(unread) == (3 if expected is None else 2)
    assert unread[-2:] == ["no object with a text 'Question': 3", "'q?': no text 'Answer'"]
    if expected is None:
        assert found == [] and unread[0].startswith("'q?': ")
    else:
        question = Question(**found[0])  # which takes the answer's letters from the choice
        assert question.answer == expected and expected in question.choices
        assert all(len(c) > 1 and c[1] not in ".:)" for c in question.choices)


@pytest.mark.parametrize("task, unread", [
    ({}, []), (None, []), ({"Content": []}, []), (TASK3, []),
    ("none", ["expected an object of topics"]),
    ({"Content": "none"}, ["'Content': expected a list of questions"]),
    ({"Content": [{"Question": "q?", "Options": AB, "Answer": "C"}]},
     ["'q?': 'Answer' 'C' is none of its options"]),
    ({"Content": [{"Question": "q?", "Options": AB}]},
     ["'q?': no text 'Answer'"]),
    ({"Content": [{"Question": "q?", "Options": ["Red", " "], "Answer": "A"}]},
     ["'q?': 'Options' holds an empty text"]),
])
def test_why_questions_of_journeydb_are_left_out(task, unread):
    found = []
    datasets.journeydb_questions(task, found)
    assert found == unread


def test_questions_that_cannot_be_read_are_counted(tmp_path):
    """Once a record; of the part that is read, and of records that are good."""
    bad = {"Question": "Which?", "Options": AB, "Answer": "C"}
    topic = "Content Relevant Questions and Answers"
    path = journeydb(tmp_path, [TASK3, {topic: [bad, *TASK3[topic], 3]}, {topic: [bad]}])
    with open(path, "a") as file:
        file.write("\n{\n" + json.dumps({"img_path": "x.png", "Task3": {topic: [3]}}) + "\n")
    skipped = []
    records = read_records(path, None, skipped)
    assert [len(r.questions) for r in records] == [3, 2, 0] and len(skipped) == 2
    said = ("are left out; the first: {}: {}: field 'Task3': 'Which?': 'Answer' 'C' is none of its "
            "options")
    lost = "have questions that cannot be read, which " + said
    assert unread_questions(path, records) == f"2 of 3 records {lost.format(path, 'line 2')}"
    part = {"skip": 2, "limit": 1}
    assert (unread_questions(path, read_records(path, **part), **part)
            == f"1 of 1 records {lost.format(path, 'line 3')}")
    part = {"limit": 1}
    assert unread_questions(path, read_records(path, **part), **part) == ""
    array = tmp_path / "array.json"
    array.write_text(json.dumps([json.loads(x) for x in path.read_text().splitlines()[:3]]))
    assert (unread_questions(array, read_records(array))
            == f"2 of 3 records {lost.format(array, 'record 2')}")
    assert unread_questions(our_jsonl(tmp_path), ()) == ""


def test_lines_of_journeydb_without_captions(tmp_path):
    """Its images without annotations are no records; the others are, wherever they stand."""
    path = journeydb(tmp_path)
    bare = "".join(json.dumps({"img_path": f"./{i}.png", "prompt": "p"}) + "\n" for i in range(50))
    path.write_text(bare + path.read_text())
    skipped = []
    assert [r.id for r in read_records(path, None, skipped)] == ["0", "sub-1", "2"]
    assert len(skipped) == 50 and "line 1: field 'Task2.Caption' is missing" in skipped[0]
    assert [r.id for r in read_records(path, skip=51)] == ["sub-1", "2"]


# ------------------------------------------------------------------------- what decides the results


@pytest.mark.parametrize("write", FORMATS)
def test_what_a_rerun_compares(tmp_path, write):
    """Texts and images, of the part that is read, wherever the file is."""
    (tmp_path / "a").mkdir()
    path = write(tmp_path / "a")
    for name in NAMES:
        (tmp_path / "a" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "a" / name).write_text(name)

    def now(**part):
        return content(lambda: record_items(path, **part))

    all_of_it = now()
    first = now(limit=1)
    assert all_of_it == now(skip=0, limit=3) == now(limit=9) and len({all_of_it, first}) == 2
    # a record behind the part changes, in size too
    file = next(path.glob("metadata.*")) if path.is_dir() else path
    good = file.read_text()
    file.write_text(good.replace(TEXTS[2], "something else"))
    assert now() != all_of_it and now(limit=1) == first
    file.write_text(good.replace(TEXTS[0], "something else"))
    assert now(limit=1) != first and now(skip=1) != all_of_it
    file.write_text(good)
    (tmp_path / "a" / NAMES[1]).write_text("another image")
    assert now() != all_of_it and now(limit=1) == first
    (tmp_path / "a" / NAMES[1]).write_text(NAMES[1])
    assert now() == all_of_it


def test_questions_of_a_record_decide(tmp_path):
    """Those of others do not; the order of the file does not."""
    path = our_jsonl(tmp_path)

    def asked(*ids):
        q = [{"id": i, "question": f"{i}?", "choices": ["yes"], "answer": "yes"} for i in ids]
        lines(tmp_path / "q.jsonl", q)
        return content(lambda: record_items(path, tmp_path / "q.jsonl", limit=2))

    first = asked("0", "sub-1")
    assert first == asked("sub-1", "0") == asked("0", "2", "sub-1") == asked("0", "sub-1", "zz")
    assert len({first, asked("0"), asked("0", "0", "sub-1"), asked()}) == 4
    lines(tmp_path / "q.jsonl", [3, {"id": "0"}])
    (tmp_path / "q.jsonl").write_text((tmp_path / "q.jsonl").read_text() + "{\n")
    assert content(lambda: record_items(path, tmp_path / "q.jsonl"))


def test_a_large_file_of_coco_is_parsed_once(tmp_path, monkeypatch):
    path = coco(tmp_path)
    parsed = []
    rows = datasets.coco_rows
    monkeypatch.setattr(datasets, "coco_rows", lambda *a: parsed.append(1) or rows(*a))
    for _ in range(3):
        read_records(path)
        list(record_items(path))
    assert len(parsed) == 1
    path.write_text(path.read_text().replace(TEXTS[0], "something else"))
    assert read_records(path)[0].caption == "something else" and len(parsed) == 2


def test_those_with_questions(tmp_path):
    asked = {"question": "q?", "choices": ["a"], "answer": "a"}
    values = [{"id": i, "image": "a.png", "caption": "c", "questions": [asked] * n}
              for i, n in (("x", 1), ("y", 0), ("z", 2))]
    path = lines(tmp_path / "records.jsonl", values)
    (tmp_path / "array.json").write_text(json.dumps(values))
    for file in (path, tmp_path / "array.json"):
        records = read_records(file)
        assert [r.id for r in those_with_questions(records)] == ["x", "z"]
        assert [r.id for r in those_with_questions(records, False)] == ["y"]
        assert len(records) == 3
    part = those_with_questions(read_records(path))
    assert part.ids == ["x", "z"] and [r.id for r in part[1:]] == ["z"]


# ------------------------------------------------------------------------------- in stages 1 and 4


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "base"
    save(tiny_model(), folder)
    return folder


@pytest.fixture
def pictures(tmp_path):
    """The images of all formats, in a folder of their own."""
    pixels = np.random.default_rng(0).integers(0, 255, (3, 16, 16, 3), dtype=np.uint8)
    for name, array in zip(NAMES, pixels):
        (tmp_path / "pictures" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(tmp_path / "pictures" / name)
    return tmp_path / "pictures"


def draw(base, records, out, *more):
    main(sample, "--records", records, "--model", base, "--captions", 2, "--max-new-tokens", 3,
         "--images", 2, "--steps", 2, "--guidance", 0, "--show", 0, "--out", out, *more)
    HELD.clear()
    return read_jsonl(out / "samples.jsonl", Sample)


def test_all_formats_give_the_same_samples(tmp_path, base, pictures):
    """Of the same images and texts, under the same ids."""
    expected = None
    for write in FORMATS:
        if write is coco:
            continue
        (tmp_path / write.__name__).mkdir()
        path = write(tmp_path / write.__name__)
        out = tmp_path / "out" / write.__name__
        samples = draw(base, path, out, "--image-folder", pictures)
        assert [s.id for s in samples] == ["0", "sub-1", "2"]
        expected = expected or results_of(out)
        assert results_of(out) == expected, write
    samples = draw(base, coco(tmp_path), tmp_path / "coco", "--image-folder", pictures)
    assert [(s.id, s.image) for s in samples] == [
        (i, str(pictures / name)) for i, name in zip(IDS[coco], NAMES)]


def test_a_larger_limit_keeps_what_was_sampled(tmp_path, base, pictures, monkeypatch):
    path = our_jsonl(pictures)
    draw(base, path, tmp_path / "whole")
    out = tmp_path / "out"
    assert draw(base, path, out, "--limit", 1).ids == ["0"]
    drawn = []
    generate = Model.generate_images
    monkeypatch.setattr(Model, "generate_images",
                        lambda m, prompts, *a: drawn.extend(prompts) or generate(m, prompts, *a))
    assert draw(base, path, out, "--limit", 2).ids == ["0", "sub-1"]
    assert drawn == [TEXTS[1]] * 2
    draw(base, path, out)
    assert drawn == [TEXTS[1]] * 2 + [TEXTS[2]] * 2
    assert results_of(out) == results_of(tmp_path / "whole")
    before = results_of(out)
    for more in (["--skip", 1], ["--limit", 2], ["--skip", 1, "--limit", 3]):
        with pytest.raises(InputError, match="content of --records"):
            draw(base, path, out, *more)
        HELD.clear()
    assert results_of(out) == before
    assert draw(base, path, tmp_path / "rest", "--skip", 1).ids == ["sub-1", "2"]


def ask_about(path, *ids):
    return lines(path, [{"id": i, "question": "is it red?", "choices": ["yes", "no"],
                         "answer": "yes", "element": "color"} for i in ids])


def test_questions_that_come_later_sample_nothing_again(tmp_path, base, pictures, monkeypatch,
                                                        capsys):
    """They are passed on by stage 1, and change none of its samples."""
    path = our_jsonl(pictures)
    out = tmp_path / "out"
    before = draw(base, path, out)
    monkeypatch.setattr(Model, "generate_images", None)
    monkeypatch.setattr(Model, "generate_text", None)
    questions = ask_about(tmp_path / "q.jsonl", "0", "2")
    after = draw(base, path, out, "--questions", questions)
    assert "made again from its results: questions" in capsys.readouterr().out
    assert [len(s.questions) for s in before] == [0, 0, 0]
    assert [len(s.questions) for s in after] == [1, 0, 1]
    assert [s.digest for s in after] == [s.digest for s in before]
    draw(base, path, out, "--questions", questions)
    assert "samples.jsonl is complete" in capsys.readouterr().out


def test_stage_1_counts_questions_that_cannot_be_read(tmp_path, base, pictures, capsys):
    """Of JourneyDB. A record that was asked about nothing is one of those without questions."""
    path = journeydb(pictures, [{}, TASK3, {"Content": [3]}])
    draw(base, path, tmp_path / "out")
    said = capsys.readouterr().out
    assert ("1 of 3 records have questions that cannot be read, which are left out; the first: "
            f"{path}: line 3: field 'Task3': no object with a text 'Question': 3\n") in said
    assert "no record has questions" not in said
    draw(base, path, tmp_path / "last", "--skip", 2)
    assert "1 of 1 records have questions" in (said := capsys.readouterr().out)
    assert "no record has questions" in said


def test_without_questions_stage_2_says_what_to_run(tmp_path, base, pictures, capsys):
    """And stage 1 before it, in its last line."""
    score = stage("02_score")
    draw(base, our_jsonl(pictures), tmp_path / "samples")
    assert capsys.readouterr().out.splitlines()[-1] == (
        "no record has questions: 02_score.py needs them (python -m hermesflow.questions writes "
        "them), or --image-scorer likelihood")
    with pytest.raises(InputError) as error:
        main(score, "--samples", tmp_path / "samples", "--model", base, "--out", tmp_path / "pairs")
    assert all(part in str(error.value) for part in (
        "no record has questions", "python -m hermesflow.questions", "01_sample.py --questions",
        "--image-scorer likelihood"))
    assert not (tmp_path / "pairs").exists()


def evaluate(base, path, out, *more):
    main(evaluation, "--records", path, "--model", base, "--judge", "self", "--steps", 2,
         "--guidance", 0, "--max-new-tokens", 3, "--show", 0, "--out", out, *more)
    HELD.clear()
    return json.loads((out / "metrics.json").read_text())


def test_held_out_records_without_questions_are_left_out(tmp_path, base, pictures, capsys):
    """And bad ones; both are counted. None left is one line."""
    path = our_jsonl(pictures)
    path.write_text(path.read_text() + '{"id": "bad"}\n')
    questions = ask_about(tmp_path / "q.jsonl", "sub-1", "2")
    found = evaluate(base, path, tmp_path / "out", "--questions", questions)
    said = capsys.readouterr().out
    assert found["records"] == 2
    assert "left out: 1 records without questions" in said
    assert "left out: 1 bad records or questions; the first: " in said and "line 4" in said
    part = evaluate(base, path, tmp_path / "part", "--questions", questions, "--skip", 1,
                    "--limit", 1)
    assert part["records"] == 1
    for more in ([], ["--questions", questions, "--limit", 1]):
        with pytest.raises(InputError, match="no record has questions|no question about any"):
            evaluate(base, path, tmp_path / "none", *more)
    assert not (tmp_path / "none").exists()


def test_stage_4_counts_questions_that_cannot_be_read(tmp_path, base, pictures, capsys):
    path = journeydb(pictures, [{}, TASK3, {"Content": [3]}])
    assert evaluate(base, path, tmp_path / "out")["records"] == 1
    assert "1 of 3 records have questions that cannot be read" in capsys.readouterr().out


@pytest.mark.parametrize("script, out", [("01_sample.py", []), ("04_eval.py", ["--out", "o"])])
def test_a_file_of_nothing_is_said_before_torch_is_loaded(tmp_path, script, out):
    (tmp_path / "data.txt").write_text("words")
    command = [script, "--records", str(tmp_path / "data.txt"), *out]
    done = subprocess.run([sys.executable, "-X", "importtime", *command], cwd=ROOT, text=True,
                          capture_output=True)
    assert done.returncode == 2 and "data.txt: not records in a format" in done.stderr
    assert " torch\n" not in done.stderr and " transformers\n" not in done.stderr
