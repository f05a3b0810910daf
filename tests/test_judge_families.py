"""evals/judge_models.py: seven families of judges, as they are published, with random weights.

Every folder has the files, the special tokens and the chat template of its family. The processors
of five of them also read videos, for which transformers wants torchvision.
"""

import json
from typing import NamedTuple

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (AutoImageProcessor, AutoModelForImageTextToText, Gemma3Config,
                          Idefics3Config, InternVLConfig, LlavaNextVideoConfig,
                          LlavaOnevisionConfig, Mistral3Config, PreTrainedTokenizerFast,
                          Qwen2_5_VLConfig, Qwen3VLConfig, SmolVLMConfig)
from transformers.utils import is_torchvision_available

from evals import judge_models
from evals.judge_models import ModelJudge, load_processor, torchvision_command
from hermesflow.files import InputError
from hermesflow.records import Question
from hermesflow.scoring import nearest_text

QUESTIONS = [Question("what color is it?", ["red", "blue", "green"], "blue"),
             Question("how many?", ["one", "two"], "two"),
             Question("is the ring left of the cross, or is it the other way round?",
                      ["left", "right"], "left"),
             Question("is it red?", ["yes", "no"], "no"),
             Question("why?", ["a", "b"], "a")]


def picture_of(seed: int) -> Image.Image:
    noise = torch.rand(8, 8, 3, generator=torch.Generator().manual_seed(seed)) * 255
    return Image.fromarray(noise.byte().numpy()).resize((64, 64))


PICTURE = picture_of(0)

# ------------------------------------------------------------------------------ the chat templates

QWEN = (
    "{% for message in messages %}SYSTEM<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' or 'image' in content "
    "or 'image_url' in content %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SYSTEM = ("{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
          "You are a helpful assistant.<|im_end|>\n{% endif %}")
ONEVISION = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ '\n' + content['text'] }}{% endfor %}{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
INTERNVL = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "{{ '<IMG_CONTEXT>\n' }}{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}"
    "{% endfor %}{{'<|im_end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}"
)
IDEFICS = (
    "BEGIN{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}{{ '<start_of_turn>' + message['role'] + '\n' }}"
    "{% for item in message['content'] %}{% if item['type'] == 'image' %}{{ '<start_of_image>' }}"
    "{% elif item['type'] == 'text' %}{{ item['text'] | trim }}{% endif %}{% endfor %}"
    "{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)

# ------------------------------------------------------------------------------------- the families

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())  # ids 0 to 255; special tokens follow
TEXT = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=16, vocab_size=320)
VISION = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
GRID = dict(depth=2, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=32)
ROTATED = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
QWEN_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>",
               "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
NORMAL = dict(image_mean=[0.5] * 3, image_std=[0.5] * 3, do_resize=True, do_rescale=True,
              do_normalize=True)


class Family(NamedTuple):
    config: object
    tokens: list[str]  # special ones: from id 256 on
    ends: tuple  # bos, eos, pad
    template: str
    files: dict  # name -> content
    tokenizer: dict = {}  # more of tokenizer_config.json


def published(processor: str, image_processor: str, settings: dict, **processor_config) -> dict:
    files = {"preprocessor_config.json": {"processor_class": processor, **NORMAL,
                                          "image_processor_type": image_processor, **settings}}
    if processor_config:
        files["processor_config.json"] = {"processor_class": processor, **processor_config}
    return files


def qwen(config, template: str, patch: int) -> Family:
    places = dict(image_token_id=261, video_token_id=262, vision_start_token_id=259,
                  vision_end_token_id=260)
    processor = type(config).__name__.replace("Config", "Processor")
    settings = dict(min_pixels=4 * patch**2, max_pixels=64 * patch**2, patch_size=patch,
                    temporal_patch_size=2, merge_size=2)
    if patch == 16:
        settings["size"] = {"shortest_edge": settings.pop("min_pixels"),
                            "longest_edge": settings.pop("max_pixels")}
    for name, value in places.items():
        setattr(config, name, value)
    files = published(processor, "Qwen2VLImageProcessorFast", settings)
    if patch == 16:
        files["video_preprocessor_config.json"] = {"video_processor_type": "Qwen3VLVideoProcessor"}
    return Family(config, QWEN_TOKENS, (None, "<|im_end|>", "<|endoftext|>"), template, files,
                  {"tokenizer_class": "Qwen2Tokenizer"})


def qwen25() -> Family:
    vision = dict(patch_size=14, window_size=56, fullatt_block_indexes=[1], **GRID)
    text = {**TEXT, "rope_parameters": ROTATED}
    config = Qwen2_5_VLConfig(vision_config=vision, text_config=text)
    return qwen(config, QWEN.replace("SYSTEM", SYSTEM), 14)


def qwen3() -> Family:
    vision = dict(patch_size=16, num_position_embeddings=64, deepstack_visual_indexes=[0], **GRID)
    text = {**TEXT, "rope_parameters": {**ROTATED, "mrope_interleaved": True}}
    config = Qwen3VLConfig(vision_config=vision, text_config=text)
    return qwen(config, QWEN.replace("SYSTEM", ""), 16)


