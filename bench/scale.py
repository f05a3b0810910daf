"""Memory and time of the stages over the number of records, without a network: how they scale.

    python bench/scale.py --records 8000 64000                  # toy size: 16 codes an image
    python bench/scale.py --records 500 4000 --codes 1024       # the published size

Every stage runs as its command does, with a policy that answers at random and costs nothing; so
what is measured is reading, checking, keeping, joining and writing. 03 trains one step of the toy's
base, at toy size alone. The last column extends the two largest runs to a million records.
"""

import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from hermesflow.options import COUNT, stage_parser

STAGES = ("01_sample", "02_score", "03_pair_dpo", "04_eval")
MILLION = 10**6


def parse_args(argv=None):
    parser = stage_parser(__doc__)
    add = parser.add_argument
    add("--records", type=COUNT, nargs="+", default=[8000, 64000], help="runs of these sizes")
    add("--codes", type=COUNT, default=16, help="per image: 16 in the toy, 1024 as published")
    add("--images", type=COUNT, default=16, help="per record")
    add("--run", nargs=2, metavar=("STAGE", "FOLDER"), help="one stage, in this process")
    return parser.parse_args(argv)


# --------------------------------------------------------------------------------- a run of a stage


class RandomModel:
    """A policy of random answers, in the interface of `Model`."""

    device = "cpu"
    code_count = 64
    vocab_size = 64
    longest_prompt = 128

    def __init__(self, image_tokens: int):
        import torch

        self.random = torch.Generator().manual_seed(0)
        self.torch = torch
        self.image_tokens = image_tokens
        self.image_size = 16

    def codes(self, n: int):
        shape = (n, self.image_tokens)
        return self.torch.randint(0, 64, shape, generator=self.random)  # (n, N)

    def encode_image(self, pixels):
        return self.codes(len(pixels))

    def looked_at(self, files, codes=None):
        return codes

    def decode_image(self, codes):
        return self.torch.zeros(len(codes), 3, self.image_size, self.image_size)

    def generate_images(self, prompts, seeds, sampling):
        return self.codes(len(prompts))

    def generate_text(self, images, requests, max_new_tokens=20, progress=iter):
        from hermesflow.sampling import Generated

        ids = self.torch.randint(0, 6, (len(requests), 8), generator=self.random).tolist()
        return [Generated(text[: 1 + text[0]], True) for text in ids]

    def decode_text(self, ids):
        return " ".join(["yes", "no", "red", "ring", "big", "number"][i] for i in ids)

    def prompt_length(self, text):
        return len(text)

    def check_prompt(self, text, where):
        pass


def run_stage(stage: str, folder: Path, codes: int, images: int) -> None:
    """Run a stage's main and print its seconds and its peak memory in MB, as JSON."""
    sys.path.insert(0, str(ROOT / "tests"))
    import conftest

    module = conftest.stage(stage)
    records = ["--records", folder / "records.jsonl"]
    commands = {
        "01_sample": [*records, "--captions", 10, "--images", images, "--batch", 16],
        "02_score": ["--samples", folder / "01_sample", "--batch", 16, "--min-image-score", 0],
        "03_pair_dpo": ["--pairs", folder / "02_score" / "pairs.jsonl", "--steps", 1],
        "04_eval": [*records, "--judge", "self", "--batch", 16],
    }
    if stage != "03_pair_dpo":
        module.load_from = lambda args: RandomModel(codes)
    command = [*commands[stage], "--out", folder / stage]
    started = time.process_time()
    conftest.main(module, *command)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": time.process_time() - started, "megabytes": peak}))


# --------------------------------------------------------------------------------------- all of them


def make_records(folder: Path, n: int) -> None:
    from PIL import Image

    Image.new("RGB", (16, 16)).save(folder / "image.png")
    question = {"question": "is there a ring?", "choices": ["yes", "no"], "answer": "yes"}
    with open(folder / "records.jsonl", "w") as file:
        for i in range(n):
            record = {"id": f"record-{i:07d}", "image": "image.png",
                      "caption": f"a big red ring left of a small blue square, number {i}",
                      "questions": [question] * 4}
            file.write(json.dumps(record) + "\n")


def measure(n: int, codes: int, images: int) -> dict[str, dict]:
    """stage -> seconds and peak megabytes with n records."""
    figures = {}
    folder = Path(tempfile.mkdtemp(prefix="scale-"))
    try:
        make_records(folder, n)
        for stage in STAGES if codes == 16 else ("01_sample", "02_score", "04_eval"):
            command = [sys.executable, __file__, "--run", stage, folder, "--codes", codes,
                       "--images", images]
            done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{stage}: {done.stderr[-2000:]}")
            figures[stage] = json.loads(done.stdout.splitlines()[-1])
            print(f"{stage} {n:8d} records: {figures[stage]['megabytes']:6.0f} MB, "
                  f"{figures[stage]['seconds']:6.1f} s of CPU", file=sys.stderr, flush=True)
    finally:
        shutil.rmtree(folder)
    return figures


def main(args):
    if args.run:
        return run_stage(args.run[0], Path(args.run[1]), args.codes, args.images)
    sizes = sorted(args.records)
    runs = {n: measure(n, args.codes, args.images) for n in sizes}
    heads = [f"{n:,} records" for n in sizes]
    print(f"| {args.codes} codes, {args.images} images | " + " | ".join(heads) + " | 1,000,000 |")
    print("|---" * (len(sizes) + 2) + "|")
    for stage in runs[sizes[0]]:
        cells = [f"{runs[n][stage]['megabytes']:.0f} MB, {runs[n][stage]['seconds']:.0f} s"
                 for n in sizes]
        extended = "" if len(sizes) < 2 else extend(sizes, [runs[n][stage] for n in sizes])
        print(f"| {stage} | " + " | ".join(cells) + f" | {extended} |")


def extend(sizes: list[int], figures: list[dict]) -> str:
    """The line through the two largest runs, at a million records."""
    values = []
    for name in ("megabytes", "seconds"):
        slope = (figures[-1][name] - figures[-2][name]) / (sizes[-1] - sizes[-2])
        values.append(figures[-1][name] + slope * (MILLION - sizes[-1]))
    return f"{values[0]:.0f} MB, {values[1] / 60:.0f} min"


if __name__ == "__main__":
    main(parse_args())
