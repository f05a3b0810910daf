"""The switches of the studies do what they say, and nothing else; the figures of their tables are right."""

import json
import math
import sys
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, stage
from plain import logits_of, sequence
from tiny import tiny_model

sys.path.insert(0, str(ROOT / "toy" / "studies"))
import loop  # noqa: E402
import switches  # noqa: E402
import tables  # noqa: E402
from main_result import mcnemar  # noqa: E402
from model import Pair, Question, Sample, Score, image_segment  # noqa: E402
from scorer import agreement, ranks, spearman  # noqa: E402
from toy import world  # noqa: E402

STUDIES = ("ablations", "bases", "details", "guidance", "limits", "main_result", "other_base", "over_rounds", "recipes",
           "scorer", "strength", "why")
ARGS = SimpleNamespace(seed=3, round=1, drop_text=0.5, beta=0.2, und=1.0, gen=1.0, nll_und=0.0, nll_gen=0.0, guidance=0.0)


@pytest.fixture
def stages():
    """Fresh modules, so that a switch does not outlive its test."""
    return {"01": stage("01_sample"), "02": stage("02_score"), "03": stage("03_pair_dpo")}


@pytest.fixture(scope="module")
def model():
    return tiny_model()[0]


@pytest.fixture(scope="module")
def pairs(model):
    draw = torch.Generator().manual_seed(0)

    def codes():
        return torch.randint(model.tokens.codes, (16,), generator=draw).tolist()

    texts = ["a big red ring", "blue square", "small ring left of a square", "square"]
    return [Pair(f"r-{i}", "", text, "", codes(), "", "", model.tokens.encode(text), model.tokens.encode("no no"), 1, 0,
                 codes(), codes(), 1, 0, [], []) for i, text in enumerate(texts)]


def halves(stages, model, pairs, epoch=0):
    with torch.no_grad():
        return stages["03"].both_halves(model, model.tokens, [(p, epoch) for p in pairs], "cpu", ARGS)


