"""Flickr30k captions, scored by CIDEr-D.

source       Karpathy's splits; pycocoevalcap (cider_scorer.py)
DATA         dataset_flickr30k.json (1,000 test images, five captions each), images/
writes       OUT/flickr30k_captions.json
exact        CIDEr-D
approximated the PTB tokeniser, which is Java; versions and file names differ

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


# what the lexer reads typographic characters as
PLAIN = str.maketrans({
    "\u2018": "'", "\u2019": "'", "\u201b": "'", "\u201c": '"', "\u201d": '"', "\u201e": '"',
    "\u2013": " -- ", "\u2014": " -- ", "\u2026": "...", "\u00a3": "#", "\u20ac": "$",
    "\u00bd": " 1/2", "\u00bc": " 1/4", "\u00be": " 3/4"})
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
PARTED = {"cannot": "can not", "gonna": "gon na", "wanna": "wan na", "gotta": "got ta",
          "lemme": "lem me", "gimme": "gim me"}
ABBREVIATIONS = """
jan feb mar apr jun jul aug sep sept oct nov dec mon tue tues wed thu thurs fri calif conn fla colo
ariz ind mich minn tenn wis okla va ga ky inc co cos corp ltd plc dept assn univ intl sys mr mrs ms
dr drs prof profs sen sens rep reps atty lt col gen messrs gov govs adm rev maj sgt cpl pvt capt st
ste ave pres lieut hon brig cmdr pfc spc supt det ph tel est ext sq ft jr sr bros blvd rd esq etc al
seq vs cf mt bldg
""".split()
WORDS = "|".join([
    r"https?://\S+", r"www\.\S+", r"[\w.-]+@[\w.-]+\w", r"[#@][a-z]\w*", r"[:;]-?[()]",
    rf"\b(?:{'|'.join(ABBREVIATIONS)})\.(?!\w)",
    r"\b(?:nos?|prop|fig|pp)\.(?=\s*\d)", r"\bph\.d\.?",
    r"\b[a-z](?:\.[a-z])+\b\.?(?:-\w+)*", r"\b[a-z]\.(?![\w.])",  # u.s., u.s.-made, j.
    r"'(?:s|m|d|re|ve|ll)\b", r"\bn't\b", r"'\d\ds\b", r"'n'", r"\by'(?=all\b)",
    r"\b[dol]'\w{2,}", r"ma'am",
    r"\bat&t\b", r"\br&b\b", r"\d+:\d+", r"[+-]?(?<![\w.])\.?\d+(?:[.,/]\d+)*(?![\w/-])",
    r"\w+(?:[-/]\w+)*(?:[.?!]\w+)*", r"[?!]{2,}|#{2,}", r"[][(){}$%&#@+=*/^~|<>\\\u00b0]"])


def ptb_words(text: str) -> str:
    """pycocoevalcap's PTB tokeniser, as far as captions need it; words are joined by spaces.

    Lower case, clitics apart; punctuation is dropped, but abbreviations keep their periods, and
    brackets have names: pycocoevalcap drops these in upper case alone.
    """
    text = re.sub(r"(?<=\w)(n't|'(?:s|m|d|re|ve|ll))\b", r" \1", text.translate(PLAIN).lower())
    text = re.sub(r"\b(?:" + "|".join(PARTED) + r")\b", lambda m: PARTED[m[0]], text)
    words = re.findall(WORDS, text)
    return " ".join(re.sub(r"[][(){}]", lambda m: BRACKETS[m[0]], word) for word in words)


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
