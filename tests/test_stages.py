"""The four stages in a row on a tiny random model.

Real photographs, the original's JSON, resuming, several processes, the command line.
"""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from bench.kills import torchrun, tree
from conftest import ROOT, main, results_of, stage
from evals import judges
from hermesflow import runs, tables
from hermesflow.files import InputError
from hermesflow.inputs import read_records
from hermesflow.jsonl import read_jsonl, write_jsonl
from hermesflow.pictures import to_pil
from hermesflow.records import Pair, Sample, Score
from hermesflow.scoring import answer_questions, nearest_text
from hermesflow.tables import tensors_of
from model import load, save
from tiny import WORDS, tiny_model

STAGES = ("01_sample", "02_score", "03_pair_dpo", "04_eval")
sample, score, dpo, evaluation = map(stage, STAGES)
SIZES = [(300, 200), (97, 211), (64, 64), (640, 480), (120, 80), (81, 80)]

INPUT = ("--records", "{w}/initial_data.json", "--questions", "{w}/vqa_data.json",
         "--model", "{w}/base")
SAMPLING = ("--captions", 4, "--max-new-tokens", 8, "--images", 4, "--steps", 4,
            "--guidance", 1.5, "--show", 2)
SCORING = ("--min-image-score", 0.3, "--max-new-tokens", 2)
TRAINING = ("--steps", 6, "--batch", 4, "--micro-batch", 2, "--lr", 1e-3, "--nll-gen", 0.1,
            "--device", "cpu", "--save-every", 2)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A checkpoint, and six photographs of different sizes.

    Their captions and questions are in the original's JSON format.
    """
    folder = tmp_path_factory.mktemp("stages")
    save(tiny_model(), folder / "base")
    rng = np.random.default_rng(0)
    records = []
    questions = []
    for i, size in enumerate(SIZES):
        small = Image.fromarray(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8))
        small.resize(size, Image.Resampling.BICUBIC).save(folder / f"{i}.jpg")
        record = {"id": 100 + i, "img_path": f"{i}.jpg", "prompt": f"a big red ring {i}",
                  "caption": " ".join(WORDS)}
        records.append(record)
        for word, answer in (("big", "left"), ("blue", "left"), ("red", "left left")):
            questions.append({**record, "element": word, "question": f"is it {word}?",
                              "choices": ["left", "left left", "give ring"], "answer": answer})
    (folder / "initial_data.json").write_text(json.dumps(records))
    (folder / "vqa_data.json").write_text(json.dumps(questions[::-1]))
    return folder


def input_of(world) -> list[str]:
    """INPUT in that folder."""
    return [a.format(w=world) for a in INPUT]


def sampling(world, out, *more):
    main(sample, *input_of(world), *SAMPLING, "--out", out, *more)


def scoring(world, samples, out, *more):
    main(score, "--model", world / "base", "--samples", samples, "--out", out, *SCORING, *more)


@pytest.fixture(scope="module")
def sampled(world):
    sampling(world, world / "samples")
    return world / "samples"


@pytest.fixture(scope="module")
def sampled_again(world):
    """By round 2."""
    sampling(world, world / "samples-round2", "--round", 2)
    return world / "samples-round2"


@pytest.fixture(scope="module")
def paired(world, sampled):
    scoring(world, sampled, world / "pairs")
    return world / "pairs"


@pytest.fixture(scope="module")
def trained(world, paired):
    main(dpo, "--model", world / "base", "--pairs", paired / "pairs.jsonl",
         "--out", world / "train", *TRAINING)
    return world / "train"


def files(folder, name: str) -> dict[str, str]:
    """name.jsonl and its shards."""
    table = re.compile(rf"{name}(\.jsonl|-\d+\.safetensors)")
    return {file: digest for file, digest in tree(folder).items() if table.fullmatch(file)}


def read_log(folder):
    return [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]


# ----------------------------------------------------------------------------------------------- 01


def test_samples_are_what_was_drawn(world, sampled):
    model = load(world / "base")
    samples = read_jsonl(sampled / "samples.jsonl", Sample)
    assert [s.id for s in samples] == [str(100 + i) for i in range(6)]
    assert [s.image for s in samples] == [str(world / f"{i}.jpg") for i in range(6)]
    for s in samples:
        tensors = tensors_of(s)
        assert sorted(tensors) == ["captions", "image", "images"]
        assert tensors["image"].shape == (16,)
        assert tensors["images"].shape == (4, 16)
        texts = []
        for row in tensors["captions"]:
            ids = row[row >= 0].tolist()  # -1 pads
            texts.append(model.decode_text(ids))
        assert texts == s.captions and len(texts) == len(s.ended) == 4
        lengths = [int((row >= 0).sum()) for row in tensors["captions"]]
        assert s.ended == [length < 8 for length in lengths]  # 8 is the limit
        assert len(s.questions) == 3
    picture = Image.open(sampled / "images" / "100" / "01.png")
    picture = np.asarray(picture, dtype=np.float32)  # (H, W, 3)
    pixels = model.decode_image(tensors_of(samples[0])["images"][1:2])[0]  # (3, H, W)
    pixels = pixels.clamp(-1, 1).permute(1, 2, 0).numpy()
    assert np.abs(picture - (pixels + 1) * 127.5).max() <= 0.51
    assert Image.open(sampled / "sheet.png").size[0] > 4 * 64
    assert not (sampled / "parts").exists()


@pytest.mark.parametrize("batch", [1, 5])
def test_samples_do_not_depend_on_the_batch(world, sampled, batch):
    out = world / f"samples-batch{batch}"
    sampling(world, out, "--batch", batch)
    assert files(out, "samples") == files(sampled, "samples")
    assert sorted(files(out, "samples")) == ["samples-00000.safetensors", "samples.jsonl"]


def test_interrupted_sampling_continues(world, sampled, monkeypatch):
    out = world / "samples-cut"
    calls = []
    real = sample.sample_images

    def cut(model, chunk, *settings):
        calls.append([r.id for r in chunk])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(model, chunk, *settings)

    monkeypatch.setattr(sample, "sample_images", cut)
    with pytest.raises(KeyboardInterrupt):
        sampling(world, out, "--batch", 2)
    sampling(world, out, "--batch", 2)
    # nothing twice but what was cut
    assert calls == [["100", "101"], ["102", "103"], ["104", "105"], ["104", "105"]]
    assert files(out, "samples") == files(sampled, "samples")


def test_shards_do_not_depend_on_the_batch(world, sampled, paired, monkeypatch):
    """Several files of a record or two each: the same records, and the same from there on."""
    monkeypatch.setattr(tables, "SHARD_BYTES", 256)
    made = []
    for batch in (1, 4):
        samples = world / f"samples-shards{batch}"
        pairs = world / f"pairs-shards{batch}"
        sampling(world, samples, "--batch", batch)
        scoring(world, samples, pairs, "--batch", batch)
        made.append({**files(samples, "samples"), **files(pairs, "pairs")})
    assert made[0] == made[1]
    assert {"samples-00005.safetensors", "pairs-00001.safetensors"} < made[0].keys()
    assert (pairs / "scores.jsonl").read_bytes() == (paired / "scores.jsonl").read_bytes()

    for folder, name, kind, whole in ((samples, "samples.jsonl", Sample, sampled),
                                      (pairs, "pairs.jsonl", Pair, paired)):
        for ours, theirs in zip(read_jsonl(folder / name, kind), read_jsonl(whole / name, kind),
                                strict=True):
            place = {"shard": "", "row": 0}
            assert replace(ours, **place) == replace(theirs, **place)  # and the digest is the same
            expected = tensors_of(theirs)
            tensors = tensors_of(ours)
            assert tensors.keys() == expected.keys()
            assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def test_other_rounds_and_seeds_give_other_samples(sampled, sampled_again):
    first = tensors_of(read_jsonl(sampled / "samples.jsonl", Sample)[0])
    second = tensors_of(read_jsonl(sampled_again / "samples.jsonl", Sample)[0])
    assert torch.equal(first["image"], second["image"])
    assert not torch.equal(first["images"], second["images"])


def run(*command) -> subprocess.CompletedProcess:
    """A command in the repository, one thread, to its successful end."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return done


