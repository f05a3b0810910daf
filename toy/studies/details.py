"""Why the details matter: one round, one detail as in the released code, or as the paper prints it.

    python toy/studies/details.py            # or --tables
"""

import loop

VARIANTS = {
    "as it should be": dict(),
    "halves shuffled apart": dict(training="independent_shuffling"),
    "log-probs summed over 4 records": dict(training="batch_summed", dpo="--micro-batch 4"),
    "log-probs summed over 16 records": dict(training="batch_summed"),
    "text dropped separately": dict(training="mismatched_dropout"),
    "black images": dict(training="black_images"),
    "misaligned join": dict(scoring="misaligned_join"),
    "product of margins": dict(training="product_loss"),
    "product of margins, no NLL": dict(training="product_loss", dpo="--nll-und 0 --nll-gen 0"),
}

if __name__ == "__main__":
    loop.study("details", VARIANTS, against="as it should be")
