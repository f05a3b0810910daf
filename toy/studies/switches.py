"""Switches for the studies alone: defects of the released code, one at a time, and recipes that the stages do not offer.

Each function changes the imported stages of one process, {"02": module, "03": module, …}, before they run. The stage
scripts know nothing of them. A study throws one by name, with its arguments: "masks 4".
"""

import dataclasses

import torch
import torch.nn.functional as F

from model import Segment, draw_images, drawing, image_segment, pack, random_mask, seed_of, to_pil, uniforms
from toy import world


def understanding(dpo, tokens, chunk, device) -> dict:
    """The understanding half of a micro-batch, as stage 3 packs it."""
    return pack([dpo.understanding_row(tokens, pair) for pair, _ in chunk], tokens.pad, device)


# ----------------------------------------------------------------------------------------- the released code's defects


def batch_summed(stages):
    """Log-probs are summed over the micro-batch before σ: a batch is one preference."""
    stages["03"].preference_loss = lambda delta, beta: -F.logsigmoid(beta * delta.sum())


def mismatched_dropout(stages):
    """Whether the text is dropped is drawn separately for the winning and the losing image."""
    dpo = stages["03"]

    def both_halves(model, tokens, chunk, device, args):
        rows = []
        for pair, epoch in chunk:
            prefix, *images = dpo.generation_row(tokens, pair, epoch, args)
            for k, image in enumerate(images):
                u = uniforms(seed_of(args.seed, args.round, pair.id, epoch, "drop", k), 1).item()
                rows.append([Segment(tokens.draw("" if u < args.drop_text else pair.drawing_text)), image])
        und = understanding(dpo, tokens, chunk, device)
        und, (sums, counts) = model(und, pack(rows, tokens.pad, device))
        return und, tuple(F.pad(x[:, 1].view(-1, 2), (1, 0)) for x in (sums, counts))  # (2B, 2) -> (B, 3)

    dpo.both_halves = both_halves


def black_images(stages):
    """The understanding half looks at black images."""
    dpo, load, row = stages["03"], stages["03"].load, stages["03"].understanding_row
    black = []

    def load_both(*arguments):
        model, vq = load(*arguments)
        side = int(model.tokens.image_tokens**0.5) * vq.downsampling
        with torch.inference_mode():
            black[:] = vq.encode(-torch.ones(1, 3, side, side))[0].tolist()
        return model, vq

    dpo.load = load_both
    dpo.understanding_row = lambda tokens, pair: row(tokens, dataclasses.replace(pair, image_codes=black))


def misaligned_join(stages):
    """Image scores are joined by position with a list that is sorted by the id as a string: 0, 1, 10, 100, 101, …"""
    make_pairs = stages["02"].make_pairs

    def shuffled(samples, scores, *rest):
        by_string = sorted(scores, key=lambda s: str(int(s.id.rpartition("-")[2])))
        scores = [dataclasses.replace(s, questions=t.questions, image_scores=t.image_scores, answers=t.answers)
                  for s, t in zip(scores, by_string)]
        return make_pairs(samples, scores, *rest)

    stages["02"].make_pairs = shuffled


def independent_shuffling(stages):
    """The two halves of a step come from different records, in two independent orders."""
    visits = stages["03"].visits

    def two_orders(pairs, steps, batch, seed):
        orders = visits(pairs, steps, batch, seed), visits(pairs, steps, batch, seed_of(seed, "generation"))
        return [(dataclasses.replace(und, id=gen.id, caption=gen.caption, prompt=gen.prompt, win_image_codes=gen.win_image_codes,
                                     lose_image_codes=gen.lose_image_codes), epoch)
                for (und, epoch), (gen, _) in zip(*orders)]

    stages["03"].visits = two_orders


def product_loss(stages):
    """One σ of the product of the two margins, as the paper prints it (Eq. 6, 15), instead of a sum of two terms."""
    seen = []

    def preference_loss(delta, beta):
        seen.append(delta)
        if len(seen) < 2:
            return torch.zeros_like(delta)
        und, gen = seen
        seen.clear()
        return -F.logsigmoid(beta * und * gen)

    stages["03"].preference_loss = preference_loss
    stages["03"].check = lambda *_: None  # it starts at ln 2, not at 2 ln 2


# ------------------------------------------------------------------------------------------------- what limits the result


