"""Janus: equal to transformers' own generate and forward, and the four stages over it."""

import json
import math
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (AutoProcessor, AutoTokenizer, JanusConfig,
                          JanusForConditionalGeneration)

import tiny_janus
from bench.kills import torchrun
from conftest import ROOT, main, results_of, stage
from hermesflow import janus, options
from hermesflow.contents import code_of
from hermesflow.files import InputError
from hermesflow.janus_net import Tokens
from hermesflow.jsonl import read_jsonl
from hermesflow.options import ImageSampling
from hermesflow.outputs import run_main
from hermesflow.packed import ImageBatch, TextBatch
from hermesflow.pictures import load_image, to_pil
from hermesflow.records import Pair, Sample
from hermesflow.sampling import TextRequest
from hermesflow.tables import tensors_of
from model import load, save

sample, score, dpo, evaluation = map(stage, ("01_sample", "02_score", "03_pair_dpo", "04_eval"))
TEXTS = ["a big red ring left of a small blue square", "a red ring", "is this yes or no"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("janus")
    tiny_janus.save_tiny(folder / "base")
    return folder


@pytest.fixture(scope="module")
def policy(folder):
    return load(folder / "base")


@pytest.fixture(scope="module")
def theirs(folder):
    """transformers' own model and processor."""
    janus = JanusForConditionalGeneration.from_pretrained(folder / "base", dtype=torch.float32)
    return janus.eval(), AutoProcessor.from_pretrained(folder / "base")


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)) for _ in range(2)]


def pixels_of(pictures) -> torch.Tensor:
    arrays = np.stack([np.asarray(p) for p in pictures])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 127.5 - 1  # (B, 3, H, W)


def asked(processor, picture, question: str):
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}],
                                         add_generation_prompt=True)
    return processor(text=text, images=picture, return_tensors="pt")


def drawn(processor, text: str):
    content = [{"role": "user", "content": [{"type": "text", "text": text}]}]
    prompt = processor.apply_chat_template(content, add_generation_prompt=True)
    return processor(text=prompt, generation_mode="image", return_tensors="pt")


# ------------------------------------------------------------------ equal to transformers, to 1e-4


def test_prompts_are_the_processors(policy, theirs, pictures):
    for text in TEXTS:
        about = asked(theirs[1], pictures[0], text).input_ids[0].tolist()
        assert policy.tokens.look.head + policy.tokens.text_prompt(text) == about
        assert policy.tokens.t2i_prompt(text) == drawn(theirs[1], text).input_ids[0].tolist()
        assert policy.prompt_length(text) == len(policy.tokens.t2i_prompt(text))


