"""Stage 2, scoring: the policy judges what it wrote and drew, and best and worst become homologous preference pairs.

reads   SAMPLES/samples.jsonl and SAMPLES/samples.safetensors of stage 1, a checkpoint, the previous round's pairs
writes  OUT/scores.jsonl   every score, every answer, and why a record gives no pair
        OUT/pairs.jsonl    (x, y, y_w, y_l, x_w, x_l) with scores, caption token ids and image codes; plain JSON lines
                           with the same flat fields everywhere, so datasets.load_dataset("json", …) takes it as it is
        OUT/pairs.png      the first pairs, for people

    python 02_score.py --model toy/base --samples runs/toy/round1/samples --out runs/toy/round1/pairs

The defaults need no download. The paper's: --caption-scorer google-bert/bert-large-uncased
--matcher sentence-transformers/all-mpnet-base-v2 --question-model tifa-benchmark/llama2_tifa_question_generation
--qa-model allenai/unifiedqa-v2-t5-large-1363200
"""

import argparse
import difflib
import re
import shutil
from collections import Counter
from functools import cache
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from model import (CAPTION_QUESTION, Ask, InputError, Pair, Question, Sample, Score, Segment, add_model_arguments,
                   answer_segment, claim, load_from, load_tensors, map_records, model_inputs, parse_record, read_jsonl,
                   reason, run, save_picture, sheet, to_pil, vqa_question, write_jsonl, write_text)

# ---------------------------------------------------------------------------------------------------- text similarity

NUMBER_WORDS = dict(zip("zero one two three four five six seven eight nine ten".split(), map(str, range(11))))


def words(text: str) -> list[str]:
    """Lower-case words without punctuation, number words as digits."""
    return [NUMBER_WORDS.get(w, w) for w in re.findall(r"\w+", text.lower())]


def f1(ours: list, theirs: list) -> float:
    """F1 of two bags."""
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs)) if common else 0.0


def token_f1(a: str, b: str) -> float:
    return f1(words(a), words(b))


def caption_f1(a: str, b: str) -> float:
    """Token F1 over words and neighbouring word pairs, so that "a left of b" is not "b left of a"."""
    a, b = words(a), words(b)
    return f1([*a, *zip(a, a[1:])], [*b, *zip(b, b[1:])])


class Encoder:
    """Sentence vectors of any transformers encoder, of unit length. pooling: "cls", or "mean" over tokens."""

    def __init__(self, name: str, pooling: str, device):
        self.tokenizer, self.model = load_hf(AutoTokenizer, name), load_hf(AutoModel, name).to(device).eval()
        self.pooling, self.device = pooling, device

    @torch.inference_mode()
    def __call__(self, texts: list[str]) -> torch.Tensor:
        inputs = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(self.device)
        hidden = self.model(**inputs).last_hidden_state  # (B, T, D)
        weight = inputs.attention_mask[..., None].to(hidden)
        pooled = hidden[:, 0] if self.pooling == "cls" else (hidden * weight).sum(1) / weight.sum(1)
        return torch.nn.functional.normalize(pooled.float(), dim=-1)


def load_hf(kind, name: str, **settings):
    try:
        return kind.from_pretrained(name, **settings)
    except Exception as error:
        raise InputError(f"{name}: cannot load as {kind.__name__} ({reason(error)})") from None


def caption_scorer(name: str, device):
    """A function (captions, ground truth) -> scores. The paper: cosine of BERT [CLS] vectors."""
    if name == "token-f1":
        return lambda captions, truth: [caption_f1(c, truth) for c in captions]
    encode = Encoder(name, "cls", device)
    return lambda captions, truth: (encode(captions) @ encode([truth])[0]).tolist()


def answer_matcher(name: str, device):
    """A function (answer, choices) -> the nearest choice. The original: sentence embeddings, mean pooling."""
    if name == "text":
        return nearest_text
    encode = Encoder(name, "mean", device)

    @cache  # the same few answers come again and again
    def nearest(answer: str, choices: tuple[str]) -> str:
        return choices[int((encode(list(choices)) @ encode([answer])[0]).argmax())]

    return lambda answer, choices: answer if answer in choices else nearest(answer, tuple(choices))


