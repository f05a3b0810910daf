"""Which part of the loss does it: preference, NLL, or both? One round.

    python toy/studies/why.py                # or --tables
"""

import loop

VARIANTS = {
    "both": dict(),
    "preference alone": dict(dpo="--nll-und 0 --nll-gen 0"),
    "NLL alone": dict(dpo="--beta 0"),
}

if __name__ == "__main__":
    loop.study("why", VARIANTS, against="both")
