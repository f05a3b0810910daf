"""A disk that several machines share and that shows files late: no record is lost, nothing hangs.

One of two processes is shown the others' files later than they are there, as NFS may do.
"""

import json
import os
import shutil
import subprocess
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from bench.kills import torchrun, tree
from conftest import ROOT, main, results_of
from hermesflow import runs
from hermesflow.states import State
from hermesflow.tables import load_tensors
from test_stages import SAMPLING, SCORING, input_of
from test_stages import dpo, paired, sampled, world  # noqa: F401

# one process sees others' results, the reference and the state LATE seconds after it asks first
SHIM = """
import os, pathlib, re, runpy, sys, time
sys.path.insert(0, {root!r})
from hermesflow import runs

RANK = os.environ["RANK"]
LATE = {late}
HIDDEN = re.compile(r"/[^/]+[.]log$|/reference[.]safetensors$|/state(?=/|$)")
runs.SETTLING = {settling}
asked = {{}}

def unseen(path):
    if RANK != "{blind}" or not isinstance(path, (str, os.PathLike)):
        return False
    found = HIDDEN.search(str(path))
    if not found or found[0].startswith(f"/{{RANK}}-{{os.getpid()}}-"):  # its own
        return False
    return time.monotonic() - asked.setdefault(found[0], time.monotonic()) < LATE

real_glob = pathlib.Path.glob
real_stat = os.stat

def glob(folder, pattern, **how):
    return [path for path in real_glob(folder, pattern, **how) if not unseen(path)]

def stat(path, **how):
    if unseen(path):
        raise FileNotFoundError(2, "No such file or directory", str(path))
    return real_stat(path, **how)

pathlib.Path.glob = glob
os.stat = stat
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def launch(tmp_path, *arguments, blind: int, late: float = 3, settling: float = 60,
           sharded: bool = False) -> subprocess.CompletedProcess:
    """A stage in two processes, of which number `blind` sees files late; two minutes at most."""
    shim = tmp_path / "shim.py"
    shim.write_text(SHIM.format(root=str(ROOT), blind=blind, late=late, settling=settling))
    sharding = ["tests/fsdp_on_cpu.py"] if sharded else []
    # a signal lets torchrun end its processes, which would outlive a kill
    command = ["timeout", "120", *torchrun(2, *sharding, shim, *arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5"}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


def lines_of(folder, but=()) -> list[str]:
    """The ids of the results in a folder of parts, one per line."""
    ids = []
    for file in sorted(folder.glob("*.log")):
        if file.name not in but:
            ids += [line.split("\t")[0] for line in file.read_text().splitlines()]
    return ids


# ------------------------------------------------------------------------------ samples and scores

# four of seven results are there; the parts stay, as nothing ends the stage
RECORDS = """
import sys
from types import SimpleNamespace
from hermesflow.runs import map_records
from hermesflow.outputs import run_main

def main():
    records = [SimpleNamespace(id=i) for i in "abcdefg"]
    results = map_records(lambda chunk: [{"id": r.id, "value": r.id * 2} for r in chunk], records,
                          sys.argv[1], 1, "work")
    if results is not None:
        print([r["value"] for r in results])

