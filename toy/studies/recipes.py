"""Better than the paper? One round, one thing changed at a time.

    python toy/studies/recipes.py            # or --tables
"""

import loop

VARIANTS = {
    "toy's settings": dict(),
    "4 masks": dict(training="masks 4"),
    "2 complementary masks": dict(training="masks 2 complementary"),
    "mean over slots, beta 2": dict(training="mean_over_slots", dpo="--beta 2"),
    "NLL on the image, 1": dict(dpo="--nll-gen 1"),
    "lr 2e-5": dict(dpo="--lr 2e-5"),
    "lr 1e-4": dict(dpo="--lr 1e-4"),
    "LoRA 16, lr 5e-4": dict(dpo="--lora 16 --lr 5e-4"),
    "LoRA 16, lr 1e-3": dict(dpo="--lora 16 --lr 1e-3"),
    "images chosen by the oracle":
        dict(score="--image-scorer likelihood", scoring="chosen_by_oracle"),
}

if __name__ == "__main__":
    loop.study("recipes", VARIANTS, against="toy's settings")
