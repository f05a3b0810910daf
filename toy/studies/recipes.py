"""Better than the toy's settings? One round, one thing changed at a time.

    python toy/studies/recipes.py            # or --tables
"""

import numpy as np

import loop
from tables import interval, markdown

SEEDS = (0, 1, 2)
VARIANTS = {
    "toy's settings": dict(),
    "pairs by the oracle": dict(scoring="chosen_by_oracle"),
    "answers, not captions": dict(training="answers"),
    "answers, not captions, weight 1": dict(dpo="--und 1", training="answers"),
    "one mask": dict(without="--complementary"),
    "4 masks": dict(without="--complementary", training="masks 4"),
    "one mask, as of 10 slots": dict(without="--complementary", training="same_slots 10"),
    "beta 0.2, NLL on the image 1": dict(dpo="--beta 0.2 --nll-gen 1"),
    "8 drawings": dict(sample="--images 8"),
}
MASKS = ("toy's settings", "one mask")


def right_of_4(policy, seed: int) -> list[int]:
    """Of 4 drawings of every validation caption, at the guidance of SAMPLE, how many are right."""
    options = f"--seed {seed} {loop.DEFAULTS['SAMPLE']} {loop.NO_CAPTIONS}"
    folder = loop.step("01", options, model=policy, records=loop.records("validation", 639, 0))
    return [sum(right) for right in loop.rights(policy, folder)]


def measure() -> dict:
    """{variant: {seed: `right_of_4` after one round}}: a choice, so not of test captions."""
    results = {variant: {} for variant in MASKS}
    for variant, by_seed in results.items():
        for seed in SEEDS:
            (_, _, _, trained), = loop.play(seed, 1, **VARIANTS[variant])
            by_seed[str(seed)] = right_of_4(trained / "checkpoint", seed)
    return results


def masks(content: dict) -> list[str]:
    """What one mask and two complementary ones draw, with less noise than one drawing has."""
    measured = content["measured"]
    both, one = (np.array([*measured[v].values()]) / 4 for v in MASKS)  # (seeds, records)
    return [markdown([
        ["639 validation captions, 4 drawings of each at guidance 0.25", "everything right",
         f"against {MASKS[0]}"],
        [f"{MASKS[0]}, round1", interval(both), ""],
        [f"{MASKS[1]}, round1", interval(one), interval(one - both, "+")],
    ])]


if __name__ == "__main__":
    loop.study("recipes", VARIANTS, against="toy's settings", seeds=SEEDS, measure=measure,
               more=masks)
