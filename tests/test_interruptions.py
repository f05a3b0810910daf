"""Kills, full disks, changed inputs, locks, guards: nothing lost, nothing mixed. bench/drill.py does more of it, at random."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

import kills
import model
from conftest import ROOT
from kills import MOMENTS, finish, tree
from model import InputError
from test_stages import INPUT, SAMPLING, SCORING, main, read_log, sampling
from test_stages import dpo, paired, sample, sampled, score, trained, world  # noqa: F401

TRAINING = ("--steps", 5, "--batch", 2, "--micro-batch", 1, "--lr", 1e-3, "--device", "cpu", "--save-every", 2)


def command(name: str, world, out) -> list:  # noqa: F811
    sampled, pairs = world / "samples", world / "pairs"
    return {"01_sample": [*(a.format(w=world) for a in INPUT), *SAMPLING, "--batch", 2],
            "02_score": ["--model", world / "base", "--samples", sampled, *SCORING, "--batch", 2],
            "03_pair_dpo": ["--model", world / "base", "--pairs", pairs / "pairs.jsonl", *TRAINING],
            "04_eval": [*(a.format(w=world) for a in INPUT), "--judge", "self", "--steps", 2, "--max-new-tokens", 2, "--show", 2],
            }[name] + ["--out", out]


@pytest.mark.parametrize("name", ["01_sample", "02_score", "03_pair_dpo", "04_eval"])
def test_killed_at_every_kind_of_write(world, sampled, paired, tmp_path, name):  # noqa: F811
    """kill -9 at the 1st, 2nd, 3rd, 5th, … file, half written, written, renamed; then the same command again."""
    assert finish(name, command(name, world, tmp_path / "whole"), tmp_path / "log") == 0, (tmp_path / "log").read_text()
    whole, out = tree(tmp_path / "whole"), tmp_path / "killed"
    deaths = [(number, moment) for number, moment in zip((0, 1, 2, 0, 1, 3), MOMENTS * 2)]
    codes = [finish(name, command(name, world, out), tmp_path / "log", death=death) for death in deaths]
    assert set(codes) <= {-signal.SIGKILL, 0} and codes.count(-signal.SIGKILL) >= 4, (codes, (tmp_path / "log").read_text())
    assert finish(name, command(name, world, out), tmp_path / "log") == 0, (tmp_path / "log").read_text()
    assert tree(out) == whole


@pytest.mark.parametrize("name", ["01_sample", "03_pair_dpo"])
def test_full_disk(world, sampled, paired, tmp_path, name):  # noqa: F811
    assert finish(name, command(name, world, tmp_path / "whole"), tmp_path / "log") == 0
    for largest in (1500, 20_000):
        assert finish(name, command(name, world, tmp_path / "full"), tmp_path / "log", largest_file=largest) == 2
        said = (tmp_path / "log").read_text().replace("\r", "\n").strip().split("\n")
        assert said[-1].startswith("error: ") and "cannot write" in said[-1]
        assert "File too large" in said[-1] and str(tmp_path / "full") in said[-1]
        assert not any("Traceback" in text for text in said)
    assert finish(name, command(name, world, tmp_path / "full"), tmp_path / "log") == 0
    assert tree(tmp_path / "full") == tree(tmp_path / "whole")


def test_output_that_cannot_be_written(world, sampled):  # noqa: F811
    for out in ("/proc/nobody/here", world / "0.jpg" / "out"):
        with pytest.raises(InputError, match="cannot write"):
            sampling(world, out)


# ------------------------------------------------------------------------------------------------------ changed inputs


def test_changed_inputs_are_noticed(world, tmp_path, monkeypatch):  # noqa: F811
    """Another argument, an edited record, question, image or weight, another format: named, and nothing is touched."""
    for name in ("base", "initial_data.json", "vqa_data.json", *(f"{i}.jpg" for i in range(6))):
        subprocess.run(["cp", "-r", world / name, tmp_path / name], check=True)
    run = lambda *more: sampling(tmp_path, tmp_path / "out", *more)  # noqa: E731
    run()
    before = tree(tmp_path / "out")
    weights = tmp_path / "base" / "pytorch_model.safetensors"

    def refused(named):
        with pytest.raises(InputError, match="other settings.*" + named):
            run()
        assert tree(tmp_path / "out") == before

    for path, named in ((tmp_path / "initial_data.json", "content of records"), (tmp_path / "vqa_data.json", "content of questions"),
                        (tmp_path / "3.jpg", "content of images"), (weights, "content of model"),
                        (tmp_path / "base" / "tokenizer" / "tokenizer.json", "content of model")):
        good = path.read_bytes()
        path.write_bytes(good[:-1] + b" " if path.suffix == ".jpg" else good + b" ")
        refused(named)
        path.write_bytes(good)
    with pytest.raises(InputError, match="seed 0 -> 1"):
        run("--seed", 1)
    monkeypatch.setattr(model, "FORMAT", "99")
    refused(f"format {before and json.loads(before['settings.json'])['format']} -> 99")
    run("--overwrite")
    assert {k: v for k, v in tree(tmp_path / "out").items() if k != "settings.json"} == {
        k: v for k, v in before.items() if k != "settings.json"}


def test_changed_pairs_are_noticed(world, sampled, paired, tmp_path):  # noqa: F811
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_bytes((paired / "pairs.jsonl").read_bytes())
    arguments = ("--model", world / "base", "--pairs", pairs, "--out", tmp_path / "out", *TRAINING)
    main(dpo, *arguments)
    pairs.write_text(pairs.read_text().replace("0.75", "0.76") + "\n")
    with pytest.raises(InputError, match="content of pairs"):
        main(dpo, *arguments)


# --------------------------------------------------------------------------------------------------------------- locks


def test_one_run_at_a_time(world, tmp_path):  # noqa: F811
    """A second run says who holds the folder; a lock whose holder was killed holds nothing."""
    hold = "import sys, time; sys.path.insert(0, sys.argv[1]); import model, pathlib; model.lock(pathlib.Path(sys.argv[2]))\n"
    holder = subprocess.Popen([sys.executable, "-c", hold + "print('held', flush=True); time.sleep(600)", ROOT, tmp_path / "out"],
                              stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=f"out: in use by process {holder.pid} on "):
            sampling(world, tmp_path / "out")
        assert os.listdir(tmp_path / "out") == [".lock"]
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    sampling(world, tmp_path / "out")
    assert (tmp_path / "out" / "samples.jsonl").exists()


# ------------------------------------------------------------------------------------------------------ training guards


def test_a_loss_that_is_no_number_stops(world, sampled, paired, tmp_path, monkeypatch):  # noqa: F811
    real, steps = dpo.loss_and_log, []

    def broken(*args):
        loss, log = real(*args)
        steps.append(1)
        return (loss * torch.nan, log | {"loss": loss * torch.nan}) if len(steps) == 9 else (loss, log)  # step 4 of 0…4

    monkeypatch.setattr(dpo, "loss_and_log", broken)
    arguments = ("--model", world / "base", "--pairs", paired / "pairs.jsonl", "--out", tmp_path / "out", *TRAINING)
    with pytest.raises(InputError, match=r"step 4: loss nan.*records 10\d"):
        main(dpo, *arguments)
    assert (tmp_path / "out" / "state" / "step").read_text() == "4" and len(read_log(tmp_path / "out")) == 4
    monkeypatch.setattr(dpo, "loss_and_log", real)
    main(dpo, *arguments)
    main(dpo, *arguments[:-2 - len(TRAINING)], "--out", tmp_path / "whole", *TRAINING)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_another_policy_than_the_reference_is_refused(world, sampled, paired, tmp_path):  # noqa: F811
    arguments = ("--model", world / "base", "--pairs", paired / "pairs.jsonl", "--out", tmp_path / "out", *TRAINING)
    assert finish("03_pair_dpo", arguments, tmp_path / "log", death=(2, "before")) == -signal.SIGKILL
    stored = model.load_tensors(tmp_path / "out" / "reference.safetensors")
    model.save_tensors(tmp_path / "out" / "reference.safetensors", {"logprobs": stored["logprobs"] + torch.rand(5 * 2, 2, 3)})
    with pytest.raises(InputError, match=r"step 0: loss .* instead of 2·ln 2"):
        main(dpo, *arguments)


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")])
def test_out_of_memory_names_the_flag_that_helps(capsys, error):
    def main():
        raise error

    with pytest.raises(SystemExit) as ended:
        model.run(main, "--micro-batch 1")
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith("error: out of memory") and "--micro-batch 1" in said and said.count("\n") == 1


def test_other_errors_are_not_swallowed():
    def main():
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        model.run(main)


# --------------------------------------------------------------------------------------------- batches and processes


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_outputs_do_not_depend_on_the_batch(world, sampled, paired, tmp_path, batch):  # noqa: F811
    sampling(world, tmp_path / "samples", "--batch", batch)
    assert (tmp_path / "samples" / "samples.safetensors").read_bytes() == (sampled / "samples.safetensors").read_bytes()
    main(score, "--model", world / "base", "--samples", sampled, "--out", tmp_path / "pairs", *SCORING, "--batch", batch)
    for name in ("scores.jsonl", "pairs.jsonl"):
        assert (tmp_path / "pairs" / name).read_bytes() == (paired / name).read_bytes()


def test_stages_are_what_kills_runs():
    assert kills.STAGES["01_sample"].__file__ == sample.__file__
