"""The unified model as the stages see it: images and texts in, images, texts and log-probs out.

The class here is Show-o's. Another backbone is one more file like hermesflow/janus.py, a class with
these methods, which `load` picks by config.json. Images are everywhere (B, N) long codes or
(B, 3, H, W) float pixels in [-1, 1].

Shapes in comments: B rows, S responses behind one prompt, N image tokens, R texts, V vocabulary.
"""

import json
from importlib import import_module
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers.models.phi.modeling_phi import PhiRotaryEmbedding

from hermesflow.checkpoints import (load_tokenizer, phi_config, phi_fields, read_config,
                                    refuse_clip_vit, save_tokenizer)
from hermesflow.files import InputError, atomic
from hermesflow.magvit import Magvit, load_magvit, save_magvit
from hermesflow.options import BACKBONES, IMAGE_TOKENIZER, TEXT_TOKENIZER, ImageSampling
from hermesflow.packed import (ImageBatch, LogProbs, Pack, Segment, TextBatch, answer_segment, pack,
                               responses_only)
from hermesflow.pictures import load_image
from hermesflow.prefixes import GuidedLogits, rows_alike, write_texts
from hermesflow.runs import processes
from hermesflow.sampling import Generated, TextRequest, maskgit_decode, random_mask, uniforms
from hermesflow.showo import Showo, build_showo, image_segment
from hermesflow.weights import full_precision, load_checkpoint

IMAGE_TOKENS_AT_ONCE = 4096  # decoded in one forward pass: enough to fill a processor


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

    def looked_at(self, files: list, codes: torch.Tensor | None = None) -> torch.Tensor:
        """What texts about image files are behind: their codes (B, N), if those are known."""
        if codes is not None:
            return codes
        return torch.stack([load_image(file, self.image_size) for file in files])  # (B, 3, H, W)

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
        """One text per request. progress: wraps the steps, as tqdm does."""
        images = self.codes_of(images)
        return write_texts(self.net, images, requests, max_new_tokens, progress)

    @torch.inference_mode()
    def generate_images(self, prompts: list[str], seeds: list[int] | None,
                        sampling: ImageSampling) -> torch.Tensor:
        """One image per prompt, (B, N) codes. seeds: one per image; None: greedy decoding."""
        ids = [self.tokens.t2i_prompt(p) for p in prompts]
        N = self.image_tokens
        codes = torch.empty(len(prompts), N, dtype=torch.long, device=self.device)
        for rows in rows_alike(ids, max(1, IMAGE_TOKENS_AT_ONCE // N)):
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
        packed = self.pack_text(TextBatch(images, prompts, responses))
        return responses_only(self.net(packed)[0], len(responses[0]))

    def image_logps(self, prompts, images, masks, guidance_scale=0.0, texts=None) -> LogProbs:
        """log π(image | text): masked slots, whole vocabulary; guided: image codes. (B, S)"""
        batch = ImageBatch(prompts, images, masks, guidance_scale, texts)
        return responses_only(self.net(self.pack_images(batch))[0], images.shape[1])

    def pair_logps(self, text: TextBatch, image: ImageBatch) -> tuple[LogProbs, LogProbs]:
        """Both of the above in one call of the network, as DDP and FSDP need it."""
        und, gen = self.net(self.pack_text(text), self.pack_images(image))
        return (responses_only(und, len(text.responses[0])),
                responses_only(gen, image.images.shape[1]))

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
        """A text, and behind it its images under each mask; for guidance, behind no text, too."""
        images = []
        all_masks = batch.masks.view(len(batch.prompts), -1, self.image_tokens)  # (B, K, N)
        for codes, masks in zip(batch.images.tolist(), all_masks.tolist()):
            images.append([image_segment(self.tokens, c, m) for m in masks for c in codes])

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

    def write(self, folder: Path, weights: dict) -> None:
        """Write a checkpoint under the published names, with both tokenizers.

        The original program reads all of it; hermesflow/README.md says which of its settings names
        what.
        """
        config = {**self.config, "_class_name": "Showo"}
        if Path(config.get("llm_model_path", "")).name != "phi-1_5":
            config["llm_model_path"] = "phi_config.json"
            sizes = json.dumps(phi_fields(self.phi), indent=1) + "\n"
            (folder / "phi_config.json").write_text(sizes)
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        save_file(weights, folder / "pytorch_model.safetensors", {"format": "pt"})
        save_magvit(self.vq, folder / "magvitv2")
        save_tokenizer(self.tokens.tokenizer, folder / "tokenizer")


# ------------------------------------------------------------------------------- loading and saving

def load(name, image_tokenizer=None, text_tokenizer=None, device="cpu", dtype=torch.float32):
    """The model of a checkpoint folder or hub id, of the backbone that its config.json names.

    Image tokenizers stay float32. Raises InputError naming what is missing or does not fit.
    """
    config = read_config(name)
    module = BACKBONES.get(str(config.get("model_type")))
    load_backbone = import_module(module).load if module else load_showo
    return load_backbone(name, config, image_tokenizer, text_tokenizer, device, dtype)


def load_showo(name, config: dict, image_tokenizer, text_tokenizer, device, dtype) -> Model:
    """Show-o in the published layout, or in ours with both tokenizers."""
    refuse_clip_vit(config, name)
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


def load_from(args):
    """The checkpoint that a stage's model options name, on the device of this process."""
    device = args.device or processes().device
    dtype = getattr(torch, args.dtype)
    return load(args.model, args.image_tokenizer, args.text_tokenizer, device, dtype)


def save(model, folder, weights: dict | None = None) -> None:
    """Write one self-contained checkpoint folder, in float32.

    weights: the network's parameters if they are not in the model itself (sharded training).
    """
    with atomic(folder) as temporary:
        temporary.mkdir()
        model.write(temporary, full_precision(weights or model.net.state_dict()))
