"""Scores and curation of stage 2.

TIFA's recorded similarities, text similarity, encoders, log-probs, self-play.
"""

import json
import math
import shutil

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModel, BertConfig, BertModel, PreTrainedTokenizerFast

import model as wrapper
from conftest import GOLDEN, main, stage
from hermesflow import prefixes, scoring
from hermesflow.checkpoints import load_hf
from hermesflow.files import InputError
from hermesflow.jsonl import read_jsonl
from hermesflow.records import Pair, Question, Sample, Score
from hermesflow.tables import tensors_of, write_table
from model import Generated, ImageBatch, Model, TextBatch, TextRequest
from tiny import tiny_model

score = stage("02_score")
Candidate = score.Candidate

TIFA = json.loads((GOLDEN / "tifa_cases.json").read_text())

# ---------------------------------------------------------------------------------- text similarity


@pytest.mark.parametrize("pair", TIFA["_filter"]["f1"])
def test_tifa_f1(pair):
    assert scoring.token_f1(*pair.split("|")) == pytest.approx(TIFA["_filter"]["f1"][pair])


@pytest.mark.parametrize("caption, truth, f1", [
    ("A big red ring.", "a big red ring", 1.0),  # case and punctuation do not count
    ("three rings", "3 rings", 1.0),
    ("a cat", "two dogs", 0.0),
    ("", "a cat", 0.0),
    ("cat dog", "dog cat", 2 * 2 / (3 + 3)),  # both words, but not the word pair
    ("ring left of cross", "cross left of ring", 2 * (4 + 1) / (7 + 7)),
    ("ring ring", "ring", 2 * 1 / (3 + 1)),  # a repeated word counts once
])
def test_caption_f1(caption, truth, f1):
    assert scoring.caption_f1(caption, truth) == pytest.approx(f1)
    assert scoring.caption_f1(truth, caption) == pytest.approx(f1)


def test_caption_f1_depends_on_order_and_token_f1_does_not():
    truth = "a big red ring left of a small blue square"
    swapped = "a small blue square left of a big red ring"
    assert scoring.token_f1(swapped, truth) == 1.0
    assert scoring.caption_f1(swapped, truth) < scoring.caption_f1(truth, truth) == 1.0


def test_caption_scorer_default():
    score_captions = scoring.caption_scorer("token-f1", "cpu")
    assert score_captions(["a cat", "two dogs"], "a cat") == [1.0, 0.0]


@pytest.mark.parametrize("answer, choices, nearest", [
    ("red", ["blue", "red"], "red"),
    ("It is RED.", ["blue", "red"], "red"),
    ("3", ["two", "three"], "three"),
    ("green", ["light green", "green"], "green"),  # the same words beat some words
    ("dark green wall", ["green", "dark blue wall"], "dark blue wall"),  # most words in common
    ("a greeny red", ["red", "green"], "red"),
    ("gren", ["red", "green", "blue"], scoring.NOTHING),  # no word in common
    ("12", ["1", "2"], scoring.NOTHING),  # a number is a word
    ("", ["yes", "no"], scoring.NOTHING),
])
def test_nearest_text(answer, choices, nearest):
    assert scoring.nearest_text(answer, choices) == nearest


def test_are_right():
    questions = [Question("?", ["red", "blue"], "red"), Question("?", ["yes", "no"], "no"),
                 Question("?", ["one", "two"], "two"), Question("?", ["left", "right"], "left")]
    match = scoring.answer_matcher("text", "cpu")

    def right(*answers) -> list[bool]:
        return scoring.are_right(scoring.meanings(answers, questions, match), questions)

    assert right("red", "no", "2", "left") == [True] * 4
    assert right("a red one", "yes", "one", "right") == [True, False, False, False]
    assert right("blue", "yes", "one", "right") == [False] * 4


# ----------------------------------------------------------------------------------------- encoders

