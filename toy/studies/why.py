"""Why it works: preference and NLL apart and together, and what the number of decoding steps has to do with it.

    python toy/studies/why.py                # or --tables
"""

import loop

NLL_ALONE, BOTH = "--beta 0 --nll-und 1 --nll-gen 1", "--nll-und 1 --nll-gen 1"
ROUGH = dict(sample="--steps 10", evals=("--steps 10",))  # several of the 16 slots at once
VARIANTS = {
    "toy's settings": dict(evals=("", "--steps 10")),
    "preference alone": dict(dpo="--nll-und 0 --nll-gen 0"),
    "NLL alone": dict(dpo=NLL_ALONE),
    "both": dict(dpo=BOTH),
    "10 steps, toy's settings": ROUGH,
    "10 steps, preference alone": ROUGH | dict(dpo="--nll-und 0 --nll-gen 0"),
    "10 steps, NLL alone": ROUGH | dict(dpo=NLL_ALONE),
    "10 steps, both": ROUGH | dict(dpo=BOTH),
    "10 steps, 3 epochs, preference alone": ROUGH | dict(dpo="--epochs 3 --nll-und 0 --nll-gen 0"),
    "10 steps, 3 epochs, NLL alone": ROUGH | dict(dpo=f"--epochs 3 {NLL_ALONE}"),
    "10 steps, 3 epochs, both": ROUGH | dict(dpo=f"--epochs 3 {BOTH}"),
}

if __name__ == "__main__":
    loop.study("why", VARIANTS, against="toy's settings")