def launch(processes: int, *arguments) -> subprocess.CompletedProcess:
    """Several processes, one thread each, to their end."""
    return run(*torchrun(processes, *arguments))


def test_processes_know_of_each_other(tmp_path):
    script = tmp_path / "show.py"
    script.write_text(f"""
import pathlib, sys
sys.path.insert(0, {str(ROOT)!r})
from hermesflow.runs import processes
state = processes()
name = f"{{state.process_index}}-of-{{state.num_processes}}"
pathlib.Path({str(tmp_path)!r}, name).touch()
""")
    launch(3, script)
    assert sorted(f.name for f in tmp_path.glob("*-of-*")) == ["0-of-3", "1-of-3", "2-of-3"]


@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_sample_and_score_the_same(world, sampled, paired, processes):
    samples = world / f"samples-{processes}-processes"
    pairs = world / f"pairs-{processes}-processes"
    done = launch(processes, "01_sample.py", *input_of(world), *SAMPLING,
                  "--out", samples, "--batch", 1)
    assert "sample: 100%" in done.stderr and " 6/6 " in done.stderr  # one bar for all
    assert files(samples, "samples") == files(sampled, "samples")
    launch(processes, "02_score.py", "--model", world / "base", "--samples", sampled,
           "--out", pairs, *SCORING)
    assert files(pairs, "pairs") == files(paired, "pairs")
    assert files(pairs, "scores") == files(paired, "scores")


def test_the_bar_counts_the_work_of_all_processes(tmp_path, monkeypatch, capsys):
    """The main process shows what all do, and not what an earlier run has done."""
    two = SimpleNamespace(process_index=0, num_processes=2, is_main_process=True,
                          wait_for_everyone=lambda: None)
    monkeypatch.setattr(runs, "processes", lambda: two)
    records = [SimpleNamespace(id=str(i)) for i in range(10)]
    chunks = []

    def work(chunk):
        chunks.append([r.id for r in chunk])
        return [{"id": r.id} for r in chunk]

    runs.map_records(work, records[:4], tmp_path, 1, "draw")
    assert chunks == [["0"], ["2"]] and " 4/4 " in capsys.readouterr().err
    runs.map_records(work, records, tmp_path, 3, "draw")  # 1 and 3 are still to do
    assert chunks[2:] == [["1", "4", "6"], ["8"]]
    printed = capsys.readouterr().err
    assert "draw: 100%" in printed and " 8/8 " in printed


