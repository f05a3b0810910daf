"""--lora: adapters beside the linear layers, and the ordinary checkpoint that they become."""

import json
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from conftest import ROOT, main, results_of, stage
from hermesflow import lora, training_options
from hermesflow.files import InputError
from hermesflow.jsonl import read_jsonl
from hermesflow.lora import add_adapters, merge_adapters
from hermesflow.outputs import exit_if_complete, run_main
from hermesflow.records import Pair
from hermesflow.tables import load_tensors, save_tensors, write_table
from model import load, save
from test_training import (OPTIONS, STEPS, after, dpo, launch, pair_rows, raise_signal, read_log,
                           refuse, restored_precision)
from tiny import tiny_model

pytest.importorskip("peft")
RANK = 3
LORA = ("--lora", RANK, "--lr", 1e-2)
LINEAR = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.dense", "mlp.fc1",
          "mlp.fc2")
WEIGHTS = "pytorch_model.safetensors"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    save(tiny_model(), folder / "base")
    write_table(folder / "pairs.jsonl", pair_rows())
    return ("--model", folder / "base", "--pairs", folder / "pairs.jsonl")


def train(inputs, out, *more):
    main(dpo, *inputs, *OPTIONS, *LORA, "--out", out, *more)
    return out


@pytest.fixture(scope="module")
def trained(inputs, tmp_path_factory):
    """The folder of an uninterrupted run, and the weights of its network with adapters."""
    merged = []

    def merge(net, weights):
        merged.append({name: value.clone() for name, value in weights.items()})
        return merge_adapters(net, weights)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(dpo, "merge_adapters", merge)
        out = train(inputs, tmp_path_factory.mktemp("trained") / "out")
    return out, merged[0]


def first_batch(model, inputs):
    pairs = read_jsonl(inputs[3], Pair)
    return dpo.make_batch(model, [dpo.Visit(pairs[i], 0) for i in range(4)], (0, 1), 0.0, 0.0)


@torch.no_grad()
def log_probs(model, inputs) -> torch.Tensor:
    und, gen = model.pair_logps(*first_batch(model, inputs))
    return torch.stack([und.sums, gen.sums])  # (2, B, 2)


# -------------------------------------------------------------------------------------- the network


