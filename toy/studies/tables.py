"""What the studies tell: metrics with intervals, tables, one picture per study, and where they go in toy/RESULTS.md."""

import re
from html import escape
from pathlib import Path

import numpy as np

TOY = Path(__file__).parents[1]
RESULTS = TOY / "results"
METRICS = ("understanding", "generation", "gap", "everything right", "caption score")
KINDS = ("objects missing", "objects too many", "another object", "relation")
SHADES = ("#9ca3af", "#93c5fd", "#3b82f6", "#1e3a8a")  # base, rounds 1, 2, 3


def metrics(cell: dict) -> np.ndarray:
    """(records, METRICS)"""
    und, gen, n, right, caption = (np.array(cell[k], float) for k in list(cell)[:5])
    return np.stack([und / n, gen / n, (und - gen) / n, right, caption / 1000], 1)


def bounds(values: np.ndarray, draws: int = 10_000) -> tuple[float, float, float]:
    """values (seeds, records): the mean, and 95 % of the means over resampled seeds and records."""
    rng, (S, N), means = np.random.default_rng(0), values.shape, []
    for _ in range(draws // 100):  # a hundred draws of records for each draw of seeds
        by_record = values[rng.integers(S, size=S)].mean(0)
        means.append(by_record[rng.integers(N, size=(100, N))].mean(1))
    return values.mean(), *np.percentile(np.concatenate(means), [2.5, 97.5])


def interval(values: np.ndarray, sign: str = "") -> str:
    mean, low, high = bounds(values)
    return f"{mean:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"


def markdown(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def evaluations(results: dict):
    """All variants, rounds and evaluations: variant, round, options, and the cells of all seeds."""
    for variant, by_seed in results.items():
        for round_, found in next(iter(by_seed.values())).items():
            for options in (o for o in found if o != "training"):
                yield variant, round_, options, [found[round_][options] for found in by_seed.values()]


def lines(results: dict, against: str):
    """Of all evaluations: variant, round, options, metrics (seeds, records, METRICS), and those of the variant `against` at
    the same round and evaluation, if there are. A base that is that of `against` comes once."""
    for variant, round_, options, cells in evaluations(results):
        values, theirs = np.stack([metrics(c) for c in cells]), None
        others = [results[against][seed].get(round_, {}) for seed in results[variant]]
        if variant != against and all(options in other for other in others):
            theirs = np.stack([metrics(o[options]) for o in others])
        if round_ != "base" or theirs is None or not np.array_equal(values, theirs):
            yield variant, round_, options, values, theirs


def tables(results: dict, against: str) -> list[str]:
    """Metrics, paired with `against`; then what to watch of the trainings."""
    compared = [f"everything right, against {against}"] if len(results) > 1 else []
    scores = [["", *METRICS, *compared]]
    for variant, round_, options, values, theirs in lines(results, against):
        row = [f"{variant}, {round_}" + (f", `{options}`" if options else "")]
        row += [interval(values[..., m]) for m in range(len(METRICS))]
        scores.append(row + ["" if theirs is None else interval((values - theirs)[..., 3], "+") for _ in compared])
    watched = [["last tenth of the steps", "pairs", "steps", "captions: win", "lose", "accuracy", "images: win", "lose",
                "accuracy", "words per held-out caption"]]
    for variant, by_seed in results.items():
        for round_ in [r for r in next(iter(by_seed.values())) if r != "base"]:
            cells = [found[round_] for found in by_seed.values()]
            mean = {k: np.mean([c["training"][k] for c in cells]) for k in cells[0]["training"]}
            changes = [f"{mean[f'{what}_{half}']:.2f}" for half in ("und", "gen")
                       for what in ("win_change", "lose_change", "accuracy")]
            words = np.mean([next(iter(c.values()))["words"] for c in cells])
            watched.append([f"{variant}, {round_}", f"{mean['pairs']:.0f}", f"{mean['steps']:.0f}", *changes, f"{words:.2f}"])
    return [markdown(scores), markdown(watched)]


def faults(results: dict) -> list[str]:
    """Of 100 drawings, how many are wrong in which way."""
    table, seen = [["of 100 drawings", *KINDS]], []
    for variant, round_, options, cells in evaluations(results):
        if round_ == "base" and cells in seen:
            continue
        seen.append(cells)
        drawn = sum(len(c["everything"]) for c in cells)
        row = [f"{100 * sum(c['faults'].get(kind, 0) for c in cells) / drawn:.1f}" for kind in KINDS]
        table.append([f"{variant}, {round_}" + (f", `{options}`" if options else ""), *row])
    return [markdown(table)]


def forest(results: dict, against: str) -> str:
    """Everything right as SVG: a line per variant and evaluation, a dot with its interval per round."""
    rows = {}
    for variant, round_, options, values, _ in lines(results, against):
        rows.setdefault(f"{variant}, {options}" if options else variant, []).append((round_, *bounds(values[..., 3])))
    ends = [x for dots in rows.values() for dot in dots for x in dot[2:]]
    left, right = np.floor(min(ends) * 10) / 10, np.ceil(max(ends) * 10) / 10

    def place(x):
        return 420 + 410 * (x - left) / (right - left)

    height = 34 + 26 * len(rows)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 900 {height + 24}" font-family="sans-serif" font-size="13">',
             '<rect width="100%" height="100%" fill="white"/>', '<text x="10" y="20" fill="#6b7280">everything right</text>']
    for x in np.arange(left, right + 0.01, 0.1):
        parts.append(f'<path d="M{place(x):.1f} 28V{height}" stroke="#e5e7eb"/><text x="{place(x):.1f}" y="20" '
                     f'text-anchor="middle" fill="#6b7280">{x:.1f}</text>')
    default = rows[against][-1][1]
    parts.append(f'<path d="M{place(default):.1f} 28V{height}" stroke="#f59e0b" stroke-dasharray="3 3"/>')
    for i, (label, dots) in enumerate(rows.items()):
        y = 46 + 26 * i
        parts.append(f'<text x="10" y="{y + 4}">{escape(label)}</text>'
                     f'<text x="890" y="{y + 4}" text-anchor="end">{dots[-1][1]:.3f}</text>')
        for round_, mean, low, high in dots:
            shade = SHADES[int(round_.removeprefix("round")) if round_ != "base" else 0]
            parts.append(f'<path d="M{place(low):.1f} {y}H{place(high):.1f}" stroke="{shade}" stroke-width="2"/>'
                         f'<circle cx="{place(mean):.1f}" cy="{y}" r="5" fill="{shade}"/>')
    shown = {round_ for dots in rows.values() for round_, *_ in dots}
    for i, name in enumerate(n for n in ("base", "round1", "round2", "round3") if n in shown):
        parts.append(f'<circle cx="{430 + 90 * i}" cy="{height + 10}" r="5" fill="{SHADES[i]}"/>'
                     f'<text x="{440 + 90 * i}" y="{height + 14}" fill="#6b7280">{name}</text>')
    return "\n".join(parts) + "</svg>\n"


def publish(name: str, found: list[str]) -> None:
    """Put tables between the marks <!-- name --> and <!-- /name --> of toy/RESULTS.md, and print them."""
    text = "\n\n".join(found)
    file = TOY / "RESULTS.md"
    page, n = re.subn(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", lambda m: f"{m[1]}\n{text}\n\n{m[2]}",
                      file.read_text(encoding="utf-8"), flags=re.S)
    if n != 1:
        raise ValueError(f"{file}: needs the marks of {name} once, has them {n} times")
    file.write_text(page, encoding="utf-8")
    print(text)
