"""Every fast path equals the plain one of bench/reference.py."""

import itertools
import math

import pytest
import torch

from bench import reference as plain
from hermesflow.files import InputError
from hermesflow.packed import IGNORE, Segment, answer_segment, label_logps, pack
from hermesflow.records import CAPTION_QUESTION
from hermesflow.sampling import (mask_by_random_topk, random_mask, sample_categorical,
                                 sample_tokens, stable_seed, uniforms)
from hermesflow.showo import image_segment
from model import ImageBatch, ImageSampling, TextBatch, TextRequest, load, save
from tiny import row_logps, tiny_model

TEXTS = ["a big red ring", "a small blue square left of a big red ring", "", "a big blue ring",
         "red"]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def net(model):
    return model.net


def codes_of(tokens, n, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(tokens.codes, (n, tokens.image_tokens), generator=generator)


# ------------------------------------------------------------------------------------------ images


@pytest.mark.parametrize("guidance_scale, steps, anneal", [
    (0.0, 7, "compound"), (2.0, 7, "compound"), (2.0, 5, "maskgit"), (3.0, 1, "compound")])
@pytest.mark.parametrize("greedy", [True, False])
def test_images_equal_plain(model, guidance_scale, steps, anneal, greedy):
    seeds = [stable_seed(7, i) for i in range(len(TEXTS))]
    sampling = ImageSampling(steps, guidance_scale, anneal=anneal)
    ours = model.generate_images(TEXTS, None if greedy else seeds, sampling)
    noise = None
    if not greedy:
        noise = torch.stack([uniforms(s, steps, 2, model.image_tokens) for s in seeds])
    theirs = plain.generate_images(model.net, TEXTS, noise, steps, guidance_scale, anneal)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("at_once", [1, 2, 100])
def test_images_do_not_depend_on_the_batch(model, monkeypatch, at_once):
    texts = [TEXTS[0]] * 3 + TEXTS[1:4]
    sampling = ImageSampling(6, 1.5)
    together = model.generate_images(texts, list(range(6)), sampling)
    alone = [model.generate_images([t], [s], sampling)[0] for s, t in enumerate(texts)]
    assert torch.equal(together, torch.stack(alone))
    assert len({tuple(c) for c in together[:3].tolist()}) == 3  # seeds matter
    monkeypatch.setattr("model.IMAGE_TOKENS_AT_ONCE", 16 * at_once)
    assert torch.equal(together, model.generate_images(texts, list(range(6)), sampling))


def test_approximate_guidance_ends_where_it_is_exact(model):
    """An interval of all steps is plain guidance, an empty interval is none; others differ."""

    def generate(**sampling):
        return model.generate_images(TEXTS, list(range(5)), ImageSampling(6, **sampling))

    exact = generate(guidance_scale=2.0)
    none = generate(guidance_scale=0.0)
    assert not torch.equal(exact, none)
    assert torch.equal(generate(guidance_scale=2.0, guidance_interval=(0, 1)), exact)
    assert torch.equal(generate(guidance_scale=2.0, guidance_interval=(0.5, 0.5)), none)
    for interval in ((0.5, 1), (0, 0.5)):
        approximate = generate(guidance_scale=2.0, guidance_interval=interval)
        assert not any(torch.equal(approximate, other) for other in (exact, none))


# ------------------------------------------------------------------------------------------- texts


def test_texts_equal_plain(model):
    codes = codes_of(model.tokens, 3)
    long = "Question: a small blue square? Choice:['yes', 'no']"
    settings = [(1, 1.0), (2, 0.7), (4, 2.0), (0, 1.2), (3, 0.1), (0, 3.0)]
    requests = []
    for i, (top_k, temperature) in enumerate(settings * 2):
        prompt = "big" if i % 2 else long
        requests.append(TextRequest(i % 3, prompt, top_k, temperature, stable_seed("text", i)))
    ours = [text.ids for text in model.generate_text(codes, requests, max_new_tokens=12)]
    assert ours == [plain.generate_text(model.net, codes[r.image], r, 12) for r in requests]
    assert len(set(map(len, ours))) > 1  # rows ended at different steps and left the batch


def test_texts_stop_at_the_limit(model):
    request = TextRequest(0, "big", 0, 5.0, 3)
    text = model.generate_text(codes_of(model.tokens, 1), [request], 3)[0]
    assert len(text.ids) <= 3 and text.ended == (len(text.ids) < 3)


@pytest.mark.parametrize("top_k", [0, 1, 3])
def test_logits_that_are_nan_are_not_drawn_from(top_k):
    """One such weight of the head: texts and images end in one line, greedy or sampled."""
    model = tiny_model()
    with torch.no_grad():
        model.net.showo.lm_head.weight[5, 0] = torch.nan
        model.net.showo.lm_head.weight[model.tokens.first_code + 3, 0] = torch.nan
    request = TextRequest(0, "big", top_k, 2.0)
    with pytest.raises(InputError, match="^the model gives NaN or infinite logits; .* helps$"):
        model.generate_text(codes_of(model.tokens, 1), [request], 5)
    for seeds in ([0], None):
        with pytest.raises(InputError, match="^the model gives NaN or infinite logits; .* helps$"):
            model.generate_images(["red"], seeds, ImageSampling(3, 1.5))


@pytest.mark.parametrize("row", [[0, math.inf, 1], [math.nan, 0, 1], [0, 1, math.nan],
                                 [-math.inf] * 3])
@pytest.mark.parametrize("top_k", [0, 1, 2])
def test_one_row_of_nan_or_infinite_logits_is_enough(row, top_k):
    logits = torch.tensor([[0.0, 1, 2], row])
    with pytest.raises(InputError, match="NaN or infinite logits"):
        sample_tokens(logits, torch.tensor([1, top_k]), torch.ones(2), torch.full((2,), 0.5))


def test_top_k_of_each_row():
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).repeat(4, 1)
    top_k = torch.tensor([1, 2, 0, 3])
    temperature = torch.tensor([1.0, 1.0, 1.0, 0.5])
    lowest = sample_tokens(logits, top_k, temperature, torch.full((4,), 1 - 1e-6))
    highest = sample_tokens(logits, top_k, temperature, torch.full((4,), 1e-6))
    assert lowest.tolist() == [3, 2, 0, 1] and highest.tolist() == [3, 3, 3, 3]


