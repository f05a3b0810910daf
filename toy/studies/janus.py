"""Another backbone: does Pair-DPO help one that draws its codes one after the other?

The base is toy/base-janus. It draws at more guidance than Show-o's, so candidates are sampled at 1,
and it learns at ten times the learning rate; the other settings are the toy's.

    python toy/studies/janus.py              # or --tables
"""

import loop

SETTINGS = dict(base="toy/base-janus", sample="--guidance 1")
VARIANTS = {
    "Pair-DPO": dict(SETTINGS, n=3, dpo="--lr 3e-4"),
    "preference alone": dict(SETTINGS, dpo="--lr 3e-4 --nll-und 0 --nll-gen 0"),
    "NLL alone": dict(SETTINGS, dpo="--lr 3e-4 --beta 0"),
}

if __name__ == "__main__":
    loop.study("janus", VARIANTS, against="Pair-DPO")
