"""The model hub, with and without a connection, and what transformers loads from it.

A tiny hub of one's own stands for the real one, and a closed port for a network that is down.
"""

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest.mock import patch

import huggingface_hub
import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText,
                          AutoModelForSeq2SeqLM, AutoModelForVisualQuestionAnswering, AutoProcessor,
                          AutoTokenizer, BertConfig, BertForMaskedLM, BertForPreTraining, BertModel,
                          BlipConfig, BlipForQuestionAnswering, CLIPConfig, CLIPModel, LlamaConfig,
                          LlamaForCausalLM, Mask2FormerConfig, Mask2FormerForUniversalSegmentation,
                          MPNetConfig, MPNetModel, Qwen2_5_VLConfig,
                          Qwen2_5_VLForConditionalGeneration, SwinConfig, T5Config,
                          T5ForConditionalGeneration)
from transformers.models.mask2former import modeling_mask2former

from conftest import ROOT
from hermesflow import contents, hub
from hermesflow.checkpoints import find_file, load_hf, load_tokenizer, read_config
from hermesflow.files import InputError
from hermesflow.weights import find_weights

REVISION = "0123456789abcdef0123456789abcdef01234567"
TINY = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)


def error(call, *args, **named) -> str:
    """The message of the InputError that the call must raise; it has to fit on one line."""
    with pytest.raises(InputError) as caught:
        call(*args, **named)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


def closed_port() -> int:
    """A port of this computer at which nobody listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def cache(home: Path, repository: str, files: dict[str, bytes]) -> Path:
    """A repository as the hub's library keeps it."""
    folder = home / "hub" / ("models--" + repository.replace("/", "--"))
    snapshot = folder / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(REVISION)
    for name, content in files.items():
        (snapshot / name).write_bytes(content)
    return snapshot


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """HF_HUB_OFFLINE is set, and the hub's cache is a folder of this test."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub, "TRIED", {})
    return tmp_path


def offline(repository: str, names: str, folder: Path, prefix: str = "") -> str:
    """What is said of a file that is not in the cache."""
    where = f"{names} is not in the hub's cache ({folder / 'hub'}), and HF_HUB_OFFLINE is set"
    return f"{repository}: {prefix}{where}"


# --------------------------------------------------------------------------------- the connection


@pytest.fixture
def direct(monkeypatch):
    """No proxies."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def test_a_server_that_listens(direct):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        assert hub.failure(f"http://127.0.0.1:{listener.getsockname()[1]}") == ""


def test_a_port_that_is_closed(direct):
    why = hub.failure(f"http://127.0.0.1:{closed_port()}/hub")
    assert why == "Connection refused" or "not supported" in why


@pytest.mark.parametrize("url, port", [
    ("https://hub", 443), ("http://hub", 80), ("http://hub:8", 8)])
def test_the_port(direct, monkeypatch, url, port):
    asked = []

    def look_up(host, *rest):
        asked.append((host, rest[0]))
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    assert hub.failure(url) == "Name or service not known"
    assert asked == [("hub", port)] * 2


def test_a_look_up_that_hangs(direct, monkeypatch):
    """As behind a firewall that drops packets: it cannot be interrupted, and is left alone."""
    monkeypatch.setattr(hub, "PATIENCE", 0.3)
    answered = threading.Event()

    def look_up(*_):
        answered.wait()
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    assert hub.failure("https://hub") == "no answer in 0.3 s"  # and not when it is answered
    answered.set()


@pytest.mark.parametrize("works", [socket.AF_INET, socket.AF_INET6])
def test_one_family_of_addresses_is_enough(direct, monkeypatch, works):
    answered = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()

        def look_up(host, port, family, kind):
            if family != works:
                answered.wait()
                raise socket.gaierror(-3, "Temporary failure in name resolution")
            return [(family, kind, 0, "", address)]

        monkeypatch.setattr(socket, "getaddrinfo", look_up)
        original = socket.socket
        monkeypatch.setattr(socket, "socket", lambda family, kind: original(socket.AF_INET, kind))
        assert hub.failure("http://hub") == ""  # before the other one is answered
        answered.set()


