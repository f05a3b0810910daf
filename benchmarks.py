"""Public benchmarks: official files in, official scoring rules, official prediction files out; no policy is called here.

Every scoring function is pure: records and answers in, numbers out. Answers come in the order of the records that the
readers return. Shares are 0 to 1 where the official tool prints them so, percent where a docstring says "percent".
Wrong or missing files raise InputError: file, line or record, field, and which official file belongs there.

From top to bottom: files, POPE, MME, VQAv2, GQA, MMMU, Flickr30k and CIDEr-D, TIFA, GenEval, DPG-Bench, CLIPScore, FID.
"""

import ast
import csv
import io
import json
import math
import os
import random
import re
import statistics
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from model import InputError, parse_json, parse_record, parse_value, read_text, reason, write_file

# ------------------------------------------------------------------------------------------------------------- files

SHORT_ANSWER = "\nAnswer the question using a single word or phrase."  # LLaVA's wording: POPE, MME, VQAv2, GQA


def expected(path, what: str) -> Path:
    """`path`, or an InputError that says which official file belongs there."""
    if not os.path.exists(path):
        raise InputError(f"{path}: not found; expected here: {what}")
    return Path(path)


def read_json(path, what: str, kind: type):
    """The JSON of an official file, whose outermost value must be a dict or a list, and not empty."""
    value = parse_json(read_text(expected(path, what)), str(path))
    if not isinstance(value, kind) or not value:
        found = type(value).__name__ if value else "nothing"
        raise InputError(f"{path}: expected a {kind.__name__} ({what}), found {found}")
    return value


def read_json_lines(path, what: str) -> list[tuple[str, dict]]:
    """(where, record) of every line of an official JSON lines file."""
    lines = [(f"{path}: line {n}", line) for n, line in enumerate(read_text(expected(path, what)).split("\n"), 1)]
    records = [(where, parse_json(line, where)) for where, line in lines if line.strip()]
    for where, record in records:
        check(isinstance(record, dict), where, f"expected an object, found {type(record).__name__}")
    check(records, path, f"no records; expected here: {what}")
    return records


def check(good, where, problem: str) -> None:
    if not good:
        raise InputError(f"{where}: {problem}")


def get(record: dict, name: str, kind, where: str):
    """A field of an official record, of the type it must have."""
    check(isinstance(record, dict), where, f"expected an object, found {type(record).__name__}")
    check(name in record, where, f"field '{name}' is missing")
    return parse_value(kind, record[name], f"{where}: field '{name}'")


def percent(values) -> float:
    """Mean of shares as percent."""
    return 100 * sum(values) / len(values)


# -------------------------------------------------------------------------------------------------------------- POPE

POPE_SPLITS = ("random", "popular", "adversarial")


@dataclass
class PopeQuestion:
    question_id: int
    image: str  # file name in COCO val2014
    text: str
    label: str  # yes or no


def read_pope(folder) -> dict[str, list[PopeQuestion]]:
    """Questions per split from `coco_pope_{split}.json` (JSON lines) of RUCAIBox/POPE, output/coco; 3,000 each."""
    splits = {}
    for split in POPE_SPLITS:
        name = f"coco_pope_{split}.json"
        lines = read_json_lines(Path(folder) / name, f"{name} of RUCAIBox/POPE (output/coco)")
        splits[split] = [parse_record(PopeQuestion, record, where) for where, record in lines]
        for (where, _), q in zip(lines, splits[split]):
            check(q.label in ("yes", "no"), where, f"field 'label' should be yes or no, found {q.label!r}")
    return splits


def pope_answer(answer: str) -> str:
    """RUCAIBox/POPE evaluate.py: "no" if one of the first sentence's words is exactly No, not or no; else "yes"."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def pope_score(labels: list[str], answers: list[str]) -> dict[str, float]:
    """One split, "yes" being the positive class; shares. A ratio without cases is 0."""
    count = Counter((label, pope_answer(answer)) for label, answer in zip(labels, answers, strict=True))
    tp, fp, tn, fn = (count[c] for c in (("yes", "yes"), ("no", "yes"), ("no", "no"), ("yes", "no")))
    precision, recall = tp / max(tp + fp, 1), tp / max(tp + fn, 1)
    return {"TP": tp, "FP": fp, "TN": tn, "FN": fn, "accuracy": (tp + tn) / len(answers), "precision": precision,
            "recall": recall, "f1": 2 * precision * recall / (precision + recall) if tp else 0.0,
            "yes_ratio": (tp + fp) / len(answers)}


def pope_mean(splits: dict[str, dict]) -> dict[str, float]:
    """Means over the splits' scores; papers print the accuracy or the F1 as "POPE"."""
    names = ("accuracy", "precision", "recall", "f1", "yes_ratio")
    return {name: sum(s[name] for s in splits.values()) / len(splits) for name in names}


def write_pope(path, questions: list[PopeQuestion], answers: list[str]) -> None:
    """JSON lines for POPE's evaluate.py, which reads the field `answer` in the order of the questions."""
    write_file(path, "".join(json.dumps({"question_id": q.question_id, "question": q.text, "answer": a}) + "\n"
                        for q, a in zip(questions, answers, strict=True)))


# --------------------------------------------------------------------------------------------------------------- MME

