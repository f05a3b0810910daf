"""Output folders: what is reused, what is refused, and what is never touched."""

import errno
import fcntl
import json
import os
import shutil
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import ROOT
from hermesflow import contents, files, outputs
from hermesflow.contents import code_of, content, digest
from hermesflow.files import HELD, InputError, atomic, write_text
from hermesflow.outputs import Output, complete, finish, prepare, run_main
from hermesflow.tables import save_tensors


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def output(tmp_path) -> Output:
    """A small stage: it reads lines that may grow and a model, and writes out.txt."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "lines.txt").write_text("a\nb\n")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "stage.py").write_text("import json\n")
    args = {"lines": tmp_path / "in" / "lines.txt", "model": str(tmp_path / "model"), "seed": 0,
            "batch": 4, "show": 8, "out": tmp_path / "out", "overwrite": False}

    def lines():
        return [(line,) for line in args["lines"].read_text().splitlines()]

    return Output(tmp_path / "out", "stage", "out.txt", writes=("out.txt", "images"), args=args,
                  free=("batch",), derived=("show",), code=(str(tmp_path / "stage.py"),),
                  inputs={"lines": lines, "model": args["model"]})


def changed(output: Output, **args) -> Output:
    return replace(output, args=output.args | args)


def released() -> None:
    """As if the process had ended."""
    outputs.say_once.cache_clear()
    for holding in HELD.values():
        holding.lock.close()
    HELD.clear()


def made(output: Output, text: str = "result") -> None:
    """Run the stage to its end."""
    released()
    prepare(output)
    write_text(output.folder / "out.txt", text)
    write_text(output.folder / "images" / "0.png", "picture")
    finish(output)
    released()


def refused(output: Output, message: str) -> None:
    """It says so, and the folder stays as it is."""
    before = everything(output.folder)
    released()
    with pytest.raises(InputError, match=message):
        prepare(output)
    assert everything(output.folder) == before


def everything(folder: Path) -> dict:
    found = {}
    for path in folder.rglob("*"):
        if path.is_file() and path.name != "lock":
            found[str(path.relative_to(folder))] = path.read_text()
    return found


# ------------------------------------------------------------------- nothing of the user's is touched


def test_a_folder_that_is_no_output_is_refused(output, tmp_path, monkeypatch):
    home = tmp_path / "home" / "me"
    home.mkdir(parents=True)
    (tmp_path / "project" / ".git").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    places = [(home, "is or holds the home folder"), (home.parent, "is or holds the home folder"),
              (Path("/"), "is or holds"), (ROOT, "is or holds this program"),
              (ROOT.parent, "is or holds"), (tmp_path / "project", "is a git checkout")]
    for place, message in places:
        with pytest.raises(InputError, match=message):
            prepare(replace(output, folder=place))
        assert not (place / ".run").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_touches_an_input_is_refused(output, tmp_path, overwrite):
    output = changed(output, overwrite=overwrite)
    (tmp_path / "link").symlink_to(tmp_path / "in")
    places = {
        "in": r"is or holds its own input \(--lines: ",  # holds a file that is read
        "link": "is or holds its own input",
        "model": r"is or holds its own input \(--model: ",
        "model/out": r"lies inside its own input \(--model: ",
        "in/../in": "is or holds its own input",
        "": "is or holds its own input",
    }
    before = everything(tmp_path)
    for place, message in places.items():
        with pytest.raises(InputError, match=message):
            prepare(replace(output, folder=tmp_path / place))
    assert everything(tmp_path) == before


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["out.txt", "images/mine.png", "settings.json", "parts/a", "state/b"])
def test_files_that_no_stage_wrote_are_not_replaced(output, name, overwrite):
    path = output.folder / name
    path.parent.mkdir(parents=True)
    path.write_text('{"editor.fontSize": 14}')
    message = f"{name}: is there already, and no stage wrote it"
    refused(changed(output, overwrite=overwrite), message)
    assert sorted(p.name for p in output.folder.iterdir()) == [name.split("/")[0]]


def test_overwrite_removes_what_stages_wrote_and_nothing_else(output):
    made(output)
    mine = {"notes.txt": "notes", ".hidden.tmp": "x", "sub/images/0.png": "y"}
    (output.folder / "sub" / "images").mkdir(parents=True)
    for name, text in mine.items():
        (output.folder / name).write_text(text)
    (output.folder / ".out.txt.77.tmp").write_text("left by a kill")
    (output.folder / "images" / ".0.png.7.tmp").write_text("left by a kill")
    made(changed(output, overwrite=True, seed=1), "other")
    left = everything(output.folder)
    assert left.pop("out.txt") == "other"
    assert json.loads(left.pop("settings.json"))["settings"]["seed"] == "1"
    left = {name: text for name, text in left.items() if not name.startswith(".run")}
    assert left == mine | {"images/0.png": "picture"}


def test_overwrite_keeps_my_file_in_a_folder_of_the_stage(output):
    made(output)
    (output.folder / "images" / "mine.txt").write_text("mine")
    message = "images/mine.txt: is there already, and no stage wrote it"
    refused(changed(output, overwrite=True), message)


def test_only_our_own_temporaries_are_cleaned(output):
    made(output)
    ours = [".out.txt.123.tmp", "images/.0.png.99999.tmp"]
    theirs = [".cache.tmp", ".draft.12.tmp", "images/.out.txt.5.tmp", ".out.txt.x.tmp"]
    for name in ours + theirs:
        (output.folder / name).write_text("x")
    released()
    prepare(output)
    assert [n for n in ours + theirs if (output.folder / n).exists()] == theirs


def test_a_file_that_appears_meanwhile_is_kept(output):
    prepare(output)
    (output.folder / "out.txt").write_text("mine")
    with pytest.raises(InputError, match="out.txt: is there already, and no stage wrote it"):
        write_text(output.folder / "out.txt", "the stage's")
    assert (output.folder / "out.txt").read_text() == "mine"
    released()


@pytest.mark.parametrize("overwrite", [False, True])
def test_another_stages_results_are_refused(output, overwrite):
    made(output)
    other = replace(changed(output, overwrite=overwrite), stage="other")
    refused(other, "holds the results of stage; other needs another --out")


@pytest.mark.parametrize("overwrite", [False, True])
def test_another_versions_results_are_refused(output, overwrite):
    output.folder.mkdir()
    (output.folder / "settings.json").write_text('{"format": "2", "seed": "0"}')
    (output.folder / "out.txt").write_text("old")
    refused(changed(output, overwrite=overwrite), r"made by another version \(format 2 -> 3\)")


def test_a_folder_without_results_takes_a_corrected_command(output):
    prepare(output)
    released()
    prepare(replace(changed(output, seed=1), stage="other"))
    mark = json.loads((output.folder / "settings.json").read_text())
    assert mark["stage"] == "other" and mark["settings"] == {"seed": "1"}
    released()


def test_a_process_stops_when_its_folder_is_removed_or_replaced(output):
    prepare(output)
    shutil.rmtree(output.folder)
    with pytest.raises(InputError, match="out: removed or replaced while process"):
        write_text(output.folder / "out.txt", "orphan")
    assert not (output.folder / "out.txt").exists()
    (output.folder / ".run").mkdir(parents=True, exist_ok=True)
    (output.folder / ".run" / "lock").write_text("process 1")
    with pytest.raises(InputError, match="removed or replaced while process"):
        save_tensors(output.folder / "out.safetensors", {"a": torch.zeros(1)})
    assert everything(output.folder) == {}
    released()


def test_files_follow_the_umask(tmp_path, monkeypatch):
    for umask, mode in ((0o022, 0o644), (0o077, 0o600), (0o002, 0o664)):
        monkeypatch.setattr(files, "UMASK", umask)
        save_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(1)})
        with atomic(tmp_path / "folder") as temporary:
            temporary.mkdir()
            save_tensors(temporary / "b.safetensors", {"a": torch.zeros(1)})
        for name in ("a.safetensors", "folder/b.safetensors"):
            assert stat.S_IMODE((tmp_path / name).stat().st_mode) == mode


# ------------------------------------------------------------------------------------------- locks


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_said_once(output, monkeypatch, capsys, number):
    def unsupported(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    prepare(output)
    prepare(output)
    printed = capsys.readouterr().out
    assert printed.count(f"cannot be locked ({os.strerror(number)})") == 1
    released()


def test_a_folder_in_use_names_its_process(output):
    prepare(output)
    program = ("import fcntl, sys\nfrom pathlib import Path\nfrom hermesflow.outputs import lock\n"
               f"lock(Path({str(output.folder)!r}))")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert f"out: in use by process {os.getpid()} on " in done.stderr
    released()


# ----------------------------------------------------------------- what is reused is what was asked for


def test_a_complete_stage_is_recognised(output, capsys):
    assert not complete(output)
    made(output)
    assert complete(output)
    assert capsys.readouterr().out == f"{output.folder / 'out.txt'} is complete\n"
    for same in ({"batch": 8}, {"out": "elsewhere"}):
        assert complete(changed(output, **same))
    assert not complete(changed(output, overwrite=True))
    (output.folder / "out.txt").unlink()
    assert not complete(output)


def test_contents_are_compared_and_not_names(output, tmp_path):
    made(output)
    (tmp_path / "model").rename(tmp_path / "moved")
    for name in ("moved", "moved/", "in/../moved", os.path.relpath(tmp_path / "moved")):
        model = name if name.startswith("..") else str(tmp_path / name)
        assert complete(replace(changed(output, model=model), inputs=output.inputs | {"model": model}))
    output.folder.rename(tmp_path / "run")
    moved = replace(output, folder=tmp_path / "run")
    moved.inputs["model"] = str(tmp_path / "moved")
    assert complete(moved)


def test_other_settings_are_refused_by_name(output, tmp_path):
    made(output)
    refused(changed(output, seed=1), r"made with other settings \(--seed 0 -> 1\)")
    refused(changed(output, new_loss=2.0), r"\(--new-loss None -> 2.0\)")
    (tmp_path / "model" / "config.json").write_text("[]")
    refused(output, r"made with other settings \(content of --model\)")
    with pytest.raises(InputError, match="content of --model"):
        complete(output)


@pytest.mark.parametrize("text", ["a\nc\n", "b\na\n", "a\n", "x\na\nb\n", "a\nc\nb\nd\n"])
def test_other_lines_are_refused(output, text):
    made(output)
    output.args["lines"].write_text(text)
    refused(output, r"made with other settings \(content of --lines\)")


@pytest.mark.parametrize("finished", [False, True])
def test_appended_lines_continue(output, capsys, finished):
    made(output)
    if not finished:
        (output.folder / "out.txt").unlink()
        (output.folder / "parts").mkdir()
        (output.folder / "parts" / "0.log").write_text("work that is done")
    output.args["lines"].write_text("a\nb\nc\n")
    assert not complete(output)
    prepare(output)
    assert "made again from its results: lines: 2 -> 3" in capsys.readouterr().out
    assert not complete(output)  # not before it is finished
    # an edit of a line that was appended is noticed, too
    output.args["lines"].write_text("a\nb\nd\n")
    refused(output, "content of --lines")
    output.args["lines"].write_text("a\nb\nc\n")
    made(output)
    assert complete(output)


def test_a_result_that_was_changed_is_not_complete(output):
    """Cut by a disk, or edited by hand: neither passed on nor replaced in silence."""
    made(output)
    (output.folder / "out.txt").write_text("my own curation")
    with pytest.raises(InputError, match="out.txt: changed since stage wrote it"):
        complete(output)
    refused(output, "changed since stage wrote it; --overwrite makes it again, another --out keeps")
    refused(changed(output, show=9), "changed since stage wrote it")
    made(changed(output, overwrite=True), "again")
    assert complete(output) and (output.folder / "out.txt").read_text() == "again"


def test_pictures_of_earlier_results_go(output):
    made(output)
    write_text(output.folder / "mine.png", "mine")
    prepare(changed(output, show=1))
    assert not (output.folder / "images" / "0.png").exists()
    assert (output.folder / "mine.png").exists()
    released()


def test_derived_settings_are_made_again(output, capsys):
    made(output)
    more = changed(output, show=9)
    assert not complete(more)
    prepare(more)
    assert "made again from its results: show" in capsys.readouterr().out
    assert not complete(more)
    finish(more)
    assert complete(more)
    released()


def test_changed_code_is_said(output, tmp_path, capsys):
    made(output)
    (tmp_path / "stage.py").write_text("import os\n")
    assert complete(output)
    name = os.path.relpath(tmp_path / "stage.py", ROOT)
    said = f"was begun by other code: {name} changed since; --overwrite makes it again"
    assert said in capsys.readouterr().out
    (output.folder / "out.txt").unlink()  # interrupted
    released()
    prepare(output)
    assert said in capsys.readouterr().out
    finish(output)
    write_text(output.folder / "out.txt", "x")
    released()
    assert complete(output) and said in capsys.readouterr().out  # it stays begun by other code
    released()


def test_code_is_what_a_stage_imports():
    sampling = code_of([str(ROOT / "01_sample.py")])
    assert {"01_sample.py", "model.py", "hermesflow/showo.py", "hermesflow/files.py"} <= set(sampling)
    assert not {"hermesflow/scoring.py", "02_score.py", "evals/judges.py"} & set(sampling)
    assert "hermesflow/scoring.py" in code_of([str(ROOT / "02_score.py")])
    # also inside a function
    assert "toy/world.py" in code_of([str(ROOT / "evals" / "judges.py")])


# ---------------------------------------------------------------------------------------- contents


def test_a_file_is_read_once(tmp_path, monkeypatch):
    reads = []
    real = contents.file_content
    monkeypatch.setattr(contents, "file_content", lambda path: reads.append(path) or real(path))
    file = tmp_path / "weights"
    file.write_text("abc")
    first = digest(file)
    assert digest(file) == first and len(reads) == 2  # too young to be trusted
    monkeypatch.setattr(contents.time, "time", lambda: file.stat().st_ctime + 3)
    assert digest(file) == first and digest(file) == first and len(reads) == 3

    # other content of the same size and time is another file to the system
    times = file.stat()
    file.write_text("abd")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert digest(file) != first
    remembered = contents.remembered_file()
    for damaged in ("", "[1]", '{"a": [', "\0"):
        remembered.write_text(damaged)
        assert digest(tmp_path / "weights") != first


def test_contents_of_folders_and_items(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text("1")
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    (tmp_path / "b" / ".hidden").write_text("")
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    (tmp_path / "b" / "x").rename(tmp_path / "b" / "y")
    assert digest(tmp_path / "a") != digest(tmp_path / "b")
    os.mkfifo(tmp_path / "pipe")
    items = [[("ab", "c")], [("a", "bc")], [("a",)], [("a", tmp_path / "a" / "x")],
             [("a", tmp_path / "gone")]]
    values = [content(lambda: item) for item in items]
    assert len(set(values)) == len(items)
    assert content(lambda: [("a", tmp_path / "pipe")]) == values[-1]  # not waited for


# ----------------------------------------------------------------------------------------- the end


def test_an_interrupt_is_one_line(capsys):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        run_main(interrupted)
    assert ended.value.code == 130
    assert capsys.readouterr().err == "error: interrupted; the same command continues from here\n"


def test_outputs_import_nothing_heavy():
    program = ("import sys, hermesflow.outputs, hermesflow.inputs, hermesflow.options\n"
               "heavy = {'torch', 'transformers', 'accelerate', 'numpy'} & set(sys.modules)\n"
               "assert not heavy, heavy")
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
    assert outputs.FORMAT == "3"