def test_adapters_lie_beside_the_linear_layers_and_change_nothing_yet(inputs):
    model = load(inputs[1])
    before = log_probs(model, inputs)
    state = torch.get_rng_state()
    add_adapters(model.net, RANK, (0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(log_probs(model, inputs), before)

    trained = {name: p for name, p in model.net.named_parameters() if p.requires_grad}
    expected = {f"showo.model.layers.{i}.{name}.lora_{part}.default.weight"
                for i in range(2) for name in LINEAR for part in "AB"}
    assert set(trained) == expected
    shapes = {"q_proj": (32, 32), "k_proj": (32, 32), "v_proj": (32, 32), "dense": (32, 32),
              "fc1": (64, 32), "fc2": (32, 64)}
    for name, p in trained.items():
        wide, narrow = shapes[name.split(".")[-4]]
        assert p.shape == ((RANK, narrow) if "lora_A" in name else (wide, RANK))
        assert p.dtype == torch.float32
        if "lora_B" in name:
            assert not p.any()
        else:
            assert 0.8 < p.abs().max() * narrow**0.5 < 1 and abs(p.mean()) * narrow**0.5 < 0.2


def test_adapters_begin_as_their_seed_says(inputs):
    def begin(*seed):
        net = load(inputs[1]).net
        add_adapters(net, RANK, seed)
        return {name: p for name, p in net.named_parameters() if "lora_A" in name}

    one = begin(0, 1)
    assert all(torch.equal(p, one[name]) for name, p in begin(0, 1).items())
    assert not any(torch.equal(p, one[name]) for name, p in begin(0, 2).items())
    q, k = (one[f"showo.model.layers.0.self_attn.{n}_proj.lora_A.default.weight"] for n in "qk")
    assert not torch.equal(q, k)


# ---------------------------------------------------------------------------------- the checkpoint


def test_the_checkpoint_is_an_ordinary_one(inputs, trained):
    """The names and types of full training; only the linear layers' matrices have changed."""
    out, _ = trained
    base = load_file(inputs[1] / WEIGHTS)
    found = load_file(out / "checkpoint" / WEIGHTS)
    assert {n: (v.shape, v.dtype) for n, v in found.items()} == {
        n: (v.shape, v.dtype) for n, v in base.items()}
    changed = {name for name in base if not torch.equal(base[name], found[name])}
    assert changed == {f"showo.model.layers.{i}.{name}.weight" for i in range(2) for name in LINEAR}
    assert {p.name for p in (out / "checkpoint").iterdir()} == {p.name for p in inputs[1].iterdir()}


def test_merged_log_probs_are_those_with_adapters(inputs, trained):
    out, weights = trained
    adapted = load(inputs[1])
    base = log_probs(adapted, inputs)
    add_adapters(adapted.net, RANK, (0, 1))
    adapted.net.load_state_dict(weights)
    expected = log_probs(adapted, inputs)
    found = log_probs(load(out / "checkpoint"), inputs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (expected - base).abs().mean() > 0.1
    # what training itself saw last is near: log-probs of winners have gone up
    assert read_log(out)[-1]["accuracy_und"] == 1.0


def test_stage_1_draws_from_it(trained, tmp_path):
    main(stage("01_sample"), "--model", trained[0] / "checkpoint", "--prompt", "a big red ring",
         "--steps", 4, "--guidance", 0, "--device", "cpu", "--out", tmp_path)
    assert (tmp_path / "prompt.png").stat().st_size > 100


# ---------------------------------------------------------------------------- reference and options


def test_the_reference_is_the_model_without_adapters(inputs, trained):
    """As full training computes it, bit by bit, and so the first step is at 2 ln 2."""
    out, _ = trained
    logps = load_tensors(out / "reference.safetensors")["logps"]
    pairs = read_jsonl(inputs[3], Pair)
    order = dpo.training_order(pairs, STEPS, 4, dpo.stable_seed(0, 1))
    model = load(inputs[1])
    visits = [dpo.Visit(pairs[i], epoch) for i, epoch in order[:2].tolist()]
    with torch.no_grad():
        und, gen = model.pair_logps(*dpo.make_batch(model, visits, (0, 1), 0.1, 0.0))
    assert torch.equal(logps[:2], torch.stack([und.sums, gen.sums], 1))
    first = read_log(out)[0]
    assert first["margin_und"] == first["margin_gen"] == first["win_change_gen"] == 0.0


def test_another_reference(inputs, trained, tmp_path):
    """A copy of the policy is the same reference; a third model is another one."""
    copy = train(inputs, tmp_path / "copy", "--reference", inputs[1])
    assert read_log(copy) == read_log(trained[0])
    save(tiny_model(seed=1), tmp_path / "other")
    other = train(inputs, tmp_path / "out", "--reference", tmp_path / "other", "--steps", 1)
    assert abs(read_log(other)[0]["margin_gen"]) > 0.1


def test_a_reference_of_another_policy_stops_step_0(inputs, tmp_path, monkeypatch):
    out = tmp_path / "out"
    after(monkeypatch, 2 * STEPS + 1, refuse)  # in training, when the reference is there
    with pytest.raises(KeyboardInterrupt):
        train(inputs, out)
    monkeypatch.undo()
    file = out / "reference.safetensors"
    save_tensors(file, {"logps": load_tensors(file)["logps"] * 1.001})
    with pytest.raises(InputError, match="another policy"):
        train(inputs, out)


def test_the_rank_is_compared_and_outputs_without_it_are_complete(inputs, trained, tmp_path):
    out, _ = trained
    arguments = [str(a) for a in (*inputs, *OPTIONS, *LORA, "--out", out)]
    for option, named in ((["--lora", "4"], "--lora 3 -> 4"), ([], None)):
        output = dpo.output_of(dpo.parse_args(arguments + option))
        with pytest.raises(InputError if named else SystemExit) as ended:
            exit_if_complete(output)
        assert named is None or named in str(ended.value)
    assert json.loads((out / "settings.json").read_text())["settings"]["lora"] == "3"
    # as outputs of versions without adapters
    full = dpo.output_of(dpo.parse_args([str(a) for a in (*inputs, "--out", tmp_path)]))
    assert "lora" not in full.args


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "nan", "all"])
def test_a_rank_is_a_whole_number(capsys, value):
    with pytest.raises(SystemExit) as ended:
        dpo.parse_args(["--pairs", "p", "--out", "o", "--lora", value])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and "argument --lora" in error and error.count("\n") == 1


def test_without_peft_one_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(training_options.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as ended:
        dpo.parse_args(["--pairs", "p", "--out", "o", "--lora", "16", "--dry-run"])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1
    assert "argument --lora: peft is not installed: pip install peft" in error


def test_the_rank_is_checked_without_torch_or_peft(tmp_path):
    code = ("import sys, runpy; sys.argv = sys.argv[1:]\n"
            "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
            "finally: print({'torch', 'peft'} & set(sys.modules))")
    command = [sys.executable, "-c", code, ROOT / "03_pair_dpo.py", "--pairs", "p", "--out",
               tmp_path, "--lora", "16", "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stdout.strip() == "set()", done.stderr


# ------------------------------------------------------------------------------- precision, memory


def test_frozen_matrices_in_bfloat16_train_to_the_same_bytes(inputs, tmp_path, monkeypatch,
                                                             restored_precision):
    """Autocast would round them at every step; the merge is of the file's float32 weights."""
    AcceleratorState._reset_state()
    half = train(inputs, tmp_path / "half", "--precision", "bf16")
    monkeypatch.setattr(lora, "HALF", {})
    whole = train(inputs, tmp_path / "whole", "--precision", "bf16")
    assert results_of(half) == results_of(whole)


def test_only_frozen_matrices_are_rounded(inputs):
    net = load(inputs[1]).net
    add_adapters(net, RANK, (0, 1), "bf16")
    for name, p in net.named_parameters():
        linear = "base_layer" in name or "lm_head" in name
        assert p.dtype == (torch.bfloat16 if linear else torch.float32), name


def test_the_merge_does_not_round(inputs, tmp_path, monkeypatch):
    """An update far below bfloat16's resolution reaches the checkpoint."""
    net = load(inputs[1]).net
    name = "showo.model.layers.0.mlp.fc1"
    A = torch.randn(RANK, 32) * 1e-2
    B = torch.randn(64, RANK) * 1e-3
    before = net.get_parameter(f"{name}.weight").clone()
    merged = merge_adapters(net, {f"{name}.lora_A.default.weight": A,
                                  f"{name}.lora_B.default.weight": B})
    change = merged[f"{name}.weight"] - before
    torch.testing.assert_close(change, 2 * B @ A, rtol=0, atol=1e-6)
    assert change.abs().max() < before.abs().mean() * 2**-9 and change.abs().max() > 1e-5


def test_a_rank_above_the_width_is_refused(inputs, tmp_path, capsys):
    """The network is 32 wide; its outermost matrices are (64, 32)."""
    add_adapters(load(inputs[1]).net, 32, (0, 1))
    options = [str(a) for a in (*inputs, *OPTIONS, "--lora", 33, "--out", tmp_path / "out")]
    with pytest.raises(SystemExit) as end:
        run_main(lambda: dpo.main(dpo.parse_args(options)))
    assert end.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: --lora 33: the network is 32 wide; a rank is at most that")


def test_gradient_checkpointing_changes_nothing(inputs, trained, tmp_path):
    out = train(inputs, tmp_path / "out", "--gradient-checkpointing")
    assert results_of(out) == results_of(trained[0])


# --------------------------------------------------------------------------- states and processes


@pytest.fixture(scope="module")
def half_done(inputs, tmp_path_factory):
    """A run that has ended after three steps, with its state."""
    out = tmp_path_factory.mktemp("half") / "out"
    with pytest.MonkeyPatch.context() as monkeypatch:
        after(monkeypatch, 2 * STEPS + 2 * 3, raise_signal(signal.SIGTERM))
        with pytest.raises(SystemExit):
            train(inputs, out)
    assert (out / "state" / "step").read_text() == "3"
    return out


def test_a_state_holds_the_adapters_alone(half_done):
    tensors = load_tensors(half_done / "state" / "00000.safetensors")
    names = {name.split(" ")[1] for name in tensors}
    assert len(names) == 2 * len(LINEAR) * 2 and all("lora_" in name for name in names)
    keys = {name.split(" ")[0] for name in tensors}
    assert keys == {"weight", "step", "exp_avg", "exp_avg_sq"}
    count = sum(p.numel() for name, p in tensors.items() if name.startswith("weight "))
    assert count == 2 * RANK * (4 * (32 + 32) + 2 * (32 + 64))


def test_a_state_continues_to_the_same_bytes(inputs, trained, half_done, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(half_done, out)
    train(inputs, out)
    assert results_of(out) == results_of(trained[0])


@pytest.mark.parametrize("sharded", [False, True])
def test_two_processes_continue_what_one_began(inputs, trained, half_done, tmp_path, sharded):
    out = tmp_path / "out"
    shutil.copytree(half_done, out)
    done = launch(tmp_path, 2, inputs, out, *LORA, sharded=sharded)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [line["loss"] for line in read_log(trained[0])]
    assert [line["loss"] for line in read_log(out)] == pytest.approx(losses, rel=1e-5)
    found = load_file(out / "checkpoint" / WEIGHTS)
    for name, value in load_file(trained[0] / "checkpoint" / WEIGHTS).items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=2e-4)


def test_one_process_continues_what_two_began_sharded(inputs, trained, tmp_path):
    out = tmp_path / "out"
    done = launch(tmp_path, 2, inputs, out, *LORA, sharded=True, at=2)
    assert (out / "state" / "step").read_text() == "2", done.stderr[-3000:]
    train(inputs, out)
    losses = [line["loss"] for line in read_log(trained[0])]
    assert [line["loss"] for line in read_log(out)] == pytest.approx(losses, rel=1e-5)
