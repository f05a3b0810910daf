"""Later rounds: whom the new best meets, which model is the reference, and SFT instead.

    python toy/studies/over_rounds.py        # or --tables
"""

import loop

VARIANTS = {
    "toy's settings": dict(n=2),
    "self-play pairs (Eq. 9-10)": dict(n=2, self_play=True),
    "SFT on the best of 4": dict(n=2, dpo="--beta 0"),
    "reference fixed to the base": dict(n=2, fixed_reference=True),
}

if __name__ == "__main__":
    loop.study("over_rounds", VARIANTS, against="toy's settings")
