"""The toy's Show-o before its training, for pretrain.py: sizes, tokenizers, rows to read."""

import torch
from transformers import PhiConfig, PreTrainedTokenizerFast

from hermesflow.magvit import Magvit, MagvitConfig
from hermesflow.packed import Pack, Segment, pack
from hermesflow.showo import Showo, Tokens
from model import Model
from toy import world
from toy.alphabet import BITS, scene_codes, word_tokenizer

MAGVIT = MagvitConfig(ch=32, bits=BITS,
                      encoder_mult=(1, 1, 1, 2, 2), encoder_blocks=(0, 1, 1, 1, 1),
                      decoder_mult=(1, 1, 1, 2, 2), decoder_blocks=(0, 1, 1, 1, 1))
PHI = dict(hidden_size=160, intermediate_size=640, num_hidden_layers=4, num_attention_heads=4,
           max_position_embeddings=512)
DRAWN = 32  # images to draw in a step of training
TOKENIZER_LR, LR = 2e-3, 2e-3


def text_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """One token per word. Show-o's special tokens are not in it."""
    words = word_tokenizer(["<|endoftext|>", "<|unk|>", *words])
    return PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<|endoftext|>", eos_token="<|endoftext|>",
        unk_token="<|unk|>", clean_up_tokenization_spaces=False)


def image_tokenizer() -> Magvit:
    """MAGVIT-v2 as published, but small."""
    return Magvit(MAGVIT)


def signs(vq: Magvit, pixels: torch.Tensor) -> torch.Tensor:
    """(B, 3, 64, 64) pixels -> (B, bits, 4, 4), whose signs are the bits of codes."""
    return vq.encoder(pixels)


def picture(vq: Magvit, bits: torch.Tensor) -> torch.Tensor:
    """(B, bits, 4, 4) of ±1 -> (B, 3, 64, 64) pixels."""
    return vq.decoder(bits)


def new_model(vq: Magvit) -> Model:
    """Random weights, except that codes which share bits begin alike."""
    tokenizer = text_tokenizer(world.vocabulary())
    text = len(tokenizer)
    codes = 2**BITS
    size = text + len(Tokens.SPECIAL) + codes + 1
    config = dict(vocab_size=size, llm_vocab_size=text, codebook_size=codes,
                  num_vq_tokens=world.GRID**2, mask_token_id=size - 1,
                  llm_model_path="phi_config.json", load_from_showo=True, w_clip_vit=False)
    net = Showo(config, PhiConfig(**PHI), Tokens(tokenizer, codes, world.GRID**2))
    # of a new one: toy/base was made so, and its random weights come before those below
    bits = image_tokenizer().quantize.embedding  # (C, bits) of ±1
    rows = slice(net.tokens.first_code, net.tokens.mask)
    with torch.no_grad():
        for weight in (net.showo.model.embed_tokens.weight, net.showo.lm_head.weight):
            weight[rows] = bits @ torch.randn(BITS, weight.shape[1]) * 0.02
    return Model(net, vq)


def reading_pack(model: Model, grids, answers: list[list[Segment]]) -> Pack:
    """Images of (B, 4, 4) grids, and behind each its answers."""
    rows = []
    for codes, segments in zip(scene_codes(grids).tolist(), answers):
        rows.append([Segment(model.tokens.mmu_prompt(codes), bidirectional=True), *segments])
    return pack(rows, model.tokens.pad)