MME_TASKS = {"Perception": ["existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark",
                            "artwork", "OCR"],
             "Cognition": ["commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"]}


@dataclass
class MmeQuestion:
    image: str  # path
    question: str
    label: str  # Yes or No


def read_mme(folder) -> dict[str, list[MmeQuestion]]:
    """Questions per task, two per image, from MME_Benchmark_release_version.

    A task has `images/` and `questions_answers_YN/`, or images and texts side by side.
    """
    folder, tasks = expected(folder, "the folder MME_Benchmark_release_version with one folder per task"), {}
    for task in [t for names in MME_TASKS.values() for t in names]:
        home = expected(folder / task, f"the MME task '{task}'")
        split = (home / "questions_answers_YN").is_dir()
        texts, images = (home / "questions_answers_YN", home / "images") if split else (home, home)
        files = sorted(texts.glob("*.txt"))
        check(files, texts, "no *.txt; expected here: one text per image, lines question<TAB>Yes or No")
        pictures = {p.stem: p for p in sorted(images.glob("*")) if p.suffix.lower() in (".jpg", ".jpeg", ".png")}
        tasks[task] = []
        for file in files:
            check(file.stem in pictures, images / f"{file.stem}.jpg", f"not found; expected here: the image of {file}")
            lines = [(n, line) for n, line in enumerate(read_text(file).split("\n"), 1) if line.strip()]
            check(len(lines) == 2, file, f"expected two questions, found {len(lines)}")
            for n, line in lines:
                question, _, label = line.partition("\t")
                check(label.strip() in ("Yes", "No"), f"{file}: line {n}", "expected question<TAB>Yes or No")
                tasks[task].append(MmeQuestion(str(pictures[file.stem]), question.strip(), label.strip()))
    return tasks


def mme_prompt(question: str) -> str:
    return question.replace(" Please answer yes or no.", "") + SHORT_ANSWER


def mme_answer(answer: str) -> str:
    """MME eval_tool/calculation.py: yes, no or other, from the first four characters in lower case."""
    answer = answer.lower()
    return next((word for word in ("yes", "no") if word in answer[:4]), "other")


def mme_task(labels: list[str], answers: list[str]) -> dict[str, float]:
    """One task, two questions per image in a row; acc, acc_plus (share of images with both right) and score percent."""
    right = [mme_answer(a) == label.lower() for label, a in zip(labels, answers, strict=True)]
    acc, plus = percent(right), percent([a and b for a, b in zip(right[::2], right[1::2], strict=True)])
    return {"acc": acc, "acc_plus": plus, "score": acc + plus}


def mme_score(tasks: dict[str, dict]) -> dict[str, dict]:
    """Perception and Cognition from the results of `mme_task`: the tasks' scores and their total (at most 200 each)."""
    groups = {group: {t: tasks[t]["score"] for t in names if t in tasks} for group, names in MME_TASKS.items()}
    return {group: {"tasks": scores, "total": sum(scores.values())} for group, scores in groups.items()}


def write_mme(folder, tasks: dict[str, list[MmeQuestion]], answers: dict[str, list[str]]) -> None:
    """`<task>.txt` for MME's calculation.py: image, question, label and answer between tabs."""
    for task, questions in tasks.items():
        rows = [(Path(q.image).name, q.question, q.label, re.sub(r"[\t\r\n]", " ", a))
                for q, a in zip(questions, answers[task], strict=True)]
        write_file(Path(folder) / f"{task}.txt", "".join("\t".join(row) + "\n" for row in rows))


# ------------------------------------------------------------------------------------------------------------- VQAv2


@dataclass
class VqaQuestion:
    question_id: int
    image: str  # file name
    question: str
    answers: list[str]  # ten; empty for the test splits
    answer_type: str = ""  # yes/no, number, other


def read_vqa(questions, annotations=None) -> list[VqaQuestion]:
    """v2_OpenEnded_mscoco_*_questions.json, with v2_mscoco_*_annotations.json where the answers are public."""
    what = "v2_OpenEnded_mscoco_*_questions.json of visualqa.org"
    data = read_json(questions, what, dict)
    subset = get(data, "data_subtype", str, str(questions)).replace("test-dev", "test")
    records = []
    for n, q in enumerate(get(data, "questions", list[dict], str(questions)), 1):
        where = f"{questions}: question {n}"
        image = f"COCO_{subset}_{get(q, 'image_id', int, where):012d}.jpg"
        records.append(VqaQuestion(get(q, "question_id", int, where), image, get(q, "question", str, where), []))
    check(records, questions, f"no questions; expected here: {what}")
    if annotations is not None:
        data, known = read_json(annotations, "v2_mscoco_*_annotations.json of visualqa.org", dict), {}
        for n, a in enumerate(get(data, "annotations", list[dict], str(annotations)), 1):
            where = f"{annotations}: annotation {n}"
            answers = [get(v, "answer", str, f"{where}: field 'answers'") for v in get(a, "answers", list[dict], where)]
            check(answers, where, "field 'answers' is empty")
            known[get(a, "question_id", int, where)] = answers, get(a, "answer_type", str, where)
        for q in records:
            check(q.question_id in known, annotations, f"no annotation for question_id {q.question_id} of {questions}")
            q.answers, q.answer_type = known[q.question_id]
    return records


