"""Scores: how near a caption is to the truth, which choice an answer means, and TIFA's questions.

A caption scorer is a function (captions, ground truth) -> scores, an answer matcher a function
(answer, choices) -> the choice it means, or NOTHING. Put your own beside those of `caption_scorer` and
`answer_matcher`.
"""

import difflib
import re
from collections import Counter
from functools import lru_cache

import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from hermesflow.checkpoints import load_hf
from hermesflow.files import InputError
from hermesflow.records import CAPTION_QUESTION, Question, vqa_question
from hermesflow.sampling import TextRequest

# --------------------------------------------------------------------------------- text similarity

NUMBERS = "zero one two three four five six seven eight nine ten".split()
DIGITS = {word: str(n) for n, word in enumerate(NUMBERS)}


def words(text: str) -> list[str]:
    """Lower-case words without punctuation, number words as digits."""
    return [DIGITS.get(w, w) for w in re.findall(r"\w+", text.lower())]


def f1(ours: list, theirs: list) -> float:
    """F1 of two bags."""
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs)) if common else 0.0


def token_f1(a: str, b: str) -> float:
    return f1(words(a), words(b))


def caption_f1(a: str, b: str) -> float:
    """Token F1 over words and neighbouring word pairs: "a left of b" is not "b left of a"."""
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
    nearest = nearest_text
    if name != "text":
        encode = SentenceEncoder(name, "mean", device)

        def nearest(answer: str, choices: tuple[str]) -> str:
            return choices[int((encode(list(choices)) @ encode([answer])[0]).argmax())]

    nearest = lru_cache(10**5)(nearest)  # the same few answers come again and again

    def match(answer: str, choices: list[str]) -> str:
        if answer in choices:
            return answer
        return nearest(answer, tuple(choices)) if words(answer) else NOTHING

    return match


def meanings(answers: list[str], questions: list[Question], match) -> list[str]:
    """Per question: the choice that the answer means, or NOTHING."""
    return [match(a, q.choices) for a, q in zip(answers, questions)]


def is_correct(answers: list[str], questions: list[Question], match) -> list[bool]:
    """Per question: is the choice that the answer means the right one?"""
    meant = meanings(answers, questions, match)
    return [choice == q.answer for choice, q in zip(meant, questions)]


# ---------------------------------------------------------------------------- questions, as in TIFA

TIFA_PROMPT = """<s>[INST] <<SYS>>
Given an image description, generate one or two multiple-choice questions that verifies if the \
image description is correct.
Classify each concept into a type (object, human, animal, food, activity, attribute, counting, \
color, material, spatial, location, shape, other), and then generate a question for each type.

<</SYS>>

Description: {caption} [/INST] Entities:"""


def parse_questions(response: str) -> list[Question]:
    """Questions in the text of TIFA's question model.

    Blocks `About X (type):`, then lines `Q:`, `Choices:`, `A:`. A question without element, choices
    or answer is left out; an answer that is not among the choices is added to them.
    """
    questions = []
    element = question = choices = None
    for line in response.split("\n\n")[0].splitlines():  # behind an empty line the model rambles
        key, _, value = line.strip().partition(":")
        value = value.strip()
        if key.startswith("About "):
            element = key.removeprefix("About ").rpartition(" (")[0] or None
            question = choices = None
        elif key == "Q":
            question = value
            choices = None
        elif key == "Choices":
            choices = [c for c in value.split(", ") if c]
        elif key == "A":
            if element and question and choices and value:
                # "Yes" is the choice "yes"
                same = [c for c in choices if words(c) == words(value)]
                value = same[0] if same and value not in choices else value
                if value not in choices:
                    choices = [*choices, value]
                questions.append(Question(question, choices, value, element))
            question = choices = None
    return questions


def keep_questions(questions: list[Question], multiple_choice: list[str],
                   free_form: list[str]) -> list[Question]:
    """TIFA's filter: the QA model must be right from the caption alone.

    With choices and, unless the answer is yes or no, without (token F1 above 0.6).
    """
    kept = []
    seen = set()
    for q, with_choices, without in zip(questions, multiple_choice, free_form):
        right = words(with_choices) == words(q.answer)
        free = q.answer in ("yes", "no") or token_f1(q.answer, without) > 0.6
        if right and free and q.question not in seen:
            kept.append(q)
        seen.add(q.question)
    return kept


class QuestionWriter:
    """Questions about a caption: TIFA's question model writes them, a QA model filters them."""

    def __init__(self, question_model: str, qa_model: str, device):
        self.question_tokenizer = load_hf(AutoTokenizer, question_model)
        self.question_model = load_hf(AutoModelForCausalLM, question_model).to(device)
        self.qa_tokenizer = load_hf(AutoTokenizer, qa_model)
        self.qa_model = load_hf(AutoModelForSeq2SeqLM, qa_model).to(device)

    @torch.inference_mode()
    def write(self, caption: str) -> str:
        """What the question model says; the prompt holds its own <s>."""
        ids = self.question_tokenizer(TIFA_PROMPT.format(caption=caption), return_tensors="pt",
                                      add_special_tokens=False).input_ids
        ids = ids.to(self.question_model.device)
        output = self.question_model.generate(ids, attention_mask=torch.ones_like(ids),
                                              do_sample=False, num_beams=5, max_new_tokens=512)
        written = output[0, ids.shape[1] :]
        return self.question_tokenizer.decode(written, skip_special_tokens=True)

    @torch.inference_mode()
    def answer(self, prompt: str) -> str:
        """What the QA model answers."""
        ids = self.qa_tokenizer(prompt, return_tensors="pt").input_ids.to(self.qa_model.device)
        output = self.qa_model.generate(ids, attention_mask=torch.ones_like(ids),
                                        do_sample=False, max_new_tokens=32)
        return self.qa_tokenizer.decode(output[0], skip_special_tokens=True)

    def __call__(self, caption: str) -> list[Question]:
        questions = parse_questions(self.write(caption))
        with_choices = []
        without = []
        for q in questions:
            listed = " ".join(f"({chr(65 + i)}) {c}" for i, c in enumerate(q.choices))
            with_choices.append(self.answer(f"{q.question} \n {caption} \n {listed} "))
            without.append(self.answer(f"{q.question} \n {caption}"))
        return keep_questions(questions, with_choices, without)


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
