"""What the paper's run costs, counted and not measured: hours, memory and disk by card.

    python bench/cost.py                         # 5,000 records, three rounds
    python bench/cost.py --records 1000 --training-steps 600

Work is counted at 512 px by torch's FlopCounterMode (bench.py, memory.py). Hours assume that
sampling, scoring and evaluation reach the share --drawing of a card's dense peak, training the
share --training, and eight cards eight times that. Not counted: the judge of evaluation, loading,
and decoding texts, which waits for memory (minutes a round).
"""

import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from hermesflow.options import COUNT, SHARE, stage_parser


class Card(NamedTuple):
    name: str
    gigabytes: int
    bf16: float  # dense peak in TFLOP/s, summed in float32
    tf32: float  # of the image tokenizer, which stays float32
    lora: bool  # training needs adapters, or other cards to share the weights with


CARDS = (Card("RTX 4090", 24, 165, 82.6, True), Card("A100", 80, 312, 156, False),
         Card("H100", 80, 989, 494, False), Card("H200", 141, 989, 494, False))

# TFLOP of the 1.448 B model at 512 px
IMAGES = 4240  # sixteen of one text, 50 guided steps
CAPTIONS = 5.0  # ten of one image
ANSWERS = 4.0  # ten about one image
PREFIX = 2.6  # an image in front of a single caption
ENCODE = 1.42  # the image tokenizer: pixels to codes
DECODE = 1.21  # and back
REFERENCE = 8.9  # log-probs of one pair
TRAIN = {False: 33.2, True: 28.0}  # of one pair, checkpointed; True: of adapters alone

# GB
WEIGHTS = 5.8  # float32
CHECKPOINT = WEIGHTS + 0.4  # with the image tokenizer
ADAPTERS = 14.2e6 * 4 / 1e9  # rank 16, float32
FROZEN = 3.2  # under LoRA: bfloat16, and embeddings in float32
ACTIVATIONS = 3.1  # bf16, micro-batch 4, checkpointed
RECORD = 87e-6  # of samples and pairs: 20 images of 1,024 codes in int32, captions
DOWNLOADS = 5.8 + 0.4 + 1.3 + 0.4 + 16.6  # Show-o, MAGVIT-v2, bert-large, mpnet, the judge


def parse_args(argv=None):
    parser = stage_parser(__doc__)
    add = parser.add_argument
    add("--records", type=COUNT, default=5000, help="sampled, scored and trained on in a round")
    add("--held-out", type=COUNT, default=1000, help="evaluated before and after every round")
    add("--rounds", type=COUNT, default=3, help="of self-play")
    add("--training-steps", type=COUNT, default=3000, help="of a round, of 32 records")
    add("--drawing", type=SHARE, default=0.4, help="share of the peak in stages 1, 2 and 4")
    add("--training", type=SHARE, default=0.3, help="share of the peak in stage 3")
    return parser.parse_args(argv)


def work(records: int, held_out: int, rounds: int, steps: int, lora: bool) -> dict[str, tuple]:
    """TFLOP of all rounds by stage: of the backbone, and of the image tokenizer."""
    visits = 32 * steps
    evaluations = held_out * (rounds + 1)
    return {
        "01": (rounds * records * (IMAGES + CAPTIONS), rounds * records * ENCODE),
        "02": (rounds * records * 16 * ANSWERS, rounds * records * 16 * (DECODE + ENCODE)),
        "03": (rounds * visits * (REFERENCE + TRAIN[lora]), 0.0),
        "04": (evaluations * (IMAGES / 16 + PREFIX + ANSWERS), evaluations * (ENCODE + DECODE)),
    }


def hours(tflop: dict[str, tuple], card: Card, cards: int, drawing: float,
          training: float) -> dict[str, float]:
    """By stage."""
    found = {}
    for stage, (backbone, tokenizer) in tflop.items():
        share = training if stage == "03" else drawing
        seconds = backbone / card.bf16 + tokenizer / card.tf32
        found[stage] = seconds / share / cards / 3600
    return found


def training_memory(lora: bool, sharded_over: int = 1) -> float:
    """GB of a card: weights, gradients and two moments in float32; and activations."""
    trained = ADAPTERS if lora else WEIGHTS
    frozen = FROZEN if lora else 0.0
    return (4 * trained) / sharded_over + frozen + ACTIVATIONS


def disk(records: int, rounds: int, lora: bool) -> tuple[float, float]:
    """GB that stay, and that are needed while a training state is replaced."""
    stays = rounds * (CHECKPOINT + records * RECORD)
    state = 2 * 3 * (ADAPTERS if lora else WEIGHTS)
    return stays, stays + state


def main(args):
    print("Counted, not measured.\n")
    print("| cards | 01 | 02 | 03 | 04 | hours | GB of a card in 03 | GB of disk | at most |")
    print("|---" * 9 + "|")
    for card in CARDS:
        tflop = work(args.records, args.held_out, args.rounds, args.training_steps, card.lora)
        stays, most = disk(args.records, args.rounds, card.lora)
        for cards in (1, 8):
            found = hours(tflop, card, cards, args.drawing, args.training)
            cells = [f"{h:.1f}" for h in (*found.values(), sum(found.values()))]
            name = f"{cards} × {card.name}, {card.gigabytes} GB{', LoRA' * card.lora}"
            print(f"| {name} | {' | '.join(cells)} | {training_memory(card.lora):.0f} | "
                  f"{stays:.0f} | {most:.0f} |")
    print(f"\nDownloads: {DOWNLOADS:.0f} GB. Sharded over 8 cards, training without LoRA takes "
          f"{training_memory(False, 8):.0f} GB of each.")


if __name__ == "__main__":
    main(parse_args())