def nearest_text(answer: str, choices: list[str]) -> str:
    """The choice with the same words, else with the most words in common, else with the most similar spelling."""
    def likeness(choice):
        return token_f1(answer, choice), difflib.SequenceMatcher(None, answer.lower(), choice.lower()).ratio()

    return max(choices, key=likeness)


# ------------------------------------------------------------------------------------------- questions, as in TIFA

TIFA_PROMPT = """<s>[INST] <<SYS>>
Given an image description, generate one or two multiple-choice questions that verifies if the image description is correct.
Classify each concept into a type (object, human, animal, food, activity, attribute, counting, color, material, spatial, location, shape, other), and then generate a question for each type.

<</SYS>>

Description: {caption} [/INST] Entities:"""


def parse_questions(response: str) -> list[Question]:
    """Questions in the answer of TIFA's question model: blocks `About X (type):`, then `Q:`, `Choices:`, `A:` lines.

    A question without element, choices or answer is left out; an answer that is not among the choices is added.
    """
    questions, element, question, choices = [], None, None, None
    for line in response.split("\n\n")[0].splitlines():  # after an empty line the model begins to ramble
        key, _, value = line.strip().partition(":")
        value = value.strip()
        if key.startswith("About "):
            element, question, choices = key.removeprefix("About ").rpartition(" (")[0] or None, None, None
        elif key == "Q":
            question, choices = value, None
        elif key == "Choices":
            choices = [c for c in value.split(", ") if c]
        elif key == "A":
            if element and question and choices and value:
                questions.append(Question(question, choices if value in choices else [*choices, value], value, element))
            question, choices = None, None
    return questions


def keep_questions(questions: list[Question], multiple_choice: list[str], free_form: list[str]) -> list[Question]:
    """TIFA's filter: the QA model must be right from the caption alone, with choices and (but for yes/no) without."""
    kept, seen = [], set()
    for q, chosen, said in zip(questions, multiple_choice, free_form):
        right = words(chosen) == words(q.answer)
        free = q.answer in ("yes", "no") or token_f1(q.answer, said) > 0.6
        if right and free and q.question not in seen:
            kept.append(q)
        seen.add(q.question)
    return kept


class Questioner:
    """Writes questions about a caption with TIFA's question model and keeps those that a QA model answers right."""

    def __init__(self, question_model: str, qa_model: str, device):
        self.writer = load_hf(AutoTokenizer, question_model), load_hf(AutoModelForCausalLM, question_model).to(device)
        self.reader = load_hf(AutoTokenizer, qa_model), load_hf(AutoModelForSeq2SeqLM, qa_model).to(device)

    @torch.inference_mode()
    def generate(self, tools, prompt: str, **how) -> str:
        tokenizer, model = tools
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=tools is self.reader).input_ids.to(model.device)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **how)[0]
        return tokenizer.decode(out if tools is self.reader else out[ids.shape[1] :], skip_special_tokens=True)

    def __call__(self, caption: str) -> list[Question]:
        questions = parse_questions(self.generate(self.writer, TIFA_PROMPT.format(caption=caption), num_beams=5,
                                                  max_new_tokens=512))
        with_choices, without = [], []
        for q in questions:
            listed = " ".join(f"({chr(65 + i)}) {c}" for i, c in enumerate(q.choices))
            chosen = self.generate(self.reader, f"{q.question} \n {caption} \n {listed} ", max_new_tokens=32)
            with_choices.append(chosen)
            without.append(self.generate(self.reader, f"{q.question} \n {caption}", max_new_tokens=32))
        return keep_questions(questions, with_choices, without)


# ---------------------------------------------------------------------------------------------------------- scoring


def as_seen(model, vq, codes: torch.Tensor) -> torch.Tensor:
    """(B, N) codes decoded to 8-bit pixels and encoded again: what somebody who looks at the picture can know."""
    pixels = (vq.decode(codes).clamp(-1, 1) + 1).mul(127.5).round() / 127.5 - 1
    return vq.encode(pixels)


