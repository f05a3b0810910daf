"""Another backbone: does Pair-DPO help one that draws its codes one after the other?

The base is toy/base-janus. It draws at more guidance than Show-o's, so candidates are sampled at 1;
all other settings are the toy's.

    python toy/studies/janus.py              # or --tables
"""

import loop

VARIANTS = {"Pair-DPO": dict(n=3, base="toy/base-janus", sample="--guidance 1")}

if __name__ == "__main__":
    loop.study("janus", VARIANTS, against="Pair-DPO")
