"""Better than the paper? One round, one thing changed at a time.

    python toy/studies/recipes.py            # or --tables
"""

import loop

VARIANTS = {
    "toy's settings": dict(),
    "one mask": dict(without="--complementary"),
    "4 masks": dict(without="--complementary", training="masks 4"),
    "mean over slots, beta 3.2": dict(dpo="--beta 3.2", training="mean_over_slots"),
    "log-probs guided at 0.25": dict(dpo="--guidance 0.25"),
    "halves of equal weight": dict(dpo="--und 1"),
    "LoRA 16, lr 1e-3": dict(dpo="--lora 16 --lr 1e-3"),
    "images chosen by the oracle":
        dict(score="--image-scorer likelihood", scoring="chosen_by_oracle"),
}

if __name__ == "__main__":
    loop.study("recipes", VARIANTS, against="toy's settings")
