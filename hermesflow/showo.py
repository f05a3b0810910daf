"""Show-o: its vocabulary, packed rows, the Phi backbone and its log-probabilities.

Nobody else knows a token id. Shapes in comments: B rows, P prefix, S branches of width n behind one
prefix, T = P + S·n, N image tokens, M labelled positions, V vocabulary, C image codes, D hidden
size, H heads of width d.
"""

import inspect
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PhiConfig, PhiForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface
from transformers.models.phi.modeling_phi import PhiModel

from hermesflow.checkpoints import SIZE, check_fields, refuse
from hermesflow.files import InputError
from hermesflow.sampling import MASKED

IGNORE = -100  # "no label here"
SIZES = dict(vocab_size=SIZE, llm_vocab_size=SIZE, codebook_size=SIZE, num_vq_tokens=SIZE)
# transformers renames these; the old names warn where the new ones exist
CACHE = "cache" if "cache" in inspect.signature(PhiModel.forward).parameters else "past_key_values"
RENAMED = hasattr(PhiModel, "activation_checkpointing_enable")
CHECKPOINTING = "activation_checkpointing" if RENAMED else "gradient_checkpointing"


class Tokens:
    """The one vocabulary: text, ten special tokens, image codes, the mask token.

    The special tokens are numbers, not strings in the tokenizer: a caption that contains "<|eoi|>"
    stays plain text.
    """

    SPECIAL = ("[PAD]", "<|soi|>", "<|eoi|>", "<|sov|>", "<|eov|>", "<|t2i|>", "<|mmu|>", "<|t2v|>",
               "<|v2v|>", "<|lvg|>")

    def __init__(self, tokenizer, codes: int, image_tokens: int, window: int = 129):
        self.tokenizer = tokenizer
        self.codes = codes
        self.image_tokens = image_tokens
        self.window = window  # the longest t2i prompt
        self.text_size = len(tokenizer)
        ids = {name: self.text_size + i for i, name in enumerate(self.SPECIAL)}
        self.pad = ids["[PAD]"]
        self.soi = ids["<|soi|>"]
        self.eoi = ids["<|eoi|>"]
        self.t2i = ids["<|t2i|>"]
        self.mmu = ids["<|mmu|>"]
        self.sot = tokenizer.bos_token_id
        self.eot = tokenizer.eos_token_id
        self.first_code = self.text_size + len(self.SPECIAL)
        self.mask = self.first_code + codes
        self.vocab_size = self.mask + 1

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids

    def decode(self, ids) -> str:
        """The text of an answer; tokens that are not text are left out, as in the original."""
        text = [i for i in ids if i < self.text_size]
        return self.tokenizer.decode(text, skip_special_tokens=True)

    def t2i_prompt(self, caption: str) -> list[int]:
        """`<|t2i|> <|sot|> text <|eot|>`, cut to the window; without padding, which nobody sees."""
        ids = [self.t2i, self.sot, *self.encode(caption), self.eot]
        return ids if len(ids) <= self.window else [*ids[: self.window - 1], self.eot]

    def image_block(self, codes) -> list[int]:
        """`<|soi|> codes <|eoi|>`; a code of MASKED becomes the mask token."""
        slots = [self.mask if c == MASKED else self.first_code + c for c in codes]
        return [self.soi, *slots, self.eoi]

    def mmu_prompt(self, codes) -> list[int]:
        """`<|mmu|> <|soi|> codes <|eoi|>`: the image that captions and answers are about."""
        return [self.mmu, *self.image_block(codes)]

    def text_prompt(self, question: str) -> list[int]:
        """`<|sot|> USER: \\n{question} ASSISTANT:`, in sampling, scoring and training alike."""
        return [self.sot, *self.encode(f"USER: \n{question} ASSISTANT:")]


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


def image_segment(tokens: Tokens, codes: list[int], masked: list[bool]) -> Segment:
    """An image block with some slots masked; each masked slot predicts its own code."""
    ids = tokens.image_block([MASKED if m else c for c, m in zip(codes, masked)])
    labels = [tokens.first_code + c if m else IGNORE for c, m in zip(codes, masked)]
    return Segment(ids, [IGNORE, *labels, IGNORE], bidirectional=True)


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


AttentionInterface.register("showo", attention)


# -------------------------------------------------------------------------------------- the network