@pytest.mark.parametrize("variable, url, trusted", [
    ("https_proxy", "https://hub", True),
    ("ALL_PROXY", "https://hub", True),
    ("http_proxy", "https://hub", False),
    ("http_proxy", "http://hub", True),
])
def test_a_proxy_is_trusted(direct, monkeypatch, variable, url, trusted):
    """Only it can tell whether the hub can be reached."""
    monkeypatch.setenv(variable, "http://127.0.0.1:9")

    def look_up(*_):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    assert hub.failure(url) == ("" if trusted else "Name or service not known")


def test_a_hub_that_a_proxy_does_not_serve(direct, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert hub.failure(f"http://127.0.0.1:{closed_port()}") != ""


def test_it_is_tried_once(monkeypatch):
    tried = []
    monkeypatch.setattr(hub, "TRIED", {})
    monkeypatch.setattr(hub, "failure", lambda url: tried.append(url) or "it is down")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "https://hub")
    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    assert [hub.reachable(), hub.reachable()] == [False, False]
    assert hub.why_offline() == "https://hub cannot be reached (it is down)"
    assert tried == ["https://hub"]
    # libraries, and processes that this one starts, do not try either
    assert huggingface_hub.is_offline_mode() and os.environ["HF_HUB_OFFLINE"] == "1"


def test_a_hub_that_is_reached_changes_nothing(monkeypatch):
    monkeypatch.setattr(hub, "TRIED", {})
    monkeypatch.setattr(hub, "failure", lambda url: "")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    assert hub.reachable() and hub.why_offline() == ""
    assert not huggingface_hub.is_offline_mode() and os.environ["HF_HUB_OFFLINE"] == ""


# ------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("name", [
    "runs/x/checkpoint", "./toy/bse", "../toy/base", "/toy/base", "~/toy", "toy/bse/",
    "no such folder", "a--b/c", "a/b..c", "-a/b", "a/.b", "é/b", "x" * 200, "", "a\0b",
    "C:\\toy\\base"])
def test_what_can_only_be_a_path(monkeypatch, name):
    """It is answered at once."""
    monkeypatch.setattr(hub, "reachable", lambda: pytest.fail("the hub was asked"))
    message = f"{name}: no such folder, and no name of a hub repository"
    assert error(hub.find, name, "config.json") == message
    if name:
        assert error(find_file, name, "config.json") == message


def test_a_name_beside_others_that_are_here(monkeypatch, tmp_path):
    (tmp_path / "toy" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "reachable", lambda: pytest.fail("the hub was asked"))
    assert error(contents.digest, "toy/bse") == (
        "toy/bse: no such folder in toy "
        "(if the hub has it: hf download toy/bse --local-dir toy/bse)")


def test_a_repository_whose_owner_is_a_folder_here(monkeypatch, cached):
    """What is in the cache loads."""
    (cached / "showlab").mkdir()
    monkeypatch.chdir(cached)
    snapshot = cache(cached, "showlab/magvitv2", {"config.json": b'{"ch": 32}'})
    assert find_file("showlab/magvitv2", "config.json") == str(snapshot / "config.json")
    assert "no such folder in showlab" in error(find_file, "showlab/show-o", "config.json")


@pytest.mark.parametrize("name", [
    "gpt2", "google-bert/bert-large-uncased", "Qwen/Qwen2.5-VL-7B-Instruct", "microsoft/phi-1_5",
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "a/_b", "0/1"])
def test_names_of_repositories(cached, name):
    assert error(find_file, name, "config.json") == (
        f"{name}: neither a folder here nor in the hub's cache ({cached / 'hub'}), "
        "and HF_HUB_OFFLINE is set")


