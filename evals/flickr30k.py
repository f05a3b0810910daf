"""Flickr30k captions, scored by CIDEr-D.

source       Karpathy's splits; pycocoevalcap (cider_scorer.py)
DATA         dataset_flickr30k.json (1,000 test images, five captions each), images/
writes       OUT/flickr30k_captions.json
exact        CIDEr-D
approximated the PTB tokeniser, which is Java

    python 04_eval.py --benchmark flickr30k --data Flickr30k --model toy/base --out runs/flickr30k
"""

import json
import math
import re
from collections import Counter
from pathlib import Path

from evals.official import get, read_json, require
from hermesflow.files import write_text

WRITES = ("flickr30k_captions.json",)
PROMPT = "Provide a one-sentence caption for the provided image."
MAX_NEW_TOKENS = 64  # 04_eval.py takes it instead of --max-new-tokens


def read(path, split: str = "test") -> dict[str, list[str]]:
    """Image file name -> its captions."""
    what = "dataset_flickr30k.json (Karpathy's splits)"
    images = get(read_json(path, what, dict), "images", list[dict], str(path))
    captions = {}
    for n, image in enumerate(images, 1):
        where = f"{path}: image {n}"
        if get(image, "split", str, where) == split:
            sentences = get(image, "sentences", list[dict], where)
            require(sentences, where, "field 'sentences' is empty")
            texts = [get(s, "raw", str, where) for s in sentences]
            captions[get(image, "filename", str, where)] = texts
    require(captions, path, f"no image of split {split!r}; expected here: {what}")
    return captions


def ptb_words(text: str) -> str:
    """An approximation of pycocoevalcap's PTB tokeniser.

    Lower case, 's and n't apart, punctuation gone; words are joined by spaces.
    """
    text = re.sub(r"(?<=\w)(n't|'(?:s|m|d|re|ve|ll))\b", r" \1", text.lower())
    words = r"'(?:s|m|d|re|ve|ll)\b|\d+(?:[.,]\d+)+|\w+(?:[-']\w+)*|[$%&#@+=*]"
    return " ".join(re.findall(words, text))


# ------------------------------------------------------------------------------------------ CIDEr-D


def ngrams(text: str) -> list[Counter]:
    """Counts of the 1- to 4-grams of a tokenised text."""
    words = text.split()
    counts = []
    for n in range(1, 5):
        shifted = [words[i:] for i in range(n)]
        counts.append(Counter(zip(*shifted)))
    return counts


def image_frequency(references: dict[str, list[list[Counter]]]) -> Counter:
    """For every n-gram the number of images with it in a reference."""
    frequency = Counter()
    for texts in references.values():
        seen = set()
        for text in texts:
            for counts in text:
                seen.update(counts)
        frequency.update(seen)
    return frequency


def tfidf(text: list[Counter], frequency: Counter, images: int) -> list[dict]:
    """Weights of n-grams, for n = 1 to 4: counts × (log #images − log #images with the n-gram)."""
    weights = []
    for counts in text:
        weighted = {}
        for ngram, count in counts.items():
            idf = math.log(images) - math.log(max(1, frequency[ngram]))
            weighted[ngram] = count * idf
        weights.append(weighted)
    return weights


def clipped_cosine(hypothesis: dict, reference: dict) -> float:
    """Cosine of two sparse vectors, but no n-gram counts for more than the reference has of it."""
    shared = [(w, reference[ngram]) for ngram, w in hypothesis.items() if ngram in reference]
    dot = sum(min(w, r) * r for w, r in shared)
    return dot / (norm(hypothesis) * norm(reference) or 1)


def norm(weights: dict) -> float:
    return math.sqrt(sum(w * w for w in weights.values()))


def cider_d(captions: dict[str, str], references: dict[str, list[str]]) -> dict:
    """cider_scorer.py (n = 4, sigma = 6) on tokenised texts: {"cider_d", "per_image"}.

    Papers print it × 100.
    """
    require(captions.keys() == references.keys(), "CIDEr-D",
            "captions and references are of different images")
    images = len(references)
    reference_counts = {id: [ngrams(t) for t in texts] for id, texts in references.items()}
    frequency = image_frequency(reference_counts)

    scores = {}
    for id, caption in captions.items():
        hypothesis = ngrams(caption)
        hypothesis_weights = tfidf(hypothesis, frequency, images)
        similarities = []
        for reference in reference_counts[id]:
            weights = tfidf(reference, frequency, images)
            cosines = [clipped_cosine(h, r) for h, r in zip(hypothesis_weights, weights)]
            # the "length" in the penalty is the number of bigrams, as in the official code
            difference = hypothesis[1].total() - reference[1].total()
            penalty = math.exp(-(difference**2) / 72)  # 2 sigma²
            similarities.append(penalty * sum(cosines) / 4)
        scores[id] = 10 * sum(similarities) / len(similarities)
    return {"cider_d": sum(scores.values()) / len(scores), "per_image": scores}


# ------------------------------------------------------------------------------------------ the run


def write(path, captions: dict[str, str]) -> None:
    results = [{"image_id": name, "caption": caption} for name, caption in captions.items()]
    write_text(path, json.dumps(results, indent=1) + "\n")


def run(data: Path, out: Path, ask) -> dict:
    """CIDEr-D over the test images."""
    references = read(data / "dataset_flickr30k.json")
    answers = ask([(data / "images" / name, PROMPT) for name in references])
    captions = dict(zip(references, answers))
    write(out / "flickr30k_captions.json", captions)
    tokenised_captions = {name: ptb_words(caption) for name, caption in captions.items()}
    tokenised_references = {}
    for name, texts in references.items():
        tokenised_references[name] = [ptb_words(text) for text in texts]
    score = cider_d(tokenised_captions, tokenised_references)
    return {"CIDEr-D x 100 (PTB tokeniser approximated)": 100 * score["cider_d"]}
