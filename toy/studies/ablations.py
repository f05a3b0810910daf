"""The paper's ablations: each half alone and both, rounds 1 to 3; n captions and images per record.

    python toy/studies/ablations.py          # or --tables
"""

import loop

SIZES = (2, 4, 16)
STEPS = "--steps 24"
VARIANTS = {
    "both, n = 8": dict(n=3),
    "understanding only": dict(n=3, dpo="--gen 0"),
    "generation only": dict(n=3, dpo="--und 0"),
}
for n in SIZES:
    VARIANTS[f"both, n = {n}"] = dict(sample=f"--captions {n} --images {n}")
for n in SIZES:
    VARIANTS[f"both, n = {n}, 24 steps"] = dict(sample=f"--captions {n} --images {n}", dpo=STEPS)

if __name__ == "__main__":
    loop.study("ablations", VARIANTS, against="both, n = 8")