run_main(main)
"""


@pytest.fixture
def begun(tmp_path):
    """The script RECORDS, and its output folder with the results of an earlier run."""
    (tmp_path / "records.py").write_text(RECORDS)
    parts = tmp_path / "out" / "parts" / "work"
    parts.mkdir(parents=True)
    old = [f'{i}\t{{"id": "{i}", "value": "{i * 2}"}}\n' for i in "acdf"]
    (parts / "0-1-0.log").write_text("".join(old))
    return tmp_path / "records.py", tmp_path / "out"


def test_the_main_process_sees_results_late(begun, tmp_path):
    """It does again what it does not see, and waits for the rest."""
    done = launch(tmp_path, *begun, blind=0)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "['aa', 'bb', 'cc', 'dd', 'ee', 'ff', 'gg']\n"
    again = lines_of(begun[1] / "parts" / "work", but=["0-1-0.log"])
    assert sorted(again) == list("abcdefg")


def test_another_process_sees_results_late(begun, tmp_path):
    """It does its share of what the main process finds missing."""
    done = launch(tmp_path, *begun, blind=1)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "['aa', 'bb', 'cc', 'dd', 'ee', 'ff', 'gg']\n"
    parts = begun[1] / "parts" / "work"
    assert sorted(lines_of(parts, but=["0-1-0.log"])) == list("beg")
    shares = sorted(file.name[0] for file in parts.glob("*.log") if file.name != "0-1-0.log")
    assert shares == ["0", "1"]


def test_results_that_are_never_seen_end_in_one_line(begun, tmp_path):
    """The same command then continues from what is there."""
    done = launch(tmp_path, *begun, blind=0, late=100, settling=2)
    assert done.returncode == 1  # torchrun's; it reports the stage's own
    assert "exitcode  : 2" in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    parts = begun[1] / "parts" / "work"
    assert errors == [f"error: {parts}: what another process has written is not seen here after 2 "
                      "seconds; is the folder shared? The same command continues from here"]
    assert "KeyError" not in done.stderr and "InputError" not in done.stderr
    done = launch(tmp_path, *begun, blind=0, late=0)
    assert done.stdout == "['aa', 'bb', 'cc', 'dd', 'ee', 'ff', 'gg']\n", done.stderr[-3000:]


def test_samples_and_scores_are_the_same(world, sampled, paired, tmp_path):  # noqa: F811
    samples = world / "late-samples"  # beside the others: they name the images from there
    done = launch(tmp_path, "01_sample.py", *input_of(world), *SAMPLING, "--out", samples,
                  "--batch", 1, blind=0)
    assert done.returncode == 0, done.stderr[-3000:]
    assert results_of(samples) == results_of(sampled)
    pairs = world / "late-pairs"
    done = launch(tmp_path, "02_score.py", "--model", world / "base", "--samples", sampled,
                  "--out", pairs, *SCORING, blind=0)
    assert done.returncode == 0, done.stderr[-3000:]
    assert results_of(pairs) == results_of(paired)


# --------------------------------------------------------------------------------------- training

TRAINING = ("--steps", 5, "--batch", 4, "--micro-batch", 1, "--lr", 1e-3, "--device", "cpu",
            "--save-every", 2)


def training(world, out) -> tuple:  # noqa: F811
    return ("--model", world / "base", "--pairs", world / "pairs" / "pairs.jsonl", "--out", out,
            *TRAINING)


def read_losses(out) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "train.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(world, paired):  # noqa: F811
    """By one process, without an interruption."""
    main(dpo, *training(world, world / "whole"))
    return world / "whole"


@pytest.fixture(scope="module")
def half_done(world, paired):  # noqa: F811
    """Interrupted in step 4, with the state of step 4."""
    out = world / "half"
    real = State.save

    def save(state, step):
        real(state, step)
        if step == 4:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(State, "save", save)
        with pytest.raises(KeyboardInterrupt):
            main(dpo, *training(world, out))
    return out


@pytest.mark.parametrize("sharded, blind", [(False, 0), (True, 1)])
def test_the_reference_is_the_same(world, trained, half_done, tmp_path, sharded,  # noqa: F811
                                   blind):
    """Also where an earlier run has left an odd number of micro-batches, which one does not see."""
    out = tmp_path / "out"
    shutil.copytree(half_done, out, ignore=shutil.ignore_patterns("state", "train.jsonl"))
    logps = load_tensors(trained / "reference.safetensors")["logps"]
    (out / "reference.safetensors").unlink()
    (out / "reference").mkdir()
    with open(out / "reference" / "0-1-0.log", "w") as file:
        for visit in range(9):
            line = {"id": str(visit), "logps": logps[visit].tolist()}
            file.write(f"{visit}\t{json.dumps(line)}\n")
    done = launch(tmp_path, "03_pair_dpo.py", *training(world, out), blind=blind, sharded=sharded)
    assert done.returncode == 0, done.stderr[-3000:]
    found = load_tensors(out / "reference.safetensors")["logps"]
    if sharded:
        torch.testing.assert_close(found, logps, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(found, logps)
    assert read_losses(out) == pytest.approx(read_losses(trained), rel=1e-4)


def test_a_state_is_continued_by_all(world, trained, half_done, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    shutil.copytree(half_done, out)
    logged = (out / "train.jsonl").read_text()
    done = launch(tmp_path, "03_pair_dpo.py", *training(world, out), blind=1, sharded=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (out / "train.jsonl").read_text().startswith(logged) and logged.count("\n") == 4
    assert read_losses(out) == pytest.approx(read_losses(trained), rel=1e-4)


def test_a_state_that_is_never_seen_ends_in_one_line(world, half_done, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    shutil.copytree(half_done, out)
    done = launch(tmp_path, "03_pair_dpo.py", *training(world, out), blind=1, late=100, settling=2)
    assert done.returncode == 1 and "exitcode  : 2" in done.stderr, done.stderr[-3000:]
    assert (f"error: {out / 'state'}: what another process has written is not seen here after 2 "
            "seconds; is the folder shared? The same command continues from here\n") in done.stderr
    assert tree(out / "state") == tree(half_done / "state")


def state_of(out) -> State:
    net = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    return State(out, net, optimizer, scheduler, Accelerator(cpu=True))


def test_an_older_state_is_not_loaded(tmp_path, monkeypatch):
    """The main process has found step 4; the disk still shows step 2."""
    saved = state_of(tmp_path)
    saved.save(2)
    shutil.copytree(tmp_path / "state", tmp_path / "old")
    with torch.no_grad():
        saved.parameters["weight"].copy_(torch.tensor([[4.0, 5.0]]))
    saved.save(4)
    (tmp_path / "state").rename(tmp_path / "late")
    (tmp_path / "old").rename(tmp_path / "state")
    (tmp_path / "train.jsonl").write_text("".join(f'{{"step": {i}}}\n' for i in range(6)))
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        if len(slept) == 2:  # while it is replaced, there is none
            shutil.rmtree(tmp_path / "state")
        if len(slept) == 3:
            (tmp_path / "late").rename(tmp_path / "state")

    monkeypatch.setattr(State, "last_step", lambda state, steps: 4)
    monkeypatch.setattr(runs.time, "sleep", sleep)
    resumed = state_of(tmp_path)
    assert resumed.resume(6) == 4
    assert slept == [1, 1, 1]
    assert resumed.parameters["weight"].tolist() == [[4.0, 5.0]]
    assert (tmp_path / "train.jsonl").read_text().count("\n") == 4


def test_one_process_waits_for_nothing(begun, monkeypatch):
    monkeypatch.setattr(runs.time, "sleep", None)  # which nobody may call
    records = [SimpleNamespace(id=i) for i in "gfedcba"]
    asked = []

    def work(chunk):
        asked.extend(r.id for r in chunk)
        return [{"id": r.id, "value": r.id * 2} for r in chunk]

    results = runs.map_records(work, records, begun[1], 2, "work")
    assert [r["value"] for r in results] == ["gg", "ff", "ee", "dd", "cc", "bb", "aa"]
    assert asked == ["g", "e", "b"]
