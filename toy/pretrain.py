"""Make the toy's tokenizers and its base model from scratch: the seeded recipe behind toy/base.

    python toy/pretrain.py --out runs/pretrain          # writes runs/pretrain/base

Text tokenizer: one token per word of the world.

Image tokenizer: MAGVIT-v2 as published, but small, and with its bits assigned. By itself,
lookup-free quantisation is slow to find 40 objects; told which eight bits mean which object, it
reads and draws all of them after a thousand steps. The transformer knows nothing of this: to it
they are 256 codes, as 2^13 are to Show-o.

Base model: Show-o of 1.3 M parameters, trained as the original is, on images to draw (masked
slots), captions and questions; only captions of the "train" split. After 2,000 steps it understands
much better than it draws.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from hermesflow.options import COUNT, SEED, folder, integer, stage_parser
from hermesflow.outputs import Output, exit_if_complete, finish, prepare, run_main


def parse_args(argv=None):
    parser = stage_parser(__doc__)
    add = parser.add_argument_group("output").add_argument
    add("--out", type=folder, default=Path("runs/pretrain"), help="folder for both models")
    add("--overwrite", action="store_true", help="empty OUT first")
    add("--keep", type=COUNT, nargs="+", default=[], help="also save after these steps [none]")
    add = parser.add_argument_group("training").add_argument
    add("--magvit-steps", type=COUNT, default=1200, help="of the image tokenizer")
    add("--steps", type=COUNT, default=2000, help="of the base model")
    add("--seed", type=SEED, default=0, help="of weights and data")
    add("--threads", type=integer(1, 1024), default=1,
        help="toy/base: one; more round differently")
    args = parser.parse_args(argv)
    if max(args.keep, default=0) > args.steps:
        parser.error(f"--keep {max(args.keep)} comes after the last of --steps {args.steps}")
    return args


def output_of(args) -> Output:
    """What decides both models."""
    kept = [f"step-{step}" for step in args.keep]
    return Output(args.out, "toy/pretrain", "base/config.json", args=vars(args),
                  writes=("magvitv2", "base", *kept), free=(), derived=(), inputs={},
                  code=(__file__,))


# before the heavy imports, so that --help, a mistake and a complete output are answered at once
if __name__ == "__main__":
    ARGS = parse_args()
    run_main(lambda: exit_if_complete(output_of(ARGS)))

import math

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from tqdm import tqdm
from transformers import PhiConfig, PreTrainedTokenizerFast, get_scheduler

from hermesflow.magvit import Magvit, MagvitConfig, load_magvit, save_magvit
from hermesflow.packed import Segment, answer_segment, pack
from hermesflow.pictures import to_pil
from hermesflow.records import CAPTION_QUESTION, Question, vqa_question
from hermesflow.sampling import random_mask, stable_seed
from hermesflow.showo import Showo, Tokens, image_segment
from hermesflow.training import decay_groups
from model import Model, save
from toy import world

BITS = 8
EMPTY = len(world.TYPES)  # row of an empty cell in tables by type; a grid's -1 finds it, too
MAGVIT = MagvitConfig(ch=32, bits=BITS,
                      encoder_mult=(1, 1, 1, 2, 2), encoder_blocks=(0, 1, 1, 1, 1),
                      decoder_mult=(1, 1, 1, 2, 2), decoder_blocks=(0, 1, 1, 1, 1))
PHI = dict(hidden_size=160, intermediate_size=640, num_hidden_layers=4, num_attention_heads=4,
           max_position_embeddings=512)
DRAWN, READ = 32, 16  # images to draw and to read in a step

# ----------------------------------------------------------------------------------- text tokenizer


def word_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """Lower-case words without punctuation; decoding joins them with spaces.

    Show-o's special tokens are not in it.
    """
    ids = {word: i for i, word in enumerate(["<|endoftext|>", "<|unk|>", *words])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<|unk|>"))
    tokenizer.normalizer = normalizers.Lowercase()
    word = Regex(r"\w+")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(word, behavior="removed", invert=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>",
        unk_token="<|unk|>", clean_up_tokenization_spaces=False)


# ---------------------------------------------------------------------------------- image tokenizer


def assigned_bits() -> torch.Tensor:
    """(41, 8) of ±1 per object type; empty cells last.

    Object or not, size, three bits for colour, two for shape, and their parity.
    """
    table = torch.zeros(EMPTY + 1, BITS, dtype=torch.long)
    for i, t in enumerate(world.TYPES):
        size = list(world.SIZES).index(t.size)
        color = list(world.COLORS).index(t.color) + 1
        shape = list(world.SHAPES).index(t.shape)
        bits = [1, size]
        bits += [color >> b & 1 for b in (2, 1, 0)]
        bits += [shape >> b & 1 for b in (1, 0)]
        table[i] = torch.tensor([*bits, sum(bits) % 2])
    return table * 2 - 1


def random_grids(rng, n: int, occupied: float) -> np.ndarray:
    """(n, 4, 4) grids with an object in a share of the cells."""
    grids = rng.integers(len(world.TYPES), size=(n, world.GRID, world.GRID))
    grids[rng.random(grids.shape) > occupied] = world.EMPTY
    return grids


def render(grids) -> torch.Tensor:
    """(B, 4, 4) grids -> (B, 3, 64, 64) pixels in [-1, 1]."""
    pixels = torch.from_numpy(np.stack([world.render(g) for g in grids]))  # (B, 64, 64, 3)
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def train_magvit(steps: int, seed: int, batch: int = 8, lr: float = 2e-3) -> Magvit:
    """Half dense grids, which teach fast, half sparse ones, which look like the scenes."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    table = assigned_bits().float()
    vq = Magvit(MAGVIT)
    optimizer = torch.optim.AdamW(vq.parameters(), lr, betas=(0.9, 0.95), weight_decay=0.01)
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
        wrong_bits = F.softplus(-vq.encoder(pixels) * bits).mean()
        error = vq.decoder(bits) - pixels
        loss = wrong_bits + ((error.abs() + error**2) * weight).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vq.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    return vq.eval()


