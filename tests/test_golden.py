"""Equality with the original implementation, from its recorded results (see golden/README.md)."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, PhiConfig

from bench import reference as plain
from conftest import GOLDEN, stage
from hermesflow.magvit import Magvit, MagvitConfig
from hermesflow.packed import Segment, answer_segment, pack
from hermesflow.pictures import load_image
from hermesflow.prefixes import TextPrefix
from hermesflow.sampling import MASKED, cosine_mask_count, mask_by_random_topk
from hermesflow.showo import Showo, build_showo, image_segment
from hermesflow.weights import load_weights
from model import ImageSampling, Model, TextRequest
from tiny import row_logps
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
    net = build_showo(CONFIG, phi, TOKENIZER)
    load_weights(net, load_file(GOLDEN / weights), weights)
    net.showo.model.rotary_emb = PhiRotaryEmbedding(phi)
    return net.eval()


@pytest.fixture(scope="module")
def policy():
    return tiny("showo_tiny.safetensors")


@pytest.fixture(scope="module")
def reference():
    return tiny("showo_tiny_reference.safetensors")


@pytest.fixture(scope="module")
def vq():
    vq = Magvit(VQ_CONFIG)
    name = "magvitv2_tiny.safetensors"
    load_weights(vq, load_file(GOLDEN / name), name)
    return vq.eval()


@pytest.fixture(scope="module")
def model(policy, vq):
    return Model(policy, vq)


def unpad(row, pad):
    """A recorded row without its padding."""
    return [i for i in row.tolist() if i != pad]


# -------------------------------------------------------------------------------------- vocabulary


def test_special_tokens(policy):
    t = policy.tokens
    ids = J["special_token_ids"]
    ours = {"<|soi|>": t.soi, "<|eoi|>": t.eoi, "<|t2i|>": t.t2i, "<|mmu|>": t.mmu,
            "<|sot|>": t.sot, "<|eot|>": t.eot, "<|pad|>": t.pad}
    assert {k: ids[k] for k in ours} == ours
    assert t.first_code == J["len_tokenizer"]
    assert (t.mask, t.vocab_size) == (CONFIG["mask_token_id"], CONFIG["vocab_size"])


@pytest.mark.parametrize("i", range(len(J["captions"])))
def test_t2i_prompt(policy, i):
    t = policy.tokens
    row = G["t2i_gen.input_ids"][i]
    masked = t.image_block([MASKED] * t.image_tokens)
    ours = t.t2i_prompt(J["captions"][i]) + masked
    assert ours == unpad(row, t.pad)
    assert len(row) == t.window + t.image_tokens + 2
    assert t.t2i_prompt("") + masked == unpad(G["t2i_gen.uncond_input_ids"][i], t.pad)


@pytest.mark.parametrize("i", range(3))
def test_captioning_prompt(policy, i):
    t = policy.tokens
    row = G["mmu_gen.input_ids"][i].tolist()
    codes = G["vq.codes"][i].tolist()
    assert t.mmu_prompt(codes) + t.text_prompt(J["mmu_question"]) == row


# ---------------------------------------------------------------------------- attention and logits


def t2i_row(tokens, row):
    """A recorded drawing row as prefix and image block."""
    ids = unpad(row, tokens.pad)
    cut = ids.index(tokens.soi)
    return [Segment(ids[:cut]), Segment(ids[cut:], bidirectional=True)]


def test_t2i_attention(policy):
    pad = policy.tokens.pad
    rows = torch.cat([G["t2i_gen.input_ids"], G["t2i_gen.uncond_input_ids"]])
    for ids, theirs in zip(rows, G["t2i_gen.attend"]):
        ours = plain.dense(pack([t2i_row(policy.tokens, ids)], pad))
        keep = ids != pad
        assert torch.equal(ours, theirs[keep][:, keep])
        assert not theirs[keep][:, ~keep].any()  # nobody sees padding, so it may be left out


def test_captioning_attention(policy):
    image = policy.tokens.image_tokens + 3
    for ids, theirs in zip(G["mmu_gen.input_ids"].tolist(), G["mmu_gen.attend"]):
        row = [Segment(ids[:image], bidirectional=True), Segment(ids[image:])]
        assert torch.equal(plain.dense(pack([row], policy.tokens.pad)), theirs)


@torch.no_grad()
def test_t2i_logits_full_forward(policy):
    rows = torch.cat([G["t2i_gen.input_ids"], G["t2i_gen.uncond_input_ids"]])
    for i, ids in enumerate(rows):
        p = pack([t2i_row(policy.tokens, ids)], policy.tokens.pad)
        hidden = policy.hidden(p.ids, p.positions, layout=p.layout)
        logits = policy.showo.lm_head(hidden)[0, -17:-1]
        first = policy.tokens.first_code
        close(logits[:, first : first + 256], G["t2i_gen.image_logits_masked_all"][i])
        if i == 0:
            theirs = G["t2i_gen.full_logits_pos0"].float()  # stored in fp16
            torch.testing.assert_close(logits[0], theirs, rtol=2e-3, atol=2e-3)


@torch.no_grad()
def test_t2i_logits_cached_prefix(policy):
    """The fast path: text keys/values once, then only the image block, without padding or mask."""
    for i, text in enumerate([*J["captions"], ""]):
        prefix = TextPrefix(policy, [policy.tokens.t2i_prompt(text)])
        masked = [MASKED] * policy.tokens.image_tokens
        block = torch.tensor([policy.tokens.image_block(masked)])
        for alike in (True, False):  # the second call finds the cache as the first one did
            logits = policy.code_logits(prefix.hidden(block, alike))
            close(logits[0, :, :256], G["t2i_gen.image_logits_masked_all"][i])


@torch.no_grad()
def test_captioning_logits(policy):
    image = policy.tokens.image_tokens + 3
    for i, ids in enumerate(G["mmu_gen.input_ids"].tolist()):
        row = [Segment(ids[:image], bidirectional=True), Segment(ids[image:])]
        p = pack([row], policy.tokens.pad)
        logits = policy.showo.lm_head(policy.hidden(p.ids, p.positions, layout=p.layout))
        close(logits[0, -1], G["mmu_gen.last_logits"][i])


# ---------------------------------------------------------------------------------------- decoding

RECORDED = []
for key in G:
    if key.startswith("t2i_gen.greedy_tokens"):
        guidance, steps = key.split(".")[2:4]
        guidance = float(guidance.removeprefix("guidance"))
        RECORDED.append((guidance, int(steps.removeprefix("steps"))))


@pytest.mark.parametrize("guidance, steps", RECORDED)
def test_greedy_images(model, guidance, steps):
    theirs = G[f"t2i_gen.greedy_tokens.guidance{guidance:g}.steps{steps}"]
    ours = model.generate_images(J["captions"], None, ImageSampling(steps, guidance))
    assert torch.equal(ours, theirs)


def test_schedule():
    temperature = 1.0
    steps = 18
    recorded = zip(J["t2i_temperature_per_step_18"], J["t2i_mask_len_per_step_18"])
    for step, (t, count) in enumerate(recorded):
        temperature *= 1 - (step + 1) / steps
        assert math.isclose(temperature, t, abs_tol=1e-12)
        assert cosine_mask_count(step, steps, CONFIG["num_vq_tokens"]) == count


def test_mask_step():
    count = G["maskstep.mask_len"].long()
    ours = mask_by_random_topk(G["maskstep.probs"], G["maskstep.gumbel"], count, 0.7)
    assert torch.equal(ours, G["maskstep.masking"])


def test_greedy_captions(model):
    requests = [TextRequest(i, J["mmu_question"]) for i in range(3)]
    for i, text in enumerate(model.generate_text(G["vq.codes"], requests, max_new_tokens=20)):
        assert text.ids == unpad(G[f"mmu_gen.greedy.{i}"], model.tokens.eot)
        assert model.decode_text(text.ids) == J[f"mmu_gen_greedy_text.{i}"]


# --------------------------------------------------------------------------------- image tokenizer


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


# --------------------------------------------------------------------------------------------- DPO

COLUMNS = {name: i for i, name in enumerate(J["dpo_logprob_columns"])}


def t2i_rows(tokens):
    """Record -> text, win image and lose image behind it, with the recorded mask."""
    rows = []
    for i, text in enumerate(J["dpo_t2i_texts"]):
        mask = G["dpo.mask"][i].tolist()
        branches = []
        for side in ("win", "lose"):
            codes = G[f"dpo.image_tokens_{side}"][i] - tokens.first_code
            branches.append(image_segment(tokens, codes.tolist(), mask))
        rows.append([Segment(tokens.t2i_prompt(text)), *branches])
    return rows


def test_t2i_rows_match_recorded_inputs(policy):
    t = policy.tokens
    for i, row in enumerate(t2i_rows(t)):
        for branch, side in zip(row[1:], ("win", "lose")):
            assert row[0].ids + branch.ids == unpad(G[f"dpo.t2i.input_ids_{side}"][i], t.pad)


def mmu_rows(tokens):
    """Image, win and lose answer, in the original's training format: no <|sot|>."""
    rows = []
    for i in range(2):
        image = G["dpo.image_tokens_win"][i]
        seen = G["dpo.mmu.input_ids_win"][i, 2 : 2 + len(image)].tolist()
        row = [Segment([tokens.mmu, tokens.soi, *seen, tokens.eoi], bidirectional=True)]
        for side in ("win", "lose"):
            ids = G[f"dpo.mmu.input_ids_{side}"][i]
            labels = G[f"dpo.mmu.labels_{side}"][i]
            scored = labels != -100
            prompt = ids[len(row[0].ids) : int(scored.nonzero()[0])].tolist()
            row.append(answer_segment(prompt, ids[scored].tolist()))
        rows.append(row)
    return rows


