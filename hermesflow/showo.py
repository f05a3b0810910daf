"""Show-o: its vocabulary, the Phi backbone and its log-probabilities.

Nobody else knows a token id. Shapes in comments: B rows of T positions, S segments behind one
prefix, I images of P positions, N image tokens, M labelled positions, V vocabulary, C image codes,
D hidden size.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, PhiConfig, PhiForCausalLM

from hermesflow.checkpoints import SIZE, check_fields, refuse
from hermesflow.files import InputError
from hermesflow.packed import (CACHE, CHECKPOINTING, IGNORE, Pack, Segment, label_logps,
                               segment_sums)
from hermesflow.sampling import MASKED

SIZES = dict(vocab_size=SIZE, llm_vocab_size=SIZE, codebook_size=SIZE, num_vq_tokens=SIZE)


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


def image_segment(tokens: Tokens, codes: list[int], masked: list[bool]) -> Segment:
    """An image block with some slots masked; each masked slot predicts its own code."""
    ids = tokens.image_block([MASKED if m else c for c, m in zip(codes, masked)])
    labels = [tokens.first_code + c if m else IGNORE for c, m in zip(codes, masked)]
    return Segment(ids, [IGNORE, *labels, IGNORE], bidirectional=True)


# -------------------------------------------------------------------------------------- the network


class Showo(nn.Module):
    """Show-o over transformers' Phi.

    Parameter names are those of the published checkpoints (`showo.model…`).

    config: the fields of the published config.json; phi: the language model's sizes; tokens: the
    vocabulary.
    """

    _no_split_modules = ["PhiDecoderLayer"]  # what FSDP gathers at a time

    def __init__(self, config: dict, phi: PhiConfig, tokens: Tokens):
        super().__init__()
        phi.qk_layernorm = True  # the original forces this and the vocabulary's size
        phi.vocab_size = tokens.vocab_size
        # without dropout, policy and reference agree at step 0
        phi.embd_pdrop = phi.resid_pdrop = phi.attention_dropout = 0.0
        phi._attn_implementation = "packed"
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

    @property
    def blocks(self) -> nn.Module:
        """The transformer, without its head."""
        return self.showo.model

    def hidden(self, ids, positions, cache=None, mask=None, **how) -> torch.Tensor:
        """(B, T) token ids -> (B, T, D).

        Everything is visible, unless mask or `how` (is_causal, layout) say else.
        """
        how[CACHE] = cache
        output = self.showo.model(input_ids=ids, position_ids=positions, attention_mask=mask,
                                  use_cache=cache is not None, **how)
        return output.last_hidden_state

    def image_cache(self, codes: torch.Tensor) -> DynamicCache:
        """Keys and values of images (I, N) that texts are about; an image sees itself whole."""
        prompts = [self.tokens.mmu_prompt(c) for c in codes.tolist()]
        ids = torch.tensor(prompts, device=self.device)  # (I, P)
        cache = DynamicCache()
        self.hidden(ids, torch.arange(ids.shape[1], device=self.device)[None], cache)
        return cache

    def text_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(…, D) -> (…, V) float32 logits of the next token."""
        return self.showo.lm_head(hidden).float()

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
        return segment_sums(p, labelled, label_logps(hidden, labels, head))

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