WORDS = "a big small red blue ring cross left of two three".split()


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A folder with a tiny random BERT, its weights large enough that every token matters."""
    folder = tmp_path_factory.mktemp("bert")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", model_max_length=12)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=2,
                        num_attention_heads=2, intermediate_size=32, max_position_embeddings=12,
                        initializer_range=0.5)
    BertModel(config).save_pretrained(folder)
    return folder


@torch.no_grad()
def by_hand(folder, text: str) -> dict:
    """Unit vectors of one text, computed alone and without padding."""
    ids = torch.tensor([[2, *(4 + WORDS.index(w) for w in text.split()), 3]])
    hidden = BertModel.from_pretrained(folder).eval()(input_ids=ids).last_hidden_state[0]
    vectors = {"cls": hidden[0], "mean": hidden.sum(0) / len(hidden)}
    return {name: v / v.square().sum().sqrt() for name, v in vectors.items()}


TEXTS = ["a big red ring left of a small cross", "two ring", "a cross"]


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_encoder(bert, pooling):
    encode = scoring.SentenceEncoder(str(bert), pooling, "cpu")
    together = encode(TEXTS)
    for vector, text in zip(together, TEXTS):
        torch.testing.assert_close(vector, by_hand(bert, text)[pooling], rtol=1e-4, atol=1e-5)
        # padding changes nothing
        torch.testing.assert_close(vector, encode([text])[0], rtol=1e-4, atol=1e-5)
    # different texts have different vectors
    assert (together @ together.T).fill_diagonal_(0).max() < 0.999


def test_encoder_cuts_long_texts(bert):
    encode = scoring.SentenceEncoder(str(bert), "cls", "cpu")
    torch.testing.assert_close(encode(["a red ring " * 20]), encode(["a red ring " * 3 + "a"]))


def test_caption_scorer_is_the_cosine_of_cls_vectors(bert):
    scores = scoring.caption_scorer(str(bert), "cpu")(TEXTS, "a cross")
    truth = by_hand(bert, "a cross")["cls"]
    cosines = [float(by_hand(bert, t)["cls"] @ truth) for t in TEXTS]
    assert scores == pytest.approx(cosines, abs=1e-4)
    assert scores[2] == pytest.approx(1.0, abs=1e-5)


def test_matcher_takes_the_nearest_choice_by_mean_vectors(bert):
    match = scoring.answer_matcher(str(bert), "cpu")
    choices = ["red ring", "blue cross", "two", "left of"]
    assert [match(c, choices) for c in choices] == choices
    for answer in ("a red", "three", "big cross", "of"):
        vector = by_hand(bert, answer)["mean"]
        cosines = [float(by_hand(bert, c)["mean"] @ vector) for c in choices]
        assert match(answer, choices) == choices[cosines.index(max(cosines))]


def test_unknown_encoder_is_one_line(tmp_path):
    with pytest.raises(InputError, match="nothing here: no such folder, and no name of a") as error:
        scoring.SentenceEncoder(str(tmp_path / "nothing here"), "cls", "cpu")
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------------- what the policy writes


def test_ended_says_whether_eot_came_before_the_limit(monkeypatch):
    """Each row writes `top_k` words and then <|eot|>; the limit is three tokens."""
    model = tiny_model()
    lengths = [2, 5, 0, 3, 1, 4, 2]
    word = model.encode_text("ring")[0]
    steps = iter(range(3))

    def sample_tokens(logits, top_k, temperature, u):
        return torch.where(top_k == next(steps), model.tokens.eot, word)

    monkeypatch.setattr(prefixes, "sample_tokens", sample_tokens)
    images = torch.zeros(2, 16, dtype=torch.long)
    requests = [TextRequest(i % 2, "question " * i, top_k=n) for i, n in enumerate(lengths)]
    texts = model.generate_text(images, requests, max_new_tokens=3)
    assert texts == [Generated([word] * min(n, 3), n < 3) for n in lengths]


@pytest.mark.parametrize("limit", [1, 4, 30])
def test_only_texts_that_ended_are_shorter_than_the_limit(limit):
    model = tiny_model()
    images = torch.arange(32).view(2, 16)
    requests = [TextRequest(i % 2, "what?", top_k=0, temperature=9.0, seed=i) for i in range(64)]
    texts = model.generate_text(images, requests, limit)
    assert all(text.ended == (len(text.ids) < limit) for text in texts)
    assert not any(model.tokens.eot in text.ids for text in texts)
    if limit == 30:
        assert {text.ended for text in texts} == {True, False}


# ---------------------------------------------------------------------------------------- log-probs


@pytest.fixture(scope="module")
def policy():
    return tiny_model()


@pytest.fixture(scope="module")
def pixels(policy):
    """Three images."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(3, 3, policy.image_size, policy.image_size, generator=generator) * 2 - 1


