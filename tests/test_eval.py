"""04_eval.py: what is evaluated again, what is compared.

Nothing of the user's is replaced, no NaN is stored, and memory does not grow with the records.
"""

import json
import shutil
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BertConfig, BertModel, BertTokenizer

from conftest import ROOT, main, results_of, stage
from evals import metrics, official
from evals.judges import Clip, ModelJudge, require_finite
from hermesflow.files import InputError
from hermesflow.jsonl import read_jsonl
from hermesflow.outputs import run_main
from hermesflow.scoring import nearest_text
from hermesflow.tables import tensors_of
from model import Model, load
from test_benchmark_runs import (DRAWING, RECORDS, base, clip, geneval_data,  # noqa: F401
                                 gqa_case, lines, mask2former, photo, put, put_lines)
from test_judges import eval_record, put_evaluation, save_blip

evaluation = stage("04_eval")
QUESTIONS = [dict(question="is it red?", choices=["yes", "no"], answer="yes", element="color"),
             dict(question="is it big?", choices=["yes", "no"], answer="no", element="size")]
TEXTS = ("a big red ring", "small blue square", "a ring left of a square", "red square", "a ring",
         "no big square")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Six held-out records and their images."""
    folder = tmp_path_factory.mktemp("held out")
    records = []
    for i, text in enumerate(TEXTS):
        photo(folder / f"{i}.png", i)
        records.append(dict(id=f"r{i}", image=f"{i}.png", caption=text, questions=QUESTIONS))
    put_lines(folder / "records.jsonl", records)
    return folder


def evaluate(base, world, out, *more) -> dict:  # noqa: F811
    main(evaluation, "--records", world / "records.jsonl", "--out", out, "--model", base,
         "--judge", "self", "--max-new-tokens", 3, "--device", "cpu", "--show", 2, *DRAWING, *more)
    return json.loads((out / "metrics.json").read_text())


def forbid_generation(monkeypatch) -> None:
    """A call of the evaluated model would fail."""
    monkeypatch.setattr(Model, "generate_text", None)
    monkeypatch.setattr(Model, "generate_images", None)


# ------------------------------------------------------------------------------------ gap protocol


def test_answers_are_a_table(base, world, tmp_path):  # noqa: F811
    """A line a record; the codes beside them are those that were drawn."""
    found = evaluate(base, world, tmp_path / "out")
    answers = read_jsonl(tmp_path / "out" / "answers.jsonl", metrics.EvalRecord)
    assert [(r.id, r.text) for r in answers] == [(f"r{i}", t) for i, t in enumerate(TEXTS)]
    assert "codes" not in lines(tmp_path / "out" / "answers.jsonl")[0]
    codes = torch.stack([tensors_of(r)["codes"] for r in answers])  # (B, N)
    assert codes.shape == (6, 16) and len({tuple(c.tolist()) for c in codes}) > 1
    drawn = load(base).decode_image(codes[:1])
    picture = Image.open(tmp_path / "out" / "images" / "r0.png")
    pixels = ((drawn[0].clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 0).byte().numpy()
    assert np.abs(np.asarray(picture, int) - pixels).max() <= 1
    assert sorted(p.name for p in (tmp_path / "out" / "images").iterdir()) == ["r0.png", "r1.png"]
    assert found == metrics.evaluate(answers) and found["records"] == 6
    assert found["understanding"]["mean"] == np.mean([np.mean(r.und_right) for r in answers])


def test_more_records_continue_from_fewer(base, world, tmp_path, monkeypatch):  # noqa: F811
    whole = tmp_path / "whole"
    grown = tmp_path / "grown"
    evaluate(base, world, whole)
    evaluate(base, world, grown, "--limit", 2)
    assert len(lines(grown / "answers.jsonl")) == 2
    drawn = []
    generate_images = Model.generate_images

    def counted(model, prompts, *more):
        drawn.extend(prompts)
        return generate_images(model, prompts, *more)

    monkeypatch.setattr(Model, "generate_images", counted)
    evaluate(base, world, grown, "--limit", 4)
    evaluate(base, world, grown)
    assert sorted(drawn) == sorted(TEXTS[2:])  # nothing twice
    assert results_of(grown) == results_of(whole)
    with pytest.raises(InputError, match="content of --records"):
        evaluate(base, world, grown, "--limit", 3)


def test_more_pictures_cost_no_evaluation(base, world, tmp_path, monkeypatch):  # noqa: F811
    out = tmp_path / "out"
    none = evaluate(base, world, out, "--show", 0)
    assert not (out / "images").exists()
    forbid_generation(monkeypatch)
    assert evaluate(base, world, out, "--show", 3) == none
    assert sorted(p.name for p in (out / "images").iterdir()) == ["r0.png", "r1.png", "r2.png"]
    other = tmp_path / "other"
    monkeypatch.undo()
    evaluate(base, world, other, "--show", 3)
    assert results_of(out) == results_of(other)


def test_what_changes_no_result_is_not_compared(base, world, tmp_path, monkeypatch):  # noqa: F811
    out = tmp_path / "out"
    first = evaluate(base, world, out)
    forbid_generation(monkeypatch)
    moved = tmp_path / "moved"
    shutil.copytree(world, moved)
    shutil.copytree(base, tmp_path / "copy")
    assert evaluate(f"{base}/", moved, out, "--batch", 1, "--detector", "none", "--guidance-interval", 0, 1) == first
    assert evaluate(tmp_path / "copy", world, out, "--guidance", "1.50") == first


@pytest.mark.parametrize("more, named", [
    (["--seed", 1], "--seed 0 -> 1"),
    (["--guidance", 2], "--guidance 1.5 -> 2.0"),
    (["--guidance-interval", 0, 0.5], "--guidance-interval"),
    (["--judge", "toy"], "--judge self -> toy"),
    (["--steps", 4], "--steps 3 -> 4"),
    (["--max-new-tokens", 4], "--max-new-tokens 3 -> 4"),
    (["--dtype", "bfloat16"], "--dtype float32 -> bfloat16"),
])
def test_other_settings_are_refused(base, world, tmp_path, more, named):  # noqa: F811
    out = tmp_path / "out"
    evaluate(base, world, out, "--limit", 1)
    before = results_of(out)
    with pytest.raises(InputError, match=f"other settings.*{named}"):
        evaluate(base, world, out, "--limit", 1, *more)
    assert results_of(out) == before


def save_bert(folder) -> None:
    """An encoder of texts with random weights."""
    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "big", "red", "ring", "yes", "no"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(words), hidden_size=16, num_hidden_layers=1,
                        num_attention_heads=2, intermediate_size=16)
    BertModel(config).save_pretrained(folder)


def damage(folder, value: float) -> None:
    """Put `value` into the first weights of a model folder."""
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    weights = load_file(file)
    for tensor in weights.values():
        if tensor.is_floating_point():
            tensor.flatten()[:1] = value
    save_file(weights, file, {"format": "pt"})


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_bert(folder / "bert")
    save_blip(folder / "blip")
    return folder


@pytest.mark.parametrize("option, name", [("--caption-scorer", "bert"), ("--matcher", "bert"),
                                          ("--judge", "blip")])
def test_other_weights_of_a_judge_are_noticed(base, world, models, tmp_path,  # noqa: F811
                                              monkeypatch, option, name):
    model = tmp_path / "model"
    out = tmp_path / "out"
    shutil.copytree(models / name, model)
    common = ("--limit", 1, option, model)
    first = evaluate(base, world, out, *common)
    moved = model.rename(tmp_path / "renamed")
    with monkeypatch.context() as patch:
        forbid_generation(patch)
        assert evaluate(base, world, out, "--limit", 1, option, moved) == first
    damage(moved, 0.5)
    with pytest.raises(InputError, match=f"content of {option}"):
        evaluate(base, world, out, "--limit", 1, option, moved)


def test_a_complete_evaluation_answers_without_torch(base, world, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    evaluate(base, world, out, "--limit", 2)
    command = ["04_eval.py", "--records", world / "records.jsonl", "--out", out, "--model", base,
               "--judge", "self", "--max-new-tokens", 3, "--show", 2, "--limit", 2, *DRAWING]
    done = subprocess.run([sys.executable, "-c", f"""