def onevision() -> Family:
    vision = dict(model_type="siglip_vision_model", image_size=28, patch_size=14,
                  vision_use_head=False, **VISION)
    pinpoints = [[28, 28], [28, 56], [56, 28], [56, 56]]
    config = LlavaOnevisionConfig(
        vision_config=vision, text_config={"model_type": "qwen2", **TEXT},
        image_token_index=259, video_token_index=260, image_grid_pinpoints=pinpoints)
    files = published("LlavaOnevisionProcessor", "LlavaOnevisionImageProcessor",
                      dict(size={"height": 28, "width": 28}, image_grid_pinpoints=pinpoints,
                           do_pad=True, resample=3),
                      num_image_tokens=4, vision_feature_select_strategy="full",
                      image_token="<image>", video_token="<video>")
    tokens = [*QWEN_TOKENS[:3], "<image>", "<video>"]
    return Family(config, tokens, (None, "<|im_end|>", "<|endoftext|>"), ONEVISION, files)


def internvl() -> Family:
    vision = dict(image_size=[28, 28], patch_size=[7, 7], **VISION)
    config = InternVLConfig(vision_config=vision, text_config={"model_type": "qwen2", **TEXT},
                            image_token_id=259, image_seq_length=4)
    files = published("InternVLProcessor", "GotOcr2ImageProcessorFast",
                      dict(size={"height": 28, "width": 28}, crop_to_patches=False, min_patches=1,
                           max_patches=12, resample=3, do_convert_rgb=True), image_seq_length=4)
    tokens = [*QWEN_TOKENS[:3], "<IMG_CONTEXT>", "<img>", "</img>", "<video>"]
    named = {"start_image_token": "<img>", "end_image_token": "</img>",
             "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"}
    return Family(config, tokens, (None, "<|im_end|>", "<|endoftext|>"), INTERNVL, files,
                  {"extra_special_tokens": named})


def idefics3() -> Family:
    config = Idefics3Config(vision_config=dict(image_size=28, patch_size=7, **VISION),
                            text_config={"model_type": "llama", **TEXT, "pad_token_id": 256},
                            image_token_id=259, scale_factor=2, pad_token_id=256)
    files = published("Idefics3Processor", "Idefics3ImageProcessor",
                      dict(size={"longest_edge": 56}, max_image_size={"longest_edge": 28},
                           do_image_splitting=True, do_pad=True, do_convert_rgb=True, resample=1),
                      image_seq_len=4)
    rows = [f"<row_{r}_col_{c}>" for r in (1, 2) for c in (1, 2)]
    tokens = ["<pad>", "<|begin_of_text|>", "<end_of_utterance>", "<image>",
              "<fake_token_around_image>", "<global-img>", *rows]
    return Family(config, tokens, ("<|begin_of_text|>", "<end_of_utterance>", "<pad>"),
                  IDEFICS.replace("BEGIN", "<|begin_of_text|>"), files)


def smolvlm() -> Family:
    """SmolVLM2: as Idefics3, and with videos."""
    family = idefics3()
    config = SmolVLMConfig(**{k: v for k, v in family.config.to_dict().items()
                              if k in ("image_token_id", "scale_factor", "pad_token_id")},
                           vision_config=dict(image_size=28, patch_size=7, **VISION),
                           text_config={"model_type": "llama", **TEXT, "pad_token_id": 256})
    files = json.loads(json.dumps(family.files).replace("Idefics3", "SmolVLM"))
    tokens = ["<pad>", "<|im_start|>", *family.tokens[2:], "<video>"]
    return family._replace(config=config, tokens=tokens, files=files,
                           ends=("<|im_start|>", "<end_of_utterance>", "<pad>"),
                           template=IDEFICS.replace("BEGIN", "<|im_start|>"))


def gemma3() -> Family:
    text = {**TEXT, "sliding_window": 16, "query_pre_attn_scalar": 16, "bos_token_id": 257,
            "eos_token_id": 258, "pad_token_id": 256,
            "layer_types": ["sliding_attention", "full_attention"]}
    vision = dict(image_size=28, patch_size=7, vision_use_head=False, **VISION)
    config = Gemma3Config(text_config=text, vision_config=vision, tie_word_embeddings=False,
                          mm_tokens_per_image=4, boi_token_index=261, eoi_token_index=262,
                          image_token_index=263)
    files = published("Gemma3Processor", "Gemma3ImageProcessor",
                      dict(size={"height": 28, "width": 28}, image_seq_length=4, resample=2),
                      image_seq_length=4)
    tokens = ["<pad>", "<bos>", "<end_of_turn>", "<start_of_turn>", "<unk>", "<start_of_image>",
              "<end_of_image>", "<image_soft_token>"]
    named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>",
             "image_token": "<image_soft_token>"}
    return Family(config, tokens, ("<bos>", "<end_of_turn>", "<pad>"), GEMMA, files,
                  {"extra_special_tokens": named})


