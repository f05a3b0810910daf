"""Phases of a stage, what a run costs, and the job of a cluster whose commands only take notes."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F

from bench import cost, rehearsal
from conftest import ROOT
from hermesflow.weights import find_weights, read_tensors

# ------------------------------------------------------------------------------------------- phases


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still: seconds of the processor; the wall has had twice as many."""
    now = [0.0]
    monkeypatch.setattr(rehearsal.time, "process_time", lambda: now[0])
    monkeypatch.setattr(rehearsal.time, "perf_counter", lambda: 2 * now[0])
    monkeypatch.setattr(rehearsal, "peak_bytes", lambda: int(now[0]))
    return now


def test_the_innermost_phase_counts(clock):
    phases = rehearsal.Phases()

    def wait(seconds):
        clock[0] += seconds

    write = phases.during("writing", wait)

    def work():
        wait(10)
        write(100)
        wait(20)

    wait(1)
    phases.during("work", work)()
    wait(2)
    phases.note()
    assert phases.figures == {"start": [3, 6, 133], "inputs": [0, 0, 0], "loading": [0, 0, 0],
                              "work": [30, 60, 131], "writing": [100, 200, 111]}


def test_every_timed_function_is_there(clock, monkeypatch):
    for name in (*rehearsal.LIGHT, *rehearsal.HEAVY):
        module, _, path = name.partition(":")
        owner = __import__(module, fromlist=["x"])
        for part in path.split("."):
            owner = getattr(owner, part)
        assert callable(owner)
    for name in ("hermesflow.outputs:no_such", "hermesflow.outputs:Output.no.such"):
        with pytest.raises(SystemExit, match=f"error: {name} is no longer there"):
            rehearsal.Phases().replace({name: "work"})


def test_a_stage_is_timed_and_skipped(tmp_path):
    """As a process; its phases add up to its seconds."""
    rehearsal.write_records(tmp_path, 1)
    log = tmp_path / "log"
    options = ["--model", "toy/base", "--records", tmp_path / "records.jsonl", "--captions", 1,
               "--images", 1, "--steps", 1, "--max-new-tokens", 2, "--out", tmp_path / "samples"]
    command = [sys.executable, ROOT / "bench" / "rehearsal.py", "--log", log, "--stage",
               "01_sample.py", *options]
    for _ in range(2):
        subprocess.run(list(map(str, command)), check=True, capture_output=True, cwd=ROOT)
    first, second = map(json.loads, log.read_text().splitlines())
    assert (first["again"], second["again"]) == (False, True)
    assert all(cpu > 0 and peak > 0 for cpu, _, peak in first["phases"].values())
    assert second["phases"]["loading"] == second["phases"]["writing"] == [0, 0, 0]
    assert (tmp_path / "samples" / "samples.jsonl").exists()
    row = rehearsal.table(log).splitlines()
    assert len(row) == 3 and row[2].startswith("| 01_sample | ") and row[2].count("|") == 11


