"""The four stages in a row on a tiny random model: real photographs, the original's JSON, resuming, several processes."""

import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from conftest import ROOT, stage, torchrun
from model import Pair, load, read_jsonl, save
from tiny import WORDS, tiny_model

sample, score, dpo, evaluation = (stage(n) for n in ("01_sample", "02_score", "03_pair_dpo", "04_eval"))
SIZES = [(300, 200), (97, 211), (64, 64), (640, 480), (120, 80), (81, 80)]


def main(module, *arguments):
    """Run a stage's main() as the command line would."""
    before, sys.argv = sys.argv, [module.__name__, *map(str, arguments)]
    try:
        module.main()
    finally:
        sys.argv = before


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A checkpoint, and six photographs of different sizes with captions and questions in the original's JSON format."""
    folder = tmp_path_factory.mktemp("stages")
    save(*tiny_model(), folder / "base")
    rng = np.random.default_rng(0)
    records, questions = [], []
    for i, (width, height) in enumerate(SIZES):
        small = Image.fromarray(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8))
        small.resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg")
        record = {"id": 100 + i, "img_path": f"{i}.jpg", "prompt": f"a big red ring {i}", "caption": " ".join(WORDS)}
        records.append(record)
        for word, answer in (("big", "left"), ("blue", "left"), ("red", "left left")):
            questions.append({**record, "element": word, "question": f"is it {word}?",
                              "choices": ["left", "left left", "give ring"], "answer": answer})
    (folder / "initial_data.json").write_text(json.dumps(records))
    (folder / "vqa_data.json").write_text(json.dumps(questions[::-1]))
    return folder


INPUT = ("--records", "{w}/initial_data.json", "--questions", "{w}/vqa_data.json", "--model", "{w}/base")
SCORING = ("--min-image-score", 0.3, "--max-new-tokens", 2)
SAMPLING = ("--captions", 4, "--max-new-tokens", 8, "--images", 4, "--steps", 4, "--guidance", 1.5, "--show", 2)


def sampling(world, out, *more):
    main(sample, *(a.format(w=world) for a in INPUT), *SAMPLING, "--out", out, *more)


@pytest.fixture(scope="module")
def sampled(world):
    sampling(world, world / "samples")
    return world / "samples"


@pytest.fixture(scope="module")
def paired(world, sampled):
    main(score, "--model", world / "base", "--samples", sampled, "--out", world / "pairs", *SCORING)
    return world / "pairs"


TRAINING = ("--steps", 6, "--batch", 4, "--micro-batch", 2, "--lr", 1e-3, "--nll-gen", 0.1, "--device", "cpu", "--save-every", 2)


@pytest.fixture(scope="module")
def trained(world, paired):
    main(dpo, "--model", world / "base", "--pairs", paired / "pairs.jsonl", "--out", world / "train", *TRAINING)
    return world / "train"


def read_log(folder):
    return [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]


# -------------------------------------------------------------------------------------------------------------- 01


def test_samples_are_what_was_drawn(world, sampled):
    model, vq = load(world / "base")
    tensors = load_file(sampled / "samples.safetensors")
    samples = read_jsonl(sampled / "samples.jsonl", sample.Sample)
    assert [s.id for s in samples] == [str(100 + i) for i in range(6)]
    for s in samples:
        assert tensors[f"{s.id}/image"].shape == (16,) and tensors[f"{s.id}/images"].shape == (4, 16)
        ids = [[t for t in row if t >= 0] for row in tensors[f"{s.id}/captions"].tolist()]
        assert [model.tokens.decode(i) for i in ids] == s.captions and len(ids) == 4
        assert len(s.questions) == 3
    picture = np.asarray(Image.open(sampled / "images" / "100" / "01.png"), dtype=np.float32)
    with torch.no_grad():
        pixels = vq.decode(tensors["100/images"][1:2].long())[0].clamp(-1, 1).permute(1, 2, 0).numpy()
    assert np.abs(picture - (pixels + 1) * 127.5).max() <= 0.51
    assert Image.open(sampled / "sheet.png").size[0] > 4 * 64
    assert not (sampled / "parts").exists()


@pytest.mark.parametrize("batch", [1, 5])
def test_samples_do_not_depend_on_the_batch(world, sampled, batch):
    out = world / f"samples-batch{batch}"
    sampling(world, out, "--batch", batch)
    for name in ("samples.jsonl", "samples.safetensors"):
        assert (out / name).read_bytes() == (sampled / name).read_bytes()


