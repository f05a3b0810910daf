"""Scores: how near a caption is to the truth, and which choice an answer means.

A caption scorer is a function (captions, ground truth) -> scores, an answer matcher a function
(answer, choices) -> the choice it means, or NOTHING. Put your own beside those of
`caption_scorer` and `answer_matcher`.
"""

import difflib
import re
from collections import Counter
from functools import lru_cache

import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoTokenizer

from hermesflow.checkpoints import load_hf
from hermesflow.files import InputError
from hermesflow.records import CAPTION_QUESTION, Question, vqa_question
from hermesflow.sampling import TextRequest

# --------------------------------------------------------------------------------- text similarity

NUMBERS = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
           "fifteen sixteen seventeen eighteen nineteen twenty").split()
DIGITS = {word: str(n) for n, word in enumerate(NUMBERS)}
# a number whole, with its sign and what is inside it (1.5, 1,000, 1/2, 10:30), or a word
WORD = re.compile(r"(?<!\w)-\d+(?:[.,/:]\d+)*|(?<!\w)\d+(?:[.,/:]\d+)+(?!\w)|\w+")


def words(text: str) -> list[str]:
    """Lower-case words without punctuation, number words as digits."""
    return [DIGITS.get(w, w) for w in WORD.findall(text.lower().replace("−", "-"))]


def f1(ours: list, theirs: list) -> float:
    """F1 of two bags."""
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs)) if common else 0.0


def token_f1(a: str, b: str) -> float:
    return f1(words(a), words(b))


def caption_f1(a: str, b: str) -> float:
    """Token F1 over words and neighbouring word pairs: "a left of b" is not "b left of a".

    It does not see all of the order: "a left of red c left of blue c" has the same pairs as "a left
    of blue c left of red c".
    """
    a = words(a)
    b = words(b)
    return f1([*a, *zip(a, a[1:])], [*b, *zip(b, b[1:])])


NOTHING = ""  # the choice that an answer means which matches none


def nearest_text(answer: str, choices: list[str]) -> str:
    """The choice with the most words in common; among those, the most similar spelling.

    NOTHING, if they have no word in common. A number is a word: "12" is not "1".
    """
    if answer in choices:
        return answer

    def similarity(choice):
        spelling = difflib.SequenceMatcher(None, answer.lower(), choice.lower()).ratio()
        return token_f1(answer, choice), spelling

    best = max(choices, key=similarity)
    return best if token_f1(answer, best) > 0 else NOTHING


class SentenceEncoder:
    """Unit vectors of texts, of any transformers encoder. pooling: "cls", or "mean" over tokens."""

    def __init__(self, name: str, pooling: str, device):
        self.tokenizer = load_hf(AutoTokenizer, name)
        self.model = load_hf(AutoModel, name).to(device).eval()
        self.name = name
        self.pooling = pooling
        self.device = device

    @torch.inference_mode()
    def __call__(self, texts: list[str]) -> torch.Tensor:
        """B texts -> (B, D)."""
        inputs = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        inputs = inputs.to(self.device)
        hidden = self.model(**inputs).last_hidden_state  # (B, T, D)
        if self.pooling == "cls":
            pooled = hidden[:, 0]
        else:
            weight = inputs.attention_mask[..., None].to(hidden)  # (B, T, 1)
            pooled = (hidden * weight).sum(1) / weight.sum(1)
        if not pooled.isfinite().all():
            raise InputError(f"{self.name}: gives NaN or infinite vectors")
        return F.normalize(pooled.float(), dim=-1)


def caption_scorer(name: str, device):
    """(captions, ground truth) -> scores. The paper: cosine of BERT [CLS] vectors."""
    if name == "token-f1":
        return lambda captions, truth: [caption_f1(c, truth) for c in captions]
    encode = SentenceEncoder(name, "cls", device)

    def cosine(captions: list[str], truth: str) -> list[float]:
        return (encode(captions) @ encode([truth])[0]).tolist()

    return cosine


def answer_matcher(name: str, device):
    """(answer, choices) -> the choice it means. The original: sentence embeddings, mean pooling."""
    encode = None if name == "text" else SentenceEncoder(name, "mean", device)

    @lru_cache(10**5)  # the same few answers come again and again
    def nearest(answer: str, choices: tuple[str]) -> str:
        if encode is None:
            return nearest_text(answer, choices)
        return choices[int((encode(list(choices)) @ encode([answer])[0]).argmax())]

    def match(answer: str, choices: list[str]) -> str:
        if answer in choices:
            return answer
        return nearest(answer, tuple(choices)) if words(answer) else NOTHING

    return match


def meanings(answers: list[str], questions: list[Question], match) -> list[str]:
    """Per question: the choice that the answer means, or NOTHING."""
    return [match(a, q.choices) for a, q in zip(answers, questions)]


def are_right(choices: list[str], questions: list[Question]) -> list[bool]:
    """Per question: is the choice that its answer means the right one?"""
    return [choice == q.answer for choice, q in zip(choices, questions, strict=True)]


# ----------------------------------------------------------- the policy's own judgement of images


def answer_questions(model, images, questions: list[list[Question]],
                     max_new_tokens: int) -> list[list[str]]:
    """The policy's greedy answers to the questions about each image, B lists of them.

    images: (B, N) codes or (B, 3, H, W) pixels.
    """
    requests = []
    for i, about_image in enumerate(questions):
        requests += [TextRequest(i, vqa_question(q)) for q in about_image]
    generated = iter(model.generate_text(images, requests, max_new_tokens))
    answers = []
    for about_image in questions:
        texts = [model.decode_text(next(generated).ids) for _ in about_image]
        answers.append([t.strip() for t in texts])
    return answers


def reencode(model, codes: torch.Tensor) -> torch.Tensor:
    """(B, N) codes decoded to 8-bit pixels and encoded again: what a viewer of them knows."""
    pixels = model.decode_image(codes).clamp(-1, 1)
    return model.encode_image((pixels + 1).mul(127.5).round() / 127.5 - 1)


def caption_likelihood(model, images, captions: list[str]) -> list[float]:
    """How well the policy itself reads each caption from its image, one of B, in (0, 1).

    The geometric mean of the probabilities of the caption's tokens and <|eot|>. Not in the paper;
    needs no questions.
    """
    prompts = [CAPTION_QUESTION] * len(captions)
    responses = [[model.encode_text(caption)] for caption in captions]
    logps = model.text_logps(images, prompts, responses)  # (B, 1)
    return (logps.sums / logps.counts).exp()[:, 0].tolist()
