"""Seeded draws and the two decoding rules: MaskGIT for images, top-k for text. Knows no network.

Shapes in comments: B rows, N image tokens, M masked slots, C image codes, V vocabulary, R rows of
text.
"""

import hashlib
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from hermesflow.files import InputError
from hermesflow.options import ImageSampling

MASKED = -1  # among image codes: a slot that is not decoded yet


# -------------------------------------------------------------------------------------------- seeds


def stable_seed(*parts) -> int:
    """A 63-bit seed from (seed, round, id, sample, …), the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def uniforms(seed: int, *shape) -> torch.Tensor:
    """float32 numbers in (0, 1) from the seed alone, drawn on the CPU so that devices agree."""
    draws = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    return draws.clamp(1e-7, 1 - 1e-7)


def random_mask(n: int, seed: int) -> torch.Tensor:
    """Mask of a training image, (N,) bool: t ~ U(0, 1), round(N·cos(πt/2)) slots, at least one."""
    draws = uniforms(seed, n + 1)
    count = max(1, round(n * math.cos(math.pi / 2 * draws[0].item())))
    return draws[1:].argsort().argsort() < count


def sample_categorical(probs: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Sample (…) indices from (…, V) probabilities by inverse cumulative distribution; u (…)
    uniform.
    """
    cumulative = probs.cumsum(-1)  # (…, V)
    u = u.unsqueeze(-1).to(cumulative) * cumulative[..., -1:]  # (…, 1)
    index = torch.searchsorted(cumulative, u, right=True).squeeze(-1)  # (…)
    return index.clamp(max=probs.shape[-1] - 1)


# --------------------------------------------------------------------------------------------- text


@dataclass
class TextRequest:
    """One text to write, with its own decoding: the answer to `prompt` about one image."""

    image: int  # its number among those given
    prompt: str
    top_k: int = 1  # 1: greedy; 0: the whole vocabulary
    temperature: float = 1.0
    seed: int = 0


class Generated(NamedTuple):
    """A text as token ids without `<|eot|>`, and whether that came before the limit."""

    ids: list[int]
    ended: bool


def require_finite(chosen: torch.Tensor) -> None:
    """Raises InputError on NaN or infinity, which would be drawn from without a word."""
    if not bool(chosen.isfinite().all()):
        raise InputError("the model gives NaN or infinite logits; --dtype float32 or bfloat16, or "
                         "another checkpoint helps")


def sample_tokens(logits, top_k, temperature, u) -> torch.Tensor:
    """(R, V) logits -> (R,) tokens.

    Each row has its own top-k (1: greedy, 0: all), temperature and uniform number.
    """
    greedy = logits.argmax(-1)
    require_finite(logits.gather(1, greedy[:, None]))
    if bool((top_k == 1).all()):
        return greedy
    everything = logits.shape[-1]
    widest = everything if bool((top_k == 0).any()) else int(top_k.max())
    values, ids = logits.topk(widest, -1)  # (R, widest)
    limit = torch.where(top_k == 0, widest, top_k)[:, None]  # (R, 1)
    beyond = torch.arange(widest, device=logits.device) >= limit  # (R, widest)
    probs = (values / temperature[:, None]).masked_fill(beyond, -torch.inf).softmax(-1)
    sampled = ids.gather(1, sample_categorical(probs, u)[:, None])[:, 0]
    return torch.where(top_k == 1, greedy, sampled)


# ------------------------------------------------------------------------------------------- images


def cosine_mask_count(step: int, steps: int, n: int) -> int:
    """floor(N·cos(π/2·(step+1)/steps)), in float32 as the original (it differs at integers)."""
    ratio = torch.tensor((step + 1) / steps)
    return int(torch.floor(n * torch.cos(ratio * math.pi * 0.5)))


def mask_by_random_topk(probs, gumbel, count, temperature: float) -> torch.Tensor:
    """(B, N) probabilities of the sampled codes -> (B, N) True where a slot is masked again.

    Confidence is log p + temperature·Gumbel; the `count` (B, 1) slots with the lowest become masks.
    """
    confidence = probs.log() + temperature * gumbel
    cut = confidence.sort(-1).values.gather(1, count)  # (B, 1)
    return confidence < cut


def maskgit_decode(logits_fn, shape: tuple[int, int], noise, sampling: ImageSampling, device):
    """Decode a batch of images from all masks to (B, N) codes.

    logits_fn(codes, guidance_scale): (B, N) codes, MASKED where unknown -> (M, C) logits at the M
    masked slots. noise: (B, steps, 2, N) uniform numbers for codes and Gumbel noise, or None for
    greedy decoding.
    """
    B, N = shape
    codes = torch.full((B, N), MASKED, device=device)
    first, last = sampling.guidance_interval
    temperature = sampling.temperature
    for step in range(sampling.steps):
        guided = first <= step / sampling.steps < last
        unknown = codes == MASKED  # (B, N)
        logits = logits_fn(codes, sampling.guidance_scale if guided else 0.0)  # (M, C)
        probs = logits.softmax(-1)
        if noise is None:
            chosen = probs.argmax(-1)  # (M,)
        else:
            chosen = sample_categorical(probs, noise[:, step, 0][unknown])
        chosen_probs = probs.gather(1, chosen[:, None])[:, 0]  # (M,)
        require_finite(chosen_probs)
        sampled = codes.masked_scatter(unknown, chosen)  # (B, N)
        if step == sampling.steps - 1:
            return sampled

        # confidence of the new codes; what was known before stays known
        confidence = torch.full(unknown.shape, torch.inf, device=device)
        confidence[unknown] = chosen_probs
        if noise is None:
            gumbel = torch.zeros_like(confidence)
        else:
            gumbel = -(-noise[:, step, 1].log()).log()

        # the original multiplies the temperature at every step: it compounds; MaskGIT's does not
        ratio = (step + 1) / sampling.steps
        start = temperature if sampling.anneal == "compound" else sampling.temperature
        temperature = start * (1 - ratio)

        # at least one slot is masked again, and of two or more at least one is decided
        limit = cosine_mask_count(step, sampling.steps, N)
        count = (unknown.sum(1, keepdim=True) - 1).clamp(max=limit).clamp(min=1)  # (B, 1)
        again = mask_by_random_topk(confidence, gumbel, count, temperature)
        codes = torch.where(again, MASKED, sampled)