VQA_NUMBERS = {"none": "0"} | {w: str(n) for n, w in enumerate(
    "zero one two three four five six seven eight nine ten".split())}
VQA_CONTRACTIONS = """ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't
must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've
somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's
there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't
what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's
won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've""".split()
# the official table knows each of them with exactly one apostrophe left out, and one the wrong way round
VQA_SPELLING = {w[:i] + w[i + 1 :]: w for w in VQA_CONTRACTIONS for i, c in enumerate(w) if c == "'"}
VQA_SPELLING["somebody'd"] = "somebodyd"


def vqa_clean(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def vqa_punctuation(text: str) -> str:
    """Punctuation at a word's edge goes, between words it becomes a space; then periods that no digit follows go.

    One digit,digit anywhere makes all punctuation go. Both tests look at the input, not at what is left of it.
    """
    out = text
    for p in ';/[]"{}()=+\\_-><@`,?!':
        goes = p + " " in text or " " + p in text or re.search("[0-9],[0-9]", text)
        out = out.replace(p, "" if goes else " ")
    return re.sub(r"\.(?![0-9])", "", out, count=32)  # 32: the official call passes a flag where the count belongs


def vqa_normalise(text: str) -> str:
    """GT-Vision-Lab/VQA vqaEval.py: punctuation, lower case, number words, articles, contractions."""
    words = [VQA_NUMBERS.get(w, w) for w in vqa_punctuation(vqa_clean(text)).lower().split()]
    return " ".join(VQA_SPELLING.get(w, w) for w in words if w not in ("a", "an", "the"))


def vqa_accuracy(answer: str, truth: list[str]) -> float:
    """vqaEval.py: min(1, matches / 3) against all people but one, mean over who is left out; 0 to 1.

    Both sides are normalised only where the people's answers differ.
    """
    clean = vqa_normalise if len({vqa_clean(t) for t in truth}) > 1 else vqa_clean
    same = [clean(t) == clean(answer) for t in truth]
    return sum(min(1.0, (sum(same) - s) / 3) for s in same) / len(same)


def vqa_score(questions: list[VqaQuestion], answers: list[str]) -> dict[str, float]:
    """Percent overall and per answer type."""
    check(all(q.answers for q in questions), "VQAv2", "scores need the annotations file; test splits have a server")
    groups = defaultdict(list)
    for q, a in zip(questions, answers, strict=True):
        for group in ("overall", q.answer_type):
            groups[group].append(vqa_accuracy(a, q.answers))
    return {group: percent(values) for group, values in groups.items()}


def write_vqa(path, questions: list[VqaQuestion], answers: list[str]) -> None:
    """Results JSON for the VQA evaluation server."""
    write_file(path, json.dumps([{"question_id": q.question_id, "answer": a}
                            for q, a in zip(questions, answers, strict=True)]))


# --------------------------------------------------------------------------------------------------------------- GQA


@dataclass
class GqaQuestion:
    question: str
    imageId: str  # the image is <imageId>.jpg
    answer: str
    isBalanced: bool
    id: str = ""


def read_gqa(path) -> list[GqaQuestion]:
    data = read_json(path, "testdev_balanced_questions.json of GQA", dict)
    return [parse_record(GqaQuestion, {**q, "id": id} if isinstance(q, dict) else q, f"{path}: question {id!r}")
            for id, q in data.items()]


def gqa_answer(answer: str) -> str:
    """LLaVA convert_gqa_for_eval.py: what is written to the predictions file."""
    return answer.rstrip(".").lower()


def gqa_score(questions: list[GqaQuestion], answers: list[str]) -> float:
    """GQA eval.py: percent of exact matches over balanced questions."""
    right = [gqa_answer(a) == q.answer for q, a in zip(questions, answers, strict=True) if q.isBalanced]
    check(right, "GQA", "no question has isBalanced true")
    return percent(right)


def write_gqa(path, questions: list[GqaQuestion], answers: list[str]) -> None:
    """Predictions JSON for GQA's eval.py and evaluation server."""
    write_file(path, json.dumps([{"questionId": q.id, "prediction": gqa_answer(a)}
                            for q, a in zip(questions, answers, strict=True)]))


# -------------------------------------------------------------------------------------------------------------- MMMU


@dataclass
class MmmuQuestion:
    id: str  # validation_Accounting_1
    question: str  # names its images <image 1>, <image 2>, …
    options: dict[str, str]  # letter -> text; empty for open questions
    images: list[str]  # paths
    answer: list[str]  # any of them is right; "?" in the test split

    @property
    def subject(self) -> str:
        return "_".join(self.id.split("_")[1:-1])


def read_mmmu(path) -> list[MmmuQuestion]:
    """The dataset MMMU/MMMU exported to JSON lines, image_1 to image_7 being paths relative to the file (or null)."""
    questions = []
    for where, record in read_json_lines(path, "MMMU/MMMU exported as JSON lines, with its images as files"):
        options = text_list(get(record, "options", str, where))
        check(options is not None, where, "field 'options' should be the text of a list")
        answer, kind = get(record, "answer", str, where), get(record, "question_type", str, where)
        check(kind in ("multiple-choice", "open"), where, f"field 'question_type' is {kind!r}")
        check(options or kind == "open", where, "field 'options' is empty, but the question is multiple-choice")
        images = [get(record, f"image_{i}", str, where) for i in range(1, 8) if record.get(f"image_{i}") is not None]
        questions.append(MmmuQuestion(
            get(record, "id", str, where), get(record, "question", str, where),
            {chr(65 + i): o for i, o in enumerate(options)} if kind == "multiple-choice" else {},
            [os.path.join(os.path.dirname(path), i) for i in images],
            (text_list(answer) if kind == "open" else None) or [answer]))
    return questions


def text_list(text: str) -> list[str] | None:
    """The list whose Python text this is, or None."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    return [str(v) for v in value] if isinstance(value, list) else None


def mmmu_prompt(q: MmmuQuestion) -> str:
    """MMMU-Benchmark/MMMU, configs of LLaVA-1.5."""
    if not q.options:
        return f"{q.question}\n{SHORT_ANSWER}"
    options = "".join(f"({letter}) {text}\n" for letter, text in q.options.items())
    return f"{q.question}\n\n{options}\n\nAnswer with the option's letter from the given choices directly."


def mmmu_choice(response: str, options: dict[str, str]) -> str | None:
    """mmmu/utils/eval_utils.py: the letter that a response means, or None.

    "(A)" anywhere, else "A" between spaces, else (more than five words) an option's text; of several the last one.
    """
    for mark in ",.!?;:'":
        response = response.strip(mark)
    response = f" {response} "
    shapes = [(response, {c: f"({c})" for c in options}), (response, {c: f" {c} " for c in options})]
    if len(response.split()) > 5:
        shapes.append((response.lower(), {c: text.lower() for c, text in options.items()}))
    for text, shape in shapes:
        places = {c: text.rfind(s) for c, s in shape.items() if s in text}
        if places:
            return max(places, key=places.get)
    return None


def mmmu_normalise(text: str) -> list:
    """A number with two decimals, or lower-case text; one character gets a space before or after it."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


MMMU_NUMBERS = (r"-?\b\d{1,3}(?:,\d{3})+\b",  # 1,060
                r"-?\d+(?:\.\d+)?[eE][+-]?\d+",  # 2.6e3
                r"-?(?:\d*\.\d+|\d+\b)(?![eE][+-]?\d|[,\d])")


def mmmu_open(response: str) -> list:
    """eval_utils.py: what an open response may mean, texts and numbers, each once.

    From every line the shortest text behind a phrase that announces an answer; without one the whole response.
    """
    response, found = response.strip().strip(".").lower(), []
    signs = ["could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result "]
    lines = response.split("\n")
    for n, line in enumerate(lines, 1):
        tail = ""
        for sign in signs + ["="] * (n == len(lines)):
            if sign in line:
                new = line.split(sign)[-1].strip()
                tail = new if not tail or len(new) < len(tail) else tail
        if tail and tail not in list(":,.!?;'"):
            found.append(tail)
    found = found or [response]
    numbers = [number for text in found for pattern in MMMU_NUMBERS for number in re.findall(pattern, text)]
    return list(dict.fromkeys(value for text in found + numbers for value in mmmu_normalise(text)))


def mmmu_right(response: str, truth: list[str]) -> bool:
    """eval_utils.py, open questions: a right text inside one of the response's texts, or an equal number."""
    truth = [value for t in truth for value in mmmu_normalise(t)]
    return any(any(isinstance(t, str) and t in said for t in truth) if isinstance(said, str) else said in truth
               for said in mmmu_open(response))


def mmmu_predictions(questions: list[MmmuQuestion], responses: list[str], seed: int = 42) -> list[str]:
    """Letters (a random one where no letter can be read, drawn in question order) and open responses as they are."""
    rng = random.Random(seed)
    return [(mmmu_choice(r, q.options) or rng.choice(list(q.options))) if q.options else r
            for q, r in zip(questions, responses, strict=True)]


def mmmu_score(questions: list[MmmuQuestion], predictions: list[str]) -> dict:
    """Percent over all questions and per subject; questions without a public answer do not count."""
    subjects = defaultdict(list)
    for q, p in zip(questions, predictions, strict=True):
        if q.answer != ["?"]:
            subjects[q.subject].append(p in q.answer if q.options else mmmu_right(p, q.answer))
    check(subjects, "MMMU", "no question has a public answer; send the predictions to the evaluation server")
    return {"overall": percent([right for s in subjects.values() for right in s]),
            "subjects": {name: percent(s) for name, s in subjects.items()}}


def write_mmmu(path, questions: list[MmmuQuestion], predictions: list[str]) -> None:
    """{id: letter or text} for MMMU's main_eval_only.py and evaluation server."""
    write_file(path, json.dumps({q.id: p for q, p in zip(questions, predictions, strict=True)}))


# ---------------------------------------------------------------------------------------------- Flickr30k and CIDEr-D

FLICKR_PROMPT = "Provide a one-sentence caption for the provided image."


def read_flickr(path, split: str = "test") -> dict[str, list[str]]:
    """Image file name -> its captions, from Karpathy's dataset_flickr30k.json (1,000 test images, five captions)."""
    what = "dataset_flickr30k.json (Karpathy's splits)"
    captions = {}
    for n, image in enumerate(get(read_json(path, what, dict), "images", list[dict], str(path)), 1):
        where = f"{path}: image {n}"
        if get(image, "split", str, where) == split:
            sentences = get(image, "sentences", list[dict], where)
            check(sentences, where, "field 'sentences' is empty")
            captions[get(image, "filename", str, where)] = [get(s, "raw", str, where) for s in sentences]
    check(captions, path, f"no image of split {split!r}; expected here: {what}")
    return captions


def ptb_words(text: str) -> str:
    """An approximation of the PTB tokeniser (Java) of pycocoevalcap: lower case, 's and n't apart, punctuation gone."""
    text = re.sub(r"(?<=\w)(n't|'(?:s|m|d|re|ve|ll))\b", r" \1", text.lower())
    return " ".join(re.findall(r"'(?:s|m|d|re|ve|ll)\b|\d+(?:[.,]\d+)+|\w+(?:[-']\w+)*|[$%&#@+=*]", text))


def ngrams(text: str) -> list[Counter]:
    """Counts of the 1- to 4-grams of a tokenised text."""
    words = text.split()
    return [Counter(zip(*(words[i:] for i in range(n)))) for n in range(1, 5)]


def cider_d(captions: dict[str, str], references: dict[str, list[str]]) -> dict:
    """pycocoevalcap cider_scorer.py (n = 4, sigma = 6) on tokenised texts: {"cider_d", "per_image"}; papers: × 100.

    Weights of n-grams: counts × (log #images − log #images with the n-gram in a reference). The "length" in the
    penalty is the number of bigrams, as in the official code.
    """
    check(captions.keys() == references.keys(), "CIDEr-D", "captions and references are of different images")
    refs = {id: [ngrams(r) for r in texts] for id, texts in references.items()}
    seen = Counter(g for counts in refs.values() for g in {g for ref in counts for c in ref for g in c})

    def weigh(counts):
        return [{g: k * (math.log(len(refs)) - math.log(max(1, seen[g]))) for g, k in c.items()} for c in counts]

    def norm(weights):
        return math.sqrt(sum(w * w for w in weights.values()))

    def likeness(hyp, ref):
        penalty = math.exp(-((hyp[1].total() - ref[1].total()) ** 2) / 72)
        cosines = [sum(min(w, r[g]) * r[g] for g, w in h.items() if g in r) / (norm(h) * norm(r) or 1)
                   for h, r in zip(weigh(hyp), weigh(ref))]
        return penalty * sum(cosines) / 4

    scores = {id: 10 * sum(likeness(ngrams(captions[id]), r) for r in refs[id]) / len(refs[id]) for id in captions}
    return {"cider_d": sum(scores.values()) / len(scores), "per_image": scores}


# -------------------------------------------------------------------------------------------------------------- TIFA


@dataclass
class TifaQuestion:
    id: str  # of the caption
    caption: str
    question: str
    choices: list[str]
    answer: str
    element_type: str


def read_tifa(path) -> list[TifaQuestion]:
    data = read_json(path, "tifa_v1.0_question_answers.json of Yushi-Hu/tifa", list)
    return [parse_record(TifaQuestion, q, f"{path}: record {n}") for n, q in enumerate(data, 1)]


def tifa_score(questions: list[TifaQuestion], chosen: list[str]) -> dict:
    """tifascore/tifa_score.py: shares of right answers, their mean and sample deviation over captions, and per type."""
    captions, types = defaultdict(list), defaultdict(list)
    for q, choice in zip(questions, chosen, strict=True):
        captions[q.id].append(choice == q.answer)
        types[q.element_type].append(choice == q.answer)
    scores = {id: sum(right) / len(right) for id, right in captions.items()}
    return {"tifa_average": statistics.mean(scores.values()),
            "tifa_stdev": statistics.stdev(scores.values()) if len(scores) > 1 else 0.0,
            "accuracy_by_type": {t: sum(right) / len(right) for t, right in types.items()},
            "caption_scores": scores}


# ----------------------------------------------------------------------------------------------------------- GenEval

GENEVAL_TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
GENEVAL_COLORS = "red orange yellow green blue purple pink brown black white".split()


def read_geneval(path) -> list[dict]:
    """The 553 records of prompts/evaluation_metadata.jsonl of djghosh13/geneval, as they are."""
    lines = read_json_lines(path, "evaluation_metadata.jsonl of djghosh13/geneval (prompts)")
    for where, record in lines:
        get(record, "prompt", str, where)
        check(get(record, "tag", str, where) in GENEVAL_TAGS, where, f"field 'tag' is {record['tag']!r}")
        for name in ("include", "exclude"):
            clauses = get(record, name, list[dict], where) if name in record or name == "include" else []
            for i, clause in enumerate(clauses):
                inside = f"{where}: field '{name}'"
                get(clause, "class", str, inside), get(clause, "count", int, inside)
                if "color" in clause:
                    check(clause["color"] in GENEVAL_COLORS, inside, f"field 'color' is {clause['color']!r}")
                if "position" in clause:
                    p = clause["position"]
                    check(isinstance(p, list) and len(p) == 2 and type(p[1]) is int and 0 <= p[1] < i, inside,
                          "field 'position' should be [relation, index of an earlier clause]")
    return [record for _, record in lines]


def read_object_names(path) -> list[str]:
    """GenEval's names of the 80 COCO classes, in the order of the detector's labels."""
    what = "object_names.txt of djghosh13/geneval (evaluation)"
    names = [line.strip() for line in read_text(expected(path, what)).split("\n") if line.strip()]
    check(len(names) == 80, path, f"expected 80 names ({what}), found {len(names)}")
    return names


def geneval_objects(detections: list[dict], tag: str, threshold: float = 0.3, counting_threshold: float = 0.9,
                    max_objects: int = 16, max_overlap: float = 1.0) -> dict[str, list[dict]]:
    """evaluate_images.py: the detections that count, per class, best first.

    detections: {"class", "score", "box": (x0, y0, x1, y1) pixels} and whatever else one needs. max_overlap 1: no NMS.
    """
    objects, least = {}, counting_threshold if tag == "counting" else threshold
    for name in dict.fromkeys(d["class"] for d in detections):
        found = sorted((d for d in detections if d["class"] == name and d["score"] > least), key=lambda d: d["score"])
        kept = []
        for d in found[::-1][:max_objects]:
            if max_overlap == 1 or all(iou(k["box"], d["box"]) < max_overlap for k in kept):
                kept.append(d)
        if kept:
            objects[name] = kept
    return objects


def iou(a, b) -> float:
    """Overlap of two boxes, which include their last pixel."""
    def area(x0, y0, x1, y1):
        return max(x1 - x0 + 1, 0) * max(y1 - y0 + 1, 0)

    both = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    return both / (area(*a) + area(*b) - both or 1)


def relative_position(a, b, threshold: float = 0.1) -> set[str]:
    """Where box a is relative to box b: any of left of, right of, above, below; y points down."""
    (a0, a1), (b0, b1) = np.reshape(a, (2, 2)).astype(float), np.reshape(b, (2, 2)).astype(float)
    offset = (a0 + a1 - b0 - b1) / 2  # (x, y)
    revised = np.maximum(np.abs(offset) - threshold * (np.abs(a1 - a0) + np.abs(b1 - b0)), 0) * np.sign(offset)
    if (np.abs(revised) < 1e-3).all():
        return set()
    x, y = revised / np.linalg.norm(offset)  # of the unrevised offset
    found = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, holds in found.items() if holds}