import runpy, sys, time
sys.argv = {[str(c) for c in command]!r}
try:
    runpy.run_path("04_eval.py", run_name="__main__")
except SystemExit as end:
    assert not end.code
    assert time.process_time() < 1, time.process_time()
    assert "torch" not in sys.modules and "transformers" not in sys.modules
    sys.exit()
sys.exit("did not end where it is complete")
"""], cwd=ROOT, capture_output=True, text=True)
    assert not done.stderr and not done.returncode
    said = done.stdout.splitlines()
    assert said[0] == f"{out}/metrics.json is complete"
    assert said[1].startswith("| | understanding") and said[3].startswith("| out | ")


# --------------------------------------------------------------------------------------- the flags


@pytest.mark.parametrize("more, named", [
    (["--guidance-interval", "0.8", "0.2"], "--guidance-interval"),
    (["--out", ""], "--out"), (["--judge", ""], "--judge"), (["--model", " "], "--model"),
    (["--across", "color"], "--across"), (["--show", "-1"], "--show"),
    (["--limit", "0"], "--limit"), (["--skip", "-1"], "--skip"), (["--compare", ""], "--compare"),
    (["--data", ""], "--data"), (["--report", ""], "--report"),
])
def test_flags(more, named, capsys):
    with pytest.raises(SystemExit) as ended:
        evaluation.parse_args(["--records", "r.jsonl", "--out", "o", *more])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1 and named in error


# --------------------------------------------------------------------------------------- the places


def one_line(capsys, *arguments) -> str:
    """The line in which the stage ends, with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run_main(lambda: main(evaluation, *arguments))
    error = capsys.readouterr().err.replace("\r", "\n").strip().splitlines()[-1]
    assert ended.value.code == 2 and error.startswith("error: ")
    return error