def with_frame(rows):
    """The original also scores <|soi|> and <|eoi|>, which are given: add them to compare."""
    for row in rows:
        for segment in row[1:]:
            segment.targets[0] = segment.ids[0]
            segment.targets[-1] = segment.ids[-1]
    return rows


def pair_dpo_columns(policy, reference):
    """The twelve recorded columns per record, with the stage's own loss."""
    columns = torch.empty(2, len(COLUMNS))
    for half, rows in (("t2i", with_frame(t2i_rows(policy.tokens))),
                       ("mmu", mmu_rows(policy.tokens))):
        sums = {"policy": row_logps(policy, rows)[0][:, 1:],
                "ref": row_logps(reference, rows)[0][:, 1:].detach()}  # (B, 2): win, lose
        for who in sums:
            columns[:, COLUMNS[f"{who}_win_{half}"]] = sums[who][:, 0]
            columns[:, COLUMNS[f"{who}_lose_{half}"]] = sums[who][:, 1]
        delta = pair_dpo.margins(sums["policy"], sums["ref"])
        columns[:, COLUMNS[f"delta_{half}"]] = delta
        columns[:, COLUMNS[f"loss_{half}"]] = pair_dpo.dpo_loss(delta, J["beta"])
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


# --------------------------------------------------------------------------- published checkpoints


def test_published_parameter_names():
    for file, build_it in (("keys_showo_1.3b.json", published_showo),
                           ("keys_magvitv2.json", published_magvit)):
        with torch.device("meta"):
            module = build_it()
        recorded = json.loads((GOLDEN / file).read_text())
        theirs = {k: tuple(v) for k, v in recorded.items()}
        assert {k: tuple(v.shape) for k, v in module.state_dict().items()} == theirs


def published_showo():
    return build_showo({**CONFIG, "num_vq_tokens": 1024}, PhiConfig(), TOKENIZER)


def published_magvit():
    return Magvit(MagvitConfig())
