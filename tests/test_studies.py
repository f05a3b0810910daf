"""The studies' switches do what they say and nothing else, and the numbers in tables are right."""

import copy
import json
import math
import sys
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from tiny import row_logps, tiny_model

from bench.reference import logits_of, sequence
from evals.metrics import EvalRecord
from hermesflow.files import InputError
from hermesflow.jsonl import read_jsonl
from hermesflow.packed import Segment, answer_segment
from hermesflow.records import CAPTION_QUESTION, Pair, Question, Sample, Score, vqa_question
from hermesflow.sampling import random_mask, stable_seed
from hermesflow.scoring import caption_likelihood
from hermesflow.showo import image_segment
from hermesflow.tables import tensors_of, write_table
from toy import world

sys.path.insert(0, str(ROOT / "toy" / "studies"))
import loop
import switches
import tables
from main_result import mcnemar
from scorer import agreement, ranks, spearman

STUDIES = ("details", "janus", "main_result", "over_rounds", "recipes", "scorer", "why")
PAGES = sorted(page.stem for page in tables.RESULTS.glob("*.json"))
SEED = (3, 1)  # seed, round


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def stages(model):
    """Fresh globals, so that a switch does not outlive its test; stage 3 loads the tiny model."""
    stages = {number: loop.load_stage(number) for number in ("01", "02", "03")}
    stages["03"]["load"] = lambda: copy.copy(model)
    return stages


@pytest.fixture(scope="module")
def pairs(model, tmp_path_factory):
    generator = torch.Generator().manual_seed(0)

    def codes():
        return torch.randint(model.tokens.codes, (16,), generator=generator)

    rows = []
    texts = ["a big red ring", "blue square", "small ring left of a square", "square"]
    for i, text in enumerate(texts):
        pair = Pair(f"r-{i}", "", text, "", "", "", 1.0, 0.0, 1.0, 0.0, "", "", True, True)
        rows.append((pair, {"image": codes(), "win_image": codes(), "lose_image": codes(),
                            "win_caption": torch.tensor(model.encode_text(text)),
                            "lose_caption": torch.tensor(model.encode_text("no no"))}))
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    write_table(file, rows)
    return read_jsonl(file, Pair)


def make_batch(stages, model, pairs, dropout=0.5):
    stage = stages["03"]
    visits = [stage["Visit"](pair, 0) for pair in pairs]
    return stage["make_batch"](model, visits, SEED, dropout, 0.0)


def pair_logps(stages, pairs, dropout=0.5):
    """(und, gen) log-probs as stage 3 computes them, with the switches that are thrown."""
    model = stages["03"]["load"]()
    with torch.no_grad():
        return model.pair_logps(*make_batch(stages, model, pairs, dropout))


