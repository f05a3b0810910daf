"""How much of the result is guidance?

The rounds drawn at small guidance, and rounds from the base at its best guidance.

    python toy/studies/strength.py           # or --tables
"""

import loop
from tables import faults

HALF = "--guidance 0.5"
AT_HALF = dict(sample=HALF, evals=(HALF,))
VARIANTS = {
    "toy's settings": dict(n=3, evals=("", "--guidance 0.25", HALF, "--guidance 1")),
    "sampled at 0.5": AT_HALF,
    "sampled and trained at 0.5": AT_HALF | dict(dpo=HALF),
    "sampled and trained at 0.5, NLL on the image": AT_HALF | dict(dpo=f"{HALF} --nll-gen 1"),
}

if __name__ == "__main__":
    loop.study("strength", VARIANTS, against="toy's settings", more=faults)
