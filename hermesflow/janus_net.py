"""Janus' prompts and network: what is behind what, drawing, and log-probabilities.

What is looked at is pixels, which SigLIP sees; what is drawn is codes, one after the other, in the
order of reading. Nobody else knows a token id.

Shapes in comments: B rows of T positions, S segments behind one prefix of width P, I images,
N image tokens, M labelled positions, C image codes, V vocabulary, D hidden size.
"""

import re
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from transformers import DynamicCache, JanusForConditionalGeneration
from transformers.models.janus.processing_janus import DEFAULT_SYSTEM_PROMPT

from hermesflow.files import InputError, reason
from hermesflow.options import ImageSampling
from hermesflow.packed import CACHE, CHECKPOINTING, IGNORE, Pack, label_logps, segment_sums
from hermesflow.sampling import sample_tokens

MARK = "\x1a"  # the place of the text in a rendered template


class Prompt(NamedTuple):
    """A template around a text: ids, text up to the next special token, ids."""

    head: list[int]
    before: str
    after: str
    tail: list[int]


class Tokens:
    """Prompts as token ids, by the checkpoint's own template and special tokens.

    What looks like a special token in a caption or a question stays plain text.
    """

    def __init__(self, processor, image_tokens: int, longest: int, name):
        self.tokenizer = processor.tokenizer
        self.longest = longest
        self.bos, self.eot, self.pad, self.boi, image = (
            getattr(self.tokenizer, f"{t}_token_id", None) for t in "bos eos pad boi image".split())
        if None in (self.bos, self.eot, self.pad, self.boi, image):
            raise InputError(f"{name}: the tokenizer lacks a bos, eos, pad, boi or image token")
        added = self.tokenizer.added_tokens_decoder.values()
        special = sorted((t.content for t in added if t.special), key=len, reverse=True)
        self.special = re.compile("|".join(map(re.escape, special)))

        def rendered(*content: dict) -> str:
            return processor.apply_chat_template([{"role": "user", "content": list(content)}],
                                                 add_generation_prompt=True, tokenize=False)

        text = {"type": "text", "text": MARK}
        slots = processor.image_token * image_tokens
        block = processor.image_start_token + slots + processor.image_end_token
        try:
            look = rendered({"type": "image"}, text).replace(processor.image_token, block)
            draw = rendered(text) + processor.image_start_token
        except Exception as error:  # whatever a template leads to
            raise InputError(f"{name}: its chat template fails ({reason(error)})") from None
        system = DEFAULT_SYSTEM_PROMPT if processor.use_default_system_prompt else ""
        self.look = self.split(system + look)
        self.draw = self.split(draw)
        if self.look.head.count(image) != image_tokens or self.draw.tail[-1:] != [self.boi]:
            raise InputError(f"{name}: its chat template does not put an image before the text")
        self.image_start = self.look.head.index(image)
        if longest < max(16, len(self.draw.head) + len(self.draw.tail)):
            raise InputError(f"{name}: field 'max_position_embeddings' leaves no room for a text")

    def split(self, rendered: str) -> Prompt:
        before, _, after = rendered.partition(MARK)
        last = max((m.end() for m in self.special.finditer(before)), default=0)
        first = min((m.start() for m in self.special.finditer(after)), default=len(after))
        tail = self.tokenizer(after[first:], add_special_tokens=False).input_ids
        return Prompt(self.tokenizer(before[:last]).input_ids, before[last:], after[:first], tail)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids

    def text_prompt(self, question: str) -> list[int]:
        """What stands between an image and the answer."""
        p = self.look
        return [*self.encode(p.before + question.strip() + p.after), *p.tail]

    def t2i_prompt(self, caption: str, cut: bool = True) -> list[int]:
        """What an image is drawn from, of at most `longest` tokens; of "", the prompt of none."""
        p = self.draw
        text = self.encode(p.before + caption.strip() + p.after)
        room = self.longest - len(p.head) - len(p.tail)
        ids = [*p.head, *(text[:room] if cut else text), *p.tail]
        return ids if caption else self.without(ids)

    def without(self, ids: list[int]) -> list[int]:
        """The same without its text, for guidance: as in pretraining, with padding in its place."""
        return [i if i in (self.bos, self.boi) else self.pad for i in ids]


