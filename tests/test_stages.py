"""The four stages in a row on a tiny random model.

Real photographs, the original's JSON, resuming, several processes, the command line.
"""

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

from bench.kills import torchrun
from conftest import ROOT, main, stage
from evals import judges
from hermesflow import runs
from hermesflow.pictures import to_pil
from hermesflow.records import Pair, Sample, Score, read_jsonl
from hermesflow.scoring import answer_questions, nearest_text
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
def paired(world, sampled):
    scoring(world, sampled, world / "pairs")
    return world / "pairs"


@pytest.fixture(scope="module")
def trained(world, paired):
    main(dpo, "--model", world / "base", "--pairs", paired / "pairs.jsonl",
         "--out", world / "train", *TRAINING)
    return world / "train"


def read_log(folder):
    return [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]


# ----------------------------------------------------------------------------------------------- 01


def test_samples_are_what_was_drawn(world, sampled):
    model = load(world / "base")
    tensors = load_file(sampled / "samples.safetensors")
    samples = read_jsonl(sampled / "samples.jsonl", Sample)
    assert [s.id for s in samples] == [str(100 + i) for i in range(6)]
    for s in samples:
        assert tensors[f"{s.id}/image"].shape == (16,)
        assert tensors[f"{s.id}/images"].shape == (4, 16)
        texts = []
        for row in tensors[f"{s.id}/captions"]:
            ids = row[row >= 0].tolist()  # -1 pads
            texts.append(model.decode_text(ids))
        assert texts == s.captions and len(texts) == 4
        assert len(s.questions) == 3
    picture = Image.open(sampled / "images" / "100" / "01.png")
    picture = np.asarray(picture, dtype=np.float32)  # (H, W, 3)
    pixels = model.decode_image(tensors["100/images"][1:2].long())[0]  # (3, H, W)
    pixels = pixels.clamp(-1, 1).permute(1, 2, 0).numpy()
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
    file = "samples.safetensors"
    assert (out / file).read_bytes() == (sampled / file).read_bytes()


def test_other_rounds_and_seeds_give_other_samples(world, sampled):
    sampling(world, world / "samples-round2", "--round", 2)
    first = load_file(sampled / "samples.safetensors")
    second = load_file(world / "samples-round2" / "samples.safetensors")
    assert torch.equal(first["100/image"], second["100/image"])
    assert not torch.equal(first["100/images"], second["100/images"])


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
    out = world / f"{processes}-processes"
    done = launch(processes, "01_sample.py", *input_of(world), *SAMPLING,
                  "--out", out / "samples", "--batch", 1)
    assert "sample: 100%" in done.stderr and " 6/6 " in done.stderr  # one bar for all
    file = "samples.safetensors"
    assert (out / "samples" / file).read_bytes() == (sampled / file).read_bytes()
    launch(processes, "02_score.py", "--model", world / "base", "--samples", sampled,
           "--out", out / "pairs", *SCORING)
    file = "pairs.jsonl"
    assert (out / "pairs" / file).read_bytes() == (paired / file).read_bytes()


def test_the_bar_counts_the_work_of_all_processes(tmp_path):
    records = [SimpleNamespace(id=str(i)) for i in range(5)]
    chunks = [records[0::2], records[1::2]]  # those of two processes
    sizes = {runs.part_name(chunk): len(chunk) for chunk in chunks}
    (tmp_path / "another.jsonl").touch()  # of an earlier run, which had other chunks
    with runs.tqdm(total=5, disable=True) as bar:
        counts = []
        bar.update = counts.append  # the bar itself stays at 0
        runs.show_progress(bar, tmp_path, sizes)
        for name in sizes:
            (tmp_path / name).touch()
            runs.show_progress(bar, tmp_path, sizes)
    assert counts == [0, 3, 5]


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
    tensors = load_file(sampled / "samples.safetensors")
    scores = {s.id: s for s in read_jsonl(paired / "scores.jsonl", Score)}
    pairs = {p.id: p for p in read_jsonl(paired / "pairs.jsonl", Pair)}
    assert len(scores) == 6 and len(pairs) >= 2
    assert set(pairs) == {i for i, s in scores.items() if not s.dropped}
    for p in pairs.values():
        s = scores[p.id]
        assert p.win_image_score == max(s.image_scores) > p.lose_image_score == min(s.image_scores)
        assert p.win_caption_score == max(s.caption_scores)
        assert p.lose_caption_score == min(s.caption_scores) < p.win_caption_score
        images = tensors[f"{p.id}/images"]  # (K, N)
        assert p.win_image_codes == images[int(np.argmax(s.image_scores))].tolist()
        assert p.lose_image_codes == images[int(np.argmin(s.image_scores))].tolist()
        ids = tensors[f"{p.id}/captions"][int(np.argmax(s.caption_scores))]
        assert p.win_caption_ids == ids[ids >= 0].tolist()
    for s in scores.values():
        shares = []
        for answers in s.answers:
            correct = [nearest_text(a, q.choices) == q.answer
                       for a, q in zip(answers, s.questions)]
            shares.append(np.mean(correct))
        assert s.image_scores == shares


