"""Packed rows: what is given and what is scored behind it, how both attend, and their log-probs.

Knows no network. Shapes in comments: B rows, P prefix, S branches of width n behind one prefix,
T = P + S·n, M labelled positions, D hidden size, V vocabulary, H heads of width d.
"""

import inspect
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface
from transformers.models.phi.modeling_phi import PhiModel

IGNORE = -100  # "no label here"
# transformers renames these; the old names warn where the new ones exist
CACHE = "cache" if "cache" in inspect.signature(PhiModel.forward).parameters else "past_key_values"
RENAMED = hasattr(PhiModel, "activation_checkpointing_enable")
CHECKPOINTING = "activation_checkpointing" if RENAMED else "gradient_checkpointing"


class LogProbs(NamedTuple):
    """Sums of log-probs and numbers of tokens, (B, S) each: S responses behind one prefix."""

    sums: torch.Tensor
    counts: torch.Tensor


class TextBatch(NamedTuple):
    """Texts about images: for each of B images a question and S responses, as token ids.

    ended: whether the response came to `<|eot|>`, which is then predicted, too [all did].
    """

    images: torch.Tensor
    prompts: list[str]
    responses: list[list[list[int]]]
    ended: list[list[bool]] | None = None


class ImageBatch(NamedTuple):
    """Images of texts: for each of B texts S images (B, S, N).

    masks: (B, N), or K of each text's images (B, K, N), over which log-probs are means; None: of a
    backbone without masks.
    """

    prompts: list[str]
    images: torch.Tensor
    masks: torch.Tensor | None
    guidance_scale: float = 0.0
    texts: list[str] | None = None  # in whose place empty prompts are


def responses_only(segments: tuple[torch.Tensor, torch.Tensor], S: int) -> LogProbs:
    """(B, 1 + K·S) sums and counts of a pack -> (B, S): no prefix, and the mean of K masks."""
    return LogProbs(*(x[:, 1:].unflatten(1, (-1, S)).mean(1) for x in segments))


# -------------------------------------------------------------------------------------- packed rows


@dataclass
class Segment:
    """A stretch of a packed row: token ids, how it attends, and what each position should predict.

    targets: IGNORE where nothing is predicted; None: nowhere.
    """

    ids: list[int]
    targets: list[int] | None = None
    bidirectional: bool = False


def answer_segment(prompt: list[int], answer: list[int]) -> Segment:
    """Prompt and answer with its `<|eot|>`, each token predicted by the position before it."""
    targets = [IGNORE] * (len(prompt) - 1) + answer + [IGNORE]
    return Segment(prompt + answer, targets)


class Layout(NamedTuple):
    """How packed rows attend: a prefix of width P, and S branches of width n behind it."""

    prefix: int
    branches: int
    causal: bool  # whether the prefix is text
    mask: torch.Tensor | None  # (B·S, 1, 1 or n, P+n), True where a branch may look [everywhere]


class Pack(NamedTuple):
    """Packed rows as tensors (B, T), and how they attend."""

    ids: torch.Tensor
    targets: torch.Tensor
    positions: torch.Tensor
    segments: torch.Tensor  # 0: prefix, 1 … S: branches, -1: padding
    layout: Layout
    uncond: "Pack | None" = None  # the same images behind an empty text, for guided log-probs
    guidance_scale: float = 0.0
    pixels: torch.Tensor | None = None  # of images that are looked at and have no codes


