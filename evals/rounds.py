"""What the report says about a round: why records gave no pairs, and its training."""

import re
from collections import Counter
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from evals.charts import Line, chart
from evals.html import card, card_grid, facts, figure, note, table_of
from evals.official import get, require_object
from hermesflow.files import InputError, parse_json, read_text
from hermesflow.jsonl import read_jsonl
from hermesflow.records import Score

RESULTS = ("pairs/scores.jsonl", "pairs/pairs.jsonl", "train/train.jsonl")
HALVES = [("understanding", "und"), ("generation", "gen")]
# title -> [(name, kind of line, field of train.jsonl)]
CURVES = {
    "DPO loss": [(name, kind, f"loss_{kind}") for name, kind in HALVES],
    "margin β Δ": [(name, kind, f"margin_{kind}") for name, kind in HALVES],
    "accuracy: share of Δ > 0": [(name, kind, f"accuracy_{kind}") for name, kind in HALVES],
    "log-prob changes of captions, nats": [("win", "win", "win_change_und"),
                                           ("lose", "lose", "lose_change_und")],
    "log-prob changes of images, nats": [("win", "win", "win_change_gen"),
                                         ("lose", "lose", "lose_change_gen")],
    "winners’ NLL per token": [(name, kind, f"nll_{kind}") for name, kind in HALVES],
    "gradient norm": [("total", "", "grad_norm"), *((n, k, f"grad_norm_{k}") for n, k in HALVES)],
    "cosine of the halves’ gradients": [("cosine", "", "grad_cosine")],
    "learning rate": [("learning rate", "", "lr")],
}
SHEETS = 6  # previews of a round


def rounds_of(run: Path) -> list[str]:
    """The rounds that have results, in order; other folders, such as copies, are left out."""
    names = {file.parents[1].name for part in RESULTS for file in run.glob(f"round*/{part}")}
    rounds = [name for name in names if re.fullmatch(r"round[1-9]\d*", name, re.ASCII)]
    return sorted(rounds, key=lambda name: int(name.removeprefix("round")))


@dataclass
class Tally:
    """What scores.jsonl adds up to."""

    records: int = 0
    captions: set[int] = field(default_factory=set)  # candidates of a record
    images: set[int] = field(default_factory=set)
    dropped: Counter = field(default_factory=Counter)  # reason -> records
    # sums over records of best, mean and worst
    caption_scores: list[float] = field(default_factory=lambda: [0.0] * 3)
    image_scores: list[float] = field(default_factory=lambda: [0.0] * 3)
    judged: int = 0  # records with scores of images

    @property
    def pairs(self) -> int:
        return self.records - self.dropped.total()


def tally(folder: Path) -> Tally:
    """One pass over the scores of a round."""
    t = Tally()
    for score in read_jsonl(folder / "scores.jsonl", Score):
        t.records += 1
        t.captions.add(len(score.caption_scores))
        t.images.add(len(score.image_scores))
        if score.dropped:
            t.dropped[score.dropped] += 1
        add_up(t.caption_scores, score.caption_scores)
        if score.image_scores:  # not without questions
            add_up(t.image_scores, score.image_scores)
            t.judged += 1
    return t


def add_up(sums: list[float], scores: list[float]) -> None:
    for i, value in enumerate((max(scores), sum(scores) / len(scores), min(scores))):
        sums[i] += value


def span(numbers: set[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"


def overview(tallies: dict[str, Tally]) -> str:
    """A line per round: candidates, pairs, scores."""
    rows = [["", "records", "captions each", "images each", "pairs", "accepted",
             "caption score: best, mean, worst", "image score: best, mean, worst"]]
    for name, t in tallies.items():
        means = []
        for sums, n in ((t.caption_scores, t.records), (t.image_scores, t.judged)):
            means.append(", ".join(f"{s / n:.3f}" for s in sums) if n else "none")
        rows.append([name, str(t.records), span(t.captions), span(t.images), str(t.pairs),
                     f"{t.pairs / t.records:.1%}", *means])
    return table_of(rows)


def acceptance(t: Tally) -> str:
    """How many records gave a pair, and why the others did not."""
    bars = [f'<i style="flex:{t.pairs}"></i>']
    rows = [(f"■ {t.pairs} records, {t.pairs / t.records:.1%}", "accepted: a pair")]
    for reason, n in t.dropped.most_common():
        bars.append(f'<i style="flex:{n}"></i>')
        rows.append((f"▨ {n} records, {n / t.records:.1%}", f"dropped: {escape(reason)}"))
    return f'<div class="parts">{"".join(bars)}</div>{facts(rows)}'


def training(folder: Path) -> str:
    """The training curves of one round."""
    file = folder / "train.jsonl"
    log = []
    for number, line in enumerate(read_text(file).splitlines(), 1):
        where = f"{file}: line {number}"
        values = parse_json(line, where)
        require_object(values, where)
        log.append((where, values))
    if not log:
        raise InputError(f"{file}: empty; no step was finished")
    cards = []
    absent = []
    for title, curves in CURVES.items():
        lines = []
        for name, kind, field_name in curves:
            points = [(get(r, "step", int, where), get(r, field_name, float, where))
                      for where, r in log if field_name in r]
            if points:
                lines.append(Line(name, kind, points))
            else:
                absent.append(field_name)
        if lines:
            cards.append(card(chart(title, lines)))
    missing = note(f"not in {file.name}: {', '.join(absent)}") if absent else ""
    return card_grid(cards) + missing


def previews(folder: Path) -> str:
    """Sheets that training drew on its way, the last and some before it."""
    sheets = sorted((folder / "previews").glob("*.png"), key=lambda f: (len(f.name), f.name))
    if not sheets:
        return ""
    shown = sheets[:: -(-len(sheets) // SHEETS)]
    if sheets[-1] not in shown:
        shown.append(sheets[-1])
    figures = [figure(sheet, f"after {sheet.stem.lstrip('0') or 0} steps", "sheet")
               for sheet in shown]
    return (f"<h3>Drawings on the way ({len(shown)} of {len(sheets)})</h3>"
            + card_grid([card(f) for f in figures]))
