"""evals/report.py and its parts: what the page of a run shows, whole, in part, or damaged."""

import base64
import io
import math
import re
import shutil
from functools import partial

import pytest
import torch
from PIL import Image

from conftest import main, stage
from evals import metrics
from evals.charts import Axes, Line, axes_of, chart, thinned, ticks, x_ticks
from evals.gallery import Judged, candidate, judged
from evals.html import figure, wrong_answers
from evals.metrics import EvalRecord
from evals.rounds import acceptance, overview, previews, tally, training
from hermesflow.files import HELD, InputError
from hermesflow.jsonl import write_jsonl
from hermesflow.records import Pair, Question, Score
from hermesflow.tables import write_table
from test_benchmark_runs import lines, photo, put, put_lines
from test_eval import change_settings, one_line
from test_judges import put_evaluation

evaluation = stage("04_eval")


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    """Intervals of 200 resamplings instead of 10,000."""
    monkeypatch.setattr(metrics, "bootstrap", partial(metrics.bootstrap, draws=200))


NASTY = 'a <b>bold</b> & "quoted" ring'
SAFE = "a &lt;b&gt;bold&lt;/b&gt; &amp; &quot;quoted&quot; ring"
TRAINING = ("loss", "nll", "margin", "accuracy", "win_change", "lose_change")
QUESTIONS = [Question("is it <u>blue</u>?", ["yes", "no"], "yes", "color"),
             Question("how many?", ["one", "two"], "two", "counting")]
SETTINGS = {"stage": "02_score", "settings": {}, "inputs": {}, "derived": {"previous": None}}


def report_evaluation(folder, real, gen_right: list[bool]) -> None:
    questions = [Question("is it red?", ["yes", "no"], "yes", "color"),
                 Question("how many?", ["one", "two"], "two", "counting")]
    gen_answers = ["yes" if gen_right[0] else "no", "two"]
    records = []
    for id, text in (("a", NASTY), ("b", "two blue squares")):
        records.append(EvalRecord(
            id, str(real), text, questions, "a caption", 0.25, ["yes", "two"], ["yes", "two"],
            [True, True], gen_answers, gen_answers, gen_right, all(gen_right)))
        photo(folder / "images" / f"{id}.png", 1)
    put_evaluation(folder, records, judge=f"the judge of {folder.name}", steps="16", matcher="text")


