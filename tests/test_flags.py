"""Every option of every script has its range, and the loop checks its settings before it starts.

A mistake ends in one line that names it, with exit code 2, and leaves nothing behind.
"""

import argparse
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, stage

from hermesflow import options as options_module
from hermesflow.files import InputError
from hermesflow.options import StageParser, device, folder

# --------------------------------------------------------------------------------- every script

SCRIPTS = []
for where in (".", "hermesflow", "toy", "toy/studies", "bench"):
    for file in sorted((ROOT / where).glob("*.py")):
        if '__name__ == "__main__"' in file.read_text(encoding="utf-8"):
            SCRIPTS.append(str(file.relative_to(ROOT)))

TEXT = (None, Path, folder, device)  # types of options that take text
NEVER = ["nan", "inf", "-inf", "1e400", "1e38", "abc", "", " ", "0x10"]  # no number of any option
# options whose range begins at 0 or below; all others begin above it
ZERO = {"--seed", "--seeds", "--show", "--skip", "--save-every", "--guidance",
        "--guidance-interval", "--temperature", "--min-image-score", "--beta", "--und", "--gen",
        "--nll-und", "--nll-gen", "--cond-dropout", "--warmup", "--weight-decay",
        "--grad-norms-every", "--preview-every", "--preview-guidance", "--drawing", "--training"}
NEGATIVE = {"--min-image-score"}


class Started(Exception):
    """A script has come to its options."""


@pytest.fixture
def parser_of(monkeypatch, tmp_path):
    """A function of a script: its parser, as its command line makes it, in an empty folder."""

    def run(script: str) -> StageParser:
        with monkeypatch.context() as patch:
            def stop(self, args=None, namespace=None):
                raise Started(self)

            patch.setattr(argparse.ArgumentParser, "parse_args", stop)
            patch.setattr(sys, "argv", [script])
            patch.syspath_prepend(ROOT / "toy" / "studies")
            with pytest.raises(Started) as started:
                runpy.run_path(str(ROOT / script), run_name="__main__")
        return started.value.args[0]

    monkeypatch.chdir(tmp_path)
    yield run
    assert not list(tmp_path.iterdir())


def options(parser) -> list[argparse.Action]:
    return [a for a in parser._actions if a.nargs != 0]


def refusal(parser, capsys, flag: str, *values: str) -> str:
    """What is wrong with an answer to an option: "" if it is refused as it should be."""
    try:
        argparse.ArgumentParser.parse_args(parser, [flag, *values])
        return f"{flag} {values}: accepted"
    except SystemExit as end:
        error = capsys.readouterr().err
        right = end.code == 2 and error.count("\n") == 1 and error.startswith("error: ")
        name = flag.partition("=")[0]
        right = right and f"argument {name}" in error
        return "" if right else f"{flag} {values}: {error}"


def test_all_scripts_are_found():
    assert len(SCRIPTS) >= 20
    assert {"01_sample.py", "02_score.py", "03_pair_dpo.py", "04_eval.py", "toy/world.py",
            "toy/pretrain.py", "toy/studies/recipes.py", "bench/drill.py"} <= set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_number_has_its_range(script, parser_of, capsys):
    parser = parser_of(script)
    assert isinstance(parser, StageParser) and not parser.allow_abbrev
    wrong = []
    for action in options(parser):
        flag = action.option_strings[-1]
        if action.type in (int, float):
            wrong.append(f"{flag}: any {action.type.__name__}")
        if action.type in TEXT:
            continue
        refused = list(NEVER)
        if flag not in ZERO:
            refused.append("0")
        if flag not in NEGATIVE:
            refused.append("-1")
        times = action.nargs if isinstance(action.nargs, int) else 1
        for value in refused:
            wrong.append(refusal(parser, capsys, flag, *[value] * times))
            if times == 1:  # -inf alone looks like an option
                wrong.append(refusal(parser, capsys, f"{flag}={value}"))
        if flag in ZERO:
            assert action.type("0") == 0
    wrong = [w for w in wrong if w]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_word_is_known(script, parser_of, capsys):
    parser = parser_of(script)
    for action in options(parser):
        flag = action.option_strings[-1]
        if action.choices:
            times = action.nargs if isinstance(action.nargs, int) else 1
            assert not refusal(parser, capsys, flag, *["Fresh"] * times)
        if action.type is device:
            for name in ("", "gpu", "cuda:", "cuda:x", "CPU"):
                assert not refusal(parser, capsys, flag, name)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_output_has_a_name(script, parser_of, capsys):
    """An unset variable of a shell is not the working directory."""
    parser = parser_of(script)
    for action in options(parser):
        flag = action.option_strings[-1]
        if flag in ("--out", "--sheet"):
            assert action.type is folder
        if action.type is folder:
            for name in ("", " "):
                assert not refusal(parser, capsys, flag, name)


