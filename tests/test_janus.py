"""Janus: equal to transformers' own generate and forward, and the four stages over it."""

import json
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoProcessor, JanusForConditionalGeneration

from conftest import ROOT, main, results_of, stage
from hermesflow.files import InputError
from hermesflow.jsonl import read_jsonl
from hermesflow.options import ImageSampling, is_whole
from hermesflow.packed import ImageBatch, TextBatch
from hermesflow.pictures import to_pil
from hermesflow.records import Pair, Sample
from hermesflow.sampling import TextRequest
from hermesflow.tables import load_tensors, tensors_of
from model import load, save
from tiny_janus import save_tiny

sample, score, dpo, evaluation = map(stage, ("01_sample", "02_score", "03_pair_dpo", "04_eval"))
TEXTS = ["a big red ring left of a small blue square", "a red ring", "is this yes or no"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("janus")
    save_tiny(folder / "base")
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
                logits = janus(input_ids=ids, pixel_values=inputs.pixel_values).logits[0, P - 1 : -1]
            expected = logits.log_softmax(-1).gather(1, labels[:, None]).sum()
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
    assert is_whole(str(tmp_path / "saved"))