def test_what_is_required(cached):
    """Folders with a model or a tokenizer, files, what is cached, and nothing."""
    cache(cached, "some/thing", {"README.md": b""})
    tokenizer = ROOT / "tests" / "golden" / "phi-1_5-tokenizer"
    hub.require(str(ROOT / "toy" / "base"), tokenizer, str(ROOT / "model.py"), "some/thing", None)
    message = error(hub.require, str(cached), "other/thing")
    assert message == f"{cached}: holds no config.json, and no tokenizer"
    message = error(hub.require, "some/thing", "other/thing", "toy/bse")
    assert message.startswith("other/thing: neither a folder here nor in the hub's cache")


# ---------------------------------------------------------------------------- without a connection

# what several loaders say of names, and how long they take
PROBE = """
import json
import sys

from hermesflow.contents import digest
from hermesflow.files import InputError

names, heavy = json.loads(sys.argv[1])
loaders = {"digest": digest}
if heavy:
    from transformers import AutoModel, AutoTokenizer
    from hermesflow.checkpoints import load_hf
    from model import load
    loaders |= {"load": load, "model": lambda name: load_hf(AutoModel, name),
                "checkpoint": lambda name: load(name, "toy/base/magvitv2", "toy/base/tokenizer"),
                "tokenizer": lambda name: load_hf(AutoTokenizer, name)}
results = []
for loader, name in names:
    try:
        result = loaders[loader](name)
        result = result if isinstance(result, str) else type(result).__name__
    except InputError as error:
        result = str(error)
    results.append(result)
print(json.dumps({"results": results, "torch": "torch" in sys.modules}))
"""


