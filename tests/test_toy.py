"""The toy world is exact, its splits are disjoint, and the base model that ships with it is what the README says."""

import json

import numpy as np
import pytest
import torch

from conftest import ROOT
from model import CAPTION_QUESTION, Ask, Drawing, draw_images, load, to_pil, write_text
from toy import pretrain, world


def test_splits_are_disjoint_and_complete():
    parts = {name: world.captions(name) for name in world.SPLITS}
    sets = [set(p) for p in parts.values()]
    assert sum(map(len, sets)) == len(set.union(*sets)) == len(world.CAPTIONS)
    assert len(parts["eval"]) >= 600 and len(parts["preference"]) >= 900 and len(parts["train"]) >= 1500


def test_a_held_out_pair_is_unknown_in_every_arrangement():
    where = {}
    for caption, spec in world.CAPTIONS.items():
        where.setdefault((spec.kind, spec.number, frozenset(spec.types)), set()).add(world.split(caption))
    assert all(len(splits) == 1 for splits in where.values())


def test_records_of_a_split_are_of_that_split(tmp_path):
    rows = world.records("eval", 50, 3, tmp_path)
    assert len({r["caption"] for r in rows}) == 50
    assert all(world.split(r["caption"]) == "eval" for r in rows)
    again = world.records("eval", 50, 3, tmp_path / "again")
    assert rows == again
    assert (tmp_path / rows[7]["image"]).read_bytes() == (tmp_path / "again" / rows[7]["image"]).read_bytes()
    assert [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()] == rows


def test_oracle_and_answers_are_exact_for_every_caption():
    rng = np.random.default_rng(0)
    for caption in world.captions():
        image = world.render(world.scene(caption, rng))
        assert all(world.judge(image, caption).values()), caption
        for q in world.questions(caption):
            assert q["answer"] in q["choices"] and world.answer(image, q["question"]) == q["answer"], (caption, q)


@pytest.mark.parametrize("caption, other", [
    ("a big red ring", "a small red ring"), ("a big red ring", "a big blue ring"), ("a big red ring", "a big red cross"),
    ("three small green triangles", "two small green triangles"),
    ("a big red ring left of a small blue square", "a small blue square left of a big red ring"),
    ("a big red ring left of a small blue square", "a big red ring above a small blue square")])
def test_oracle_sees_every_mistake(caption, other):
    rng = np.random.default_rng(1)
    verdict = world.judge(world.render(world.scene(other, rng)), caption)
    assert not verdict["correct"]


def test_oracle_rejects_what_is_nothing():
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    assert not world.judge(noise, "a big red ring")["correct"]
    assert not world.judge(world.render(np.full((4, 4), world.EMPTY)), "a big red ring")["correct"]


@pytest.fixture(scope="module")
def base():
    return load(ROOT / "toy" / "base")


def test_base_is_small():
    files = [f for f in (ROOT / "toy" / "base").rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) < 15e6
    assert not [f for f in files if f.suffix not in (".json", ".safetensors")]


def test_text_survives_the_tokenizer(base):
    tokens = base[0].tokens
    unknown = tokens.tokenizer.unk_token_id
    for caption in world.captions()[::7]:
        assert tokens.decode(tokens.encode(caption)) == caption
        for q in world.questions(caption):
            asked = tokens.ask(f"Question:{q['question']} Choice:{q['choices']}")
            assert unknown not in asked + tokens.encode(q["answer"])


def test_image_tokenizer_is_exact(base):
    objects, cells, codes = pretrain.reconstruction(base[1], 128)
    assert objects >= 0.99 and cells >= 0.999 and codes >= 0.999


def test_base_understands_better_than_it_draws(base):
    """120 held-out captions. Measured on 600: captions right .96, drawings right .13 (toy/README.md)."""
    model, vq = base
    rng, captions = np.random.default_rng(0), world.captions("eval")[::5][:120]
    with torch.inference_mode():
        codes = vq.encode(pretrain.render([world.scene(c, rng) for c in captions]))
        written = write_text(model, codes, [Ask(i, model.tokens.ask(CAPTION_QUESTION)) for i in range(120)], 20)
        drawn = to_pil(vq.decode(draw_images(model, captions, list(range(120)), Drawing(10, 0.0))))
    read = np.mean([model.tokens.decode(w) == c for w, c in zip(written, captions)])
    drew = np.mean([world.judge(d, c)["correct"] for d, c in zip(drawn, captions)])
    assert read > 0.85 and 0.03 < drew < 0.35
