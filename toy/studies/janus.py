"""Another backbone: does Pair-DPO help one that draws its codes one after the other?

The base is toy/base-janus. It draws at more guidance than Show-o's, so candidates are sampled at 1,
and it needs a higher learning rate; the other settings are the toy's.

    python toy/studies/janus.py              # or --tables
"""

import loop

SETTINGS = dict(n=2, base="toy/base-janus", sample="--guidance 1", dpo="--lr 1e-4")
VARIANTS = {
    "Pair-DPO": SETTINGS,
    "answers, not captions": dict(SETTINGS, training="answers"),
}

if __name__ == "__main__":
    loop.study("janus", VARIANTS, against="Pair-DPO")
