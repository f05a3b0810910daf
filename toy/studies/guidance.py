"""Classifier-free guidance in sampling, in training and in evaluation.

    python toy/studies/guidance.py           # or --tables
"""

import loop

BOTH = dict(evals=("", "--guidance 2"))
VARIANTS = {
    "toy's settings": BOTH,
    "sampled at 2": BOTH | dict(sample="--guidance 2"),
    "sampled at 0 and 2 in turn": BOTH | dict(sampling="guidance_in_turn 0 2"),
    "trained at 2": BOTH | dict(dpo="--guidance 2"),
    "sampled and trained at 2": BOTH | dict(sample="--guidance 2", dpo="--guidance 2"),
    "sampled at 2, NLL on the image": BOTH | dict(sample="--guidance 2", dpo="--nll-gen 1"),
    "trained at 2, NLL on the image": BOTH | dict(dpo="--guidance 2 --nll-gen 1"),
    "sampled and trained at 2, NLL alone": BOTH | dict(sample="--guidance 2", dpo="--guidance 2 --beta 0 --nll-gen 1"),
    "sampled and trained at 2, NLL on the image": BOTH | dict(n=3, sample="--guidance 2", dpo="--guidance 2 --nll-gen 1"),
}

if __name__ == "__main__":
    loop.study("guidance", VARIANTS, against="toy's settings")