def test_interrupted_sampling_continues(world, sampled, monkeypatch):
    out, calls, real = world / "samples-cut", [], sample.sample_images

    def cut(model, chunk, args):
        calls.append([r.id for r in chunk])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(model, chunk, args)

    monkeypatch.setattr(sample, "sample_images", cut)
    with pytest.raises(KeyboardInterrupt):
        sampling(world, out, "--batch", 2)
    sampling(world, out, "--batch", 2)
    assert calls == [["100", "101"], ["102", "103"], ["104", "105"], ["104", "105"]]  # nothing twice but what was cut
    assert (out / "samples.safetensors").read_bytes() == (sampled / "samples.safetensors").read_bytes()


def test_other_rounds_and_seeds_give_other_samples(world, sampled):
    sampling(world, world / "samples-round2", "--round", 2)
    ours, other = (load_file(f / "samples.safetensors") for f in (sampled, world / "samples-round2"))
    assert torch.equal(ours["100/image"], other["100/image"])
    assert not torch.equal(ours["100/images"], other["100/images"])


def launch(processes: int, *arguments):
    """Several processes, one thread each, to their end."""
    done = subprocess.run(torchrun(processes, *arguments), capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr


def test_processes_know_of_each_other(tmp_path):
    (tmp_path / "show.py").write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r}); from model import processes\n"
                                      f"state = processes(); open(f'{tmp_path}/{{state.process_index}}-of-"
                                      f"{{state.num_processes}}', 'w')")
    launch(3, tmp_path / "show.py")
    assert sorted(f.name for f in tmp_path.glob("*-of-*")) == ["0-of-3", "1-of-3", "2-of-3"]


@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_sample_and_score_the_same(world, sampled, paired, processes):
    out = world / f"{processes}-processes"
    launch(processes, "01_sample.py", *(a.format(w=world) for a in INPUT), *SAMPLING, "--out", out / "samples", "--batch", 1)
    assert (out / "samples" / "samples.safetensors").read_bytes() == (sampled / "samples.safetensors").read_bytes()
    launch(processes, "02_score.py", "--model", world / "base", "--samples", sampled, "--out", out / "pairs", *SCORING)
    assert (out / "pairs" / "pairs.jsonl").read_bytes() == (paired / "pairs.jsonl").read_bytes()


