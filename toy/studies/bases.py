"""Where along pretraining the base may be taken: one round from intermediate models, and from the shipped one.

    python toy/pretrain.py --out runs/bases --keep 1000 2000     # half an hour on one core
    python toy/studies/bases.py              # or --tables
"""

import loop

BOTH = dict(evals=("", "--guidance 2"))
VARIANTS = {f"{n} steps": BOTH | dict(base=f"runs/bases/step-{n}") for n in (1000, 2000)} | {"3000 steps, toy/base": BOTH}

if __name__ == "__main__":
    loop.study("bases", VARIANTS, against="3000 steps, toy/base")
