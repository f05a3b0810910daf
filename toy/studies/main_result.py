"""Main result: five rounds with the toy's settings, three seeds (data, sampling, order), one base.

    python toy/studies/main_result.py        # or --tables
"""

from math import comb

import numpy as np

import loop
from tables import METRICS, RIGHT, faults, interval, markdown, metrics

ROUNDS = ("base", "round1", "round2", "round3", "round4", "round5")
STEPS = [*zip(ROUNDS, ROUNDS[1:]), (ROUNDS[0], ROUNDS[-1])]
GAP = METRICS.index("gap")
VARIANTS = {"Pair-DPO": dict(n=5)}


def mcnemar(before: np.ndarray, after: np.ndarray) -> str:
    """Exact McNemar test on one seed's records, (N,) of 0 and 1.

    How many became right and wrong, and the two-sided p.
    """
    gained = int((after > before).sum())
    lost = int((after < before).sum())
    n = gained + lost
    tail = sum(comb(n, i) for i in range(min(gained, lost) + 1)) / 2**n
    p = min(1.0, 2 * tail)
    return f"+{gained} −{lost}, p {'= ' + format(p, '.2g') if p >= 1e-4 else '< 1e-4'}"


def paired(results: dict) -> list[str]:
    """Differences between rounds, faults; per seed the gaps, and drawings that became right."""
    differences = [["paired difference", *METRICS]]
    seeds = [["", *(f"{n}: guidance, gap, everything right" for n in ROUNDS), "gap closed"]]
    tests = [["drawings that became right, wrong", *(f"{a} to {b}" for a, b in STEPS)]]
    for variant, by_seed in results.items():
        values = {}
        for name in ROUNDS:
            cells = [rounds[name][""] for rounds in by_seed.values()]
            values[name] = np.stack([metrics(c) for c in cells])  # (seeds, records, METRICS)

        for a, b in STEPS:
            change = values[b] - values[a]
            row = [interval(change[..., m], "+") for m in range(len(METRICS))]
            differences.append([f"{variant}, {a} to {b}", *row])

        for s, seed in enumerate(by_seed):
            gaps = [values[name][s, :, GAP].mean() for name in ROUNDS]
            rights = [values[name][s, :, RIGHT].mean() for name in ROUNDS]
            scales = [by_seed[seed][name][""]["guidance"] for name in ROUNDS]
            row = [f"{g:g}, {gap:.3f}, {right:.3f}" for g, gap, right in zip(scales, gaps, rights)]
            seeds.append([f"{variant}, seed {seed}", *row, f"{1 - gaps[-1] / gaps[0]:.0%}"])
            row = [mcnemar(values[a][s, :, RIGHT], values[b][s, :, RIGHT]) for a, b in STEPS]
            tests.append([f"{variant}, seed {seed}", *row])
    return [markdown(differences), *faults(results), markdown(seeds), markdown(tests)]


if __name__ == "__main__":
    loop.study("main_result", VARIANTS, against="Pair-DPO", more=paired)