class Showo(nn.Module):
    """Show-o over transformers' Phi.

    Parameter names are those of the published checkpoints (`showo.model…`).

    config: the fields of the published config.json; phi: the language model's sizes; tokens: the
    vocabulary.
    """

    def __init__(self, config: dict, phi: PhiConfig, tokens: Tokens):
        super().__init__()
        phi.qk_layernorm = True  # the original forces this and the vocabulary's size
        phi.vocab_size = tokens.vocab_size
        # without dropout, policy and reference agree at step 0
        phi.embd_pdrop = phi.resid_pdrop = phi.attention_dropout = 0.0
        phi._attn_implementation = "showo"
        phi.pad_token_id = None  # padding is masked; no embedding row is special
        self.config = config
        self.tokens = tokens
        self.showo = PhiForCausalLM(phi)
        if phi.hidden_act == "gelu_new":
            # the same function in one kernel, which keeps one tensor instead of six
            for layer in self.showo.model.layers:
                layer.mlp.activation_fn = nn.GELU(approximate="tanh")

    @property
    def device(self):
        return self.showo.lm_head.weight.device

    def hidden(self, ids, positions, cache=None, mask=None, **how) -> torch.Tensor:
        """(B, T) token ids -> (B, T, D).

        Everything is visible, unless mask or `how` (is_causal, layout) say else.
        """
        how[CACHE] = cache
        output = self.showo.model(input_ids=ids, position_ids=positions, attention_mask=mask,
                                  use_cache=cache is not None, **how)
        return output.last_hidden_state

    def forward(self, *packs: Pack) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Per pack, sums of log-probs and label counts of each segment, both (B, S+1) float32."""
        return [self.segment_logps(p) for p in packs]

    def segment_logps(self, p: Pack) -> tuple[torch.Tensor, torch.Tensor]:
        """log softmax over the whole vocabulary, as in training; the head runs only on labels.

        With p.uncond, the log-probs of the guided policy that images are sampled from: log softmax
        over the image codes of (1 + g)·cond − g·uncond.
        """
        labelled = p.targets != IGNORE
        labels = p.targets[labelled]  # (M,)
        hidden = self.hidden(p.ids, p.positions, layout=p.layout)[labelled]  # (M, D)
        head = self.showo.lm_head
        if p.uncond is not None:
            uncond = self.hidden(p.uncond.ids, p.uncond.positions, layout=p.uncond.layout)
            uncond = uncond[p.uncond.targets != IGNORE]  # (M, D)
            # the head is linear, so guiding hidden states is guiding logits
            hidden = hidden + p.guidance_scale * (hidden - uncond)
            labels = labels - self.tokens.first_code
            head = self.code_logits
        logps = self.label_logps(hidden, labels, head)  # (M,)

        # sum over the labels of each segment
        B = len(p.ids)
        S = p.layout.branches + 1
        row = torch.arange(B, device=p.ids.device)[:, None]
        slot = (row * S + p.segments)[labelled]  # (M,)
        sums = torch.zeros(B * S, device=p.ids.device).index_add(0, slot, logps)
        counts = torch.zeros(B * S, device=p.ids.device).index_add(0, slot, torch.ones_like(logps))
        # FSDP warns of outputs that are views
        return sums.view(B, S).clone(), counts.view(B, S).clone()

    def label_logps(self, hidden, labels, head, at_once: int = 2048) -> torch.Tensor:
        """(M, D), (M,) -> (M,) log-probs.

        Only (at_once, V) logits exist at a time: backward computes them again.
        """

        def chunk_logps(hidden, labels):
            return -F.cross_entropy(head(hidden).float(), labels, reduction="none")

        if len(labels) <= at_once:
            return chunk_logps(hidden, labels)
        chunks = zip(hidden.split(at_once), labels.split(at_once))
        return torch.cat([checkpoint(chunk_logps, *c, use_reentrant=False) for c in chunks])

    def code_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(…, D) -> (…, C) float32 logits of the image codes alone."""
        head = self.showo.lm_head
        codes = slice(self.tokens.first_code, self.tokens.mask)
        return F.linear(hidden, head.weight[codes], head.bias[codes]).float()

    def checkpoint_activations(self, on: bool = True) -> None:
        """Compute each layer again in the backward pass instead of keeping its activations."""
        if on:
            getattr(self.showo, f"{CHECKPOINTING}_enable")(dict(use_reentrant=False))
        else:
            getattr(self.showo, f"{CHECKPOINTING}_disable")()


def decay_groups(net: nn.Module, weight_decay: float) -> list[dict]:
    """Optimizer groups: weight decay on matrices only, not on biases and norms."""
    matrices = [p for p in net.parameters() if p.ndim >= 2]
    others = [p for p in net.parameters() if p.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay},
            {"params": others, "weight_decay": 0.0}]


def build_showo(config: dict, phi: PhiConfig, tokenizer, where: str = "config.json") -> Showo:
    """An empty model on the meta device. Raises InputError if config and tokenizer disagree."""
    check_fields(config, SIZES, where)
    if math.isqrt(config["num_vq_tokens"]) ** 2 != config["num_vq_tokens"]:
        refuse(where, "num_vq_tokens", "a square number", config["num_vq_tokens"])
    tokens = Tokens(tokenizer, config["codebook_size"], config["num_vq_tokens"])
    if config["llm_vocab_size"] != tokens.text_size:
        message = f"is {config['llm_vocab_size']}, the text tokenizer has {tokens.text_size} tokens"
        raise InputError(f"{where}: field 'llm_vocab_size' {message}")
    mask_token = config.get("mask_token_id", tokens.mask)
    if config["vocab_size"] != tokens.vocab_size or mask_token != tokens.mask:
        raise InputError(f"{where}: field 'vocab_size' should be {tokens.vocab_size}, "
                         f"'mask_token_id' {tokens.mask}: {tokens.text_size} text, "
                         f"{len(Tokens.SPECIAL)} special, {tokens.codes} image, 1 mask")
    with torch.device("meta"):
        return Showo(config, phi, tokens)
