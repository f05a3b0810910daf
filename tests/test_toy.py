"""The toy world is exact, its splits disjoint, and its base is what toy/README.md says."""

import json

import numpy as np
import pytest
from conftest import ROOT

from bench.kills import tree
from hermesflow.files import InputError
from hermesflow.options import ImageSampling
from hermesflow.pictures import to_pil
from hermesflow.records import CAPTION_QUESTION
from hermesflow.sampling import TextRequest
from model import load
from toy import pretrain, world
from toy.alphabet import render


def test_splits_are_disjoint_and_complete():
    parts = {name: world.captions(name) for name in world.SPLITS}
    sets = [set(p) for p in parts.values()]
    assert sum(map(len, sets)) == len(set.union(*sets)) == len(world.CAPTIONS)
    assert {name: len(part) for name, part in parts.items()} == {
        "train": 4519, "preference": 2761, "validation": 639, "test": 1174}


def test_held_out_objects_are_unknown_in_every_arrangement():
    splits = {}
    for caption, spec in world.CAPTIONS.items():
        arrangement = (spec.kind, spec.number, frozenset(spec.types))
        splits.setdefault(arrangement, set()).add(world.split(caption))
    assert all(len(s) == 1 for s in splits.values())


def test_records_of_a_split_are_of_that_split(tmp_path):
    rows = world.records("test", 50, 3, tmp_path)
    assert len({r["caption"] for r in rows}) == 50
    assert all(world.split(r["caption"]) == "test" for r in rows)
    again = world.records("test", 50, 3, tmp_path / "again")
    assert rows == again
    image = rows[7]["image"]
    assert (tmp_path / image).read_bytes() == (tmp_path / "again" / image).read_bytes()
    lines = (tmp_path / "records.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == rows


def make_records(out, *options) -> None:
    world.main(world.parse_args(["--split", "test", "--n", "5", "--out", str(out), *options]))


def test_records_are_written_again_after_a_kill(tmp_path, monkeypatch):
    make_records(tmp_path / "whole")
    whole = tree(tmp_path / "whole")
    out = tmp_path / "killed"

    def kill(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(world, "write_text", kill)
        make_records(out)
    assert (out / "images").exists() and not (out / "records.jsonl").exists()
    make_records(out)
    assert tree(out) == whole
    # the same command writes the same bytes, and images that were removed
    (out / "images" / "test-0-00003.png").unlink()
    make_records(out)
    assert tree(out) == whole


@pytest.mark.parametrize("theirs", ["records.jsonl", "images/test-0-00003.png", "images/cat.png"])
def test_records_do_not_replace_other_files(tmp_path, theirs):
    file = tmp_path / theirs
    file.parent.mkdir(exist_ok=True)
    file.write_text("mine")
    for options in ((), ("--overwrite",)):
        with pytest.raises(InputError, match="no stage wrote it"):
            make_records(tmp_path, *options)
    assert list(tree(tmp_path)) == [theirs] and (tmp_path / theirs).read_bytes() == b"mine"


def test_records_of_other_settings_are_not_replaced(tmp_path):
    make_records(tmp_path)
    before = tree(tmp_path)
    for options in (("--n", "4"), ("--seed", "1"), ("--split", "train")):
        with pytest.raises(InputError, match="other settings"):
            make_records(tmp_path, *options)
    assert tree(tmp_path) == before
    (tmp_path / "notes.txt").write_text("mine")
    make_records(tmp_path, "--n", "4", "--overwrite")
    assert len(list((tmp_path / "images").iterdir())) == 4
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_sheet_replaces_nothing(tmp_path):
    sheet = tmp_path / "sheet.png"
    world.main(world.parse_args(["--sheet", str(sheet)]))
    before = sheet.read_bytes()
    with pytest.raises(InputError, match="is there already"):
        world.main(world.parse_args(["--sheet", str(sheet)]))
    assert sheet.read_bytes() == before


@pytest.mark.parametrize("module, options, what", [
    (world, ["--split", "test"], "--out"),
    (world, ["--out", "o"], "--split"),
    (world, ["--sheet", "s.png", "--out", "o"], "--sheet"),
    (pretrain, ["--keep", "10", "--steps", "9"], "--keep 10"),
])
def test_options_that_do_nothing_are_refused(module, options, what, capsys):
    with pytest.raises(SystemExit) as end:
        module.parse_args(options)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1 and what in error


def test_pretraining_replaces_no_other_files(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("mine")
    arguments = ["--tokenizer-steps", "1", "--steps", "1", "--out"]
    with pytest.raises(InputError, match="no stage wrote it"):
        pretrain.main(pretrain.parse_args([*arguments, str(tmp_path)]))
    assert list(tree(tmp_path)) == ["base/config.json"]
    assert (tmp_path / "base" / "config.json").read_bytes() == b"mine"


@pytest.mark.parametrize("backbone", ["showo", "janus"])
def test_pretraining_is_reproducible(backbone, tmp_path, monkeypatch):
    """What it has made loads, with the sizes of toy/README.md, and is not replaced."""
    monkeypatch.setattr(pretrain, "reconstruction", lambda model: (0, 0, 0))
    made = []
    for out in (tmp_path / "a", tmp_path / "b"):
        options = ["--backbone", backbone, "--tokenizer-steps", "2", "--steps", "2", "--out", str(out)]
        pretrain.main(pretrain.parse_args(options))
        made.append(tree(out / "base"))
    assert made[0] == made[1]
    with pytest.raises(InputError, match="other settings"):
        pretrain.main(pretrain.parse_args([*options, "--seed", "1"]))
    assert tree(out / "base") == made[1]
    model = load(tmp_path / "a" / "base")
    parameters = sum(p.numel() for p in model.net.parameters())
    assert round(parameters / 1e6, 2) == {"showo": 1.34, "janus": 1.62}[backbone]
    assert model.code_count == 256 and model.image_tokens == 16 and model.image_size == 64


def test_oracle_and_answers_are_exact_for_every_caption():
    rng = np.random.default_rng(0)
    for caption in world.captions():
        drawn = world.scene(caption, rng)
        grid = world.read(world.render(drawn))
        assert (grid == drawn).all(), caption
        assert all(world.judge(grid, caption).values()), caption
        for q in world.questions(caption):
            assert q["answer"] in q["choices"], (caption, q)
            assert world.answer(grid, q["question"]) == q["answer"], (caption, q)


def test_another_variant_asks_about_other_objects():
    caption = "a big red ring left of a small blue square"
    questions = world.questions(caption)
    others = [world.questions(caption, variant) for variant in range(20)]
    assert questions == world.questions(caption) and questions not in others
    grid = world.scene(caption, np.random.default_rng(0))
    for q in sum(others, []):
        assert world.answer(grid, q["question"]) == q["answer"]
    assert len({q["question"] for q in sum(others, []) if q["answer"] == "no"}) > 8


def test_the_middle_is_that_of_three_in_a_line():
    grid = np.full((4, 4), world.EMPTY)
    question = "what color is the shape in the middle?"
    for at, color, answer in (((1, 0), "red", "none"), ((1, 2), "blue", "none"),
                              ((1, 3), "black", "blue"), ((3, 3), "black", "none")):
        grid[at] = world.NAMES[f"big {color} ring"]
        assert world.answer(grid, question) == answer
    assert world.answer(np.full((4, 4), world.EMPTY), question) == "none"


TRIPLE = "a big red square left of a big red ring left of a big blue square"


@pytest.mark.parametrize("caption, other", [
    ("a big red ring", "a small red ring"),
    ("a big red ring", "a big blue ring"),
    ("a big red ring", "a big red cross"),
    ("three small green triangles", "two small green triangles"),
    ("a big red ring left of a small blue square", "a small blue square left of a big red ring"),
    ("a big red ring left of a small blue square", "a big red ring above a small blue square"),
    (TRIPLE, "a big red square left of a big red ring"),
    (TRIPLE, "a big red ring left of a big blue square left of a big red square"),
])
def test_oracle_sees_every_mistake(caption, other):
    rng = np.random.default_rng(1)
    verdict = world.judge(world.render(world.scene(other, rng)), caption)
    assert not verdict["correct"]


def test_oracle_rejects_what_is_nothing():
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    assert not world.judge(noise, "a big red ring")["correct"]
    empty = world.render(np.full((4, 4), world.EMPTY))
    assert not world.judge(empty, "a big red ring")["correct"]


@pytest.fixture(scope="module", params=["base", "base-janus"])
def base(request):
    return load(ROOT / "toy" / request.param)


@pytest.mark.parametrize("name", ["base", "base-janus"])
def test_base_is_small(name):
    files = [f for f in (ROOT / "toy" / name).rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) < 15e6
    assert not [f for f in files if f.suffix not in (".json", ".jinja", ".safetensors")]


def test_text_survives_the_tokenizer(base):
    tokens = base.tokens
    unknown = tokens.tokenizer.unk_token_id
    for caption in world.captions()[::7]:
        assert base.decode_text(tokens.encode(caption)) == caption
        for q in world.questions(caption):
            question = tokens.text_prompt(f"Question:{q['question']} Choice:{q['choices']}")
            assert unknown not in question + tokens.encode(q["answer"])


def test_image_tokenizer_is_exact(base):
    objects, cells, codes = pretrain.reconstruction(base, 128)
    assert objects >= 0.99
    assert cells >= 0.999
    assert codes >= 0.999


@pytest.mark.parametrize("base, drawn_right, guided_right", [
    ("base", (0.2, 0.5), (0.5, 0.85)),
    ("base-janus", (0.02, 0.2), (0.1, 0.35)),
], indirect=["base"])
def test_base_understands_better_than_it_draws(base, drawn_right, guided_right):
    """128 validation captions; measured on 300: toy/README.md."""
    rng = np.random.default_rng(0)
    captions = world.captions("validation")[::5]
    pixels = render([world.scene(c, rng) for c in captions])
    requests = [TextRequest(i, CAPTION_QUESTION) for i in range(len(captions))]
    texts = base.generate_text(pixels, requests, 24)
    read = np.mean([base.decode_text(t.ids) == c for t, c in zip(texts, captions)])

    def drew(guidance_scale: float) -> float:
        sampling = ImageSampling(steps=16, guidance_scale=guidance_scale)
        codes = base.generate_images(captions, list(range(len(captions))), sampling)
        pictures = to_pil(base.decode_image(codes))
        return np.mean([world.judge(p, c)["correct"] for p, c in zip(pictures, captions)])

    assert read > 0.9
    assert drawn_right[0] < drew(0) < drawn_right[1]
    assert guided_right[0] < drew(0.5) < guided_right[1]