@torch.inference_mode()
def reconstruction(vq: Magvit, n: int = 512) -> tuple[float, float, float]:
    """How well held-out scenes survive encoding and decoding.

    Shares of object cells and of all cells that the oracle reads right, and the share of cells
    whose code is the assigned one.
    """
    rng = np.random.default_rng(0)
    captions = world.captions("validation")
    grids = np.stack([world.scene(captions[i % len(captions)], rng) for i in range(n)])
    codes = torch.cat([vq.encode(render(part)) for part in np.array_split(grids, 8)])
    pixels = torch.cat([vq.decode(part) for part in codes.chunk(8)])
    right = np.stack([world.read(picture) for picture in to_pil(pixels)]) == grids
    assigned = (codes == scene_codes(grids)).float().mean().item()
    return right[grids != world.EMPTY].mean(), right.mean(), assigned


# --------------------------------------------------------------------------------------- base model


def scene_codes(grids) -> torch.Tensor:
    """(B, 4, 4) grids -> (B, 16) codes, those that the image tokenizer gives."""
    powers = 2 ** torch.arange(BITS - 1, -1, -1)
    codes = ((assigned_bits() > 0) * powers).sum(1)  # (41,)
    return codes[torch.as_tensor(grids)].flatten(1)


def new_net(tokenizer) -> Showo:
    """Random weights, except that codes which share bits begin alike."""
    text = len(tokenizer)
    codes = 2**BITS
    size = text + len(Tokens.SPECIAL) + codes + 1
    config = dict(vocab_size=size, llm_vocab_size=text, codebook_size=codes,
                  num_vq_tokens=world.GRID**2, mask_token_id=size - 1,
                  llm_model_path="phi_config.json", load_from_showo=True, w_clip_vit=False)
    net = Showo(config, PhiConfig(**PHI), Tokens(tokenizer, codes, world.GRID**2))
    bits = Magvit(MAGVIT).quantize.embedding  # (C, bits) of ±1
    rows = slice(net.tokens.first_code, net.tokens.mask)
    with torch.no_grad():
        for weight in (net.showo.model.embed_tokens.weight, net.showo.lm_head.weight):
            weight[rows] = bits @ torch.randn(BITS, weight.shape[1]) * 0.02
    return net


def drawing_row(tokens, caption: str, codes: list[int], seed: int, rng) -> list[Segment]:
    """A text, and behind it its image with some slots masked."""
    text = "" if rng.random() < 0.1 else caption  # the empty text is what guidance needs
    image = image_segment(tokens, codes, random_mask(len(codes), seed).tolist())
    return [Segment(tokens.t2i_prompt(text)), image]


def reading_row(tokens, caption: str, codes: list[int], rng) -> list[Segment]:
    """An image, and behind it its caption, two yes/no questions and three others.

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
    row = [Segment(tokens.mmu_prompt(codes), bidirectional=True)]
    for question, answer in pairs:
        ids = [*tokens.encode(answer), tokens.eot]
        row.append(answer_segment(tokens.text_prompt(question), ids))
    return row


def train_base(model: Model, steps: int, seed: int, keep: list[int], out: Path) -> None:
    """AdamW with warm-up and cosine decay; 32 images to draw and 16 to read per step."""
    net = model.net
    tokens = model.tokens
    captions = world.captions("train")
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(decay_groups(net, 0.05), lr=2e-3, betas=(0.9, 0.98))
    floor = 0.03

    def share(step):
        decay = (1 + math.cos(math.pi * step / steps)) / 2
        return min(1, (step + 1) / 150) * (floor + (1 - floor) * decay)

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    net.train()
    for step in (bar := tqdm(range(steps), desc="base model")):
        texts = [captions[i] for i in rng.integers(len(captions), size=DRAWN + READ)]
        codes = scene_codes(np.stack([world.scene(t, rng) for t in texts])).tolist()
        drawing = []
        for i in range(DRAWN):
            mask_seed = stable_seed(seed, step, i)
            drawing.append(drawing_row(tokens, texts[i], codes[i], mask_seed, rng))
        reading = []
        for i in range(DRAWN, DRAWN + READ):
            reading.append(reading_row(tokens, texts[i], codes[i], rng))

        results = net(pack(drawing, tokens.pad), pack(reading, tokens.pad))
        # per masked slot, per answer token
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
    vq_folder = args.out / "magvitv2"
    if not vq_folder.exists():  # an interrupted run keeps its image tokenizer
        save_magvit(train_magvit(args.magvit_steps, args.seed), vq_folder)
    vq = load_magvit(vq_folder)
    objects, cells, codes = reconstruction(vq)
    print(f"object cells right {objects:.4f}, all cells right {cells:.4f}, "
          f"codes as assigned {codes:.4f}")
    torch.manual_seed(args.seed)
    model = Model(new_net(word_tokenizer(world.vocabulary())), vq)
    train_base(model, args.steps, args.seed, args.keep, args.out)
    save(model, args.out / "base")
    finish(output)
    parameters = sum(p.numel() for p in model.net.parameters())
    print(f"{parameters / 1e6:.2f} M parameters: {args.out / 'base'}")


if __name__ == "__main__":
    run_main(lambda: main(ARGS))