class Janus(nn.Module):
    """transformers' Janus without its image tokenizer, which is not trained."""

    _no_split_modules = ["LlamaDecoderLayer", "JanusVisionEncoderLayer"]  # what FSDP gathers

    def __init__(self, janus: JanusForConditionalGeneration, tokens: Tokens):
        super().__init__()
        self.janus = janus
        self.tokens = tokens
        self.image_tokens = janus.config.vision_config.num_image_tokens

    @property
    def device(self):
        return self.janus.lm_head.weight.device

    @property
    def blocks(self) -> nn.Module:
        """The transformer, without its heads."""
        return self.janus.model.language_model

    def hidden(self, ids, positions, cache=None, mask=None, **how) -> torch.Tensor:
        """(B, T) token ids or (B, T, D) embeddings -> (B, T, D). `mask`, `how`: as of Showo."""
        embeds = ids if ids.is_floating_point() else self.blocks.embed_tokens(ids)
        how[CACHE] = cache
        output = self.blocks(inputs_embeds=embeds, position_ids=positions, attention_mask=mask,
                             use_cache=cache is not None, **how)
        return output.last_hidden_state

    def with_images(self, ids: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        """(B, T) ids that begin with an image's place -> (B, T, D), with what SigLIP sees there."""
        embeds = self.blocks.embed_tokens(ids)
        # one at a time, as other batches round differently
        seen = [self.janus.model.get_image_features(p).pooler_output for p in pixels.split(1)]
        seen = torch.cat(seen).to(embeds)  # (B, N, D)
        start = self.tokens.image_start
        return torch.cat([embeds[:, :start], seen, embeds[:, start + seen.shape[1] :]], 1)

    def with_codes(self, p: Pack) -> torch.Tensor:
        """Rows of a text and S branches, <boi> and all codes but the last -> (B, T, D)."""
        P = p.layout.prefix
        branches = p.ids[:, P:].unflatten(1, (p.layout.branches, -1))  # (B, S, N)
        boi = self.blocks.embed_tokens(branches[..., :1])
        codes = self.janus.prepare_embeddings_for_image_generation(branches[..., 1:])
        text = self.blocks.embed_tokens(p.ids[:, :P])
        return torch.cat([text, torch.cat([boi, codes], 2).flatten(1, 2)], 1)

    def image_cache(self, pixels: torch.Tensor) -> DynamicCache:
        """Keys and values of images (I, 3, H, W) that texts are about, and of what is before."""
        head = torch.tensor(self.tokens.look.head, device=self.device).expand(len(pixels), -1)
        cache = DynamicCache()
        positions = torch.arange(head.shape[1], device=self.device)[None]
        self.hidden(self.with_images(head, pixels), positions, cache, is_causal=True)
        return cache

    def text_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(…, D) -> (…, V) float32 logits of the next token."""
        return self.janus.lm_head(hidden).float()

    def code_logits(self, hidden: torch.Tensor, guidance_scale: float = 0.0) -> torch.Tensor:
        """(M, D), or (M, 2, D) of cond and uncond -> (M, C) float32 logits.

        Guidance mixes logits and not hidden states, as the head is not linear.
        """
        logits = self.janus.model.generation_head(hidden).float()
        if hidden.ndim == 2:
            return logits
        cond, uncond = logits.unbind(1)
        return cond + guidance_scale * (cond - uncond)

    def draw(self, prompts: list[list[int]], draws, sampling: ImageSampling) -> torch.Tensor:
        """Prompts of one length -> (B, N) codes. draws (B, N): uniform numbers; None: greedy."""
        B = len(prompts)
        guided = sampling.guidance_scale != 0
        first, last = sampling.guidance_interval
        rows = prompts + [self.tokens.without(p) for p in prompts] * guided
        unique = sorted(set(map(tuple, rows)))
        row = torch.tensor([unique.index(tuple(r)) for r in rows], device=self.device)
        ids = torch.tensor(unique, device=self.device)
        P = ids.shape[1]
        positions = torch.arange(P + self.image_tokens, device=self.device)[None]
        cache = DynamicCache()
        hidden = self.hidden(ids, positions[:, :P], cache, is_causal=True)[row, -1]  # (B or 2B, D)
        cache.batch_select_indices(row)

        greedy = draws is None or sampling.temperature == 0
        top_k = torch.full((B,), int(greedy), device=self.device)
        temperature = torch.full((B,), sampling.temperature or 1.0, device=self.device)
        codes = []
        for i in range(self.image_tokens):
            scale = sampling.guidance_scale if first <= i / self.image_tokens < last else 0.0
            if guided:
                hidden = hidden.unflatten(0, (2, B)).transpose(0, 1)  # (B, 2, D)
            logits = self.code_logits(hidden, scale)  # (B, C)
            new = sample_tokens(logits, top_k, temperature, None if greedy else draws[:, i])  # (B,)
            codes.append(new)
            if len(codes) < self.image_tokens:
                embeds = self.janus.prepare_embeddings_for_image_generation(new[:, None])
                embeds = embeds.repeat(1 + guided, 1, 1)
                hidden = self.hidden(embeds, positions[:, P + i : P + i + 1], cache)[:, -1]
        return torch.stack(codes, 1)

    def forward(self, *packs: Pack) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Per pack, sums of log-probs and label counts of each segment, both (B, S+1) float32."""
        return [self.segment_logps(p) for p in packs]

    def segment_logps(self, p: Pack) -> tuple[torch.Tensor, torch.Tensor]:
        """log softmax of texts over the vocabulary, of images over the codes, guided or not."""
        labelled = p.targets != IGNORE
        labels = p.targets[labelled]  # (M,)
        about_image = p.pixels is not None
        embeds = self.with_images(p.ids, p.pixels) if about_image else self.with_codes(p)
        hidden = self.hidden(embeds, p.positions, layout=p.layout)[labelled]  # (M, D)
        head = self.text_logits if about_image else self.code_logits
        if p.uncond is not None:
            u = p.uncond
            uncond = self.hidden(self.with_codes(u), u.positions, layout=u.layout)[labelled]
            hidden = torch.stack([hidden, uncond], 1)  # (M, 2, D)
            head = partial(self.code_logits, guidance_scale=p.guidance_scale)
        return segment_sums(p, labelled, label_logps(hidden, labels, head))

    def checkpoint_activations(self, on: bool = True) -> None:
        """Compute each layer again in the backward pass instead of keeping its activations."""
        if on:
            getattr(self.janus, f"{CHECKPOINTING}_enable")(dict(use_reentrant=False))
        else:
            getattr(self.janus, f"{CHECKPOINTING}_disable")()