def test_several_processes_train_the_same(world, paired):
    """One process, two, three, and two that share out the model (configs/fsdp.yaml); guided."""
    arguments = ("--model", world / "base", "--pairs", paired / "pairs.jsonl", "--steps", 4,
                 "--batch", 6, "--micro-batch", 1, "--lr", 1e-3, "--nll-gen", 0.1,
                 "--guidance", 1.5, "--device", "cpu", "--save-every", 2, "--out")
    main(dpo, *arguments, world / "train-1")
    for n in (2, 3):
        launch(n, "03_pair_dpo.py", *arguments, world / f"train-{n}")
    launch(2, "tests/fsdp_on_cpu.py", "03_pair_dpo.py", *arguments, world / "train-fsdp")
    base = load_file(world / "base" / "pytorch_model.safetensors")

    def change(name):
        after = load_file(world / name / "checkpoint" / "pytorch_model.safetensors")
        return torch.cat([(after[k] - base[k]).flatten() for k in base])

    alone = change("train-1")
    log = read_log(world / "train-1")
    for name in ("train-2", "train-3", "train-fsdp"):
        for line, expected in zip(read_log(world / name), log, strict=True):
            assert line == pytest.approx(expected, rel=1e-4, abs=1e-5)
        # AdamW's first steps are signs: parameters without a gradient follow rounding, the others
        # must agree
        assert (change(name) - alone).norm() < 0.02 * alone.norm()


def test_try_by_eye(world, capsys):
    main(sample, "--model", world / "base", "--prompt", "a big red ring", "--images", 2,
         "--steps", 2, "--out", world / "try")
    main(sample, "--model", world / "base", "--image", world / "1.jpg", "--captions", 3,
         "--max-new-tokens", 3)
    assert Image.open(world / "try" / "prompt.png").size[0] > 2 * 160
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("top-k")]) == 3


# ----------------------------------------------------------------------------------------------- 02


def test_pairs_are_the_best_and_the_worst(sampled, paired):
    samples = {s.id: s for s in read_jsonl(sampled / "samples.jsonl", Sample)}
    scores = {s.id: s for s in read_jsonl(paired / "scores.jsonl", Score)}
    pairs = {p.id: p for p in read_jsonl(paired / "pairs.jsonl", Pair)}
    assert len(scores) == 6 and len(pairs) >= 2
    assert set(pairs) == {i for i, s in scores.items() if not s.dropped}
    for p in pairs.values():
        s = scores[p.id]
        assert p.win_image_score == max(s.image_scores) > p.lose_image_score == min(s.image_scores)
        assert p.win_caption_score == max(s.caption_scores)
        assert p.lose_caption_score == min(s.caption_scores) < p.win_caption_score
        drawn = tensors_of(samples[p.id])
        tokens = tensors_of(p)
        images = drawn["images"]  # (K, N)
        best = int(np.argmax(s.image_scores))
        worst = int(np.argmin(s.image_scores))
        assert torch.equal(tokens["image"], drawn["image"])
        assert torch.equal(tokens["win_image"], images[best])
        assert torch.equal(tokens["lose_image"], images[worst])
        for name, k in (("win_caption", int(np.argmax(s.caption_scores))),
                        ("lose_caption", int(np.argmin(s.caption_scores)))):
            ids = drawn["captions"][k]
            assert torch.equal(tokens[name], ids[ids >= 0])
            assert getattr(p, name) == samples[p.id].captions[k]
        for wrong, k in ((p.win_image_wrong, best), (p.lose_image_wrong, worst)):
            asked = zip(s.questions, s.matched[k])
            assert wrong == "\n".join(q.question for q, meant in asked if meant != q.answer)
        assert p.win_ended == samples[p.id].ended[int(np.argmax(s.caption_scores))]
        assert p.lose_ended == samples[p.id].ended[int(np.argmin(s.caption_scores))]
    for s in scores.values():
        shares = []
        for answers, matched in zip(s.answers, s.matched, strict=True):
            assert matched == [nearest_text(a, q.choices) for a, q in zip(answers, s.questions)]
            shares.append(np.mean([m == q.answer for m, q in zip(matched, s.questions)]))
        assert s.image_scores == shares


def test_reencoded_scores(world, sampled):
    """--reencode judges the decoded picture: codes that are decoded and encoded by hand."""
    with pytest.raises(InputError, match="no pairs to train on"):  # all are equally wrong
        scoring(world, sampled, world / "seen", "--reencode")
    model = load(world / "base")
    samples = read_jsonl(sampled / "samples.jsonl", Sample)
    scores = read_jsonl(world / "seen" / "scores.jsonl", Score)
    for drawn, s in zip(samples, scores, strict=True):
        pictures = to_pil(model.decode_image(tensors_of(drawn)["images"]))
        pixels = torch.stack([torch.from_numpy(np.array(p)) for p in pictures])  # (K, H, W, 3)
        pixels = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
        codes = model.encode_image(pixels)
        answers = answer_questions(model, codes, [s.questions] * 4, 2)
        assert answers == s.answers


def test_second_round_meets_the_first(world, sampled_again, paired):
    scoring(world, sampled_again, world / "pairs2", "--previous", paired / "pairs.jsonl")
    before = {p.id: p for p in read_jsonl(paired / "pairs.jsonl", Pair)}
    after = read_jsonl(world / "pairs2" / "pairs.jsonl", Pair)
    assert any(p.id in before for p in after)
    for p in after:
        if old := before.get(p.id):
            tokens = tensors_of(p)
            old_tokens = tensors_of(old)
            for kind in ("caption", "image"):
                beaten = getattr(p, f"win_{kind}_score") > getattr(old, f"win_{kind}_score")
                opponent = f"win_{kind}" if beaten else f"lose_{kind}"
                assert torch.equal(tokens[f"lose_{kind}"], old_tokens[opponent])
            assert torch.equal(tokens["image"], old_tokens["image"])  # the record's own