# ------------------------------------------------------------------------------ number of processes

STAGES = {
    "01_sample": ["--records", "r.jsonl", "--out", "o"],
    "02_score": ["--samples", "s", "--out", "o"],
    "03_pair_dpo": ["--pairs", "p.jsonl", "--out", "o"],
    "04_eval": ["--records", "r.jsonl", "--out", "o"],
}


@pytest.mark.parametrize("name", STAGES)
def test_a_dry_run_ends_with_the_options(name, tmp_path, monkeypatch, capsys):
    module = stage(name)
    monkeypatch.chdir(tmp_path)
    # it is no setting of what a stage writes
    assert not hasattr(module.parse_args(STAGES[name]), "dry_run")
    for found in (True, False):
        asked = []

        def require(name, found=found):
            asked.append(name)
            if not found:
                raise InputError("not here")

        monkeypatch.setattr(options_module, "require", require)
        with pytest.raises(SystemExit) as end:
            module.parse_args([*STAGES[name], "--dry-run"])
        assert end.value.code == (None if found else 2) and asked
    assert "not here" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("processes, batch, micro_batch, fits", [
    (None, 32, 4, True), (8, 32, 4, True), (1, 4, 8, False), (2, 16, 16, False), (3, 16, 4, False),
])
def test_a_batch_is_a_multiple_of_all_micro_batches(processes, batch, micro_batch, fits,
                                                    monkeypatch, capsys):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if processes:
        monkeypatch.setenv("WORLD_SIZE", str(processes))
    sizes = ["--batch", str(batch), "--micro-batch", str(micro_batch)]
    with pytest.raises(SystemExit) as end:
        stage("03_pair_dpo").parse_args([*STAGES["03_pair_dpo"], *sizes, "--dry-run"])
    error = capsys.readouterr().err
    if fits:
        assert not end.value.code and not error
    else:
        assert end.value.code == 2 and error.count("\n") == 1
        assert f"--batch {batch} is not a multiple of --micro-batch {micro_batch}" in error
        assert processes == 1 or f" times {processes} processes" in error


# ----------------------------------------------------------------------------------------- the loop


