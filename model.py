"""The unified model as the stages see it: images and texts in, images, texts and log-probs out.

A second backbone is one more file like hermesflow/showo.py and a class with these methods, chosen
in `load`. Images are everywhere (B, N) long codes or (B, 3, H, W) float pixels in [-1, 1].

Shapes in comments: B rows, S responses behind one prompt, N image tokens, R texts, V vocabulary.
"""

import json
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from transformers import DynamicCache
from transformers.models.phi.modeling_phi import PhiRotaryEmbedding

from hermesflow.checkpoints import (load_tokenizer, phi_config, phi_fields, read_showo_config,
                                    save_tokenizer)
from hermesflow.files import InputError, atomic
from hermesflow.magvit import Magvit, load_magvit, save_magvit
from hermesflow.options import IMAGE_TOKENIZER, TEXT_TOKENIZER, ImageSampling
from hermesflow.prefixes import GuidedLogits, ImagePrefix
from hermesflow.runs import processes
from hermesflow.sampling import (Generated, TextRequest, maskgit_decode, random_mask, sample_tokens,
                                 uniforms)
from hermesflow.showo import Pack, Segment, Showo, answer_segment, build_showo, image_segment, pack
from hermesflow.weights import full_precision, load_checkpoint

IMAGE_TOKENS_AT_ONCE = 4096  # decoded in one forward pass: enough to fill a processor


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
    """Images of texts: for each of B texts S images (B, S, N) under one mask (B, N)."""

    prompts: list[str]
    images: torch.Tensor
    masks: torch.Tensor
    guidance_scale: float = 0.0


