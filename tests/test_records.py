"""Records on disk: reading, checking and writing them, output folders, interrupted runs."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import ROOT
from evals.metrics import EvalRecord
from hermesflow import tables
from hermesflow.files import InputError, atomic
from hermesflow.inputs import read_records
from hermesflow.jsonl import read_jsonl, write_jsonl
from hermesflow.outputs import Output
from hermesflow.pictures import load_image
from hermesflow.records import Pair, Question, Record, Sample, Score
from hermesflow.runs import Earlier, Parts, map_records, prepare_output
from hermesflow.tables import check_samples, tensors_of, write_table


def error(call, *args) -> str:
    """The message of the InputError that the call must raise; it has to fit on one line."""
    with pytest.raises(InputError) as caught:
        call(*args)
    message = str(caught.value)
    assert message and "\n" not in message and len(message) < 500
    return message


def beside(path, record):
    """The record as it is read from `path`, whose images are relative to it."""
    if not hasattr(record, "image"):
        return record
    return replace(record, image=str(path.parent / record.image))


# -------------------------------------------------------------------------------------- round trips

ODD = ("tab\tquote\"back\\slash, new\nline, \u2028 line separator, \x85, \r\n, {brace}, "
       "日本語 🙂 é")
QUESTIONS = [Question("what color?", ["red", "blue, dark"], "red", "color"),
             Question(ODD, [ODD], ODD)]
RECORDS = {
    Record: [Record("0", "a.png", "a cat"), Record("ü 1", "b c.png", ODD, ODD, QUESTIONS)],
    Sample: [Sample("a", "a.png", "a cat", "p", QUESTIONS, ["one", "", ODD], [True, False, True]),
             Sample("b", "b.png", "c", shard="s-00000.safetensors", row=7, digest="0a" * 8)],
    Score: [Score("a", QUESTIONS, [0.1, 1 / 3], [1.0, 0.0], [["red", ODD], ["", "x"]],
                  [["red", ODD], ["", ODD]]),
            Score("b", [], [], [], [], [], "no questions")],
    Pair: [Pair("a", "a.png", "y", "", "w", ODD, 0.1 + 0.2, 1e-30, 1.0, -0.5, f"{ODD}\nq?", "",
                True, False, "p-00001.safetensors", 8191, "f" * 16)],
    EvalRecord: [EvalRecord("a", "a.png", "t", QUESTIONS, ODD, 0.5, ["red"], ["red"],
                            [True, False], ["x", ""], ["", ODD], [False, False], True, "a-00000.safetensors", 7, "b" * 16)],
}


@pytest.mark.parametrize("kind", RECORDS, ids=lambda kind: kind.__name__)
def test_round_trip(tmp_path, kind):
    path = tmp_path / "new folder" / "records.jsonl"
    write_jsonl(path, RECORDS[kind])
    assert list(read_jsonl(path, kind)) == [beside(path, r) for r in RECORDS[kind]]
    assert len(path.read_bytes().strip().split(b"\n")) == len(RECORDS[kind])  # one line each
    assert os.listdir(path.parent) == ["records.jsonl"]
    before = path.read_bytes()
    write_jsonl(path, read_jsonl(path, kind))
    assert path.read_bytes() == before  # images are written as they stood there


def test_whole_numbers_are_fine_as_scores(tmp_path):
    path = tmp_path / "scores.jsonl"
    path.write_text('{"id": "a", "questions": [], "caption_scores": [1, 0], "image_scores": [], '
                    '"answers": [], "matched": []}')
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
    image = str(tmp_path / "é.png")
    assert list(read_jsonl(path, Record)) == [Record("a", image, "x y"), Record("b", image, "x y")]


# ----------------------------------------------------------------- one at a time, from their places


def test_records_are_found_by_bytes(tmp_path):
    """Neither letters of several bytes nor marks, blank lines or CRLF shift a place."""
    path = tmp_path / "records.jsonl"
    lines = [json.dumps({"id": f"{i}", "image": "i.png", "caption": "日本 🙂 é" * (i + 1)},
                        ensure_ascii=False).encode() for i in range(9)]
    content = b"\xef\xbb\xbf" + b"\r\n \r\n\n".join(lines)  # no newline at the end
    path.write_bytes(content)
    records = read_jsonl(path, Record)
    assert list(records.places) == [0] + [content.index(line) for line in lines[1:]]
    assert records.places.itemsize == 8  # a file may be larger than 2 GB
    expected = [Record(f"{i}", str(tmp_path / "i.png"), "日本 🙂 é" * (i + 1)) for i in range(9)]
    assert len(records) == 9 and records.ids == [r.id for r in expected]
    assert [records[i] for i in (8, 0, 5, -1, -9)] == [expected[i] for i in (8, 0, 5, -1, -9)]
    assert list(reversed(records)) == expected[::-1]
    for beyond in (9, -10):
        with pytest.raises(IndexError):
            records[beyond]


@pytest.mark.parametrize("part", [slice(2, 5), slice(None, None, 3), slice(-2, None),
                                  slice(None, None, -1), slice(3, 3), slice(0, 99)])
def test_a_slice_is_lazy_and_knows_its_ids(tmp_path, part):
    path = tmp_path / "records.jsonl"
    write_jsonl(path, [Record(f"é{i}", "/i.png", "c") for i in range(7)])
    records = read_jsonl(path, Record)
    expected = list(records)[part]
    some = records[part]
    assert type(some) is type(records) and len(some) == len(expected)
    assert list(some) == expected and some.ids == [r.id for r in expected]
    assert list(some[1:]) == expected[1:]
    assert len(records) == 7 and records.ids == [f"é{i}" for i in range(7)]  # the whole is whole


@pytest.mark.parametrize("end", ["jsonl", "json"])
def test_an_answer_in_other_letters_is_the_choice(tmp_path, end):
    """ "Yes" is the choice "yes", whenever and however often the record is read."""
    questions = [{"question": "q?", "choices": ["no", "yes"], "answer": " Yes"}]
    record = {"id": "a", "image": "a.png", "caption": "c", "questions": questions}
    path = tmp_path / f"records.{end}"
    path.write_text(json.dumps(record if end == "jsonl" else [record]))
    records = read_records(path)
    for some in (records, records[:1], records):
        assert some[0].questions == [Question("q?", ["no", "yes"], "yes")]


def test_questions_are_joined_in_slices_too(original):
    path = original.folder / "records.jsonl"
    ids = ("10", "7", "x9")
    write_jsonl(path, [Record(i, "a.png", "c", questions=[QUESTIONS[0]]) for i in ids])
    records = read_records(path, original.write()[1])
    for _ in range(2):  # and not added once more when they are read again
        assert [q.question for q in records[1:][0].questions] == ["what color?", "cat?", "furry?"]


def test_skipped_records_leave_no_hole(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text("\n".join(["{", GOOD, "null", GOOD.replace('"a"', '"b"'), GOOD, ""]))
    skipped = []
    records = read_jsonl(path, Record, skipped)
    assert records.ids == ["a", "b"] and [r.id for r in records] == ["a", "b"]
    assert [s.split(": ")[1] for s in skipped] == ["line 1", "line 3", "line 5"]


def test_a_replaced_file_does_not_change_what_was_read(tmp_path):
    """A stage reads its own earlier output while it writes the next."""
    path = tmp_path / "records.jsonl"
    write_jsonl(path, [Record(i, "/i.png", f"old {i}") for i in "abc"])
    records = read_jsonl(path, Record)
    write_jsonl(path, (replace(r, caption=r.caption.replace("old", "new")) for r in records))
    assert [r.caption for r in records] == ["old a", "old b", "old c"]
    assert [r.caption for r in read_jsonl(path, Record)] == ["new a", "new b", "new c"]


@pytest.mark.parametrize("change", [
    lambda text: text.replace("old b", "new b"),  # of the same length: every place still fits
    lambda text: "é" + text,
    lambda text: text[:40],
    lambda text: "",
], ids=["same length", "longer", "cut", "empty"])
def test_a_file_that_changes_while_it_is_read_is_one_line(tmp_path, change):
    """`cp` and some editors write into the same file: its records would be mixed."""
    path = tmp_path / "records.jsonl"
    write_jsonl(path, [Record(i, "/i.png", f"old {i}") for i in "abc"])
    os.utime(path, ns=(1, 1))
    records = read_jsonl(path, Record)
    assert records[1].caption == "old b"
    path.write_text(change(path.read_text()))
    assert str(path) in error(lambda: records[1])
    assert str(path) in error(lambda: list(records[1:]))


@pytest.mark.parametrize("before, bad, byte", [
    (b"", b"\xff", 0),
    (b"", b'{"id": "\xe9"}', 8),
    ("é\r\n\n".encode(), b"a\xff", 6),
    (b"\xef\xbb\xbf\n", b"ab\xff", 6),
    (b"\xef\xbb\xbf", b"ab\xff", 5),
    (b"\n" * 1000, b"\xc3", 1000),  # half a letter at the end
])
def test_bad_utf8_names_its_byte_in_the_file(tmp_path, before, bad, byte):
    path = tmp_path / "records.jsonl"
    path.write_bytes(before + bad)
    skipped = []
    message = error(read_jsonl, path, Record, skipped)
    assert message == f"{path}: not UTF-8 text (byte {byte})"


def test_moved_folders_keep_their_images(tmp_path):
    """A relative path stays one, from records to samples to pairs, and an absolute one too."""
    before = tmp_path / "before"
    path = before / "data" / "records.jsonl"
    elsewhere = str(tmp_path / "elsewhere.png")
    write_jsonl(path, [Record("a", "images/é 1.png", "c"), Record("b", elsewhere, "c"),
                       Record("c", "../up.png", "c")])

    samples = before / "runs" / "samples" / "samples.jsonl"
    write_jsonl(samples, (Sample(r.id, r.image, r.caption) for r in read_records(path)))
    pairs = before / "pairs.jsonl"
    write_jsonl(pairs, [replace(RECORDS[Pair][0], id=s.id, image=s.image)
                        for s in read_jsonl(samples, Sample)])

    def written(file) -> list[str]:
        return [json.loads(line)["image"] for line in file.read_bytes().splitlines()]

    assert written(samples) == ["../../data/images/é 1.png", elsewhere, "../../up.png"]
    assert written(pairs) == ["data/images/é 1.png", elsewhere, "up.png"]
    after = tmp_path / "some" / "where" / "else"
    after.parent.mkdir(parents=True)
    before.rename(after)
    for file, kind in (("data/records.jsonl", Record), ("pairs.jsonl", Pair),
                       ("runs/samples/samples.jsonl", Sample)):
        images = [r.image for r in read_jsonl(after / file, kind)]
        assert images == [str(after / "data/images/é 1.png"), elsewhere, str(after / "up.png")]


def test_an_image_of_the_working_directory_is_absolute_from_then_on(tmp_path, monkeypatch):
    """As the original's paths are: they would not be found from another directory."""
    (tmp_path / "cwd").mkdir()
    (tmp_path / "cwd" / "0.png").write_text("")
    monkeypatch.chdir(tmp_path / "cwd")
    write_jsonl(tmp_path / "data" / "records.jsonl", [Record("a", "0.png", "c")])
    write_jsonl(tmp_path / "out" / "samples.jsonl", read_records(tmp_path / "data/records.jsonl"))
    monkeypatch.chdir(tmp_path)
    image = read_jsonl(tmp_path / "out" / "samples.jsonl", Record)[0].image
    assert image == str(tmp_path / "cwd" / "0.png")


