"""Better than the toy's settings? One round, one thing changed at a time.

    python toy/studies/recipes.py            # or --tables
"""

import loop

VARIANTS = {
    "toy's settings": dict(),
    "NLL alone": dict(dpo="--beta 0"),
    "beta 0.5, NLL on the image 2": dict(dpo="--beta 0.5 --nll-gen 2"),
}

if __name__ == "__main__":
    loop.study("recipes", VARIANTS, against="toy's settings")