def test_images_of_the_records_are_never_replaced(base, world, tmp_path, capsys):  # noqa: F811
    """--out is where the records are."""
    place = tmp_path / "w"
    shutil.copytree(world, place)
    before = results_of(place)
    for more in ([], ["--overwrite"]):
        error = one_line(capsys, "--records", place / "records.jsonl", "--out", place, "--model",
                         base, "--judge", "self", *DRAWING, *more)
        assert "its own input (--records" in error
        assert results_of(place) == before


@pytest.mark.parametrize("name", ["answers.jsonl", "images/mine.png", "metrics.json"])
def test_files_of_the_user_are_never_replaced(base, world, tmp_path, capsys, name):  # noqa: F811
    mine = tmp_path / "out" / name
    put(mine, "mine")
    for more in ([], ["--overwrite"]):
        error = one_line(capsys, "--records", world / "records.jsonl", "--out", tmp_path / "out",
                         "--model", base, "--judge", "self", *DRAWING, *more)
        assert f"{name}: is there already" in error and mine.read_text() == "mine"


# -------------------------------------------------------------------------------------------- NaN


def nan_model(models, tmp_path, name: str):
    model = tmp_path / f"damaged {name}"
    shutil.copytree(models / name, model)
    damage(model, float("nan"))
    return model


@pytest.mark.parametrize("option, name", [("--caption-scorer", "bert"), ("--matcher", "bert"),
                                          ("--judge", "blip")])
def test_nan_of_a_judge_is_never_stored(base, world, models, tmp_path, capsys,  # noqa: F811
                                        option, name):
    model = nan_model(models, tmp_path, name)
    out = tmp_path / "out"
    error = one_line(capsys, "--records", world / "records.jsonl", "--out", out, "--model", base,
                     "--judge", "self", "--max-new-tokens", 3, *DRAWING, option, model)
    assert str(model) in error and "'r" in error and "NaN" in error
    assert not (out / "answers.jsonl").exists() and not (out / "metrics.json").exists()
    assert not any(p.stat().st_size for p in out.glob("parts/**/*.log"))


def test_nan_of_a_judge_that_classifies():
    with pytest.raises(InputError, match="the judge: its outputs are NaN"):
        require_finite(torch.tensor([1.0, float("nan")]), "the judge")
    with pytest.raises(InputError, match="the judge"):
        require_finite(torch.tensor([float("inf")]), "the judge")
    assert require_finite(torch.zeros(2), "the judge").tolist() == [0, 0]


def test_finite_judges_answer_as_before(models):
    """The check of what a judge writes changes no answer."""
    judge = ModelJudge(str(models / "blip"), nearest_text, "cpu")
    picture = Image.new("RGB", (40, 40), "red")
    answers = judge.vqa_answers(picture, ["what color is it?"])
    judge.refuse_nan = None
    assert judge.vqa_answers(picture, ["what color is it?"]) == answers