def test_prompts_of_byte_pairs_are_the_processors():
    """A BPE merges a word with the space before it, and the template's ends with the text."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tests" / "golden" / "phi-1_5-tokenizer")
    tokenizer.add_special_tokens({"pad_token": "<pad>", "extra_special_tokens": tiny_janus.ROLES})
    names = list(tiny_janus.SPECIAL.items())[4:]
    tokenizer._set_model_specific_special_tokens(dict(names))
    tokenizer.add_tokens([value for _, value in names], special_tokens=True)
    tiny = tiny_janus.tiny_processor()
    processor = type(tiny)(tiny.image_processor, tokenizer, chat_template=tiny_janus.TEMPLATE,
                           use_default_system_prompt=True, num_image_tokens=16)
    tokens = Tokens(processor, 16, 200, "here")
    picture = Image.new("RGB", (16, 16))
    for text in (*TEXTS, "Two cats, 3.5 m apart;\n\n“é” – don't!", "A", "\u4e2d\u6587 ok ?"):
        about = asked(processor, picture, text).input_ids[0].tolist()
        assert tokens.look.head + tokens.text_prompt(text) == about
        assert tokens.t2i_prompt(text) == drawn(processor, text).input_ids[0].tolist()


def test_what_looks_like_a_special_token_is_text(policy):
    tokens = policy.tokens
    special = {tokens.bos, tokens.eot, tokens.pad, tokens.boi, *tokens.look.head[-18:-16]}
    plain = tokens.text_prompt("red")
    for text in ("<|User|>", "<image_placeholder>", "<eos>", "<begin_of_image>"):
        prompt = tokens.text_prompt(text)
        assert not special & set(prompt)
        assert prompt[-1] == plain[-1]
        assert tokens.t2i_prompt(text).count(tokens.boi) == 1


def test_long_texts_are_cut_and_the_empty_one_is_unconditional(policy):
    tokens = policy.tokens
    long = tokens.t2i_prompt("red " * 1000)
    assert len(long) == policy.longest_prompt == 256 - 16
    assert long[-1] == tokens.boi and policy.prompt_length("red " * 1000) > 1000
    empty = tokens.t2i_prompt("")
    assert empty == [tokens.bos, *[tokens.pad] * (len(empty) - 2), tokens.boi]
    with pytest.raises(InputError, match="there does not fit into 20. tokens"):
        policy.check_prompt("red " * 300, "there")


def test_greedy_texts(policy, theirs, pictures):
    """In one batch, of which two are about the first image."""
    janus, processor = theirs
    requests = [TextRequest(i % 2, text) for i, text in enumerate(TEXTS)]
    ours = policy.generate_text(pixels_of(pictures), requests, 12)
    for request, text in zip(requests, ours):
        inputs = asked(processor, pictures[request.image], request.prompt)
        output = janus.generate(**inputs, max_new_tokens=12, do_sample=False)[0]
        expected = output[inputs.input_ids.shape[1] :].tolist()
        assert text.ids + [policy.tokens.eot] * text.ended == expected
        assert policy.decode_text(text.ids) == processor.decode(
            expected, skip_special_tokens=True).strip()


@pytest.mark.parametrize("guidance_scale", [1.5, 4.0, 0.0])
def test_greedy_images(policy, theirs, guidance_scale):
    """Three prompts of two lengths in one batch; guided, or not at all."""
    janus, processor = theirs
    texts = [*TEXTS[:2], "a blue ring"]
    ours = policy.generate_images(texts, None, ImageSampling(guidance_scale=guidance_scale))
    for text, codes in zip(texts, ours):
        if guidance_scale:
            expected = janus.generate(**drawn(processor, text), generation_mode="image",
                                      do_sample=False, guidance_scale=1 + guidance_scale)[0]
        else:  # where transformers' own generate fails
            expected = teacher_forced(theirs, text, codes)[0].argmax(-1)
        assert torch.equal(codes, expected)
    assert len(set(map(tuple, ours.tolist()))) == 3


def teacher_forced(theirs, text: str, codes: torch.Tensor) -> torch.Tensor:
    """(2, N, C) logits of transformers' network behind a text and behind none."""
    janus, processor = theirs
    ids = drawn(processor, text).input_ids
    tokenizer = processor.tokenizer
    kept = (ids == tokenizer.bos_token_id) | (ids == tokenizer.boi_token_id)
    both = torch.cat([ids, torch.where(kept, ids, tokenizer.pad_token_id)])  # (2, P)
    with torch.no_grad():
        embeds = janus.get_input_embeddings()(both)
        images = janus.prepare_embeddings_for_image_generation(codes[None, :-1]).expand(2, -1, -1)
        hidden = janus.model.language_model(inputs_embeds=torch.cat([embeds, images], 1))
        return janus.model.generation_head(hidden.last_hidden_state[:, ids.shape[1] - 1 :])


