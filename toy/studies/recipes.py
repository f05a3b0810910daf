"""Better than the toy's settings? One round, one thing changed at a time.

    python toy/studies/recipes.py            # or --tables
"""

import loop

VARIANTS = {
    "toy's settings": dict(),
    "pairs by the oracle": dict(scoring="chosen_by_oracle"),
    "answers, not captions": dict(training="answers"),
    "one mask": dict(without="--complementary"),
    "4 masks": dict(without="--complementary", training="masks 4"),
    "mean over slots, beta 8": dict(dpo="--beta 8", training="mean_over_slots"),
    "beta 0.2, NLL on the image 1": dict(dpo="--beta 0.2 --nll-gen 1"),
}

if __name__ == "__main__":
    loop.study("recipes", VARIANTS, against="toy's settings")