@pytest.fixture(scope="module")
def prompts_and_responses(policy):
    """A question about each image, and two answers to each."""
    prompts = ["what?", "give a caption for this image", "big or small?"]
    answers = [("a big ring", "yes"), ("blue", "a small square left of a ring"), ("no", "big")]
    responses = []
    for pair in answers:
        responses.append([policy.encode_text(answer) for answer in pair])
    return prompts, responses


@pytest.fixture(scope="module")
def image_batch(policy):
    """Two images of each of three texts."""
    images = torch.randint(32, (3, 2, 16), generator=torch.Generator().manual_seed(1))
    masks = policy.training_masks([1, 2, 3])
    return ImageBatch(["a red ring", "", "a small blue square"], images, masks)


def assert_equal(ours, theirs):
    assert torch.equal(ours.sums, theirs.sums) and torch.equal(ours.counts, theirs.counts)


@torch.no_grad()
def test_log_probs_of_texts_are_the_same_for_pixels_and_their_codes(
        policy, pixels, prompts_and_responses):
    codes = policy.encode_image(pixels)
    logps = policy.text_logps(codes, *prompts_and_responses)
    assert logps.sums.shape == (3, 2) and len(logps.sums.unique()) == 6
    responses = prompts_and_responses[1]
    for row, own in enumerate(responses):  # tokens and <|eot|>
        assert logps.counts[row].tolist() == [len(ids) + 1 for ids in own]
    assert_equal(policy.text_logps(pixels, *prompts_and_responses), logps)


@torch.no_grad()
@pytest.mark.parametrize("guidance_scale", [0.0, 2.0])
def test_pair_log_probs_are_those_of_both_halves(
        policy, pixels, prompts_and_responses, image_batch, guidance_scale):
    image_batch = image_batch._replace(guidance_scale=guidance_scale)
    text = policy.text_logps(pixels, *prompts_and_responses)
    image = policy.image_logps(*image_batch)
    assert image.sums.shape == (3, 2) and len(image.sums.unique()) == 6
    masked = image_batch.masks.sum(1, keepdim=True)  # (3, 1)
    assert torch.equal(image.counts, masked.expand(3, 2).float())
    for images in (pixels, policy.encode_image(pixels)):
        und, gen = policy.pair_logps(TextBatch(images, *prompts_and_responses), image_batch)
        assert_equal(und, text)
        assert_equal(gen, image)


@torch.no_grad()
def test_a_cut_response_ends_without_a_label(policy, pixels):
    """Its log-prob is that of all its continuations together, of which `<|eot|>` is one."""
    start = policy.encode_text("a big ring")
    vocabulary = range(policy.vocab_size)
    responses = [start, *([*start, token] for token in vocabulary)]

    def logps(responses, ended):
        batch = TextBatch(pixels[:1], ["what?"], [responses], ended)
        sums = policy.net(policy.pack_text(batch))[0]
        return wrapper.responses_only(sums, len(responses))

    cut = logps(responses, [[False] * len(responses)])
    assert cut.counts[0].tolist() == [3, *[4] * len(vocabulary)]
    torch.testing.assert_close(cut.sums[0, 1:].logsumexp(0), cut.sums[0, 0], rtol=1e-4, atol=1e-4)
    mixed = logps([start, start], [[True, False]])
    assert mixed.counts[0].tolist() == [4, 3]
    expected = cut.sums[0, [1 + policy.tokens.eot, 0]]
    torch.testing.assert_close(mixed.sums[0], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logps([start], None).sums[0], expected[:1], rtol=1e-4, atol=1e-4)