# ------------------------------------------------------------------- tables: records with tensors


def drawn(count: int, longest: int = 9) -> list[tuple[Sample, dict]]:
    """Samples with tensors of different lengths, one of them without any caption token."""
    rows = []
    for i in range(count):
        generator = torch.Generator().manual_seed(i)
        length = i % longest
        captions = torch.randint(50_000, (2, length), generator=generator)
        captions[0, length // 2 :] = -1  # a shorter one
        tensors = {"image": torch.randint(8192, (16,), generator=generator),
                   "images": torch.randint(8192, (3, 16), generator=generator),
                   "captions": captions}
        rows.append((Sample(f"é{i}", f"/{i}.png", f"caption {i}", captions=["a", "b"]), tensors))
    return rows


def same(tensors: dict, expected: dict) -> bool:
    assert sorted(tensors) == sorted(expected)
    assert all(t.dtype == torch.int64 for t in tensors.values())
    return all(torch.equal(tensors[name], expected[name]) for name in expected)


@pytest.fixture
def table(tmp_path, monkeypatch):
    """samples.jsonl of eight records, three in each shard, and what was written."""
    monkeypatch.setattr(tables, "SHARD_BYTES", 3 * 4 * (16 + 3 * 16))  # of int32 images alone
    rows = drawn(8)
    assert write_table(tmp_path / "samples.jsonl", rows) == 8
    return tmp_path / "samples.jsonl", rows


def test_a_table_reads_back_from_several_shards(table):
    path, rows = table
    samples = read_jsonl(path, Sample)
    places = [(s.shard, s.row) for s in samples]
    shards = [f"samples-{n:05d}.safetensors" for n in range(3)]
    assert places == [(shards[i // 3], i % 3) for i in range(8)]
    assert sorted(os.listdir(path.parent)) == [*shards, "samples.jsonl"]
    assert len({s.digest for s in samples}) == 8
    for i in [*range(8), *reversed(range(8)), 7, 0, 4, 4, 1]:  # any order, and again
        assert same(tensors_of(samples[i]), rows[i][1])
        assert replace(samples[i], shard="", row=0, digest="") == rows[i][0]


def test_a_shard_is_stacked_int32_that_minus_one_pads(table):
    path, rows = table
    shard = load_file(path.parent / "samples-00001.safetensors")
    assert {name: (t.dtype, tuple(t.shape)) for name, t in shard.items()} == {
        "image": (torch.int32, (3, 16)), "images": (torch.int32, (3, 3, 16)),
        "captions": (torch.int32, (3, 2, 5))}  # of 3, 4 and 5 tokens
    assert torch.equal(shard["images"], torch.stack([rows[i][1]["images"] for i in (3, 4, 5)]))
    assert (shard["captions"][0, :, 3:] == -1).all()


def test_a_cut_and_shuffled_table_reads_right(table):
    """`head`, `shuf` or an editor on samples.jsonl: every line finds its own tensors."""
    path, rows = table
    lines = path.read_text().splitlines()
    order = [6, 1, 7, 0, 3]
    path.write_text("\n".join(lines[i] for i in order))
    samples = read_jsonl(path, Sample)
    assert [s.id for s in samples] == [f"é{i}" for i in order]
    for sample, i in zip(samples, order):
        assert same(tensors_of(sample), rows[i][1])


def test_a_moved_table_reads_right(table, tmp_path):
    path, rows = table
    moved = tmp_path / "moved" / "there"
    moved.mkdir(parents=True)
    for file in tmp_path.glob("samples*"):
        file.rename(moved / file.name)
    for sample, (_, tensors) in zip(read_jsonl(moved / "samples.jsonl", Sample), rows):
        assert same(tensors_of(sample), tensors)


def test_a_table_is_written_again_while_it_is_read(table):
    """As a stage does that keeps what it had sampled."""
    path, rows = table
    samples = read_jsonl(path, Sample)
    before = {f.name: f.read_bytes() for f in path.parent.iterdir()}
    more = drawn(11)[8:]
    again = ((s, tensors_of(s)) for s in samples)
    assert write_table(path, [*again, *more]) == 11
    lines = path.read_bytes()
    assert lines.startswith(before["samples.jsonl"])
    for name in ("samples-00000.safetensors", "samples-00001.safetensors"):
        assert (path.parent / name).read_bytes() == before[name]
    grown = read_jsonl(path, Sample)
    for sample, (_, tensors) in zip(grown, [*rows, *more], strict=True):
        assert same(tensors_of(sample), tensors)
    for sample, (_, tensors) in zip(samples, rows, strict=True):  # as they were read
        assert same(tensors_of(sample), tensors)


def test_a_shorter_table_leaves_no_shard_of_the_longer(table):
    path, rows = table
    other = path.parent / "other-00002.safetensors"
    other.write_text("not of this table")
    write_table(path, rows[:2])
    assert sorted(os.listdir(path.parent)) == ["other-00002.safetensors",
                                               "samples-00000.safetensors", "samples.jsonl"]


def test_files_of_others_are_no_shards(tmp_path):
    """Neither replaced nor removed, though their names are those of shards."""
    out = tmp_path / "out"
    prepare(out, SETTINGS)
    (out / "samples-00001.safetensors").write_text("mine")
    write_table(out / "samples.jsonl", drawn(2))
    assert (out / "samples-00001.safetensors").read_text() == "mine"
    (out / "pairs-00000.safetensors").write_text("mine, too")
    message = error(write_table, out / "pairs.jsonl", drawn(2))
    assert f"{out / 'pairs-00000.safetensors'}: is there already" in message
    assert (out / "pairs-00000.safetensors").read_text() == "mine, too"
    assert not (out / "pairs.jsonl").exists()


def test_a_table_that_fails_leaves_the_old_one(table):
    path, rows = table
    before = path.read_bytes()

    def failing():
        yield from rows[:4]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_table(path, failing())
    assert path.read_bytes() == before
    assert not list(path.parent.glob(".*"))
    for sample, (_, tensors) in zip(read_jsonl(path, Sample), rows, strict=True):
        assert same(tensors_of(sample), tensors)


def damage_header(shard):
    data = bytearray(shard.read_bytes())
    data[12] ^= 0xFF
    shard.write_bytes(data)


def damage_last_row(shard):
    """The last bytes are of the last row: of its `images` in a shard of three."""
    data = bytearray(shard.read_bytes())
    data[-2] ^= 1
    shard.write_bytes(data)


def make_pipe(shard):
    shard.unlink()
    os.mkfifo(shard)


def make_folder(shard):
    shard.unlink()
    shard.mkdir()


def fill_with(tensors):
    return lambda shard: save_file(tensors, shard)


SHARD_HARM = {  # what is done to the second shard -> what the message says of its last row
    "missing": (lambda shard: shard.unlink(), "No such file"),
    "a folder": (make_folder, "folder"),
    "a named pipe": (make_pipe, "not a regular file"),
    "empty": (lambda shard: shard.write_bytes(b""), "cannot read"),
    "cut": (lambda shard: os.truncate(shard, 300), "cannot read"),
    "no header": (damage_header, "cannot read"),
    "one bit": (damage_last_row, "not the tensors of this record"),
    "text": (lambda shard: shard.write_text("{}" * 99), "cannot read"),
    "another shard": (lambda shard: shutil.copy(shard.with_stem("samples-00000"), shard),
                      "not the tensors of this record"),
    "a shorter shard": (lambda shard: shutil.copy(shard.with_stem("samples-00002"), shard),
                        "cannot read"),
    "no tensors": (fill_with({}), "not the tensors of this record"),
    "another table": (fill_with({"logps": torch.zeros(9, 2, 2)}), "not the tensors of this"),
    "bfloat16": (fill_with({"w": torch.zeros(9, 2, dtype=torch.bfloat16)}), ""),
    "numbers": (fill_with({"w": torch.tensor(1)}), "cannot read"),
    "a list": (fill_with({"w": torch.arange(9)}), ""),
}


@pytest.mark.parametrize("warm", [False, True], ids=["unread", "read before"])
@pytest.mark.parametrize("name", SHARD_HARM)
def test_a_bad_shard_is_one_line(table, name, warm):
    """It names the file, the row and the id; the other shards stay readable."""
    harm, part = SHARD_HARM[name]
    path, rows = table
    samples = read_jsonl(path, Sample)
    if warm:
        assert same(tensors_of(samples[5]), rows[5][1])
    shard = path.parent / "samples-00001.safetensors"
    harm(shard)
    os.utime(shard, ns=(1, 1)) if shard.exists() else None  # another time than before
    message = error(tensors_of, samples[5])
    assert f"{shard}: row 2 (id 'é5')" in message and part in message, message
    assert same(tensors_of(samples[2]), rows[2][1]) and same(tensors_of(samples[6]), rows[6][1])


def test_a_mended_shard_is_read_again(table):
    path, rows = table
    samples = read_jsonl(path, Sample)
    shard = path.parent / samples[5].shard
    good = shard.read_bytes()
    damage_last_row(shard)
    assert "not the tensors of this record" in error(tensors_of, samples[5])
    shard.write_bytes(good)
    assert same(tensors_of(samples[5]), rows[5][1])


@pytest.mark.parametrize("change, row", [
    (dict(row=1), 1),  # that of another record
    (dict(row=3), 3),  # behind the last
    (dict(row=2**62), 2**62),
    (dict(row=-1), -1),
    (dict(digest="0" * 16), 0),
    (dict(digest=""), 0),
])
def test_a_line_that_does_not_fit_its_shard_is_one_line(table, change, row):
    path, _ = table
    lines = path.read_text().splitlines()
    path.write_text(json.dumps(json.loads(lines[0]) | change))
    message = error(tensors_of, read_jsonl(path, Sample)[0])
    assert f"{path.parent / 'samples-00000.safetensors'}: row {row} (id 'é0')" in message


ANY_MODEL = SimpleNamespace(image_tokens=16, code_count=8192, vocab_size=50_000)


@pytest.mark.parametrize("use", [lambda samples: tensors_of(samples[0]),
                                 lambda samples: check_samples(ANY_MODEL, samples)],
                         ids=["tensors_of", "check_samples"])
@pytest.mark.parametrize("shard", ["", ".", "..", "no/where", "/etc/hostname", "a\0b", "a\nb",
                                   "é" * 130])
def test_a_shard_that_cannot_be_one_is_one_line(table, shard, use):
    path, _ = table
    lines = path.read_text().splitlines()
    path.write_text(json.dumps(json.loads(lines[0]) | dict(shard=shard)))
    assert str(path.parent) in error(lambda: use(read_jsonl(path, Sample)))


def test_a_named_pipe_is_no_shard(table):
    """It would be waited for, for ever."""
    path, _ = table
    make_pipe(path.parent / "samples-00001.safetensors")
    script = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from hermesflow.jsonl import read_jsonl
from hermesflow.records import Sample
from hermesflow.tables import check_table, load_tensors, tensors_of
samples = read_jsonl({str(path)!r}, Sample)
for use in (lambda: tensors_of(samples[4]), lambda: check_table(None, samples, (), ()),
            lambda: load_tensors(samples.path.with_name(samples[4].shard))):
    try:
        use()
    except Exception as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                          timeout=60)
    lines = done.stdout.splitlines()
    assert len(lines) == 3, done.stderr
    for line in lines:
        assert "samples-00001.safetensors" in line and "not a regular file" in line


def test_the_same_tensors_have_the_same_digest_whatever_pads_them(tmp_path):
    """So that it does not depend on which records share a shard."""
    rows = drawn(6)
    write_table(tmp_path / "together.jsonl", rows)
    alone = []
    for i, row in enumerate(rows):
        write_table(tmp_path / f"{i}.jsonl", [row])
        alone += [s.digest for s in read_jsonl(tmp_path / f"{i}.jsonl", Sample)]
    assert [s.digest for s in read_jsonl(tmp_path / "together.jsonl", Sample)] == alone


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
SCORE = ('{"id": "b", "questions": [], "caption_scores": [%s], "image_scores": [], '
         '"answers": [], "matched": []}')
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


@pytest.mark.parametrize("kind, field, good, bad", [
    (Pair, "row", "8191", "true"),  # true is no number
    (Pair, "row", "8191", "8191.0"),
    (Pair, "row", "8191", "1" + "0" * 30),  # a tensor holds no more than 64 bits
    (Pair, "win_image_score", "1.0", "true"),
    (Pair, "shard", '"p-00001.safetensors"', "1"),
    (Pair, "win_ended", "true", "1"),  # 1 is not true
    (Sample, "ended", "[true, false, true]", "[1, 0, 1]"),
    (Sample, "ended", "[true, false, true]", "true"),
])
def test_numbers_and_truths_are_not_mixed(tmp_path, kind, field, good, bad):
    path = tmp_path / "records.jsonl"
    write_jsonl(path, RECORDS[kind])
    text = path.read_text()
    changed = text.replace(f'"{field}": {good}', f'"{field}": {bad}')
    assert changed != text
    path.write_text(changed)
    message = error(read_jsonl, path, kind)
    assert "line 1" in message and f"'{field}'" in message


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
    assert list(read_records(*original.write())) == [
        Record("7", str(folder / "images/7.jpg"), "A cat.", "",
               [question("cat?"), question("furry?")]),
        Record("x9", str(folder / "images/9.jpg"), "A dog.", "",
               [question("dog?"), question("one dog?")]),
        Record("10", str(folder / "images/10.jpg"), "A fox.", "", [question("fox?")]),
    ]


def test_drawing_text_is_the_prompt_or_else_the_caption(original):
    path = original.folder / "records.jsonl"
    write_jsonl(path, [Record("a", "a.png", "A cat.", "a cat, 4k"), Record("b", "a.png", "A dog.")])
    assert [r.drawing_text for r in read_records(path)] == ["a cat, 4k", "A dog."]
    # the original's `prompt` is another model's; it draws the caption
    texts = [r.drawing_text for r in read_records(*original.write())]
    assert texts == ["A cat.", "A dog.", "A fox."]


@pytest.mark.parametrize("layout", ["{}", "{},", "[{},]", "\n{}\n,\n", "[\n{}]\n"])
def test_original_objects_without_brackets(original, layout):
    """The original's programs write a comma behind each, and some no brackets."""
    expected = list(read_records(*original.write()))
    for path, values in zip(original.write(), (original.records, original.questions)):
        objects = ",\n".join(json.dumps(v, indent=4) for v in values)
        path.write_text(layout.replace("{}", objects))
    paths = [original.folder / name for name in ("initial_data.json", "vqa_data.json")]
    assert list(read_records(*paths)) == expected


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
    ('[{"id": 1, "img_path": "a", "caption": "c"},', "not valid JSON"),
    ('[{"id": 1, "img_path": "a", "caption": "c"} {]', "not valid JSON"),
    ('{"id": 1, "img_path": "a", "caption": "c"}, {"id": 2, "img_', "not valid JSON"),
    ('{"id": 1}', "array"),
    ("[]", "no records"),
    ("", "not records in a format that is read"),
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

SETTINGS = dict(model="toy/base", seed=0, steps=50, out="o", device=None, batch=4, show=8)


def prepare(out, settings: dict, overwrite: bool = False, **inputs) -> bool:
    """A stage that writes done.json and has these inputs besides its settings."""
    args = {**dict.fromkeys(inputs, "given"), **settings, "overwrite": overwrite}
    output = Output(out, "stage", "done.json", ("done.json",), args, free=("device", "batch"),
                    derived=("show",), inputs=inputs, code=())
    return prepare_output(output)


def write(out, name: str) -> None:
    """As a stage does, so that it is the stage's."""
    with atomic(out / name) as temporary:
        temporary.write_text(name)


def complete(out) -> None:
    """What a stage does at its end."""
    write(out, "done.json")
    mark = json.loads((out / "settings.json").read_text())
    (out / "settings.json").write_text(json.dumps(mark | {"complete": True}))


def test_output_folder_continues_with_the_same_settings(tmp_path):
    out = tmp_path / "out"
    assert prepare(out, SETTINGS)
    write(out, "half")
    same_results = {"device": "cpu", "batch": 1, "out": "./o"}
    assert prepare(out, SETTINGS | same_results)
    assert (out / "half").exists()
    complete(out)
    assert not prepare(out, SETTINGS)  # nothing left to do
    assert not prepare(out, SETTINGS | same_results)


def test_output_folder_names_the_setting_that_differs(tmp_path):
    out = tmp_path / "out"
    prepare(out, SETTINGS)
    write(out, "half")
    message = error(prepare, out, SETTINGS | {"seed": 1})
    assert str(out) in message and "--seed 0 -> 1" in message and "steps" not in message
    assert prepare(out, SETTINGS)  # the refused run left the folder as it was
    assert (out / "half").read_text() == "half"


def test_settings_without_results_bind_nobody(tmp_path):
    """A run that was stopped before its first result is begun anew, with any settings."""
    out = tmp_path / "out"
    prepare(out, SETTINGS)
    assert prepare(out, SETTINGS | {"seed": 1})
    write(out, "half")
    assert "--seed 1 -> 0" in error(prepare, out, SETTINGS)


def test_what_is_derived_is_made_again(tmp_path, capsys):
    """--show makes other pictures of the same results: the stage runs again and keeps them."""
    out = tmp_path / "out"
    prepare(out, SETTINGS)
    complete(out)
    capsys.readouterr()
    assert prepare(out, SETTINGS | {"show": 9})
    assert f"{out}: made again from its results: show" in capsys.readouterr().out
    assert (out / "done.json").read_text() == "done.json"
    assert prepare(out, SETTINGS | {"show": 9})  # it was not finished
    complete(out)
    assert not prepare(out, SETTINGS | {"show": 9})
    assert prepare(out, SETTINGS)


def texts(*items):
    return lambda: ((item,) for item in items)


def test_an_input_may_grow_at_its_end_and_not_change(tmp_path, capsys):
    out = tmp_path / "out"
    prepare(out, SETTINGS, records=texts("a", "b"))
    complete(out)
    assert not prepare(out, SETTINGS, records=texts("a", "b"))
    capsys.readouterr()
    assert prepare(out, SETTINGS, records=texts("a", "b", "c"))
    assert f"{out}: made again from its results: records: 2 -> 3" in capsys.readouterr().out
    complete(out)
    assert not prepare(out, SETTINGS, records=texts("a", "b", "c"))
    for other in (("a", "b"), ("a", "x", "c"), ("c", "b", "a"), ("a", "x", "c", "d"), ("ab", "c"),
                  ("x", "a", "b", "c")):
        message = error(lambda: prepare(out, SETTINGS, records=texts(*other)))
        assert f"{out}: made with other settings (content of --records)" in message
    assert not prepare(out, SETTINGS, records=texts("a", "b", "c"))


def test_an_input_file_is_compared_by_content(tmp_path):
    """Another path with the same content is the same; another content is not."""
    out = tmp_path / "out"
    for name, text in (("one", "x"), ("same", "x"), ("other", "y")):
        (tmp_path / name).write_text(text)
    settings = SETTINGS | {"scorer": tmp_path / "one"}
    prepare(out, settings, scorer=tmp_path / "one")
    complete(out)
    assert not prepare(out, settings | {"scorer": tmp_path / "same"}, scorer=tmp_path / "same")
    message = error(lambda: prepare(out, settings, scorer=tmp_path / "other"))
    assert "content of --scorer" in message
    (tmp_path / "one").write_text("y")
    assert "content of --scorer" in error(lambda: prepare(out, settings, scorer=tmp_path / "one"))
    assert "content of --scorer" in error(lambda: prepare(out, settings, scorer=None))


def test_an_input_that_no_option_names_is_compared_too(tmp_path):
    """The default of an option: a checkpoint without tokenizers is read with the published ones."""
    out = tmp_path / "out"
    for name in ("one", "other"):
        (tmp_path / name).write_text(name)
    settings = SETTINGS | {"tokenizer": None}
    assert prepare(out, settings, tokenizer=tmp_path / "one")
    complete(out)
    assert not prepare(out, settings, tokenizer=tmp_path / "one")
    message = error(lambda: prepare(out, settings, tokenizer=tmp_path / "other"))
    assert "content of --tokenizer" in message


def test_output_folder_is_overwritten(tmp_path):
    out = tmp_path / "out"
    prepare(out, SETTINGS)
    complete(out)
    write(out, "images/old.png")
    (out / "mine.txt").write_text("no stage wrote this")
    assert prepare(out, SETTINGS | {"seed": 1}, overwrite=True)
    assert sorted(os.listdir(out)) == [".run", "mine.txt", "settings.json"]
    write(out, "half")
    assert "--seed 1 -> 0" in error(prepare, out, SETTINGS)
    assert (out / "mine.txt").read_text() == "no stage wrote this"


def test_a_damaged_list_of_files_leads_nowhere_else(tmp_path):
    """A crash of the system leaves zeros or old blocks in a file that was written to last."""
    out = tmp_path / "out"
    prepare(out, SETTINGS)
    complete(out)
    others = [tmp_path / "mine.txt", tmp_path / "mine" / "too.txt"]
    (tmp_path / "mine").mkdir()
    for path in others:
        path.write_text("no stage wrote this")
    with open(out / ".run" / "written-0", "a") as names:
        names.write(f"../mine.txt\n{others[1]}\nimages/../../mine.txt\n\0\0\0\n/\n..\n")
    assert not prepare(out, SETTINGS)
    assert prepare(out, SETTINGS | {"seed": 1}, overwrite=True)
    assert not (out / "done.json").exists()
    assert [path.read_text() for path in others] == ["no stage wrote this"] * 2


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
    assert list(map_records(work, records, tmp_path, batch_again, "work")) == results_of(records)
    assert [len(c) for c in seen[1:]] == {2: [2, 2, 1], 3: [3, 2]}[batch_again]
    assert sum(seen, []) == list("ecadbfg")  # every record once
    calls = len(seen)
    assert list(map_records(work, records, tmp_path, 2, "work")) == results_of(records)
    assert len(seen) == calls  # all finished: nothing is computed


def numbered(ids: str) -> list[Record]:
    return [Record(i, "", f"caption {i}") for i in ids]


def test_parts_may_be_torn(tmp_path):
    """A kill cuts the last line, which is done again; files of several processes are read."""
    records = numbered("abcdefg")
    with pytest.raises(ZeroDivisionError):
        map_records(lambda chunk: results_of(chunk) if chunk[0].id != "e" else 1 / 0, records,
                    tmp_path, 2, "work")
    file, = (tmp_path / "parts" / "work").iterdir()
    assert file.name == f"0-{os.getpid()}-0.log"
    lines = file.read_bytes().splitlines(keepends=True)
    assert [line.split(b"\t")[0].decode() for line in lines] == list("abcd")
    file.with_name("3-77-0.log").write_bytes(lines[3] + b"g\t{")
    file.write_bytes(b"".join(lines[:3])[:-1])
    seen = []

    def work(chunk):
        seen.extend(r.id for r in chunk)
        return results_of(chunk)

    results = map_records(work, records, tmp_path, 2, "work")
    assert list(results) == results_of(records) and seen == ["c", "e", "f", "g"]
    assert results[-1]["id"] == "g" and [r["id"] for r in results[2:4]] == ["c", "d"]


def test_parts_fill_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr("hermesflow.runs.PART_BYTES", 300)
    records = numbered("hgfedcba")
    results = map_records(results_of, records, tmp_path, 1, "work")
    assert len(list((tmp_path / "parts" / "work").iterdir())) > 2
    assert list(results) == results_of(records)
    parts = Parts(tmp_path / "parts" / "work")
    for i in (7, 0, 3, 3):  # in any order
        assert parts.read(records[i].id) == results_of(records[i : i + 1])[0]


def test_a_finished_file_is_continued(tmp_path):
    """What it holds is not computed; the results are in the order of the records."""
    file = tmp_path / "done.jsonl"
    write_jsonl(file, numbered("bd"))

    def as_result(record) -> dict:
        return results_of([record])[0] | {"old": True}

    seen = []

    def work(chunk):
        seen.extend(r.id for r in chunk)
        return results_of(chunk)

    earlier = Earlier(file, Record, as_result)
    results = map_records(work, numbered("abcd"), tmp_path, 3, "work", earlier=earlier)
    assert seen == ["a", "c"]
    expected = [r | {"old": True} if r["id"] in "bd" else r for r in results_of(numbered("abcd"))]
    assert list(results) == expected
    nothing = Earlier(tmp_path / "nothing.jsonl", Record, as_result)
    assert len(nothing) == 0
    again = map_records(work, numbered("xy"), tmp_path, 3, "other", earlier=nothing)
    assert list(again) == results_of(numbered("xy"))


# -------------------------------------------------------------------------------------- whole stage


def test_stage_ends_in_one_line_and_exit_code_2(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text(f'{GOOD}\n{{"id": "b", "image": "b.png", "caption": 3}}\n')
    command = [sys.executable, ROOT / "01_sample.py", "--records", path, "--strict",
               "--model", ROOT / "toy" / "base", "--out", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    expected = f"error: {path}: line 2: field 'caption' should be str, found 3\n"
    assert done.stderr == expected
    assert not (tmp_path / "out").exists()
