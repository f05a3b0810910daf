"""What is watched of training: gradients of the halves, previews, trackers; weights stay."""

import inspect
import json
import signal
import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec
from types import ModuleType

import numpy as np
import pytest
import torch
from accelerate import tracking
from accelerate.state import AcceleratorState
from PIL import Image

from conftest import main, results_of
from hermesflow import watching
from hermesflow.jsonl import read_jsonl
from hermesflow.options import ImageSampling
from hermesflow.pictures import image_grid, to_pil
from hermesflow.records import Pair
from hermesflow.sampling import stable_seed
from hermesflow.tables import write_table
from model import Model, load, save
from test_training import (OPTIONS, STEPS, after, dpo, in_float16, launch, pair_rows, raise_signal,
                           read_log, restored_precision)
from tiny import tiny_model

HALVES = ("grad_norm_und", "grad_norm_gen", "grad_cosine")
COLOURS = ("red", "blue", "green", "white", "black", "pink", "grey", "teal", "gold")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Twelve pairs of nine texts, of which the second and third are one."""
    folder = tmp_path_factory.mktemp("watching")
    save(tiny_model(), folder / "base")
    rows = []
    for i, (pair, tensors) in enumerate(pair_rows(12)):
        colour = COLOURS[max(0, i - 1) % 9]
        rows.append((replace(pair, caption=f"a {colour} ring"), tensors))
    write_table(folder / "pairs.jsonl", rows)
    return ("--model", folder / "base", "--pairs", folder / "pairs.jsonl")


def train(inputs, out, *more):
    main(dpo, *inputs, *OPTIONS, "--out", out, *more)
    return out


@pytest.fixture(scope="module")
def plain(inputs, tmp_path_factory):
    """A run that nobody watches."""
    return train(inputs, tmp_path_factory.mktemp("plain") / "out")


@pytest.fixture(scope="module")
def measured(inputs, tmp_path_factory):
    return train(inputs, tmp_path_factory.mktemp("measured") / "out", "--grad-norms-every", 2)


def same_weights(out, plain) -> bool:
    files = {name: digest for name, digest in results_of(out).items() if "checkpoint" in name}
    return bool(files) and files.items() <= results_of(plain).items()


def without(log: list[dict], *names) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in names} for line in log]


# ------------------------------------------------------------------------- gradients of the halves


def gradients(inputs, und: float, gen: float) -> tuple[torch.Tensor, torch.Tensor]:
    """By autograd on the whole first batch: u of the understanding half, and g, flat."""
    model = load(inputs[1])
    pairs = read_jsonl(inputs[3], Pair)
    order = dpo.training_order(pairs, STEPS, 4, stable_seed(0, 1))[:4]
    visits = [dpo.Visit(pairs[i], epoch) for i, epoch in order.tolist()]
    logps = model.pair_logps(*dpo.make_batch(model, visits, (0, 1), 0.1, 0.0))
    reference = torch.stack([half.sums.detach() for half in logps], 1)
    found = []
    for half, weight in (("und", und), ("gen", gen)):
        delta = dpo.margins(logps[half == "gen"].sums, reference[:, int(half == "gen")])
        loss = weight * dpo.dpo_loss(delta, 0.2).mean()
        if half == "gen":
            loss = loss - weight * 0.1 * (logps[1].sums / logps[1].counts)[:, 0].mean()
        grads = torch.autograd.grad(loss, [*model.net.parameters()], retain_graph=True)
        found.append(torch.cat([g.flatten() for g in grads]).double())
    return tuple(found)


def expected_halves(inputs, und: float = 1.0, gen: float = 1.0) -> list:
    u, g = gradients(inputs, und, gen)
    return [pytest.approx(u.norm().item(), rel=1e-4), pytest.approx(g.norm().item(), rel=1e-4),
            pytest.approx((u @ g / u.norm() / g.norm()).item(), abs=1e-4)]


def test_halves_are_measured_every_so_many_steps(measured):
    log = read_log(measured)
    assert [step for step in range(STEPS) if set(HALVES) & set(log[step])] == [1, 3, 5]
    for line in log[1::2]:
        und, gen, cosine = (line[name] for name in HALVES)
        whole = (und**2 + gen**2 + 2 * und * gen * cosine) ** 0.5
        assert line["grad_norm"] == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("options, und, gen", [
    ((), 1.0, 1.0), (("--clip", 1e-3, "--micro-batch", 1), 1.0, 1.0),
    (("--und", 0.01, "--gen", 3), 0.01, 3.0),
])
def test_halves_are_those_of_autograd(inputs, tmp_path, options, und, gen):
    """Of the whole step, with their weights, and not clipped."""
    log = read_log(train(inputs, tmp_path / "out", "--grad-norms-every", 1, "--steps", 1, *options))
    assert [log[0][name] for name in HALVES] == expected_halves(inputs, und, gen)


def test_a_half_that_is_off_has_no_direction(inputs, tmp_path):
    log = read_log(train(inputs, tmp_path / "out", "--grad-norms-every", 1, "--steps", 1,
                         "--gen", 0))
    assert log[0]["grad_norm_gen"] == log[0]["grad_cosine"] == 0.0
    assert log[0]["grad_norm_und"] == pytest.approx(log[0]["grad_norm"], rel=1e-5)


def test_a_measured_run_trains_the_same_bytes(plain, measured):
    assert same_weights(measured, plain)
    assert without(read_log(measured), *HALVES) == read_log(plain)


@pytest.mark.parametrize("sharded", [False, True])
def test_halves_of_several_processes(inputs, measured, tmp_path, sharded):
    out = tmp_path / "out"
    done = launch(tmp_path, 2, inputs, out, "--grad-norms-every", 2, sharded=sharded)
    assert done.returncode == 0, done.stderr[-3000:]
    for line, expected in zip(read_log(out), read_log(measured), strict=True):
        for name in {"loss", "grad_norm", *HALVES} & set(expected):
            assert line[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-4), name


def test_halves_are_without_the_scale_of_float16(inputs, tmp_path, monkeypatch, restored_precision):
    in_float16(monkeypatch, 2.0**8)
    log = read_log(train(inputs, tmp_path / "out", "--grad-norms-every", 1, "--steps", 1))
    assert log[0]["skipped"] == 0.0 and log[0]["scale"] == 2.0**8
    u, g = gradients(inputs, 1.0, 1.0)
    assert log[0]["grad_norm_und"] == pytest.approx(u.norm().item(), rel=0.02)
    assert log[0]["grad_norm_gen"] == pytest.approx(g.norm().item(), rel=0.02)


def test_a_skipped_step_has_no_norms(inputs, tmp_path, monkeypatch, restored_precision):
    in_float16(monkeypatch, 2.0**30)
    log = read_log(train(inputs, tmp_path / "out", "--grad-norms-every", 1, "--steps", 2))
    assert log[0]["skipped"] == 1.0
    assert [log[0][name] for name in ("grad_norm", *HALVES)] == [0.0] * 4


# --------------------------------------------------------------------------------------- previews


@pytest.fixture(scope="module")
def shown(inputs, tmp_path_factory):
    out = tmp_path_factory.mktemp("shown") / "out"
    return train(inputs, out, "--preview-every", 3, "--preview-guidance", 1.5)


def test_a_preview_is_what_the_policy_draws_of_the_first_texts(inputs, shown):
    """Step 0 is the base; texts are different ones, seeds are those of (seed, id)."""
    texts = [f"a {colour} ring" for colour in COLOURS[:8]]
    seeds = [stable_seed(0, f"r{i}", "preview") for i in (0, 2, 3, 4, 5, 6, 7, 8)]
    for step, folder in ((0, inputs[1]), (6, shown / "checkpoint")):
        model = load(folder)
        codes = model.generate_images(texts, seeds, ImageSampling(16, 1.5))
        pictures = to_pil(model.decode_image(codes))
        expected = image_grid([[picture] for picture in pictures], texts, columns=4)
        with Image.open(shown / "previews" / f"{step:06d}.png") as sheet:
            assert np.array_equal(np.asarray(sheet), np.asarray(expected))
    names = sorted(p.name for p in (shown / "previews").iterdir())
    assert names == ["000000.png", "000003.png", "000006.png"]


def test_previews_train_the_same_bytes(plain, shown):
    assert same_weights(shown, plain) and read_log(shown) == read_log(plain)


@pytest.mark.parametrize("options", [("--precision", "bf16"), ("--gradient-checkpointing",),
                                     ("--lora", 2)])
def test_previews_leave_modes_and_random_states(inputs, tmp_path, monkeypatch, restored_precision,
                                                options):
    if "--lora" in options:
        pytest.importorskip("peft")
    AcceleratorState._reset_state()
    real = watching.Previews.draw
    drawn = []

    def draw(self, step):
        before = torch.get_rng_state()
        real(self, step)
        assert torch.equal(torch.get_rng_state(), before)
        net = self.model.net
        assert all(module.training for module in net.modules()) and not torch.is_autocast_enabled()
        assert all(p.grad is None for p in net.parameters())
        drawn.append(step)

    monkeypatch.setattr(watching.Previews, "draw", draw)
    out = train(inputs, tmp_path / "out", "--preview-every", 1, "--steps", 2, *options)
    assert drawn == [0, 1, 2] and len(list((out / "previews").iterdir())) == 3
    bare = train(inputs, tmp_path / "bare", "--steps", 2, *options)
    assert same_weights(out, bare) and read_log(out) == read_log(bare)


def test_an_interrupted_run_draws_what_is_missing(inputs, shown, tmp_path, monkeypatch):
    out = tmp_path / "out"
    preview = ("--preview-every", 3, "--preview-guidance", 1.5)
    after(monkeypatch, 12 + 2 * 4, raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit):
        train(inputs, out, *preview)
    monkeypatch.undo()
    assert (out / "state" / "step").read_text() == "4"
    calls = []
    real = Model.generate_images
    monkeypatch.setattr(Model, "generate_images", lambda *a: calls.append(1) or real(*a))
    train(inputs, out, *preview)
    assert calls == [1] and results_of(out) == results_of(shown)


def test_one_of_several_processes_draws(inputs, plain, shown, tmp_path):
    out = tmp_path / "out"
    options = ("--preview-every", 3, "--preview-guidance", 1.5)
    done = launch(tmp_path, 2, inputs, out, *options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list((out / "previews").iterdir())) == 3
    names = [f"previews/{step:06d}.png" for step in (0, 3, 6)]
    assert results_of(out)[names[0]] == results_of(shown)[names[0]]
    losses = [line["loss"] for line in read_log(plain)]
    assert [line["loss"] for line in read_log(out)] == pytest.approx(losses, rel=1e-5)


def test_a_sharded_policy_is_not_drawn_from(monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    given = ["--pairs", "p", "--out", "o", "--dry-run"]
    with pytest.raises(SystemExit) as ended:
        dpo.parse_args([*given, "--preview-every", "100"])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and "--preview-every" in error and error.count("\n") == 1
    with pytest.raises(SystemExit) as ended:
        dpo.parse_args(given)
    assert not ended.value.code


def test_looking_is_free(inputs, plain, capsys):
    train(inputs, plain, "--grad-norms-every", 3, "--preview-every", 2, "--preview-guidance", 0)
    assert "is complete" in capsys.readouterr().out


# --------------------------------------------------------------------------------------- trackers


class Run:
    """A run of a tracker's module, and what it was told."""

    def __init__(self, settings: dict):
        self.settings = settings
        self.logged = []
        self.config = {}

    def update(self, values, allow_val_change):
        self.config = values

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.logged.append("finished")


