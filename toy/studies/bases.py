"""Where along pretraining the base may be taken: one round from several bases.

Intermediate models of one run of pretraining, its last one, and the base in the repository.

    python toy/pretrain.py --out runs/bases --keep 1000 2000     # half an hour on one core
    python toy/studies/bases.py              # or --tables
"""

import loop

BOTH = dict(evals=("", "--guidance 2"))
VARIANTS = {
    "1000 steps": BOTH | dict(base="runs/bases/step-1000"),
    "2000 steps": BOTH | dict(base="runs/bases/step-2000"),
    "3000 steps": BOTH | dict(base="runs/bases/base"),
    "toy/base": BOTH,
}

if __name__ == "__main__":
    loop.study("bases", VARIANTS, against="toy/base")