class Model:
    """Show-o with its image tokenizer. `net` is the module that accelerate prepares."""

    def __init__(self, net: Showo, vq: Magvit):
        self.net = net
        self.vq = vq
        self.tokens = net.tokens
        self.config = net.config
        self.phi = net.showo.config
        self.image_tokens = net.tokens.image_tokens  # N
        self.code_count = net.tokens.codes
        self.vocab_size = net.tokens.vocab_size
        self.longest_prompt = net.tokens.window
        self.image_size = int(self.image_tokens**0.5) * vq.downsampling  # pixels

    @property
    def device(self):
        return next(self.net.parameters()).device

    @torch.inference_mode()
    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) pixels in [-1, 1] -> (B, N) codes."""
        # one at a time: convolutions of other batches round differently, and of 512 px cost 0.7 GB
        return torch.cat([self.vq.encode(p.to(self.device)) for p in pixels.split(1)])

    @torch.inference_mode()
    def decode_image(self, codes: torch.Tensor) -> torch.Tensor:
        """(B, N) codes -> (B, 3, H, W) pixels, about [-1, 1]."""
        return torch.cat([self.vq.decode(c.to(self.device)) for c in codes.split(1)])

    def codes_of(self, images: torch.Tensor) -> torch.Tensor:
        return self.encode_image(images) if images.is_floating_point() else images

    def encode_text(self, text: str) -> list[int]:
        return self.tokens.encode(text)

    def decode_text(self, ids: list[int]) -> str:
        return self.tokens.decode(ids)

    def prompt_length(self, text: str) -> int:
        """Tokens of a text to draw from; beyond `longest_prompt`, it is cut."""
        return len(self.tokens.encode(text)) + 3  # <|t2i|> <|sot|> … <|eot|>

    # ------------------------------------------------------------------------------- generation

    @torch.inference_mode()
    def generate_text(self, images: torch.Tensor, requests: list[TextRequest],
                      max_new_tokens: int = 100, progress=iter) -> list[Generated]:
        """One text per request. progress: wraps the steps, as tqdm does.

        Each image is computed once and shared by all its captions and answers; rows that have ended
        leave the batch.
        """
        if not requests:
            return []
        tokens = self.tokens
        device = self.device
        prompts = [tokens.text_prompt(r.prompt) for r in requests]
        R = len(requests)
        Q = max(map(len, prompts))
        image = torch.tensor([r.image for r in requests], device=device)  # (R,)
        prefix = ImagePrefix(self.net, self.codes_of(images), image)

        # prompts are padded on the left; nobody sees the padding
        padding = torch.tensor([Q - len(p) for p in prompts], device=device)  # (R,)
        ids = torch.tensor([[tokens.pad] * (Q - len(p)) + p for p in prompts], device=device)
        column = torch.arange(Q + max_new_tokens, device=device)
        visible = column >= padding[:, None]  # (R, Q+max_new)
        causal = column[:Q] <= column[:Q, None]  # (Q, Q)
        mask = (visible[:, None, :Q] & causal)[:, None]  # (R, 1, Q, Q)
        positions = prefix.width + (column - padding[:, None]).clamp(min=0)  # (R, Q+max_new)
        cache = DynamicCache()
        hidden = self.net.hidden(ids, positions[:, :Q], cache, mask, images=prefix)

        draws = torch.stack([uniforms(r.seed, max_new_tokens) for r in requests]).to(device)
        top_k = torch.tensor([r.top_k for r in requests], device=device)
        temperature = torch.tensor([r.temperature for r in requests], device=device)
        texts = [[] for _ in requests]
        ended = [False] * R
        alive = torch.arange(R, device=device)  # the rows that go on
        for step in progress(range(max_new_tokens)):
            logits = self.net.showo.lm_head(hidden[:, -1]).float()  # (R, V)
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
            hidden = self.net.hidden(new[:, None], positions[alive, end - 1 : end], cache, mask,
                                     images=prefix)
        return [Generated(*text) for text in zip(texts, ended)]

    @torch.inference_mode()
    def generate_images(self, prompts: list[str], seeds: list[int] | None,
                        sampling: ImageSampling) -> torch.Tensor:
        """One image per prompt, (B, N) codes. seeds: one per image; None: greedy decoding."""
        ids = [self.tokens.t2i_prompt(p) for p in prompts]
        N = self.image_tokens
        codes = torch.empty(len(prompts), N, dtype=torch.long, device=self.device)
        for length in sorted(set(map(len, ids))):
            alike = torch.tensor([i for i, p in enumerate(ids) if len(p) == length])
            for rows in alike.split(max(1, IMAGE_TOKENS_AT_ONCE // N)):
                noise = None
                if seeds is not None:
                    draws = [uniforms(seeds[i], sampling.steps, 2, N) for i in rows]
                    noise = torch.stack(draws).to(self.device)  # (B, steps, 2, N)
                guided = sampling.guidance_scale != 0
                logits_fn = GuidedLogits(self.net, [ids[i] for i in rows], guided)
                shape = (len(rows), N)
                codes[rows] = maskgit_decode(logits_fn, shape, noise, sampling, self.device)
        return codes

    # -------------------------------------------------------------------------------- log-probs

    def text_logps(self, images, prompts, responses) -> LogProbs:
        """log π(response | image, question): its tokens and `<|eot|>`, whole vocabulary. (B, S)"""
        return responses_only(self.net(self.pack_text(TextBatch(images, prompts, responses)))[0])

    def image_logps(self, prompts, images, masks, guidance_scale: float = 0.0) -> LogProbs:
        """log π(image | text): masked slots, whole vocabulary; guided: image codes. (B, S)"""
        batch = ImageBatch(prompts, images, masks, guidance_scale)
        return responses_only(self.net(self.pack_images(batch))[0])

    def pair_logps(self, text: TextBatch, image: ImageBatch) -> tuple[LogProbs, LogProbs]:
        """Both of the above in one call of the network, as DDP and FSDP need it."""
        und, gen = self.net(self.pack_text(text), self.pack_images(image))
        return responses_only(und), responses_only(gen)

    def training_masks(self, seeds: list[int]) -> torch.Tensor:
        """(B, N) bool, one cosine-schedule mask per seed."""
        return torch.stack([random_mask(self.image_tokens, seed) for seed in seeds])

    def pack_text(self, batch: TextBatch) -> Pack:
        """An image, and behind it the question with each response."""
        codes = self.codes_of(batch.images).tolist()
        all_ended = [[True] * len(responses) for responses in batch.responses]
        ended = batch.ended or all_ended
        rows = []
        for image, prompt, *texts in zip(codes, batch.prompts, batch.responses, ended):
            question = self.tokens.text_prompt(prompt)
            row = [Segment(self.tokens.mmu_prompt(image), bidirectional=True)]
            for ids, has_ended in zip(*texts):
                row.append(answer_segment(question, ids + [self.tokens.eot] * has_ended))
            rows.append(row)
        return pack(rows, self.tokens.pad, self.device)

    def pack_images(self, batch: ImageBatch) -> Pack:
        """A text, and behind it its images under one mask; for guidance, behind no text, too."""
        images = []
        for codes, mask in zip(batch.images.tolist(), batch.masks.tolist()):
            images.append([image_segment(self.tokens, c, mask) for c in codes])

        def behind(prompts: list[str]) -> Pack:
            texts = [Segment(self.tokens.t2i_prompt(p)) for p in prompts]
            rows = [[text, *segments] for text, segments in zip(texts, images)]
            return pack(rows, self.tokens.pad, self.device)

        cond = behind(batch.prompts)
        if not batch.guidance_scale:
            return cond
        uncond = behind([""] * len(batch.prompts))
        return cond._replace(uncond=uncond, guidance_scale=batch.guidance_scale)

    def check_prompt(self, text: str, where: str) -> None:
        """Raises InputError if a question does not fit behind an image."""
        room = self.phi.max_position_embeddings - self.image_tokens - 3
        if len(self.tokens.text_prompt(text)) > room:
            raise InputError(f"{where} does not fit into {room} tokens")


def responses_only(segments: tuple[torch.Tensor, torch.Tensor]) -> LogProbs:
    """(B, 1 + S) sums and counts of a pack, without the prefix."""
    sums, counts = segments
    return LogProbs(sums[:, 1:], counts[:, 1:])


# ------------------------------------------------------------------------------- loading and saving

def load(name, image_tokenizer=None, text_tokenizer=None, device="cpu",
         dtype=torch.float32) -> Model:
    """Load a checkpoint folder or hub id: the published layout, or ours with both tokenizers.

    The image tokenizer stays float32. Raises InputError naming what is missing or does not fit.
    """
    config = read_showo_config(name)
    where = f"{name}/config.json"
    own = {p.name: str(p) for p in Path(name).glob("*/")}  # our folders hold both tokenizers
    phi = phi_config(name, config.get("llm_model_path", TEXT_TOKENIZER))
    tokenizer = load_tokenizer(text_tokenizer or own.get("tokenizer") or TEXT_TOKENIZER)
    net = build_showo(config, phi, tokenizer, where)
    load_checkpoint(net, name, dtype)
    # not among the weights, and float32 in every precision
    net.showo.model.rotary_emb = PhiRotaryEmbedding(phi)
    vq = load_magvit(image_tokenizer or own.get("magvitv2") or IMAGE_TOKENIZER)
    if 2**vq.config.bits != net.tokens.codes:
        message = f"is {net.tokens.codes}, the image tokenizer has {2**vq.config.bits} codes"
        raise InputError(f"{where}: field 'codebook_size' {message}")
    return Model(net.to(device).eval(), vq.to(device))


def load_from(args) -> Model:
    """The checkpoint that a stage's model options name, on the device of this process."""
    device = args.device or processes().device
    dtype = getattr(torch, args.dtype)
    return load(args.model, args.image_tokenizer, args.text_tokenizer, device, dtype)


def save(model: Model, folder, weights: dict | None = None) -> None:
    """Write one self-contained checkpoint folder, in float32, under the published names.

    weights: the network's parameters if they are not in the model itself (sharded training). The
    original program reads all of it; hermesflow/README.md says which of its settings names what.
    """
    config = {**model.config, "_class_name": "Showo"}
    with atomic(folder) as temporary:
        temporary.mkdir()
        if Path(config.get("llm_model_path", "")).name != "phi-1_5":
            config["llm_model_path"] = "phi_config.json"
            sizes = json.dumps(phi_fields(model.phi), indent=1) + "\n"
            (temporary / "phi_config.json").write_text(sizes)
        (temporary / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        weights = full_precision(weights or model.net.state_dict())
        save_file(weights, temporary / "pytorch_model.safetensors", {"format": "pt"})
        save_magvit(model.vq, temporary / "magvitv2")
        save_tokenizer(model.tokens.tokenizer, temporary / "tokenizer")
