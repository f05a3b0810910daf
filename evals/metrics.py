"""Metrics of the gap protocol, with bootstrap 95 % intervals over records.

understanding     accuracy of the model's answers about the real image
caption score     similarity of the model's caption to the record's
generation        accuracy of the judge's answers about one generated image
everything right  share of generated images without any mistake
gap               understanding − generation
"""

import hashlib
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hermesflow.files import InputError, read_object
from hermesflow.records import Question

METRICS = ("understanding", "caption score", "generation", "everything right", "gap")


@dataclass
class EvalRecord:
    """All answers about one record, and which of them are right: a line of answers.jsonl.

    Tensor: codes (N,) of the generated image.
    """

    id: str
    image: str  # path
    text: str  # the text that was drawn
    questions: list[Question]
    caption: str  # the model's
    caption_score: float
    und_answers: list[str]  # the model's, about the real image
    und_matched: list[str]  # the choice that each of them means; empty: none
    und_right: list[bool]
    gen_answers: list[str]  # the judge's, about the generated image
    gen_matched: list[str]
    gen_right: list[bool]
    all_right: bool
    shard: str = ""  # file that holds the tensor
    row: int = 0  # in it
    digest: str = ""  # of it


@dataclass
class Summary:
    """What the metrics of an evaluation are made of: a few numbers per record."""

    values: dict[str, np.ndarray]  # metric -> (records,); every reported number is a mean of them
    texts: int  # different ones that were drawn
    elements: dict[str, list[int]]  # element -> questions, right by understanding, by generation
    order: str  # the same for the same ids and texts in the same order


def summarize(records: Iterable[EvalRecord]) -> Summary:
    """One pass over the records, which are not kept."""
    understanding = array("d")
    caption_score = array("d")
    generation = array("d")
    all_right = array("d")
    texts = array("q")
    elements = {}
    order = hashlib.sha256()
    for r in records:
        if not r.und_right or not r.gen_right:
            raise InputError(f"id {r.id!r}: no answers")
        understanding.append(sum(r.und_right) / len(r.und_right))
        caption_score.append(r.caption_score)
        generation.append(sum(r.gen_right) / len(r.gen_right))
        all_right.append(r.all_right)
        texts.append(hash(r.text))
        order.update(f"{r.id!r} {r.text!r}".encode())
        for question, und, gen in zip(r.questions, r.und_right, r.gen_right):
            # "|" would end a cell of a Markdown table
            element = question.element.replace("|", "/") or "other"
            counts = elements.setdefault(element, [0, 0, 0])
            counts[0] += 1
            counts[1] += und
            counts[2] += gen
    values = {
        "understanding": np.array(understanding),
        "caption score": np.array(caption_score),
        "generation": np.array(generation),
        "everything right": np.array(all_right),
        "gap": np.array(understanding) - np.array(generation),
    }
    return Summary(values, len(np.unique(np.array(texts))), elements, order.hexdigest())


def bootstrap(columns: list[np.ndarray], seed: int = 0,
              draws: int = 10_000) -> list[tuple[float, float, float]]:
    """Mean and 95 % percentile interval of each column (n,), over the same resampled records."""
    rng = np.random.default_rng(seed)
    n = len(columns[0])
    means = np.empty((len(columns), draws))
    for draw in range(draws):
        records = rng.integers(n, size=n)
        for i, values in enumerate(columns):
            means[i, draw] = values[records].mean()
    low, high = np.percentile(means, [2.5, 97.5], axis=1)
    mean = [values.mean() for values in columns]
    return [tuple(map(float, interval)) for interval in zip(mean, low, high)]


def with_intervals(values: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    result = {}
    for name, (mean, low, high) in zip(values, bootstrap(list(values.values()))):
        result[name] = {"mean": mean, "low": low, "high": high}
    return result


def evaluate(records: Iterable[EvalRecord]) -> dict:
    """All metrics with their intervals, and both accuracies by what the questions are about."""
    return metrics_of(summarize(records))


def metrics_of(summary: Summary) -> dict:
    by_element = {}
    for element, (questions, und_right, gen_right) in sorted(summary.elements.items()):
        by_element[element] = {
            "questions": questions,
            "understanding": und_right / questions,
            "generation": gen_right / questions,
        }
    return {
        "records": len(summary.values["gap"]),
        "different texts": summary.texts,
        **with_intervals(summary.values),
        "by element": by_element,
    }


def paired_difference(before: Summary, after: Summary) -> dict:
    """after − before on the same records and seeds: far narrower than two separate intervals."""
    return with_intervals({name: after.values[name] - before.values[name] for name in METRICS})


# ------------------------------------------------------------------------------------------- tables


def interval(metric: dict, sign: str = "") -> str:
    """A mean with its interval; sign "+" shows the sign of positive numbers."""
    return f"{metric['mean']:{sign}.3f} [{metric['low']:{sign}.3f}, {metric['high']:{sign}.3f}]"


def table(named: dict[str, dict], sign: str = "") -> str:
    """A Markdown table: one line per checkpoint, or per difference."""
    lines = ["| | " + " | ".join(METRICS) + " |", "|---" * (len(METRICS) + 1) + "|"]
    for name, metrics in named.items():
        cells = [interval(metrics[m], sign) for m in METRICS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def finished_table(out: Path) -> str:
    """The metrics of a finished evaluation."""
    metrics = read_object(out / "metrics.json")
    if "benchmark" in metrics:
        return flat_table(metrics.pop("benchmark"), metrics)
    try:
        return table({out.name: metrics})
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{out / 'metrics.json'}: not the metrics of an evaluation") from None


def flat_table(name: str, metrics: dict) -> str:
    """Nested metrics as one Markdown table."""
    return "\n".join(["| metric | value |", "|---|---|", *flat_rows(name, metrics)])


def flat_rows(name: str, value) -> list[str]:
    if isinstance(value, dict):
        rows = []
        for key, inner in value.items():
            rows += flat_rows(f"{name} {key}", inner)
        return rows
    if isinstance(value, float):
        return [f"| {name} | {value:.4f} |"]
    return [f"| {name} | {value} |"]
