"""What the studies report: metrics with intervals, tables, and one picture and page per study.

The bootstrap differs from that of evals/metrics.py: it resamples seeds and records.
"""

import re
from html import escape
from pathlib import Path

import numpy as np

import evals.metrics
from hermesflow.files import InputError, read_text, write_text

RESULTS = Path(__file__).parents[1] / "results"
METRICS = ("understanding", "generation", "gap", "everything right", "caption score")
KINDS = ("objects missing", "objects too many", "another object", "relation")
RIGHT = METRICS.index("everything right")
SHADES = {"base": "#9ca3af", "round1": "#93c5fd", "round2": "#3b82f6", "round3": "#1e3a8a"}


# ---------------------------------------------------------------------------- metrics and intervals


def metrics(cell: dict) -> np.ndarray:
    """The counts of one evaluation (loop.evaluate) -> (records, METRICS)."""
    names = ("understood", "drawn", "questions", "everything", "caption")
    und, gen, questions, right, caption = (np.array(cell[name], float) for name in names)
    gap = und - gen
    return np.stack([und / questions, gen / questions, gap / questions, right, caption / 1000], 1)


def bounds(values: np.ndarray, draws: int = 10_000) -> tuple[float, float, float]:
    """values (seeds, records): the mean, and 95 % of the means over resampled seeds and records."""
    rng = np.random.default_rng(0)
    S, N = values.shape
    means = []
    for _ in range(draws // 100):  # a hundred draws of records for each draw of seeds
        by_record = values[rng.integers(S, size=S)].mean(0)  # (N,)
        means.append(by_record[rng.integers(N, size=(100, N))].mean(1))  # (100,)
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return values.mean(), low, high


def interval(values: np.ndarray, sign: str = "") -> str:
    """Mean and bounds of (seeds, records) values; sign "+" shows the sign of positive numbers."""
    mean, low, high = bounds(values)
    return evals.metrics.interval({"mean": mean, "low": low, "high": high}, sign)


# ------------------------------------------------------------------------------------------- tables


def markdown(rows: list[list[str]]) -> str:
    """Rows of cells as a Markdown table; the first row is the head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def label(variant: str, round_: str, options: str) -> str:
    """How a line of a table is called."""
    name = f"{variant}, {round_}"
    return f"{name}, `{options}`" if options else name


def evaluations(results: dict):
    """Of all variants, rounds and evaluations: variant, round, options, the cells of all seeds."""
    for variant, by_seed in results.items():
        first = next(iter(by_seed.values()))
        for round_ in first:
            for options in first[round_]:
                if options != "training":
                    cells = [rounds[round_][options] for rounds in by_seed.values()]
                    yield variant, round_, options, cells


def compared(results: dict, against: str):
    """Of all evaluations: variant, round, options, metrics, and those of the variant `against`.

    Metrics are (seeds, records, METRICS); those of `against` are of the same round and evaluation,
    None if it has none. A base that equals the base of `against` comes once.
    """
    for variant, round_, options, cells in evaluations(results):
        values = np.stack([metrics(c) for c in cells])
        others = [results[against][seed].get(round_, {}) for seed in results[variant]]
        reference = None
        if variant != against and all(options in other for other in others):
            reference = np.stack([metrics(other[options]) for other in others])
        same = reference is not None and np.array_equal(values, reference)
        if round_ != "base" or not same:
            yield variant, round_, options, values, reference


def tables(results: dict, against: str) -> list[str]:
    """Metrics, with the paired difference to `against`; then the last steps of the trainings."""
    return [metrics_table(results, against), training_table(results)]


def metrics_table(results: dict, against: str) -> str:
    several = len(results) > 1
    rows = [["", *METRICS]]
    if several:
        rows[0].append(f"everything right, against {against}")
    for variant, round_, options, values, reference in compared(results, against):
        row = [label(variant, round_, options)]
        row += [interval(values[..., m]) for m in range(len(METRICS))]
        if several and reference is None:
            row.append("")
        elif several:
            row.append(interval((values - reference)[..., RIGHT], "+"))
        rows.append(row)
    return markdown(rows)


def training_table(results: dict) -> str:
    rows = [["last tenth of the steps", "pairs", "steps", "captions: win", "lose", "accuracy",
             "images: win", "lose", "accuracy", "words per held-out caption"]]
    for variant, by_seed in results.items():
        for round_ in next(iter(by_seed.values())):
            if round_ == "base":
                continue
            cells = [rounds[round_] for rounds in by_seed.values()]

            def mean(name):
                return np.mean([cell["training"][name] for cell in cells])

            row = [f"{variant}, {round_}", f"{mean('pairs'):.0f}", f"{mean('steps'):.0f}"]
            for half in ("und", "gen"):
                for name in ("win_change", "lose_change", "accuracy"):
                    row.append(f"{mean(f'{name}_{half}'):.2f}")
            words = [next(iter(cell.values()))["words"] for cell in cells]
            rows.append([*row, f"{np.mean(words):.2f}"])
    return markdown(rows)


def faults(results: dict) -> list[str]:
    """Of 100 drawings, how many are wrong in which way. Equal bases come once."""
    rows = [["of 100 drawings", *KINDS]]
    seen = []
    for variant, round_, options, cells in evaluations(results):
        if round_ == "base" and cells in seen:
            continue
        seen.append(cells)
        drawings = sum(len(c["everything"]) for c in cells)
        row = [label(variant, round_, options)]
        for kind in KINDS:
            count = sum(c["faults"].get(kind, 0) for c in cells)
            row.append(f"{100 * count / drawings:.1f}")
        rows.append(row)
    return [markdown(rows)]


# ------------------------------------------------------------------------------------------ picture


def forest(results: dict, against: str) -> str:
    """Everything right as SVG: a line per variant and evaluation, a dot with interval per round.

    The dashed line is where `against` ends.
    """
    lines = {}
    for variant, round_, options, values, _ in compared(results, against):
        name = f"{variant}, {options}" if options else variant
        lines.setdefault(name, []).append((round_, *bounds(values[..., RIGHT])))
    ends = []
    for dots in lines.values():
        for _, _, low, high in dots:
            ends += [low, high]
    left = np.floor(min(ends) * 10) / 10
    right = np.ceil(max(ends) * 10) / 10
    height = 34 + 26 * len(lines)

    def place(x):
        return f"{420 + 410 * (x - left) / (right - left):.1f}"

    def text(x, y, content, style):
        return f'<text x="{x}" y="{y}"{style}>{content}</text>'

    grey = ' fill="#6b7280"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 900 {height + 24}" '
        'font-family="sans-serif" font-size="13">',
        '<rect width="100%" height="100%" fill="white"/>',
        text(10, 20, "everything right", grey),
    ]
    # the scale
    for x in np.arange(left, right + 0.01, 0.1):
        line = f'<path d="M{place(x)} 28V{height}" stroke="#e5e7eb"/>'
        parts.append(line + text(place(x), 20, f"{x:.1f}", ' text-anchor="middle"' + grey))
    default = place(lines[against][-1][1])
    dashed = 'stroke="#f59e0b" stroke-dasharray="3 3"'
    parts.append(f'<path d="M{default} 28V{height}" {dashed}/>')

    # a line per variant
    for i, (name, dots) in enumerate(lines.items()):
        y = 46 + 26 * i
        last = text(890, y + 4, f"{dots[-1][1]:.3f}", ' text-anchor="end"')
        parts.append(text(10, y + 4, escape(name), "") + last)
        for round_, mean, low, high in dots:
            shade = SHADES[round_]
            line = f'<path d="M{place(low)} {y}H{place(high)}" stroke="{shade}" stroke-width="2"/>'
            parts.append(line + f'<circle cx="{place(mean)}" cy="{y}" r="5" fill="{shade}"/>')

    # the legend
    shown = set()
    for dots in lines.values():
        shown |= {dot[0] for dot in dots}
    for i, round_ in enumerate(name for name in SHADES if name in shown):
        dot = f'<circle cx="{430 + 78 * i}" cy="{height + 10}" r="5" fill="{SHADES[round_]}"/>'
        parts.append(dot + text(440 + 78 * i, height + 14, round_, grey))
    return "\n".join(parts) + "</svg>\n"


# --------------------------------------------------------------------------------------------- page


def publish(name: str, parts: list[str]) -> None:
    """Print tables, and put them between the marks of toy/results/NAME.md, or begin that page."""
    text = "\n\n".join(parts)
    print(text)
    page = RESULTS / f"{name}.md"
    marks = f"<!-- {name} -->\n<!-- /{name} -->\n"
    new = f"# {name}\n\n`python toy/studies/{name}.py`\n\n![]({name}.svg)\n\n{marks}"
    before = read_text(page) if page.exists() else new
    marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    content, n = marked.subn(lambda m: f"{m[1]}\n{text}\n\n{m[2]}", before)
    if n != 1:
        raise InputError(f"{page}: needs the marks of {name} once, has them {n} times")
    write_text(page, content)
