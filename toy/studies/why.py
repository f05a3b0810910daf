"""Why it works: preference and NLL apart and together, at two numbers of decoding steps.

    python toy/studies/why.py                # or --tables
"""

import loop

PREFERENCE = "--nll-und 0 --nll-gen 0"
NLL = "--beta 0 --nll-und 1 --nll-gen 1"
BOTH = "--nll-und 1 --nll-gen 1"
# several of the 16 slots at once
TEN = dict(sample="--steps 10", evals=("--steps 10",))
VARIANTS = {
    "toy's settings": dict(evals=("", "--steps 10")),
    "preference alone": dict(dpo=PREFERENCE),
    "NLL alone": dict(dpo=NLL),
    "both": dict(dpo=BOTH),
    "10 steps, toy's settings": TEN,
    "10 steps, preference alone": TEN | dict(dpo=PREFERENCE),
    "10 steps, NLL alone": TEN | dict(dpo=NLL),
    "10 steps, both": TEN | dict(dpo=BOTH),
    "10 steps, 3 epochs, preference alone": TEN | dict(dpo=f"--epochs 3 {PREFERENCE}"),
    "10 steps, 3 epochs, NLL alone": TEN | dict(dpo=f"--epochs 3 {NLL}"),
    "10 steps, 3 epochs, both": TEN | dict(dpo=f"--epochs 3 {BOTH}"),
}

if __name__ == "__main__":
    loop.study("why", VARIANTS, against="toy's settings")
