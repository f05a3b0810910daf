"""The main result from another base: the same recipe of pretraining with another seed.

The image tokenizer is another one, too.

    python toy/pretrain.py --seed 1 --out runs/bases/seed-1      # half an hour on one core
    python toy/studies/other_base.py         # or --tables
"""

import loop
from main_result import paired

VARIANTS = {
    "another base": dict(n=3, base="runs/bases/seed-1/base", evals=("", "--guidance 2")),
}

if __name__ == "__main__":
    loop.study("other_base", VARIANTS, against="another base", more=paired)
