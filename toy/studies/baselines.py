"""What the same drawings and scores give without Pair-DPO: choosing one of eight, and SFT.

    python toy/studies/baselines.py          # or --tables
"""

import loop

SFT = "--beta 0 --nll-und 1 --nll-gen 1"
VARIANTS = {
    "Pair-DPO": dict(n=3, evals=("", loop.BEST_OF_8)),
    "SFT on the winners": dict(n=3, dpo=SFT),
    "SFT on the winners, lr 5e-4": dict(n=3, dpo=f"{SFT} --lr 5e-4"),
}

if __name__ == "__main__":
    loop.study("baselines", VARIANTS, against="Pair-DPO")