# ---------------------------------------------------------------- made again from what is there


def no_work(*_):
    raise AssertionError("nothing is to be sampled or scored again")


def with_records(world, folder, count: int, change=lambda records: records):
    """The first records of the world in folder/records.jsonl."""
    original = (world / "initial_data.json", world / "vqa_data.json")
    records = list(read_records(*original))[:count]
    write_jsonl(folder / "records.jsonl", change(records))
    return ("--records", folder / "records.jsonl", "--model", world / "base", *SAMPLING,
            "--batch", 2, "--out", folder / "samples")


@pytest.mark.parametrize("shard_bytes", [None, 2 * 4 * (16 + 4 * 16)], ids=["one shard", "shards"])
@pytest.mark.parametrize("finished", [True, False], ids=["finished", "cut"])
def test_growing_equals_all_at_once(world, tmp_path, monkeypatch, capsys, finished, shard_bytes):
    """Four records and then six are six records, byte for byte, and none is done twice."""
    if shard_bytes:
        monkeypatch.setattr(tables, "SHARD_BYTES", shard_bytes)
    whole = tmp_path / "whole"
    main(sample, *with_records(world, whole, 6))
    scoring(world, whole / "samples", whole / "pairs")

    drawn = []
    scored = []
    real_draw = sample.sample_images
    real_score = score.score_records

    def draw(model, chunk, *settings):
        drawn.extend(r.id for r in chunk)
        if len(drawn) == 4 and not finished:
            raise KeyboardInterrupt
        return real_draw(model, chunk, *settings)

    def score_records(model, chunk, *settings):
        scored.extend(s.id for s in chunk)
        if len(scored) == 4 and not finished:
            raise KeyboardInterrupt
        return real_score(model, chunk, *settings)

    monkeypatch.setattr(sample, "sample_images", draw)
    monkeypatch.setattr(score, "score_records", score_records)
    grown = tmp_path / "grown"
    stopped = pytest.raises(KeyboardInterrupt) if not finished else nullcontext()
    with stopped:
        main(sample, *with_records(world, grown, 4))
    samples = grown / "samples"
    first = with_records(world, grown, 6)
    main(sample, *first)
    if finished:
        assert drawn == ["100", "101", "102", "103", "104", "105"]
        assert f"{samples}: made again from its results: records: 4 -> 6" in capsys.readouterr().out
    else:
        assert drawn == ["100", "101", "102", "103", "102", "103", "104", "105"]
    assert results_of(samples) == results_of(whole / "samples")

    # the samples of four, and then those of six
    part = grown / "part"
    shutil.copytree(samples, part)
    lines = (part / "samples.jsonl").read_bytes().splitlines(keepends=True)
    (part / "samples.jsonl").write_bytes(b"".join(lines[:4]))
    with stopped:
        scoring(world, part, grown / "pairs")
    (part / "samples.jsonl").write_bytes(b"".join(lines))
    capsys.readouterr()
    scoring(world, part, grown / "pairs")
    if finished:
        assert scored == ["100", "101", "102", "103", "104", "105"]
        assert "pairs: made again from its results: samples: 4 -> 6" in capsys.readouterr().out
    else:
        assert scored == ["100", "101", "102", "103", "103", "104", "105"]
    assert results_of(grown / "pairs") == results_of(whole / "pairs")

    # and then nothing is left to do
    monkeypatch.setattr(sample, "sample_images", no_work)
    monkeypatch.setattr(score, "score_records", no_work)
    capsys.readouterr()
    main(sample, *first)
    scoring(world, part, grown / "pairs")
    complete = (samples / "samples.jsonl", grown / "pairs" / "pairs.jsonl")
    assert capsys.readouterr().out.splitlines() == [f"{file} is complete" for file in complete]


def test_growing_with_a_record_that_is_skipped(world, tmp_path):
    def without_image(records):
        records[1] = replace(records[1], image=str(tmp_path / "missing.png"))
        return records

    main(sample, *with_records(world, tmp_path / "whole", 6, without_image))
    for count in (3, 6):
        main(sample, *with_records(world, tmp_path / "grown", count, without_image))
    whole = tmp_path / "whole" / "samples"
    assert results_of(tmp_path / "grown" / "samples") == results_of(whole)
    skipped = (whole / "skipped.txt").read_text()
    assert "missing.png" in skipped and skipped.count("\n") == 1
    samples = read_jsonl(whole / "samples.jsonl", Sample)
    assert samples.ids == ["100", "102", "103", "104", "105"]


def caption_of_first(records):
    return [replace(records[0], caption="blue"), *records[1:]]


def prompt_of_last(records):
    return [*records[:-1], replace(records[-1], prompt="blue")]


def question_of_first(records):
    asked = [replace(records[0].questions[0], answer="give ring"), *records[0].questions[1:]]
    return [replace(records[0], questions=asked), *records[1:]]


def image_of_first(records):
    return [replace(records[0], image=records[1].image), *records[1:]]


