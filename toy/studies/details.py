"""Why the details matter: one round, one detail as in the released code, or as the paper prints it.

    python toy/studies/details.py            # or --tables
"""

import loop

VARIANTS = {
    "as it should be": dict(),
    "misaligned join": dict(scoring="misaligned_join"),
    "product of margins": dict(training="product_loss"),
    "black images": dict(training="black_images"),
    "log-probs summed over 16 records": dict(training="batch_summed"),
}

if __name__ == "__main__":
    loop.study("details", VARIANTS, against="as it should be")