def probe(home: Path, names: list[tuple[str, str]], heavy: bool = False, **environment) -> dict:
    """PROBE in a process of its own, which reads the environment when it starts."""
    ours = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN"):
        ours.pop(name, None)
    ours |= {"PYTHONPATH": str(ROOT), "HF_HOME": str(home), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", PROBE, json.dumps([names, heavy])], cwd=ROOT,
                          text=True, capture_output=True, timeout=120, env=ours | environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_mistyped_name_without_a_network(tmp_path):
    endpoint = f"http://127.0.0.1:{closed_port()}"
    names = [("digest", "nobody/nothing"), ("digest", "nothing"), ("digest", "toy/bse")]
    seen = probe(tmp_path, names, HF_ENDPOINT=endpoint)
    first, second, third = seen["results"]
    assert first.startswith(
        f"nobody/nothing: neither a folder here nor in the hub's cache ({tmp_path / 'hub'}), "
        f"and {endpoint} cannot be reached (")
    assert second.startswith("nothing: neither a folder here nor in the hub's cache")
    assert third.startswith("toy/bse: no such folder in toy")
    assert not seen["torch"]


def test_what_is_cached_loads_without_a_network(tmp_path):
    """A Show-o, an encoder; and what is not cached fails at once, in transformers, too."""
    base = {p.name: p.read_bytes() for p in (ROOT / "toy" / "base").iterdir() if p.is_file()}
    cache(tmp_path, "some/showo", base)
    saved = tmp_path / "saved"
    BertModel(BertConfig(vocab_size=20, **TINY)).save_pretrained(saved)
    cache(tmp_path, "some/bert", {p.name: p.read_bytes() for p in saved.iterdir()})
    names = [("digest", "some/showo"), ("checkpoint", "some/showo"), ("model", "some/bert"),
             ("tokenizer", "some/bert"), ("load", "nobody/nothing"), ("model", "nobody/nothing")]
    endpoint = f"http://127.0.0.1:{closed_port()}"
    seen = probe(tmp_path, names, heavy=True, HF_ENDPOINT=endpoint)
    results = seen["results"]
    assert results[:3] == [REVISION[:16], "Model", "BertModel"]
    assert results[3].startswith("some/bert: cannot load as AutoTokenizer (tokenizer.json or ")
    assert f"and {endpoint} cannot be reached (" in results[3]
    for result in results[4:]:
        assert result.startswith("nobody/nothing: neither a folder here nor in the hub's cache")


# ----------------------------------------------------------------------------------- HF_HUB_OFFLINE


def test_which_file_of_a_config_is_missing(cached):
    cache(cached, "some/thing", {"README.md": b""})
    wanted = offline("some/thing", "config.json", cached)
    assert error(read_config, "some/thing") == error(contents.digest, "some/thing") == wanted
    assert find_file("some/thing", "other.json") is None


def test_which_file_of_weights_is_missing(cached):
    snapshot = cache(cached, "some/thing", {"config.json": b"{}"})
    message = error(find_weights, "some/thing")
    assert message.startswith(offline("some/thing", "pytorch_model.safetensors", cached))

    index = snapshot / "pytorch_model.bin.index.json"
    index.write_text('{"weight_map": {"a": "1.bin", "b": "2.bin"}}')
    (snapshot / "1.bin").touch()
    wanted = offline(str(index), "'2.bin'", cached, "field 'weight_map': ")
    assert error(find_weights, "some/thing") == wanted

    (snapshot / "2.bin").touch()
    files = [str(snapshot / name) for name in ("1.bin", "2.bin")]
    assert find_weights("some/thing") == (str(index), files)


def test_which_file_of_a_transformers_model_is_missing(cached):
    snapshot = cache(cached, "some/bert", {"README.md": b""})

    def missing(kind, names: str):
        prefix = f"cannot load as {kind.__name__} ("
        message = offline("some/bert", names, cached, prefix) + ")"
        assert error(load_hf, kind, "some/bert") == message

    missing(AutoConfig, "config.json")
    missing(AutoModel, "config.json")
    BertConfig(vocab_size=20, **TINY).save_pretrained(snapshot)
    assert load_hf(AutoConfig, "some/bert").hidden_size == 16
    missing(AutoModel, "model.safetensors or model.safetensors.index.json or pytorch_model.bin or "
                       "pytorch_model.bin.index.json")
    index = {"metadata": {}, "weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    missing(AutoModel, "1.safetensors")
    missing(AutoProcessor, "processor_config.json or preprocessor_config.json")
    missing(AutoTokenizer, "tokenizer.json or vocab.json or vocab.txt or tokenizer.model or "
                           "spiece.model")


def test_which_file_of_a_tokenizer_is_missing(cached):
    cache(cached, "some/words", {"tokenizer_config.json": b"{}"})
    names = "tokenizer.json or vocab.json or vocab.txt or tokenizer.model or spiece.model"
    message = offline("some/words", names, cached, "cannot load as AutoTokenizer (") + ")"
    assert error(load_tokenizer, "some/words") == message


# ------------------------------------------------------------------------------- with a connection


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub does: repositories, files, and its codes of errors."""

    files = {"/some/thing/resolve/main/config.json": b'{"a": 1}',
             "/some/thing/resolve/main/model.safetensors": b"weights"}

    def do_HEAD(self):
        self.answer(False)

    def do_GET(self):
        self.answer(True)

    def answer(self, with_content: bool):
        content = self.files.get(self.path.replace(REVISION, "main"))
        if content is None:
            owner = self.path.split("/")[1]
            status, code = {"some": (404, "EntryNotFound"), "gated": (403, "GatedRepo"),
                            "ill": (418, "")}.get(owner, (401, "RepoNotFound"))
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            content = b""
        else:
            self.send_response(200)
            self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", REVISION)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_content:
            self.wfile.write(content)

    def log_message(self, *_):
        pass


ONLINE = """
import json
import sys

from hermesflow.contents import digest
from hermesflow.files import InputError
from hermesflow.hub import find

results = {}
for name, file in [("some/thing", "config.json"), ("some/thing", "other.json"),
                   ("nobody/nothing", "config.json"), ("gated/thing", "config.json"),
                   ("ill/thing", "config.json")]:
    try:
        results[f"{name} {file}"] = find(name, file)
    except InputError as error:
        results[f"{name} {file}"] = str(error)
results["digest"] = digest("some/thing")
print(json.dumps(results))
"""


def test_a_hub_that_answers(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    ours = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN"):
        ours.pop(name, None)
    ours |= {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path), "HF_ENDPOINT": endpoint}
    try:
        done = subprocess.run([sys.executable, "-c", ONLINE], cwd=ROOT, text=True, env=ours,
                              capture_output=True, timeout=120)
    finally:
        server.shutdown()
        server.server_close()
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(done.stdout.splitlines()[-1])
    snapshot = tmp_path / "hub" / "models--some--thing" / "snapshots" / REVISION
    ill = results.pop("ill/thing config.json")
    assert ill.startswith(f"ill/thing: config.json cannot be downloaded from {endpoint} (")
    assert results == {
        "some/thing config.json": str(snapshot / "config.json"),
        "some/thing other.json": None,
        "nobody/nothing config.json":
            f"nobody/nothing: neither a folder here nor a public repository of {endpoint}",
        "gated/thing config.json":
            f"gated/thing: {endpoint}/gated/thing gives it to those who have accepted its terms "
            "and are logged in (hf auth login)",
        "digest": REVISION[:16],
    }
    assert (snapshot / "config.json").read_bytes() == b'{"a": 1}'


# ------------------------------------------------------------ parameters that transformers makes up


def saved(folder: Path, model, change=None) -> Path:
    """A model's folder; change: of its file's weights."""
    model.save_pretrained(folder)
    if change is not None:
        weights = change(load_file(folder / "model.safetensors"))
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def legacy_norms(weights: dict) -> dict:
    """The names of BERT's first checkpoints, google-bert/bert-large-uncased among them."""
    def renamed(name):
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
        return name.replace("LayerNorm.bias", "LayerNorm.beta")

    return {renamed(name): value for name, value in weights.items()}


def bert(kind=BertModel):
    return kind(BertConfig(vocab_size=20, **TINY))


def qwen() -> Qwen2_5_VLForConditionalGeneration:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    text = dict(vocab_size=60, num_key_value_heads=1, rope_parameters=rope, bos_token_id=1,
                eos_token_id=2, tie_word_embeddings=True, **TINY)
    vision = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=16)
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True, image_token_id=5,
        video_token_id=6, vision_start_token_id=7, vision_end_token_id=8))


