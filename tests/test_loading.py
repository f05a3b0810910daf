"""Checkpoints and images: every layout that can be read, what saving writes, broken files.

Whatever is broken gives one clear line.
"""

import dataclasses
import json
import os
import pickle
import subprocess
import sys
from types import SimpleNamespace

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PhiConfig, PreTrainedTokenizerFast
from transformers.models.phi.modeling_phi import PhiRotaryEmbedding

from conftest import GOLDEN, ROOT
from hermesflow import weights as reading
from hermesflow.checkpoints import load_tokenizer, phi_config, save_tokenizer
from hermesflow.files import InputError
from hermesflow.magvit import Magvit, MagvitConfig
from hermesflow.packed import Segment, answer_segment
from hermesflow.pictures import load_image
from hermesflow.showo import Tokens, build_showo, image_segment
from hermesflow.tables import check_codes, check_text_ids
from hermesflow.weights import load_weights
from model import Model, load, save
from tiny import row_logps, tiny_model
from toy import new_showo

TEXT = ("user assistant give a caption for this image big small red blue ring cross left of two "
        "three")
VQ = MagvitConfig(32, 4, (1, 1), (1, 1), (1, 1), (1, 1))  # 2 px per token, 16 codes
PHI = dict(  # nothing as in PhiConfig's defaults
    model_type="phi", hidden_size=16, intermediate_size=24, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=1, layer_norm_eps=1e-2, hidden_act="relu",
    max_position_embeddings=300, partial_rotary_factor=0.75, rope_theta=50.0, vocab_size=99)


def error(call, *args, **named) -> str:
    """The message of the InputError that the call must raise; it has to fit on one line."""
    with pytest.raises(InputError) as caught:
        call(*args, **named)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


def word_tokenizer(text: str = TEXT) -> PreTrainedTokenizerFast:
    return new_showo.text_tokenizer(text.split())


def random_weights(module) -> dict:
    weights = {}
    for name, value in module.state_dict().items():
        random = value.is_floating_point()
        weights[name] = torch.randn(value.shape) * 0.3 if random else value
    return weights


@pytest.fixture(scope="module")
def tiny() -> Model:
    """A random model, never saved."""
    torch.manual_seed(0)
    tokenizer = word_tokenizer()
    text = len(tokenizer)
    config = {"_class_name": "Showo", "w_clip_vit": False, "vocab_size": text + 10 + 16 + 1,
              "llm_vocab_size": text, "llm_model_path": "somewhere/phi.json",
              "codebook_size": 16, "num_vq_tokens": 4, "mask_token_id": text + 26}
    net = build_showo(config, PhiConfig.from_dict(PHI), tokenizer)
    load_weights(net, random_weights(net), "random")
    net.showo.model.rotary_emb = PhiRotaryEmbedding(net.showo.config)
    vq = Magvit(VQ)
    vq.load_state_dict({**random_weights(vq), "quantize.embedding": vq.quantize.embedding})
    return Model(net.eval(), vq.eval())


def copy_of(weights: dict) -> dict:
    return {k: v.clone() for k, v in weights.items()}


@torch.no_grad()
def behaviour(model: Model) -> list[torch.Tensor]:
    """Everything that weights and config decide.

    Log-probs of a text and of an image, codes and pixels of an image.
    """
    tokens = model.tokens
    answer = tokens.encode("a big red ring") + [tokens.eot]
    text_row = [Segment(tokens.mmu_prompt([3, 15, 0, 7]), bidirectional=True),
                answer_segment(tokens.text_prompt("what is this?"), answer)]
    image_row = [Segment(tokens.t2i_prompt("two small blue ring")),
                 image_segment(tokens, [1, 2, 3, 4], [True, False, True, True])]
    pixels = torch.linspace(-1, 1, 3 * 4 * 4).view(1, 3, 4, 4)
    codes = torch.tensor([[0, 5, 10, 15]])
    return [row_logps(model.net, [text_row])[0], row_logps(model.net, [image_row])[0],
            model.vq.encode(pixels), model.vq.decode(codes)]


def assert_same(loaded: Model, original: Model):
    for name in ("net", "vq"):
        ours = getattr(loaded, name).state_dict()
        theirs = getattr(original, name).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    for ours, theirs in zip(behaviour(loaded), behaviour(original)):
        torch.testing.assert_close(ours, theirs)


# ------------------------------------------------------------------------------- saving and loading


def test_save_and_load(tiny, tmp_path):
    save(tiny, tmp_path / "new" / "checkpoint")
    model = load(tmp_path / "new" / "checkpoint")
    assert_same(model, tiny)
    assert {**model.net.config, "llm_model_path": "somewhere/phi.json"} == tiny.net.config
    vq_config = dataclasses.asdict(model.vq.config)
    assert json.dumps(vq_config) == json.dumps(dataclasses.asdict(VQ))
    assert not model.net.training and not any(p.requires_grad for p in model.vq.parameters())
    save(model, tmp_path / "again")  # what was loaded can be saved: the next round does
    assert_same(load(tmp_path / "again"), tiny)


def test_save_replaces_the_old_checkpoint(tiny, tmp_path):
    save(tiny, tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "left over").write_text("x")
    other = {}
    for name, value in tiny.net.state_dict().items():
        other[name] = value + 1 if value.is_floating_point() else value
    save(tiny, tmp_path / "checkpoint", other)  # the weights given, not the model's
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint"]
    assert sorted(p.name for p in (tmp_path / "checkpoint").iterdir()) == [
        "config.json", "magvitv2", "phi_config.json", "pytorch_model.safetensors", "tokenizer"]
    loaded = load(tmp_path / "checkpoint").net.state_dict()
    assert all(torch.equal(loaded[k], other[k]) for k in other)


def test_saved_folder_is_what_the_original_reads(tiny, tmp_path):
    save(tiny, tmp_path)
    weights = load_file(tmp_path / "pytorch_model.safetensors")
    assert all(k.startswith("showo.") for k in weights)
    assert {"showo.model.embed_tokens.weight",
            "showo.model.layers.1.self_attn.q_layernorm.bias",
            "showo.model.layers.0.mlp.fc2.weight",
            "showo.model.final_layernorm.weight",
            "showo.lm_head.bias"} <= weights.keys()
    assert all(v.dtype == torch.float32 for v in weights.values())
    config = json.loads((tmp_path / "config.json").read_text())
    text = len(word_tokenizer())
    wanted = dict(_class_name="Showo", w_clip_vit=False, vocab_size=text + 27,
                  llm_vocab_size=text, codebook_size=16, num_vq_tokens=4, mask_token_id=text + 26)
    assert {k: config[k] for k in wanted} == wanted
    phi = json.loads((tmp_path / config["llm_model_path"]).read_text())
    assert {k: phi[k] for k in PHI} == {**PHI, "vocab_size": text + 27}
    assert phi["qk_layernorm"] is True


