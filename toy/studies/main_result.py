"""Main result: three rounds with the toy's settings, five seeds (data, sampling, order), one base.

    python toy/studies/main_result.py        # or --tables
"""

from math import comb

import numpy as np

import loop
from hermesflow.jsonl import read_jsonl
from hermesflow.records import Score
from tables import METRICS, RIGHT, faults, interval, markdown, metrics

ROUNDS = ("base", "round1", "round2", "round3")
STEPS = [*zip(ROUNDS, ROUNDS[1:]), (ROUNDS[0], ROUNDS[-1])]
GAP = METRICS.index("gap")
SEEDS = (0, 1, 2, 3, 4)
VARIANTS = {"Pair-DPO": dict(n=3)}


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


def paired(content: dict) -> list[str]:
    """Differences between rounds, faults; per seed the gaps, and drawings that became right."""
    results = content["results"]
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
    return [markdown(differences), *faults(results), markdown(seeds), markdown(tests),
            *sampled_more(content)]


def chosen_of_8(policy, seed: int) -> list[int]:
    """Of 8 drawings of each test record, is the one that the policy scores best all right?

    They are drawn at its own best guidance. Captions are cut after a word: they are not looked at.
    """
    options = (f"--seed {seed} {loop.DEFAULTS['SAMPLE']} --captions 2 --max-new-tokens 1 --images 8 "
               f"--batch 64 --show 0 --guidance {loop.best_guidance(policy, seed)}")
    samples = loop.step("01", options, model=policy, records=loop.records("test", 600, 0))
    scored = loop.step("02", loop.DEFAULTS["SCORE"], model=policy, samples=samples)
    scores = read_jsonl(scored / "scores.jsonl", Score)
    return [right[int(np.argmax(score.image_scores))]
            for right, score in zip(loop.rights(policy, samples), scores)]


def best_of_8() -> dict:
    """{seed: per test record, whether the chosen drawing of the base is right}, of three seeds."""
    return {str(seed): chosen_of_8("toy/base", seed) for seed in SEEDS[:3]}


def sampled_more(content: dict) -> list[str]:
    """What sampling eight times as much does instead."""
    best = np.array([*content["measured"].values()], float)  # (seeds, records)

    def one(name):
        by_seed = content["results"]["Pair-DPO"]
        return np.array([by_seed[seed][name][""]["everything"] for seed in content["measured"]])

    base, last = one(ROUNDS[0]), one(ROUNDS[-1])
    return [markdown([
        ["three seeds", "everything right"],
        ["base, one drawing", interval(base)],
        [f"{ROUNDS[-1]}, one drawing", interval(last)],
        ["base, the best of 8 drawings by its own score", interval(best)],
        [f"the same, against one drawing of {ROUNDS[-1]}", interval(best - last, "+")],
    ])]


if __name__ == "__main__":
    loop.study("main_result", VARIANTS, against="Pair-DPO", seeds=SEEDS, measure=best_of_8,
               more=paired)