def answer_questions(model, images, questions: list[list[Question]], max_new_tokens: int) -> list[list[str]]:
    """The policy's own answers: images (B, N), questions per image -> answers per image, greedy."""
    asks = [Ask(i, model.tokens.ask(vqa_question(q))) for i, qs in enumerate(questions) for q in qs]
    answers = iter(write_text(model, images, asks, max_new_tokens) if asks else [])
    return [[model.tokens.decode(next(answers)).strip() for _ in qs] for qs in questions]


def answered_right(answers: list[str], questions: list[Question], match) -> list[bool]:
    """Per question: is the choice nearest to the answer the right one?"""
    return [match(a, q.choices) == q.answer for a, q in zip(answers, questions)]


def accuracy(answers: list[str], questions: list[Question], match) -> float:
    """Acc(x): share of questions answered right."""
    return sum(answered_right(answers, questions, match)) / len(questions)


def likelihood(model, images, captions: list[str]) -> list[float]:
    """How well the policy itself reads each caption from its image, of (B, N): the geometric mean of the probabilities of
    the caption's tokens and <|eot|>, in (0, 1). Not in the paper; needs no questions."""
    prompt, tokens = model.tokens.ask(CAPTION_QUESTION), model.tokens
    sums, counts = model.logprobs([[Segment(tokens.look(codes), bidirectional=True),
                                    answer_segment(prompt, [*tokens.encode(caption), tokens.eot])]
                                   for codes, caption in zip(images.tolist(), captions)])  # (B, 2) each
    return (sums[:, 1] / counts[:, 1]).exp().tolist()


# ---------------------------------------------------------------------------------------------------------- curation


class Candidate(NamedTuple):
    score: float
    tokens: list[int]  # caption token ids, or image codes
    text: str = ""  # of a caption
    wrong: list[str] = []  # of an image: the questions answered wrong


def best_and_worst(candidates: list[Candidate]) -> tuple[Candidate, Candidate]:
    return max(candidates, key=lambda c: c.score), min(candidates, key=lambda c: c.score)


def self_play(best: Candidate, worst: Candidate, old: tuple[Candidate, Candidate] | None):
    """Eq. 9–10: from round 2 on, the new best meets the old winner if it beats it, else the old loser."""
    if old is None:
        return best, worst
    old_win, old_lose = old
    return (best, old_win) if best.score > old_win.score else (best, old_lose)


def curate(sample: Sample, image_codes: list[int], captions: list[Candidate], images: list[Candidate],
           previous: Pair | None, min_image_score: float) -> Pair | str:
    """The record's preference pair, or the reason why it gives none."""
    old_captions = old_images = None
    if previous is not None:
        old_captions = (Candidate(previous.win_caption_score, previous.win_caption_ids, previous.win_caption),
                        Candidate(previous.lose_caption_score, previous.lose_caption_ids, previous.lose_caption))
        old_images = (Candidate(previous.win_image_score, previous.win_image_codes, "", previous.win_image_wrong),
                      Candidate(previous.lose_image_score, previous.lose_image_codes, "", previous.lose_image_wrong))
    win, lose = self_play(*best_and_worst(captions), old_captions)
    if win.score <= lose.score:
        return "captions: best is not better than worst"
    win_image, lose_image = self_play(*best_and_worst(images), old_images)
    if win_image.score <= min_image_score:
        return f"images: best score is not above {min_image_score}"
    if win_image.score <= lose_image.score:
        return "images: best is not better than worst"
    return Pair(sample.id, sample.image, sample.caption, sample.prompt, image_codes,
                win.text, lose.text, win.tokens, lose.tokens, win.score, lose.score,
                win_image.tokens, lose_image.tokens, win_image.score, lose_image.score, win_image.wrong, lose_image.wrong)


