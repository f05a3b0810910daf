"""Keys and values computed once: of texts to draw from, and of images to write about.

Shapes in comments: B images to decode, N image tokens, D hidden size; I images to write about,
R rows of text, S rows of the image with the most, H heads of width d, Q queries, P image positions,
L text positions.
"""

import torch
from transformers import DynamicCache

from hermesflow.sampling import MASKED
from hermesflow.showo import Showo


class TextPrefix:
    """Keys and values of t2i prompts; the image block is run against them step after step.

    Text never sees the image, so its keys and values are the same in all decoding steps. Prompts of
    one batch have equal length, so there is neither padding nor a mask.
    """

    def __init__(self, net: Showo, prompts: list[list[int]]):
        unique = sorted(set(map(tuple, prompts)))
        ids = torch.tensor(unique, device=net.device)
        self.net = net
        rows = [unique.index(tuple(p)) for p in prompts]
        self.row = torch.tensor(rows, device=net.device)  # (B,)
        self.unique = len(unique)
        self.one_per_prompt = True
        self.cache = DynamicCache()
        length = ids.shape[1]
        positions = torch.arange(length + net.tokens.image_tokens + 2, device=net.device)[None]
        self.positions = positions[:, length:]
        net.hidden(ids, positions[:, :length], self.cache, is_causal=True)

    def hidden(self, block: torch.Tensor, alike: bool) -> torch.Tensor:
        """(B, N+2) image blocks -> (B, N, D) at the image slots.

        Where all blocks are alike, as they are in the first step, one per prompt is enough.
        """
        if self.one_per_prompt and not alike:
            self.cache.batch_select_indices(self.row)
            self.one_per_prompt = False
        rows = block[: self.unique] if alike else block
        hidden = self.net.hidden(rows, self.positions, self.cache)[:, 1:-1]
        self.cache.crop(-block.shape[1])  # forget the image block again
        return hidden[self.row] if alike else hidden


class GuidedLogits:
    """Logits of the masked slots behind t2i prompts of one length, for `maskgit_decode`.

    Guidance is applied to hidden states: the head is linear, so this is guidance on logits with one
    head.
    """

    def __init__(self, net: Showo, prompts: list[list[int]], guided: bool):
        self.net = net
        self.cond = TextPrefix(net, prompts)
        self.uncond = None
        if guided:
            self.uncond = TextPrefix(net, [net.tokens.t2i_prompt("")] * len(prompts))

    def __call__(self, codes: torch.Tensor, guidance_scale: float) -> torch.Tensor:
        """(B, N) codes, MASKED where unknown -> (M, C) logits at the M masked slots."""
        tokens = self.net.tokens
        masked = codes == MASKED  # (B, N)
        slots = torch.where(masked, tokens.mask, tokens.first_code + codes)
        soi = torch.full_like(slots[:, :1], tokens.soi)
        eoi = torch.full_like(slots[:, :1], tokens.eoi)
        block = torch.cat([soi, slots, eoi], 1)  # (B, N+2)
        alike = bool(masked.all())
        hidden = self.cond.hidden(block, alike)  # (B, N, D)
        if guidance_scale:
            hidden = hidden + guidance_scale * (hidden - self.uncond.hidden(block, alike))
        return self.net.code_logits(hidden[masked])


class ImagePrefix:
    """Keys and values of images. Any number of texts look at each of them, and none gets a copy."""

    def __init__(self, net: Showo, codes: torch.Tensor, image: torch.Tensor):
        """codes (I, N); image (R,): the one that each row of text looks at."""
        prompts = [net.tokens.mmu_prompt(c) for c in codes.tolist()]
        ids = torch.tensor(prompts, device=net.device)  # (I, P)
        self.cache = DynamicCache()
        self.width = ids.shape[1]
        positions = torch.arange(self.width, device=net.device)[None]
        net.hidden(ids, positions, self.cache)  # an image sees itself whole
        self.choose(image)

    def choose(self, image: torch.Tensor) -> None:
        """Which image each row looks at, and the row's number among those of its image."""
        same = image[:, None] == image  # (R, R)
        self.image = image
        self.rank = same.tril(-1).sum(1)
        self.most = int(self.rank.max()) + 1

    def attend(self, layer: int, query, key, value, mask, scaling: float) -> torch.Tensor:
        """Attention to image and own text.

        query (R, H, Q, d), key and value (R, H, L, d), mask (R, 1, Q, L) -> (R, Q, H, d).
        """
        image_key = self.cache.layers[layer].keys  # (I, H, P, d)
        image_value = self.cache.layers[layer].values
        Q = query.shape[2]
        far = self.by_row(self.by_image(query) @ image_key.mT, Q)  # (R, H, Q, P)
        near = (query @ key.mT).masked_fill(~mask, -torch.inf)  # (R, H, Q, L)
        logits = torch.cat([far, near], -1).float() * scaling
        weights = logits.softmax(-1).to(value.dtype)
        far, near = weights.split([self.width, key.shape[2]], -1)
        out = self.by_row(self.by_image(far) @ image_value, Q) + near @ value  # (R, H, Q, d)
        return out.transpose(1, 2)

    def by_image(self, x: torch.Tensor) -> torch.Tensor:
        """(R, H, Q, d) -> (I, H, S·Q, d): all rows of an image side by side."""
        images = len(self.cache.layers[0].keys)
        out = x.new_zeros(images, self.most, *x.shape[1:])  # (I, S, H, Q, d)
        out[self.image, self.rank] = x
        return out.transpose(1, 2).flatten(2, 3)

    def by_row(self, x: torch.Tensor, Q: int) -> torch.Tensor:
        """(I, H, S·Q, d) -> (R, H, Q, d)."""
        return x.unflatten(2, (-1, Q)).transpose(1, 2)[self.image, self.rank]
