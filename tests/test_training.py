"""Stage 3 as a process: what it is made from, its options, signals, states, and its guards.

Six records on a tiny random model; the tokens of their pairs are drawn at random.
"""

import json
import math
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from bench.kills import finish, torchrun
from conftest import ROOT, main, results_of, stage
from hermesflow import states, training, training_options
from hermesflow.files import InputError
from hermesflow.jsonl import Lines, read_jsonl
from hermesflow.outputs import exit_if_complete, run_main
from hermesflow.records import Pair
from hermesflow.runs import PATIENCE
from hermesflow.sampling import stable_seed
from hermesflow.tables import load_tensors, save_tensors, write_table
from model import Model, load, save
from tiny import tiny_model

dpo = stage("03_pair_dpo")
STEPS = 6
OPTIONS = ("--steps", STEPS, "--batch", 4, "--micro-batch", 2, "--lr", 1e-3, "--nll-gen", 0.1,
           "--device", "cpu")
# of a version that kept pairs in JSON and in memory
LOSSES = [1.828062, 1.810912, 1.583107, 1.537089, 1.420556, 1.418943]


def pair_rows(n: int = 6, codes: int = 16):
    draw = torch.Generator().manual_seed(0)
    for i in range(n):
        images = torch.randint(32, (3, codes), generator=draw)
        captions = torch.randint(2, 20, (2, 5), generator=draw)
        yield Pair(f"r{i}", f"/nowhere/r{i}.png", "a big red ring", "", "a", "b", 1.0, 0.5, 1.0, 0.5,
                   "", ""), {"image": images[0], "win_image": images[1], "lose_image": images[2],
                             "win_caption": captions[0, : 2 + i % 3], "lose_caption": captions[1]}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """The options that name a checkpoint and pairs."""
    folder = tmp_path_factory.mktemp("training")
    save(tiny_model(), folder / "base")
    write_table(folder / "pairs.jsonl", pair_rows())
    return ("--model", folder / "base", "--pairs", folder / "pairs.jsonl")


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """What an uninterrupted run writes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    main(dpo, *inputs, *OPTIONS, "--out", out)
    return out


def train(inputs, out, *more):
    main(dpo, *inputs, *OPTIONS, "--out", out, *more)


def read_log(out) -> list[dict]:
    return [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]


def after(monkeypatch, n: int, action) -> list:
    """Call `action` after the n-th forward pass from now on; the list grows by one at each."""
    real = Model.pair_logps
    calls = []

    def pair_logps(self, *batches):
        logps = real(self, *batches)
        calls.append(torch.is_grad_enabled())
        if len(calls) == n:
            action()
        return logps

    monkeypatch.setattr(Model, "pair_logps", pair_logps)
    return calls


def raise_signal(number):
    return lambda: os.kill(os.getpid(), number)


def refuse():
    raise KeyboardInterrupt


# ------------------------------------------------------------------------------- order and batches


def test_losses_are_those_of_before(whole):
    assert [line["loss"] for line in read_log(whole)] == pytest.approx(LOSSES, rel=1e-4)


def test_order_is_a_permutation_an_epoch(inputs):
    pairs = read_jsonl(inputs[3], Pair)
    order = dpo.training_order(pairs, 5, 3, 7)
    assert order.shape == (15, 2) and order.dtype == torch.int64
    for epoch in range(3):
        generator = torch.Generator().manual_seed(stable_seed(7, epoch, "order"))
        expected = torch.randperm(6, generator=generator)
        found = order[order[:, 1] == epoch, 0]
        assert torch.equal(found, expected[: len(found)])
    assert order[:, 1].tolist() == [0] * 6 + [1] * 6 + [2] * 3


def test_a_batch_holds_the_tokens_of_the_table(inputs):
    pairs = read_jsonl(inputs[3], Pair)
    visits = [dpo.Visit(pairs[i], 0) for i in (4, 1)]
    text, image = dpo.make_batch(load(inputs[1]), visits, (0, 1), 0.0, 0.0)
    written = [tensors for _, tensors in pair_rows()]
    for row, i in enumerate((4, 1)):
        assert torch.equal(text.images[row], written[i]["image"])
        assert text.responses[row] == [written[i]["win_caption"].tolist(),
                                       written[i]["lose_caption"].tolist()]
        assert torch.equal(image.images[row, 0], written[i]["win_image"])
        assert torch.equal(image.images[row, 1], written[i]["lose_image"])
    assert image.prompts == ["a big red ring"] * 2


def test_pairs_are_read_when_they_are_used(inputs, tmp_path, monkeypatch):
    """Two passes over the visits, one for the reference, each a micro-batch at a time."""
    read = []
    real = Lines.__getitem__
    monkeypatch.setattr(Lines, "__getitem__", lambda self, i: read.append(i) or real(self, i))
    train(inputs, tmp_path / "out", "--steps", 2)
    order = dpo.training_order(range(6), 2, 4, stable_seed(0, 1))
    assert read == order[:, 0].tolist() * 2


# ------------------------------------------------------------------------------- what it is made from


def settings(out) -> dict:
    return json.loads((out / "settings.json").read_text())["settings"]


@pytest.mark.parametrize("option, named", [
    (("--batch", 2), "batch 4 -> 2"), (("--lr", 1e-4), "lr 0.001 -> 0.0001"),
    (("--beta", 0.1), "beta 0.2 -> 0.1"), (("--precision", "bf16"), "precision no -> bf16"),
    (("--seed", 1), "seed 0 -> 1"), (("--steps", 7), "steps 6 -> 7"),
    (("--clip", 2), "clip 1.0 -> 2.0"), (("--cond-dropout", 0), "cond-dropout 0.1 -> 0.0"),
])
def test_what_changes_results_is_refused(inputs, whole, option, named):
    arguments = map(str, (*inputs, *OPTIONS, "--out", whole, *option))
    with pytest.raises(InputError, match="other settings.*" + named):
        exit_if_complete(dpo.output_of(dpo.parse_args([*arguments])))


def test_what_changes_no_result_is_free(inputs, whole, capsys):
    train(inputs, whole, "--micro-batch", 1, "--save-every", 3, "--gradient-checkpointing")
    train(inputs, whole, "--epochs", 4)  # 6 · 4 / 4 = 6 steps
    assert capsys.readouterr().out.count("is complete") == 2
    assert settings(whole)["steps"] == "6" and settings(whole)["batch"] == "4"
    free = {"micro_batch", "save_every", "track", "device", "gradient_checkpointing", "dry_run"}
    assert not free & set(settings(whole))


def test_other_tokens_are_other_pairs(inputs, tmp_path):
    rows = list(pair_rows())
    write_table(tmp_path / "pairs.jsonl", rows)
    given = (*inputs[:2], "--pairs", tmp_path / "pairs.jsonl")
    train(given, tmp_path / "out", "--steps", 1)
    rows[3][1]["win_image"][0] += 1
    write_table(tmp_path / "pairs.jsonl", rows)
    with pytest.raises(InputError, match="content of --pairs"):
        train(given, tmp_path / "out", "--steps", 1)


# ------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize("option", [
    *[(name, value) for name in ("--steps", "--batch", "--micro-batch", "--round")
      for value in ("0", "-3", "nan", "1.5", "99999999999")],
    *[(name, value) for name in ("--epochs", "--lr", "--clip")
      for value in ("0", "-1", "nan", "inf", "1e30")],
    *[(name, value) for name in ("--beta", "--und", "--gen", "--nll-und", "--nll-gen", "--guidance",
                                 "--weight-decay") for value in ("-0.2", "nan", "inf", "1e30")],
    *[(name, value) for name in ("--warmup", "--cond-dropout") for value in ("-1", "2", "nan")],
    ("--seed", "-1"), ("--save-every", "-1"), ("--track", "foo"), ("--device", "cuda"),
    ("--dtype", "bfloat16"), ("--schedule", "step"), ("--precision", "fp8"), ("--out", ""),
])
def test_out_of_range_is_one_line(capsys, option):
    with pytest.raises(SystemExit) as ended:
        dpo.parse_args(["--pairs", "p", "--out", "o", *option])
    printed = capsys.readouterr().err
    assert ended.value.code == 2
    assert printed.startswith("error: ") and printed.count("\n") == 1 and option[0] in printed


def test_the_last_of_steps_and_epochs_counts(tmp_path):
    (tmp_path / "pairs.jsonl").write_text("{}\n" * 10 + "\n")

    def steps(*options) -> int:
        required = ["--pairs", str(tmp_path / "pairs.jsonl"), "--out", "o", "--batch", "4"]
        args = dpo.parse_args([*required, *options])
        return training_options.number_of_steps(args.steps, args.pairs, args.batch)

    assert steps() == 3000
    assert steps("--epochs", "1") == math.ceil(10 / 4)
    assert steps("--epochs", "1", "--steps", "7") == 7
    assert steps("--steps", "7", "--epochs", "2.5") == math.ceil(25 / 4)
    assert steps("--epochs", "0.01") == 1
    with pytest.raises(InputError, match="--batch 32"):
        steps("--steps", "10000000", "--batch", "32")


def test_a_tracker_that_is_not_installed(capsys, monkeypatch):
    monkeypatch.setattr(training_options.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        dpo.parse_args(["--pairs", "p", "--out", "o", "--track", "wandb"])
    assert "--track: wandb is not installed: pip install wandb" in capsys.readouterr().err


@pytest.mark.parametrize("processes", [1, 2])
def test_a_batch_that_cannot_be_divided_touches_nothing(inputs, tmp_path, capsys, monkeypatch,
                                                        processes):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    micro_batch = 3 if processes == 1 else 4
    with pytest.raises(SystemExit) as ended:
        train(inputs, tmp_path / "out", "--micro-batch", micro_batch)
    assert ended.value.code == 2 and not (tmp_path / "out").exists()
    message = f"--batch 4 is not a multiple of --micro-batch {micro_batch}"
    assert message in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- guards


def broken_adamw(monkeypatch, at: int):
    """An update that leaves an infinite weight: number `at`, from 1."""
    real = torch.optim.AdamW.step
    calls = []

    def step(self, *arguments):
        real(self, *arguments)
        calls.append(1)
        if len(calls) == at:
            with torch.no_grad():
                self.param_groups[0]["params"][0][0, 0] = torch.inf

    monkeypatch.setattr(torch.optim.AdamW, "step", step)


def test_a_spoilt_last_update_is_not_saved(inputs, tmp_path, monkeypatch, whole):
    out = tmp_path / "out"
    broken_adamw(monkeypatch, STEPS)
    with pytest.raises(InputError, match="step 5: the update left parameters that are not finite"):
        train(inputs, out, "--save-every", 4)
    assert not (out / "checkpoint").exists() and (out / "state" / "step").read_text() == "4"
    monkeypatch.undo()
    train(inputs, out, "--save-every", 4)
    assert results_of(out) == results_of(whole)


def test_a_spoilt_update_is_not_saved_as_a_state(inputs, tmp_path, monkeypatch):
    broken_adamw(monkeypatch, 4)
    with pytest.raises(InputError, match="step 3: the update left parameters"):
        train(inputs, tmp_path / "out", "--save-every", 2)
    assert (tmp_path / "out" / "state" / "step").read_text() == "2"
    assert not (tmp_path / "out" / "state.new").exists()


def test_another_loss_may_start_anywhere(inputs, tmp_path, monkeypatch):
    """A loss without reference, far from 2 ln 2 at step 0, trains."""
    real = dpo.pair_dpo

    def without_reference(und, gen, reference, **weights):
        return real(und, gen, torch.zeros_like(reference), **weights)

    monkeypatch.setattr(dpo, "pair_dpo", without_reference)
    train(inputs, tmp_path / "out", "--steps", 1)
    assert abs(read_log(tmp_path / "out")[0]["loss"] - 2 * math.log(2)) > 0.01


@pytest.mark.parametrize("scale, stops", [(1 + 1e-6, False), (1.001, True)])
def test_step_0_is_where_its_reference_is(inputs, tmp_path, monkeypatch, scale, stops):
    """A reference within rounding is fine; one of another policy stops the run."""
    out = tmp_path / "out"
    after(monkeypatch, 5, refuse)  # in training, when the reference is there
    with pytest.raises(KeyboardInterrupt):
        train(inputs, out, "--steps", 2)
    monkeypatch.undo()
    file = out / "reference.safetensors"
    save_tensors(file, {"logps": load_tensors(file)["logps"] * scale})
    if not stops:
        return train(inputs, out, "--steps", 2)
    with pytest.raises(InputError, match=r"step 0: log-probs are .* away from .*another policy"):
        train(inputs, out, "--steps", 2)
    assert not (out / "checkpoint").exists()


def test_a_figure_that_is_not_finite_is_named_and_not_written(inputs, tmp_path, monkeypatch):
    real = dpo.pair_dpo

    def with_nan(*logps, **weights):
        loss, log = real(*logps, **weights)
        return loss, log | {"mine": loss * torch.nan}

    monkeypatch.setattr(dpo, "pair_dpo", with_nan)
    with pytest.raises(InputError, match=r"step 0: mine nan; records r\d"):
        train(inputs, tmp_path / "out")
    assert not (tmp_path / "out" / "train.jsonl").exists()


def test_log_probs_that_are_not_finite_are_not_stored(inputs, tmp_path, monkeypatch):
    real = Model.pair_logps

    def pair_logps(self, *batches):
        und, gen = real(self, *batches)
        return und._replace(sums=und.sums * torch.nan), gen

    monkeypatch.setattr(Model, "pair_logps", pair_logps)
    with pytest.raises(InputError, match=r"reference: log-probs of records r\d, r\d are not finite"):
        train(inputs, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.log"))


# ------------------------------------------------------------------------------------------ float16


def in_float16(monkeypatch, scale: float):
    """Autocast and gradient scaler as on an accelerator, on the CPU."""
    real = training.start_accelerator

    def start(batch, micro_batch, device, precision, **settings):
        AcceleratorState._reset_state()
        accelerator = real(batch, micro_batch, device, "no", **settings)
        accelerator.state._mixed_precision = "fp16"
        accelerator.native_amp = True
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        return accelerator

    monkeypatch.setattr(dpo, "start_accelerator", start)


@pytest.fixture
def restored_precision():
    yield
    AcceleratorState._reset_state()


def test_float16_needs_an_accelerator(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(InputError, match="--precision fp16 needs an accelerator"):
        train(inputs, tmp_path / "out", "--precision", "fp16")
    assert not (tmp_path / "out").exists()


def test_an_overflow_skips_the_step(inputs, tmp_path, monkeypatch, restored_precision):
    """The scale halves until gradients fit; the learning rate waits; a state continues from it."""
    in_float16(monkeypatch, 2.0**19)
    out = tmp_path / "out"
    warmup = ("--warmup", 0.5, "--schedule", "constant_with_warmup")  # over 3 updates
    train(inputs, out, *warmup)
    log = read_log(out)
    skipped = sum(int(line["skipped"]) for line in log)
    assert 0 < skipped < STEPS
    assert [line["skipped"] for line in log] == [1.0] * skipped + [0.0] * (STEPS - skipped)
    assert [line["scale"] for line in log] == [2.0 ** (18 - min(i, skipped - 1)) for i in range(6)]
    assert all((line["grad_norm"] > 0) == (not line["skipped"]) for line in log)
    updates = [min(3, max(0, i - skipped)) for i in range(6)]
    assert [line["lr"] for line in log] == pytest.approx([1e-3 * n / 3 for n in updates])
    monkeypatch.undo()
    in_float16(monkeypatch, 2.0**19)
    cut = tmp_path / "cut"
    after(monkeypatch, 12 + 2 * 4, raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit):
        train(inputs, cut, *warmup)
    assert (cut / "state" / "step").read_text() == "4"
    monkeypatch.undo()
    in_float16(monkeypatch, 1.0)  # the state has another
    train(inputs, cut, *warmup)
    assert results_of(cut) == results_of(out)


def test_overflows_that_last_end_the_run(inputs, tmp_path, monkeypatch, restored_precision):
    in_float16(monkeypatch, 2.0**16)
    real = dpo.pair_dpo

    def huge(*logps, **weights):
        loss, log = real(*logps, **weights)
        return loss + 1e38 * (logps[0].sums - logps[0].sums.detach()).sum() * 1e5, log

    monkeypatch.setattr(dpo, "pair_dpo", huge)
    with pytest.raises(InputError, match="step 19: gradients overflow even if.* scaled by 0.0625"):
        train(inputs, tmp_path / "out", "--steps", 30)
    assert len(read_log(tmp_path / "out")) == 19


# ------------------------------------------------------------------------------------------ signals


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_the_state_first(inputs, tmp_path, monkeypatch, capsys, whole, number, code):
    out = tmp_path / "out"
    before = signal.getsignal(signal.SIGTERM)
    calls = after(monkeypatch, 12 + 2 * 2 + 1, raise_signal(number))  # in step 2
    with pytest.raises(SystemExit) as ended:
        run_main(lambda: train(inputs, out, "--save-every", 0))
    assert ended.value.code == code and len(calls) == 12 + 2 * 3
    assert signal.getsignal(signal.SIGTERM) == before
    last = capsys.readouterr().err.replace("\r", "\n").strip().split("\n")[-1]
    assert last == ("error: interrupted after step 2, whose state is saved; the same command "
                    "continues from here")
    assert (out / "state" / "step").read_text() == "3"
    train(inputs, out, "--save-every", 0)
    assert len(calls) == 12 + 2 * STEPS
    assert results_of(out) == results_of(whole)


def test_a_second_signal_ends_at_once(inputs, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # a launcher's; nothing happens
        monkeypatch.setattr(training.time, "monotonic", lambda: 1e12)
        os.kill(os.getpid(), signal.SIGINT)

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & would have it ignored
    calls = after(monkeypatch, 15, twice)
    with pytest.raises(KeyboardInterrupt):
        train(inputs, out)
    assert len(calls) == 15 and not (out / "state").exists()


def test_a_signal_while_a_model_is_loaded_ends_at_once(inputs, tmp_path, monkeypatch, capsys):
    real = dpo.load
    monkeypatch.setattr(dpo, "load", lambda *a: os.kill(os.getpid(), signal.SIGTERM) or real(*a))
    with pytest.raises(SystemExit) as ended:
        train(inputs, tmp_path / "out")
    assert ended.value.code == 143
    assert capsys.readouterr().err.startswith("error: interrupted between two steps; the same")


def test_a_signal_in_the_last_step_lets_it_end(inputs, tmp_path, monkeypatch, whole):
    after(monkeypatch, 12 + 2 * STEPS, raise_signal(signal.SIGTERM))
    train(inputs, tmp_path / "out")
    assert results_of(tmp_path / "out") == results_of(whole)


@pytest.mark.parametrize("how", ["signal", "kill"])
def test_the_reference_continues_where_it_was(inputs, tmp_path, monkeypatch, capsys, whole, how):
    out = tmp_path / "out"
    monkeypatch.setattr(training, "FLUSH_SECONDS", 0 if how == "kill" else 1e9)
    first = after(monkeypatch, 7, refuse if how == "kill" else raise_signal(signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt if how == "kill" else SystemExit):
        train(inputs, out)
    if how == "signal":
        assert "interrupted while the reference was computed" in capsys.readouterr().err
    kept = {"kill": 6, "signal": 7}[how]
    lines = [line for file in (out / "reference").glob("*.log") for line in open(file)]
    assert [line.split("\t")[0] for line in lines] == [str(visit) for visit in range(2 * kept)]
    with open(next((out / "reference").glob("*.log")), "a") as file:
        file.write("14\t{")  # of a kill while it was written
    train(inputs, out)
    assert len(first) == 7 + (12 - kept) + 2 * STEPS
    assert results_of(out) == results_of(whole) and not (out / "reference").exists()


def test_the_reference_is_reused_with_another_micro_batch(inputs, tmp_path, monkeypatch, whole):
    out = tmp_path / "out"
    monkeypatch.setattr(training, "FLUSH_SECONDS", 0)
    after(monkeypatch, 7, refuse)
    with pytest.raises(KeyboardInterrupt):
        train(inputs, out)
    calls = after(monkeypatch, 0, None)
    train(inputs, out, "--micro-batch", 1)
    assert calls.count(False) == 24 - 2 * 6 and calls.count(True) == 4 * STEPS
    logps = load_file(out / "reference.safetensors")["logps"]
    expected = load_file(whole / "reference.safetensors")["logps"]
    torch.testing.assert_close(logps, expected, rtol=1e-5, atol=1e-5)
    assert [line["loss"] for line in read_log(out)] == pytest.approx(LOSSES, rel=1e-4)


# ------------------------------------------------------------------------------------------- states


def interrupted(inputs, out, monkeypatch, step: int = 3):
    """A run that has ended after `step` steps, with its state."""
    after(monkeypatch, 12 + 2 * step, raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit):
        train(inputs, out)
    monkeypatch.undo()
    assert (out / "state" / "step").read_text() == str(step)


def test_a_state_is_small_and_its_size_is_said(inputs, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    after(monkeypatch, 12 + 2 * 5, raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit):
        train(inputs, out, "--save-every", 4)
    parameters = sum(p.numel() for p in load(inputs[1]).net.parameters())
    expected = f"state: {12 * parameters / 1e6:.1f} MB every 4 steps, twice while it is replaced"
    assert expected in capsys.readouterr().out.split("\n")
    files = {p.name: p.stat().st_size for p in (out / "state").iterdir()}
    assert set(files) == {"00000.safetensors", "rest.json", "step"}
    assert sum(files.values()) < 12 * parameters + 20_000  # names, and one number a parameter


def test_a_state_in_several_files(inputs, tmp_path, monkeypatch, whole):
    monkeypatch.setattr(states, "FILE_BYTES", 20_000)
    after(monkeypatch, 12 + 2 * 3, raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit):
        train(inputs, tmp_path / "out")
    assert len(list((tmp_path / "out" / "state").glob("*.safetensors"))) > 3
    monkeypatch.undo()
    train(inputs, tmp_path / "out")
    assert results_of(tmp_path / "out") == results_of(whole)


def test_killed_while_a_state_is_replaced(inputs, tmp_path, monkeypatch, whole):
    """Between the removal of the old one and the renaming of the new one."""
    out = tmp_path / "out"
    real = states.State.replace
    calls = []

    def replace(self):
        calls.append(1)
        if len(calls) == 2:
            shutil.rmtree(self.folder)
            raise KeyboardInterrupt
        real(self)

    monkeypatch.setattr(states.State, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        train(inputs, out, "--save-every", 2)
    monkeypatch.undo()
    assert not (out / "state").exists() and (out / "state.new" / "step").read_text() == "4"
    calls = after(monkeypatch, 0, None)
    train(inputs, out, "--save-every", 2)
    assert len(calls) == 2 * 2 and results_of(out) == results_of(whole)


def truncated(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


HARM = {
    "step no number": ("state", lambda out: (out / "state" / "step").write_text("four")),
    "step empty": ("state", lambda out: (out / "state" / "step").write_text("")),
    "step too high": ("state", lambda out: (out / "state" / "step").write_text("6")),
    "step negative": ("state", lambda out: (out / "state" / "step").write_text("-1")),
    "step not UTF-8": ("step", lambda out: (out / "state" / "step").write_bytes(b"\xff")),
    "no step": ("step", lambda out: (out / "state" / "step").unlink()),
    "tensors truncated": ("00000.safetensors",
                          lambda out: truncated(out / "state" / "00000.safetensors")),
    "tensors empty": ("00000.safetensors",
                      lambda out: (out / "state" / "00000.safetensors").write_bytes(b"")),
    "no tensors": ("state", lambda out: (out / "state" / "00000.safetensors").unlink()),
    "others' tensors": ("state", lambda out: save_tensors(out / "state" / "00000.safetensors",
                                                          {"weight x": torch.ones(2)})),
    "rest truncated": ("rest.json", lambda out: truncated(out / "state" / "rest.json")),
    "rest empty": ("state", lambda out: (out / "state" / "rest.json").write_text("{}")),
    "no rest": ("rest.json", lambda out: (out / "state" / "rest.json").unlink()),
    "log empty": ("train.jsonl", lambda out: (out / "train.jsonl").write_text("")),
    "log truncated": ("train.jsonl", lambda out: truncated(out / "train.jsonl")),
    "log binary": ("train.jsonl", lambda out: (out / "train.jsonl").write_bytes(b"\xff\n" * 9)),
    "no log": ("train.jsonl", lambda out: (out / "train.jsonl").unlink()),
    "log of others": ("train.jsonl", lambda out: (out / "train.jsonl").write_text("[]\n" * 9)),
    "reference truncated": ("reference.safetensors",
                            lambda out: truncated(out / "reference.safetensors")),
    "reference empty": ("reference.safetensors",
                        lambda out: (out / "reference.safetensors").write_bytes(b"")),
    "reference of others": ("reference.safetensors",
                            lambda out: save_tensors(out / "reference.safetensors",
                                                     {"logps": torch.zeros(3, 2, 2)})),
    "reference without name": ("reference.safetensors",
                               lambda out: save_tensors(out / "reference.safetensors", {})),
    "reference NaN": ("reference.safetensors",
                      lambda out: save_tensors(out / "reference.safetensors",
                                               {"logps": torch.full((24, 2, 2), torch.nan)})),
}


@pytest.fixture(scope="module")
def half_done(inputs, tmp_path_factory):
    out = tmp_path_factory.mktemp("half") / "out"
    with pytest.MonkeyPatch.context() as monkeypatch:
        interrupted(inputs, out, monkeypatch)
    return out


@pytest.mark.parametrize("name", HARM)
def test_damage_is_one_line(inputs, half_done, tmp_path, capsys, name):
    where, harm = HARM[name]
    out = tmp_path / "out"
    shutil.copytree(half_done, out)
    harm(out)
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run_main(lambda: train(inputs, out))
    last = capsys.readouterr().err.replace("\r", "\n").strip().split("\n")[-1]
    assert ended.value.code == 2 and last.startswith(f"error: {out}") and "--overwrite" in last
    assert where in last.partition(": ")[2] and len(last) < 400


def test_damage_is_overwritten(inputs, half_done, tmp_path, whole):
    out = tmp_path / "out"
    shutil.copytree(half_done, out)
    truncated(out / "state" / "00000.safetensors")
    train(inputs, out, "--overwrite")
    assert results_of(out) == results_of(whole)


def test_a_full_disk_in_a_state_is_one_line(inputs, tmp_path, whole):
    out = tmp_path / "out"
    log = tmp_path / "log"
    arguments = (*inputs, *OPTIONS, "--save-every", 2, "--out", out)
    # more than log-probs and log lines, less than a state
    assert finish("03_pair_dpo", arguments, log, largest_file=100_000) == 2
    lines = log.read_text().replace("\r", "\n").strip().split("\n")
    assert lines[-1].startswith(f"error: {out}/state.new/00000.safetensors: cannot write: ")
    assert not any("Traceback" in line for line in lines)
    assert finish("03_pair_dpo", arguments, log) == 0
    assert results_of(out) == results_of(whole)


def test_a_folder_that_is_removed_under_a_run(inputs, tmp_path, monkeypatch):
    out = tmp_path / "out"
    after(monkeypatch, 15, lambda: shutil.rmtree(out))
    with pytest.raises(InputError, match="out: removed or replaced while process"):
        train(inputs, out)
    assert not out.exists()


# ------------------------------------------------------------------------------- several processes

# a stage whose processes do what $DO says when they begin step $AT
SCRIPT = """
import os, runpy, signal, sys
sys.path.insert(0, {root!r})
import torch
from hermesflow import watching
steps = 0
real = watching.mean_figures

