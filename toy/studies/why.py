"""Which part of the loss does it: preference or NLL, understanding or generation? One round.

With settings that came before the toy's: one mask, guided log-probs, less NLL on the image.

    python toy/studies/why.py                # or --tables
"""

import loop

EARLIER = "--und 1 --nll-und 1 --nll-gen 0.3 --guidance 0.25 --lr 5e-5"


def earlier(options: str = "") -> dict:
    return dict(without="--complementary", dpo=f"{EARLIER} {options}")


VARIANTS = {
    "earlier settings": earlier(),
    "preference alone": earlier("--nll-und 0 --nll-gen 0"),
    "NLL alone": earlier("--beta 0"),
    "understanding only": earlier("--gen 0"),
    "generation only": earlier("--und 0"),
}

if __name__ == "__main__":
    loop.study("why", VARIANTS, against="earlier settings")