def read_samples(folder: Path) -> tuple[list[Sample], dict]:
    samples, tensors = read_jsonl(folder / "samples.jsonl", Sample), load_tensors(folder / "samples.safetensors")
    for s in samples:
        for name in ("image", "images", "captions"):
            if f"{s.id}/{name}" not in tensors:
                raise InputError(f"{folder}/samples.safetensors: no '{name}' for id {s.id!r}")
        if len(tensors[f"{s.id}/captions"]) != len(s.captions):
            raise InputError(f"{folder}: id {s.id!r}: {len(s.captions)} captions but other token ids")
    return samples, tensors


def check_samples(samples: list[Sample], tensors: dict, tokens, folder: Path) -> None:
    """Raises InputError if the codes or token ids were made with another model."""
    for s in samples:
        image, images, captions = (tensors[f"{s.id}/{name}"] for name in ("image", "images", "captions"))
        codes = torch.cat([image[None], images]) if image.shape == images.shape[1:] else images
        if codes.shape[1:] != (tokens.image_tokens,) or codes.min() < 0 or codes.max() >= tokens.codes:
            raise InputError(f"{folder}/samples.safetensors: id {s.id!r}: images should be {tokens.image_tokens} codes below "
                             f"{tokens.codes}; were they sampled with another model?")
        if captions.numel() and not -1 <= captions.min() <= captions.max() < tokens.vocab_size:
            raise InputError(f"{folder}/samples.safetensors: id {s.id!r}: a caption's token is outside the vocabulary")


def save_gallery(vq, pairs: list[Pair], device, out: Path) -> None:
    """Real image, winner, loser, with captions and scores: as one sheet, and as files for the report."""
    rows, labels = [], []
    for p in pairs:
        with torch.inference_mode():
            codes = torch.tensor([p.image_codes, p.win_image_codes, p.lose_image_codes], device=device)
            rows.append(to_pil(vq.decode(codes)))
        for name, picture in zip(("real", "win", "lose"), rows[-1]):
            save_picture(picture, out / "images" / f"{p.id}-{name}.png")
        labels.append(f"{p.caption}\nwin {p.win_caption_score:.2f}: {p.win_caption}\n"
                      f"lose {p.lose_caption_score:.2f}: {p.lose_caption}\n"
                      f"images: real, win {p.win_image_score:.2f}, lose {p.lose_image_score:.2f}")
    save_picture(sheet(rows, labels, columns=2), out / "pairs.png")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--samples", type=Path, required=True, help="output folder of 01_sample.py")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--overwrite", action="store_true", help="empty OUT first")
    parser.add_argument("--previous", type=Path, help="pairs.jsonl of the last round, for self-play; joined by id")
    parser.add_argument("--caption-scorer", default="token-f1", help="token-f1, or an encoder: its [CLS] vectors")
    parser.add_argument("--matcher", default="text", help="text, or a sentence encoder that matches answers to choices")
    parser.add_argument("--image-scorer", choices=["questions", "likelihood"], default="questions",
                        help="share of questions answered right, or probability of the caption given the image")
    parser.add_argument("--question-model", help="writes questions for records that have none")
    parser.add_argument("--qa-model", help="filters the written questions")
    parser.add_argument("--min-image-score", type=float, default=0.6, help="the best image must be above it")
    parser.add_argument("--reencode", action="store_true", help="judge images after decoding and encoding again")
    parser.add_argument("--max-new-tokens", type=int, default=20, help="per answer")
    parser.add_argument("--batch", type=int, default=1, help="records at a time; does not change results")
    parser.add_argument("--show", type=int, default=8, help="pairs in the gallery")
    args = parser.parse_args()
    if bool(args.question_model) != bool(args.qa_model):
        parser.error("--question-model and --qa-model go together")
    return args


def judge_images(samples, asked, codes, images, model, match, args) -> list[tuple[list[float], list[list[str]]]]:
    """Per record the scores of its K images, and the answers behind them; no scores without questions to ask."""
    if args.image_scorer == "likelihood":
        scores = iter(likelihood(model, images, [s.caption for s, c in zip(samples, codes) for _ in c]))
        return [([next(scores) for _ in c], []) for c in codes]
    answers = iter(answer_questions(model, images, [q for q, c in zip(asked, codes) for _ in c], args.max_new_tokens))
    said = [[next(answers) for _ in c] for c in codes]
    return [([accuracy(a, questions, match) for a in answered] if questions else [], answered)
            for questions, answered in zip(asked, said)]