def test_products_in_float32(monkeypatch):
    """They are those of bfloat16, to its rounding, and so are their gradients."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(F, "linear", F.linear)  # put back afterwards
    torch.manual_seed(0)
    inputs = [torch.randn(2, 40, 64).bfloat16(), torch.randn(32, 64).bfloat16(), torch.randn(32)]

    def results():
        leaves = [t.clone().requires_grad_() for t in inputs]
        with torch.autocast("cpu", torch.bfloat16):
            product = F.linear(*leaves)
        product.float().square().sum().backward()
        return [product.detach(), *(t.grad for t in leaves)]

    native = results()
    rehearsal.multiply_in_float32()
    for ours, theirs in zip(results(), native):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).norm() < 0.02 * theirs.norm()


def test_a_missing_phase_is_said(tmp_path, monkeypatch, capsys):
    """A stage that no longer calls what is timed."""
    phases = {name: [1.0, 1.0, 1] for name in rehearsal.PHASES} | {"writing": [0, 0, 0]}
    log = tmp_path / "log"

    def run(command):
        figures = command[command.index("--figures") + 1]
        with open(figures, "w") as file:
            json.dump(phases | {"device": 0}, file)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(rehearsal.subprocess, "run", run)
    with pytest.raises(SystemExit, match="02_score.py has no writing"):
        rehearsal.measure(["02_score.py"], log)
    assert not log.exists()


def test_the_published_layout(tmp_path):
    weights = {f"layer.{i}": torch.full((5,), float(i)) for i in range(5)}  # 20 bytes each
    rehearsal.write_published(tmp_path / "one", {"a": 1}, weights, 100)
    assert find_weights(tmp_path / "one")[1] == [str(tmp_path / "one" / "pytorch_model.bin")]
    rehearsal.write_published(tmp_path / "three", {"a": 1}, weights, 40)
    index, files = find_weights(tmp_path / "three")
    assert index.endswith("pytorch_model.bin.index.json")
    names = [f"pytorch_model-0000{i}-of-00003.bin" for i in (1, 2, 3)]
    assert sorted(files) == [str(tmp_path / "three" / name) for name in names]
    assert json.loads((tmp_path / "three" / "config.json").read_text()) == {"a": 1}
    found = {}
    for file in files:
        found |= read_tensors(file)
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)


# --------------------------------------------------------------------------------------------- cost


def test_what_a_run_costs():
    """By hand: two records, three held-out ones, two rounds of ten steps."""
    tflop = cost.work(2, 3, 2, 10, lora=False)
    assert tflop["01"] == pytest.approx((2 * 2 * 4245, 2 * 2 * 1.42))
    assert tflop["02"] == pytest.approx((2 * 2 * 64, 2 * 2 * 16 * 2.63))
    assert tflop["03"] == pytest.approx((2 * 320 * 42.1, 0))
    assert tflop["04"] == pytest.approx((9 * (265 + 6.6), 9 * 2.63))
    assert cost.work(2, 3, 2, 10, lora=True)["03"] == pytest.approx((2 * 320 * 36.9, 0))

    card = cost.Card("", 24, bf16=100, tf32=50, lora=False)
    work = {"01": (3600.0, 1800.0), "03": (3600.0, 0.0)}
    # 36 + 36 s at 50 %, and 36 s at 25 %, on two cards
    assert cost.hours(work, card, 2, 0.5, 0.25) == pytest.approx({"01": 72 / 3600, "03": 72 / 3600})

    assert cost.training_memory(False) == pytest.approx(4 * 5.8 + 3.1)
    assert cost.training_memory(False, 8) == pytest.approx(2.9 + 3.1)
    assert cost.training_memory(True) == pytest.approx(4 * 0.0568 + 3.2 + 3.1)
    assert cost.disk(10000, 2, False) == pytest.approx((2 * (6.2 + 0.87), 2 * (6.2 + 0.87) + 34.8))


# ------------------------------------------------------------------------------------------ scripts

# every "node" waits in its stage and saves when it is told to end
SRUN = """#!/usr/bin/env bash
[[ $* == *--dry-run* ]] && exit
echo "srun $*" >> log
echo $$ > step
trap 'echo saved >> log; kill $!; exit 143' TERM
echo started >> log
sleep 30 & wait $!
"""
COMMANDS = {
    "srun": SRUN,
    "scancel": '#!/usr/bin/env bash\necho "scancel $*" >> log\nkill -TERM $(cat step)\n',
    "scontrol": '#!/usr/bin/env bash\n[ $1 = show ] && echo one && echo two\n'
                '[ $1 = show ] || echo "scontrol $*" >> log\n',
    "python": "#!/usr/bin/env bash\n",
}


@pytest.fixture
def cluster(tmp_path):
    """A function that starts the job in a folder with the loop and such commands."""
    for name, text in COMMANDS.items():
        command = tmp_path / "bin" / name
        command.parent.mkdir(exist_ok=True)
        command.write_text(text)
        command.chmod(0o755)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "run_selfplay.sh").write_text((ROOT / "run_selfplay.sh").read_text())
    clean = {k: v for k, v in os.environ.items() if k not in ("DPO", "LAUNCH", "LAUNCH_DPO")}
    environment = {**clean, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_NNODES": "2",
                   "SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "n[1-2]", "GPUS": "4",
                   "SLURM_SUBMIT_DIR": str(tmp_path), "OUT": "out"}
    started = []

    def start(**settings):
        command = ["bash", str(ROOT / "configs" / "slurm.sh"), "configs/toy.sh"]
        job = subprocess.Popen(command, env=environment | settings, start_new_session=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(job)
        return job

    yield start
    for job in started:
        if job.poll() is None:
            job.kill()


def test_a_job_that_runs_out_of_time_is_queued_again(cluster, tmp_path):
    job = cluster()
    log = tmp_path / "log"
    end = time.monotonic() + 60
    while not log.exists() or "started" not in log.read_text():
        assert time.monotonic() < end and job.poll() is None
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    job.communicate(timeout=60)
    assert job.returncode == 0
    lines = log.read_text().splitlines()
    assert lines[0].startswith("srun --kill-on-bad-exit=1 bash configs/slurm.sh on-node replicated "
                               "04_eval.py --model toy/base")
    # no other stage began, and the job waited for this one
    assert lines[1:] == ["started", "scancel --signal=TERM 77", "saved", "scontrol requeue 77"]


def test_a_job_that_fails_is_not_queued_again(cluster, tmp_path):
    (tmp_path / "bin" / "srun").write_text('#!/usr/bin/env bash\necho "$*" >> log\n'
                                           '[[ $* == *--dry-run* ]] || exit 3\n')
    job = cluster(DPO="--lr 1e-4")
    job.communicate(timeout=60)
    assert job.returncode == 3
    lines = (tmp_path / "log").read_text().splitlines()
    assert len(lines) == 5 and not any("requeue" in line for line in lines)
    # the stages' processes are on all nodes; of a step of 32, each of eight takes 4
    train = next(line for line in lines if "03_pair_dpo.py" in line)
    assert "on-node sharded 03_pair_dpo.py" in train
    assert " --micro-batch 4 --lr 1e-4 --dry-run" in train


def test_a_job_on_its_nodes(tmp_path):
    """Which launcher a node starts, and with which rank."""
    for name in ("torchrun", "accelerate", "sleep"):
        command = tmp_path / name
        command.write_text(f'#!/usr/bin/env bash\necho "{name} $*"\n')
        command.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_NNODES": "3",
                   "SLURM_NODEID": "1", "GPUS": "8", "HEAD": "one", "PORT": "20077", "SETTLE": "60"}

    def on_node(*arguments):
        command = ["bash", str(ROOT / "configs" / "slurm.sh"), "on-node", *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    assert on_node("replicated", "01_sample.py", "--batch", "4") == [
        "sleep 60", "torchrun --nnodes 3 --nproc-per-node 8 --node-rank 1 --master-addr one "
        "--master-port 20077 01_sample.py --batch 4"]
    assert on_node("sharded", "03_pair_dpo.py", "--dry-run") == [
        "accelerate launch --config_file configs/fsdp.yaml --num_machines 3 --num_processes 24 "
        "--machine_rank 1 --main_process_ip one --main_process_port 20077 03_pair_dpo.py --dry-run"]


@pytest.mark.parametrize("arguments, settings", [
    (["a", "b"], {}), ([""], {}), ([], {"COUNTS": "many"}),
])
def test_a_rehearsal_refuses_settings(arguments, settings, tmp_path):
    command = ["bash", str(ROOT / "bench" / "rehearsal.sh"), *arguments]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1 and not done.stdout
