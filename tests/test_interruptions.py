"""Kills, full disks, changed inputs, locks, guards: nothing lost, nothing mixed.

bench/drill.py does more of it, at random.
"""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import kills
from bench.kills import finish, tree
from conftest import ROOT, main
from hermesflow import outputs
from hermesflow.files import InputError, read_object
from hermesflow.jsonl import read_jsonl
from hermesflow.outputs import run_main
from hermesflow.records import Pair
from hermesflow.tables import load_tensors, save_tensors
from test_stages import SAMPLING, SCORING, input_of, read_log, sampling, scoring
from test_stages import dpo, paired, sample, sampled, world  # noqa: F401

TRAINING = ("--steps", 5, "--batch", 2, "--micro-batch", 1, "--lr", 1e-3, "--device", "cpu",
            "--save-every", 2)


def command(name: str, world, out) -> list:  # noqa: F811
    """The arguments of a stage that reads what the fixtures made."""
    base = world / "base"
    commands = {
        "01_sample": [*input_of(world), *SAMPLING, "--batch", 2],
        "02_score": ["--model", base, "--samples", world / "samples", *SCORING, "--batch", 2],
        "03_pair_dpo": ["--model", base, "--pairs", world / "pairs" / "pairs.jsonl", *TRAINING],
        "04_eval": [*input_of(world), "--judge", "self", "--steps", 2, "--max-new-tokens", 2,
                    "--show", 2],
    }
    return [*commands[name], "--out", out]


DEATHS = [(0, "half"), (0, "append"), (0, "half"), (1, "before"), (1, "after"), (2, "before"),
          (1, "append"), (3, "half")]


@pytest.mark.parametrize("name", ["01_sample", "02_score", "03_pair_dpo", "04_eval"])
def test_killed_at_every_kind_of_write(world, sampled, paired, tmp_path, name):  # noqa: F811
    """kill -9 at the 1st, 2nd, 3rd, … file, half written, written, renamed; then the same again."""
    log = tmp_path / "log"
    whole = tmp_path / "whole"
    killed = tmp_path / "killed"
    assert finish(name, command(name, world, whole), log) == 0, log.read_text()
    codes = []
    for death in DEATHS:
        codes.append(finish(name, command(name, world, killed), log, death=death))
    assert set(codes) <= {-signal.SIGKILL, 0}, (codes, log.read_text())
    assert codes.count(-signal.SIGKILL) >= 4, (codes, log.read_text())
    assert finish(name, command(name, world, killed), log) == 0, log.read_text()
    assert tree(killed) == tree(whole)


@pytest.mark.parametrize("name", ["01_sample", "03_pair_dpo"])
def test_full_disk(world, sampled, paired, tmp_path, name):  # noqa: F811
    log = tmp_path / "log"
    whole = tmp_path / "whole"
    full = tmp_path / "full"
    assert finish(name, command(name, world, whole), log) == 0
    for largest in (1500, 20_000):
        assert finish(name, command(name, world, full), log, largest_file=largest) == 2
        lines = log.read_text().replace("\r", "\n").strip().split("\n")
        assert lines[-1].startswith("error: ") and "cannot write" in lines[-1]
        assert "File too large" in lines[-1] and str(full) in lines[-1]
        assert not any("Traceback" in line for line in lines)
    assert finish(name, command(name, world, full), log) == 0
    assert tree(full) == tree(whole)


def test_output_that_cannot_be_written(world, sampled):  # noqa: F811
    for out in ("/proc/nobody/here", world / "0.jpg" / "out"):
        with pytest.raises(InputError, match="cannot write"):
            sampling(world, out)


# ----------------------------------------------------------------------------------- changed inputs


def test_changed_inputs_are_noticed(world, tmp_path, monkeypatch):  # noqa: F811
    """Another argument, an edited record, image or weight, another format.

    It is named, and nothing is touched.
    """
    for name in ("base", "initial_data.json", "vqa_data.json", *(f"{i}.jpg" for i in range(6))):
        subprocess.run(["cp", "-r", world / name, tmp_path / name], check=True)
    out = tmp_path / "out"
    sampling(tmp_path, out)
    before = tree(out)

    def refused(named):
        with pytest.raises(InputError, match="other settings.*" + named):
            sampling(tmp_path, out)
        assert tree(out) == before

    base = tmp_path / "base"
    inputs = [
        (tmp_path / "initial_data.json", b"caption\": \"", b"caption\": \"the ", "--records"),
        (tmp_path / "3.jpg", None, b" ", "--records"),
        (base / "pytorch_model.safetensors", None, b" ", "--model"),
        (base / "tokenizer" / "tokenizer.json", None, b" ", "--model"),
    ]
    for path, old, new, named in inputs:
        good = path.read_bytes()
        path.write_bytes(good.replace(old, new, 1) if old else good + new)
        assert path.read_bytes() != good
        refused(f"content of {named}")
        path.write_bytes(good)
    with pytest.raises(InputError, match="seed 0 -> 1"):
        sampling(tmp_path, out, "--seed", 1)
    old = read_object(out / "settings.json")["format"]
    monkeypatch.setattr(outputs, "FORMAT", "99")
    with pytest.raises(InputError, match=rf"another version \(format {old} -> 99\)"):
        sampling(tmp_path, out)
    assert tree(out) == before
    sampling(tmp_path, out, "--overwrite")
    after = tree(out)
    del before["settings.json"], after["settings.json"]
    assert after == before


