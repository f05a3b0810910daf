"""What limits the result: noise of the self-score, too few captions, or the model?

Three epochs a round, which learn all that one set of pairs can teach. Drawings of the training
captions show how much of what is missing is missing there, too.

    python toy/studies/limits.py             # or --tables
"""

import loop
from tables import faults

BOTH = dict(n=2, evals=("", loop.TRAINING))
THREE = BOTH | dict(dpo="--epochs 3")
VARIANTS = {
    "512 captions, 3 epochs a round": THREE,
    "images chosen by the oracle":
        THREE | dict(score="--image-scorer likelihood", scoring="chosen_by_oracle"),
    "1,002 captions, as many steps": BOTH | dict(dpo="--epochs 1.5", captions=1002),
    "334 new captions each round, 3 epochs": THREE | dict(n=3, captions=334, renewed=True),
}

if __name__ == "__main__":
    loop.study("limits", VARIANTS, against="512 captions, 3 epochs a round", more=faults)