def equal(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


# ----------------------------------------------------------------------------------------- switches


def test_batch_summed(stages):
    switches.batch_summed(stages)
    delta = torch.tensor([1.0, -3.0, 0.5])
    loss = stages["03"]["dpo_loss"](delta, 0.2).item()
    assert loss == pytest.approx(-math.log(1 / (1 + math.exp(0.3))))


def test_a_switch_changes_what_the_stage_calls(stages, pairs):
    und, gen = pair_logps(stages, pairs)
    reference = torch.zeros(4, 2, 2)
    switches.batch_summed(stages)
    loss, _ = stages["03"]["pair_dpo"](und, gen, reference, 0.2)
    expected = 0
    for half in (und, gen):
        delta = half.sums[:, 0] - half.sums[:, 1]
        expected -= F.logsigmoid(0.2 * delta.sum()).item()
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_black_images(stages, model, pairs, monkeypatch):
    black = torch.arange(16)[None]
    monkeypatch.setattr(model, "encode_image", lambda pixels: black)
    text, image = make_batch(stages, model, pairs)
    switches.black_images(stages)
    black_text, black_image = make_batch(stages, model, pairs)
    assert black_text.images.tolist() == [list(range(16))] * 4 != text.images.tolist()
    assert black_text[1:] == text[1:]
    assert all(torch.equal(a, b) for a, b in zip(black_image[1:3], image[1:3]))
    assert black_image.prompts == image.prompts


def test_misaligned_join(stages):
    """By string, 10 comes before 2: their scores change places."""
    samples = [Sample(f"preference-0-{i:05d}", "", "") for i in (1, 2, 10)]
    scores = []
    for i, s in enumerate(samples):
        scores.append(Score(s.id, [Question(s.id, ["a"], "a")], [float(i)], [float(i)], [[]],
                            [["a" if i == 2 else "b"]]))
    stages["02"]["make_pairs"] = lambda samples, scores: scores
    switches.misaligned_join(stages)
    joined = stages["02"]["make_pairs"](samples, iter(scores))
    assert [s.id for s in joined] == [s.id for s in samples]
    assert [s.image_scores for s in joined] == [[0.0], [2.0], [1.0]]
    assert [s.matched for s in joined] == [[["b"]], [["a"]], [["b"]]]
    assert [s.caption_scores for s in joined] == [[0.0], [1.0], [2.0]]


def test_product_loss(stages):
    """At the start, where both margins are 0, its gradient is exactly 0; the sum's is not."""
    und = torch.zeros(4, requires_grad=True)
    gen = torch.zeros(4, requires_grad=True)

    def loss(und, gen):
        dpo_loss = stages["03"]["dpo_loss"]
        return (dpo_loss(und, 0.2) + dpo_loss(gen, 0.2)).sum()

    assert (torch.autograd.grad(loss(und, gen), und)[0] == -0.1).all()
    switches.product_loss(stages)
    assert all((g == 0).all() for g in torch.autograd.grad(loss(und, gen), (und, gen)))
    two = torch.tensor([2.0])
    assert loss(two, two).item() == pytest.approx(math.log(1 + math.exp(-0.8)))
    assert loss(two, two).item() == loss(-two, -two).item()
    stages["03"]["assert_healthy"]({"step": 0, "loss": math.log(2)}, [], None, True)


def test_masks(stages, model, pairs):
    """K masks give the mean of K, of which the first is stage 3's own."""
    _, one = pair_logps(stages, pairs, 0.0)
    switches.masks(stages, "2")
    _, two = pair_logps(stages, pairs, 0.0)
    expected = []
    for b, p in enumerate(pairs):
        tensors = tensors_of(p)
        prefix = Segment(model.tokens.t2i_prompt(p.caption))
        mask = random_mask(16, stable_seed(*SEED, p.id, 0, "mask", 1))
        images = [image_segment(model.tokens, codes.tolist(), mask.tolist())
                  for codes in (tensors["win_image"], tensors["lose_image"])]
        with torch.no_grad():
            sums, _ = row_logps(model.net, [[prefix, *images]])
        expected.append((one.sums[b] + sums[0, 1:]) / 2)
        assert (two.counts[b] == (one.counts[b] + mask.sum()) / 2).all()
    equal(two.sums, torch.stack(expected))


def test_same_slots(stages, pairs):
    _, gen = pair_logps(stages, pairs)
    switches.same_slots(stages, "10")
    _, scaled = pair_logps(stages, pairs)
    equal(scaled.sums, 10 * gen.sums / gen.counts)
    assert (scaled.counts == 10).all()


def test_chosen_by_oracle(stages, tmp_path):
    """A drawing of exactly the caption's scene has score 1; any mistake gives 0. The rest stays."""
    one, two, other = (np.full((4, 4), world.EMPTY) for _ in range(3))
    one[1, 2] = two[1, 2] = two[3, 3] = world.NAMES["big red ring"]
    other[1, 2] = world.NAMES["big blue ring"]
    pictures = np.stack([world.render(g) for g in (one, two, other)])

    def decode_image(codes):
        pixels = torch.from_numpy(pictures[codes[:, 0].numpy()])
        return pixels.permute(0, 3, 1, 2) / 127.5 - 1

    painter = SimpleNamespace(decode_image=decode_image)
    questions = [Question(**q) for q in world.questions("a big red ring")]
    sample = Sample("a", "", "a big red ring", questions=questions)
    shares, rights = switches.oracle(painter, sample, torch.tensor([[0], [1], [2]]))
    assert rights == [1, 0, 0]
    assert shares[0] == 1 > shares[2]

    score = Score("a", [], [1.0], [0.1, 0.9, 0.5], [], [])
    stages["02"]["score_records"] = lambda *_: [score]
    switches.chosen_by_oracle(stages)
    write_table(tmp_path / "samples.jsonl", [(sample, {"images": torch.tensor([[2], [0], [1]])})])
    samples = read_jsonl(tmp_path / "samples.jsonl", Sample)
    scored = stages["02"]["score_records"](painter, samples)
    assert scored == [Score("a", [], [1.0], [0, 1, 0], [], [])]


def test_answers(stages, model, pairs):
    """A question about the record's image with its answer, and another choice as the loser."""
    pair = pairs[0]
    visits = [stages["03"]["Visit"](pair, epoch) for epoch in range(20)]
    captions, images = stages["03"]["make_batch"](model, visits, SEED)
    switches.answers(stages)
    text, same_images = stages["03"]["make_batch"](model, visits, SEED)
    assert torch.equal(text.images, captions.images)
    assert all(torch.equal(a, b) for a, b in zip(same_images[1:3], images[1:3]))
    questions = [Question(**q) for q in world.questions(pair.caption)]
    known = {vqa_question(q): q for q in questions}
    losers = set()
    for prompt, (win, lose) in zip(text.prompts, text.responses, strict=True):
        question = known[prompt]
        assert win == model.encode_text(question.answer)
        assert lose in [model.encode_text(c) for c in question.choices if c != question.answer]
        losers.add(tuple(lose))
    assert len(set(text.prompts)) > 5 and len(losers) > 2  # they change from epoch to epoch
    again, _ = stages["03"]["make_batch"](model, visits, SEED)
    assert again.prompts == text.prompts and again.responses == text.responses
    # a micro-batch with one text per image, as many tokens as the words of answer and end
    und, _ = pair_logps(stages, [pair])
    assert und.counts.tolist() == [[len(r) + 1 for r in text.responses[0]]]


def test_a_half_of_weight_zero_takes_no_part(stages, pairs):
    und, gen = pair_logps(stages, pairs)
    reference = torch.zeros(4, 2, 2)
    losses = {}
    for weights in ((1, 1), (1, 0), (0, 1)):  # of und, of gen
        loss, log = stages["03"]["pair_dpo"](und, gen, reference, 0.2, *weights)
        losses[weights] = loss.item()
    assert losses[1, 1] == pytest.approx(losses[1, 0] + losses[0, 1])
    assert losses[1, 0] == pytest.approx(log["loss_und"].item())
    assert losses[0, 1] == pytest.approx(log["loss_gen"].item())


def test_every_switch_of_the_studies_is_there():
    for name in STUDIES:
        for settings in import_module(name).VARIANTS.values():
            for stage in ("sampling", "scoring", "training"):
                if settings.get(stage):
                    assert callable(getattr(switches, settings[stage].split()[0]))


# --------------------------------------------------------------------------------------------- loop


def test_defaults_are_those_of_the_loop(monkeypatch):
    assert set(loop.DEFAULTS) == {"SAMPLE", "SCORE", "DPO", "EVAL"}
    assert "--images 4" in loop.DEFAULTS["SAMPLE"]
    monkeypatch.setenv("SAMPLE", "--images 3")  # an override of run_selfplay.sh is none of a study
    assert loop.default_options("SAMPLE") == loop.DEFAULTS["SAMPLE"]


def test_the_environment_makes_no_records(tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path))
    loop.default_options("EVAL")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """What `loop.step` begins in a repository of two files, without its processes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loop, "ROOT", tmp_path)
    (tmp_path / "01_sample.py").write_text("import part\n")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "weights").write_text("1")
    (tmp_path / "toy" / "studies").mkdir(parents=True)
    (tmp_path / "toy" / "studies" / "switches.py").write_text("1")

    class Process:
        exitcode = 0
        join = start = lambda self: None

        def __init__(self, target, args):
            pass

    monkeypatch.setattr(loop, "FORKS", SimpleNamespace(Process=Process))
    loop.code.cache_clear()
    yield lambda *arguments, **paths: loop.step("01", *arguments, **paths).name
    loop.code.cache_clear()


@pytest.mark.parametrize("change", ["01_sample.py", "base/weights", "toy/studies/switches.py"])
def test_a_step_is_named_after_all_that_goes_into_it(begun, tmp_path, change):
    plain = begun("--batch 1", "", model="base")
    assert plain == begun("--batch 1", "", model="base")
    switched = begun("--batch 1", "masks 4", model="base")
    assert len({plain, switched, begun("--batch 2", "", model="base")}) == 3

    (tmp_path / change).write_text("2")
    loop.code.cache_clear()
    assert (begun("--batch 1", "", model="base") == plain) == ("switches" in change)
    assert begun("--batch 1", "masks 4", model="base") != switched


def test_what_a_study_made_is_known_by_its_name(begun, tmp_path):
    """Not by its content, which is not there before the stage has run."""
    made = loop.RUNS / "03-0123" / "checkpoint"
    assert begun("", model=made) == begun("", model=made)
    assert begun("", model=made) != begun("", model=loop.RUNS / "03-4567" / "checkpoint")


def test_a_failed_step_says_why(begun, monkeypatch):
    def fail(self):
        log, = [a.with_name(a.name + ".log") for a in self.args if isinstance(a, loop.Path)]
        log.parent.mkdir(parents=True)
        log.write_text("sample: 1/2\rsample: 2/2\nerror: no space left\n")

    def begin(self, target, args):
        self.args = args

    process = loop.FORKS.Process
    for name, value in {"__init__": begin, "join": fail, "exitcode": 2}.items():
        monkeypatch.setattr(process, name, value)
    with pytest.raises(InputError, match=r"runs/studies/01-\w+\.log: error: no space left"):
        begun("", model="base")


@pytest.mark.parametrize("cells, kind", [
    ({(0, 0): "big red ring"}, "objects missing"),
    ({(0, 0): "big red ring", (0, 1): "small blue square", (3, 3): "small blue square"},
     "objects too many"),
    ({(0, 0): "big red ring", (0, 1): "big blue square"}, "another object"),
    ({(0, 1): "big red ring", (0, 0): "small blue square"}, "relation"),
])
def test_fault(cells, kind):
    grid = np.full((4, 4), world.EMPTY)
    for at, name in cells.items():
        grid[at] = world.NAMES[name]
    caption = "a big red ring left of a small blue square"
    assert not world.judge(grid, caption)["correct"]
    assert loop.fault(grid, caption) == kind


def test_faults_are_those_of_the_drawn_codes(tmp_path, monkeypatch):
    """Drawings are read from the codes beside answers.jsonl; right ones are no faults."""
    grids = [np.full((4, 4), world.EMPTY) for _ in range(3)]
    grids[1][1, 2] = world.NAMES["big blue ring"]
    grids[2][1, 2] = world.NAMES["big red ring"]
    pictures = np.stack([world.render(g) for g in grids])

    def decode_image(codes):
        pixels = torch.from_numpy(pictures[codes[:, 0].numpy()])
        return pixels.permute(0, 3, 1, 2) / 127.5 - 1

    monkeypatch.setattr(loop, "load", lambda name: SimpleNamespace(decode_image=decode_image))
    rows = []
    for i in range(3):
        row = EvalRecord(str(i), "", "a big red ring", [], "", 0.5, *[[]] * 6, i == 2)
        rows.append((row, {"codes": torch.tensor([i])}))
    write_table(tmp_path / "answers.jsonl", rows)
    found = loop.faults_of("a model", list(read_jsonl(tmp_path / "answers.jsonl", EvalRecord)))
    assert found == {"objects missing": 1, "another object": 1}


def test_every_policy_draws_at_its_own_best_guidance(monkeypatch, tmp_path):
    caption = "a big red ring"
    questions = [Question(**q) for q in world.questions(caption)]
    good, bad = (np.full((4, 4), world.EMPTY) for _ in range(2))
    good[0, 0] = world.NAMES["big red ring"]
    # guidance -> the drawing of each record, right or wrong
    drawings = {"0": [[0], [1]], "0.25": [[1], [1]], "0.5": [[1], [1]], "1": [[0], [0]],
                "2": [[0], [1]]}

    def read(file, _):
        return [SimpleNamespace(caption=caption, questions=questions, drawn=drawn)
                for drawn in drawings[file.parent.name]]

    monkeypatch.setattr(loop, "records", lambda *_: None)
    monkeypatch.setattr(loop, "load", lambda _: None)
    monkeypatch.setattr(loop, "step", lambda _, options, **paths: tmp_path / options.split()[-1])
    monkeypatch.setattr(loop, "read_jsonl", read)
    monkeypatch.setattr(loop, "tensors_of", lambda sample: {"images": sample.drawn})
    monkeypatch.setattr(switches, "grids", lambda _, drawn: [good if d else bad for d in drawn])
    assert loop.best_guidance("a policy", 0) == 0.25
    assert (tmp_path / "2.right").read_text() == "1"

    # the highest is best: further, until it is not
    drawings |= {"2": [[1], [1]], "4": [[1], [1]], "0.25": [[0], [1]], "0.5": [[0], [1]]}
    for file in tmp_path.glob("*.right"):
        file.unlink()
    assert loop.best_guidance("another policy", 0) == 2


# ------------------------------------------------------------------------------------------- tables


def test_interval_and_metrics():
    cell = {"understood": [8, 9], "drawn": [4, 9], "questions": [8, 10], "everything": [0, 1],
            "caption": [500, 1000], "words": 3}
    expected = [[1, 0.5, 0.5, 0, 0.5], [0.9, 0.9, 0, 1, 1]]
    np.testing.assert_allclose(tables.metrics(cell), expected)
    assert tables.interval(np.full((3, 5), 0.25)) == "0.250 [0.250, 0.250]"
    text = tables.interval(np.random.default_rng(0).normal(size=(2000, 1)))
    low, high = map(float, text[:-1].split("[")[1].split(", "))
    assert high - low == pytest.approx(2 * 1.96 / 2000**0.5, rel=0.2)  # of means of 2,000 draws
    differing = tables.interval(np.array([[0.0] * 50, [1.0] * 50]))  # seeds differ, records do not
    assert differing == "0.500 [0.000, 1.000]"


def test_faults():
    """Per 100 drawings over all seeds; a base that several variants share comes once."""

    def cell(**faults):
        return {"": {"everything": [0] * 10, "faults": faults}}

    by_seed = [{"base": cell(relation=3), "round1": cell(relation=1)},
               {"base": cell(), "round1": cell(relation=2)}]
    others = [rounds | {"round1": cell()} for rounds in by_seed]
    table, = tables.faults({"a": dict(enumerate(by_seed)), "b": dict(enumerate(others))})
    column = 1 + tables.KINDS.index("relation")
    rows = [row.strip("| ").split(" | ") for row in table.splitlines()]
    found = [(row[0], row[column]) for row in rows[2:]]
    assert found == [("a, base", "15.0"), ("a, round1", "15.0"), ("b, round1", "0.0")]


def test_mcnemar():
    before = np.array([0] * 10 + [1] * 5)
    after = np.array([1] * 9 + [0] + [0] * 2 + [1] * 3)
    p = 2 * (1 + 11 + 55) / 2**11  # 2 or fewer of 11 by a fair coin, both sides
    assert mcnemar(before, after) == f"+9 −2, p = {p:.2g}"
    assert mcnemar(before, before) == "+0 −0, p = 1"
    assert mcnemar(np.zeros(20), np.ones(20)) == "+20 −0, p < 1e-4"


def test_results_are_what_was_counted():
    """The tables of the main result are what its raw counts give, down to the last digit."""
    results = json.loads((tables.RESULTS / "main_result.json").read_text())["results"]
    page = (tables.RESULTS / "main_result.md").read_text()
    for table in tables.tables(results, "Pair-DPO"):
        assert table in page
    picture = (tables.RESULTS / "main_result.svg").read_text()
    assert picture == tables.forest(results, "Pair-DPO")


@pytest.mark.parametrize("name", PAGES)
def test_every_result_has_a_page(name):
    page = (tables.RESULTS / f"{name}.md").read_text()
    for part in (f"<!-- {name} -->", f"<!-- /{name} -->", f"({name}.svg)"):
        assert page.count(part) == 1
    assert f"toy/studies/{name}.py" in page
    assert f"({name}.md)" in (tables.RESULTS / "README.md").read_text()


def test_publish(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    page = tmp_path / "a.md"
    page.write_text("before\n<!-- a -->\nold\n<!-- /a -->\nafter <!-- b -->\n")
    tables.publish("a", [r"| new \1 |", "more"])
    expected = "before\n<!-- a -->\n\n| new \\1 |\n\nmore\n\n<!-- /a -->\nafter <!-- b -->\n"
    assert page.read_text() == expected
    (tmp_path / "b.md").write_text("<!-- b -->\n")
    with pytest.raises(InputError, match="b.md: needs the marks of b once, has them 0 times"):
        tables.publish("b", [""])
    assert capsys.readouterr().out == "| new \\1 |\n\nmore\n\n"  # printed before the page fails


def test_a_new_study_begins_its_page(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    for table in ("old", "new"):
        tables.publish("mine", [table])
    begin = "# mine\n\n`python toy/studies/mine.py`\n\n![](mine.svg)\n\n"
    page = (tmp_path / "mine.md").read_text()
    assert page == f"{begin}<!-- mine -->\n\nnew\n\n<!-- /mine -->\n"


# ------------------------------------------------------------------------------------------- scorer


def test_agreement_with_the_oracle():
    assert ranks(np.array([3.0, 1.0, 3.0, 7.0])).tolist() == [1.5, 0.0, 1.5, 3.0]
    assert spearman(np.array([1, 2, 3]), np.array([10, 30, 20])) == pytest.approx(0.5)
    assert math.isnan(spearman(np.array([1, 1]), np.array([1, 2])))
    score = np.array([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5]])
    share = np.array([[1.0, 0.5], [0.5, 0.25], [1, 0]])
    right = np.array([[1, 0], [0, 0], [1, 0]])
    expected = [2, 0.0, 1.0, 0.5, 0.5, 0.5, 0.0]
    assert agreement(score, share, right) == pytest.approx(expected)


def test_likelihood_equals_plain(model, pairs):
    images = torch.stack([tensors_of(p)["win_image"] for p in pairs])
    with torch.no_grad():
        scores = caption_likelihood(model, images, [p.caption for p in pairs])
    tokens = model.tokens
    prompt = tokens.text_prompt(CAPTION_QUESTION)
    for score, p, codes in zip(scores, pairs, images.tolist()):
        caption = tokens.encode(p.caption)
        row = [Segment(tokens.mmu_prompt(codes), bidirectional=True),
               answer_segment(prompt, [*caption, tokens.eot])]
        ids, targets, attend = sequence(tokens, row, 1)
        with torch.no_grad():
            logps = F.log_softmax(logits_of(model.net, ids, attend)[0], -1)  # (T, V)
        at = targets[0] >= 0
        assert at.sum() == len(caption) + 1
        of_caption = logps[at].gather(1, targets[0][at][:, None])
        assert score == pytest.approx(of_caption.mean().exp().item(), rel=1e-4)