@pytest.mark.parametrize("guidance_scale", [0.0, 1.5])
def test_log_probs_of_images(policy, theirs, guidance_scale):
    """Of two images each behind two texts of different lengths."""
    images = torch.randint(32, (2, 2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = policy.image_logps(TEXTS[:2], images, None, guidance_scale)
    for b, text in enumerate(TEXTS[:2]):
        for s, codes in enumerate(images[b]):
            cond, uncond = teacher_forced(theirs, text, codes)
            logits = cond + guidance_scale * (cond - uncond)
            expected = logits.log_softmax(-1).gather(1, codes[:, None]).sum()
            assert ours.sums[b, s] == pytest.approx(expected.item(), rel=1e-5, abs=1e-4)
            assert ours.counts[b, s] == 16


def test_a_dropped_text_is_as_long_as_it_was(policy, theirs):
    """For guidance, as drawing goes: behind padding in the place of that text."""
    images = torch.randint(32, (2, 2, 16), generator=torch.Generator().manual_seed(0))
    batch = ImageBatch(["", TEXTS[1]], images, None, 0.0, TEXTS[:2])
    with torch.no_grad():
        dropped, told = policy.net(policy.pack_images(batch))[0][0][:, 1:]
        torch.testing.assert_close(told, policy.image_logps([TEXTS[1]], images[1:]).sums[0])
    for codes, ours in zip(images[0], dropped):
        logits = teacher_forced(theirs, TEXTS[0], codes)[1]
        expected = logits.log_softmax(-1).gather(1, codes[:, None]).sum()
        assert ours == pytest.approx(expected.item(), rel=1e-5, abs=1e-4)


def test_log_probs_of_texts(policy, theirs, pictures):
    janus, processor = theirs
    responses = [[[7, 8, 9], [10]], [[8, 9, 10, 11, 12], [9, 7]]]
    ended = [[True, False], [True, True]]
    batch = TextBatch(pixels_of(pictures), TEXTS[:2], responses, ended)
    with torch.no_grad():
        ours = policy.net(policy.pack_text(batch))[0]
    for b, text in enumerate(TEXTS[:2]):
        inputs = asked(processor, pictures[b], text)
        P = inputs.input_ids.shape[1]
        for s, response in enumerate(responses[b]):
            labels = torch.tensor(response + [policy.tokens.eot] * ended[b][s])
            ids = torch.cat([inputs.input_ids, labels[None]], 1)
            with torch.no_grad():
                logits = janus(input_ids=ids, pixel_values=inputs.pixel_values).logits
            expected = logits[0, P - 1 : -1].log_softmax(-1).gather(1, labels[:, None]).sum()
            assert ours[0][b, 1 + s] == pytest.approx(expected.item(), rel=1e-5, abs=1e-4)
            assert ours[1][b, 1 + s] == len(labels)


def test_decoded_pixels_and_what_is_seen_of_them(policy, theirs):
    """Codes that are looked at are decoded to a picture, which the processor prepares."""
    janus, processor = theirs
    codes = torch.randint(32, (2, 16), generator=torch.Generator().manual_seed(0))
    pixels = policy.decode_image(codes)
    with torch.no_grad():
        expected = janus.decode_image_tokens(codes)  # (B, H, W, 3)
    torch.testing.assert_close(pixels, expected.permute(0, 3, 1, 2), atol=1e-4, rtol=0)
    seen = processor.image_processor(to_pil(pixels), return_tensors="pt").pixel_values
    torch.testing.assert_close(policy.pixels_of(codes), seen, atol=1e-4, rtol=0)


def test_codes_are_of_unit_vectors(policy, theirs, pictures):
    """As the original: the nearest of the codebook's unit vectors, whatever their length."""
    vq = theirs[0].model.vqmodel
    pixels = pixels_of(pictures)
    with torch.no_grad():
        latents = vq.quant_conv(vq.encoder(pixels)).flatten(2).mT  # (B, N, D)
        distances = torch.cdist(F.normalize(latents, dim=-1),
                                F.normalize(vq.quantize.embedding.weight, dim=-1)[None])
        raw = vq.encode(pixels).image_tokens.view(2, 16)
    codes = policy.encode_image(pixels)
    assert torch.equal(codes, distances.argmin(-1))
    assert 0 < (codes == raw).float().mean() < 1  # transformers' own differ


# ------------------------------------------------------------------------------- seeds and batches


def test_images_do_not_depend_on_the_batch(policy, monkeypatch):
    sampling = ImageSampling(guidance_scale=1.5)
    together = policy.generate_images(TEXTS * 2, list(range(6)), sampling)
    one = [policy.generate_images([t], [i], sampling) for i, t in enumerate(TEXTS * 2)]
    assert torch.equal(together, torch.cat(one))
    monkeypatch.setattr(sys.modules["hermesflow.janus"], "IMAGES_AT_ONCE", 2)
    assert torch.equal(policy.generate_images(TEXTS * 2, list(range(6)), sampling), together)
    assert not torch.equal(together[0], together[3])  # another seed
    cold = ImageSampling(guidance_scale=1.5, temperature=0)
    greedy = policy.generate_images(TEXTS, None, sampling)
    assert torch.equal(policy.generate_images(TEXTS, [0, 1, 2], cold), greedy)


def test_guidance_in_a_part_of_the_image(policy):
    """Codes before the interval are those of no guidance."""
    def draw(scale, interval):
        return policy.generate_images(TEXTS, [0, 1, 2],
                                      ImageSampling(guidance_scale=scale,
                                                    guidance_interval=interval))

    part = draw(4.0, (0.5, 1.0))
    assert torch.equal(part[:, :8], draw(0.0, (0.0, 1.0))[:, :8])
    assert not torch.equal(part[:, 8:], draw(0.0, (0.0, 1.0))[:, 8:])


def test_a_checkpoint_is_transformers_own(policy, theirs, folder, tmp_path):
    save(policy, tmp_path / "saved")
    again = JanusForConditionalGeneration.from_pretrained(tmp_path / "saved")
    ours = again.state_dict()
    expected = theirs[0].state_dict()
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], value) for name, value in expected.items())
    assert again.generation_config.generation_kwargs == {"boi_token_id": policy.tokens.boi}
    processor = AutoProcessor.from_pretrained(tmp_path / "saved")
    assert drawn(processor, TEXTS[0]).input_ids[0].tolist() == policy.tokens.t2i_prompt(TEXTS[0])
    save(load(tmp_path / "saved"), tmp_path / "again")
    assert results_of(tmp_path / "again") == results_of(tmp_path / "saved")
    assert options.is_whole(str(tmp_path / "saved"))