def fake_module(monkeypatch, name: str) -> ModuleType:
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    monkeypatch.setitem(sys.modules, name, module)
    available = [tracking.LoggerType(name.split(".")[-1])]
    monkeypatch.setattr(tracking, "_available_trackers", available)
    return module


def in_module(monkeypatch, name: str, init) -> list[Run]:
    """A fake tracker module; `init` has the documented parameters of the real one."""
    module = fake_module(monkeypatch, name)
    runs = []

    def recorded(**settings):
        inspect.signature(init).bind(**settings)
        run = Run(settings)
        runs.append(run)
        module.config = run
        return run

    module.init = recorded
    module.Image = lambda picture: picture
    return runs


def wandb_init(entity=None, project=None, dir=None, id=None, name=None, notes=None, tags=None,
               config=None, group=None, job_type=None, mode=None, reinit=None, resume=None,
               settings=None):
    pass


def trackio_init(project, name=None, group=None, space_id=None, config=None, resume="never"):
    pass


def test_wandb_continues_its_run(inputs, tmp_path, monkeypatch):
    runs = in_module(monkeypatch, "wandb", wandb_init)
    out = tmp_path / "out"
    options = ("--track", "wandb", "--preview-every", 3)
    with monkeypatch.context() as patch:
        after(patch, 12 + 2 * 4, raise_signal(signal.SIGTERM))
        with pytest.raises(SystemExit):
            train(inputs, out, *options)
    train(inputs, out, *options)
    train(inputs, out, *options, "--steps", 1, "--overwrite")
    assert len(runs) == 3
    first, second, other = (run.settings for run in runs)
    assert first == second and first["resume"] == "allow" and len(first["id"]) == 21
    assert first["project"] == "hermesflow" and first["name"] == first["dir"] == str(out)
    assert other["id"] != first["id"] and {**other, "id": first["id"]} == first

    assert runs[0].config["lr"] == "0.001" and runs[0].config["steps"] == "6"
    assert runs[0].config["model"] == str(inputs[1])
    numbers = [(step, values) for step, values in runs[0].logged[:-1] if "loss" in values]
    pictures = [(step, values) for step, values in runs[0].logged[:-1] if "preview" in values]
    assert [step for step, _ in numbers] == [0, 1, 2, 3] and runs[0].logged[-1] == "finished"
    assert [step for step, _ in pictures] == [0, 3] and len(pictures[0][1]["preview"]) == 1
    assert [step for step, values in runs[1].logged[:-1]] == [4, 5, 6]
    assert numbers[0][1]["lr"] == 0.001


