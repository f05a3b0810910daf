"""Where along pretraining the base may be taken: one round from intermediate models, the last one, and the shipped one.

    python toy/pretrain.py --out runs/bases --keep 1000 2000     # half an hour on one core
    python toy/studies/bases.py              # or --tables
"""

import loop

BOTH = dict(evals=("", "--guidance 2"))
FOLDERS = {1000: "step-1000", 2000: "step-2000", 3000: "base"}
VARIANTS = {f"{n} steps": BOTH | dict(base=f"runs/bases/{folder}") for n, folder in FOLDERS.items()} | {"toy/base": BOTH}

if __name__ == "__main__":
    loop.study("bases", VARIANTS, against="toy/base")