def test_sample_categorical_follows_the_distribution():
    probs = torch.tensor([0.5, 0.0, 0.3, 0.2])
    u = torch.arange(1000).add(0.5) / 1000
    counts = torch.bincount(sample_categorical(probs.expand(1000, 4), u), minlength=4)
    assert counts.tolist() == [500, 0, 300, 200]


# --------------------------------------------------------------------------------------- log-probs


def pair_rows(tokens):
    """Two understanding rows (image, two answers) and two generation rows (text, two images)."""
    codes = codes_of(tokens, 6).tolist()
    prompt = tokens.text_prompt(CAPTION_QUESTION)
    texts = ("a big red ring", "a square", "red", "a small blue square left of a ring")
    answers = [answer_segment(prompt, [*tokens.encode(t), tokens.eot]) for t in texts]
    und = []
    gen = []
    for i in range(2):
        image = Segment(tokens.mmu_prompt(codes[i]), bidirectional=True)
        und.append([image, *answers[2 * i : 2 * i + 2]])
        mask = random_mask(16, i).tolist()
        images = [image_segment(tokens, c, mask) for c in codes[2 + 2 * i : 4 + 2 * i]]
        gen.append([Segment(tokens.t2i_prompt(TEXTS[i])), *images])
    return und, gen


def packed_sums(net, und, gen) -> torch.Tensor:
    """(4, 3) log-prob sums of all rows."""
    packs = [pack(rows, net.tokens.pad) for rows in (und, gen)]
    return torch.cat([sums for sums, _ in net(*packs)])


def separate_logps(net, row) -> torch.Tensor:
    """(2,) log-probs of the two branches of a row, as sequences of their own."""
    return torch.cat([plain.logps(net, *plain.sequence(net.tokens, row, b)) for b in (1, 2)])


