"""What the toy's bases are made of, whatever their network: words, and codes of image cells.

B images, C image codes.
"""

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from toy import world

BITS = 8  # of an image code
EMPTY = len(world.TYPES)  # row of an empty cell in tables by type; a grid's -1 finds it, too


def word_tokenizer(words: list[str]) -> Tokenizer:
    """Lower-case words without punctuation, and `<|unk|>`; decoding joins them with spaces."""
    ids = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<|unk|>"))
    tokenizer.normalizer = normalizers.Lowercase()
    word = Regex(r"\w+")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(word, behavior="removed", invert=True)
    return tokenizer


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


def scene_codes(grids) -> torch.Tensor:
    """(B, 4, 4) grids -> (B, 16) codes, those that the image tokenizer gives."""
    powers = 2 ** torch.arange(BITS - 1, -1, -1)
    codes = ((assigned_bits() > 0) * powers).sum(1)  # (41,)
    return codes[torch.as_tensor(grids)].flatten(1)


def code_bits() -> torch.Tensor:
    """(C, bits) of ±1, of every code."""
    codes = torch.arange(2**BITS)[:, None]
    return (codes >> torch.arange(BITS - 1, -1, -1) & 1).float() * 2 - 1


def render(grids) -> torch.Tensor:
    """(B, 4, 4) grids -> (B, 3, 64, 64) pixels in [-1, 1]."""
    pixels = torch.from_numpy(np.stack([world.render(g) for g in grids]))  # (B, 64, 64, 3)
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
