"""A tiny random Show-o with its tokenizers, in memory or as a checkpoint folder."""

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PhiConfig, PreTrainedTokenizerFast

from hermesflow.magvit import Magvit, MagvitConfig
from hermesflow.packed import pack
from hermesflow.showo import Showo, build_showo
from model import Model

WORDS = ("user assistant give a caption for this image question choice yes no big small red blue "
         "ring square left of").split()
END = "<|endoftext|>"


def tiny_tokenizer():
    vocabulary = {w: i for i, w in enumerate([END, "<|unk|>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+"), "removed", invert=True)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END,
                                   unk_token="<|unk|>")


def tiny_model(seed: int = 0, bits: int = 5, spread: float = 6.0) -> Model:
    """16 image tokens of 16 px, 2^bits codes, 2 layers; spread weights make decided choices."""
    tokenizer = tiny_tokenizer()
    text = len(tokenizer)
    codes = 2**bits
    mask = text + 10 + codes
    config = dict(vocab_size=mask + 1, llm_vocab_size=text, codebook_size=codes, num_vq_tokens=16,
                  mask_token_id=mask, llm_model_path="phi_config.json", w_clip_vit=False,
                  load_from_showo=True)
    phi = PhiConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                    num_attention_heads=2, max_position_embeddings=256)
    tokens = build_showo(config, phi, tokenizer).tokens
    torch.manual_seed(seed)
    net = Showo(config, phi, tokens).eval()
    with torch.no_grad():
        for p in net.parameters():
            if p.ndim >= 2:
                p.mul_(spread)
            else:
                p.add_(0.1 * torch.randn_like(p))
    ones = (1, 1, 1, 1, 1)
    blocks = (0, 0, 0, 0, 1)
    vq = Magvit(MagvitConfig(32, bits, ones, blocks, ones, blocks))
    return Model(net, vq.eval().requires_grad_(False))


def row_logps(net: Showo, rows: list) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums and counts (B, S+1) of the log-probs of rows of segments."""
    return net(pack(rows, net.tokens.pad))[0]