def pack(rows: list[list[Segment]], pad: int, device=None) -> Pack:
    """Rows of segments as tensors.

    The first segment of a row is the prefix that all others, its branches, see.

    Branches do not see one another, so a row is worth S separate sequences at the price of one
    prefix. All rows have equally many branches; prefixes are all text or all image, branches, too.
    Each is padded on the right.
    """
    prefixes = [row[0] for row in rows]
    branches = sum((row[1:] for row in rows), [])
    S = len(rows[0]) - 1
    P = max(len(s.ids) for s in prefixes)
    n = max(len(s.ids) for s in branches)

    prefix_kinds = {s.bidirectional for s in prefixes}
    branch_kinds = {s.bidirectional for s in branches}
    uneven_images = prefix_kinds == {True} and len({len(s.ids) for s in prefixes}) > 1
    uneven_rows = any(len(row) != S + 1 for row in rows)
    if len(prefix_kinds) + len(branch_kinds) > 2 or uneven_images or uneven_rows:
        raise ValueError("rows of one pack must be of one kind")

    ids, targets, positions, segments = np.zeros((4, len(rows), P + S * n), dtype=np.int64)
    ids[:] = pad
    targets[:] = IGNORE
    segments[:] = -1
    for b, row in enumerate(rows):
        for s, segment in enumerate(row):
            width = len(segment.ids)
            start = P + (s - 1) * n if s else 0
            at = slice(start, start + width)
            ids[b, at] = segment.ids
            targets[b, at] = segment.targets or IGNORE
            positions[b, at] = np.arange(width) + (len(row[0].ids) if s else 0)
            segments[b, at] = s
    ids, targets, positions, segments = (
        torch.from_numpy(x).to(device) for x in (ids, targets, positions, segments))

    # what a branch sees: the real prefix and its own real positions; causal if it is text
    real_prefix = (segments[:, :P] == 0).repeat_interleave(S, 0)  # (B·S, P)
    real_branch = segments[:, P:].reshape(-1, n) > 0  # (B·S, n)
    mask = torch.cat([real_prefix, real_branch], 1)[:, None, None]  # (B·S, 1, 1, P+n)
    if branch_kinds == {False}:
        mask = mask & torch.ones(n, P + n, dtype=torch.bool, device=ids.device).tril(P)
    elif mask.all():
        mask = None
    return Pack(ids, targets, positions, segments, Layout(P, S, prefix_kinds == {False}, mask))


def attention(module, query, key, value, mask, is_causal=False, layout=None, images=None, **kwargs):
    """The attention of all layers: plain, in packed rows, or of texts behind shared images.

    Packed rows need no (T, T) mask: the prefix attends to itself, each branch to the prefix and
    itself. query, key, value (B, H, T, d) -> (B, T, H, d).
    """
    if images is not None:
        return images.attend(module.layer_idx, query, key, value, mask, kwargs["scaling"]), None
    if layout is None:
        kwargs["is_causal"] = is_causal
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)
    P = layout.prefix
    S = layout.branches

    def divide(x):  # (B, H, P+S·n, d) -> (B, H, P, d), (B·S, H, n, d)
        prefix, branches = x.split([P, x.shape[2] - P], 2)
        return prefix, branches.unflatten(2, (S, -1)).transpose(1, 2).flatten(0, 1)

    query, own_query = divide(query)
    key, own_key = divide(key)
    value, own_value = divide(value)
    all_keys = torch.cat([key.repeat_interleave(S, 0), own_key], 2)  # (B·S, H, P+n, d)
    all_values = torch.cat([value.repeat_interleave(S, 0), own_value], 2)
    prefix, _ = sdpa_attention_forward(  # (B, P, H, d)
        module, query, key, value, None, is_causal=layout.causal, **kwargs)
    branches, _ = sdpa_attention_forward(  # (B·S, n, H, d)
        module, own_query, all_keys, all_values, layout.mask, is_causal=False, **kwargs)
    return torch.cat([prefix, branches.unflatten(0, (-1, S)).flatten(1, 2)], 1), None


AttentionInterface.register("packed", attention)


def label_logps(hidden, labels, head, at_once: int = 2048) -> torch.Tensor:
    """(M, D), (M,) -> (M,) log-probs.

    Only (at_once, V) logits exist at a time: backward computes them again.
    """

    def chunk_logps(hidden, labels):
        return -F.cross_entropy(head(hidden).float(), labels, reduction="none")

    if len(labels) <= at_once:
        return chunk_logps(hidden, labels)
    chunks = zip(hidden.split(at_once), labels.split(at_once))
    return torch.cat([checkpoint(chunk_logps, *c, use_reentrant=False) for c in chunks])


def segment_sums(p: Pack, labelled, logps) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of log-probs (M,) and label counts of each segment, both (B, S+1) float32."""
    B = len(p.ids)
    S = p.layout.branches + 1
    row = torch.arange(B, device=p.ids.device)[:, None]
    slot = (row * S + p.segments)[labelled]  # (M,)
    sums = torch.zeros(B * S, device=p.ids.device).index_add(0, slot, logps)
    counts = torch.zeros(B * S, device=p.ids.device).index_add(0, slot, torch.ones_like(logps))
    # FSDP warns of outputs that are views
    return sums.view(B, S).clone(), counts.view(B, S).clone()