def save_pairs(folder, pairs: list[Pair], scores: list[Score], previous=None) -> None:
    """What 02_score.py leaves, but for pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    write_table(folder / "pairs.jsonl", [(p, {"image": torch.tensor([0])}) for p in pairs])
    write_jsonl(folder / "scores.jsonl", scores)
    put(folder / "settings.json", SETTINGS | {"derived": {"previous": previous}})


def pair(id: str, win: float, lose: float, win_wrong: str, lose_wrong: str) -> Pair:
    return Pair(id, "", NASTY, "", f"good {id} <i>", f"bad {id}", 0.875, 0.125, win, lose,
                win_wrong, lose_wrong, True, True)


def score(id: str, answers: list[list[str]], dropped: str = "") -> Score:
    """Of images with these answers to QUESTIONS; each is taken for itself, or for no choice."""
    matched = [[a if a in q.choices else "" for a, q in zip(row, QUESTIONS)] for row in answers]
    right = [sum(c == q.answer for c, q in zip(row, QUESTIONS)) / 2 for row in matched]
    return Score(id, QUESTIONS, [0.875, 0.125], right, answers, matched, dropped)


@pytest.fixture
def finished(tmp_path):
    """The files that run_selfplay.sh leaves after one round, as far as the report reads them."""
    folder = tmp_path / "toy run"
    real = photo(tmp_path / "real.jpg", 0)
    report_evaluation(folder / "eval" / "base", real, [False, True])
    report_evaluation(folder / "eval" / "round1", real, [True, True])
    both = "is it <u>blue</u>?\nhow many?"
    save_pairs(folder / "round1" / "pairs", [pair(id, 1.0, 0.0, "", both) for id in "xy"], [
        score("x", [["yes", "two"], ["no", "<b>many"]]),
        score("y", [["yes", "two"], ["no", "one"]]),
        score("z", [["no", "one"], ["no", "one"]], "images: <best> is low"),
    ])
    for side in ("real", "win", "lose"):  # of the first pair alone
        photo(folder / "round1" / "pairs" / "images" / f"x-{side}.png", 2)
    log = []
    for step in range(3):
        line = {"step": step, "grad_norm": 1.0, "lr": 1e-5}
        for key in TRAINING:
            line[f"{key}_und"] = line[f"{key}_gen"] = math.exp(-step)
        log.append(line)
    put_lines(folder / "round1" / "train" / "train.jsonl", log)
    put(folder / "round1" / "train" / "settings.json",
        {"stage": "03_pair_dpo", "settings": {"lr": "<1e-3>", "beta": "0.2"},
         "inputs": {"pairs": {"items": 2, "content": "0123456789abcdef"}, "reference": None},
         "code": {"03_pair_dpo.py": "fedcba9876543210"}})
    return folder


def reported(folder, *more) -> str:
    main(evaluation, "--report", folder, *more)
    return (folder / "report.html").read_text(encoding="utf-8")


CURVES = 8  # charts of a log without the gradients of the halves
IN_THE_PAGE = (
    # what was done
    "judge the judge of base, matcher text", "steps 16, guidance 0.0, seed 0", "2, fingerprint r",
    "<td>base</td><td>fingerprint base</td>", "fresh pairs, trained with lr &lt;1e-3&gt;, beta 0.2",
    # numbers
    "0.500 [0.500, 0.500]", "1.000 [1.000, 1.000]", "+0.500 [+0.500, +0.500]",
    "0.250 [0.250, 0.250]", "2 held-out records", "2 different texts", "base ✗ 1/2",
    "round1 ✓ 2/2", "answers about the real image: base 2/2, round1 2/2",
    "<td>color</td><td>2</td><td>1.000</td><td>1.000</td><td>0.000</td><td>1.000</td>",
    # records and pairs
    "two blue squares", "win 1.00", "lose 0.00", "win 0.88",
    "lose 0.12", "good x &lt;i&gt;", "bad x", "■ 2 records, 66.7%", "▨ 1 records, 33.3%",
    "dropped: images: &lt;best&gt; is low",
    # training and settings
    "round1: training", "margin β Δ", "log-prob changes of images", "learning rate",
    "not in train.jsonl: grad_norm_und, grad_norm_gen, grad_cosine", "eval/round1",
    "items 2, content 0123456789abcdef", "fedcba9876543210",
)


def test_report(finished):
    page = reported(finished)
    assert page.startswith("<!doctype html>") and "<title>HermesFlow: toy run</title>" in page
    assert not re.search(r"https?://|<script|<link|@import|url\(", page)
    images = re.findall(r"<img [^>]*>", page)
    assert len(images) == 2 * 3 + 3 and all('src="data:image/png;base64,' in i for i in images)
    for text in IN_THE_PAGE:
        assert text in page, text
    assert page.count(SAFE) == 2
    assert "<b>bold" not in page and "<i>" not in page and "<u>" not in page
    assert "<b>many" not in page and "<best>" not in page
    assert "good y" not in page  # a pair without pictures
    assert page.count('<svg viewBox="0 0 360') == 3 + CURVES
    assert page.count("<svg") == page.count("</svg>")
    for anchor in re.findall(r'href="#(\w+)"', page):
        assert f'id="{anchor}"' in page


def test_report_says_where_pairs_come_from(finished):
    file = finished / "round1" / "pairs" / "settings.json"
    put(file, SETTINGS | {"derived": {"previous": {"items": 2}}})
    assert "self-play pairs (Eq. 9–10), trained with lr" in reported(finished)


def test_every_picture_can_be_enlarged(finished):
    page = reported(finished)
    assert page.count('<input type="checkbox"') == page.count("<img") == 9
    assert 'aria-label="enlarge base ✗ 1/2"' in page


def test_report_shows_few(finished):
    assert "two blue squares" not in reported(finished, "--show", 1)


# ------------------------------------------------------------------------------ what was answered


def test_wrong_answers_of_a_drawing(finished):
    page = reported(finished)
    shown = ('<p>base’s drawing</p><ul><li>is it red? <b class="wrong">✗ <q>no</q></b>; right: '
             '<b class="right"><q>yes</q></b></li></ul>')
    assert page.count(shown) == 2 and "round1’s drawing" not in page


def test_wrong_answers_say_what_they_were_taken_for():
    answers = ["no", "<i>three"]
    shown = wrong_answers("t", QUESTIONS, answers, ["no", "one"])
    assert "✗ <q>&lt;i&gt;three</q></b>, taken for <q>one</q>; right: " in shown
    assert shown.count("taken for") == 1  # "no" is a choice itself
    assert ", taken for no choice; right" in wrong_answers("t", QUESTIONS, answers, ["yes", ""])
    assert "taken for" not in wrong_answers("t", QUESTIONS, answers, ["yes", None])
    assert "✗ no answer</b>; right" in wrong_answers("t", QUESTIONS, ["", ""], ["yes", ""])
    assert wrong_answers("t", QUESTIONS, ["yes", "two"], ["yes", "two"]) == ""


def test_long_lists_are_folded():
    shown = wrong_answers("t", QUESTIONS[:1] * 5, ["no"] * 5, ["no"] * 5)
    assert shown.count("<li>") == 5 and "<details><summary>2 more</summary><ul><li>" in shown


def test_answers_about_pairs(finished):
    page = reported(finished)
    assert "<p>lose image</p><ul><li>is it &lt;u&gt;blue&lt;/u&gt;? <b" in page
    assert "how many? <b class=\"wrong\">✗ <q>&lt;b&gt;many</q></b>, taken for no choice" in page
    assert "<p>win image" not in page  # nothing is wrong in it
    # without the answers, the questions alone
    (finished / "round1" / "pairs" / "scores.jsonl").unlink()
    page = reported(finished)
    assert ("<p>lose image: answered wrong</p><ul><li>is it &lt;u&gt;blue&lt;/u&gt;?</li>"
            "<li>how many?</li></ul>") in page
    assert "scores.jsonl: No such file" in page and "Candidates and pairs" not in page


def test_losers_of_self_play_come_from_earlier_rounds(tmp_path):
    blue, many = (q.question for q in QUESTIONS)
    first = score("x", [["no", "two"], ["no", "one"]])
    second = score("x", [["yes", "two"], ["no", "none"]])  # better: it meets the first's winner
    third = score("x", [["yes", "eight"], ["no", "nine"]])  # no better: it meets the old loser
    save_pairs(tmp_path / "1", [pair("x", 0.5, 0.0, blue, f"{blue}\n{many}")], [first])
    save_pairs(tmp_path / "2", [pair("x", 1.0, 0.5, "", blue)], [second], {})
    save_pairs(tmp_path / "3", [pair("x", 0.5, 0.5, many, blue)], [third], {})
    history = [judged(tmp_path / name) for name in "123"]
    rounds = [h.pairs[0] for h in history]
    assert candidate(history[:1], rounds[0], "lose") == (first, 1)
    assert candidate(history[:2], rounds[1], "win") == (second, 0)
    assert candidate(history[:2], rounds[1], "lose") == (first, 0)
    assert candidate(history, rounds[2], "win") == (third, 0)
    assert candidate(history, rounds[2], "lose") == (first, 0)
    # a pair that these scores did not give
    assert candidate(history[:1], pair("x", 0.5, 0.0, many, many), "win") is None
    assert candidate([Judged()], rounds[0], "win") is None
    assert candidate([Judged(), history[1]], rounds[1], "lose") is None
    assert candidate(history[1:2], rounds[1], "lose") is None


# ------------------------------------------------------------------------------------------ rounds


def test_tally(tmp_path):
    scores = [score("x", [["yes", "two"], ["no", "one"]]),
              score("y", [["yes", "one"]], "captions"), score("z", [], "no questions")]
    save_pairs(tmp_path, [pair("x", 1.0, 0.0, "", "")], scores)
    t = tally(tmp_path)
    assert (t.records, t.pairs, t.dropped) == (3, 1, {"captions": 1, "no questions": 1})
    assert t.captions == {2} and t.images == {0, 1, 2} and t.judged == 2
    assert t.caption_scores == [2.625, 1.5, 0.375] and t.image_scores == [1.5, 1.0, 0.5]
    assert ("<td>round1</td><td>3</td><td>2</td><td>0 to 2</td><td>1</td><td>33.3%</td>"
            "<td>0.875, 0.500, 0.125</td><td>0.750, 0.500, 0.250</td>") in overview({"round1": t})
    shares = re.findall(r'flex:(\d+)"', acceptance(t))
    assert shares == ["1", "1", "1"] and acceptance(t).count("dropped: ") == 2


def test_training_with_the_gradients_of_the_halves(finished):
    file = finished / "round1" / "train" / "train.jsonl"
    log = lines(file)
    log[1] |= {"grad_norm_und": 1.0, "grad_norm_gen": 2.0, "grad_cosine": -0.5}
    put_lines(file, log)
    page = training(file.parent)
    assert "not in train.jsonl" not in page and page.count('<svg viewBox="0 0 360') == CURVES + 1
    put_lines(file, [{"step": 0, "loss_und": 1.0}])
    page = training(file.parent)
    assert page.count('<svg viewBox="0 0 360') == 1 and "accuracy_gen, win_change_und" in page


def test_previews(tmp_path):
    assert previews(tmp_path) == ""
    for step in range(0, 1000, 100):
        photo(tmp_path / "previews" / f"{step:06d}.png", step, (300, 200))
    shown = previews(tmp_path)
    assert re.findall(r"<figcaption>(.*?)</figcaption>", shown) == [
        f"after {step} steps" for step in (0, 200, 400, 600, 800, 900)]
    assert "(6 of 10)" in shown


def test_report_without_rounds(finished):
    shutil.rmtree(finished / "round1")
    page = reported(finished)
    assert "Paired difference" not in page and "round1 ✓ 2/2" not in page
    assert page.count('<svg viewBox="0 0 360') == 3


def test_report_of_a_round_without_evaluation(finished):
    shutil.rmtree(finished / "eval" / "round1")
    shutil.rmtree(finished / "round1" / "train")
    page = reported(finished)
    assert "round1: not evaluated (no eval/round1/answers.jsonl)" in page
    assert "■ 2 records, 66.7%" in page and "train.jsonl: No such file" in page


def test_report_of_a_single_step(finished):
    """After one step, all margins and changes are 0: their chart is flat."""
    file = finished / "round1" / "train" / "train.jsonl"
    put_lines(file, [{**dict.fromkeys(lines(file)[0], 0.0), "step": 0}])
    page = reported(finished)
    assert page.count('<svg viewBox="0 0 360') == 3 + CURVES
    assert "nan" not in page and "inf" not in page.replace("data:image", "").split("<svg")[-1]


@pytest.mark.parametrize("content, note", [
    ("", "train.jsonl: empty"), ("{", "train.jsonl: line 1: not valid JSON"),
    ('{"loss_und": 0.5}\n', "field &#x27;step&#x27; is missing"),
    ('{"step": 0, "loss_und": "low"}\n', "field &#x27;loss_und&#x27; should be float"),
    ("[1]\n", "expected an object"),
    ('{"step": 0, "loss_und": NaN}\n', "not valid JSON"), (b"\xff\xfe", "not UTF-8"),
])
def test_report_with_a_damaged_log(finished, content, note):
    file = finished / "round1" / "train" / "train.jsonl"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    page = reported(finished)
    assert note in page and page.count('<svg viewBox="0 0 360') == 3
    assert "good x" in page and "<details>" in page  # everything else is there


def test_report_ignores_other_folders(finished):
    for name in ("round1_backup", "round", "roundabout", "round01", "round2.old"):
        shutil.copytree(finished / "round1" / "train", finished / name / "train")
    page = reported(finished)
    assert page.count(": training</h2>") == 1 and "round1_backup: " not in page


def test_report_without_pairs(finished):
    shutil.rmtree(finished / "round1" / "pairs")
    page = reported(finished)
    assert "pairs.jsonl: No such file" in page and page.count('<svg viewBox="0 0') >= 3 + CURVES


@pytest.mark.parametrize("place", ["eval/base/images/a.png", "round1/pairs/images/x-win.png"])
def test_report_with_a_damaged_picture(finished, place):
    whole = reported(finished).count("<img")
    file = finished / place
    file.write_bytes(file.read_bytes()[:100])
    page = reported(finished)
    assert page.count("<img") == whole - 1 and f"{place}: cannot read image" in page
    file.unlink()
    page = reported(finished)
    assert page.count("<img") == whole - 1 and ": no picture" in page


def test_report_with_other_questions(finished):
    """Elements that one evaluation alone asks about have a dash for the other."""
    file = finished / "eval" / "round1" / "answers.jsonl"
    file.write_text(file.read_text().replace('"color"', '"shape"'))
    change_settings(finished / "eval" / "round1", inputs={"records": {"content": "q"}},
                    code={"evals/judges.py": "other"})
    page = reported(finished)
    assert "<td>color</td><td>2</td><td>1.000</td><td>–</td><td>0.000</td><td>–</td>" in page
    assert "<td>shape</td><td>2</td><td>–</td><td>1.000</td><td>–</td><td>1.000</td>" in page
    assert "round1 was evaluated with other settings: " in page
    assert "--judge the judge of base -&gt; the judge of round1; content of --records" in page
    assert "round1 was evaluated by other code: evals/judges.py" in page


def test_report_with_damaged_settings(finished):
    put(finished / "round1" / "train" / "settings.json", "{ // an editor's")
    page = reported(finished)
    assert "settings.json: not valid JSON" in page
    put(finished / "round1" / "train" / "settings.json", {"settings": 3})
    assert "field &#x27;settings&#x27; should be dict" in reported(finished)
    put(finished / "eval" / "base" / "settings.json", {"stage": "04_eval"})
    assert "eval/base/settings.json: of another version" in reported(finished)


def test_report_of_a_moved_run(finished):
    """Held-out images that stand relative to the answers move with them."""
    photo(finished / "held_out" / "0.png", 3)
    for name in ("base", "round1"):
        file = finished / "eval" / name / "answers.jsonl"
        records = lines(file)
        for record in records:
            record["image"] = "../../held_out/0.png"
        put_lines(file, records)
    images = reported(finished).count("<img")
    HELD.clear()  # as when a process ends
    moved = finished.rename(finished.parent / "moved")
    page = reported(moved)
    assert page.count("<img") == images and "no picture" not in page


def test_report_replaces_only_its_own(finished, capsys):
    put(finished / "report.html", "mine")
    assert "report.html: is there already" in one_line(capsys, "--report", finished)
    assert (finished / "report.html").read_text() == "mine"
    (finished / "report.html").unlink()
    assert reported(finished) == reported(finished)


def test_report_needs_the_base(finished):
    shutil.rmtree(finished / "eval" / "base")
    with pytest.raises(InputError, match="eval/base/answers.jsonl: missing"):
        reported(finished)


def test_report_refuses_other_records(finished):
    file = finished / "eval" / "round1" / "answers.jsonl"
    file.write_text(file.read_text().splitlines()[1] + "\n")
    with pytest.raises(InputError, match="round1.*other records"):
        reported(finished)


@pytest.mark.parametrize("prepare", [
    lambda run: None,
    lambda run: put(run / "round1_backup" / "train" / "train.jsonl", ""),
    lambda run: put(run, "a file"),
])
def test_report_of_no_run(tmp_path, capsys, prepare):
    prepare(tmp_path / "run")
    error = one_line(capsys, "--report", tmp_path / "run")
    assert "eval/base/answers.jsonl: missing" in error


# ------------------------------------------------------------------------------ charts, pictures


def test_axes_span_the_data():
    """Intervals included; not from zero, and never without a height."""
    line = Line("a", "und", [(0, 2.75, 2.5, 3.0), (1, 2.8, 2.7, 2.9)])
    axes = axes_of([line], named=True)
    assert (axes.low, axes.high) == pytest.approx((2.47, 3.03))
    assert (axes.left, axes.right) == (-0.3, 1.3)
    flat = axes_of([Line("a", "", [(3, 0.0)])], named=False)
    assert (flat.left, flat.right, flat.low, flat.high) == (2.7, 3.3, 0, 1)


@pytest.mark.parametrize("values, low, high", [
    ([0.5, 1.0], 0.47, 1), ([0.0, 0.5], 0, 0.53), ([0.0, 1.0], 0, 1), ([1.0, 1.0], 0.9, 1),
    ([0.0, 0.0], 0, 1), ([0.5, 0.5], 0.45, 0.55),
    # what is no share
    ([-0.5, 0.5], -0.56, 0.56), ([0.5, 1.5], 0.44, 1.56), ([-2.0, -2.0], -2.2, -1.8),
])
def test_axes_of_shares_end_at_0_and_1(values, low, high):
    axes = axes_of([Line("a", "", list(enumerate(values)))], named=False)
    assert (axes.low, axes.high) == pytest.approx((low, high))


@pytest.mark.parametrize("left, right, texts", [
    (0, 1, ["0", "1"]), (2.7, 3.3, ["3"]), (0, 2, ["0", "1", "2"]), (7, 9, ["7", "8", "9"]),
    (0, 5, ["0", "1", "2", "3", "4", "5"]), (0.5, 11.5, ["2", "4", "6", "8", "10"]),
    (0, 2999, ["0", "500", "1000", "1500", "2000", "2500"]),
    (0, 2e6, ["0", "500000", "1000000", "1500000", "2000000"]),
])
def test_ticks_of_steps_are_whole(left, right, texts):
    assert [text for _, text in x_ticks(Axes(left, right, 0, 1))] == texts


@pytest.mark.parametrize("low, high, texts", [
    (0.47, 1.03, ["0.5", "0.6", "0.7", "0.8", "0.9", "1.0"]),
    (-1.2, 0.3, ["−1.0", "−0.5", "0.0"]),
    (0, 5e-5, ["0", "1e-05", "2e-05", "3e-05", "4e-05", "5e-05"]),
    (0, 2999, ["0", "500", "1000", "1500", "2000", "2500"]),
])
def test_ticks_are_round_numbers(low, high, texts):
    assert [text for _, text in ticks(low, high, 6)] == texts


def test_long_lines_are_means():
    points = [(i, float(i % 2)) for i in range(480)]
    assert thinned(points) == [(i + 0.5, 0.5) for i in range(0, 480, 2)]
    assert thinned(points[:240]) == points[:240]
    assert "a point is the mean of 2 steps" in chart("t", [Line("a", "", points)])
    assert "mean of" not in chart("t", [Line("a", "", points[:240])])


def test_a_chart_escapes_and_does_not_rely_on_colour():
    shown = chart("<t>", [Line("<a>", "win", [(0, 1.0)]), Line("b", "lose", [(0, 2.0)])], ["<x>"])
    assert "&lt;t&gt;" in shown and "&lt;a&gt;" in shown and "&lt;x&gt;" in shown
    assert "<t>" not in shown and "<a>" not in shown and "<x>" not in shown
    assert shown.count('class="line win"') == shown.count('class="line lose"') == 2  # with legend


def picture_in(html: str) -> Image.Image:
    data = re.search(r"base64,([^\"]*)", html)[1]
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_small_pictures_are_exact_and_large_ones_shrunk(tmp_path):
    small = photo(tmp_path / "small.png", 0, (64, 64))
    shown = picture_in(figure(small, "x"))
    assert shown.format == "PNG" and shown.tobytes() == Image.open(small).tobytes()
    large = photo(tmp_path / "large.png", 0, (1600, 800))
    assert picture_in(figure(large, "x")).size == (512, 256)
    sheet = picture_in(figure(large, "x", "sheet"))
    assert sheet.size == (1024, 512) and sheet.format == "JPEG"


def test_names_of_pictures_are_escaped(tmp_path):
    photo(tmp_path / "a.png", 0)
    for path in (tmp_path / "a.png", tmp_path / "absent.png"):
        assert '"<b>' not in figure(path, '"<b>') and "&quot;&lt;b&gt;" in figure(path, '"<b>')