def test_several_processes_train_the_same(world, paired):
    """One process, two, three, and two that share out parameters, gradients and optimizer (bench/fsdp.yaml); with guidance."""
    arguments = ("--model", world / "base", "--pairs", paired / "pairs.jsonl", "--steps", 4, "--batch", 6, "--micro-batch", 1,
                 "--lr", 1e-3, "--nll-gen", 0.1, "--guidance", 1.5, "--device", "cpu", "--save-every", 2,
                 "--out")
    main(dpo, *arguments, world / "train-1")
    for n in (2, 3):
        launch(n, "03_pair_dpo.py", *arguments, world / f"train-{n}")
    launch(2, "tests/fsdp_on_cpu.py", "03_pair_dpo.py", *arguments, world / "train-fsdp")
    def change(name):
        base, after = (load_file(f / "pytorch_model.safetensors") for f in (world / "base", world / name / "checkpoint"))
        return torch.cat([(after[k] - base[k]).flatten() for k in base])

    alone = change("train-1")
    for name in ("train-2", "train-3", "train-fsdp"):
        for ours, theirs in zip(read_log(world / name), read_log(world / "train-1"), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
        # AdamW's first steps are signs: parameters without a gradient follow rounding, the others must agree
        assert (change(name) - alone).norm() < 0.02 * alone.norm()


def test_try_by_eye(world, capsys):
    main(sample, "--model", world / "base", "--prompt", "a big red ring", "--images", 2, "--steps", 2, "--out", world / "try")
    main(sample, "--model", world / "base", "--image", world / "1.jpg", "--captions", 3, "--max-new-tokens", 3)
    assert Image.open(world / "try" / "prompt.png").size[0] > 2 * 160
    assert len([line for line in capsys.readouterr().out.splitlines() if line.startswith("top-k")]) == 3


# -------------------------------------------------------------------------------------------------------------- 02


def test_pairs_are_the_best_and_the_worst(sampled, paired):
    tensors = load_file(sampled / "samples.safetensors")
    scores = {s.id: s for s in read_jsonl(paired / "scores.jsonl", score.Score)}
    pairs = {p.id: p for p in read_jsonl(paired / "pairs.jsonl", Pair)}
    assert len(scores) == 6 and set(pairs) == {i for i, s in scores.items() if not s.dropped} and len(pairs) >= 2
    for p in pairs.values():
        s = scores[p.id]
        assert p.win_image_score == max(s.image_scores) > p.lose_image_score == min(s.image_scores)
        assert p.win_caption_score == max(s.caption_scores) > p.lose_caption_score == min(s.caption_scores)
        assert p.win_image_codes == tensors[f"{p.id}/images"][int(np.argmax(s.image_scores))].tolist()
        assert p.lose_image_codes == tensors[f"{p.id}/images"][int(np.argmin(s.image_scores))].tolist()
        ids = tensors[f"{p.id}/captions"][int(np.argmax(s.caption_scores))]
        assert p.win_caption_ids == ids[ids >= 0].tolist()
    for s in scores.values():
        right = [[score.nearest_text(a, q.choices) == q.answer for a, q in zip(row, s.questions)] for row in s.answers]
        assert s.image_scores == [np.mean(r) for r in right]


def test_reencoded_scores(world, sampled):
    """--reencode judges the decoded picture: equal to scoring codes that were decoded and encoded by hand."""
    main(score, "--model", world / "base", "--samples", sampled, "--out", world / "seen", "--reencode", *SCORING)
    model, vq = load(world / "base")
    tensors = load_file(sampled / "samples.safetensors")
    for s in read_jsonl(world / "seen" / "scores.jsonl", score.Score):
        with torch.inference_mode():
            pixels = vq.decode(tensors[f"{s.id}/images"].long())
            again = vq.encode(torch.stack([torch.from_numpy(np.asarray(p).copy()) for p in sample.to_pil(pixels)])
                              .permute(0, 3, 1, 2).float() / 127.5 - 1)
            answers = score.answer_questions(model, again, [s.questions] * 4, 2)
        assert answers == s.answers


def test_second_round_meets_the_first(world, sampled, paired):
    main(score, "--model", world / "base", "--samples", world / "samples-round2", "--previous", paired / "pairs.jsonl",
         "--out", world / "pairs2", *SCORING)
    before = {p.id: p for p in read_jsonl(paired / "pairs.jsonl", Pair)}
    after = read_jsonl(world / "pairs2" / "pairs.jsonl", Pair)
    assert any(p.id in before for p in after)
    for p in after:
        if old := before.get(p.id):
            beaten = p.win_caption_score > old.win_caption_score
            assert p.lose_caption_ids == (old.win_caption_ids if beaten else old.lose_caption_ids)
            beaten = p.win_image_score > old.win_image_score
            assert p.lose_image_codes == (old.win_image_codes if beaten else old.lose_image_codes)


# -------------------------------------------------------------------------------------------------------------- 03


def test_training_starts_at_two_log_two_and_learns(trained):
    log = read_log(trained)
    assert [line["step"] for line in log] == list(range(6))
    assert log[0]["loss_und"] + log[0]["loss_gen"] == pytest.approx(2 * math.log(2), abs=1e-6)
    assert log[-1]["loss_und"] + log[-1]["loss_gen"] < 2 * math.log(2) - 0.1
    assert log[-1]["margin_und"] > 0 and log[-1]["lose_change_und"] < log[-1]["win_change_und"]
    assert all(line["win_length_gen"] == line["lose_length_gen"] for line in log)  # one mask for both


def test_interrupted_training_continues_exactly(world, paired, trained, monkeypatch):
    out, real = world / "train-cut", dpo.loss_and_log
    calls = []

    def cut(*args):
        calls.append(1)
        if len(calls) == 10:  # in step 4, two micro-batches each
            raise KeyboardInterrupt
        return real(*args)

    arguments = ("--model", world / "base", "--pairs", paired / "pairs.jsonl", "--out", out, *TRAINING)
    monkeypatch.setattr(dpo, "loss_and_log", cut)
    with pytest.raises(KeyboardInterrupt):
        main(dpo, *arguments)
    main(dpo, *arguments)
    assert len(calls) == 10 + 2 * 2  # steps 0–3 were not done again
    assert (out / "train.jsonl").read_text() == (trained / "train.jsonl").read_text()
    a, b = (load_file(f / "checkpoint" / "pytorch_model.safetensors") for f in (out, trained))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not (out / "state").exists()


def test_the_loss_is_the_mean_over_records(world, paired):
    """Two micro-batches of one step give the loss and the gradient of one batch."""
    logs = []
    for micro in (1, 4):
        out = world / f"train-micro{micro}"
        main(dpo, "--model", world / "base", "--pairs", paired / "pairs.jsonl", "--out", out, "--steps", 2, "--batch", 4,
             "--micro-batch", micro, "--lr", 1e-3, "--warmup", 0, "--device", "cpu")
        logs.append(read_log(out))
    for one, four in zip(*logs, strict=True):
        assert one == pytest.approx(four, rel=1e-3, abs=1e-4)


def test_another_reference(world, paired, trained):
    """With --reference, log-probs are taken from that model, and the policy starts away from it."""
    out = world / "train-other"
    main(dpo, "--model", trained / "checkpoint", "--reference", world / "base", "--pairs", paired / "pairs.jsonl",
         "--out", out, *TRAINING)
    assert read_log(out)[0]["loss_und"] < math.log(2) - 0.05
    ours, base = (load_file(f / "reference.safetensors")["logprobs"] for f in (out, trained))
    torch.testing.assert_close(ours, base, rtol=1e-4, atol=1e-4)


def test_training_on_guided_logprobs(world, paired, trained):
    """The image half changes, the captions' does not; a dropped text leaves nothing to guide towards."""
    model, _ = load(world / "base")
    chunk = [(pair, 0) for pair in read_jsonl(paired / "pairs.jsonl", Pair)]

    def halves(guidance, drop_text):
        args = SimpleNamespace(seed=0, round=1, drop_text=drop_text, guidance=guidance)
        with torch.no_grad():
            return [sums for sums, _ in dpo.both_halves(model, model.tokens, chunk, "cpu", args)]

    (und, gen), (und_guided, gen_guided) = halves(0, 0), halves(2, 0)
    assert torch.equal(und, und_guided) and (gen - gen_guided)[:, 1:].abs().min() > 0.01
    torch.testing.assert_close(halves(1, 1)[1], halves(3, 1)[1], rtol=1e-4, atol=1e-4)
    out = world / "train-guided"
    main(dpo, "--model", world / "base", "--pairs", paired / "pairs.jsonl", "--out", out, "--guidance", 1.5, *TRAINING)
    assert read_log(out)[0]["loss_gen"] == pytest.approx(math.log(2), abs=1e-6)
    assert read_log(out)[-1]["loss_gen"] < math.log(2) - 0.05


def test_masks_and_drops_are_shared_and_seeded(world, paired):
    model, _ = load(world / "base")
    pairs = read_jsonl(paired / "pairs.jsonl", Pair)

    class Args:
        seed, round, drop_text = 0, 1, 0.5

    dropped = 0
    for epoch in range(20):
        text, win, lose = dpo.generation_row(model.tokens, pairs[0], epoch, Args)
        mask = model.tokens.mask
        assert [i == mask for i in win.ids] == [i == mask for i in lose.ids] and mask in win.ids
        again = dpo.generation_row(model.tokens, pairs[0], epoch, Args)
        assert [s.ids for s in again] == [text.ids, win.ids, lose.ids]
        dropped += text.ids == model.tokens.draw("")
    assert 3 < dropped < 17
    order = dpo.visits(pairs, 5, 3, 0)
    assert len(order) == 15
    for epoch in range(15 // len(pairs)):
        assert sorted(p.id for p, e in order if e == epoch) == sorted(p.id for p in pairs)


# -------------------------------------------------------------------------------------------------------------- 04


def test_evaluation(world, trained, monkeypatch):
    """Understanding is the model's, generation the judge's; here a judge that always says left."""
    class Left:
        def __init__(self, *_):
            pass

        def answer(self, picture, questions):
            assert picture.size == (64, 64)
            return ["left"] * len(questions)

        def right(self, answers, questions):
            return [a == q.answer for a, q in zip(answers, questions)]

        def all_right(self, picture, record, right):
            return all(right)

    monkeypatch.setattr(evaluation, "ModelJudge", Left)
    common = (*(a.format(w=world) for a in INPUT[:4]), "--judge", "left", "--steps", 3, "--guidance", 0, "--show", 3)
    for name, policy in (("base", world / "base"), ("round1", trained / "checkpoint")):
        main(evaluation, *common, "--model", policy, "--out", world / "eval" / name)
    metrics = json.loads((world / "eval" / "base" / "metrics.json").read_text())
    assert metrics["generation"] == pytest.approx({"mean": 2 / 3, "low": 2 / 3, "high": 2 / 3})
    assert metrics["everything right"]["mean"] == 0 and metrics["records"] == 6
    assert metrics["gap"]["mean"] == pytest.approx(metrics["understanding"]["mean"] - 2 / 3)
    main(evaluation, "--compare", world / "eval" / "base", world / "eval" / "round1", "--out", world / "eval")
    text = (world / "eval" / "table.md").read_text()
    assert text.startswith("6 records") and text.count("\n| base |") == 1 and text.count("\n| round1 |") == 2
    assert Image.open(world / "eval" / "comparison.png").size[0] > 3 * 3 * 96
