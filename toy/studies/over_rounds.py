"""Later rounds: whom the new best meets, which model is the reference, how much one round trains.

    python toy/studies/over_rounds.py        # or --tables
"""

import loop

VARIANTS = {
    "toy's settings": dict(n=3),
    "self-play pairs (Eq. 9-10)": dict(n=3, self_play=True),
    "reference fixed to the base": dict(n=3, fixed_reference=True),
    "lr 1e-4": dict(n=3, dpo="--lr 1e-4"),
    "3 epochs a round": dict(n=3, dpo="--epochs 3"),
    "one round of 5 epochs": dict(dpo="--epochs 5"),
    "one round of 7 epochs": dict(dpo="--epochs 7"),
    "3 epochs, self-play pairs": dict(n=3, self_play=True, dpo="--epochs 3"),
}

if __name__ == "__main__":
    loop.study("over_rounds", VARIANTS, against="toy's settings")
