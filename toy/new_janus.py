"""The toy's Janus before its training, for pretrain.py: sizes, tokenizers, rows to read."""

import torch
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import (JanusConfig, JanusForConditionalGeneration, JanusProcessor,
                          JanusVisionModel, JanusVQVAE, PreTrainedTokenizerFast)
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

from hermesflow.janus import Model
from hermesflow.janus_net import Janus, Tokens
from hermesflow.packed import Pack, Segment, pack
from toy import world
from toy.alphabet import BITS, code_bits, render, word_tokenizer

SPECIAL = dict(bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<|unk|>")
OF_IMAGES = dict(image_token="<image>", boi_token="<begin_of_image>", eoi_token="<end_of_image>")
ROLES = ["<|user|>", "<|assistant|>"]
TEMPLATE = ("{% for m in messages %}<|user|>{% for c in m['content'] %}"
            "{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}"
            "{% endfor %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}")
PIXELS = world.GRID * world.CELL
WIDTH = 160
LLAMA = dict(model_type="llama", hidden_size=WIDTH, intermediate_size=432, num_hidden_layers=4,
             num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=256)
SIGLIP = dict(hidden_size=96, num_hidden_layers=2, num_attention_heads=4, mlp_ratio=2.0,
              image_size=PIXELS, patch_size=world.CELL, projection_dim=WIDTH, depth=2,
              num_image_tokens=world.GRID**2)
VQ = dict(embed_dim=BITS, num_embeddings=2**BITS, latent_channels=64, base_channels=32,
          channel_multiplier=[1, 1, 1, 1, 1], num_res_blocks=0, num_patches=world.GRID,
          projection_dim=WIDTH, image_token_embed_dim=WIDTH)
DRAWN = 3  # images to draw in a step of training
TOKENIZER_LR, LR = 6e-3, 1e-3


def new_processor() -> JanusProcessor:
    special = [*SPECIAL.values(), *OF_IMAGES.values(), *ROLES]
    words = word_tokenizer([*special, *world.vocabulary()])
    words.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    words.add_special_tokens(ROLES)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, **SPECIAL, extra_special_tokens=OF_IMAGES,
        clean_up_tokenization_spaces=False)
    pictures = JanusImageProcessorPil(image_mean=[0.5] * 3, image_std=[0.5] * 3,
                                      size={"height": PIXELS, "width": PIXELS})
    return JanusProcessor(pictures, tokenizer, chat_template=TEMPLATE,
                          use_default_system_prompt=False, num_image_tokens=world.GRID**2)


def new_config(tokenizer) -> JanusConfig:
    ids = dict(pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
               eos_token_id=tokenizer.eos_token_id)
    return JanusConfig(text_config=LLAMA | ids | dict(vocab_size=len(tokenizer)),
                       vision_config=SIGLIP, vq_config=VQ,
                       image_token_id=tokenizer.image_token_id, tie_word_embeddings=False)


class Eyes(nn.Module):
    """Janus' image tokenizer, and its SigLIP with a head that tells the bits of what it sees.

    The tokenizer's code vectors are signs, and stay so.
    """

    def __init__(self, config: JanusConfig):
        super().__init__()
        self.vq = JanusVQVAE(config.vq_config)
        self.vq.quantize.embedding.weight.requires_grad_(False).copy_(code_bits())
        self.siglip = JanusVisionModel(config.vision_config)
        self.head = nn.Linear(config.vision_config.hidden_size, BITS)


def image_tokenizer() -> Eyes:
    return Eyes(new_config(new_processor().tokenizer))


def signs(eyes: Eyes, pixels: torch.Tensor) -> torch.Tensor:
    """(B, 3, 64, 64) pixels -> (2, B, bits, 4, 4), whose signs are bits: of codes, and as seen."""
    codes = eyes.vq.quant_conv(eyes.vq.encoder(pixels))
    seen = eyes.head(eyes.siglip(pixels).last_hidden_state)  # (B, N, bits)
    return torch.stack([codes, seen.mT.unflatten(2, (world.GRID, world.GRID))])


def picture(eyes: Eyes, bits: torch.Tensor) -> torch.Tensor:
    """(B, bits, 4, 4) of ±1 -> (B, 3, 64, 64) pixels. The decoder reads unit vectors."""
    return eyes.vq.decoder(eyes.vq.post_quant_conv(bits / BITS**0.5))


def new_model(eyes: Eyes) -> Model:
    """Random weights but for the eyes', and codes which share bits begin alike."""
    processor = new_processor()
    janus = JanusForConditionalGeneration(new_config(processor.tokenizer))
    janus.model._modules.pop("vqmodel")
    janus.model.vision_model = eyes.siglip
    to_codes = janus.model.generation_head.vision_head.weight.data  # (C, D)
    to_codes.copy_(code_bits() @ torch.randn(BITS, to_codes.shape[1]) * 0.02)
    janus.model.generation_embeddings.weight.data.copy_(code_bits())
    janus.model.language_model.config._attn_implementation = "packed"
    longest = LLAMA["max_position_embeddings"] - world.GRID**2
    tokens = Tokens(processor, world.GRID**2, longest, "toy/new_janus.py")
    return Model(Janus(janus, tokens), eyes.vq.requires_grad_(False), processor)


def reading_pack(model: Model, grids, answers: list[list[Segment]]) -> Pack:
    """Images of (B, 4, 4) grids, and behind each its answers."""
    head = Segment(model.tokens.look.head)
    packed = pack([[head, *segments] for segments in answers], model.tokens.pad)
    return packed._replace(pixels=model.pixels_of(render(grids)))