def test_nan_of_clip(base, clip, tmp_path, capsys):  # noqa: F811
    damaged = tmp_path / "clip"
    shutil.copytree(clip, damaged)
    damage(damaged, float("nan"))
    with pytest.raises(InputError, match="NaN"):
        Clip(str(damaged), "cpu").texts(["a ring"])
    put_lines(tmp_path / "records.jsonl", RECORDS)
    out = tmp_path / "out"
    error = one_line(capsys, "--benchmark", "clipscore", "--data", tmp_path / "records.jsonl",
                     "--out", out, "--model", base, "--clip", damaged, *DRAWING)
    assert "id 'a'" in error and str(damaged) in error and not (out / "metrics.json").exists()


def test_nan_of_the_detector(base, mask2former, clip, tmp_path, capsys):  # noqa: F811
    damaged = tmp_path / "mask2former"
    shutil.copytree(mask2former, damaged)
    damage(damaged, float("nan"))
    geneval_data(tmp_path / "data", "thing 0")
    out = tmp_path / "out"
    error = one_line(capsys, "--benchmark", "geneval", "--data", tmp_path / "data", "--out", out,
                     "--model", base, "--detector", damaged, "--clip", clip, *DRAWING)
    assert str(damaged) in error and "00000/samples/00000.png" in error
    assert not (out / "results.jsonl").exists() and not (out / "metrics.json").exists()


# --------------------------------------------------------------------------------------- benchmarks


def clipscore(base, clip, tmp_path, *more) -> dict:  # noqa: F811
    put_lines(tmp_path / "records.jsonl", RECORDS)
    out = tmp_path / "out"
    main(evaluation, "--benchmark", "clipscore", "--data", tmp_path / "records.jsonl", "--out", out,
         "--model", base, "--clip", clip, "--device", "cpu", *DRAWING, *more)
    return json.loads((out / "metrics.json").read_text())


def test_images_of_another_model_survive(base, clip, tmp_path, monkeypatch):  # noqa: F811
    """--overwrite draws its own again and leaves theirs; one that replaces ours is scored again."""
    out = tmp_path / "out"
    theirs = photo(out / "images" / "c.png", 1)
    before = theirs.read_bytes()
    first = clipscore(base, clip, tmp_path)
    ours = (out / "images" / "a.png").read_bytes()
    assert clipscore(base, clip, tmp_path, "--overwrite") == first
    assert theirs.read_bytes() == before and (out / "images" / "a.png").read_bytes() == ours

    forbid_generation(monkeypatch)
    assert clipscore(base, clip, tmp_path) == first
    photo(out / "images" / "a.png", 7)
    second = clipscore(base, clip, tmp_path)
    assert second != first and clipscore(base, clip, tmp_path) == second
    monkeypatch.undo()
    photo(tmp_path / "fresh" / "images" / "a.png", 7)
    shutil.copy(theirs, tmp_path / "fresh" / "images" / "c.png")
    shutil.move(out, tmp_path / "old")
    shutil.move(tmp_path / "fresh", out)
    # "b" is drawn alone now, which changes the last digits of its pixels
    third = clipscore(base, clip, tmp_path)
    for name in third.keys() - {"benchmark"}:
        assert third[name] == pytest.approx(second[name], rel=1e-3)


def test_an_image_that_is_removed_is_drawn_again(base, clip, tmp_path, monkeypatch):  # noqa: F811
    """Also before the benchmark is complete."""
    with monkeypatch.context() as patch, pytest.raises(TypeError):
        patch.setattr("evals.clipscore.clip_text", None)  # after drawing
        clipscore(base, clip, tmp_path)
    images = tmp_path / "out" / "images"
    assert sorted(p.name for p in images.iterdir()) == ["a.png", "b.png", "c.png"]
    kept = (images / "a.png").read_bytes()
    (images / "b.png").unlink()
    first = clipscore(base, clip, tmp_path)
    assert (images / "a.png").read_bytes() == kept and (images / "b.png").exists()
    (images / "b.png").unlink()
    second = clipscore(base, clip, tmp_path)
    for name in first.keys() - {"benchmark"}:
        assert second[name] == pytest.approx(first[name], rel=1e-3)