# ------------------------------------------------------------------------------------- the stages

SAMPLING = ("--captions", 3, "--max-new-tokens", 8, "--images", 3, "--guidance", 1.5, "--show", 1)
SCORING = ("--min-image-score", 0, "--max-new-tokens", 3, "--show", 1)
TRAINING = ("--steps", 3, "--batch", 4, "--micro-batch", 2, "--lr", 1e-3, "--nll-gen", 0.1,
            "--device", "cpu", "--save-every", 2, "--cond-dropout", 0.3)


@pytest.fixture(scope="module")
def records(folder):
    """Six pictures of different sizes, with captions and questions."""
    rng = np.random.default_rng(1)
    lines = []
    for i, size in enumerate([(30, 20), (97, 211), (64, 64), (64, 48), (12, 80), (16, 16)]):
        small = Image.fromarray(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8))
        small.resize(size, Image.Resampling.BICUBIC).save(folder / f"{i}.png")
        questions = []
        for word in ("ring", "blue", "left"):
            choices = ["blue", "small", "question", "this of"]
            questions.append({"question": f"is it {word}?", "choices": choices, "answer": "blue"})
        caption = " ".join(["a", "big", "red", "ring", "left", "of", "blue"][i % 3 : 5 + i % 2])
        lines.append({"id": f"r{i}", "image": f"{i}.png", "caption": caption,
                      "questions": questions})
    file = folder / "records.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def run_sample(records, out, *more):
    main(sample, "--records", records, "--model", records.parent / "base", "--out", out,
         *SAMPLING, *more)
    return out


def run_score(records, samples, out, *more):
    main(score, "--model", records.parent / "base", "--samples", samples, "--out", out, *SCORING,
         *more)
    return out


def run_train(records, pairs, out, *more):
    main(dpo, "--model", records.parent / "base", "--pairs", pairs / "pairs.jsonl", "--out", out,
         *TRAINING, *more)
    return out


@pytest.fixture(scope="module")
def sampled(records, folder):
    return run_sample(records, folder / "samples")


@pytest.fixture(scope="module")
def paired(records, sampled, folder):
    return run_score(records, sampled, folder / "pairs")


@pytest.fixture(scope="module")
def trained(records, paired, folder):
    return run_train(records, paired, folder / "train")


def read_log(out) -> list[dict]:
    return [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]


def test_all_codes_are_scored_anyway(records, paired, trained, folder):
    """Without masks, --complementary changes nothing."""
    again = run_train(records, paired, folder / "train-complementary", "--complementary")
    assert read_log(again) == read_log(trained)


def test_samples(policy, sampled):
    samples = read_jsonl(sampled / "samples.jsonl", Sample)
    assert samples.ids == [f"r{i}" for i in range(6)]
    for s in samples:
        tensors = tensors_of(s)
        assert tensors["images"].shape == (3, 16)
        texts = [policy.decode_text(ids[ids >= 0].tolist()) for ids in tensors["captions"]]
        assert texts == s.captions