# ----------------------------------------------------------------------------------------- curation

SAMPLE = Sample("a", "a.png", "a red ring", "draw a red ring", captions=["x", "y", "z"])


def captions(*scores):
    """Every third is cut."""
    return [Candidate(s, torch.tensor([i]), f"caption {i}", i % 3 != 2)
            for i, s in enumerate(scores)]


def images(*scores):
    return [Candidate(s, torch.tensor([10 + i]), f"wrong {i}") for i, s in enumerate(scores)]


def as_lists(tensors: dict) -> dict[str, list]:
    return {name: t.tolist() for name, t in tensors.items()}


def curate(captions, images, previous=None):
    """The pair and its tokens, or why there is none."""
    curated = score.curate(SAMPLE, captions, images, previous, 0.6)
    if isinstance(curated, str):
        return curated
    pair, tensors = curated
    return pair, as_lists(tensors)


def previous_pair(caption_scores=(0.5, 0.3), image_scores=(0.8, 0.7), id="a") -> Pair:
    return Pair(id, "a.png", "a red ring", "", "old win", "old lose", *caption_scores,
                *image_scores, "old win wrong", "old lose wrong", False, True)


OLD_TOKENS = {"image": torch.tensor([9, 9]), "win_image": torch.tensor([3, 1]),
              "lose_image": torch.tensor([4, 1]), "win_caption": torch.tensor([11]),
              "lose_caption": torch.tensor([12, 13])}


def previous():
    """The candidates of a pair of the last round."""
    p = previous_pair()
    return ((Candidate(p.win_caption_score, torch.tensor([91]), p.win_caption, p.win_ended),
             Candidate(p.lose_caption_score, torch.tensor([92]), p.lose_caption, p.lose_ended)),
            (Candidate(p.win_image_score, torch.tensor([93]), p.win_image_wrong),
             Candidate(p.lose_image_score, torch.tensor([94]), p.lose_image_wrong)))


def test_first_round_takes_best_and_worst():
    pair, tokens = curate(captions(0.4, 0.9, 0.1), images(0.7, 0.2, 1.0))
    assert pair == Pair("a", "a.png", "a red ring", "draw a red ring", "caption 1", "caption 2",
                        0.9, 0.1, 1.0, 0.2, "wrong 2", "wrong 1", True, False)
    assert tokens == {"win_caption": [1], "lose_caption": [2],
                      "win_image": [12], "lose_image": [11]}


def test_ties_take_the_first():
    _, tokens = curate(captions(0.9, 0.1, 0.9, 0.1), images(0.2, 1.0, 0.2, 1.0))
    assert (tokens["win_caption"], tokens["lose_caption"]) == ([0], [1])
    assert (tokens["win_image"], tokens["lose_image"]) == ([11], [10])


@pytest.mark.parametrize("caption_scores, image_scores, why", [
    ((0.5, 0.5), (1.0, 0.0), "captions: best is not better than worst"),
    ((0.9,), (1.0, 0.0), "captions: best is not better than worst"),
    ((0.9, 0.1), (0.8, 0.8), "images: best is not better than worst"),
    ((0.9, 0.1), (0.6, 0.0), "images: best score is not above 0.6"),  # "above" excludes 0.6 itself
    ((0.9, 0.1), (3 / 5, 1 / 5), "images: best score is not above 0.6"),
])
def test_dropped(caption_scores, image_scores, why):
    assert curate(captions(*caption_scores), images(*image_scores)) == why