@pytest.mark.parametrize("count, change", [
    (6, caption_of_first), (4, caption_of_first), (4, prompt_of_last), (6, question_of_first),
    (6, image_of_first), (3, list), (6, lambda records: records[::-1]),
    (6, lambda records: records[1:]), (4, lambda records: [records[1], records[0], *records[2:]])])
def test_other_records_are_refused(world, tmp_path, four, count, change):
    """What was made of four records goes on with more behind them, and with no others."""
    folder, before, pairs_before = four
    with pytest.raises(InputError) as refused:
        main(sample, *with_records(world, folder, count, change))
    assert str(refused.value).startswith(
        f"{folder / 'samples'}: made with other settings (content of --records)")
    assert results_of(folder / "samples") == before
    samples = folder / "samples" / "samples.jsonl"
    good = samples.read_bytes()
    lines = good.splitlines(keepends=True)
    other = [lines[0].replace(b"user assistant", b"assistant user"), *lines[1:]]
    try:
        for text in (other, lines[:3], lines[::-1]):
            samples.write_bytes(b"".join(text))
            with pytest.raises(InputError, match=r"other settings \(content of --samples\)"):
                scoring(world, folder / "samples", folder / "pairs")
            assert results_of(folder / "pairs") == pairs_before
    finally:
        samples.write_bytes(good)


@pytest.fixture(scope="module")
def four(world):
    """A folder with samples and pairs of four records, and what is in them."""
    folder = world / "four"
    main(sample, *with_records(world, folder, 4))
    scoring(world, folder / "samples", folder / "pairs")
    return folder, results_of(folder / "samples"), results_of(folder / "pairs")


def test_more_pictures_are_made_of_the_same_samples(world, tmp_path, monkeypatch, capsys):
    arguments = with_records(world, tmp_path, 6)
    main(sample, *arguments)
    scoring(world, tmp_path / "samples", tmp_path / "pairs", "--show", 1)
    samples = results_of(tmp_path / "samples")
    pairs = results_of(tmp_path / "pairs")
    pictures = {f"images/{100 + i}/{k:02d}.png" for i in range(2) for k in range(4)}
    assert samples.keys() - files(tmp_path / "samples", "samples") == pictures | {"sheet.png"}

    for name in ("sample_captions", "sample_images"):
        monkeypatch.setattr(sample, name, no_work)
    monkeypatch.setattr(score, "score_records", no_work)
    main(sample, *arguments, "--show", 3)
    assert f"{tmp_path / 'samples'}: made again from its results: show" in capsys.readouterr().out
    more = results_of(tmp_path / "samples")
    assert more.keys() - samples.keys() == {f"images/102/{k:02d}.png" for k in range(4)}
    assert {name for name in samples if more[name] != samples[name]} == {"sheet.png"}

    scoring(world, tmp_path / "samples", tmp_path / "pairs", "--show", 2)
    more = results_of(tmp_path / "pairs")
    second = [p.id for p in read_jsonl(tmp_path / "pairs" / "pairs.jsonl", Pair)][1]
    assert more.keys() - pairs.keys() == {f"images/{second}-{n}.png"
                                          for n in ("real", "win", "lose")}
    assert {name for name in pairs if more[name] != pairs[name]} == {"pairs.png"}


def test_pairs_are_made_again_without_scoring(world, sampled, paired, tmp_path, monkeypatch):
    """--min-image-score and --previous choose among scores that are there."""
    second = world / "samples-again"
    sampling(world, second, "--round", 2)
    choices = {
        "higher": ("--min-image-score", 0.5),
        "previous": ("--previous", paired / "pairs.jsonl"),
        "both": ("--min-image-score", 0.5, "--previous", paired / "pairs.jsonl"),
        "first": (),
    }
    expected = {}
    for name, options in choices.items():
        scoring(world, second, tmp_path / name, *options)
        expected[name] = results_of(tmp_path / name)
    assert len({e["pairs.jsonl"] for e in expected.values()}) == len(choices)
    monkeypatch.setattr(score, "score_records", no_work)
    for name in [*choices, "higher"]:
        scoring(world, second, tmp_path / "first", *choices[name])
        made = results_of(tmp_path / "first")
        for file in ("scores.jsonl", "pairs.jsonl", "pairs-00000.safetensors", "pairs.png"):
            assert made[file] == expected[name][file], (name, file)


def test_pictures_of_pairs_are_of_these_pairs(world, sampled, paired, tmp_path):
    """Made again with other pairs and fewer pictures: none shows what a pair was before."""
    out = tmp_path / "pairs"
    sampling(world, tmp_path / "samples", "--round", 2)
    scoring(world, tmp_path / "samples", out)
    scoring(world, tmp_path / "samples", out, "--previous", paired / "pairs.jsonl", "--show", 1)
    pairs = {p.id: p for p in read_jsonl(out / "pairs.jsonl", Pair)}
    model = load(world / "base")
    assert list(out.glob("images/*-lose.png"))
    for file in out.glob("images/*-lose.png"):
        codes = tensors_of(pairs[file.stem.removesuffix("-lose")])["lose_image"]
        shown = to_pil(model.decode_image(codes[None]))[0]
        assert np.array_equal(np.asarray(Image.open(file)), np.asarray(shown))


