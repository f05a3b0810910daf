"""Another backbone: does Pair-DPO help one that draws its codes one after the other?

The base is toy/base-janus; three rounds, each variant with the loop's data and protocol.

    python toy/studies/janus.py              # or --tables
"""

import loop

BASE = dict(n=3, base="toy/base-janus")
VARIANTS = {
    "Janus": dict(**BASE),
}

if __name__ == "__main__":
    loop.study("janus", VARIANTS, against="Janus")