def test_reencoded_scores(world, sampled):
    """--reencode judges the decoded picture: codes that are decoded and encoded by hand."""
    scoring(world, sampled, world / "seen", "--reencode")
    model = load(world / "base")
    tensors = load_file(sampled / "samples.safetensors")
    for s in read_jsonl(world / "seen" / "scores.jsonl", Score):
        pictures = to_pil(model.decode_image(tensors[f"{s.id}/images"].long()))
        pixels = torch.stack([torch.from_numpy(np.array(p)) for p in pictures])  # (K, H, W, 3)
        pixels = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
        codes = model.encode_image(pixels)
        answers = answer_questions(model, codes, [s.questions] * 4, 2)
        assert answers == s.answers


def test_second_round_meets_the_first(world, sampled, paired):
    scoring(world, world / "samples-round2", world / "pairs2", "--previous", paired / "pairs.jsonl")
    before = {p.id: p for p in read_jsonl(paired / "pairs.jsonl", Pair)}
    after = read_jsonl(world / "pairs2" / "pairs.jsonl", Pair)
    assert any(p.id in before for p in after)
    for p in after:
        if old := before.get(p.id):
            beaten = p.win_caption_score > old.win_caption_score
            assert p.lose_caption_ids == (old.win_caption_ids if beaten else old.lose_caption_ids)
            beaten = p.win_image_score > old.win_image_score
            assert p.lose_image_codes == (old.win_image_codes if beaten else old.lose_image_codes)


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
    order = dpo.training_order(pairs, 5, 3, 0)
    assert len(order) == 15
    for epoch in range(15 // len(pairs)):
        assert sorted(v.pair.id for v in order if v.epoch == epoch) == sorted(p.id for p in pairs)


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

        def is_correct(self, answers, questions):
            return [a == q.answer for a, q in zip(answers, questions)]

        def all_correct(self, picture, record, correct):
            return all(correct)

    monkeypatch.setattr(judges, "ModelJudge", Left)
    common = (*input_of(world)[:4], "--judge", "left", "--steps", 3, "--guidance", 0, "--show", 3)
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


@pytest.mark.parametrize("config", ["configs/toy.sh", "configs/showo.sh"])
@pytest.mark.parametrize("array, override, changed", [
    ("SAMPLE", "--images 4", {"images": 4}),
    ("SCORE", "--min-image-score 0.5 --batch 2", {"min_image_score": 0.5, "batch": 2}),
    ("DPO", "--beta 0.1", {"beta": 0.1}),
    ("EVAL", "--steps 3 --seed 7", {"steps": 3, "seed": 7}),
])
def test_overriding_one_setting_keeps_the_others(config, array, override, changed):
    assert settings(config, array, override) == settings(config, array) | changed


def test_what_the_configs_set():
    toy = settings("configs/toy.sh", "SAMPLE")
    assert [toy[k] for k in ("captions", "images", "steps", "guidance")] == [8, 8, 16, 0]
    assert toy["caption_settings"] == [(0, 2.0)]
    paper = settings("configs/showo.sh", "SAMPLE")
    assert [paper[k] for k in ("captions", "images", "steps", "guidance")] == [10, 16, 50, 5]
    paper = settings("configs/showo.sh", "DPO")
    assert [paper[k] for k in ("beta", "lr", "steps", "batch")] == [0.2, 2e-5, 3000, 32]