def test_packed_logps_equal_separate_forwards(net, monkeypatch):
    und, gen = pair_rows(net.tokens)
    separate = torch.stack([separate_logps(net, row) for row in und + gen])  # (4, 2)
    # unlike weights, so that gradients of the branches cannot cancel
    weights = torch.arange(8.0).view(4, 2) - 3
    theirs = gradients(net, (separate * weights).sum())
    # labels in one piece, and in chunks that backward computes again
    for at_once in (2048, 3):
        monkeypatch.setattr(label_logps, "__defaults__", (at_once,))
        sums = packed_sums(net, und, gen)[:, 1:]
        torch.testing.assert_close(sums, separate, rtol=1e-4, atol=1e-4)
        for a, b in zip(gradients(net, (sums * weights).sum()), theirs):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def guided_logps(net, cond, uncond, branch: int, guidance_scale: float) -> torch.Tensor:
    """log softmax over codes of two full sequences mixed, with text and without."""
    tokens = net.tokens
    ids, targets, attend = plain.sequence(tokens, cond, branch)
    blank_ids, _, blank_attend = plain.sequence(tokens, uncond, branch)
    cond_logits = plain.logits_of(net, ids, attend)
    uncond_logits = plain.logits_of(net, blank_ids, blank_attend)
    logits = (1 + guidance_scale) * cond_logits - guidance_scale * uncond_logits
    scored = targets != IGNORE
    logits = logits[scored][:, tokens.first_code : tokens.mask]  # (M, C)
    codes = targets[scored] - tokens.first_code
    return logits.log_softmax(-1).gather(1, codes[:, None]).sum()


def test_guided_logps_equal_separate_forwards(net, monkeypatch):
    """The probabilities that a guided image is sampled from."""
    guidance_scale = 2.0
    tokens = net.tokens
    _, rows = pair_rows(tokens)
    blank = [[Segment(tokens.t2i_prompt("")), *images] for _, *images in rows]
    separate = []
    for cond, uncond in zip(rows, blank):
        for branch in (1, 2):
            separate.append(guided_logps(net, cond, uncond, branch, guidance_scale))
    separate = torch.stack(separate).view(2, 2)
    weights = torch.arange(4.0).view(2, 2) - 1
    theirs = gradients(net, (separate * weights).sum())
    cond = pack(rows, tokens.pad)
    guided = cond._replace(uncond=pack(blank, tokens.pad), guidance_scale=guidance_scale)
    plain_sums, plain_counts = net(cond)[0]
    for at_once in (2048, 3):
        monkeypatch.setattr(label_logps, "__defaults__", (at_once,))
        sums, counts = net(guided)[0]
        torch.testing.assert_close(sums[:, 1:], separate, rtol=1e-4, atol=1e-4)
        for a, b in zip(gradients(net, (sums[:, 1:] * weights).sum()), theirs):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    assert torch.equal(counts, plain_counts)
    assert (sums - plain_sums)[:, 1:].abs().min() > 0.1