FAMILIES = {f.__name__: f for f in (qwen25, qwen3, onevision, internvl, idefics3, smolvlm, gemma3)}


def save_family(folder, family: Family) -> None:
    words = Tokenizer(models.BPE({c: i for i, c in enumerate(BYTES)}, []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    words.add_special_tokens(family.tokens)
    bos, eos, pad = family.ends
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token=bos, eos_token=eos,
                                        pad_token=pad, padding_side="right",
                                        model_input_names=["input_ids", "attention_mask"])
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | family.tokenizer
    config["processor_class"] = family.files["preprocessor_config.json"]["processor_class"]
    path.write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(family.template)
    for name, content in family.files.items():
        (folder / name).write_text(json.dumps(content))
    torch.manual_seed(1)
    model = AutoModelForImageTextToText.from_config(family.config)
    # weights so large that answers depend on the question and on the picture
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.3)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id]
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)


@pytest.fixture(scope="module", params=FAMILIES)
def judge(request, tmp_path_factory):
    if request.param == "smolvlm":
        pytest.importorskip("num2words")
    folder = tmp_path_factory.mktemp(request.param)
    save_family(folder, FAMILIES[request.param]())
    return ModelJudge(str(folder), nearest_text, "cpu")


@torch.inference_mode()
def direct_answer(judge, model, picture, question: Question) -> str:
    """Greedy, of the model as transformers loads it."""
    text = (f"{question.question} Choose one of: {', '.join(question.choices)}. "
            "Answer with the choice only.")
    content = [{"type": "image", "image": picture}, {"type": "text", "text": text}]
    inputs = judge.processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True,
        return_dict=True, return_tensors="pt")
    more = {"crop_to_patches": True} if model.config.model_type == "internvl" else {}
    pixels = AutoImageProcessor.from_pretrained(judge.name)(picture, return_tensors="pt", **more)
    assert torch.equal(inputs["pixel_values"], pixels["pixel_values"])
    ids = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    return judge.processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :],
                                            skip_special_tokens=True).strip()


def test_answers_are_the_models_greedy_ones(judge):
    answers = judge.answer(PICTURE, QUESTIONS)
    model = AutoModelForImageTextToText.from_pretrained(judge.name).eval()
    assert answers == [direct_answer(judge, model, PICTURE, q) for q in QUESTIONS]
    assert len(set(answers)) > 1 and judge.answer(picture_of(1), QUESTIONS) != answers


@pytest.mark.parametrize("at_once", [2, 3])
def test_batches_answer_as_one_by_one(judge, monkeypatch, at_once):
    alone = [judge.answer(PICTURE, [q])[0] for q in QUESTIONS]
    together = judge.answer(PICTURE, QUESTIONS)
    sizes = []
    generate = judge.model.generate

    def recorded(**inputs):
        sizes.append(len(inputs["input_ids"]))
        return generate(**inputs)

    monkeypatch.setattr(judge.model, "generate", recorded)
    monkeypatch.setattr(judge_models, "JUDGED_AT_ONCE", at_once)
    assert judge.answer(PICTURE, QUESTIONS) == together == alone
    assert sizes == {2: [2, 2, 1], 3: [3, 2]}[at_once]


# ------------------------------------------------------------------------------------- torchvision


@pytest.mark.skipif(is_torchvision_available(), reason="torchvision is installed")
def test_processors_without_torchvision(tmp_path):
    """The family's own class, less the part for videos."""
    save_family(tmp_path, qwen25())
    loaded = load_processor(str(tmp_path), qwen25().config)
    assert type(loaded).__name__ == "Qwen2_5_VLProcessor" and "Pil" in str(loaded.image_processor)
    assert loaded.chat_template == qwen25().template


@pytest.mark.skipif(is_torchvision_available(), reason="torchvision is installed")
@pytest.mark.parametrize("name, config", [("PixtralProcessor", Mistral3Config),
                                          ("LlavaNextVideoProcessor", LlavaNextVideoConfig)])
def test_processors_that_need_torchvision(tmp_path, name, config):
    """One whole line ends in the command that installs torchvision and nothing else."""
    save_family(tmp_path, qwen25())
    for file in ("preprocessor_config.json", "tokenizer_config.json"):
        text = (tmp_path / file).read_text()
        (tmp_path / file).write_text(text.replace("Qwen2_5_VLProcessor", name))
    with pytest.raises(InputError) as error:
        load_processor(str(tmp_path), config())
    assert str(error.value) == f"{tmp_path}: its processor needs torchvision: {COMMANDS[0][1]}"


COMMANDS = [(torch.__version__, torchvision_command()),
            ("2.13.0", "pip install --no-deps torchvision==0.28.0"),
            ("2.8.1+cu128", "pip install --no-deps torchvision==0.23.1 "
                            "--index-url https://download.pytorch.org/whl/cu128")]


@pytest.mark.parametrize("version, command", COMMANDS)
def test_torchvision_command(monkeypatch, version, command):
    monkeypatch.setattr(torch, "__version__", version)
    assert torchvision_command() == command