def score_records(samples: list[Sample], tensors: dict, model, vq, tools, args) -> list[dict]:
    """Score fields of some records; tools = (caption scorer, answer matcher, question writer or None)."""
    similarity, match, questioner = tools
    asked = [s.questions or (questioner(s.caption) if questioner else []) for s in samples]
    codes = [tensors[f"{s.id}/images"].long() for s in samples]  # (K, N) each
    images = torch.cat(codes).to(model.device)
    if args.reencode:
        images = as_seen(model, vq, images)
    judged = judge_images(samples, asked, codes, images, model, match, args)
    return [dict(id=s.id, questions=[vars(q) for q in questions], answers=said, image_scores=scores,
                 caption_scores=similarity(s.captions, s.caption))
            for s, questions, (scores, said) in zip(samples, asked, judged)]


def make_pairs(samples: list[Sample], scores: list[Score], tensors: dict, previous: dict, match, threshold: float):
    """The pairs of all records that give one; the others get the reason in their score."""
    pairs = []
    for s, score in zip(samples, scores):
        found = "no questions"
        if score.image_scores:
            ids = [[t for t in row if t >= 0] for row in tensors[f"{s.id}/captions"].tolist()]
            captions = [Candidate(*c) for c in zip(score.caption_scores, ids, s.captions)]
            wrong = [[q.question for q, r in zip(score.questions, answered_right(said, score.questions, match)) if not r]
                     for said in score.answers] or [[]] * len(score.image_scores)
            images = [Candidate(*c) for c in zip(score.image_scores, tensors[f"{s.id}/images"].tolist(), repeat(""), wrong)]
            found = curate(s, tensors[f"{s.id}/image"].tolist(), captions, images, previous.get(s.id), threshold)
        if isinstance(found, Pair):
            pairs.append(found)
        else:
            score.dropped = found
    return pairs


def main():
    args = parse_args()
    samples, tensors = read_samples(args.samples)
    previous = {p.id: p for p in read_jsonl(args.previous, Pair)} if args.previous else {}
    absent = sorted(previous.keys() - {s.id for s in samples})
    if absent:
        raise InputError(f"{args.previous}: field 'id': {absent[0]!r} is not among the samples in {args.samples}")
    inputs = {"samples": [args.samples / f"samples.{end}" for end in ("jsonl", "safetensors")], "previous": args.previous}
    if not claim(args.out, args, "pairs.jsonl", inputs | model_inputs(args)):
        return print(f"{args.out / 'pairs.jsonl'} is complete")
    model, vq = load_from(args)
    check_samples(samples, tensors, model.tokens, args.samples)
    tools = (caption_scorer(args.caption_scorer, model.device), answer_matcher(args.matcher, model.device),
             Questioner(args.question_model, args.qa_model, model.device) if args.question_model else None)

    @torch.inference_mode()
    def score(chunk):
        return score_records(chunk, tensors, model, vq, tools, args)

    results = map_records(score, samples, args.out, args.batch, "score")
    if results is None:
        return
    scores = [parse_record(Score, r, f"{args.out}: id {r['id']!r}") for r in results]
    pairs = make_pairs(samples, scores, tensors, previous, tools[1], args.min_image_score)
    write_jsonl(args.out / "scores.jsonl", scores)
    print(f"{len(samples)} records, {len(pairs)} pairs: {args.out}")
    reasons = Counter(s.dropped for s in scores if s.dropped).most_common()
    for why, count in reasons:
        print(f"  dropped {count:5d}  {why}")
    if not pairs:
        raise InputError(f"{args.out}: no pairs to train on; most records: {reasons[0][0]} (all scores: scores.jsonl)")
    save_gallery(vq, pairs[: args.show], model.device, args.out)
    write_jsonl(args.out / "pairs.jsonl", pairs)  # last: its presence says that the stage is complete
    shutil.rmtree(args.out / "parts")


if __name__ == "__main__":
    run(main)