def geneval_colored(metadata: dict, objects: dict[str, list[dict]]) -> list[dict]:
    """The objects whose "color" `geneval_check` will read; the caller has CLIP write it into them."""
    clauses = [c for c in metadata.get("include", []) if "color" in c]
    return [o for c in clauses for o in objects.get(c["class"], [])[: c["count"]]]


def geneval_check(metadata: dict, objects: dict[str, list[dict]], position_threshold: float = 0.1) -> dict:
    """evaluate_images.py for one image: {"correct", "categories", "reasons"}, one of each per failed clause.

    Only the best `count` objects of a clause are looked at. A clause that failed is no target for a position.
    """
    failures, groups = [], []
    for clause in metadata.get("include", []):
        name, count = clause["class"], clause["count"]
        top, before = objects.get(name, [])[:count], len(failures)
        colors = [o.get("color") for o in top]
        if len(top) < count:
            failures.append(("missing", f"{name}: {len(top)} found, at least {count} wanted"))
        elif "color" in clause and colors.count(clause["color"]) < count:
            failures.append(("color", f"{name}: {', '.join(map(str, colors))}, wanted {clause['color']}"))
        elif "position" in clause:
            relation, target = clause["position"]
            if groups[target] is None:
                failures.append(("no_target", f"{name}: nothing to be {relation}"))
            else:
                seen = [relative_position(o["box"], t["box"], position_threshold) for o in top for t in groups[target]]
                wrong = [s for s in seen if relation not in s]
                if wrong:
                    where = " and ".join(sorted(wrong[0])) or "no side"
                    failures.append(("position", f"{name}: {where}, wanted {relation}"))
        groups.append(top if len(failures) == before else None)
    for clause in metadata.get("exclude", []):
        found = len(objects.get(clause["class"], []))
        if found >= clause["count"]:
            failures.append(("excess", f"{clause['class']}: {found} found, fewer than {clause['count']} wanted"))
    return {"correct": not failures, "categories": [c for c, _ in failures], "reasons": [r for _, r in failures]}