def test_just_above_the_bar_is_kept():
    pair, _ = curate(captions(0.9, 0.1), images(7 / 11, 0.0))
    assert (pair.win_image_score, pair.lose_image_score) == (7 / 11, 0.0)


@pytest.mark.parametrize("best, loser", [
    (0.6, ("old win", [91], 0.5, False)),  # beats the old winner: meets it
    (0.5, ("old lose", [92], 0.3, True)),  # equal is not higher: meets the old loser
    (0.4, ("old lose", [92], 0.3, True)),
])
def test_self_play_captions(best, loser):
    pair, tokens = curate(captions(0.0, best), images(1.0, 0.0), previous())
    win = pair.win_caption, tokens["win_caption"], pair.win_caption_score, pair.win_ended
    lose = pair.lose_caption, tokens["lose_caption"], pair.lose_caption_score, pair.lose_ended
    assert (win, lose) == (("caption 1", [1], best, True), loser)


@pytest.mark.parametrize("best, loser", [
    (0.9, ([93], 0.8)),
    (0.8, ([94], 0.7)),
    (0.75, ([94], 0.7)),
])
def test_self_play_images(best, loser):
    pair, tokens = curate(captions(0.9, 0.1), images(0.0, best), previous())
    assert (tokens["win_image"], pair.win_image_score) == ([11], best)
    assert (tokens["lose_image"], pair.lose_image_score) == loser
    assert pair.win_image_wrong == "wrong 1"
    assert pair.lose_image_wrong == {93: "old win wrong", 94: "old lose wrong"}[loser[0][0]]


@pytest.mark.parametrize("caption_scores, image_scores, why", [
    # only as good as the old loser
    ((0.3, 0.1), (1.0, 0.0), "captions: best is not better than worst"),
    ((0.9, 0.1), (0.7, 0.0), "images: best is not better than worst"),
    ((0.9, 0.1), (0.6, 0.0), "images: best score is not above 0.6"),
])
def test_self_play_dropped(caption_scores, image_scores, why):
    assert curate(captions(*caption_scores), images(*image_scores), previous()) == why


# ---------------------------------------------------------------------------------- the whole stage

FIVE = [Question(f"q{i}?", ["yes", "no"], "yes") for i in range(5)]


class Policy(Model):
    """Two image tokens, ten codes, twenty token ids, and no network."""

    device = "cpu"

    def __init__(self):
        self.image_tokens = 2
        self.code_count = 10
        self.vocab_size = 20


def answer_questions(model, codes, questions, max_new_tokens):
    """The first code[0] questions about an image are answered right."""
    answers = []
    for code, asked in zip(codes.tolist(), questions):
        answers.append(["yes" if i < code[0] else "no" for i in range(len(asked))])
    return answers


@pytest.fixture
def score_stage(tmp_path, monkeypatch):
    """Run the stage on four sampled records; three of them have questions."""
    captions = ["a cat", "a big red ring", "a big cat"]
    ended = [False, True, True]
    samples = [Sample(id, f"{id}.png", "a big red ring", "", FIVE, captions, ended) for id in "abc"]
    no_questions = []
    samples.append(Sample("d", "d.png", "a ring", "", no_questions, ["a", "ring", "x"], ended))
    rows = []
    for n, s in enumerate(samples):
        rows.append((s, {"image": torch.tensor([n, n]),
                         "captions": torch.tensor([[5, -1], [6, 7], [8, -1]]),
                         "images": torch.tensor([[2, n], [5, n], [1, n], [4, n]])}))
    write_table(tmp_path / "samples" / "samples.jsonl", rows)

    monkeypatch.setattr(score, "answer_questions", answer_questions)
    monkeypatch.setattr(score, "load_from", lambda args: Policy())
    monkeypatch.setattr(score, "save_pair_gallery", lambda *_: None)

    def run(*options, out="out"):
        main(score, "--samples", tmp_path / "samples", "--out", tmp_path / out, *options)
        pairs = read_jsonl(tmp_path / out / "pairs.jsonl", Pair)
        scores = read_jsonl(tmp_path / out / "scores.jsonl", Score)
        return {p.id: p for p in pairs}, {s.id: s for s in scores}

    return run


