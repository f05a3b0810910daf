"""Which part of the loss does it: preference or NLL, understanding or generation? One round.

    python toy/studies/why.py                # or --tables
"""

import loop

VARIANTS = {
    "toy's settings": dict(),
    "preference alone": dict(dpo="--nll-und 0 --nll-gen 0"),
    "NLL alone": dict(dpo="--beta 0"),
    "understanding only": dict(dpo="--und 1 --gen 0"),
    "generation only": dict(dpo="--und 0"),
}

if __name__ == "__main__":
    loop.study("why", VARIANTS, against="toy's settings")