def test_trackio_continues_its_run(inputs, tmp_path, monkeypatch):
    runs = in_module(monkeypatch, "trackio", trackio_init)
    train(inputs, tmp_path / "out", "--track", "trackio", "--steps", 1)
    assert runs[0].settings == {"project": "hermesflow", "name": str(tmp_path / "out"),
                                "resume": "allow"}
    assert runs[0].logged[0][1]["loss"] == read_log(tmp_path / "out")[0]["loss"]


def test_tensorboard_continues_its_files(inputs, tmp_path, monkeypatch):
    """Its curves begin again where the state is; what was logged beyond is taken back."""
    monkeypatch.setitem(sys.modules, "tensorboard", ModuleType("tensorboard"))
    sys.modules["tensorboard"].__spec__ = ModuleSpec("tensorboard", None)
    writers = []

    class SummaryWriter:
        def __init__(self, log_dir=None, comment="", purge_step=None):
            self.made = (log_dir, purge_step)
            self.scalars = []
            self.images = []
            writers.append(self)

        def add_hparams(self, values, metric_dict):
            self.config = values

        def add_scalar(self, name, value, global_step):
            self.scalars.append((name, global_step))

        def add_images(self, name, images, global_step, dataformats):
            assert images.dtype == np.uint8 and images.ndim == 4 and dataformats == "NHWC"
            self.images.append((name, global_step))

        def flush(self):
            pass

        close = flush

    module = fake_module(monkeypatch, "torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setattr(torch.utils, "tensorboard", module, raising=False)
    out = tmp_path / "out"
    options = ("--track", "tensorboard", "--preview-every", 4)
    with monkeypatch.context() as patch:
        after(patch, 12 + 2 * 3, raise_signal(signal.SIGTERM))
        with pytest.raises(SystemExit):
            train(inputs, out, *options)
    train(inputs, out, *options)
    assert [writer.made for writer in writers] == [(str(out / "hermesflow"), 0),
                                                   (str(out / "hermesflow"), 3)]
    assert [step for name, step in writers[1].scalars if name == "grad_norm"] == [3, 4, 5]
    assert [w.images for w in writers] == [[("preview", 0)], [("preview", 4)]]
    assert writers[0].config["lr"] == "0.001"
    assert json.loads((out / "settings.json").read_text())["complete"]
