"""A tiny random Janus as a checkpoint folder in transformers' layout, with its processor."""

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import (JanusConfig, JanusForConditionalGeneration, JanusProcessor,
                          PreTrainedTokenizerFast)
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

from tiny import WORDS

SPECIAL = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>",
           "image_token": "<image_placeholder>", "boi_token": "<begin_of_image>",
           "eoi_token": "<end_of_image>"}
ROLES = ["<|User|>", "<|Assistant|>"]
# as the published one writes a question and the beginning of its answer
TEMPLATE = ("{% for m in messages %}<|User|>: {% for c in m['content'] %}"
            "{% if c['type'] == 'image' %}<image_placeholder>\n{% else %}{{ c['text'] }}{% endif %}"
            "{% endfor %}\n\n{% endfor %}{% if add_generation_prompt %}<|Assistant|>:{% endif %}")


def tiny_processor(image_tokens: int = 16, size: int = 16) -> JanusProcessor:
    words = [*SPECIAL.values(), *ROLES, *WORDS, ":", "helpful", "assistant", "."]
    vocabulary = {w: i for i, w in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|[:.]"), "removed", invert=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])])
    tokenizer.add_special_tokens(ROLES)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{name: SPECIAL[name] for name in list(SPECIAL)[:4]},
        extra_special_tokens={name: SPECIAL[name] for name in list(SPECIAL)[4:]})
    pictures = JanusImageProcessorPil(image_mean=[0.5] * 3, image_std=[0.5] * 3,
                                      size={"height": size, "width": size})
    return JanusProcessor(pictures, tokenizer, chat_template=TEMPLATE,
                          use_default_system_prompt=True, num_image_tokens=image_tokens)


def tiny_config(processor) -> JanusConfig:
    """16 image tokens of 4 px, 32 codes, 2 layers."""
    tokenizer = processor.tokenizer
    text = dict(model_type="llama", hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                num_attention_heads=2, num_key_value_heads=2, vocab_size=len(tokenizer) + 3,
                max_position_embeddings=256, pad_token_id=tokenizer.pad_token_id,
                bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    vision = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16,
                  patch_size=4, projection_dim=32, num_image_tokens=16)
    vq = dict(embed_dim=8, num_embeddings=32, latent_channels=32, base_channels=32,
              channel_multiplier=[1, 1, 1], num_res_blocks=1, projection_dim=32,
              image_token_embed_dim=32)
    return JanusConfig(text_config=text, vision_config=vision, vq_config=vq,
                       image_token_id=tokenizer.image_token_id, tie_word_embeddings=False)


def save_tiny(folder, seed: int = 0) -> None:
    """Spread weights make decided choices, which depend on images, too."""
    processor = tiny_processor()
    tokenizer = processor.tokenizer
    torch.manual_seed(seed)
    janus = JanusForConditionalGeneration(tiny_config(processor)).eval()
    with torch.no_grad():
        for name, p in janus.named_parameters():
            if p.ndim == 1:
                p.add_(0.1 * torch.randn_like(p))
            elif "embed" in name and "patch" not in name:
                p.normal_()
            else:
                p.normal_(std=1.5 * p[0].numel() ** -0.5)
    how = janus.generation_config
    how._from_model_config = False
    how.bos_token_id, how.pad_token_id, how.eos_token_id = (
        tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id)
    how.generation_kwargs = {"boi_token_id": tokenizer.boi_token_id}
    janus.save_pretrained(folder)
    processor.save_pretrained(folder)