def test_all_images_of_another_model(base, clip, tmp_path, monkeypatch):  # noqa: F811
    for i, record in enumerate(RECORDS):
        photo(tmp_path / "out" / "images" / f"{record['id']}.png", i)
    before = results_of(tmp_path / "out")
    forbid_generation(monkeypatch)
    first = clipscore(base, clip, tmp_path)
    assert clipscore(base, clip, tmp_path) == first
    assert before.items() <= results_of(tmp_path / "out").items()


@pytest.mark.parametrize("content", [b"", b"no picture", None])
def test_a_damaged_image_of_another_model_is_one_line(base, clip, tmp_path, capsys,  # noqa: F811
                                                      content):
    there = photo(tmp_path / "out" / "images" / "a.png", 1)
    there.write_bytes(there.read_bytes()[:200] if content is None else content)
    put_lines(tmp_path / "records.jsonl", RECORDS)
    error = one_line(capsys, "--benchmark", "clipscore", "--data", tmp_path / "records.jsonl",
                     "--out", tmp_path / "out", "--model", base, "--clip", clip, *DRAWING)
    assert "images/a.png: cannot read image" in error


def test_geneval_layout_of_another_model(base, mask2former, clip, tmp_path, capsys):  # noqa: F811
    """Its metadata.jsonl stays as it is, and images of another prompt are refused."""
    out = tmp_path / "out"
    put_lines(tmp_path / "data" / "evaluation_metadata.jsonl",
              geneval_data(tmp_path / "data", "thing 0")[:1])
    theirs = out / "images" / "00000" / "metadata.jsonl"
    put(theirs, '{"prompt":   "a photo of a ring", "tag": "single_object"}')
    before = theirs.read_bytes()
    arguments = ["--benchmark", "geneval", "--data", tmp_path / "data", "--out", out, "--model",
                 base, "--detector", mask2former, "--clip", clip, *DRAWING]
    main(evaluation, *arguments)
    assert theirs.read_bytes() == before
    put(theirs, '{"prompt": "a photo of a square"}')
    error = one_line(capsys, *arguments, "--overwrite")
    assert "metadata.jsonl: of 'a photo of a square', not of 'a photo of a ring'" in error


def test_results_of_the_user_are_never_replaced(base, tmp_path, capsys):  # noqa: F811
    gqa_case(tmp_path / "data", lambda *_: "yes")
    mine = tmp_path / "out" / "testdev_balanced_predictions.json"
    put(mine, "mine")
    error = one_line(capsys, "--benchmark", "gqa", "--data", tmp_path / "data", "--out",
                     tmp_path / "out", "--model", base)
    assert "is there already" in error and mine.read_text() == "mine"


@pytest.mark.parametrize("change", ["image", "text", "more"])
def test_other_official_files_are_noticed(base, tmp_path, capsys, change):  # noqa: F811
    data = tmp_path / "data"
    gqa_case(data, lambda *_: "yes")
    arguments = ["--benchmark", "gqa", "--data", data, "--out", tmp_path / "out", "--model", base,
                 "--max-new-tokens", 3]
    main(evaluation, *arguments)
    before = results_of(tmp_path / "out")
    if change == "image":
        photo(data / "images" / "n1.jpg", 5)
    elif change == "text":
        file = data / "testdev_balanced_questions.json"
        file.write_text(file.read_text().replace("left", "right"))
    else:
        photo(data / "images" / "n9.jpg", 5)
    assert "content of --data" in one_line(capsys, *arguments)
    assert results_of(tmp_path / "out") == before


def test_ids_are_no_paths(base, tmp_path, capsys):  # noqa: F811
    """An id of an official file names an image: it stays below OUT/images."""
    record = dict(id="../../victim", caption="a ring", question="is it?", choices=["yes", "no"],
                  answer="yes", element_type="object")
    put(tmp_path / "data" / "tifa_v1.0_question_answers.json", [record])
    error = one_line(capsys, "--benchmark", "tifa", "--data", tmp_path / "data", "--out",
                     tmp_path / "out", "--model", base, "--judge", "self", *DRAWING)
    assert "'../../victim' cannot be used as a file name" in error


