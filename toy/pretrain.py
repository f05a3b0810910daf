"""Make the toy's tokenizers and its base model from scratch: the seeded recipe behind toy/base.

    python toy/pretrain.py --out runs/pretrain          # writes runs/pretrain/base; toy/base was made so

Text tokenizer: one token per word of the world.

Image tokenizer: MAGVIT-v2 as published, but small, and with its bits assigned. Left to itself, lookup-free quantisation
is slow to find 40 objects; told which eight bits mean which object, it reads and draws all of them after a thousand
steps. The transformer knows nothing of this: to it they are 256 codes, as 2^13 are to Show-o.

Base model: Show-o of 1.3 M parameters, trained as the original is, on images to draw (masked slots), captions and
questions; only captions of the "train" split. After 3,000 steps it understands much better than it draws.
"""

import argparse
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from tqdm import tqdm
from transformers import PhiConfig, PreTrainedTokenizerFast, get_scheduler

sys.path.insert(0, str(Path(__file__).parent.parent))
from model import (CAPTION_QUESTION, Magvit, MagvitConfig, Question, Segment, Showo, Tokens,  # noqa: E402
                   answer_segment, decay_groups, image_segment, load_magvit, pack, random_mask, run, save, save_magvit,
                   seed_of, to_pil, vqa_question)
from toy import world  # noqa: E402

BITS = 8
EMPTY = len(world.TYPES)  # row of an empty cell in tables by type; a grid's -1 finds it, too
MAGVIT = MagvitConfig(ch=32, bits=BITS, encoder_mult=(1, 1, 1, 2, 2), encoder_blocks=(0, 1, 1, 1, 1),
                      decoder_mult=(1, 1, 1, 2, 2), decoder_blocks=(0, 1, 1, 1, 1))
PHI = dict(hidden_size=160, intermediate_size=640, num_hidden_layers=4, num_attention_heads=4,
           max_position_embeddings=512)


# ---------------------------------------------------------------------------------------------------- text tokenizer


def word_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """Lower-case words without punctuation; decoding joins them with spaces. Show-o's special tokens are not in it."""
    ids = {word: i for i, word in enumerate(["<|endoftext|>", "<|unk|>", *words])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<|unk|>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+"), behavior="removed", invert=True)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>",
                                   unk_token="<|unk|>", clean_up_tokenization_spaces=False)


# --------------------------------------------------------------------------------------------------- image tokenizer


def assigned_bits() -> torch.Tensor:
    """(41, 8) of ±1: object or not, size, three for colour, two for shape, and their parity; empty cells last."""
    table = torch.zeros(EMPTY + 1, BITS, dtype=torch.long)
    for i, t in enumerate(world.TYPES):
        size, color, shape = (list(names).index(name) for names, name in
                              zip((world.SIZES, world.COLORS, world.SHAPES), t))
        bits = [1, size, *(color + 1 >> b & 1 for b in (2, 1, 0)), *(shape >> b & 1 for b in (1, 0))]
        table[i] = torch.tensor([*bits, sum(bits) % 2])
    return table * 2 - 1


def random_grids(rng, n: int, occupied: float) -> np.ndarray:
    """(n, 4, 4) grids with an object in a share of the cells."""
    grids = rng.integers(len(world.TYPES), size=(n, world.GRID, world.GRID))
    grids[rng.random(grids.shape) > occupied] = world.EMPTY
    return grids


def render(grids) -> torch.Tensor:
    """(B, 4, 4) grids -> (B, 3, 64, 64) pixels in [-1, 1]."""
    return torch.from_numpy(np.stack([world.render(g) for g in grids])).permute(0, 3, 1, 2).float() / 127.5 - 1