def grids(vq, codes: torch.Tensor) -> list:
    """(K, N) codes as the oracle reads their pictures: K grids of object types."""
    with torch.inference_mode():
        return [world.read(picture) for picture in to_pil(vq.decode(codes.long()))]


def oracle(vq, sample, codes: torch.Tensor) -> tuple[list[float], list[int]]:
    """Of a record's drawings, (K, N): the share of its questions with the right answer, and whether everything is right."""
    drawn, asked = grids(vq, codes), sample.questions
    shares = [sum(world.answer(g, q.question) == q.answer for q in asked) / len(asked) for g in drawn]
    return shares, [int(world.judge(g, sample.caption)["correct"]) for g in drawn]


def chosen_by_oracle(stages):
    """A drawing's score is 1 where the oracle finds everything right, otherwise 0."""
    score_records = stages["02"].score_records

    def scored(samples, tensors, model, vq, *rest):
        return [dict(score, image_scores=oracle(vq, s, tensors[f"{s.id}/images"])[1])
                for s, score in zip(samples, score_records(samples, tensors, model, vq, *rest))]

    stages["02"].score_records = scored


# --------------------------------------------------------------------------------------------------------------- recipes


def guidance_in_turn(stages, *guidances):
    """The K images of a record are drawn at different guidance."""
    sampling = stages["01"]

    def sample_images(model, records, args):
        found = torch.empty(len(records), args.images, model.tokens.image_tokens, dtype=torch.long)
        for at, guidance in enumerate(map(float, guidances)):
            ks = range(at, args.images, len(guidances))
            texts = [r.drawing_text for r in records for _ in ks]
            seeds = [seed_of(args.seed, args.round, r.id, "image", k) for r in records for k in ks]
            codes = draw_images(model, texts, seeds, dataclasses.replace(drawing(args), guidance=guidance))
            found[:, at :: len(guidances)] = codes.view(len(records), len(ks), -1)
        return found

    sampling.sample_images = sample_images


def masks(stages, K, complementary=False):
    """K masks per image instead of one, or K/2 masks and their complements; log-probs are means over them."""
    dpo = stages["03"]
    row = dpo.generation_row
    K = int(K)

    def generation_row(tokens, pair, epoch, args):
        prefix, images = row(tokens, pair, epoch, args)[0], []
        for k in range(K):
            number, inverse = (k // 2, k % 2) if complementary else (k, 0)
            mask = random_mask(tokens.image_tokens, seed_of(args.seed, args.round, pair.id, epoch, "mask", number))
            mask = [m != bool(inverse) for m in mask]
            images += [image_segment(tokens, codes, mask) for codes in (pair.win_image_codes, pair.lose_image_codes)]
        return [prefix, *images]

    def both_halves(model, tokens, chunk, device, args):
        und = understanding(dpo, tokens, chunk, device)
        gen = pack([generation_row(tokens, pair, epoch, args) for pair, epoch in chunk], tokens.pad, device)
        und, gen = model(und, gen)
        return und, tuple(F.pad(x[:, 1:].unflatten(1, (K, 2)).mean(1), (1, 0)) for x in gen)  # (B, 1+2K) -> (B, 3)

    dpo.both_halves = both_halves


def mean_over_slots(stages):
    """The image's log-prob is the mean over its masked slots, not the sum."""
    dpo = stages["03"]
    halves = dpo.both_halves

    def both_halves(*arguments):
        und, (sums, counts) = halves(*arguments)
        return und, (sums / counts.clamp(min=1), counts.clamp(max=1))

    dpo.both_halves = both_halves


def label_smoothing(stages, share):
    """A share of the labels is believed to be wrong."""
    share = float(share)
    stages["03"].preference_loss = lambda delta, beta: -((1 - share) * F.logsigmoid(beta * delta)
                                                         + share * F.logsigmoid(-beta * delta))


def filtered(stages, what, least):
    """Only pairs whose images' scores ("gap"), captions' scores ("caption_gap") or codes ("codes") differ at least so much."""
    curate, least = stages["02"].curate, float(least)
    difference = {"gap": lambda p: p.win_image_score - p.lose_image_score,
                  "caption_gap": lambda p: p.win_caption_score - p.lose_caption_score,
                  "codes": lambda p: sum(a != b for a, b in zip(p.win_image_codes, p.lose_image_codes))}[what]

    def curate_some(*arguments):
        found = curate(*arguments)
        return found if isinstance(found, str) or difference(found) >= least else f"filtered: {what} below {least}"

    stages["02"].curate = curate_some
