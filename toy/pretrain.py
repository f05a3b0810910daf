"""Make a base model of the toy from scratch: the seeded recipe behind toy/base and toy/base-janus.

    python toy/pretrain.py --out runs/pretrain                    # writes runs/pretrain/base
    python toy/pretrain.py --backbone janus --out runs/janus      # writes runs/janus/base

Text tokenizer: one token per word of the world.

Image tokenizer: the backbone's own, but small, and with its bits assigned. By itself, quantisation
is slow to find 40 objects; told which eight signs mean which object, it reads and draws all of them
after a thousand steps. The transformer knows nothing of this: to it they are 256 codes, as 2^13 are
to Show-o.

Base model: Show-o or Janus of 1.3 or 1.6 M parameters, trained as the original is, on images to
draw, captions and questions; only captions of the "train" split. In the end it understands much
better than it draws.

Sizes and tokenizers: toy/new_showo.py, toy/new_janus.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from hermesflow.options import COUNT, SEED, folder, integer, stage_parser
from hermesflow.outputs import Output, exit_if_complete, finish, prepare, run_main

TOKENIZER_STEPS = {"showo": 1200, "janus": 2000}
STEPS = {"showo": 2000, "janus": 1200}


def parse_args(argv=None):
    parser = stage_parser(__doc__)
    add = parser.add_argument_group("output").add_argument
    add("--out", type=folder, default=Path("runs/pretrain"), help="folder for OUT/base")
    add("--overwrite", action="store_true", help="empty OUT first")
    add("--backbone", choices=STEPS, default="showo", help="network of the base")
    add("--keep", type=COUNT, nargs="+", default=[], help="also save after these steps [none]")
    add = parser.add_argument_group("training").add_argument
    add("--tokenizer-steps", type=COUNT, help=f"of the image tokenizer {TOKENIZER_STEPS}")
    add("--steps", type=COUNT, help=f"of the base model {STEPS}")
    add("--seed", type=SEED, default=0, help="of weights and data")
    add("--threads", type=integer(1, 1024), default=1,
        help="toy's bases: one; more round differently")
    args = parser.parse_args(argv)
    args.tokenizer_steps = args.tokenizer_steps or TOKENIZER_STEPS[args.backbone]
    args.steps = args.steps or STEPS[args.backbone]
    if max(args.keep, default=0) > args.steps:
        parser.error(f"--keep {max(args.keep)} comes after the last of --steps {args.steps}")
    return args


def output_of(args) -> Output:
    """What decides the model."""
    kept = [f"step-{step}" for step in args.keep]
    return Output(args.out, "toy/pretrain", "base/config.json", args=vars(args),
                  writes=("base", *kept), free=(), derived=(), inputs={},
                  code=tuple(map(str, sorted(Path(__file__).parent.glob("*.py")))))


# before the heavy imports, so that --help, a mistake and a complete output are answered at once
if __name__ == "__main__":
    ARGS = parse_args()
    run_main(lambda: exit_if_complete(output_of(ARGS)))

import math
from importlib import import_module

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import get_scheduler

from hermesflow.packed import ImageBatch, Segment, answer_segment
from hermesflow.pictures import to_pil
from hermesflow.records import CAPTION_QUESTION, Question, vqa_question
from hermesflow.sampling import stable_seed
from hermesflow.training import decay_groups
from model import save
from toy import world
from toy.alphabet import assigned_bits, render, scene_codes

READ = 16  # images to read in a step

# ---------------------------------------------------------------------------------- image tokenizer


def random_grids(rng, n: int, occupied: float) -> np.ndarray:
    """(n, 4, 4) grids with an object in a share of the cells."""
    grids = rng.integers(len(world.TYPES), size=(n, world.GRID, world.GRID))
    grids[rng.random(grids.shape) > occupied] = world.EMPTY
    return grids


def train_tokenizer(new, steps: int, seed: int, batch: int = 8):
    """Half dense grids, which teach fast, half sparse ones, which look like the scenes.

    new: toy/new_showo.py or toy/new_janus.py.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    table = assigned_bits().float()
    vq = new.image_tokenizer()
    optimizer = torch.optim.AdamW(vq.parameters(), new.TOKENIZER_LR, betas=(0.9, 0.95),
                                  weight_decay=0.01)
    scheduler = get_scheduler("cosine", optimizer, 50, steps)
    for _ in (bar := tqdm(range(steps), desc="image tokenizer")):
        dense = random_grids(rng, batch // 2, 0.8)
        sparse = random_grids(rng, batch // 2, 0.15)
        grids = np.concatenate([dense, sparse])  # (B, 4, 4)
        pixels = render(grids)  # (B, 3, 64, 64)
        bits = table[torch.from_numpy(grids)].permute(0, 3, 1, 2)  # (B, bits, 4, 4)
        # pixels of objects count four times
        objects = np.kron(grids != world.EMPTY, np.ones((world.CELL, world.CELL)))  # (B, 64, 64)
        weight = 1 + 3 * torch.from_numpy(objects).float()[:, None]  # (B, 1, 64, 64)
        wrong_bits = F.softplus(-new.signs(vq, pixels) * bits).mean()
        error = new.picture(vq, bits) - pixels
        loss = wrong_bits + ((error.abs() + error**2) * weight).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vq.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    return vq.eval()


@torch.inference_mode()
def reconstruction(model, n: int = 512) -> tuple[float, float, float]:
    """How well held-out scenes survive encoding and decoding.

    Shares of object cells and of all cells that the oracle reads right, and the share of cells
    whose code is the assigned one.
    """
    rng = np.random.default_rng(0)
    captions = world.captions("validation")
    grids = np.stack([world.scene(captions[i % len(captions)], rng) for i in range(n)])
    codes = model.encode_image(render(grids))
    pixels = model.decode_image(codes)
    right = np.stack([world.read(picture) for picture in to_pil(pixels)]) == grids
    assigned = (codes == scene_codes(grids)).float().mean().item()
    return right[grids != world.EMPTY].mean(), right.mean(), assigned


# --------------------------------------------------------------------------------------- base model


def answers_about(tokens, caption: str, rng) -> list[Segment]:
    """A scene's caption, three questions and two that are answered by yes or no, with answers.

    "Is there a …?" is what the model learns last: every image asks two of them, about other objects
    each time.
    """
    questions = [Question(**q) for q in world.questions(caption, rng.integers(2**31))]
    yes_no = [q for q in questions if q.answer in ("yes", "no")]
    others = [q for q in questions if q not in yes_no]
    pairs = [(CAPTION_QUESTION, caption)]
    for some, count in ((others, 3), (yes_no, 2)):
        for i in rng.choice(len(some), count, replace=False):
            pairs.append((vqa_question(some[i]), some[i].answer))
    segments = []
    for question, answer in pairs:
        ids = [*tokens.encode(answer), tokens.eot]
        segments.append(answer_segment(tokens.text_prompt(question), ids))
    return segments


def train_base(new, model, steps: int, seed: int, keep: list[int], out: Path) -> None:
    """AdamW with warm-up and cosine decay; new.DRAWN images to draw and 16 to read per step."""
    net = model.net
    captions = world.captions("train")
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(decay_groups(net, 0.05), lr=new.LR, betas=(0.9, 0.98))
    floor = 0.03

    def share(step):
        decay = (1 + math.cos(math.pi * step / steps)) / 2
        return min(1, (step + 1) / 150) * (floor + (1 - floor) * decay)

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    net.train()
    for step in (bar := tqdm(range(steps), desc="base model")):
        texts = [captions[i] for i in rng.integers(len(captions), size=new.DRAWN + READ)]
        grids = np.stack([world.scene(t, rng) for t in texts])  # (B, 4, 4)
        # the empty text is what guidance needs
        prompts = ["" if rng.random() < 0.1 else text for text in texts[:new.DRAWN]]
        masks = model.training_masks([stable_seed(seed, step, i) for i in range(new.DRAWN)])
        images = scene_codes(grids[:new.DRAWN])[:, None]  # (B, 1, N)
        drawing = ImageBatch(prompts, images, masks, texts=texts[:new.DRAWN])
        answers = [answers_about(model.tokens, text, rng) for text in texts[new.DRAWN:]]
        reading = new.reading_pack(model, grids[new.DRAWN:], answers)

        results = net(model.pack_images(drawing), reading)
        # per code that is drawn, per answer token
        losses = [-sums.sum() / counts.sum() for sums, counts in results]
        optimizer.zero_grad()
        sum(losses).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        bar.set_postfix(draw=f"{losses[0].item():.3f}", read=f"{losses[1].item():.3f}")
        if step + 1 in keep:
            save(model, out / f"step-{step + 1}")


# --------------------------------------------------------------------------------------------- main


def main(args):
    output = output_of(args)
    prepare(output)
    torch.set_num_threads(args.threads)
    new = import_module(f"toy.new_{args.backbone}")
    vq = train_tokenizer(new, args.tokenizer_steps, args.seed)
    torch.manual_seed(args.seed)
    model = new.new_model(vq)
    objects, cells, codes = reconstruction(model)
    print(f"object cells right {objects:.4f}, all cells right {cells:.4f}, "
          f"codes as assigned {codes:.4f}")
    train_base(new, model, args.steps, args.seed, args.keep, args.out)
    save(model, args.out / "base")
    finish(output)
    parameters = sum(p.numel() for p in model.net.parameters())
    print(f"{parameters / 1e6:.2f} M parameters: {args.out / 'base'}")


if __name__ == "__main__":
    run_main(lambda: main(ARGS))