def train_magvit(steps: int, seed: int, batch: int = 8, lr: float = 2e-3) -> Magvit:
    """Half dense grids, from which one learns fast, half sparse ones, which look like the scenes."""
    torch.manual_seed(seed)
    rng, table, vq = np.random.default_rng(seed), assigned_bits().float(), Magvit(MAGVIT)
    optimizer = torch.optim.AdamW(vq.parameters(), lr, betas=(0.9, 0.95), weight_decay=0.01)
    scheduler = get_scheduler("cosine", optimizer, 50, steps)
    for _ in (bar := tqdm(range(steps), desc="image tokenizer")):
        grids = np.concatenate([random_grids(rng, batch // 2, 0.8), random_grids(rng, batch // 2, 0.15)])
        pixels, bits = render(grids), table[torch.from_numpy(grids)].permute(0, 3, 1, 2)  # (B, bits, 4, 4)
        objects = np.kron(grids != world.EMPTY, np.ones((world.CELL, world.CELL)))  # (B, 64, 64)
        weight = 1 + 3 * torch.from_numpy(objects).float()[:, None]
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
    """Of held-out scenes: shares of object cells and of all cells that the oracle reads right after encoding and
    decoding, and the share of cells whose code is the assigned one."""
    rng, captions = np.random.default_rng(0), world.captions("eval")
    grids = np.stack([world.scene(captions[i % len(captions)], rng) for i in range(n)])
    codes = torch.cat([vq.encode(render(part)) for part in np.array_split(grids, 8)])
    pixels = torch.cat([vq.decode(part) for part in codes.chunk(8)])
    right = np.stack([world.read(picture) for picture in to_pil(pixels)]) == grids
    return right[grids != world.EMPTY].mean(), right.mean(), (codes == scene_codes(grids)).float().mean().item()


# -------------------------------------------------------------------------------------------------------- base model


def scene_codes(grids) -> torch.Tensor:
    """(B, 4, 4) grids -> (B, 16) codes, those that the image tokenizer gives."""
    powers = 2 ** torch.arange(BITS - 1, -1, -1)
    return ((assigned_bits() > 0) * powers).sum(1)[torch.as_tensor(grids)].flatten(1)


def new_model(tokenizer) -> Showo:
    """Random weights, except that codes which share bits begin alike."""
    text, codes = len(tokenizer), 2**BITS
    size = text + len(Tokens.SPECIAL) + codes + 1
    config = dict(vocab_size=size, llm_vocab_size=text, codebook_size=codes, num_vq_tokens=world.GRID**2,
                  mask_token_id=size - 1, llm_model_path="phi_config.json", load_from_showo=True, w_clip_vit=False)
    model = Showo(config, PhiConfig(**PHI), Tokens(tokenizer, codes, world.GRID**2))
    bits = Magvit(MAGVIT).quantize.embedding  # (C, bits) of ±1
    rows = slice(model.tokens.first_code, model.tokens.mask)
    with torch.no_grad():
        for weight in (model.showo.model.embed_tokens.weight, model.showo.lm_head.weight):
            weight[rows] = bits @ torch.randn(BITS, weight.shape[1]) * 0.02
    return model


def drawing_row(tokens, caption: str, codes: list[int], seed: int, rng) -> list[Segment]:
    text = "" if rng.random() < 0.1 else caption  # the empty text is what guidance needs
    return [Segment(tokens.draw(text)), image_segment(tokens, codes, random_mask(len(codes), seed))]


def reading_row(tokens, caption: str, codes: list[int], rng) -> list[Segment]:
    """The image; behind it its caption and three of its questions."""
    questions = world.questions(caption)
    asked = [questions[i] for i in rng.choice(len(questions), 3, replace=False)]
    pairs = [(CAPTION_QUESTION, caption), *((vqa_question(Question(**q)), q["answer"]) for q in asked)]
    answers = [answer_segment(tokens.ask(q), [*tokens.encode(a), tokens.eot]) for q, a in pairs]
    return [Segment(tokens.look(codes), bidirectional=True), *answers]


def train_base(model: Showo, vq: Magvit, args) -> None:
    """AdamW with cosine decay; 64 images to draw and 16 to read per step."""
    captions, rng = world.captions("train"), np.random.default_rng(args.seed)
    optimizer = torch.optim.AdamW(decay_groups(model, 0.05), lr=2e-3, betas=(0.9, 0.98))
    floor = 0.03
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1, (s + 1) / 150) * (
        floor + (1 - floor) * (1 + math.cos(math.pi * s / args.steps)) / 2))
    model.train()
    for step in (bar := tqdm(range(args.steps), desc="base model")):
        texts = [captions[i] for i in rng.integers(len(captions), size=64 + 16)]
        codes = scene_codes(np.stack([world.scene(t, rng) for t in texts])).tolist()
        drawing = [drawing_row(model.tokens, t, c, seed_of(args.seed, step, i), rng)
                   for i, (t, c) in enumerate(zip(texts[:64], codes))]
        reading = [reading_row(model.tokens, t, c, rng) for t, c in zip(texts[64:], codes[64:])]
        with torch.autocast("cpu", torch.bfloat16):
            results = model(*(pack(rows, model.tokens.pad) for rows in (drawing, reading)))
        losses = [-sums.sum() / counts.sum() for sums, counts in results]  # per masked slot, per answer token
        optimizer.zero_grad()
        sum(losses).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        bar.set_postfix(draw=f"{losses[0].item():.3f}", read=f"{losses[1].item():.3f}")
        if step + 1 in args.keep:
            save(model, vq, args.out / f"step-{step + 1}")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/pretrain"))
    parser.add_argument("--magvit-steps", type=int, default=1200)
    parser.add_argument("--steps", type=int, default=3000, help="of the base model")
    parser.add_argument("--keep", type=int, nargs="*", default=[], help="also save after these steps, to choose a base")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="toy/base was made with one; more round differently")
    return parser.parse_args()


def main():
    args = parse_args()
    torch.set_num_threads(args.threads)
    folder = args.out / "magvitv2"
    if not folder.exists():  # an interrupted run keeps its image tokenizer
        save_magvit(train_magvit(args.magvit_steps, args.seed), folder)
    vq = load_magvit(folder)
    print("object cells right {:.4f}, all cells right {:.4f}, codes as assigned {:.4f}".format(*reconstruction(vq)))
    torch.manual_seed(args.seed)
    model = new_model(word_tokenizer(world.vocabulary()))
    train_base(model, vq, args)
    save(model, vq, args.out / "base")
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters: {args.out / 'base'}")


if __name__ == "__main__":
    run(main)