def test_the_wrapper_packs_what_is_packed_here(model):
    """text_logps, image_logps and pair_logps are the log-probs of these very rows."""
    tokens = model.tokens
    und, gen = pair_rows(tokens)
    codes = codes_of(tokens, 6)
    texts = ("a big red ring", "a square", "red", "a small blue square left of a ring")
    ids = [tokens.encode(t) for t in texts]
    text = TextBatch(codes[:2], [CAPTION_QUESTION] * 2, [ids[:2], ids[2:]])
    masks = model.training_masks([0, 1])
    image = ImageBatch(TEXTS[:2], codes[2:].view(2, 2, 16), masks)
    with torch.no_grad():
        packed = packed_sums(model.net, und, gen)[:, 1:]
        both = torch.cat([logps.sums for logps in model.pair_logps(text, image)])
        alone = torch.cat([model.text_logps(*text[:3]).sums, model.image_logps(*image).sums])
        guided = model.image_logps(*image[:3], guidance_scale=2.0).sums
        blank = [[Segment(tokens.t2i_prompt("")), *images] for _, *images in gen]
        expected = [guided_logps(model.net, *rows, 1, 2.0) for rows in zip(gen, blank)]
    assert torch.equal(both, packed) and torch.equal(alone, packed)
    torch.testing.assert_close(guided[:, 0], torch.stack(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("guidance_scale", [0.0, 2.0])
def test_several_masks_are_the_mean_of_each_alone(model, guidance_scale):
    images = codes_of(model.tokens, 4).view(2, 2, 16)
    masks = model.training_masks([0, 1])
    both = torch.stack([masks, ~masks], 1)  # (B, 2, N)
    with torch.no_grad():
        together = model.image_logps(TEXTS[:2], images, both, guidance_scale)
        apart = [model.image_logps(TEXTS[:2], images, m, guidance_scale) for m in (masks, ~masks)]
    mean = (apart[0].sums + apart[1].sums) / 2
    torch.testing.assert_close(together.sums, mean, rtol=1e-4, atol=1e-4)
    assert (together.counts == 8).all()  # of a mask and its complement: every slot once
    assert (apart[0].sums - apart[1].sums).abs().min() > 0.1


def test_counts_are_the_labels(net):
    for rows in pair_rows(net.tokens):
        expected = []
        for _, *branches in rows:
            ignored = [s.targets.count(IGNORE) for s in branches]
            labels = [len(s.targets) - n for s, n in zip(branches, ignored)]
            expected.append([0, *labels])
        assert row_logps(net, rows)[1].tolist() == expected


def test_the_pair_dpo_loss_equals_four_separate_forwards(net):
    reference = tiny_model(1).net
    und, gen = pair_rows(net.tokens)
    for record in zip(und, gen):
        rows = [[row] for row in record]
        with torch.no_grad():
            theirs = plain.pair_dpo(net, reference, record, 0.2)
            ratio = packed_sums(net, *rows) - packed_sums(reference, *rows)
            ours = -torch.nn.functional.logsigmoid(0.2 * (ratio[:, 1] - ratio[:, 2])).sum()
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_rows_of_one_pack_are_of_one_kind(net):
    und, gen = pair_rows(net.tokens)
    for rows in (und + gen, [und[0], und[1][:2]]):
        with pytest.raises(ValueError, match="one kind"):
            pack(rows, net.tokens.pad)


def gradients(net, loss):
    net.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in net.parameters()]


def test_a_branch_does_not_see_the_others(net):
    for rows in pair_rows(net.tokens):
        with torch.no_grad():
            before = row_logps(net, rows)[0]
            for row in rows:
                row[2].ids[1:-1] = [5] * (len(row[2].ids) - 2)
            after = row_logps(net, rows)[0]
        torch.testing.assert_close(before[:, 1], after[:, 1])
        assert (before[:, 2] - after[:, 2]).abs().min() > 1e-3


def test_gradient_checkpointing_changes_nothing(net):
    rows = pair_rows(net.tokens)
    kept = gradients(net, packed_sums(net, *rows).sum())
    net.checkpoint_activations()
    checkpointed = gradients(net.train(), packed_sums(net, *rows).sum())
    net.checkpoint_activations(False)
    net.eval()
    for a, b in zip(kept, checkpointed):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------- masks and seeds


def test_random_mask_follows_the_cosine_schedule():
    N = 16
    for seed in range(200):
        t = uniforms(seed, N + 1)[0].item()
        assert random_mask(N, seed).sum() == max(1, round(N * math.cos(math.pi / 2 * t)))
    masked = sum(random_mask(N, seed).float() for seed in range(2000)) / 2000
    # every slot alike; the mean of cos over a quarter is 2/π
    assert (masked - 2 / math.pi).abs().max() < 0.05


def test_seeds():
    # recorded: old runs must stay reproducible
    assert stable_seed(0, 1, "id", 2) == 4545019819003138542
    seeds = {stable_seed(0, r, i, k) for r, i, k in itertools.product(range(3), "ab", range(5))}
    assert len(seeds) == 30
    assert torch.equal(uniforms(5, 3, 4), uniforms(5, 3, 4))
    assert uniforms(5, 10000).min() > 0 and uniforms(5, 10000).max() < 1


def test_known_slots_stay_known():
    probs = torch.tensor([[0.1, torch.inf, 0.3, torch.inf]])
    again = mask_by_random_topk(probs, torch.zeros(1, 4), torch.tensor([[1]]), 1.0)
    assert again.tolist() == [[True, False, False, False]]


# --------------------------------------------------------------------------------------- precision


def test_half_precision_keeps_exact_positions(tmp_path):
    """Rotary tables stay float32: rounded frequencies would shift phases over 1,155 positions."""
    save(tiny_model(), tmp_path / "tiny")
    half = load(tmp_path / "tiny", dtype=torch.bfloat16)
    full = load(tmp_path / "tiny")
    assert half.net.showo.lm_head.weight.dtype == torch.bfloat16
    assert half.vq.encoder.conv_in.weight.dtype == torch.float32
    tables = [m.net.showo.model.rotary_emb.inv_freq for m in (half, full)]
    assert tables[0].dtype == torch.float32 and torch.equal(*tables)
    with torch.no_grad():
        sums = [packed_sums(m.net, *pair_rows(m.tokens)) for m in (half, full)]
    assert sums[0].dtype == torch.float32
    difference = (sums[0] - sums[1]).abs() / sums[1].abs().clamp(min=1)
    assert difference[:, 1:].max() < 0.1
    codes = half.generate_images(TEXTS, [1] * 5, ImageSampling(4, 1.0))
    assert codes.shape == (5, 16) and (0 <= codes).all() and (codes < half.tokens.codes).all()
