"""Later rounds: whom the new best meets, and which model is the reference.

    python toy/studies/over_rounds.py        # or --tables
"""

import loop

VARIANTS = {
    "toy's settings": dict(n=3),
    "self-play pairs (Eq. 9-10)": dict(n=3, self_play=True),
    "reference fixed to the base": dict(n=3, fixed_reference=True),
}

if __name__ == "__main__":
    loop.study("over_rounds", VARIANTS, against="toy's settings")
