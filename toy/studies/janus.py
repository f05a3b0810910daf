"""Another backbone: does Pair-DPO help one that draws its codes one after the other?

The base is toy/base-janus. It draws at more guidance than Show-o's, so candidates are sampled at 1.
With settings that came before the toy's: fewer records and steps, more candidates.

    python toy/studies/janus.py              # or --tables
"""

import loop

VARIANTS = {
    "Pair-DPO": dict(n=3, base="toy/base-janus", preference=512,
                     sample="--captions 8 --images 8 --guidance 1",
                     dpo="--beta 0.2 --nll-gen 1 --lr 1e-4 --epochs 1"),
}

if __name__ == "__main__":
    loop.study("janus", VARIANTS, against="Pair-DPO")
