"""The paper's ablations: both halves, understanding only, generation only, rounds 1 to 3; n captions and images per record.

    python toy/studies/ablations.py          # or --tables
"""

import loop

VARIANTS = {"both, n = 8": dict(n=3), "understanding only": dict(n=3, dpo="--gen 0"), "generation only": dict(n=3, dpo="--und 0")}
VARIANTS |= {f"both, n = {n}": dict(sample=f"--captions {n} --images {n}") for n in (2, 4, 16)}
VARIANTS |= {f"both, n = {n}, 24 steps": dict(sample=f"--captions {n} --images {n}", dpo="--epochs 0 --steps 24") for n in (2, 4, 16)}

if __name__ == "__main__":
    loop.study("ablations", VARIANTS, against="both, n = 8")
