"""Metrics of the gap protocol, with bootstrap 95 % intervals over records.

understanding     accuracy of the model's answers about the real image
caption score     similarity of the model's caption to the record's
generation        accuracy of the judge's answers about one generated image
everything right  share of generated images without any mistake
gap               understanding − generation
"""

from dataclasses import dataclass

import numpy as np

from hermesflow.records import Question

METRICS = ("understanding", "caption score", "generation", "everything right", "gap")


@dataclass
class EvalRecord:
    """All answers about one record, and which of them are right: a line of answers.jsonl."""

    id: str
    image: str  # path
    text: str  # the text that was drawn
    questions: list[Question]
    caption: str  # the model's
    caption_score: float
    und_answers: list[str]  # the model's, about the real image
    und_right: list[bool]
    gen_answers: list[str]  # the judge's, about the generated image
    gen_right: list[bool]
    all_right: bool
    codes: list[int]  # of the generated image


def per_record(records: list[EvalRecord]) -> dict[str, np.ndarray]:
    """One value per record and metric; every reported number is a mean over records."""
    understanding = np.array([np.mean(r.und_right) for r in records])
    generation = np.array([np.mean(r.gen_right) for r in records])
    return {
        "understanding": understanding,
        "caption score": np.array([r.caption_score for r in records]),
        "generation": generation,
        "everything right": np.array([float(r.all_right) for r in records]),
        "gap": understanding - generation,
    }


def bootstrap(values: np.ndarray, seed: int = 0, draws: int = 10_000) -> tuple[float, float, float]:
    """Mean and the 95 % percentile interval over resampled records."""
    rng = np.random.default_rng(seed)
    n = len(values)
    means = np.array([values[rng.integers(n, size=n)].mean() for _ in range(draws)])
    low, high = np.percentile(means, [2.5, 97.5])
    return float(values.mean()), float(low), float(high)


def with_interval(values: np.ndarray) -> dict[str, float]:
    mean, low, high = bootstrap(values)
    return {"mean": mean, "low": low, "high": high}


def evaluate(records: list[EvalRecord]) -> dict:
    """All metrics with their intervals, and both accuracies by what the questions are about."""
    return {
        "records": len(records),
        "different texts": len({r.text for r in records}),
        **{name: with_interval(values) for name, values in per_record(records).items()},
        "by element": by_element(records),
    }


def by_element(records: list[EvalRecord]) -> dict[str, dict]:
    """element -> number of questions and both accuracies, over questions."""
    answered = {}
    for r in records:
        for question, und, gen in zip(r.questions, r.und_right, r.gen_right):
            # "|" would end a cell of a Markdown table
            element = question.element.replace("|", "/") or "other"
            answered.setdefault(element, []).append((und, gen))
    result = {}
    for element, pairs in sorted(answered.items()):
        understanding, generation = np.mean(pairs, axis=0)
        result[element] = {
            "questions": len(pairs),
            "understanding": float(understanding),
            "generation": float(generation),
        }
    return result


def paired_difference(before: list[EvalRecord], after: list[EvalRecord]) -> dict:
    """after − before on the same records and seeds: far narrower than two separate intervals."""
    old = per_record(before)
    new = per_record(after)
    return {name: with_interval(new[name] - old[name]) for name in METRICS}


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