def geneval_summary(results: list[tuple[dict, bool]]) -> dict:
    """summary_scores.py over (metadata, correct) of every image: shares per tag, their mean, of images, of prompts."""
    tags, prompts = defaultdict(list), defaultdict(list)
    for metadata, correct in results:
        tags[metadata["tag"]].append(correct)
        prompts[json.dumps(metadata, sort_keys=True)].append(correct)
    shares = {tag: sum(right) / len(right) for tag, right in tags.items()}
    return {"overall": sum(shares.values()) / len(shares), "tags": shares, "images": len(results),
            "prompts": len(prompts), "correct_images": sum(correct for _, correct in results) / len(results),
            "correct_prompts": sum(map(any, prompts.values())) / len(prompts)}


# --------------------------------------------------------------------------------------------------------- DPG-Bench


@dataclass
class DpgQuestion:
    item: str  # the prompt is prompts/<item>.txt, the image <item>.png
    number: int
    parents: list[int]  # empty: none
    category: str  # "attribute - color"; its first part is the broad category
    question: str


def read_dpg(path) -> list[DpgQuestion]:
    """Every row of dpg_bench.csv of TencentQQGYLab/ELLA."""
    what = "dpg_bench.csv of TencentQQGYLab/ELLA (dpg_bench)"
    reader, questions = csv.DictReader(io.StringIO(read_text(expected(path, what)))), []
    try:
        for row in reader:
            where = f"{path}: line {reader.line_num}"
            item, number, parents, proposition, question = (get(row, name, str, where) for name in (
                "item_id", "proposition_id", "dependency", "tuple", "question_natural_language"))
            check(re.fullmatch(r"\s*\d+\s*", number, re.ASCII), where,
                  f"field 'proposition_id' should be a whole number, found {number!r}")
            check(re.fullmatch(r"\s*\d+(\s*,\s*\d+)*\s*", parents, re.ASCII), where,
                  f"field 'dependency' should be whole numbers, found {parents!r}")
            questions.append(DpgQuestion(item, int(number), [p for p in map(int, parents.split(",")) if p],
                                         proposition.split("(")[0].strip(), question))
    except csv.Error as error:
        raise InputError(f"{path}: line {reader.line_num}: not CSV ({error})") from None
    check(questions, path, f"no rows; expected here: {what}")
    return questions