def test_captions_are_of_the_picture_and_not_of_its_codes(policy, sampled):
    s = read_jsonl(sampled / "samples.jsonl", Sample)[0]
    codes = tensors_of(s)["image"][None]
    pixels = policy.looked_at([s.image], codes)  # of 30 x 20: the rest is grey
    expected = policy.processor.image_processor(Image.open(s.image), return_tensors="pt")
    torch.testing.assert_close(policy.pixels_of(pixels), expected.pixel_values)
    assert pixels[0, :, 0].abs().max() < 0.01 < pixels[0, :, 8].abs().mean()
    assert torch.equal(policy.encode_image(load_image(s.image, 16)[None]), codes)
    ids = policy.generate_text(pixels, [TextRequest(0, sample.CAPTION_QUESTION)], 8)[0].ids
    first = tensors_of(s)["captions"][0]
    assert ids == first[first >= 0].tolist()
    assert not torch.allclose(policy.pixels_of(codes), policy.pixels_of(pixels), atol=0.1)


def test_samples_and_pairs_do_not_depend_on_the_batch(records, sampled, paired, folder):
    again = run_sample(records, folder / "samples-1", "--batch", 1)
    assert results_of(again) == results_of(sampled)
    again = run_score(records, sampled, folder / "pairs-6", "--batch", 6)
    assert results_of(again) == results_of(paired)


def test_scores(policy, paired):
    pairs = read_jsonl(paired / "pairs.jsonl", Pair)
    assert len(pairs) >= 2
    assert all(p.win_image_score > p.lose_image_score for p in pairs)


def test_training_begins_at_2_ln_2_and_learns(records, trained, tmp_path):
    log = read_log(trained)
    assert [line["step"] for line in log] == [0, 1, 2]
    first = log[0]
    assert first["loss_und"] + first["loss_gen"] == pytest.approx(2 * math.log(2), abs=1e-5)
    assert first["grad_norm"] > 0 and log[2]["loss"] < first["loss"]
    before = JanusForConditionalGeneration.from_pretrained(records.parent / "base").state_dict()
    after = JanusForConditionalGeneration.from_pretrained(trained / "checkpoint").state_dict()
    for name, value in before.items():
        same = torch.equal(after[name], value)
        assert same == ("vqmodel" in name) or name == "model.language_model.embed_tokens.weight"


@pytest.fixture
def restored_precision():
    yield
    AcceleratorState._reset_state()


def test_training_with_guidance_and_checkpointing(records, paired, trained, tmp_path):
    out = run_train(records, paired, tmp_path / "guided", "--guidance", 1.5, "--steps", 1)
    assert read_log(out)[0]["loss_gen"] == pytest.approx(math.log(2), abs=1e-5)
    out = run_train(records, paired, tmp_path / "out", "--gradient-checkpointing")
    for ours, whole in zip(read_log(out), read_log(trained)):
        assert ours["loss"] == pytest.approx(whole["loss"], abs=1e-5)