def test_files_below(tmp_path, monkeypatch):
    """Every file by content; of very many, images by their size. Links are followed once."""
    data = tmp_path / "data"
    put(data / "a.json", "[1]")
    put(data / "images" / "1.jpg", "12345")
    put(data / ".hidden" / "x", "no")
    put(tmp_path / "elsewhere" / "2.jpg", "123")
    (data / "linked").symlink_to(tmp_path / "elsewhere")
    (data / "images" / "loop").symlink_to(data)
    items = list(official.files_below(data))
    assert items[0] == ("3 files",)
    assert items[1:] == [("/a.json", data / "a.json"), ("/images/1.jpg", data / "images" / "1.jpg"),
                         ("/linked/2.jpg", data / "linked" / "2.jpg")]
    monkeypatch.setattr(official, "MANY", 2)
    assert list(official.files_below(data)) == [
        ("3 files",), ("/a.json", data / "a.json"), ("/images/1.jpg 5",), ("/linked/2.jpg 3",)]
    assert list(official.files_below(data / "a.json")) == [(data / "a.json",)]


# ------------------------------------------------------------------------------------------ compare

T = True
F = False


@pytest.fixture
def two(tmp_path):
    """Two finished evaluations in one folder, as run_selfplay.sh makes them."""
    real = photo(tmp_path / "real.png", 0, (64, 64))
    for name, right in (("base", F), ("round1", T)):
        records = [eval_record(id, [T], [right], 1.0, right) for id in ("a", "b")]
        for r in records:
            r.image = str(real)
            photo(tmp_path / "eval" / name / "images" / f"{r.id}.png", 1, (64, 64))
        put_evaluation(tmp_path / "eval" / name, records)
    return tmp_path / "eval"


def compare(two, *more) -> str:
    main(evaluation, "--compare", two / "base", two / "round1", "--out", two, *more)
    return (two / "table.md").read_text()


def change_settings(folder, **changes) -> None:
    """Change a finished evaluation's settings.json: name=value of its settings, or a section."""
    file = folder / "settings.json"
    mark = json.loads(file.read_text())
    for name, value in changes.items():
        if name in mark:
            mark[name] = {**mark[name], **value} if isinstance(value, dict) else value
        else:
            mark["settings"][name] = value
    file.write_text(json.dumps(mark))


@pytest.mark.parametrize("changes, across, named", [
    ({"judge": "self"}, "judge", "--judge toy -> self"),
    ({"seed": "1"}, "seed", "--seed 0 -> 1"),
    ({"guidance": "5.0"}, "guidance", "--guidance 0.0 -> 5.0"),
    ({"guidance_interval": "(0.0, 0.5)"}, "guidance-interval", "--guidance-interval"),
    ({"inputs": {"judge": {"content": "j"}}}, "judge", "content of --judge"),
    ({"inputs": {"caption_scorer": {"content": "j"}}}, "caption-scorer", "--caption-scorer"),
    ({"inputs": {"matcher": {"content": "j"}}}, "matcher", "content of --matcher"),
    ({"inputs": {"records": {"items": 2, "content": "q"}}}, "records", "content of --records"),
])
def test_compare_refuses_other_settings(two, capsys, changes, across, named):
    change_settings(two / "round1", **changes)
    before = results_of(two)
    command = ("--compare", two / "base", two / "round1", "--out", two)
    for more in ([], ["--across", "steps", "temperature"]):
        error = one_line(capsys, *command, *more)
        assert str(two / "round1") in error and str(two / "base") in error
        assert named in error and f"--across {across}" in error
        assert results_of(two) == before
    assert compare(two, "--across", "steps", across).count("| round1 |") == 2


def test_compare_across_several(two, capsys):
    change_settings(two / "round1", judge="self", seed="1")
    error = one_line(capsys, "--compare", two / "base", two / "round1", "--out", two)
    assert "--judge toy -> self; --seed 0 -> 1" in error and "--across judge seed" in error
    error = one_line(capsys, "--compare", two / "base", two / "round1", "--out", two, "--across",
                     "seed")
    assert "--judge toy -> self)" in error and "--seed" not in error
    compare(two, "--across", "judge", "seed")


def test_compare_is_about_the_model(two):
    change_settings(two / "round1", inputs={"model": {"content": "x"},
                                            "text_tokenizer": {"content": "y"}},
                    derived={"show": "3"})
    assert compare(two).startswith("2 records")


def test_compare_says_that_code_differs(two, capsys):
    change_settings(two / "round1", code={"evals/judges.py": "other"})
    compare(two)
    said = capsys.readouterr().out.splitlines()[0]
    assert said.startswith("note: ") and said.endswith("other code than "
                                                       f"{two / 'base'}: evals/judges.py")