def dpg_image(questions: list[DpgQuestion], crops: list[dict[int, str]]) -> dict | None:
    """One image: the answers to its questions about every crop (top left, top right, bottom left, bottom right).

    A question scores 1 if the answer is exactly "yes"; then, in question order, one with a parent at 0 becomes 0.
    Returns the image's score, every question's mean over crops, and its score on the last crop before dependencies;
    None without questions, or where a parent is not among them: the official code leaves such an image out.
    """
    scores = []
    if not questions:
        return None
    for answers in crops:
        plain = {q.number: float(answers[q.number] == "yes") for q in questions}
        score = dict(plain)
        for q in questions:
            for parent in q.parents:
                if parent not in score:
                    return None
                if score[parent] == 0:
                    score[q.number] = 0.0
                    break
        scores.append(score)
    return {"score": sum(sum(s.values()) / len(s) for s in scores) / len(scores), "last_crop": plain,
            "questions": {q.number: sum(s[q.number] for s in scores) / len(scores) for q in questions}}


def dpg_score(questions: list[DpgQuestion], answers: dict[str, list[dict[int, str]]], skip_first_row: bool = False,
              last_crop_categories: bool = False) -> dict:
    """compute_dpg_bench.py, percent: "dpg_score", "L1" and "L2" categories, "per_image", and "failed" items.

    answers[item][crop][question number]. "dpg_score" is None if every image failed. The two switches are the official
    code's bugs: it never sees the first row, and its category scores take the last crop without dependencies.
    """
    items, categories, per_image = defaultdict(dict), {"L1": defaultdict(list), "L2": defaultdict(list)}, {}
    for q in questions[1:] if skip_first_row else questions:
        items[q.item][q.number] = q
    for item, crops in answers.items():
        result = dpg_image(list(items[item].values()), crops)
        if result is None:
            continue
        per_image[item] = result
        for q in items[item].values():
            value = result["last_crop" if last_crop_categories else "questions"][q.number]
            categories["L1"][q.category.split("-")[0].strip()].append(value)
            categories["L2"][q.category].append(value)
    return {"dpg_score": percent([r["score"] for r in per_image.values()]) if per_image else None,
            "per_image": per_image, "failed": [item for item in answers if item not in per_image],
            **{level: {name: percent(v) for name, v in groups.items()} for level, groups in categories.items()}}


