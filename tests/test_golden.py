"""Equality with the original implementation, from its recorded results (see golden/README.md)."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, PhiConfig

from conftest import GOLDEN, stage
import plain
from model import (Ask, Drawing, Magvit, MagvitConfig, Segment, Showo, TextPrefix, answer_segment, build, draw_images,
                   fill, image_segment, load_image, mask_least_confident, pack, slots_to_mask, write_text)
from transformers.models.phi.modeling_phi import PhiRotaryEmbedding

pair_dpo = stage("03_pair_dpo")

G = load_file(GOLDEN / "golden.safetensors")
J = json.loads((GOLDEN / "golden.json").read_text())
CONFIG = json.loads((GOLDEN / "showo_tiny_config.json").read_text())
TOKENIZER = AutoTokenizer.from_pretrained(GOLDEN / "phi-1_5-tokenizer")
VQ_CONFIG = MagvitConfig(32, 13, (1, 1, 1, 2, 2), (1,) * 5, (1, 1, 1, 1, 2), (1,) * 5)


def close(ours, theirs):
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=1e-4, atol=1e-4)


def tiny(weights: str) -> Showo:
    phi = PhiConfig.from_dict(json.loads((GOLDEN / "tiny_phi_config.json").read_text()))
    model = build(CONFIG, phi, TOKENIZER)
    fill(model, load_file(GOLDEN / weights), weights)
    model.showo.model.rotary_emb = PhiRotaryEmbedding(phi)
    return model.eval()


@pytest.fixture(scope="module")
def policy():
    return tiny("showo_tiny.safetensors")


@pytest.fixture(scope="module")
def reference():
    return tiny("showo_tiny_reference.safetensors")


@pytest.fixture(scope="module")
def vq():
    vq = Magvit(VQ_CONFIG)
    fill(vq, load_file(GOLDEN / "magvitv2_tiny.safetensors"), "magvitv2_tiny.safetensors")
    return vq.eval()


def unpad(row, pad):
    """A recorded row without its padding."""
    return [i for i in row.tolist() if i != pad]


# ----------------------------------------------------------------------------------------------------- vocabulary


def test_special_tokens(policy):
    t, ids = policy.tokens, J["special_token_ids"]
    ours = {"<|soi|>": t.soi, "<|eoi|>": t.eoi, "<|t2i|>": t.t2i, "<|mmu|>": t.mmu, "<|sot|>": t.sot, "<|eot|>": t.eot,
            "<|pad|>": t.pad}
    assert {k: ids[k] for k in ours} == ours
    assert t.first_code == J["len_tokenizer"]
    assert (t.mask, t.vocab_size) == (CONFIG["mask_token_id"], CONFIG["vocab_size"])


@pytest.mark.parametrize("i", range(len(J["captions"])))
def test_drawing_prompt(policy, i):
    t, row = policy.tokens, G["t2i_gen.input_ids"][i]
    ours = t.draw(J["captions"][i]) + t.image([-1] * t.image_tokens)
    assert ours == unpad(row, t.pad)
    assert len(row) == t.window + t.image_tokens + 2
    assert t.draw("") + t.image([-1] * t.image_tokens) == unpad(G["t2i_gen.uncond_input_ids"][i], t.pad)


@pytest.mark.parametrize("i", range(3))
def test_captioning_prompt(policy, i):
    t, row = policy.tokens, G["mmu_gen.input_ids"][i].tolist()
    codes = G["vq.codes"][i].tolist()
    assert t.look(codes) + t.ask(J["mmu_question"]) == row


# ------------------------------------------------------------------------------------------- attention and logits


def drawing_row(tokens, row):
    """A recorded drawing row as prefix and image block."""
    ids = unpad(row, tokens.pad)
    cut = ids.index(tokens.soi)
    return [Segment(ids[:cut]), Segment(ids[cut:], bidirectional=True)]


def test_drawing_attention(policy):
    pad = policy.tokens.pad
    rows = torch.cat([G["t2i_gen.input_ids"], G["t2i_gen.uncond_input_ids"]])
    for ids, theirs in zip(rows, G["t2i_gen.attend"]):
        ours = plain.dense(pack([drawing_row(policy.tokens, ids)], pad))
        keep = ids != pad
        assert torch.equal(ours, theirs[keep][:, keep])
        assert not theirs[keep][:, ~keep].any()  # nobody sees padding, so leaving it out changes nothing


def test_captioning_attention(policy):
    image = policy.tokens.image_tokens + 3
    for ids, theirs in zip(G["mmu_gen.input_ids"].tolist(), G["mmu_gen.attend"]):
        row = [Segment(ids[:image], bidirectional=True), Segment(ids[image:])]
        assert torch.equal(plain.dense(pack([row], policy.tokens.pad)), theirs)


@torch.no_grad()
def test_drawing_logits_full_forward(policy):
    rows = torch.cat([G["t2i_gen.input_ids"], G["t2i_gen.uncond_input_ids"]])
    for i, ids in enumerate(rows):
        p = pack([drawing_row(policy.tokens, ids)], policy.tokens.pad)
        logits = policy.showo.lm_head(policy.hidden(p["ids"], p["positions"], layout=p["layout"]))[0, -17:-1]
        first = policy.tokens.first_code
        close(logits[:, first : first + 256], G["t2i_gen.image_logits_masked_all"][i])
        if i == 0:
            torch.testing.assert_close(logits[0], G["t2i_gen.full_logits_pos0"].float(), rtol=2e-3, atol=2e-3)  # stored in fp16


@torch.no_grad()
def test_drawing_logits_cached_prefix(policy):
    """The fast path: text keys/values once, then only the image block, without padding or mask."""
    for i, text in enumerate([*J["captions"], ""]):
        prefix = TextPrefix(policy, [policy.tokens.draw(text)])
        block = torch.tensor([policy.tokens.image([-1] * policy.tokens.image_tokens)])
        for alike in (True, False):  # the second call finds the cache as the first one did
            close(policy.code_logits(prefix.hidden(block, alike))[0, :, :256], G["t2i_gen.image_logits_masked_all"][i])


@torch.no_grad()
def test_captioning_logits(policy):
    image = policy.tokens.image_tokens + 3
    for i, ids in enumerate(G["mmu_gen.input_ids"].tolist()):
        p = pack([[Segment(ids[:image], bidirectional=True), Segment(ids[image:])]], policy.tokens.pad)
        logits = policy.showo.lm_head(policy.hidden(p["ids"], p["positions"], layout=p["layout"]))
        close(logits[0, -1], G["mmu_gen.last_logits"][i])


# ------------------------------------------------------------------------------------------------------- decoding

RECORDED = [(float(k.split(".")[2].removeprefix("guidance")), int(k.split(".")[3].removeprefix("steps")))
            for k in G if k.startswith("t2i_gen.greedy_tokens")]


@pytest.mark.parametrize("guidance, steps", RECORDED)
def test_greedy_drawing(policy, guidance, steps):
    theirs = G[f"t2i_gen.greedy_tokens.guidance{guidance:g}.steps{steps}"]
    ours = draw_images(policy, J["captions"], None, Drawing(steps, guidance))
    assert torch.equal(ours, theirs)


def test_schedule():
    temperature, steps = 1.0, 18
    for step, (t, count) in enumerate(zip(J["t2i_temperature_per_step_18"], J["t2i_mask_len_per_step_18"])):
        temperature *= 1 - (step + 1) / steps
        assert math.isclose(temperature, t, abs_tol=1e-12)
        assert slots_to_mask(step, steps, CONFIG["num_vq_tokens"]) == count


def test_mask_step():
    ours = mask_least_confident(G["maskstep.probs"], G["maskstep.gumbel"], G["maskstep.mask_len"].long(), 0.7)
    assert torch.equal(ours, G["maskstep.masking"])


def test_greedy_captions(policy):
    asks = [Ask(i, policy.tokens.ask(J["mmu_question"])) for i in range(3)]
    answers = write_text(policy, G["vq.codes"], asks, max_new_tokens=20)
    for i, answer in enumerate(answers):
        assert answer == unpad(G[f"mmu_gen.greedy.{i}"], policy.tokens.eot)
        assert policy.tokens.decode(answer) == J[f"mmu_gen_greedy_text.{i}"]


# -------------------------------------------------------------------------------------------------- image tokenizer


def test_image_transform():
    for i in range(3):
        close(load_image(GOLDEN / f"image{i}.png", 64), G["vq.pixels"][i])
    close(load_image(GOLDEN / "image_big.png", 256)[:, ::8, ::8], G["image_transform.256"])


@torch.no_grad()
def test_image_tokenizer(vq):
    close(vq.encoder(G["vq.pixels"]), G["vq.encoder_out"])
    assert torch.equal(vq.encode(G["vq.pixels"]), G["vq.codes"])
    close(vq.decode(G["vq.codes"]), G["vq.decoded"])
    close(vq.decode(torch.arange(24)[None] * 300 % 8192, height=4), G["vq.decoded_rect"])


# ------------------------------------------------------------------------------------------------------------- DPO

COLUMNS = {name: i for i, name in enumerate(J["dpo_logprob_columns"])}


def drawing_rows(tokens, labels=True):
    """Record -> text, win image and lose image behind it, with the recorded mask."""
    rows = []
    for i, text in enumerate(J["dpo_t2i_texts"]):
        mask = G["dpo.mask"][i].tolist()
        branches = [image_segment(tokens, G[f"dpo.image_tokens_{side}"][i].sub(tokens.first_code).tolist(), mask)
                    for side in ("win", "lose")]
        rows.append([Segment(tokens.draw(text)), *branches])
    return rows


def test_drawing_rows_match_recorded_inputs(policy):
    t = policy.tokens
    for i, row in enumerate(drawing_rows(t)):
        for branch, side in zip(row[1:], ("win", "lose")):
            assert row[0].ids + branch.ids == unpad(G[f"dpo.t2i.input_ids_{side}"][i], t.pad)


def text_rows(tokens):
    """Record -> image, win answer and lose answer behind it, in the original's training format: no <|sot|>."""
    rows = []
    for i in range(2):
        image = G["dpo.image_tokens_win"][i]
        row = [Segment([tokens.mmu, tokens.soi, *G["dpo.mmu.input_ids_win"][i, 2 : 2 + len(image)].tolist(), tokens.eoi],
                       bidirectional=True)]
        for side in ("win", "lose"):
            ids, labels = G[f"dpo.mmu.input_ids_{side}"][i], G[f"dpo.mmu.labels_{side}"][i]
            scored = labels != -100
            prompt = ids[len(row[0].ids) : int(scored.nonzero()[0])].tolist()
            row.append(answer_segment(prompt, ids[scored].tolist()))
        rows.append(row)
    return rows