def test_no_pairs_and_then_some(world, sampled, tmp_path, monkeypatch):
    """Scores outlive a bar that no record reaches."""
    with pytest.raises(InputError, match="no pairs to train on"):
        scoring(world, sampled, tmp_path / "pairs", "--min-image-score", 1)
    assert not (tmp_path / "pairs" / "pairs.jsonl").exists()
    monkeypatch.setattr(score, "score_records", no_work)
    scoring(world, sampled, tmp_path / "pairs")
    ids = [s.id for s in read_jsonl(tmp_path / "pairs" / "scores.jsonl", Score) if not s.dropped]
    assert [p.id for p in read_jsonl(tmp_path / "pairs" / "pairs.jsonl", Pair)] == ids != []
    with pytest.raises(InputError, match="no pairs to train on"):
        scoring(world, sampled, tmp_path / "pairs", "--min-image-score", 1)
    with pytest.raises(InputError, match="no pairs to train on"):  # and does not seem complete
        scoring(world, sampled, tmp_path / "pairs", "--min-image-score", 1)


@pytest.mark.parametrize("bad", ["words", "codes"])
def test_a_model_whose_logits_are_nan(world, sampled, paired, monkeypatch, bad):
    """Each stage ends in the same line, as often as it is run; a sound model goes on."""
    model = load(world / "base")
    tokens = model.tokens
    head = model.net.showo.lm_head.weight
    with torch.no_grad():
        head[tokens.first_code + 1 if bad == "codes" else 3, 0] = torch.nan
    runs = {sample: (world / f"samples-nan-{bad}", lambda out: sampling(world, out)),
            score: (world / f"pairs-nan-{bad}", lambda out: scoring(world, sampled, out))}
    real = {module: module.load_from for module in runs}
    for module, (out, run_stage) in runs.items():
        monkeypatch.setattr(module, "load_from", lambda args: model)
        messages = []
        for _ in range(2):
            with pytest.raises(InputError) as ended:
                run_stage(out)
            messages.append(str(ended.value))
        assert messages[0] == messages[1] and "\n" not in messages[0]
        assert "the model gives NaN or infinite logits" in messages[0]
        assert [p.name for p in (out / "parts").rglob("*.log") if p.stat().st_size] == []
        assert not list(out.glob("*.jsonl"))
        monkeypatch.setattr(module, "load_from", real[module])
        run_stage(out)
    assert files(runs[sample][0], "samples") == files(sampled, "samples")
    assert files(runs[score][0], "pairs") == files(paired, "pairs")


def test_moved_outputs_are_read_from_where_they_are(world, sampled, tmp_path):
    """The whole tree is moved between the stages: no path in it is absolute."""
    before = tmp_path / "before"
    before.mkdir()
    for name in ("initial_data.json", "vqa_data.json", *(f"{i}.jpg" for i in range(6))):
        shutil.copy(world / name, before / name)
    shutil.copytree(world / "base", before / "base")
    sampling(before, before / "runs" / "samples")
    assert str(tmp_path) not in (before / "runs" / "samples" / "samples.jsonl").read_text()
    after = tmp_path / "after"
    before.rename(after)
    samples = read_jsonl(after / "runs" / "samples" / "samples.jsonl", Sample)
    assert [s.image for s in samples] == [str(after / f"{i}.jpg") for i in range(6)]
    scoring(after, after / "runs" / "samples", after / "runs" / "pairs")
    text = (after / "runs" / "pairs" / "pairs.jsonl").read_text()
    assert str(tmp_path) not in text
    pairs = read_jsonl(after / "runs" / "pairs" / "pairs.jsonl", Pair)
    assert all(p.image == str(after / f"{int(p.id) - 100}.jpg") for p in pairs)
    sampling(after, after / "runs" / "samples")  # nothing is left to do: the same content


# ----------------------------------------------------------------------------------------------- 03


def test_training_starts_at_two_log_two_and_learns(trained):
    log = read_log(trained)
    first = log[0]
    last = log[-1]
    assert [line["step"] for line in log] == list(range(6))
    assert first["loss_und"] + first["loss_gen"] == pytest.approx(2 * math.log(2), abs=1e-6)
    assert last["loss_und"] + last["loss_gen"] < 2 * math.log(2) - 0.1
    assert last["margin_und"] > 0
    assert last["lose_change_und"] < last["win_change_und"]
    # one mask for both
    assert all(line["win_length_gen"] == line["lose_length_gen"] for line in log)


def test_interrupted_training_continues_exactly(world, paired, trained, monkeypatch):
    out = world / "train-cut"
    real = dpo.pair_dpo
    calls = []

    def cut(*logps, **weights):
        calls.append(1)
        if len(calls) == 10:  # in step 4, two micro-batches each
            raise KeyboardInterrupt
        return real(*logps, **weights)

    arguments = ("--model", world / "base", "--pairs", paired / "pairs.jsonl", "--out", out,
                 *TRAINING)
    monkeypatch.setattr(dpo, "pair_dpo", cut)
    with pytest.raises(KeyboardInterrupt):
        main(dpo, *arguments)
    main(dpo, *arguments)
    assert len(calls) == 10 + 2 * 2  # steps 0–3 were not done again
    assert (out / "train.jsonl").read_text() == (trained / "train.jsonl").read_text()
    weights = load_file(out / "checkpoint" / "pytorch_model.safetensors")
    expected = load_file(trained / "checkpoint" / "pytorch_model.safetensors")
    assert all(torch.equal(weights[k], expected[k]) for k in weights)
    assert not (out / "state").exists()


