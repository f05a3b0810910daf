"""Classifier-free guidance in sampling, in training and in evaluation.

    python toy/studies/guidance.py           # or --tables
"""

import loop

TWO = "--guidance 2"
BOTH = dict(evals=("", TWO))
SAMPLED = BOTH | dict(sample=TWO)
VARIANTS = {
    "toy's settings": BOTH,
    "sampled at 2": SAMPLED,
    "sampled at 0 and 2 in turn": BOTH | dict(sampling="guidance_in_turn 0 2"),
    "trained at 2": BOTH | dict(dpo=TWO),
    "sampled and trained at 2": SAMPLED | dict(dpo=TWO),
    "sampled at 2, NLL on the image": SAMPLED | dict(dpo="--nll-gen 1"),
    "trained at 2, NLL on the image": BOTH | dict(dpo=f"{TWO} --nll-gen 1"),
    "sampled and trained at 2, NLL alone": SAMPLED | dict(dpo=f"{TWO} --beta 0 --nll-gen 1"),
    "sampled and trained at 2, NLL on the image":
        BOTH | dict(n=3, sample=TWO, dpo=f"{TWO} --nll-gen 1"),
}

if __name__ == "__main__":
    loop.study("guidance", VARIANTS, against="toy's settings")