def in_samples(tmp_path, name: str) -> str:
    """The image of a record of the `score_stage`, as it is read."""
    return str(tmp_path / "samples" / name)


def test_stage_scores_and_pairs(score_stage, tmp_path):
    pairs, scores = score_stage()
    assert list(pairs) == ["a", "b", "c"] and scores["d"].dropped == "no questions"
    assert scores["b"].image_scores == [0.4, 1.0, 0.2, 0.8]
    assert scores["b"].answers[0] == ["yes", "yes", "no", "no", "no"]
    assert scores["b"].matched == scores["b"].answers  # "yes" and "no" are choices
    assert scores["b"].caption_scores == [
        pytest.approx(2 * 1 / (3 + 7)), 1.0, pytest.approx(2 * 3 / (5 + 7))]
    pair = pairs["b"]
    assert pair == Pair(
        "b", in_samples(tmp_path, "b.png"), "a big red ring", "", "a big red ring", "a cat",
        1.0, pytest.approx(0.2), 1.0, 0.2, "", "q1?\nq2?\nq3?\nq4?", True, False,
        "pairs-00000.safetensors", 1, pair.digest)
    assert as_lists(tensors_of(pair)) == {
        "image": [1, 1], "win_caption": [6, 7], "lose_caption": [5],
        "win_image": [5, 1], "lose_image": [1, 1]}


def test_stage_scores_by_likelihood(score_stage, monkeypatch):
    """No question is asked, so a record without any gives a pair, too.

    Each image meets its own record's caption.
    """
    def caption_likelihood(model, images, captions):
        pairs = zip(images.tolist(), captions)
        return [(code[0] + (caption == "a ring")) / 10 for code, caption in pairs]

    monkeypatch.setattr(score, "answer_questions", None)
    monkeypatch.setattr(score, "caption_likelihood", caption_likelihood)
    pairs, scores = score_stage("--image-scorer", "likelihood", "--min-image-score", 0.5)
    assert scores["b"].image_scores == [0.2, 0.5, 0.1, 0.4]
    assert scores["b"].answers == scores["b"].matched == []
    assert scores["b"].dropped == "images: best score is not above 0.5"
    assert scores["d"].image_scores == [0.3, 0.6, 0.2, 0.5] and list(pairs) == ["d"]
    tokens = as_lists(tensors_of(pairs["d"]))
    assert (tokens["win_image"], tokens["lose_image"]) == ([5, 3], [1, 3])
    assert pairs["d"].win_image_wrong == ""


def test_stage_does_not_depend_on_the_batch(score_stage):
    assert score_stage("--batch", 3, out="three") == score_stage("--batch", 1, out="one")


def test_stage_joins_the_previous_round_by_id(score_stage, tmp_path):
    """The previous round is in another order and lacks record b."""
    old = [(previous_pair((1.0, 0.5), (1.0, 0.4), id="c"), OLD_TOKENS),
           (previous_pair((0.7, 0.1), (0.9, 0.3), id="a"), OLD_TOKENS)]
    write_table(tmp_path / "previous.jsonl", old)
    pairs, _ = score_stage("--previous", tmp_path / "previous.jsonl")
    losers = {}
    for id, p in pairs.items():
        tokens = as_lists(tensors_of(p))
        losers[id] = (p.lose_caption, tokens["lose_caption"], p.lose_caption_score,
                      tokens["lose_image"], p.lose_image_score, p.lose_image_wrong)
    assert losers == {
        "a": ("old win", [11], 0.7, [3, 1], 0.9, "old win wrong"),  # 1.0 beats 0.7 and 0.9
        "b": ("a cat", [5], pytest.approx(0.2), [1, 1], 0.2, "q1?\nq2?\nq3?\nq4?"),  # no history
        "c": ("old lose", [12, 13], 0.5, [4, 1], 0.4, "old lose wrong")}  # 1.0 does not beat 1.0
    images = [tensors_of(p)["image"].tolist() for p in pairs.values()]
    assert images == [[0, 0], [1, 1], [2, 2]]  # the record's own, not that of the last round


