"""Janus (https://arxiv.org/abs/2501.17811) through transformers: the methods that stages call.

Its checkpoints are transformers' own, such as deepseek-community/Janus-Pro-1B. Shapes in comments:
B rows, S responses behind one prompt, N image tokens, D size of a latent, C image codes.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoProcessor, JanusForConditionalGeneration

from hermesflow.checkpoints import SIZE, check_fields, load_hf, only_errors, refuse, save_tokenizer
from hermesflow.files import InputError
from hermesflow.janus_net import Janus, Tokens
from hermesflow.options import ImageSampling
from hermesflow.packed import (ImageBatch, LogProbs, Pack, Segment, TextBatch, answer_segment, pack,
                               responses_only)
from hermesflow.pictures import open_image
from hermesflow.prefixes import rows_alike, write_texts
from hermesflow.sampling import Generated, TextRequest, uniforms
from hermesflow.weights import convert

IMAGES_AT_ONCE = 32  # drawn together: of Janus-Pro-1B, keys and values of 8 GB in bfloat16
LAYERS = {"hidden_size": SIZE, "num_hidden_layers": (int, 1000), "num_attention_heads": SIZE}


class Model:
    """Janus with its image tokenizer. `net` is the module that accelerate prepares."""

    def __init__(self, net: Janus, vq, processor):
        self.net = net
        self.vq = vq
        self.processor = processor
        self.janus = net.janus
        self.tokens = net.tokens
        vision = net.janus.config.vision_config
        self.image_tokens = vision.num_image_tokens  # N
        self.image_size = vision.image_size  # pixels
        self.code_count = vq.config.num_embeddings
        self.vocab_size = net.janus.config.text_config.vocab_size
        self.longest_prompt = net.tokens.longest
        mean, std = processor.image_processor.image_mean, processor.image_processor.image_std
        self.mean = torch.tensor(mean).view(-1, 1, 1)  # as SigLIP was trained
        self.std = torch.tensor(std).view(-1, 1, 1)

    @property
    def device(self):
        return next(self.net.parameters()).device

    # --------------------------------------------------------------------------- images and texts

    @torch.inference_mode()
    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) pixels in [-1, 1] -> (B, N) codes.

        The nearest unit vector to the unit latent, as the image tokenizer was trained and as its
        decoder reads codes; transformers' `encode` compares vectors of any length.
        """
        codebook = F.normalize(self.vq.quantize.embedding.weight, dim=-1)  # (C, D)
        codes = []
        for p in pixels.split(1):  # convolutions of other batches round differently
            latents = self.vq.quant_conv(self.vq.encoder(p.to(codebook)))  # (1, D, h, w)
            latents = F.normalize(latents.flatten(2).mT, dim=-1)  # (1, N, D)
            codes.append((latents @ codebook.T).argmax(-1))
        return torch.cat(codes).to(self.device)

    @torch.inference_mode()
    def decode_image(self, codes: torch.Tensor) -> torch.Tensor:
        """(B, N) codes -> (B, 3, H, W) pixels, about [-1, 1]."""
        return torch.cat([self.vq.decode(c.to(self.vq.device)) for c in codes.split(1)])

    def looked_at(self, files: list, codes: torch.Tensor | None = None) -> torch.Tensor:
        """What texts about image files are behind: whole pictures, of which codes keep a part.

        (B, 3, H, W) in [-1, 1], fitted as the checkpoint's processor says: the rest is grey.
        """
        values = self.processor.image_processor(list(map(open_image, files)), return_tensors="pt")
        return (values.pixel_values * self.std + self.mean) * 2 - 1

    def pixels_of(self, images: torch.Tensor) -> torch.Tensor:
        """Codes (B, N) as the 8-bit pixels of a picture, pixels in [-1, 1] -> as SigLIP wants."""
        if not images.is_floating_point():
            images = self.decode_image(images).clamp(-1, 1).add(1).mul(127.5).round() / 127.5 - 1
        pixels = ((images + 1) / 2 - self.mean.to(images)) / self.std.to(images)
        return pixels.to(self.device)

    def encode_text(self, text: str) -> list[int]:
        return self.tokens.encode(text)

    def decode_text(self, ids: list[int]) -> str:
        return self.tokens.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def prompt_length(self, text: str) -> int:
        """Tokens of a text to draw from; beyond `longest_prompt`, it is cut."""
        return len(self.tokens.t2i_prompt(text, cut=False))

    def check_prompt(self, text: str, where: str) -> None:
        """Raises InputError if a question does not fit behind an image."""
        room = self.janus.config.text_config.max_position_embeddings - len(self.tokens.look.head)
        if len(self.tokens.text_prompt(text)) > room:
            raise InputError(f"{where} does not fit into {room} tokens")

    # --------------------------------------------------------------------------------- generation

    @torch.inference_mode()
    def generate_text(self, images: torch.Tensor, requests: list[TextRequest],
                      max_new_tokens: int = 100, progress=iter) -> list[Generated]:
        """One text per request. progress: wraps the steps, as tqdm does."""
        return write_texts(self.net, self.pixels_of(images), requests, max_new_tokens, progress)

    @torch.inference_mode()
    def generate_images(self, prompts: list[str], seeds: list[int] | None,
                        sampling: ImageSampling) -> torch.Tensor:
        """One image per prompt, (B, N) codes. seeds: one per image; None: greedy decoding."""
        ids = [self.tokens.t2i_prompt(p) for p in prompts]
        N = self.image_tokens
        codes = torch.empty(len(prompts), N, dtype=torch.long, device=self.device)
        for rows in rows_alike(ids, IMAGES_AT_ONCE):
            draws = None
            if seeds is not None:
                draws = torch.stack([uniforms(seeds[i], N) for i in rows]).to(self.device)
            codes[rows] = self.net.draw([ids[i] for i in rows], draws, sampling)
        return codes

    # ---------------------------------------------------------------------------------- log-probs

    def text_logps(self, images, prompts, responses) -> LogProbs:
        """log π(response | image, question): its tokens and the end, whole vocabulary. (B, S)"""
        packed = self.pack_text(TextBatch(images, prompts, responses))
        return responses_only(self.net(packed)[0], len(responses[0]))

    def image_logps(self, prompts, images, masks=None, guidance_scale=0.0, texts=None) -> LogProbs:
        """log π(image | text): the sum over its codes, guided or not. (B, S)"""
        batch = ImageBatch(prompts, images, masks, guidance_scale, texts)
        return responses_only(self.net(self.pack_images(batch))[0], images.shape[1])

    def pair_logps(self, text: TextBatch, image: ImageBatch) -> tuple[LogProbs, LogProbs]:
        """Both of the above in one call of the network, as DDP and FSDP need it."""
        und, gen = self.net(self.pack_text(text), self.pack_images(image))
        return (responses_only(und, len(text.responses[0])),
                responses_only(gen, image.images.shape[1]))

    def training_masks(self, seeds: list[int]) -> None:
        """Images are autoregressive: all codes are scored, and none is masked."""

    def pack_text(self, batch: TextBatch) -> Pack:
        """An image, and behind it the question with each response."""
        ended = batch.ended or [[True] * len(responses) for responses in batch.responses]
        rows = []
        for prompt, *texts in zip(batch.prompts, batch.responses, ended):
            question = self.tokens.text_prompt(prompt)
            row = [Segment(self.tokens.look.head)]
            for ids, has_ended in zip(*texts):
                row.append(answer_segment(question, ids + [self.tokens.eot] * has_ended))
            rows.append(row)
        packed = pack(rows, self.tokens.pad, self.device)
        return packed._replace(pixels=self.pixels_of(batch.images))

    def pack_images(self, batch: ImageBatch) -> Pack:
        """A text, and behind it its images; for guidance, behind no text, too.

        The prompt's last token, which begins an image, predicts its first code.
        """
        cond = []
        for prompt, text in zip(batch.prompts, batch.texts or batch.prompts):
            ids = self.tokens.t2i_prompt(text)
            cond.append(ids if prompt else self.tokens.without(ids))

        def behind(prompts: list[list[int]]) -> Pack:
            rows = []
            for ids, images in zip(prompts, batch.images.tolist()):
                row = [Segment(ids[:-1])]
                row += [Segment([*ids[-1:], *codes[:-1]], codes) for codes in images]
                rows.append(row)
            return pack(rows, self.tokens.pad, self.device)

        if not batch.guidance_scale:
            return behind(cond)
        uncond = behind(list(map(self.tokens.without, cond)))
        return behind(cond)._replace(uncond=uncond, guidance_scale=batch.guidance_scale)

    def write(self, folder: Path, weights: dict) -> None:
        """Write a checkpoint as transformers does. weights: of `net`, by their names there."""
        weights = {name.removeprefix("janus."): value for name, value in weights.items()}
        vq = {f"model.vqmodel.{name}": value for name, value in self.vq.state_dict().items()}
        with only_errors():
            self.janus.save_pretrained(folder, state_dict=weights | vq, max_shard_size="1TB")
        self.processor.save_pretrained(folder)
        save_tokenizer(self.processor.tokenizer, folder)