def mean_figures(*arguments):
    global steps
    steps += 1
    if steps == int(os.environ.get("AT", 0)) and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    group = torch.distributed.distributed_c10d._get_default_group()
    print("timeout", group._get_backend(torch.device("cpu")).options._timeout.total_seconds())
    return real(*arguments)

watching.mean_figures = mean_figures
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def launch(tmp_path, processes: int, inputs, out, *more, sharded: bool = False, at: int = 0):
    """Run stage 3 in processes; number 1 receives SIGTERM in its at-th step."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(root=str(ROOT)))
    sharding = [ROOT / "tests" / "fsdp_on_cpu.py"] if sharded else []
    command = torchrun(processes, *sharding, script, ROOT / "03_pair_dpo.py", *inputs, *OPTIONS,
                       "--out", out, *more)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "AT": str(at)}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_one_process_continues_what_two_began(inputs, tmp_path, whole):
    """A signal to one of them ends both, with their state; their barriers wait for hours."""
    out = tmp_path / "out"
    done = launch(tmp_path, 2, inputs, out, at=3)
    assert "exitcode  : 143" in done.stderr, done.stderr[-3000:]
    assert "interrupted after step 2, whose state is saved" in done.stderr
    assert (out / "state" / "step").read_text() == "3"
    assert f"timeout {PATIENCE.total_seconds()}" in done.stdout
    train(inputs, out)
    assert [line["loss"] for line in read_log(out)] == pytest.approx(LOSSES, rel=1e-5)
    same_changes(out, whole, inputs)


@pytest.mark.parametrize("sharded", [False, True])
def test_two_processes_continue_what_one_began(inputs, tmp_path, half_done, whole, sharded):
    """Also a reference of which an odd number of micro-batches is missing."""
    out = tmp_path / "out"
    shutil.copytree(half_done, out)
    logps = load_tensors(out / "reference.safetensors")["logps"]
    (out / "reference.safetensors").unlink()
    (out / "reference").mkdir()
    with open(out / "reference" / "0-1-0.log", "w") as file:
        for visit in range(14):
            line = {"id": str(visit), "logps": logps[visit].tolist()}
            file.write(f"{visit}\t{json.dumps(line)}\n")
    done = launch(tmp_path, 2, inputs, out, sharded=sharded)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"timeout {PATIENCE.total_seconds()}" in done.stdout
    found = load_tensors(out / "reference.safetensors")["logps"]
    assert torch.equal(found[:14], logps[:14])
    torch.testing.assert_close(found, logps, rtol=1e-5, atol=1e-5)
    assert [line["loss"] for line in read_log(out)] == pytest.approx(LOSSES, rel=1e-5)
    same_changes(out, whole, inputs)


def test_one_process_continues_what_two_began_sharded(inputs, tmp_path, whole):
    out = tmp_path / "out"
    done = launch(tmp_path, 2, inputs, out, sharded=True, at=2)
    assert (out / "state" / "step").read_text() == "2", done.stderr[-3000:]
    train(inputs, out)
    assert [line["loss"] for line in read_log(out)] == pytest.approx(LOSSES, rel=1e-5)
    same_changes(out, whole, inputs)


def test_another_micro_batch_continues_the_same(inputs, tmp_path, half_done, whole):
    out = tmp_path / "out"
    shutil.copytree(half_done, out)
    train(inputs, out, "--micro-batch", 1)
    assert [line["loss"] for line in read_log(out)] == pytest.approx(LOSSES, rel=1e-5)
    same_changes(out, whole, inputs)


def same_changes(out, whole, inputs) -> None:
    """Parameters without a gradient follow rounding, as AdamW's first steps are signs."""
    name = "pytorch_model.safetensors"
    base = load_file(inputs[1] / name)
    found = load_file(out / "checkpoint" / name)
    expected = load_file(whole / "checkpoint" / name)
    change = torch.cat([(found[k] - base[k]).flatten() for k in base])
    right = torch.cat([(expected[k] - base[k]).flatten() for k in base])
    assert (change - right).norm() < 0.02 * right.norm()


def test_start_imports_nothing_heavy(inputs, tmp_path):
    """A mistake and a complete output are answered without torch."""
    code = "import sys, runpy; sys.argv = sys.argv[1:]\n" \
           "try: runpy.run_path(sys.argv[0], run_name='__main__')\n" \
           "finally: print('torch' in sys.modules)"
    command = [sys.executable, "-c", code, str(ROOT / "03_pair_dpo.py"), *map(str, inputs),
               "--out", str(tmp_path), "--track", "foo"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stdout.strip() == "False"
