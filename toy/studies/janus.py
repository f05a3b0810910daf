"""Another backbone: does Pair-DPO help one that draws its codes one after the other?

The base is toy/base-janus. It draws at more guidance than Show-o's, so candidates are sampled at 1;
all other settings are the toy's.

    python toy/studies/janus.py              # or --tables
"""

import loop

JANUS = dict(base="toy/base-janus", sample="--guidance 1")
VARIANTS = {
    "Pair-DPO": dict(n=3, **JANUS),
    "preference alone": dict(dpo="--nll-und 0 --nll-gen 0", **JANUS),
    "NLL alone": dict(dpo="--beta 0", **JANUS),
}

if __name__ == "__main__":
    loop.study("janus", VARIANTS, against="Pair-DPO")