def equal(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_batch_summed(stages):
    switches.batch_summed(stages)
    delta = torch.tensor([1.0, -3.0, 0.5])
    assert stages["03"].preference_loss(delta, 0.2).item() == pytest.approx(-math.log(1 / (1 + math.exp(0.3))))


def test_mismatched_dropout(stages, model, pairs, monkeypatch):
    """Without any dropout it changes nothing; with it, some winner is drawn from its text and its loser from none."""
    monkeypatch.setattr(ARGS, "drop_text", 0.0)
    plain = halves(stages, model, pairs)
    switches.mismatched_dropout(stages)
    for a, b in zip(plain, halves(stages, model, pairs)):
        equal(a[0][:, 1:], b[0][:, 1:])
        equal(a[1][:, 1:], b[1][:, 1:])
    monkeypatch.setattr(ARGS, "drop_text", 1.0)
    dropped = halves(stages, model, pairs)[1][0]
    monkeypatch.setattr(ARGS, "drop_text", 0.5)
    kept = (halves(stages, model, pairs)[1][0] - dropped)[:, 1:].abs() > 1e-4  # (B, 2): this branch saw its text
    assert (kept[:, 0] != kept[:, 1]).any()


def test_black_images(stages, model, pairs, monkeypatch):
    black = torch.arange(16)[None]
    monkeypatch.setattr(stages["03"], "load", lambda *_: (model, SimpleNamespace(downsampling=16, encode=lambda x: black)))
    row = stages["03"].understanding_row(model.tokens, pairs[0])
    switches.black_images(stages)
    stages["03"].load()
    changed = stages["03"].understanding_row(model.tokens, pairs[0])
    assert changed[0].ids == model.tokens.look(list(range(16))) != row[0].ids and changed[1:] == row[1:]


def test_misaligned_join(stages):
    """By string, 10 comes before 2: their scores change places."""
    samples = [Sample(f"preference-0-{i:05d}", "", "") for i in (1, 2, 10)]
    scores = [Score(s.id, [Question(s.id, ["a"], "a")], [float(i)], [float(i)], [[]]) for i, s in enumerate(samples)]
    stages["02"].make_pairs = lambda samples, scores: scores
    switches.misaligned_join(stages)
    joined = stages["02"].make_pairs(samples, scores)
    assert [s.id for s in joined] == [s.id for s in samples]
    assert [s.image_scores for s in joined] == [[0.0], [2.0], [1.0]] and [s.caption_scores for s in joined] == [[0.0], [1.0], [2.0]]


def test_independent_shuffling(stages, pairs):
    homologous = stages["03"].visits(pairs, 6, 4, 0)
    switches.independent_shuffling(stages)
    apart = stages["03"].visits(pairs, 6, 4, 0)
    assert [p.image_codes for p, _ in apart] == [p.image_codes for p, _ in homologous]
    assert [p.win_caption_ids for p, _ in apart] == [p.win_caption_ids for p, _ in homologous]
    assert [e for _, e in apart] == [e for _, e in homologous]
    by_text = {p.caption: p for p in pairs}
    assert all(p.win_image_codes == by_text[p.caption].win_image_codes for p, _ in apart)  # text and images stay together
    together = [p.image_codes == by_text[p.caption].image_codes for p, _ in apart]
    assert 0 < sum(together) < len(together)


def test_product_loss(stages, model, pairs):
    """At the start, where both margins are 0, its gradient is exactly 0; the sum's is not."""
    und, gen = torch.zeros(4, requires_grad=True), torch.zeros(4, requires_grad=True)
    sum_ = stages["03"].preference_loss(und, 0.2) + stages["03"].preference_loss(gen, 0.2)
    assert (torch.autograd.grad(sum_.sum(), und)[0] == -0.1).all()
    switches.product_loss(stages)

    def loss(und, gen):
        return (stages["03"].preference_loss(und, 0.2) + stages["03"].preference_loss(gen, 0.2)).sum()

    assert all((g == 0).all() for g in torch.autograd.grad(loss(und, gen), (und, gen)))
    two = torch.tensor([2.0])
    assert loss(two, two).item() == pytest.approx(math.log(1 + math.exp(-0.8))) == loss(-two, -two).item()


def test_guidance_in_turn(stages, model, monkeypatch):
    """Every image is the one that its own seed and guidance give."""
    args = SimpleNamespace(seed=3, round=1, images=3, steps=4, guidance=7.0, temperature=1.0, anneal="compound",
                           guidance_interval=(0.0, 1.0), guidance_every=1)
    records = [SimpleNamespace(id=i, drawing_text=t) for i, t in enumerate(("a big ring", "square"))]
    expected = {}
    for g in (0.0, 2.0):
        monkeypatch.setattr(args, "guidance", g)
        expected[g] = stages["01"].sample_images(model, records, args)  # (B, K, N)
    switches.guidance_in_turn(stages, "0", "2")
    found = stages["01"].sample_images(model, records, args)
    assert torch.equal(found[:, 1], expected[2.0][:, 1]) and torch.equal(found[:, ::2], expected[0.0][:, ::2])
    assert not torch.equal(expected[0.0], expected[2.0])


def test_masks(stages, model, pairs):
    """One mask is what training does; K give the mean of K; a mask and its complement score every slot once."""
    one = halves(stages, model, pairs)
    switches.masks(stages, "1")
    for a, b in zip(one, halves(stages, model, pairs)):
        assert all(torch.equal(x[:, 1:], y[:, 1:]) for x, y in zip(a, b)) or a is one[1]
    dpo = stages["03"]
    rows = [[dpo.generation_row(model.tokens, p, 0, ARGS)[0]] for p in pairs]
    switches.masks(stages, "2", "complementary")
    sums, counts = halves(stages, model, pairs)[1]
    assert (counts[:, 1:] == 8).all()
    expected = []
    for row, p in zip(rows, pairs):
        mask = switches.random_mask(16, switches.seed_of(3, 1, p.id, 0, "mask", 0))
        found = torch.zeros(2)
        for inverse in (False, True):
            m = [x != inverse for x in mask]
            branches = [image_segment(model.tokens, c, m) for c in (p.win_image_codes, p.lose_image_codes)]
            with torch.no_grad():
                found += model.logprobs([[*row, *branches]])[0][0, 1:] / 2
        expected.append(found)
    equal(sums[:, 1:], torch.stack(expected))


def test_mean_over_slots(stages, model, pairs):
    _, (sums, counts) = halves(stages, model, pairs)
    switches.mean_over_slots(stages)
    _, (means, ones) = halves(stages, model, pairs)
    equal(means[:, 1:], sums[:, 1:] / counts[:, 1:])
    assert (ones[:, 1:] == 1).all()


def test_label_smoothing(stages):
    switches.label_smoothing(stages, "0.25")
    found = stages["03"].preference_loss(torch.tensor([3.0]), 1.0).item()
    assert found == pytest.approx(0.75 * math.log(1 + math.exp(-3)) + 0.25 * math.log(1 + math.exp(3)))


@pytest.mark.parametrize("what, least, kept", [("gap", "0.5", True), ("gap", "0.6", False), ("caption_gap", "0.25", True),
                                               ("caption_gap", "0.3", False), ("codes", "2", True), ("codes", "3", False)])
def test_filters(stages, what, least, kept):
    pair = Pair("a", "", "", "", [], "", "", [], [], 0.75, 0.5, [1, 2, 3], [1, 5, 6], 1.0, 0.5, [], [])
    stages["02"].curate = lambda *_: pair
    switches.filtered(stages, what, least)
    assert stages["02"].curate() == (pair if kept else f"filtered: {what} below {float(least)}")


def test_chosen_by_oracle(stages):
    """A drawing of exactly the caption's scene has score 1; an object too many, or another colour, 0. The rest stays."""
    one, two, other = (np.full((4, 4), world.EMPTY) for _ in range(3))
    one[1, 2] = two[1, 2] = two[3, 3] = world.NAMES["big red ring"]
    other[1, 2] = world.NAMES["big blue ring"]
    pictures = np.stack([world.render(g) for g in (one, two, other)])
    vq = SimpleNamespace(decode=lambda codes: torch.from_numpy(pictures[codes[:, 0].numpy()]).permute(0, 3, 1, 2) / 127.5 - 1)
    sample = Sample("a", "", "a big red ring", questions=[Question(**q) for q in world.questions("a big red ring")])
    shares, rights = switches.oracle(vq, sample, torch.tensor([[0], [1], [2]]))
    assert rights == [1, 0, 0] and shares[0] == 1 > shares[2]
    stages["02"].score_records = lambda *_: [dict(id="a", image_scores=[0.1, 0.9, 0.5], caption_scores=[1.0])]
    switches.chosen_by_oracle(stages)
    scored = stages["02"].score_records([sample], {"a/images": torch.tensor([[2], [0], [1]])}, None, vq)
    assert scored == [dict(id="a", image_scores=[0, 1, 0], caption_scores=[1.0])]


def test_a_half_of_weight_zero_takes_no_part(stages, model, pairs, monkeypatch):
    reference = torch.zeros(4, 2, 3)
    losses = {}
    for und, gen in ((1, 1), (1, 0), (0, 1)):
        monkeypatch.setattr(ARGS, "und", und)
        monkeypatch.setattr(ARGS, "gen", gen)
        with torch.no_grad():
            loss, log = stages["03"].loss_and_log(model, model.tokens, [(p, 0) for p in pairs], reference, ARGS, "cpu")
        losses[und, gen] = loss.item(), log["loss_und"].item(), log["loss_gen"].item()
    both, und, gen = (losses[k][0] for k in ((1, 1), (1, 0), (0, 1)))
    assert both == pytest.approx(und + gen) and (und, gen) == pytest.approx(losses[1, 1][1:])


def test_defaults_are_those_of_the_loop():
    assert set(loop.DEFAULTS) == {"SAMPLE", "SCORE", "DPO", "EVAL"} and "--images 8" in loop.DEFAULTS["SAMPLE"]


def test_every_switch_of_the_studies_is_there():
    for name in STUDIES:
        for how in import_module(name).VARIANTS.values():
            for thrown in filter(None, (how.get(k) for k in ("sampling", "scoring", "training"))):
                assert callable(getattr(switches, thrown.split()[0]))


def test_interval_and_metrics():
    cell = {"understood": [8, 9], "drawn": [4, 9], "questions": [8, 10], "everything": [0, 1], "caption": [500, 1000], "words": 3}
    np.testing.assert_allclose(tables.metrics(cell), [[1, 0.5, 0.5, 0, 0.5], [0.9, 0.9, 0, 1, 1]])
    assert tables.interval(np.full((3, 5), 0.25)) == "0.250 [0.250, 0.250]"
    low, high = map(float, tables.interval(np.random.default_rng(0).normal(size=(2000, 1)))[:-1].split("[")[1].split(", "))
    assert high - low == pytest.approx(2 * 1.96 / 2000**0.5, rel=0.2)  # of means of 2,000 draws
    differing = tables.interval(np.array([[0.0] * 50, [1.0] * 50]))  # the seeds differ, the records do not
    assert differing == "0.500 [0.000, 1.000]"


def test_faults():
    """Per 100 drawings over all seeds; a base that several variants share comes once."""
    def cell(**faults):
        return {"": {"everything": [0] * 10, "faults": faults}}
    by_seed = [{"base": cell(relation=3), "round1": cell(relation=1)}, {"base": cell(), "round1": cell(relation=2)}]
    results = {"a": dict(enumerate(by_seed)), "b": dict(enumerate([found | {"round1": cell()} for found in by_seed]))}
    table, = tables.faults(results)
    rows = [row.strip("| ").split(" | ") for row in table.splitlines()]
    assert [(row[0], row[1 + tables.KINDS.index("relation")]) for row in rows[2:]] == [
        ("a, base", "15.0"), ("a, round1", "15.0"), ("b, round1", "0.0")]


def test_mcnemar():
    before, after = np.array([0] * 10 + [1] * 5), np.array([1] * 9 + [0] + [0] * 2 + [1] * 3)
    p = 2 * (1 + 11 + 55) / 2**11  # 2 or fewer of 11 by a fair coin, both sides
    assert mcnemar(before, after) == f"+9 −2, p = {p:.2g}" and mcnemar(before, before) == "+0 −0, p = 1"
    assert mcnemar(np.zeros(20), np.ones(20)) == "+20 −0, p < 1e-4"


@pytest.mark.parametrize("cells, kind", [
    ({(0, 0): "big red ring"}, "objects missing"),
    ({(0, 0): "big red ring", (0, 1): "small blue square", (3, 3): "small blue square"}, "objects too many"),
    ({(0, 0): "big red ring", (0, 1): "big blue square"}, "another object"),
    ({(0, 1): "big red ring", (0, 0): "small blue square"}, "relation")])
def test_fault(cells, kind):
    grid = np.full((4, 4), world.EMPTY)
    for at, what in cells.items():
        grid[at] = world.NAMES[what]
    caption = "a big red ring left of a small blue square"
    assert not world.judge(grid, caption)["correct"] and loop.fault(grid, caption) == kind


def test_renewed_records(tmp_path, monkeypatch):
    """Rounds of n captions each together are the first records of a seed, none twice."""
    monkeypatch.setattr(loop, "RUNS", tmp_path)
    by_round = [loop.read(loop.records("preference", 3 * r, 0, 3 * (r - 1))) for r in (1, 2)]
    assert [r for rows in by_round for r in rows] == loop.read(loop.records("preference", 6, 0))
    unseen = loop.read(loop.records("eval", 12, 0, 7))
    assert unseen == loop.read(tmp_path / "eval-12-0" / "records.jsonl")[7:]


def test_results_are_what_was_counted():
    """The page's table of the main result is what its raw counts give, down to the last digit."""
    results = json.loads((tables.RESULTS / "main_result.json").read_text())["results"]
    page = (tables.TOY / "RESULTS.md").read_text()
    for table in tables.tables(results, "Pair-DPO"):
        assert table in page
    assert (tables.RESULTS / "main_result.svg").read_text() == tables.forest(results, "Pair-DPO")
    for name in STUDIES:
        assert page.count(f"<!-- {name} -->") == page.count(f"<!-- /{name} -->") == page.count(f"results/{name}.svg") == 1


def test_publish(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tables, "TOY", tmp_path)
    page = tmp_path / "RESULTS.md"
    page.write_text("before\n<!-- a -->\nold\n<!-- /a -->\nafter <!-- b -->\n")
    tables.publish("a", [r"| new \1 |", "more"])
    assert page.read_text() == "before\n<!-- a -->\n\n| new \\1 |\n\nmore\n\n<!-- /a -->\nafter <!-- b -->\n"
    with pytest.raises(ValueError, match="marks of b"):
        tables.publish("b", [""])


def test_agreement_with_the_oracle():
    assert ranks(np.array([3.0, 1.0, 3.0, 7.0])).tolist() == [1.5, 0.0, 1.5, 3.0]
    assert spearman(np.array([1, 2, 3]), np.array([10, 30, 20])) == pytest.approx(0.5)
    assert math.isnan(spearman(np.array([1, 1]), np.array([1, 2])))
    score = np.array([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5]])
    share, right = np.array([[1.0, 0.5], [0.5, 0.25], [1, 0]]), np.array([[1, 0], [0, 0], [1, 0]])
    assert agreement(score, share, right) == pytest.approx([2, 0.0, 1.0, 0.5, 0.5, 0.5, 0.0])


def test_likelihood_equals_plain(stages, model, pairs):
    images = torch.tensor([p.win_image_codes for p in pairs])
    with torch.no_grad():
        found = stages["02"].likelihood(model, images, [p.caption for p in pairs])
    tokens = model.tokens
    for score, p in zip(found, pairs):
        row = [switches.Segment(tokens.look(p.win_image_codes), bidirectional=True),
               stages["03"].answer_segment(tokens.ask(stages["02"].CAPTION_QUESTION), [*tokens.encode(p.caption), tokens.eot])]
        ids, targets, attend = sequence(tokens, row, 1)
        with torch.no_grad():
            logprobs = F.log_softmax(logits_of(model, ids, attend)[0], -1)
        at = targets[0] >= 0
        assert at.sum() == len(tokens.encode(p.caption)) + 1
        assert score == pytest.approx(logprobs[at].gather(1, targets[0][at][:, None]).mean().exp().item(), rel=1e-4)