def with_frame(rows):
    """The original also scores <|soi|> and <|eoi|>, which are given: add them to compare. (We leave them out.)"""
    for row in rows:
        for segment in row[1:]:
            segment.targets[0], segment.targets[-1] = segment.ids[0], segment.ids[-1]
    return rows


def pair_dpo_columns(policy, reference):
    """The twelve recorded columns per record, with the stage's own loss."""
    columns = torch.empty(2, len(COLUMNS))
    for half, rows in (("t2i", with_frame(drawing_rows(policy.tokens))), ("mmu", text_rows(policy.tokens))):
        sums = {"policy": policy.logprobs(rows)[0], "ref": reference.logprobs(rows)[0].detach()}
        for who in sums:
            for side, column in (("win", 1), ("lose", 2)):
                columns[:, COLUMNS[f"{who}_{side}_{half}"]] = sums[who][:, column]
        delta = pair_dpo.margins(sums["policy"], sums["ref"])
        columns[:, COLUMNS[f"delta_{half}"]] = delta
        columns[:, COLUMNS[f"loss_{half}"]] = pair_dpo.preference_loss(delta, J["beta"])
    return columns


def test_dpo_columns_and_gradients(policy, reference):
    columns = pair_dpo_columns(policy, reference)
    close(columns.detach(), G["dpo.logprobs"])
    loss = columns[:, [COLUMNS["loss_t2i"], COLUMNS["loss_mmu"]]].sum(1).mean()
    assert math.isclose(loss.item(), J["dpo_total_loss"], rel_tol=1e-4)
    policy.zero_grad()
    loss.backward()
    grads = {f"dpo.grad.{k}": p.grad for k, p in policy.named_parameters()}
    for key in (k for k in G if k.startswith("dpo.grad.")):
        close(grads.pop(key), G[key])
    for key in (k for k in G if k.startswith("dpo.gradnorm.")):
        close(grads.pop(key.replace("gradnorm", "grad")).norm()[None], G[key])
    assert not grads  # every parameter was compared
    policy.zero_grad()


# --------------------------------------------------------------------------------------------- published checkpoints


def test_published_parameter_names():
    for file, build_it in (("keys_showo_1.3b.json", published_showo), ("keys_magvitv2.json", published_magvit)):
        with torch.device("meta"):
            module = build_it()
        theirs = {k: tuple(v) for k, v in json.loads((GOLDEN / file).read_text()).items()}
        assert {k: tuple(v.shape) for k, v in module.state_dict().items()} == theirs


def published_showo():
    return build({**CONFIG, "num_vq_tokens": 1024}, PhiConfig(), TOKENIZER)


def published_magvit():
    return Magvit(MagvitConfig())