def test_the_loss_is_the_mean_over_records(world, paired):
    """Two micro-batches of one step give the loss and the gradient of one batch."""
    logs = []
    for micro in (1, 4):
        out = world / f"train-micro{micro}"
        main(dpo, "--model", world / "base", "--pairs", paired / "pairs.jsonl", "--out", out,
             "--steps", 2, "--batch", 4, "--micro-batch", micro, "--lr", 1e-3, "--warmup", 0,
             "--device", "cpu")
        logs.append(read_log(out))
    for one, four in zip(*logs, strict=True):
        assert one == pytest.approx(four, rel=1e-3, abs=1e-4)


def test_another_reference(world, paired, trained):
    """--reference: log-probs are taken from that model, and the policy starts away from it."""
    out = world / "train-other"
    main(dpo, "--model", trained / "checkpoint", "--reference", world / "base",
         "--pairs", paired / "pairs.jsonl", "--out", out, *TRAINING)
    assert read_log(out)[0]["loss_und"] < math.log(2) - 0.05
    logps = load_file(out / "reference.safetensors")["logps"]
    base = load_file(trained / "reference.safetensors")["logps"]
    assert base.shape == (6 * 4, 2, 2)  # visits, halves, win and lose
    torch.testing.assert_close(logps, base, rtol=1e-4, atol=1e-4)


def test_training_on_guided_logprobs(world, paired, trained):
    """The image half changes, the captions' does not.

    A dropped text leaves nothing to guide towards.
    """
    model = load(world / "base")
    visits = [dpo.Visit(pair, 0) for pair in read_jsonl(paired / "pairs.jsonl", Pair)]

    @torch.no_grad()
    def halves(guidance_scale, cond_dropout):
        batch = dpo.make_batch(model, visits, (0, 1), cond_dropout, guidance_scale)
        und, gen = model.pair_logps(*batch)
        return und.sums, gen.sums  # (B, 2) each

    und, gen = halves(0, 0)
    und_guided, gen_guided = halves(2, 0)
    assert torch.equal(und, und_guided)
    assert (gen - gen_guided).abs().min() > 0.01
    torch.testing.assert_close(halves(1, 1)[1], halves(3, 1)[1], rtol=1e-4, atol=1e-4)
    out = world / "train-guided"
    main(dpo, "--model", world / "base", "--pairs", paired / "pairs.jsonl", "--out", out,
         "--guidance", 1.5, *TRAINING)
    assert read_log(out)[0]["loss_gen"] == pytest.approx(math.log(2), abs=1e-6)
    assert read_log(out)[-1]["loss_gen"] < math.log(2) - 0.05


