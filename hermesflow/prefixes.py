"""Keys and values computed once: of texts to draw from, and of images to write about.

Shapes in comments: B images to decode, N image tokens, D hidden size; I images to write about,
R rows of text, S rows of the image with the most, H heads of width d, Q queries, P image positions,
L text positions.
"""

from collections.abc import Iterator

import torch
from transformers import DynamicCache

from hermesflow.sampling import MASKED, Generated, TextRequest, sample_tokens, uniforms
from hermesflow.showo import Showo


def rows_alike(prompts: list[list[int]], at_once: int) -> Iterator[torch.Tensor]:
    """The rows of prompts of one length, at most `at_once` together: no batch needs padding."""
    for length in sorted(set(map(len, prompts))):
        alike = torch.tensor([i for i, p in enumerate(prompts) if len(p) == length])
        yield from alike.split(at_once)


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

    def __init__(self, cache: DynamicCache, image: torch.Tensor):
        """cache: of I images; image (R,): the one that each row of text looks at."""
        self.cache = cache
        self.width = cache.get_seq_length()
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


def write_texts(net, images: torch.Tensor, requests: list[TextRequest], max_new_tokens: int,
                progress=iter) -> list[Generated]:
    """One text per request, of any network with `image_cache`, `hidden` and `text_logits`.

    Each image is computed once and shared by all its captions and answers; rows that have ended
    leave the batch. progress: wraps the steps, as tqdm does.
    """
    if not requests:
        return []
    tokens = net.tokens
    device = net.device
    prompts = [tokens.text_prompt(r.prompt) for r in requests]
    R = len(requests)
    Q = max(map(len, prompts))
    image = torch.tensor([r.image for r in requests], device=device)  # (R,)
    prefix = ImagePrefix(net.image_cache(images), image)

    # prompts are padded on the left; nobody sees the padding
    padding = torch.tensor([Q - len(p) for p in prompts], device=device)  # (R,)
    ids = torch.tensor([[tokens.pad] * (Q - len(p)) + p for p in prompts], device=device)
    column = torch.arange(Q + max_new_tokens, device=device)
    visible = column >= padding[:, None]  # (R, Q+max_new)
    causal = column[:Q] <= column[:Q, None]  # (Q, Q)
    mask = (visible[:, None, :Q] & causal)[:, None]  # (R, 1, Q, Q)
    positions = prefix.width + (column - padding[:, None]).clamp(min=0)  # (R, Q+max_new)
    cache = DynamicCache()
    hidden = net.hidden(ids, positions[:, :Q], cache, mask, images=prefix)

    draws = torch.stack([uniforms(r.seed, max_new_tokens) for r in requests]).to(device)
    top_k = torch.tensor([r.top_k for r in requests], device=device)
    temperature = torch.tensor([r.temperature for r in requests], device=device)
    texts = [[] for _ in requests]
    ended = [False] * R
    alive = torch.arange(R, device=device)  # the rows that go on
    for step in progress(range(max_new_tokens)):
        logits = net.text_logits(hidden[:, -1])  # (R, V)
        new = sample_tokens(logits, top_k[alive], temperature[alive], draws[alive, step])
        for row, token in zip(alive.tolist(), new.tolist()):
            if token == tokens.eot:
                ended[row] = True
            else:
                texts[row].append(token)
        going = new != tokens.eot
        if not going.any() or step == max_new_tokens - 1:
            break
        if not going.all():
            alive = alive[going]
            new = new[going]
            cache.batch_select_indices(going.nonzero()[:, 0])
            prefix.choose(prefix.image[going])
        end = Q + step + 1
        mask = visible[alive, None, None, :end]  # (R, 1, 1, end)
        hidden = net.hidden(new[:, None], positions[alive, end - 1 : end], cache, mask,
                            images=prefix)
    return [Generated(*text) for text in zip(texts, ended)]
