"""Better than the paper? One round, one thing changed at a time.

    python toy/studies/recipes.py            # or --tables
"""

import loop

STEPS = "--steps 24"
VARIANTS = {
    "toy's settings": dict(),
    "4 masks": dict(training="masks 4"),
    "2 complementary masks": dict(training="masks 2 complementary"),
    "mean over slots, beta 2": dict(training="mean_over_slots", dpo="--beta 2"),
    "NLL on the image, 0.1": dict(dpo="--nll-gen 0.1"),
    "NLL on the image, 1": dict(dpo="--nll-gen 1"),
    "no NLL on the caption": dict(dpo="--nll-und 0"),
    "label smoothing 0.1": dict(training="label_smoothing 0.1"),
    "image scores differ by 0.3": dict(scoring="filtered gap 0.3"),
    "caption scores differ by 0.3": dict(scoring="filtered caption_gap 0.3"),
    "images differ in 3 slots": dict(scoring="filtered codes 3"),
    "image scores differ by 0.3, 24 steps": dict(scoring="filtered gap 0.3", dpo=STEPS),
    "caption scores differ by 0.3, 24 steps": dict(scoring="filtered caption_gap 0.3", dpo=STEPS),
    "images differ in 3 slots, 24 steps": dict(scoring="filtered codes 3", dpo=STEPS),
    "beta 0.05": dict(dpo="--beta 0.05"),
    "beta 1": dict(dpo="--beta 1"),
    "lr 2e-5": dict(dpo="--lr 2e-5"),
    "lr 1e-4": dict(dpo="--lr 1e-4"),
    "lr 3e-4": dict(dpo="--lr 3e-4"),
}

if __name__ == "__main__":
    loop.study("recipes", VARIANTS, against="toy's settings")