# names of classes that transformers 4.41, the original's, has
OLD_CLASSES = {"words": "PreTrainedTokenizerFast", "phi-1_5": "CodeGenTokenizer"}


@pytest.mark.parametrize("kind", OLD_CLASSES)
def test_saved_tokenizer_is_what_the_original_reads(tmp_path, kind):
    """The class has an old name, merges are "a b", and nothing says how it was loaded."""
    tokenizer = word_tokenizer()
    if kind == "phi-1_5":
        tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "phi-1_5-tokenizer")
    save_tokenizer(tokenizer, tmp_path / "one")
    config = json.loads((tmp_path / "one" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == OLD_CLASSES[kind]
    assert config["bos_token"] == config["eos_token"] == "<|endoftext|>"
    assert not {"backend", "is_local", "local_files_only", "extra_special_tokens"} & config.keys()
    content = json.loads((tmp_path / "one" / "tokenizer.json").read_text())["model"]
    if kind == "phi-1_5":
        golden = (GOLDEN / "phi-1_5-tokenizer" / "merges.txt").read_text().splitlines()
        merges = [line for line in golden if line and not line.startswith("#version")]
        assert content["merges"] == merges and len(merges) == 50000
        assert merges[:3] == ["Ġ t", "Ġ a", "h e"]

    loaded = load_tokenizer(tmp_path / "one")
    assert type(loaded).__name__ in (OLD_CLASSES[kind], "TokenizersBackend")
    assert len(loaded) == len(tokenizer)
    for text in ("a big red ring", "  Two small, blue rings!\n", "café 日本 🙂", "a<|endoftext|>b"):
        assert loaded(text).input_ids == tokenizer(text).input_ids
    save_tokenizer(loaded, tmp_path / "two")  # as every round does
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "two" / file).read_bytes() == (tmp_path / "one" / file).read_bytes()


def test_saved_tokenizer_keeps_its_special_tokens(tmp_path):
    tokenizer = word_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|a|>"], "pad_token": "[PAD]"})
    save_tokenizer(tokenizer, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["additional_special_tokens"] == ["<|a|>"]  # a list of the new name stops 4.57
    loaded = load_tokenizer(tmp_path)
    assert loaded.extra_special_tokens == ["<|a|>"] and loaded.pad_token == "[PAD]"
    assert len(loaded) == len(word_tokenizer()) + 2


def test_merges_that_have_no_old_form(tmp_path):
    """A part that holds a space can only be written in the new form."""
    bpe = models.BPE({"<|endoftext|>": 0, "a": 1, " ": 2, "a ": 3}, [("a", " ")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(bpe), bos_token="<|endoftext|>",
                                        eos_token="<|endoftext|>")
    save_tokenizer(tokenizer, tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    assert content["model"]["merges"] == [["a", " "]]
    assert load_tokenizer(tmp_path)("a a").input_ids == [3, 1]


def test_bfloat16_is_saved_in_full_precision(tiny, tmp_path):
    save(tiny, tmp_path / "one")
    model = load(tmp_path / "one", dtype=torch.bfloat16)
    assert {p.dtype for p in model.net.parameters()} == {torch.bfloat16}
    assert model.vq.decoder.conv_in.weight.dtype == torch.float32
    save(model, tmp_path / "two")
    saved = load_file(tmp_path / "two" / "pytorch_model.safetensors")
    original = tiny.net.state_dict()
    assert all(torch.equal(v, original[k].bfloat16().float()) for k, v in saved.items())


def test_phi_1_5_needs_no_file(tmp_path):
    phi = phi_config(tmp_path, "microsoft/phi-1_5")
    sizes = dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=24,
                 num_attention_heads=32, layer_norm_eps=1e-5, hidden_act="gelu_new",
                 num_key_value_heads=32, max_position_embeddings=2048)
    assert {k: getattr(phi, k) for k in sizes} == sizes
    assert phi.rope_parameters["partial_rotary_factor"] == 0.5
    assert phi.rope_parameters["rope_theta"] == 10000.0


# --------------------------------------------------------------------------------- published layout


@pytest.fixture
def published(tiny, tmp_path):
    """Show-o, image tokenizer and text tokenizer in three folders, as on the hub.

    The weights are not written yet.
    """
    folder = SimpleNamespace(showo=tmp_path / "showo", vq=tmp_path / "vq", text=tmp_path / "text",
                             config=dict(tiny.net.config), weights=copy_of(tiny.net.state_dict()))
    folder.showo.mkdir()
    folder.vq.mkdir()
    (folder.showo / "config.json").write_text(json.dumps(folder.config))
    phi = {**PHI, "qk_layernorm": False}  # the original forces it on
    (folder.showo / "phi.json").write_text(json.dumps(phi))
    vq_config = {**dataclasses.asdict(VQ), "_class_name": "MAGVITv2"}
    (folder.vq / "config.json").write_text(json.dumps(vq_config))
    torch.save(tiny.vq.state_dict(), folder.vq / "pytorch_model.bin")
    word_tokenizer().save_pretrained(folder.text)
    folder.load = lambda: load(str(folder.showo), str(folder.vq), str(folder.text))

    def change(**changed):
        (folder.showo / "config.json").write_text(json.dumps({**folder.config, **changed}))

    folder.change = change
    return folder


def write_bin(folder, weights: dict, new_format: bool = True) -> None:
    torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=new_format)


def write_sharded(folder, weights: dict, save_shard, end: str, index: str | None = None,
                  shard: str = "part-{}") -> None:
    names = sorted(weights)
    weight_map = {}
    for i in range(3):
        file = shard.format(i) + end
        save_shard({k: weights[k] for k in names[i::3]}, folder / file)
        weight_map |= dict.fromkeys(names[i::3], file)
    content = {"metadata": {}, "weight_map": weight_map}
    (folder / (index or f"pytorch_model{end}.index.json")).write_text(json.dumps(content))


WRITE = {
    "bin": write_bin,
    "old bin": lambda folder, weights: write_bin(folder, weights, new_format=False),
    "safetensors": lambda folder, weights: save_file(weights, folder / "pytorch_model.safetensors"),
    "model.safetensors": lambda folder, weights: save_file(weights, folder / "model.safetensors"),
    "sharded bin": lambda folder, weights: write_sharded(folder, weights, torch.save, ".bin"),
    "sharded safetensors":
        lambda folder, weights: write_sharded(folder, weights, save_file, ".safetensors"),
    # as diffusers, and with it the original program, writes them
    "diffusers bin":
        lambda folder, weights: torch.save(weights, folder / "diffusion_pytorch_model.bin"),
    "diffusers safetensors":
        lambda folder, weights: save_file(weights, folder / "diffusion_pytorch_model.safetensors"),
    "sharded diffusers bin": lambda folder, weights: write_sharded(
        folder, weights, torch.save, ".bin", "diffusion_pytorch_model.bin.index.json",
        "diffusion_pytorch_model-0000{}-of-00003"),
    "sharded diffusers safetensors": lambda folder, weights: write_sharded(
        folder, weights, save_file, ".safetensors",
        "diffusion_pytorch_model.safetensors.index.json",
        "diffusion_pytorch_model-0000{}-of-00003"),
    # shards with names that say nothing
    "sharded, named otherwise": lambda folder, weights: write_sharded(
        folder, weights, torch.save, "", "pytorch_model.bin.index.json", "{}.ckpt"),
    "sharded safetensors, named otherwise": lambda folder, weights: write_sharded(
        folder, weights, save_file, "", "model.safetensors.index.json", "shard {}"),
}


@pytest.mark.parametrize("layout", WRITE)
def test_published_layouts(published, tiny, layout):
    WRITE[layout](published.showo, published.weights)
    assert_same(published.load(), tiny)


def halved(weights: dict) -> dict:
    return {k: v.half() if v.is_floating_point() else v for k, v in weights.items()}


def test_half_precision_checkpoint_is_loaded_as_float32(published, tiny):
    WRITE["bin"](published.showo, halved(published.weights))
    WRITE["bin"](published.vq, halved(tiny.vq.state_dict()))
    model = published.load()
    for loaded, original in ((model.net, tiny.net), (model.vq, tiny.vq)):
        loaded = loaded.state_dict()
        for k, v in original.state_dict().items():
            rounded = v.half().float() if v.is_floating_point() else v
            # equal, and of the same type
            torch.testing.assert_close(loaded[k], rounded, rtol=0, atol=0)


NAMES = ("pytorch_model", "model", "diffusion_pytorch_model")
HALF = [f"{name}.fp16.{end}" for name in NAMES for end in ("safetensors", "bin")]


@pytest.mark.parametrize("name", HALF)
def test_variant_of_half_precision(published, tiny, name):
    """`variant="fp16"` of transformers and diffusers."""
    write = save_file if name.endswith(".safetensors") else torch.save
    write(halved(published.weights), published.showo / name)
    for k, value in published.load().net.state_dict().items():
        torch.testing.assert_close(value, tiny.net.state_dict()[k].half().float(), rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("end", [".safetensors", ".bin"])
def test_shards_of_half_precision(published, tiny, name, end):
    """`fp16` stands before the last dot of the index, and before the number of a shard."""
    write = save_file if end == ".safetensors" else torch.save
    write_sharded(published.showo, halved(published.weights), write, end,
                  f"{name}{end}.index.fp16.json", name + ".fp16-0000{}-of-00003")
    for k, value in published.load().net.state_dict().items():
        torch.testing.assert_close(value, tiny.net.state_dict()[k].half().float(), rtol=0, atol=0)


def test_full_precision_comes_first(published, tiny):
    """Even in shards, and however they are called."""
    for name in HALF:
        (published.showo / name).write_bytes(b"nobody reads it")
    WRITE["sharded diffusers bin"](published.showo, published.weights)
    assert_same(published.load(), tiny)


def test_order_of_the_names(tmp_path):
    """Each wins over all behind it; these are all that are read."""
    (tmp_path / "a shard").touch()
    for name in reading.WEIGHTS:
        (tmp_path / name).write_text('{"weight_map": {"x": "a shard"}}')
    found = []
    while any(tmp_path.glob("*model*")):
        path, files = reading.find_weights(tmp_path)
        found.append(os.path.basename(path))
        sharded = ".index." in found[-1]
        assert files == [str(tmp_path / "a shard") if sharded else path]
        os.remove(path)
    assert found == reading.WEIGHTS
    ends = ["safetensors", "bin", "safetensors.index.json", "bin.index.json"]
    half = ["fp16.safetensors", "fp16.bin", "safetensors.index.fp16.json", "bin.index.fp16.json"]
    assert found == [f"{name}.{end}" for end in ends + half for name in NAMES]


@pytest.mark.parametrize("value, refused", [(True, True), (False, False), (None, False)])
def test_show_o_with_clip(published, tiny, value, refused):
    """The CLIP-ViT variants see images as continuous features, and have a projector for them."""
    published.change(w_clip_vit=value)
    if not refused:
        WRITE["bin"](published.showo, published.weights)
        return assert_same(published.load(), tiny)
    projector = {"mm_projector.0.weight": torch.zeros(2048, 1024)}
    WRITE["bin"](published.showo, published.weights | projector)
    assert error(published.load) == (
        f"{published.showo}/config.json: field 'w_clip_vit' is true: this Show-o understands "
        "images by continuous CLIP-ViT features, not by the codes that it draws; take one of codes "
        "only, such as showlab/show-o-512x512")


def test_flags_come_before_the_checkpoints_own_tokenizers(published, tiny, tmp_path):
    save(tiny, tmp_path / "checkpoint")
    other = Magvit(VQ)
    torch.save(other.state_dict(), published.vq / "pytorch_model.bin")
    model = load(tmp_path / "checkpoint", image_tokenizer=str(published.vq))
    assert torch.equal(model.vq.encoder.conv_in.weight, other.encoder.conv_in.weight)
    word_tokenizer(TEXT + " more").save_pretrained(published.text)
    message = error(load, tmp_path / "checkpoint", text_tokenizer=str(published.text))
    assert "llm_vocab_size" in message


# ----------------------------------------------------------------------- layouts of older programs


def with_frequencies(weights: dict) -> dict:
    """The constants that transformers saved beside the weights until 2023."""
    frequencies = {f"showo.model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.full((3,), 9.0)
                   for i in range(2)}
    return weights | frequencies


def wrapped(weights: dict) -> dict:
    """The names of DistributedDataParallel."""
    return {f"module.{name}": value for name, value in weights.items()}


OLD = {
    "frequencies": with_frequencies,
    "module prefix": wrapped,
    "both": lambda weights: wrapped(with_frequencies(weights)),
}


@pytest.mark.parametrize("layout", WRITE)
@pytest.mark.parametrize("old", OLD)
def test_old_names(published, tiny, layout, old):
    WRITE[layout](published.showo, OLD[old](published.weights))
    assert_same(published.load(), tiny)


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("names", [dict, wrapped])
def test_state_of_a_training_program(published, tiny, new_format, names):
    for folder, weights in ((published.showo, published.weights),
                            (published.vq, tiny.vq.state_dict())):
        content = {"epoch": 3, "state_dict": names(weights), "optimizer": {"lr": [1e-4]}}
        write_bin(folder, content, new_format)
    assert_same(published.load(), tiny)


def test_other_names_are_still_checked(published):
    """A prefix before some names only is not one of a wrapper; other buffers are not constants."""
    head = published.weights.pop("showo.lm_head.bias")
    published.weights |= {"module.showo.lm_head.bias": head, "showo.inv_frequency": head}
    WRITE["bin"](published.showo, published.weights)
    message = error(published.load)
    assert "missing: showo.lm_head.bias;" in message
    assert "unexpected: module.showo.lm_head.bias, showo.inv_frequency" in message


# ----------------------------------------------------------------------------- one tensor at a time


@pytest.mark.parametrize("layout", WRITE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_files_are_opened_again_and_let_go(published, tiny, monkeypatch, layout, dtype):
    """Every few bytes; the weights are the same, and no longer those of the file."""
    monkeypatch.setattr(reading, "READ_AT_ONCE", 1)
    opened = []

    def recorded(file, original=reading.read_tensors):
        opened.append(file)
        return original(file)

    monkeypatch.setattr(reading, "read_tensors", recorded)
    WRITE[layout](published.showo, published.weights)
    net = build_showo(published.config, PhiConfig.from_dict(PHI), word_tokenizer())
    reading.load_checkpoint(net, published.showo, dtype)
    files = sorted(set(opened))
    tensors = len(published.weights)
    assert len(files) == (3 if layout.startswith("sharded") else 1)
    if layout == "old bin":  # read whole: once for the names, once for the values
        assert opened.count(files[0]) == 2
    else:
        assert sum(opened.count(f) for f in files) == tensors + len(files)
    for file in files:  # to zeros, in place: what is mapped would change
        with open(file, "r+b") as content:
            content.write(bytes(os.path.getsize(file)))
    for name, value in net.state_dict().items():
        wanted = tiny.net.state_dict()[name].to(dtype)
        torch.testing.assert_close(value, wanted, rtol=0, atol=0)


MEMORY = """
import re
import sys

import torch

from hermesflow import weights


def status(field):
    with open("/proc/self/status") as file:
        return int(re.search(field + r":\\s+(\\d+)", file.read())[1]) / 1024


with torch.device("meta"):
    module = torch.nn.Sequential(*[torch.nn.Linear(1024, 1024) for _ in range(40)])
weights.READ_AT_ONCE = 2**23
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak begins here
before = status("VmRSS")
weights.load_checkpoint(module, sys.argv[1], getattr(torch, sys.argv[2]))
stays = sum(p.nbytes for p in module.parameters()) / 2**20
print(stays, status("VmHWM") - before, status("VmRSS") - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="measures on Linux only")
@pytest.mark.parametrize("layout, dtype, megabytes", [
    ("bin", "bfloat16", 80), ("sharded safetensors", "float32", 160)])
def test_loading_needs_little_more_than_what_stays(tmp_path, layout, dtype, megabytes):
    """160 MB in a file: at its peak, loading takes 1.2 times what the weights take at last."""
    weights = {}
    for i in range(40):
        weights |= {f"{i}.weight": torch.ones(1024, 1024), f"{i}.bias": torch.ones(1024)}
    WRITE[layout](tmp_path, weights)
    command = [sys.executable, "-c", MEMORY, str(tmp_path), dtype]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, text=True, capture_output=True, check=True, cwd=ROOT,
                          env=environment)
    stays, peak, after = map(float, done.stdout.split())
    assert stays == pytest.approx(megabytes, rel=0.01)
    assert stays < peak < 1.2 * stays
    assert after < 1.1 * stays


# ------------------------------------------------------------------------------- broken checkpoints


def broken(published, layout: str, change) -> str:
    change(published.weights)
    WRITE[layout](published.showo, published.weights)
    return error(published.load)


@pytest.mark.parametrize("layout", ["bin", "safetensors", "sharded bin"])
def test_parameters_that_do_not_fit(published, layout):
    def change(weights):
        del weights["showo.lm_head.bias"]
        weights["showo.extra"] = torch.zeros(1)
        name = "showo.model.layers.0.mlp.fc1.weight"
        weights[name] = weights[name].T.contiguous()

    message = broken(published, layout, change)
    assert str(published.showo) in message
    assert "missing: showo.lm_head.bias;" in message and "unexpected: showo.extra;" in message
    shapes = "showo.model.layers.0.mlp.fc1.weight (16, 24) instead of (24, 16)"
    assert f"wrong shape: {shapes}" in message


def test_checkpoint_of_another_program(published):
    """All names differ: the message stays readable."""
    weights = {k.removeprefix("showo."): v for k, v in published.weights.items()}
    WRITE["bin"](published.showo, weights)
    message = error(published.load)
    assert f"and {len(published.weights) - 8} more" in message and len(message) < 2000


@pytest.mark.parametrize("content", [
    {"state_dict": {}}, {"a": 1}, [torch.zeros(1)], torch.zeros(1), "text"])
def test_bin_that_is_no_dictionary_of_tensors(published, content):
    torch.save(content, published.showo / "pytorch_model.bin")
    assert str(published.showo) in error(published.load)


@pytest.mark.parametrize("layout", ["bin", "old bin", "safetensors"])
@pytest.mark.parametrize("keep", [0, 0.01, 0.5, 0.999])
def test_truncated_weights(published, layout, keep):
    WRITE[layout](published.showo, published.weights)
    path = next(published.showo.glob("pytorch_model.*"))
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    assert str(path) in error(published.load)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.safetensors"])
def test_git_lfs_pointer_instead_of_weights(published, name):
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:1234\nsize 2900000000\n"
    (published.showo / name).write_text(text)
    assert name in error(published.load)


class Code:
    """A pickle that would create a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_code_in_a_bin_file_does_not_run(published, tmp_path):
    pickle.loads(pickle.dumps(Code(tmp_path / "proof"))).close()
    assert (tmp_path / "proof").exists()  # the pickle is armed
    for old in (True, False):
        weights = {**published.weights, "x": Code(tmp_path / "created")}
        write_bin(published.showo, weights, new_format=not old)
        assert "pytorch_model.bin" in error(published.load)
        assert not (tmp_path / "created").exists()


@pytest.mark.parametrize("value, dtype, works", [
    (1e38, "float32", True),
    (1e38, "bfloat16", True),
    (1e38, "float16", False),
    (-65519.0, "float16", True),  # rounds to -65504
    (65520.0, "float16", False),
    (-3.4e38, "float32", True),
    (-3.4e38, "bfloat16", False),
])
def test_weights_that_do_not_fit_the_dtype(published, value, dtype, works):
    name = "showo.model.layers.0.mlp.fc1.weight"
    published.weights[name][3, 2] = value
    WRITE["safetensors"](published.showo, published.weights)
    folders = [str(f) for f in (published.showo, published.vq, published.text)]
    dtype = getattr(torch, dtype)
    if works:
        weight = load(*folders, dtype=dtype).net.state_dict()[name]
        assert weight[3, 2] == torch.tensor(value).to(dtype) and weight.isfinite().all()
    else:
        message = error(load, *folders, dtype=dtype)
        file = published.showo / "pytorch_model.safetensors"
        assert message == f"{file}: parameter {name} holds values that are too large for {dtype}"


def test_double_precision_that_does_not_fit(published):
    name = "showo.lm_head.bias"
    published.weights[name] = published.weights[name].double()
    published.weights[name][0] = 1e39
    WRITE["bin"](published.showo, published.weights)
    why = "holds values that are too large for torch.float32"
    assert error(published.load).endswith(f"parameter {name} {why}")


@pytest.mark.parametrize("layout", ["bin", "old bin", "safetensors"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers(published, layout, value):
    published.weights["showo.lm_head.bias"][-1] = value
    WRITE[layout](published.showo, published.weights)
    message = error(published.load)
    assert message.endswith("parameter showo.lm_head.bias holds values that are not finite numbers")


@pytest.mark.parametrize("change", [
    lambda bias: bias.to_sparse(),
    lambda bias: torch.quantize_per_tensor(bias, 0.1, 0, torch.quint8),
    lambda bias: bias.to("meta"),
    lambda bias: bias.long(),
    lambda bias: bias.to(torch.complex64),
    lambda bias: bias.tolist(),
])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tensors_of_other_kinds(published, change):
    bias = published.weights["showo.lm_head.bias"]
    published.weights["showo.lm_head.bias"] = change(bias)
    WRITE["bin"](published.showo, published.weights)
    assert str(published.showo / "pytorch_model.bin") in error(published.load)


def test_tensors_in_another_order(published, tiny):
    """Parameters, columns first in memory, and two that share it: all become plain and apart."""
    weights = published.weights
    for name in ("showo.model.layers.0.mlp.fc1.weight", "showo.model.layers.1.mlp.fc1.weight"):
        weights[name] = torch.nn.Parameter(weights[name].T.contiguous().T)
    norms = [name for name in weights if name.endswith("input_layernorm.bias")]
    shared = weights[norms[0]]
    WRITE["bin"](published.showo, weights | dict.fromkeys(norms, shared))
    loaded = published.load().net.state_dict()
    assert len(norms) == 2 and all(torch.equal(loaded[name], shared) for name in norms)
    assert loaded[norms[0]].data_ptr() != loaded[norms[1]].data_ptr()
    for name in weights.keys() - set(norms):
        assert torch.equal(loaded[name], tiny.net.state_dict()[name])
        assert loaded[name].is_contiguous()


def test_shard_is_missing(published):
    WRITE["sharded bin"](published.showo, published.weights)
    (published.showo / "part-1.bin").unlink()
    index = published.showo / "pytorch_model.bin.index.json"
    assert error(published.load) == f"{index}: field 'weight_map': 'part-1.bin' is missing"


@pytest.mark.parametrize("index", [
    "{}", "[]", "{", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}',
    '{"weight_map": {"a": ["b"]}}', '{"weight_map": {"a": ""}}',
    '{"weight_map": {"a": "/etc/passwd"}}', '{"weight_map": {"a": "../vq/pytorch_model.bin"}}'])
def test_broken_shard_index(published, index):
    (published.showo / "pytorch_model.bin.index.json").write_text(index)
    message = error(published.load)
    assert "pytorch_model.bin.index.json" in message
    assert index in ("[]", "{") or "field 'weight_map'" in message


def test_no_weights(published):
    assert error(published.load) == (
        f"{published.showo}: pytorch_model.safetensors is missing; it could also begin with model "
        "or diffusion_pytorch_model, and end with bin, safetensors.index.json, bin.index.json, "
        "fp16.safetensors, fp16.bin, safetensors.index.fp16.json, bin.index.fp16.json")


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"vocab_size": NaN}'])
def test_broken_config(published, text):
    (published.showo / "config.json").write_text(text)
    assert str(published.showo / "config.json") in error(published.load)


def test_no_config(published):
    (published.showo / "config.json").unlink()
    assert error(published.load) == f"{published.showo}: config.json is missing"


@pytest.mark.parametrize("name, value", [
    ("vocab_size", None),
    ("llm_vocab_size", "20"),
    ("codebook_size", 16.0),
    ("num_vq_tokens", True),
    ("vocab_size", 58498),
    ("mask_token_id", 3),
    ("llm_model_path", 3),
    ("llm_model_path", None),
    ("llm_model_path", "x" * 5000),
    ("llm_model_path", "a\0b"),
    ("num_vq_tokens", 0),
    ("num_vq_tokens", -4),
    ("num_vq_tokens", 5),  # no square
    ("num_vq_tokens", [4]),
    ("codebook_size", 10**30),
    ("vocab_size", {"x" * 5000: 1}),
])
def test_wrong_config_field(published, name, value):
    WRITE["bin"](published.showo, published.weights)
    published.change(**{name: value})
    message = error(published.load)
    assert message.startswith(f"{published.showo / 'config.json'}: field '{name}'") or (
        name == "mask_token_id" and "'mask_token_id'" in message)
    assert len(message) < 500


WRONG_PHI = {
    "hidden_size": ["16", 16.0, True, None, 0, -16, 10**12, [16], 15],  # 15: two heads
    "intermediate_size": ["24", 0, -1, None],
    "num_hidden_layers": [2.5, 0, -2, 10**9, None],
    "num_attention_heads": ["2", 0, -2, False, 3, None],
    "num_key_value_heads": ["1", 0, -1, 3],
    "layer_norm_eps": ["1e-5", 0, -1e-5, 1e999, None, [1e-5]],
    "hidden_act": ["swoosh", 3, None, ["relu"], ""],
    "max_position_embeddings": ["300", 0, -1, 3.5, None],
    "vocab_size": [0, "99", None],
    "rope_theta": [0, -50.0, "50", None, 1e999, True],
    "partial_rotary_factor": [0, -0.5, 1.5, "0.5", None, 0.1, 0.45],  # of 8: 0 and 3 dimensions
    "rope_scaling": [{"factor": 2.0, "type": "linear"}, {"rope_type": "yarn"}, "linear", 2.0],
    "rope_parameters": [{"factor": 2.0, "rope_type": "dynamic"}, [], {"rope_type": ["default"]}],
    "model_type": ["llama", 3, None],
}


@pytest.mark.parametrize("name, value", [(n, v) for n, values in WRONG_PHI.items() for v in values])
def test_wrong_phi_field(published, name, value):
    file = published.showo / "phi.json"
    text = json.dumps({**PHI, name: value}).replace("Infinity", "1e999")  # which is valid JSON
    file.write_text(text)
    message = error(published.load)
    if name == "num_attention_heads" and value == 3:
        assert message == f"{file}: field 'hidden_size' should be a multiple of " \
                          "'num_attention_heads' 3, found 16"
    elif name == "num_key_value_heads" and value == 3:
        assert message == f"{file}: field 'num_attention_heads' should be a multiple of " \
                          "'num_key_value_heads' 3, found 2"
    else:
        assert message.startswith(f"{file}: field '{name}' should be ")
        assert message.endswith("found inf" if value == 1e999 else f"found {value!r}")


@pytest.mark.parametrize("rope", [
    {"rope_theta": 50.0, "partial_rotary_factor": 0.75},
    {"rope_theta": 50, "partial_rotary_factor": 0.75, "rope_scaling": None},
    {"rope_parameters": {"rope_theta": 50.0, "partial_rotary_factor": 0.75,
                         "rope_type": "default"}},
    {"rope_theta": 9.0, "rope_parameters": {"rope_theta": 50.0, "partial_rotary_factor": 0.75}},
])
def test_rotary_embedding_in_every_place(published, tiny, rope):
    """Older and newer versions of transformers write it in different fields."""
    phi = {k: v for k, v in PHI.items() if k not in ("rope_theta", "partial_rotary_factor")}
    (published.showo / "phi.json").write_text(json.dumps(phi | rope))
    WRITE["bin"](published.showo, published.weights)
    assert_same(published.load(), tiny)


def test_phi_config_that_leaves_fields_out(tmp_path):
    """What is not there is as in Phi-1.5; keys and values have as many heads as queries."""
    (tmp_path / "phi.json").write_text('{"hidden_size": 64, "num_attention_heads": 4}')
    phi = phi_config(tmp_path, "phi.json")
    sizes = dict(hidden_size=64, intermediate_size=8192, num_hidden_layers=24,
                 num_attention_heads=4, num_key_value_heads=4, hidden_act="gelu_new")
    assert {k: getattr(phi, k) for k in sizes} == sizes
    assert phi.rope_parameters["rope_theta"] == 10000.0
    (tmp_path / "phi.json").write_text('{"num_key_value_heads": null, "head_dim": 3}')
    assert phi_config(tmp_path, "phi.json").num_key_value_heads == 32


@pytest.mark.parametrize("place", ["folder", "file"])
def test_phi_config_elsewhere(tmp_path, place):
    """llm_model_path names another folder, or a file in it."""
    (tmp_path / "showo").mkdir()
    (tmp_path / "phi").mkdir()
    (tmp_path / "phi" / "config.json").write_text(json.dumps(PHI))
    name = tmp_path / "phi" / ("config.json" if place == "file" else "")
    (tmp_path / "showo" / "config.json").write_text("{}" if place == "folder" else json.dumps(PHI))
    assert phi_config(tmp_path / "showo", str(name)).intermediate_size == 24


WRONG_VQ = {
    "ch": ["32", 32.0, 0, -32, True, None, 33, 10**9],
    "bits": ["4", 0, -4, 4.0, 63, None],
    "encoder_mult": [[1, 0], [1, -1], [1, 1.0], [1, "1"], [True, 1], "11", 2, None, [], {"1": 1}],
    "encoder_blocks": [[1, -1], [1, 10**9], [[1], [1]]],
    "decoder_mult": [[0, 1], [None, 1]],
    "decoder_blocks": [[1, 0.5], "ab"],
}


@pytest.mark.parametrize("name, value", [(n, v) for n, values in WRONG_VQ.items() for v in values])
def test_wrong_image_tokenizer_field(published, name, value):
    WRITE["bin"](published.showo, published.weights)
    config = {**dataclasses.asdict(VQ), name: value}
    (published.vq / "config.json").write_text(json.dumps(config))
    message = error(published.load)
    assert message.startswith(f"{published.vq / 'config.json'}: field '{name}' should be ")
    assert message.endswith(f"found {value!r}")


@pytest.mark.parametrize("name", ["encoder_mult", "encoder_blocks", "decoder_mult",
                                  "decoder_blocks"])
def test_image_tokenizer_with_levels_of_different_number(published, name):
    WRITE["bin"](published.showo, published.weights)
    config = {**dataclasses.asdict(VQ), name: [1, 1, 1]}
    (published.vq / "config.json").write_text(json.dumps(config))
    message = error(published.load)
    assert str(published.vq / "config.json") in message and f"'{name}' 3" in message
    assert message.count("' 2") == 3


@pytest.mark.parametrize("missing", ["bos_token", "eos_token"])
@pytest.mark.parametrize("null", [True, False])
def test_text_tokenizer_without_an_end(published, missing, null):
    WRITE["bin"](published.showo, published.weights)
    file = published.text / "tokenizer_config.json"
    config = json.loads(file.read_text())
    config |= {missing: None}
    if not null:
        del config[missing]
    file.write_text(json.dumps(config))
    message = error(published.load)
    where = f"{published.text}: the text tokenizer has no {missing}"
    assert message == f"{where} (tokenizer_config.json)"


@pytest.mark.parametrize("value", ["many", 0, -1, True, [12]])
def test_wrong_length_of_the_tokenizer(published, value):
    file = published.text / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_max_length": value}))
    message = error(published.load)
    assert message.startswith(f"{file}: field 'model_max_length' should be a number above 0")


@pytest.mark.parametrize("config", [
    "", "{", "[]", "3", "null", '{"tokenizer_class": 3}', '{"tokenizer_class": "NoTokenizer"}',
    '{"bos_token": 3}', '{"bos_token": ["a"]}', '{"eos_token": {}}', '{"padding_side": "up"}',
    '{"added_tokens_decoder": {"x": {}}}', '{"added_tokens_decoder": [1]}',
    '{"model_max_length": "many"}', '{"extra_special_tokens": 3}', '{"model_input_names": 3}'])
def test_broken_tokenizer_config(published, config):
    """One line; a field that does not matter here may be wrong."""
    WRITE["bin"](published.showo, published.weights)
    file = published.text / "tokenizer_config.json"
    good = json.loads(file.read_text())
    if config.startswith("{") and config != "{":
        config = json.dumps(good | json.loads(config))
    file.write_text(config)
    try:
        model = published.load()
        assert model.decode_text(model.encode_text("a big red ring")) == "a big red ring"
    except InputError as refused:
        assert str(refused).startswith(str(published.text)) and "\n" not in str(refused)


def test_no_phi_config(published, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (published.showo / "phi.json").unlink()
    message = error(published.load)
    assert "'llm_model_path'" in message and "somewhere/phi.json" in message


@pytest.mark.parametrize("text", ["[]", "{", "3"])
def test_broken_phi_config(published, text):
    (published.showo / "phi.json").write_text(text)
    assert "phi.json" in error(published.load)


def test_text_tokenizer_of_another_size(published):
    WRITE["bin"](published.showo, published.weights)
    word_tokenizer(TEXT + " more").save_pretrained(published.text)
    size = len(word_tokenizer())
    message = error(published.load)
    assert f"'llm_vocab_size' is {size}" in message and f"{size + 1} tokens" in message


@pytest.mark.parametrize("empty", [False, True])
def test_no_text_tokenizer(published, monkeypatch, tmp_path, empty):
    """The flag names a folder that does not exist, or one without a tokenizer."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    if empty:
        (tmp_path / "nothing").mkdir()
    message = error(load, published.showo, published.vq, str(tmp_path / "nothing"))
    why = "holds no config.json, and no " if empty else "no such folder, and no name of a hub"
    assert message.startswith(f"{tmp_path / 'nothing'}: {why}")


def test_image_tokenizer_with_other_codes(published):
    WRITE["bin"](published.showo, published.weights)
    other = dataclasses.replace(VQ, bits=5)
    (published.vq / "config.json").write_text(json.dumps(dataclasses.asdict(other)))
    torch.save(Magvit(other).state_dict(), published.vq / "pytorch_model.bin")
    message = error(published.load)
    assert "'codebook_size' is 16" in message and "32 codes" in message


def test_image_tokenizer_that_does_not_fit_its_config(published):
    WRITE["bin"](published.showo, published.weights)
    other = Magvit(dataclasses.replace(VQ, decoder_blocks=(1, 2)))
    torch.save(other.state_dict(), published.vq / "pytorch_model.bin")
    message = error(published.load)
    assert str(published.vq) in message and "unexpected: decoder.up.1.block.1." in message


@pytest.mark.parametrize("name", [
    "nobody/no-such-checkpoint", "not/a/repository/id", "no such folder"])
def test_unreachable_checkpoint(monkeypatch, name):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # it was read at import
    message = error(load, name)
    assert name in message and "hub" in message


# ---------------------------------------------------------------------------------- text stays text


@pytest.fixture(scope="module", params=["words", "phi-1_5", "saved words"])
def tokens(request, tmp_path_factory):
    if request.param == "phi-1_5":
        return Tokens(AutoTokenizer.from_pretrained(GOLDEN / "phi-1_5-tokenizer"), 8192, 16)
    tokenizer = word_tokenizer()
    if request.param == "saved words":
        folder = tmp_path_factory.mktemp("words")
        tokenizer.save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    return Tokens(tokenizer, 16, 4)


@pytest.mark.parametrize("name", ["<|endoftext|>", *Tokens.SPECIAL])
def test_special_words_in_a_caption_are_text(tokens, name):
    text = f"a red{name} ring {name}"
    ids = tokens.encode(text)
    assert ids and all(0 <= i < tokens.text_size for i in ids)
    assert tokens.sot not in ids and tokens.eot not in ids
    assert tokens.t2i_prompt(text) == [tokens.t2i, tokens.sot, *ids, tokens.eot]
    assert tokens.text_prompt(text).count(tokens.sot) == 1


def test_words_come_back(tokens):
    ids = [*tokens.encode("a big red ring"), tokens.soi, tokens.mask, tokens.eot]
    assert tokens.decode(ids) == "a big red ring"


# ------------------------------------------------------------------------------------------- images


def one_color(pixels: torch.Tensor) -> list[float]:
    """The colour of a plain image in 0..255."""
    assert (pixels == pixels[:, :1, :1]).all()
    return ((pixels[:, 0, 0] + 1) * 127.5).tolist()


@pytest.mark.parametrize("mode, color, rgb", [
    ("RGB", (10, 20, 30), (10, 20, 30)),
    ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
    ("L", 77, (77, 77, 77)),
    ("LA", (77, 255), (77, 77, 77)),
    ("1", 1, (255, 255, 255)),
    ("I;16", 128 * 257, (128, 128, 128)),
    ("I;16", 0xFFFF, (255, 255, 255)),
    ("I;16", 300, (1, 1, 1)),
])
@pytest.mark.parametrize("size", [(1, 1), (40, 16), (7, 33)])
def test_image_modes(tmp_path, mode, color, rgb, size):
    Image.new(mode, size, color).save(tmp_path / "image.png")
    pixels = load_image(tmp_path / "image.png", 16)
    assert pixels.shape == (3, 16, 16) and pixels.dtype == torch.float32
    assert one_color(pixels) == pytest.approx(rgb, abs=1)


def test_cmyk_and_palette_images(tmp_path):
    Image.new("CMYK", (20, 30), (255, 0, 0, 0)).save(tmp_path / "cyan.jpg", quality=100)
    assert one_color(load_image(tmp_path / "cyan.jpg", 8)) == pytest.approx([0, 255, 255], abs=3)
    Image.new("RGB", (20, 30), (200, 100, 50)).quantize().save(tmp_path / "palette.gif")
    palette = one_color(load_image(tmp_path / "palette.gif", 8))
    assert palette == pytest.approx([200, 100, 50], abs=3)


@pytest.mark.parametrize("orientation, top, bottom", [
    (1, "red", "red"),
    (3, "blue", "blue"),
    (6, "red", "blue"),
    (8, "blue", "red"),
])
@pytest.mark.parametrize("end", ["png", "jpg"])
def test_photos_are_turned_upright(tmp_path, orientation, top, bottom, end):
    """The file holds red on the left and blue on the right.

    Orientation 6 means: turn it by 90° clockwise.
    """
    image = Image.new("RGB", (32, 32), "red")
    image.paste("blue", (16, 0, 32, 32))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / f"photo.{end}", exif=exif)
    pixels = load_image(tmp_path / f"photo.{end}", 32)
    colors = {"red": [1, -1, -1], "blue": [-1, -1, 1]}
    assert pixels[:, 4, 4].tolist() == pytest.approx(colors[top], abs=0.1)
    assert pixels[:, 28, 4].tolist() == pytest.approx(colors[bottom], abs=0.1)


def test_shorter_side_then_centre(tmp_path):
    """64x16 at 16: nothing is scaled, the middle quarter stays."""
    image = np.zeros((16, 64, 3), np.uint8)
    image[:, 24:40] = 255
    Image.fromarray(image).save(tmp_path / "wide.png")
    assert (load_image(tmp_path / "wide.png", 16) == 1).all()
    Image.fromarray(image.transpose(1, 0, 2)).save(tmp_path / "tall.png")
    assert (load_image(tmp_path / "tall.png", 16) == 1).all()


@pytest.mark.parametrize("end", ["png", "jpg", "gif", "webp"])
@pytest.mark.parametrize("keep", [0, 0.05, 0.5])
def test_truncated_images(tmp_path, end, keep):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / f"image.{end}"
    Image.fromarray(noise).save(path)
    assert load_image(path, 16).shape == (3, 16, 16)
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    assert str(path) in error(load_image, path, 16)


@pytest.mark.parametrize("name, content", [
    ("missing.png", None),
    ("text.png", b"hello"),
    ("folder", "folder"),
])
def test_no_images(tmp_path, name, content):
    if content == "folder":
        (tmp_path / name).mkdir()
    elif content is not None:
        (tmp_path / name).write_bytes(content)
    assert str(tmp_path / name) in error(load_image, tmp_path / name, 16)


# --------------------------------------------------------------------- the image tokenizer in parts


def test_images_are_encoded_and_decoded_one_at_a_time(monkeypatch):
    """So that no picture depends on those beside it, to the last bit."""
    model = tiny_model()  # its images have 64 x 64 pixels
    pixels = torch.rand(5, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    codes = model.encode_image(pixels)
    decoded = model.decode_image(codes)
    torch.testing.assert_close(codes, model.vq.encode(pixels))
    torch.testing.assert_close(decoded, model.vq.decode(codes))
    assert codes.shape == (5, model.image_tokens) and len(codes.unique()) > 1
    assert decoded.shape == pixels.shape
    for i in range(5):
        assert torch.equal(model.encode_image(pixels[i : i + 1]), codes[i : i + 1])
        assert torch.equal(model.decode_image(codes[i : i + 1]), decoded[i : i + 1])


# -------------------------------------------------------------------------------- what fits a model


@pytest.fixture(scope="module")
def sized() -> Model:
    """16 image tokens, 32 codes, 256 positions."""
    return tiny_model()


def codes_with(value: int, shape=(16,)) -> torch.Tensor:
    codes = torch.zeros(shape, dtype=torch.int32)
    codes[..., 3] = value
    return codes


@pytest.mark.parametrize("codes", [
    codes_with(0),
    codes_with(31),
    codes_with(31, (2, 16)),
    codes_with(31, (2, 3, 16)),
])
def test_codes_that_fit(sized, codes):
    check_codes(sized, codes, "here")


@pytest.mark.parametrize("codes", [
    codes_with(-1),  # MASKED is no code
    codes_with(32),
    codes_with(32, (2, 16)),
    codes_with(0, (15,)),
    codes_with(0, (17,)),
    codes_with(0, (16, 4)),
    torch.tensor(0),
    torch.tensor([]),
    torch.zeros(0, 16),
])
def test_codes_that_do_not_fit(sized, codes):
    message = error(check_codes, sized, codes, "file: id 'a' images")
    assert message.startswith("file: id 'a' images should be 16 codes below 32")


def test_text_ids(sized):
    size = sized.tokens.vocab_size
    for ids in ([], [0], [0, size - 1]):
        check_text_ids(sized, torch.tensor(ids), "here")
    for ids in ([-1], [size], [0, size, 0]):
        message = error(check_text_ids, sized, torch.tensor(ids), "file: id 'a' captions")
        assert message.startswith("file: id 'a' captions: ") and "vocabulary" in message


def test_prompt_that_does_not_fit_behind_an_image(sized):
    room = 256 - 16 - 3  # of <|mmu|>, <|soi|> and <|eoi|>
    words = room - 3  # of <|sot|>, USER and ASSISTANT
    assert len(sized.tokens.text_prompt("ring " * words)) == room
    sized.check_prompt("ring " * words, "here")
    message = error(sized.check_prompt, "ring " * (words + 1), "id 'a': field 'questions'")
    assert message == f"id 'a': field 'questions' does not fit into {room} tokens"
