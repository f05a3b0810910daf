"""Main result: three rounds with the toy's settings, five seeds (data, sampling, order of training), one base.

    python toy/studies/main_result.py        # or --tables
"""

from math import comb

import numpy as np

import loop
from tables import METRICS, faults, interval, markdown, metrics

NAMES = ("base", "round1", "round2", "round3")
STEPS = [*zip(NAMES, NAMES[1:]), ("base", "round3")]
VARIANTS = {"Pair-DPO": dict(n=3, evals=("", loop.UNSEEN))}


def mcnemar(before: np.ndarray, after: np.ndarray) -> str:
    """Exact McNemar test on one seed's records, (N,) of 0 and 1: how many became right and wrong, two-sided p."""
    gained, lost = int((after > before).sum()), int((after < before).sum())
    n, fewer = gained + lost, min(gained, lost)
    p = min(1.0, 2 * sum(comb(n, i) for i in range(fewer + 1)) / 2**n)
    return f"+{gained} −{lost}, p {'= ' + format(p, '.2g') if p >= 1e-4 else '< 1e-4'}"


def paired(results: dict) -> list[str]:
    """Differences between rounds; per seed the gaps, and how many drawings became right or wrong."""
    found = {(v, n): np.stack([metrics(cells[n][""]) for cells in by_seed.values()])  # (seeds, records, METRICS)
             for v, by_seed in results.items() for n in NAMES}
    differences = [["paired difference", *METRICS]] + [
        [f"{v}, {a} to {b}", *(interval((found[v, b] - found[v, a])[..., m], "+") for m in range(len(METRICS)))]
        for v in results for a, b in STEPS]
    seeds = [["", *(f"{n}: gap, everything right" for n in NAMES), "gap closed"]]
    tests = [["drawings that became right, wrong", *(f"{a} to {b}" for a, b in STEPS)]]
    for v, by_seed in results.items():
        for s, seed in enumerate(by_seed):
            gap, right = ([found[v, n][s, :, m].mean() for n in NAMES] for m in (2, 3))
            seeds.append([f"{v}, seed {seed}", *(f"{g:.3f}, {r:.3f}" for g, r in zip(gap, right)), f"{1 - gap[-1] / gap[0]:.0%}"])
            tests.append([f"{v}, seed {seed}", *(mcnemar(found[v, a][s, :, 3], found[v, b][s, :, 3]) for a, b in STEPS)])
    return [markdown(differences), *faults(results), markdown(seeds), markdown(tests)]


if __name__ == "__main__":
    loop.study("main_result", VARIANTS, against="Pair-DPO", seeds=(0, 1, 2, 3, 4), more=paired)