def test_changed_pairs_are_noticed(world, sampled, paired, tmp_path):  # noqa: F811
    shutil.copytree(paired, tmp_path / "pairs")
    pairs = tmp_path / "pairs" / "pairs.jsonl"
    arguments = ("--model", world / "base", "--pairs", pairs, "--out", tmp_path / "out", *TRAINING)
    main(dpo, *arguments)
    pairs.write_text(pairs.read_text().replace("0.75", "0.76") + "\n")
    with pytest.raises(InputError, match="content of --pairs"):
        main(dpo, *arguments)


# -------------------------------------------------------------------------------------------- locks

HOLD = """
import pathlib, sys, time
sys.path.insert(0, sys.argv[1])
from hermesflow.files import lock
lock(pathlib.Path(sys.argv[2]))
print("held", flush=True)
time.sleep(600)
"""


def test_one_run_at_a_time(world, tmp_path):  # noqa: F811
    """A second run says who holds the folder; a lock whose holder was killed holds nothing."""
    out = tmp_path / "out"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, ROOT, out], stdout=subprocess.PIPE,
                              text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=f"out: in use by process {holder.pid} on "):
            sampling(world, out)
        assert os.listdir(out) == [".run"]
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    sampling(world, out)
    assert (out / "samples.jsonl").exists()


# ---------------------------------------------------------------------------------- training guards


def test_a_nan_loss_stops(world, sampled, paired, tmp_path, monkeypatch):  # noqa: F811
    real = dpo.pair_dpo
    calls = []

    def broken(*logps, **weights):
        loss, log = real(*logps, **weights)
        calls.append(1)
        if len(calls) == 9:  # in step 4 of 0 … 4, two micro-batches each
            loss = loss * torch.nan
            log["loss"] = loss
        return loss, log

    monkeypatch.setattr(dpo, "pair_dpo", broken)
    out = tmp_path / "out"
    arguments = ("--model", world / "base", "--pairs", paired / "pairs.jsonl", *TRAINING)
    with pytest.raises(InputError, match=r"step 4: loss nan.*records 10\d"):
        main(dpo, *arguments, "--out", out)
    assert (out / "state" / "step").read_text() == "4" and len(read_log(out)) == 4
    monkeypatch.setattr(dpo, "pair_dpo", real)
    main(dpo, *arguments, "--out", out)
    main(dpo, *arguments, "--out", tmp_path / "whole")
    assert tree(out) == tree(tmp_path / "whole")


def test_another_policy_than_the_reference_is_refused(world, sampled, paired,  # noqa: F811
                                                      tmp_path):
    out = tmp_path / "out"
    arguments = ("--model", world / "base", "--pairs", paired / "pairs.jsonl", "--out", out,
                 *TRAINING)
    death = (2, "before")
    assert finish("03_pair_dpo", arguments, tmp_path / "log", death=death) == -signal.SIGKILL
    file = out / "reference.safetensors"
    logps = load_tensors(file)["logps"]  # (visits, 2, 2)
    save_tensors(file, {"logps": logps + torch.rand(5 * 2, 2, 2)})
    with pytest.raises(InputError, match=r"step 0: log-probs are .* of another policy"):
        main(dpo, *arguments)


OUT_OF_MEMORY = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_out_of_memory_names_the_flag_that_helps(capsys, error):
    def main():
        raise error

    with pytest.raises(SystemExit) as ended:
        run_main(main, "--micro-batch 1")
    printed = capsys.readouterr().err
    assert ended.value.code == 2
    assert printed.startswith("error: out of memory") and "--micro-batch 1" in printed
    assert printed.count("\n") == 1


def test_other_errors_are_not_swallowed():
    def main():
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        run_main(main)


# --------------------------------------------------------------------------- batches and processes


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_outputs_do_not_depend_on_the_batch(world, sampled, paired, tmp_path, batch):  # noqa: F811
    sampling(world, tmp_path / "samples", "--batch", batch)
    file = "samples-00000.safetensors"
    assert (tmp_path / "samples" / file).read_bytes() == (sampled / file).read_bytes()
    scoring(world, sampled, tmp_path / "pairs", "--batch", batch)
    scores = "scores.jsonl"
    assert (tmp_path / "pairs" / scores).read_bytes() == (paired / scores).read_bytes()
    pairs = read_jsonl(tmp_path / "pairs" / "pairs.jsonl", Pair)
    assert list(pairs) == list(read_jsonl(paired / "pairs.jsonl", Pair))
    tensors = "pairs-00000.safetensors"
    assert (tmp_path / "pairs" / tensors).read_bytes() == (paired / tensors).read_bytes()


def test_stages_are_what_kills_runs():
    assert kills.ROOT / "01_sample.py" == Path(sample.__file__).resolve()