@pytest.fixture
def loop(tmp_path):
    """A function that runs run_selfplay.sh with settings; its `python` prints its arguments."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text('#!/usr/bin/env bash\necho "$@"\n')
    python.chmod(0o755)

    def run(*arguments, path=python.parent, **settings):
        names = ("OUT", "ROUNDS", "SEED", "LAUNCH", "LAUNCH_DPO", "BASE", "TRAIN", "HELD_OUT",
                 "JUDGE", "PAIRS", "SAMPLE", "SCORE", "DPO", "EVAL", "ASK", "TRAIN_PART",
                 "HELD_OUT_PART", "TRAIN_LIMIT", "HELD_OUT_LIMIT", "IMAGES", "QUESTIONS",
                 "QUESTION_MODEL", "QA_MODEL")
        clean = {k: v for k, v in os.environ.items() if k not in (*names, "WORLD_SIZE")}
        settings = {"OUT": str(tmp_path / "out"), **settings}
        environment = {**clean, **settings, "PATH": f"{path}:{clean['PATH']}"}
        command = ["bash", str(ROOT / "run_selfplay.sh"), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment,
                              cwd=tmp_path)
        assert not (tmp_path / "out").exists()
        return done

    return run


def refused(done, what: str) -> None:
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert what in done.stderr


@pytest.mark.parametrize("pairs, previous", [("fresh", 0), ("self-play", 2)])
def test_the_loop_runs_every_stage_of_every_round(loop, pairs, previous):
    done = loop(ROUNDS="3", PAIRS=pairs, LAUNCH_DPO="python several.py")
    assert done.returncode == 0 and not done.stderr
    lines = done.stdout.splitlines()
    scripts = [line.split()[0] for line in lines]
    stages = ["01_sample.py", "02_score.py", "several.py", "04_eval.py"]
    assert scripts == ["toy/world.py"] * 2 + ["04_eval.py"] + stages * 3 + ["04_eval.py"] * 2
    assert done.stdout.count("--previous") == previous
    assert "--dry-run" not in done.stdout
    trained = [line.split() for line in lines if line.startswith("several.py")]
    assert all(line[1] == "03_pair_dpo.py" for line in trained)


def records_of(done, script: str) -> list[str]:
    """What a script is told of its records, in all of its calls."""
    calls = [line for line in done.stdout.splitlines() if script in line and "--records" in line]
    flags = ("--records", "--skip", "--limit", "--questions", "--image-folder")
    found = set()
    for words in map(str.split, calls):
        found.add(" ".join(f"{w} {words[i + 1]}" for i, w in enumerate(words) if w in flags))
    return sorted(found)


def test_one_file_makes_both_sets(loop, tmp_path):
    """The records to learn from come first, those held out behind them."""
    showo = ROOT / "configs" / "showo.sh"
    records = tmp_path / "r.json"
    records.write_text("[]")
    common = {"LAUNCH": "python", "ROUNDS": "2", "TRAIN": str(records)}
    done = loop(showo, **common)
    assert done.returncode == 0, done.stderr
    asked = "--questions vqa_data.json"
    assert records_of(done, "01_sample.py") == [f"--records {records} --limit 5000 {asked}"]
    assert records_of(done, "04_eval.py") == [
        f"--records {records} --skip 5000 --limit 600 {asked}"]
    assert "hermesflow.questions" not in done.stdout
    # fewer, images elsewhere, no file of questions
    done = loop(showo, **common, TRAIN_LIMIT="7", HELD_OUT_LIMIT="3", IMAGES="i", QUESTIONS="")
    assert records_of(done, "01_sample.py") == [f"--records {records} --limit 7 --image-folder i"]
    assert records_of(done, "04_eval.py") == [
        f"--records {records} --skip 7 --limit 3 --image-folder i"]
    # another file is taken as it is, a folder too
    done = loop(showo, **common, HELD_OUT=str(tmp_path), HELD_OUT_PART="--limit 9")
    assert records_of(done, "04_eval.py") == [f"--records {tmp_path} --limit 9"]


@pytest.mark.parametrize("config", ["toy", "showo", "janus"])
def test_questions_are_written_once_before_all(loop, tmp_path, config):
    records = tmp_path / "r.json"
    records.write_text("[]")
    done = loop(ROOT / "configs" / f"{config}.sh", LAUNCH="python", ROUNDS="3", TRAIN=str(records),
                HELD_OUT=str(records), HELD_OUT_PART="--skip 1", QUESTION_MODEL="q", QA_MODEL="a", ASK="--batch 3")
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out" / "questions"
    lines = done.stdout.splitlines()
    writing = [line for line in lines if "hermesflow.questions" in line]
    assert lines[:2] == writing and len(writing) == 2
    for line, name in zip(writing, ("train", "held_out")):
        start = f"-m hermesflow.questions --out {out}/{name} --question-model q --qa-model a "
        assert line.startswith(start) and " --batch 3 " in line and "--questions" not in line
    for script, name in (("01_sample.py", "train"), ("04_eval.py", "held_out")):
        (told,) = records_of(done, script)
        assert told.endswith(f" --questions {out}/{name}/questions.jsonl")
        assert told.count("--questions") == 1
    limits = [("--limit 5000" in line, "--skip 5000 --limit 600" in line) for line in writing]
    assert limits == [(config != "toy", False), (False, config != "toy")]


@pytest.mark.parametrize("name, values", [
    ("ROUNDS", ["abc", "0", "-1", "1.5", "", " ", "nan", "2 3", "1\n2"]),
    ("PAIRS", ["Fresh", "selfplay", "", "fresh self-play"]),
    ("SEED", ["abc", "-1", "1.5", ""]),
    ("OUT", ["", "  "]),
    ("LAUNCH", ["", "no-such-launcher --processes 8"]),
    ("BASE", [""]),
    ("JUDGE", [""]),
    ("TRAIN", ["", "no_such.jsonl"]),
    ("HELD_OUT", ["", "no_such.jsonl"]),
])
def test_the_loop_refuses_settings(loop, name, values):
    for value in values:
        what = name if name != "LAUNCH" or not value else "no-such-launcher"
        refused(loop(**{name: value}), what)


def test_the_loop_refuses_configs(loop, tmp_path):
    toy = (ROOT / "configs" / "toy.sh").read_text()
    config = tmp_path / "mine.sh"
    refused(loop("no_such.sh"), "no_such.sh")
    refused(loop(""), "''")
    refused(loop(ROOT / "configs"), "configs")
    refused(loop(ROOT / "configs" / "toy.sh", "ROUNDS=3"), "ROUNDS=3")
    for text, what in ((toy.replace("JUDGE=${JUDGE-toy}", ""), "JUDGE"),
                       (toy.replace("DPO=(", "DPO2=("), "DPO"),
                       (toy + "PAIRS=$UNKNOWN\n", "UNKNOWN"),
                       (toy + "EVAL=(\n", "mine.sh"),
                       (toy + "false\n", "mine.sh")):
        config.write_text(text)
        refused(loop(config), what)
    # older files of settings have none of these
    newer = ("LAUNCH_DPO", "TRAIN_PART", "HELD_OUT_PART", "ASK")
    config.write_text("\n".join(line for line in toy.splitlines()
                                if not line.startswith(tuple(f"{name}=" for name in newer))))
    done = loop(config)
    assert done.returncode == 0 and "\n03_pair_dpo.py" in done.stdout


@pytest.mark.parametrize("settings, what", [
    ({"LAUNCH": "env WORLD_SIZE=2 python"}, "DPO: --batch 16 is not a multiple of --micro-batch"),
    ({"LAUNCH_DPO": "env WORLD_SIZE=3 python"}, "times 3 processes"),
    ({"DPO": "--lr nan"}, "DPO: argument --lr"),
    ({"SAMPLE": "--images 0"}, "SAMPLE or TRAIN_PART: argument --images"),
    ({"SCORE": "--batch -3"}, "SCORE: argument --batch"),
    ({"EVAL": "--stepz 3"}, "EVAL or HELD_OUT_PART: unrecognized arguments: --stepz 3"),
    ({"TRAIN_PART": "--skip -1"}, "SAMPLE or TRAIN_PART: argument --skip"),
    ({"HELD_OUT_PART": "--limit 0"}, "EVAL or HELD_OUT_PART: argument --limit"),
    ({"QUESTION_MODEL": "q", "ASK": "--batch 0"}, "ASK or TRAIN_PART: argument --batch"),
    ({"QUESTION_MODEL": "toy/base", "QA_MODEL": "toy/base", "HELD_OUT_PART": "--skip 1 --questions q"},
     "HELD_OUT_PART: unrecognized"),
    ({"QUESTION_MODEL": "/nowhere"}, "ASK or TRAIN_PART: --question-model: /nowhere: no such folder"),
    ({"SCORE": "--matcher /nowhere"}, "SCORE: --matcher: /nowhere: no such folder"),
    ({"JUDGE": "/nowhere"}, "EVAL or HELD_OUT_PART: --judge: /nowhere: no such folder"),
    ({"DPO": "--reference /nowhere"}, "DPO: --reference: /nowhere: no such folder"),
    ({"SAMPLE": "--limit 3"}, "--limit belongs in TRAIN_PART or HELD_OUT_PART"),
    ({"TRAIN": "toy/world.py", "HELD_OUT": "toy/world.py"}, "are the same records"),
    ({"ROUNDS": "99999999999"}, "argument --round"),
    ({"SEED": "99999999999999999999"}, "argument --seed"),
])
def test_the_loop_checks_every_stage_before_the_first(loop, settings, what):
    refused(loop(path=Path(sys.executable).parent, **settings), what)


@pytest.mark.parametrize("name,options,named", [
    ("01_sample", ["--prompt", "a", "--guidance-interval", "0.8", "0.2"], "--guidance-interval"),
    ("01_sample", ["--prompt", "a", "--guidance-interval", "0.5", "0.5"], "--guidance-interval"),
    ("01_sample", ["--prompt", "a", "--caption-settings", "5"], "should be K:T"),
    ("03_pair_dpo", ["--pairs", "p", "--out", "o", "--und", "0", "--gen", "0"], "nothing to learn"),
    ("03_pair_dpo", ["--pairs", "p", "--out", "o", "--beta", "0"], "nothing to learn"),
])
def test_options_that_do_nothing_together(name, options, named, capsys):
    with pytest.raises(SystemExit) as ended:
        stage(name).parse_args(options)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert named in said and said.count("\n") == 1


def test_the_loop_keeps_what_it_sets_itself(tmp_path):
    done = subprocess.run(["bash", ROOT / "run_selfplay.sh"], capture_output=True, text=True,
                          env=os.environ | {"OUT": str(tmp_path / "o"), "SAMPLE": "--out elsewhere"})
    assert done.returncode == 2 and not (tmp_path / "o").exists()
    assert done.stderr == "error: --out is set by the loop, not in SAMPLE, SCORE, DPO or EVAL\n"