def t5(**settings) -> T5ForConditionalGeneration:
    return T5ForConditionalGeneration(T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=16,
                                               num_layers=2, num_heads=2, **settings))


def mask2former() -> Mask2FormerForUniversalSegmentation:
    swin = SwinConfig(image_size=32, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2],
                      window_size=2, out_features=["stage1", "stage2", "stage3", "stage4"])
    return Mask2FormerForUniversalSegmentation(Mask2FormerConfig(
        backbone_config=swin, hidden_dim=32, feature_size=32, mask_feature_size=32, num_queries=4,
        encoder_feedforward_dim=16, dim_feedforward=16, encoder_layers=1, decoder_layers=2,
        num_attention_heads=2, num_labels=3))


def llama(**settings) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(vocab_size=20, **settings, **TINY))


def words_and_pictures(config, **text):
    """Of CLIP and BLIP."""
    return config(text_config=dict(vocab_size=20, bos_token_id=1, eos_token_id=2, sep_token_id=2,
                                   **text, **TINY),
                  vision_config=dict(image_size=32, patch_size=16, **TINY))


def without(part: str):
    return lambda weights: {k: v for k, v in weights.items() if part not in k}


def plus(**more):
    return lambda weights: weights | more


POSITIONS = torch.arange(8)[None]
# as published: with heads, constants and old names, without what is tied, or what nobody uses
COMPLETE = {
    "BERT for pretraining": (lambda: bert(BertForPreTraining), AutoModel, legacy_norms),
    "BERT without a pooler": (lambda: bert(BertForMaskedLM), AutoModel, None),
    "MPNet": (lambda: MPNetModel(MPNetConfig(vocab_size=20, **TINY)), AutoModel,
              plus(**{"embeddings.position_ids": POSITIONS})),
    "CLIP": (lambda: CLIPModel(words_and_pictures(CLIPConfig)), CLIPModel,
             plus(**{"text_model.embeddings.position_ids": POSITIONS})),
    "BLIP-VQA": (lambda: BlipForQuestionAnswering(words_and_pictures(BlipConfig,
                                                                     encoder_hidden_size=16)),
                 AutoModelForVisualQuestionAnswering, None),
    "T5, tied": (t5, AutoModelForSeq2SeqLM, None),
    "T5, not tied": (lambda: t5(tie_word_embeddings=False), AutoModelForSeq2SeqLM, None),
    "Llama": (llama, AutoModelForCausalLM,
              plus(**{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})),
    "Llama, tied": (lambda: llama(tie_word_embeddings=True), AutoModelForCausalLM, None),
    "Qwen2.5-VL, tied": (qwen, AutoModelForImageTextToText, None),
    "Mask2Former": (mask2former, Mask2FormerForUniversalSegmentation, without("criterion")),
}