def dpg_scores(questions: list[DpgQuestion], answers: dict[str, list[dict[int, str]]]) -> dict[str, dict]:
    """Both numbers, by name."""
    official = dpg_score(questions, answers, skip_first_row=True, last_crop_categories=True)
    return {"correct": dpg_score(questions, answers), "official-bug-compatible": official}


# --------------------------------------------------------------------------------------------------- CLIPScore and FID


def clipscore(cosines) -> np.ndarray:
    """jmhessel/clipscore: 2.5 · max(cos, 0), text "A photo depicts " + caption, openai/clip-vit-base-patch32."""
    return 2.5 * np.maximum(np.asarray(cosines, float), 0)


def plain_cosine(cosines) -> np.ndarray:
    """The papers' COCO "CLIP-Score": 100 · cos, the caption without prefix. Name the variant where it is printed."""
    return 100 * np.asarray(cosines, float)


# Inception-v3 as pytorch-fid converted it from TensorFlow: per block, branches of convolutions (name, width, kernel).
# Kernels: n pads to keep the size, "n/2" halves it without padding; names are those of the weights file.
def inception_a(pool):
    return [[("branch1x1", 64, 1)], [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)],
            [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)],
            ["avg", ("branch_pool", pool, 1)]]


def inception_c(c):
    return [[("branch1x1", 192, 1)], [("branch7x7_1", c, 1), ("branch7x7_2", c, (1, 7)), ("branch7x7_3", 192, (7, 1))],
            [("branch7x7dbl_1", c, 1), ("branch7x7dbl_2", c, (7, 1)), ("branch7x7dbl_3", c, (1, 7)),
             ("branch7x7dbl_4", c, (7, 1)), ("branch7x7dbl_5", 192, (1, 7))], ["avg", ("branch_pool", 192, 1)]]


