"""Which part of the loss does it: preference or NLL, understanding or generation? One round.

    python toy/studies/why.py                # or --tables
"""

import loop

VARIANTS = {
    "both": dict(),
    "preference alone": dict(dpo="--nll-und 0 --nll-gen 0"),
    "NLL alone": dict(dpo="--beta 0"),
    "generation alone": dict(dpo="--und 0"),
    "preference about images alone": dict(dpo="--und 0 --nll-gen 0"),
    "understanding alone": dict(dpo="--gen 0"),
}

if __name__ == "__main__":
    loop.study("why", VARIANTS, against="both")