@pytest.mark.parametrize("name", COMPLETE)
def test_checkpoints_as_they_are_published(tmp_path, name):
    build, kind, change = COMPLETE[name]
    with patch.object(modeling_mask2former, "requires_backends"):  # scipy, for the training loss
        original = build()
        model = load_hf(kind, saved(tmp_path, original, change))
    # AutoModel leaves the heads out, and draws a pooler that is not there at random
    theirs = (original if type(model) is type(original) else original.base_model).state_dict()
    compared = [k for k in model.state_dict() if k in theirs]
    assert all(torch.equal(model.state_dict()[k], theirs[k]) for k in compared)
    assert all("pooler" in k for k in model.state_dict().keys() - set(compared))


@pytest.mark.parametrize("build, kind, change, missing, of", [
    (bert, CLIPModel, None, 398, "logit_scale, text_model.embeddings.position_embedding.weight, "),
    (bert, AutoModel, without("layer.1."), 16, "encoder.layer.1.attention.output.LayerNorm.bias, "),
    (bert, AutoModel, without("word_embeddings"), 1, "embeddings.word_embeddings.weight)"),
    (llama, AutoModelForCausalLM, without("lm_head"), 1, "lm_head.weight)"),
    (t5, AutoModelForSeq2SeqLM, without("shared"), 1, "shared.weight)"),
])
def test_parameters_that_are_missing(tmp_path, capfd, build, kind, change, missing, of):
    folder = saved(tmp_path, build(), change)
    capfd.readouterr()
    message = error(load_hf, kind, folder)
    assert message.startswith(f"{folder}: cannot load as {kind.__name__} ({missing} of ")
    assert f" parameters are missing: {of}" in message
    assert "LOAD REPORT" not in "".join(capfd.readouterr())  # one line is enough


def test_a_tokenizer_without_its_vocabulary(tmp_path):
    """transformers makes one that knows special tokens only: every text would be [UNK] [UNK]."""
    saved(tmp_path / "bert", bert())
    T5Config().save_pretrained(tmp_path / "t5")
    for name in ("bert", "t5"):
        for kind in (AutoTokenizer, AutoProcessor):
            why = "the vocabulary of its tokenizer is missing"
            where = f"{tmp_path / name}: cannot load as {kind.__name__}"
            assert error(load_hf, kind, tmp_path / name) == f"{where} ({why})"
    (tmp_path / "bert" / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nring\n")
    tokenizer = load_hf(AutoTokenizer, tmp_path / "bert")
    assert tokenizer("a red ring").input_ids == [2, 5, 1, 6, 3]
