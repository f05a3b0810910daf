"""Switches for the studies alone: the released code's defects, and recipes beyond the paper's.

Each function changes entries in the globals of one process's stages, {"02": globals, …}, before
their `main` runs. The stages do not know of them. A study names a switch with its arguments:
"masks 4".

Shapes in comments: B records, K images or masks of a record, N image tokens.
"""

import dataclasses
import random

import torch
import torch.nn.functional as F

from hermesflow.pictures import to_pil
from hermesflow.records import Question, vqa_question
from hermesflow.sampling import stable_seed
from hermesflow.tables import tensors_of
from model import LogProbs
from toy import world


def change_image_logps(stage: dict, change) -> None:
    """change(LogProbs of images) -> LogProbs, in every model that stage 3 loads."""
    load = stage["load"]

    def load_changed(*arguments, **settings):
        model = load(*arguments, **settings)
        pair_logps = model.pair_logps

        def changed(text, image):
            und, gen = pair_logps(text, image)
            return und, change(gen)

        model.pair_logps = changed
        return model

    stage["load"] = load_changed


# ---------------------------------------------------------------------- the released code's defects


def batch_summed(stages):
    """Log-probs are summed over the micro-batch before σ: a batch is one preference."""
    stages["03"]["dpo_loss"] = lambda delta, beta: -F.logsigmoid(beta * delta.sum())


def black_images(stages):
    """The understanding half sees black images."""
    make_batch = stages["03"]["make_batch"]

    def make_black_batch(model, visits, *arguments):
        text, image = make_batch(model, visits, *arguments)
        pixels = -torch.ones(1, 3, model.image_size, model.image_size)
        black = model.encode_image(pixels).expand(len(visits), -1)  # (B, N)
        return text._replace(images=black), image

    stages["03"]["make_batch"] = make_black_batch


def misaligned_join(stages):
    """Image scores are joined by position with a list that is sorted by the id as a string.

    That order is 0, 1, 10, 100, 101, …
    """
    make_pairs = stages["02"]["make_pairs"]
    of_images = ("questions", "image_scores", "answers", "matched")

    def make_misaligned_pairs(samples, scores, *arguments):
        scores = list(scores)
        by_string = sorted(scores, key=lambda s: str(int(s.id.rpartition("-")[2])))
        misaligned = []
        for own, other in zip(scores, by_string):
            fields = {name: getattr(other, name) for name in of_images}
            misaligned.append(dataclasses.replace(own, **fields))
        return make_pairs(samples, misaligned, *arguments)

    stages["02"]["make_pairs"] = make_misaligned_pairs


def product_loss(stages):
    """One σ of the product of both margins, as the paper prints it (Eq. 6, 15), not two terms."""
    margins = []

    def dpo_loss(delta, beta):  # called with Δ_und, then with Δ_gen
        margins.append(delta)
        if len(margins) == 1:
            return torch.zeros_like(delta)
        und, gen = margins
        margins.clear()
        return -F.logsigmoid(beta * und * gen)

    stages["03"]["dpo_loss"] = dpo_loss
    stages["03"]["assert_healthy"] = lambda *_: None  # it starts at ln 2, not at 2 ln 2


# --------------------------------------------------------------------------- what limits the result


def grids(model, codes: torch.Tensor) -> list:
    """(K, N) codes as the oracle reads their pictures: K grids of object types."""
    return [world.read(picture) for picture in to_pil(model.decode_image(codes.long()))]


def oracle(model, sample, codes: torch.Tensor) -> tuple[list[float], list[int]]:
    """What the oracle finds in a record's drawings (K, N): `judged`."""
    return judged(sample, grids(model, codes))


def judged(sample, drawn: list) -> tuple[list[float], list[int]]:
    """What the oracle finds in K grids of a record.

    Per drawing, the share of the record's questions with the right answer, and 1 if everything is
    right.
    """
    shares = []
    rights = []
    for grid in drawn:
        answers = [world.answer(grid, q.question) == q.answer for q in sample.questions]
        shares.append(sum(answers) / len(answers))
        rights.append(int(world.judge(grid, sample.caption)["correct"]))
    return shares, rights


def chosen_by_oracle(stages):
    """A drawing's score is 1 where the oracle finds everything right, otherwise 0."""
    score_records = stages["02"]["score_records"]

    def score_by_oracle(model, samples, *arguments):
        scores = score_records(model, samples, *arguments)
        for sample, score in zip(samples, scores):
            _, score.image_scores = oracle(model, sample, tensors_of(sample)["images"])
        return scores

    stages["02"]["score_records"] = score_by_oracle


# ------------------------------------------------------------------------------------------ recipes


def masks(stages, K):
    """K masks per image instead of one. Log-probs are means over the masks."""
    stage = stages["03"]
    make_batch = stage["make_batch"]

    def make_masked_batch(model, visits, seed, *arguments):
        text, image = make_batch(model, visits, seed, *arguments)
        rows = [image.masks]
        for k in range(1, int(K)):
            seeds = [stable_seed(*seed, pair.id, epoch, "mask", k) for pair, epoch in visits]
            rows.append(model.training_masks(seeds))
        return text, image._replace(masks=torch.stack(rows, 1))  # (B, K, N)

    stage["make_batch"] = make_masked_batch


def same_slots(stages, slots):
    """An image's log-prob does not depend on the mask ratio.

    It is the mean over masked slots, as if every mask had this number of them.
    """

    def scaled(gen):
        means = gen.sums / gen.counts.clamp(min=1)
        return LogProbs(means * int(slots), gen.counts.clamp(max=1) * int(slots))

    change_image_logps(stages["03"], scaled)


def answers(stages):
    """The understanding half prefers right answers about the record's image, not captions of it.

    One question per record and epoch; another of its choices loses.
    """
    make_batch = stages["03"]["make_batch"]

    def make_answer_batch(model, visits, seed, *arguments):
        text, image = make_batch(model, visits, seed, *arguments)
        prompts = []
        responses = []
        for pair, epoch in visits:
            rng = random.Random(stable_seed(*seed, pair.id, epoch, "question"))
            question = Question(**rng.choice(world.questions(pair.caption)))
            wrong = rng.choice([c for c in question.choices if c != question.answer])
            prompts.append(vqa_question(question))
            responses.append([model.encode_text(question.answer), model.encode_text(wrong)])
        return text._replace(prompts=prompts, responses=responses, ended=None), image

    stages["03"]["make_batch"] = make_answer_batch