def test_masks_and_drops_are_shared_and_seeded(world, paired):
    model = load(world / "base")
    tokens = model.tokens
    pairs = read_jsonl(paired / "pairs.jsonl", Pair)

    def segments(epoch):
        """Ids of the text, the winning and the losing image, as the network sees them."""
        _, images = dpo.make_batch(model, [dpo.Visit(pairs[0], epoch)], (0, 1), 0.5, 0.0)
        packed = model.pack_images(images)
        return [packed.ids[packed.segments == s].tolist() for s in range(3)]

    dropped = 0
    for epoch in range(20):
        text, win, lose = segments(epoch)
        assert [i == tokens.mask for i in win] == [i == tokens.mask for i in lose]
        assert tokens.mask in win
        assert segments(epoch) == [text, win, lose]
        dropped += text == tokens.t2i_prompt("")
    assert 3 < dropped < 17

    # a mask, and what it leaves out
    _, images = dpo.make_batch(model, [dpo.Visit(pairs[0], 0)], (0, 1), 0.5, 0.0, True)
    packed = model.pack_images(images)
    win, lose, win_rest, lose_rest = (
        packed.ids[packed.segments == s].eq(tokens.mask).tolist() for s in range(1, 5))
    assert win == lose == [i == tokens.mask for i in segments(0)[1]]
    assert win_rest == lose_rest
    assert sum(win) + sum(win_rest) == 16 and not any(a and b for a, b in zip(win, win_rest))
    order = dpo.training_order(pairs, 5, 3, 0)  # (visits, 2): pair, epoch
    assert len(order) == 15
    for epoch in range(15 // len(pairs)):
        assert sorted(i for i, e in order.tolist() if e == epoch) == list(range(len(pairs)))


@pytest.mark.filterwarnings("error")
def test_checkpointing_activations_warns_of_nothing():
    net = tiny_model().net
    for on in (True, False):
        net.checkpoint_activations(on)
        assert net.showo.model.layers[0].gradient_checkpointing == on


# ----------------------------------------------------------------------------------------------- 04


def test_evaluation(world, trained, monkeypatch):
    """Understanding is the model's, generation the judge's: here, one that always answers left."""

    class Left:
        def __init__(self, *_):
            pass

        def answer(self, picture, questions):
            assert picture.size == (64, 64)
            return ["left"] * len(questions)

        def meanings(self, answers, questions):
            return answers

        def all_correct(self, picture, record, correct):
            return all(correct)

    monkeypatch.setattr(judges, "ModelJudge", Left)
    judge = world / "judge"
    judge.mkdir()
    (judge / "config.json").write_text("{}")
    common = (*input_of(world)[:4], "--judge", judge, "--steps", 3, "--guidance", 0, "--show", 3)
    out = world / "eval"
    for name, policy in (("base", world / "base"), ("round1", trained / "checkpoint")):
        main(evaluation, *common, "--model", policy, "--out", out / name)
    metrics = json.loads((out / "base" / "metrics.json").read_text())
    expected = {"mean": 2 / 3, "low": 2 / 3, "high": 2 / 3}
    assert metrics["generation"] == pytest.approx(expected)
    assert metrics["everything right"]["mean"] == 0 and metrics["records"] == 6
    assert metrics["gap"]["mean"] == pytest.approx(metrics["understanding"]["mean"] - 2 / 3)
    main(evaluation, "--compare", out / "base", out / "round1", "--out", out)
    text = (out / "table.md").read_text()
    assert text.startswith("6 records")
    assert text.count("\n| base |") == 1 and text.count("\n| round1 |") == 2
    assert Image.open(out / "comparison.png").size[0] > 3 * 3 * 96


# ------------------------------------------------------------------------------------- command line


@pytest.mark.parametrize("script", [*(f"{name}.py" for name in STAGES), "toy/world.py"])
def test_help_imports_nothing_heavy(script):
    """So that it answers at once."""
    done = run(sys.executable, "-c", f"""
import runpy, sys
sys.argv = [{script!r}, "--help"]
try:
    runpy.run_path({script!r}, run_name="__main__")
except SystemExit as end:
    assert end.code == 0
    heavy = [name for name in ("torch", "transformers", "accelerate") if name in sys.modules]
    sys.exit(f"imported: {{heavy}}" if heavy else 0)
sys.exit("did not end at --help")
""")
    assert done.stdout.startswith("usage:")


def test_all_stages_from_the_command_line(world, tmp_path):
    """Each says first what it is about to do, and prints its progress and no warning besides."""
    base = world / "base"
    samples = tmp_path / "samples"
    pairs = tmp_path / "pairs"
    records = world / "initial_data.json"
    bars = ("sample", "score", "reference", "Pair-DPO", "evaluate")

    def first_line(*command) -> str:
        done = run(sys.executable, *command, "--device", "cpu")
        for line in done.stderr.replace("\r", "\n").split("\n"):
            assert line.strip().partition(":")[0] in ("", *bars), done.stderr
        return done.stdout.split("\n")[0]

    line = first_line("01_sample.py", *input_of(world), *SAMPLING, "--out", samples)
    assert line == f"round 1: sampling 6 records with {base}"
    line = first_line("02_score.py", "--model", base, "--samples", samples, "--out", pairs,
                      *SCORING)
    assert line == f"scoring 6 records of {samples} with {base}"
    count = len(read_jsonl(pairs / "pairs.jsonl", Pair))
    line = first_line("03_pair_dpo.py", "--model", base, "--pairs", pairs / "pairs.jsonl",
                      "--round", 2, "--out", tmp_path / "train", *TRAINING)
    assert line == f"round 2: training {base} on {count} pairs, 6 steps of 4 records"
    policy = tmp_path / "train" / "checkpoint"
    line = first_line("04_eval.py", *input_of(world)[:4], "--model", policy, "--judge", "self",
                      "--steps", 2, "--max-new-tokens", 2, "--out", tmp_path / "eval")
    assert line == f"evaluating {policy} on 6 records of {records}, judge self"


# ------------------------------------------------------------------------------------------ configs

# what run_selfplay.sh adds
REQUIRED = {
    "SAMPLE": (sample, "--records", "r.jsonl", "--out", "o"),
    "SCORE": (score, "--samples", "s", "--out", "o"),
    "DPO": (dpo, "--pairs", "p.jsonl", "--out", "o"),
    "EVAL": (evaluation, "--records", "r.jsonl", "--out", "o"),
}


def settings(config: str, array: str, override: str | None = None) -> dict:
    """A stage's options as a config sets them, with what the environment says in its variable."""
    # records that are given are not made
    environment = {**os.environ, "TRAIN": "train.jsonl", "HELD_OUT": "held_out.jsonl"}
    environment.pop(array, None)
    if override:
        environment[array] = override
    script = f'set -eu; source {config}; printf "%s\\0" "${{{array}[@]}}"'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=ROOT,
                          env=environment)
    assert done.returncode == 0 and not done.stderr, done.stderr
    module, *required = REQUIRED[array]
    return vars(module.parse_args([*required, *done.stdout.split("\0")[:-1]]))


@pytest.mark.parametrize("config", ["configs/toy.sh", "configs/showo.sh", "configs/janus.sh"])
@pytest.mark.parametrize("array, override, changed", [
    ("SAMPLE", "--images 3", {"images": 3}),
    ("SCORE", "--min-image-score 0.5 --batch 2", {"min_image_score": 0.5, "batch": 2}),
    ("DPO", "--beta 0.1", {"beta": 0.1}),
    ("EVAL", "--steps 3 --seed 7", {"steps": 3, "seed": 7}),
])
def test_overriding_one_setting_keeps_the_others(config, array, override, changed):
    assert settings(config, array, override) == settings(config, array) | changed


def test_what_the_configs_set():
    toy = settings("configs/toy.sh", "SAMPLE")
    assert [toy[k] for k in ("captions", "images", "steps", "guidance")] == [4, 4, 16, 0.25]
    assert toy["caption_settings"] == [(0, 2.0)]
    paper = settings("configs/showo.sh", "SAMPLE")
    assert [paper[k] for k in ("captions", "images", "steps", "guidance")] == [10, 16, 50, 5]
    paper = settings("configs/showo.sh", "DPO")
    assert [paper[k] for k in ("beta", "lr", "steps", "batch")] == [0.2, 2e-5, 3000, 32]
