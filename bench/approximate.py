"""Seconds to generate 256 images in the toy world, for each setting of bench/approximate.sh.

    OMP_NUM_THREADS=1 python bench/approximate.py
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from hermesflow.options import COUNT, ImageSampling, stage_parser

SETTINGS = {
    "exact": ImageSampling(16, 0.5),
    "steps-8": ImageSampling(8, 0.5),
    "steps-4": ImageSampling(4, 0.5),
    "first-half": ImageSampling(16, 0.5, guidance_interval=(0.0, 0.5)),
    "last-half": ImageSampling(16, 0.5, guidance_interval=(0.5, 1.0)),
}
PROMPT = "a big red ring left of a small blue square"


def parse_args(argv=None):
    parser = stage_parser(__doc__)
    parser.add_argument("--images", type=COUNT, default=256, help="of one prompt")
    parser.add_argument("--times", type=COUNT, default=3, help="of which the fastest counts")
    return parser.parse_args(argv)


if __name__ == "__main__":
    ARGS = parse_args()  # before the heavy imports, so that --help answers at once

import time

from model import load


def main(args):
    model = load(ROOT / "toy" / "base")
    for name, sampling in SETTINGS.items():
        seconds = []
        for _ in range(args.times):
            start = time.perf_counter()
            model.generate_images([PROMPT] * args.images, list(range(args.images)), sampling)
            seconds.append(time.perf_counter() - start)
        print(f"{name}: {min(seconds):.2f} s for {args.images} images", flush=True)


if __name__ == "__main__":
    main(ARGS)