@pytest.mark.parametrize("lora", [(), ("--lora", 3)])
def test_training_in_bfloat16(records, paired, tmp_path, restored_precision, lora):
    AcceleratorState._reset_state()
    out = run_train(records, paired, tmp_path / "out", "--precision", "bf16", *lora)
    log = read_log(out)
    assert log[0]["loss_und"] + log[0]["loss_gen"] == pytest.approx(2 * math.log(2), abs=1e-3)
    saved = load_file(out / "checkpoint" / "model.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.float32}


def test_adapters_become_an_ordinary_checkpoint(records, paired, tmp_path):
    """Only the matrices of the language model's layers change, by at most the rank."""
    pytest.importorskip("peft")
    out = run_train(records, paired, tmp_path / "out", "--lora", 3, "--lr", 1e-2)
    log = read_log(out)
    assert log[0]["loss_und"] + log[0]["loss_gen"] == pytest.approx(2 * math.log(2), abs=1e-5)
    assert log[2]["loss"] < log[0]["loss"]
    before = load_file(records.parent / "base" / "model.safetensors")
    after = load_file(out / "checkpoint" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, value in before.items():
        inside = "language_model.layers" in name and value.ndim == 2
        assert torch.equal(after[name], value) != inside
        if inside:
            assert torch.linalg.matrix_rank(after[name] - value, tol=1e-5) <= 3
    with pytest.raises(InputError, match="--lora 33: the network is 32 wide"):
        run_train(records, paired, tmp_path / "wide", "--lora", 33)


@pytest.mark.parametrize("calls", [2, 8])
def test_an_interrupted_training_continues(records, paired, trained, tmp_path, monkeypatch, calls):
    """Killed while the reference is computed, and in the last step."""
    real = janus.Model.pair_logps
    seen = []

    def pair_logps(self, *batches):
        seen.append(1)
        if len(seen) == calls:
            signal.raise_signal(signal.SIGTERM)
        return real(self, *batches)

    monkeypatch.setattr(janus.Model, "pair_logps", pair_logps)
    with pytest.raises(SystemExit) as ended:
        run_train(records, paired, tmp_path / "out")
    assert ended.value.code == 128 + signal.SIGTERM
    run_train(records, paired, tmp_path / "out")
    assert results_of(tmp_path / "out") == results_of(trained)


def test_a_picture_that_is_gone(records, paired, tmp_path):
    """Training looks at the pictures again; a missing one ends in one line, before any step."""
    pairs = shutil.copytree(paired, tmp_path / "pairs")
    with pytest.raises(InputError, match=r"r?\d.png: .*No such file"):
        run_train(records, pairs, tmp_path / "out")
    assert not (tmp_path / "out" / "train.jsonl").exists()


def test_previews(records, paired, trained, tmp_path):
    out = run_train(records, paired, tmp_path / "out", "--preview-every", 3)
    names = sorted(p.name for p in (out / "previews").iterdir())
    assert names == ["000000.png", "000003.png"]
    assert read_log(out) == read_log(trained)


@pytest.mark.parametrize("more", [("--judge", "self"), ("--judge", "self", "--dtype", "bfloat16")])
def test_evaluation(records, trained, tmp_path, more):
    out = tmp_path / "eval"
    main(evaluation, "--records", records, "--model", trained / "checkpoint", "--out", out,
         "--guidance", 1.5, "--show", 2, *more)
    metrics = json.loads((out / "metrics.json").read_text())
    assert 0 <= metrics["understanding"]["mean"] <= 1


def test_scores_by_likelihood_and_after_encoding_again(records, sampled, tmp_path):
    out = run_score(records, sampled, tmp_path / "pairs", "--image-scorer", "likelihood",
                    "--reencode")
    assert read_jsonl(out / "pairs.jsonl", Pair)


def launch(processes: int, script, *arguments):
    command = torchrun(processes, script, *arguments)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_two_processes_write_the_same(records, sampled, paired, folder):
    base = ("--model", folder / "base")
    launch(2, "01_sample.py", "--records", records, *base, "--out", folder / "samples-2", *SAMPLING)
    launch(2, "02_score.py", "--samples", sampled, *base, "--out", folder / "pairs-2", *SCORING)
    assert results_of(folder / "samples-2") == results_of(sampled)
    assert results_of(folder / "pairs-2") == results_of(paired)


def test_two_processes_train_the_same(records, paired, trained, folder):
    arguments = ("--model", folder / "base", "--pairs", paired / "pairs.jsonl", *TRAINING)
    launch(2, "03_pair_dpo.py", *arguments, "--out", folder / "train-2")
    launch(2, "tests/fsdp_on_cpu.py", "03_pair_dpo.py", *arguments, "--out", folder / "train-fsdp")
    for name in ("train-2", "train-fsdp"):
        for line, expected in zip(read_log(folder / name), read_log(trained), strict=True):
            assert line == pytest.approx(expected, rel=1e-3, abs=1e-4)


# ------------------------------------------------------------------------------- what does not fit


def broken(folder, tmp_path, change):
    """A copy of the checkpoint whose config.json was changed."""
    copy = shutil.copytree(folder / "base", tmp_path / "broken")
    config = json.loads((copy / "config.json").read_text())
    change(config)
    (copy / "config.json").write_text(json.dumps(config))
    return copy


@pytest.mark.parametrize("part, field, value, said", [
    ("vision_config", "num_image_tokens", 15, "'vision_config.num_image_tokens' should be 16"),
    ("vision_config", "patch_size", 8, "field 'vision_config"),
    ("vision_config", "image_size", [16, 16], "cannot load as AutoConfig"),
    ("vision_config", "projection_dim", 16, "field 'vision_config.projection_dim' should be 32"),
    ("vision_config", "num_attention_heads", 0, "field 'num_attention_heads'"),
    ("vq_config", "num_embeddings", 31, "cannot load as JanusForConditionalGeneration"),
    ("vq_config", "projection_dim", "32", "cannot load as AutoConfig"),
    ("vq_config", "channel_multiplier", [1, 1], "field 'vision_config.patch_size' should be 2"),
    ("text_config", "model_type", "phi", "field 'text_config.model_type' should be 'llama'"),
    ("text_config", "model_type", "no-such", "cannot load as AutoConfig"),
    ("text_config", "num_key_value_heads", 1, "'text_config.num_key_value_heads' should be 2"),
    ("text_config", "num_hidden_layers", 10**9, "field 'num_hidden_layers' should be"),
    ("text_config", "hidden_size", "32", "cannot load as AutoConfig"),
    ("text_config", "vocab_size", 10, "field 'text_config.vocab_size' is 10, the tokenizer has"),
    ("text_config", "max_position_embeddings", 20, "leaves no room for a text"),
    (None, "text_config", 3, "cannot load as AutoConfig")])
def test_a_malformed_config_is_one_line(folder, tmp_path, capsys, part, field, value, said):
    def change(config):
        (config[part] if part else config)[field] = value

    copy = broken(folder, tmp_path, change)
    with pytest.raises(SystemExit) as ended:
        run_main(lambda: load(copy))
    printed = capsys.readouterr().err
    assert ended.value.code == 2 and printed.count("\n") == 1
    assert printed.startswith("error: ") and said in printed and str(copy) in printed


def test_a_checkpoint_that_is_not_whole(folder, tmp_path):
    copy = broken(folder, tmp_path, lambda config: None)
    weights = load_file(copy / "model.safetensors")
    name = "model.generation_head.vision_head.bias"
    for value, said in ((torch.full_like(weights[name], torch.nan), "not finite numbers"),
                        (None, "1 of 250 parameters are missing: model.generation_head.vision")):
        changed = {k: v for k, v in weights.items() if k != name or value is not None}
        if value is not None:
            changed[name] = value
        save_file(changed, copy / "model.safetensors", {"format": "pt"})
        with pytest.raises(InputError, match=said):
            load(copy)
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    (copy / "chat_template.jinja").write_text("{{ messages[0].nothing.at.all }}")
    with pytest.raises(InputError, match="its chat template fails"):
        load(copy)
    (copy / "chat_template.jinja").write_text("nothing")
    with pytest.raises(InputError, match="does not put an image before the text"):
        load(copy)
    with pytest.raises(InputError, match="Janus has its own tokenizers"):
        load(folder / "base", image_tokenizer="showlab/magvitv2")


def test_published_sizes_are_taken():
    """Of Janus-Pro-1B and 7B, as transformers' conversion writes them."""
    for width, layers, heads in ((2048, 24, 16), (4096, 30, 32)):
        text = dict(model_type="llama", hidden_size=width, num_hidden_layers=layers,
                    num_attention_heads=heads, vocab_size=102400, max_position_embeddings=16384)
        config = JanusConfig(text_config=text, vision_config={"projection_dim": width},
                             vq_config={"projection_dim": width, "image_token_embed_dim": width})
        janus.check_config(config, "config.json")
        assert config.vision_config.num_image_tokens == 576


def test_its_code_is_among_what_settings_record():
    names = code_of([str(ROOT / "01_sample.py")])
    assert {"model.py", "hermesflow/janus.py", "hermesflow/janus_net.py"} <= names.keys()


def test_no_tokenizer_of_show_o_is_asked_for(folder, monkeypatch):
    found = {"some/janus": str(folder / "base" / "config.json"), "some/model": None}
    monkeypatch.setattr(options, "find", lambda repository, name: found[repository])
    assert options.is_whole("some/janus") and not options.is_whole("some/model")
    args = sample.parse_args(["--prompt", "a", "--model", str(folder / "base")])
    assert sample.model_inputs(args) == {"model": str(folder / "base"), "image_tokenizer": None,
                                         "text_tokenizer": None}