def inception_e(pool):
    return [[("branch1x1", 320, 1)],
            [("branch3x3_1", 384, 1), [("branch3x3_2a", 384, (1, 3)), ("branch3x3_2b", 384, (3, 1))]],
            [("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3),
             [("branch3x3dbl_3a", 384, (1, 3)), ("branch3x3dbl_3b", 384, (3, 1))]], [pool, ("branch_pool", 192, 1)]]


INCEPTION = {
    "Mixed_5b": inception_a(32), "Mixed_5c": inception_a(64), "Mixed_5d": inception_a(64),
    "Mixed_6a": [[("branch3x3", 384, "3/2")],
                 [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, "3/2")], ["max/2"]],
    "Mixed_6b": inception_c(128), "Mixed_6c": inception_c(160), "Mixed_6d": inception_c(160),
    "Mixed_6e": inception_c(192),
    "Mixed_7a": [[("branch3x3_1", 192, 1), ("branch3x3_2", 320, "3/2")],
                 [("branch7x7x3_1", 192, 1), ("branch7x7x3_2", 192, (1, 7)), ("branch7x7x3_3", 192, (7, 1)),
                  ("branch7x7x3_4", 192, "3/2")], ["max/2"]],
    "Mixed_7b": inception_e("avg"), "Mixed_7c": inception_e("max")}
POOLS = {"avg": nn.AvgPool2d(3, 1, 1, count_include_pad=False), "max": nn.MaxPool2d(3, 1, 1),
         "max/2": nn.MaxPool2d(3, 2)}


class Conv(nn.Module):
    def __init__(self, c_in, c_out, kernel, stride=1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=0.001)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.ModuleDict):
    """One Inception block: its branches side by side."""

    def __init__(self, c_in, branches):
        super().__init__()
        self.branches, self.width = branches, sum(self.build(c_in, b) for b in branches)

    def build(self, c, branch) -> int:
        for step in branch:
            if isinstance(step, list):
                c = sum(self.build(c, [s]) for s in step)
            elif isinstance(step, tuple):
                name, width, kernel = step
                half = isinstance(kernel, str)
                size = int(kernel[0]) if half else kernel
                padding = 0 if half else tuple(k // 2 for k in np.broadcast_to(size, 2).tolist())
                self[name], c = Conv(c, width, size, 2 if half else 1, padding), width
        return c

    def apply_branch(self, x, branch):
        for step in branch:
            if isinstance(step, list):
                x = torch.cat([self.apply_branch(x, [s]) for s in step], 1)
            else:
                x = self[step[0]](x) if isinstance(step, tuple) else POOLS[step](x)
        return x

    def forward(self, x):
        return torch.cat([self.apply_branch(x, b) for b in self.branches], 1)


class Inception(nn.Module):
    """(B, 3, 299, 299) in [-1, 1] -> (B, 2048) pooled features."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3, self.Conv2d_2a_3x3 = Conv(3, 32, 3, 2), Conv(32, 32, 3)
        self.Conv2d_2b_3x3, self.Conv2d_3b_1x1 = Conv(32, 64, 3, 1, 1), Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3)
        c = 192
        for name, branches in INCEPTION.items():
            setattr(self, name, Mixed(c, branches))
            c = getattr(self, name).width
        self.fc = nn.Linear(c, 1008)  # in the weights, not used

    def forward(self, x):
        x = POOLS["max/2"](self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))))
        x = POOLS["max/2"](self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))
        for name in INCEPTION:
            x = getattr(self, name)(x)
        return x.mean((2, 3))


def read_fid_statistics(path) -> tuple[np.ndarray, np.ndarray]:
    """mu (D,) and sigma (D, D) of an npz file."""
    what = "MS-COCO_val2014_fid_stats.npz of boomb0om/text2image-benchmark, with mu and sigma"
    try:
        with np.load(expected(path, what)) as data:
            mu, sigma = (np.asarray(data[name], float) for name in ("mu", "sigma"))
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path}: cannot read ({reason(error)}); expected here: {what}") from None
    check(mu.ndim == 1 and sigma.shape == 2 * mu.shape, path, f"mu {mu.shape} and sigma {sigma.shape} do not fit")
    return mu, sigma


def fid_statistics(features) -> tuple[np.ndarray, np.ndarray]:
    """mu (D,) and sigma (D, D) of Inception features (images, D)."""
    features = np.asarray(features, float)
    check(len(features) > 1, "FID", "needs at least two images")
    return features.mean(0), np.atleast_2d(np.cov(features, rowvar=False))


def fid(ours, theirs) -> float:
    """|mu − mu'|² + tr(S + S' − 2 (S S')^½), from (mu, sigma) pairs.

    The last trace is the sum of the roots of the eigenvalues of S S', which are those of the symmetric S^½ S' S^½.
    """
    (mu, sigma), (mu2, sigma2) = ours, theirs
    check(np.shape(mu) == np.shape(mu2), "FID", f"statistics of different sizes: {np.shape(mu)} and {np.shape(mu2)}")
    values, vectors = np.linalg.eigh(sigma)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ sigma2 @ root).clip(0)).sum()
    return float(np.sum((np.asarray(mu) - mu2) ** 2) + np.trace(sigma) + np.trace(sigma2) - 2 * cross)