# ----------------------------------------------------------------------------------------- loading

def load(name, _, image_tokenizer=None, text_tokenizer=None, device="cpu",
         dtype=torch.float32) -> Model:
    """A checkpoint folder or hub id; the image tokenizer stays float32.

    Raises InputError naming what is missing or does not fit.
    """
    if image_tokenizer or text_tokenizer:
        raise InputError(f"{name}: Janus has its own tokenizers, and takes no others")
    config = load_hf(AutoConfig, name)
    check_config(config, f"{name}/config.json")
    text = config.text_config
    vision = config.vision_config
    for part in (text, vision, config.vq_config):  # policy and reference agree at step 0
        for field in vars(part):
            if "dropout" in field:
                setattr(part, field, 0.0)
    processor = load_hf(AutoProcessor, name, backend="pil")  # the same pixels everywhere
    if dict(processor.image_processor.size).get("height") != vision.image_size:
        message = f"its processor's images are not {vision.image_size} pixels wide"
        raise InputError(f"{name}: {message}, as config.json says")
    longest = text.max_position_embeddings - vision.num_image_tokens
    tokens = Tokens(processor, vision.num_image_tokens, longest, name)
    if len(tokens.tokenizer) > text.vocab_size:
        message = f"is {text.vocab_size}, the tokenizer has {len(tokens.tokenizer)} tokens"
        raise InputError(f"{name}/config.json: field 'text_config.vocab_size' {message}")

    janus = load_hf(JanusForConditionalGeneration, name, config=config, dtype=torch.float32)
    vq = janus.model._modules.pop("vqmodel").requires_grad_(False)
    for module, precision in ((janus, dtype), (vq, torch.float32)):
        for field, p in module.named_parameters():
            p.data = convert(p.data, p.data, precision, f"{name}: parameter {field}")
    janus.model.language_model.config._attn_implementation = "packed"
    return Model(Janus(janus, tokens).to(device).eval(), vq.to(device), processor)


def check_config(config, where: str) -> None:
    """Raises InputError if parts do not fit together, or are not what this file is about."""
    text, vision, vq = config.text_config, config.vision_config, config.vq_config
    if text.model_type != "llama":
        refuse(where, "text_config.model_type", "'llama'", text.model_type)
    for part in (text, vision):
        check_fields(vars(part), LAYERS, where)
    check_fields(vars(vision), dict.fromkeys(("image_size", "patch_size"), SIZE), where)
    D = text.hidden_size
    tokens = (vision.image_size // vision.patch_size) ** 2
    patch = 2 ** (len(vq.channel_multiplier) - 1)  # of the image tokenizer
    for field, wanted, found in (
            ("text_config.num_key_value_heads", text.num_attention_heads, text.num_key_value_heads),
            ("vision_config.num_image_tokens", tokens, vision.num_image_tokens),
            ("vision_config.patch_size", patch, vision.patch_size),
            ("vision_config.projection_dim", D, vision.projection_dim),
            ("vq_config.projection_dim", D, vq.projection_dim),
            ("vq_config.image_token_embed_dim", D, vq.image_token_embed_dim)):
        if found != wanted:
            refuse(where, field, str(wanted), found)