def test_loading_an_encoder_shows_no_bar(bert, capfd):
    """That of transformers, which is back after it."""
    load_hf(AutoModel, str(bert))
    assert capfd.readouterr().err == ""
    AutoModel.from_pretrained(bert)
    assert "Loading weights" in capfd.readouterr().err


# ------------------------------------------------------------------------------ scores that are NaN


@pytest.fixture
def nan_bert(bert, tmp_path):
    """Texts of four words and more have NaN vectors."""
    shutil.copytree(bert, tmp_path / "nan_bert")
    encoder = BertModel.from_pretrained(bert)
    with torch.no_grad():
        encoder.embeddings.position_embeddings.weight[5:] = torch.nan
    encoder.save_pretrained(tmp_path / "nan_bert")
    return tmp_path / "nan_bert"


def ends_in_one_line(score_stage, *options) -> str:
    with pytest.raises(InputError) as ended:
        score_stage(*options)
    assert "\n" not in str(ended.value)
    return str(ended.value)


def stored(tmp_path) -> str:
    """The text of all files that the stage left."""
    files = [p for p in (tmp_path / "out").rglob("*") if p.is_file() and p.name != "lock"]
    assert not {"scores.jsonl", "pairs.jsonl"} & {p.name for p in files}
    return "".join(p.read_text() for p in files)


def test_caption_scorer_that_gives_nan(score_stage, tmp_path, nan_bert, bert):
    """The line names the encoder and the record; what was scored before it is kept."""
    file = tmp_path / "samples" / "samples.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join(reversed(lines)))  # d, whose texts are short, is the first
    options = ("--caption-scorer", nan_bert)
    message = ends_in_one_line(score_stage, *options)
    assert message == f"id 'c': {nan_bert}: gives NaN or infinite vectors"
    part, = (tmp_path / "out" / "parts" / "score").iterdir()
    assert [line.split("\t")[0] for line in part.read_text().splitlines()] == ["d"]
    assert ends_in_one_line(score_stage, *options) == message
    assert "NaN" not in stored(tmp_path)

    # another encoder at the same place does not go on with scores of the old one
    shutil.copytree(bert, nan_bert, dirs_exist_ok=True)
    message = ends_in_one_line(score_stage, *options)
    assert "made with other settings (content of --caption-scorer)" in message


def test_matcher_that_gives_nan(score_stage, tmp_path, nan_bert, monkeypatch):
    def long_answers(model, codes, questions, max_new_tokens):
        return [["a red ring left"] * len(asked) for asked in questions]

    monkeypatch.setattr(score, "answer_questions", long_answers)
    message = ends_in_one_line(score_stage, "--matcher", nan_bert)
    assert message == f"id 'a': {nan_bert}: gives NaN or infinite vectors"
    assert ends_in_one_line(score_stage, "--matcher", nan_bert) == message
    assert "NaN" not in stored(tmp_path)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_likelihood_that_is_nan(score_stage, tmp_path, monkeypatch, bad):
    def caption_likelihood(model, images, captions):
        return [bad if code == [1, 2] else 0.5 for code in images.tolist()]

    monkeypatch.setattr(score, "caption_likelihood", caption_likelihood)
    message = ends_in_one_line(score_stage, "--image-scorer", "likelihood")
    assert message == "id 'c': a score is NaN or infinite"
    assert ends_in_one_line(score_stage, "--image-scorer", "likelihood") == message
    text = stored(tmp_path)
    assert "NaN" not in text and "Infinity" not in text and '"id": "b"' in text