@pytest.mark.parametrize("damage_it, named", [
    (lambda f: change_settings(f, complete=False), "no finished evaluation"),
    (lambda f: change_settings(f, stage="01_sample"), "no finished evaluation"),
    (lambda f: change_settings(f, format="2"), "another version"),
    (lambda f: (f / "settings.json").unlink(), "settings.json: missing"),
    (lambda f: (f / "answers.jsonl").unlink(), "answers.jsonl: missing"),
    (lambda f: (f / "settings.json").write_text("{"), "not valid JSON"),
    (lambda f: (f / "settings.json").write_text('{"stage": "04_eval", "complete": true, '
                                                '"format": "3"}'), "field 'settings'"),
    (lambda f: (f / "answers.jsonl").write_text("{}\n"), "answers.jsonl: line 1"),
    (lambda f: shutil.rmtree(f), "missing"),
])
def test_compare_wants_finished_evaluations(two, capsys, damage_it, named):
    damage_it(two / "round1")
    error = one_line(capsys, "--compare", two / "base", two / "round1", "--out", two)
    assert named in error and "round1" in error and not (two / "table.md").exists()


@pytest.mark.parametrize("name", ["table.md", "comparison.png"])
def test_compare_replaces_only_its_own(two, capsys, name):
    put(two / name, "mine")
    error = one_line(capsys, "--compare", two / "base", two / "round1", "--out", two)
    assert f"{two / name}: is there already" in error
    assert (two / name).read_text() == "mine" and not (two / ".run").exists()
    (two / name).unlink()
    first = compare(two)
    (two / "table.md").write_text("edited")
    assert compare(two) == first  # over its own
    assert (two / "comparison.png").exists()
    compare(two, "--show", 0)
    assert not (two / "comparison.png").exists()  # it would show another comparison
    assert sorted(p.name for p in two.iterdir()) == [".run", "base", "round1", "table.md"]


def test_compare_with_itself(two, capsys):
    error = one_line(capsys, "--compare", two / "base", two / "base", "--out", two)
    assert "given twice" in error


def test_compare_with_a_damaged_picture(two, capsys):
    file = two / "round1" / "images" / "a.png"
    file.write_bytes(file.read_bytes()[:100])
    error = one_line(capsys, "--compare", two / "base", two / "round1", "--out", two)
    assert "round1/images/a.png: cannot read image" in error


def test_evaluations_of_this_program_compare(base, world, tmp_path, capsys):  # noqa: F811
    """What `evaluate` writes is what `compare` reads."""
    evaluate(base, world, tmp_path / "one", "--limit", 3)
    evaluate(base, world, tmp_path / "two", "--limit", 3, "--seed", 1)
    command = ["--compare", tmp_path / "one", tmp_path / "two", "--out", tmp_path / "compared"]
    assert "--seed 0 -> 1" in one_line(capsys, *command)
    main(evaluation, *command, "--across", "seed")
    text = (tmp_path / "compared" / "table.md").read_text()
    assert text.startswith("3 records, 3 different texts") and text.count("\n| two |") == 2


# ------------------------------------------------------------------------------------------- memory


def test_memory_does_not_hold_the_records():
    """Some numbers stay: 1,000,000 records take about 0.1 GB."""

    def records(count: int):
        for i in range(count):
            yield eval_record(f"r{i}", [T] * 10, [F] * 10, 0.5, F, text=f"text {i}")

    peaks = []
    for count in (1000, 9000):
        tracemalloc.start()
        summary = metrics.summarize(records(count))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert summary.texts == count and len(summary.values["gap"]) == count
    assert (peaks[1] - peaks[0]) / 8000 < 120


def test_summaries_are_of_the_same_records_in_the_same_order():
    a = eval_record("a", [T], [T], 1.0, T)
    b = eval_record("b", [T], [T], 1.0, T)
    other = eval_record("b", [T], [T], 1.0, T, text="a dog")
    orders = [metrics.summarize(r).order for r in ([a, b], [a, b], [b, a], [a], [a, other])]
    assert orders[0] == orders[1] and len(set(orders)) == 4


def test_a_record_without_answers():
    with pytest.raises(InputError, match="id 'a': no answers"):
        metrics.summarize([eval_record("a", [], [T], 1.0, T)])
