"""VQAv2: open questions about COCO images, ten people's answers each.

source       visualqa.org, GT-Vision-Lab/VQA (vqaEval.py)
DATA         v2_OpenEnded_mscoco_*_questions.json, v2_mscoco_*_annotations.json (where the answers
             are public: not of the test splits), images/
writes       OUT/vqa_results.json for the evaluation server: normalised answers
exact        normaliser, accuracy
approximated nothing

    python 04_eval.py --benchmark vqav2 --data VQAv2 --model toy/base --out runs/vqav2
"""

import json
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from evals.official import (PREDICTIONS_ONLY, SHORT_ANSWER, get, note_id, only, percent,
                            read_json, require)
from hermesflow.files import write_text

WRITES = ("vqa_results.json",)
RAW = "overall of raw answers"


@dataclass
class Question:
    question_id: int
    image: str  # file name
    question: str
    answers: list[str]  # ten; empty for the test splits
    answer_type: str = ""  # yes/no, number, other


def read(questions, annotations=None) -> list[Question]:
    """The questions, with the answers of a file, or of a folder's file of their split."""
    what = "v2_OpenEnded_mscoco_*_questions.json of visualqa.org"
    data = read_json(questions, what, dict)
    subset = get(data, "data_subtype", str, str(questions))
    # test-dev is a part of test, and its images are named after that
    images = f"COCO_{subset.replace('test-dev', 'test')}"
    records = []
    ids = set()
    for n, record in enumerate(get(data, "questions", list[dict], str(questions)), 1):
        where = f"{questions}: question {n}"
        image_id = get(record, "image_id", int, where)
        question_id = get(record, "question_id", int, where)
        note_id(ids, question_id, where, "question_id")
        text = get(record, "question", str, where)
        records.append(Question(question_id, f"{images}_{image_id:012d}.jpg", text, []))
    require(records, questions, f"no questions; expected here: {what}")

    if annotations is not None and Path(annotations).is_dir():
        annotations = annotations_of(subset, Path(annotations))
    if annotations is not None:
        known = read_annotations(annotations)
        for q in records:
            require(q.question_id in known, annotations,
                    f"no annotation for question_id {q.question_id} of {questions}")
            q.answers, q.answer_type = known[q.question_id]
    return records


def annotations_of(subset: str, folder: Path) -> Path | None:
    """The annotations file of the questions' split; None if there is none, and a test has none."""
    own = folder / f"v2_mscoco_{subset}_annotations.json"
    found = sorted(file.name for file in folder.glob("v2_mscoco_*_annotations.json"))
    if own.name in found:
        return own
    require(not found or subset.startswith("test"), own,
            f"not found; expected here: the answers; found {len(found)}: {', '.join(found)}")
    return None


def read_annotations(path) -> dict[int, tuple[list[str], str]]:
    """(answers, answer type) by question id."""
    data = read_json(path, "v2_mscoco_*_annotations.json of visualqa.org", dict)
    known = {}
    for n, record in enumerate(get(data, "annotations", list[dict], str(path)), 1):
        where = f"{path}: annotation {n}"
        given = get(record, "answers", list[dict], where)
        answers = [get(a, "answer", str, f"{where}: field 'answers'") for a in given]
        require(answers, where, "field 'answers' is empty")
        answer_type = get(record, "answer_type", str, where)
        question_id = get(record, "question_id", int, where)
        require(question_id not in known, where, f"field 'question_id': {question_id} occurs twice")
        known[question_id] = (answers, answer_type)
    return known


def prompt(question: Question) -> str:
    return question.question + SHORT_ANSWER


NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5",
           "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}
CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's
won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()


def spelling() -> dict[str, str]:
    """Contractions by what they are misspelled as.

    The official table knows each of them with exactly one apostrophe left out, and one the wrong
    way round.
    """
    table = {}
    for word in CONTRACTIONS:
        for i, character in enumerate(word):
            if character == "'":
                table[word[:i] + word[i + 1 :]] = word
    table["somebody'd"] = "somebodyd"
    return table


SPELLING = spelling()


def clean(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def strip_punctuation(text: str) -> str:
    """Punctuation at a word's edge goes; between words it becomes a space.

    One digit,digit anywhere makes all punctuation go. Both tests look at the input, not at what is
    left of it. Last, periods that no digit follows go.
    """
    out = text
    for mark in ';/[]"{}()=+\\_-><@`,?!':
        at_edge = mark + " " in text or " " + mark in text or re.search("[0-9],[0-9]", text)
        out = out.replace(mark, "" if at_edge else " ")
    # 32 periods at most: the official call passes a flag where the count belongs
    return re.sub(r"\.(?![0-9])", "", out, count=32)


def normalise(text: str) -> str:
    """vqaEval.py: punctuation, lower case, number words, articles, contractions."""
    words = []
    for word in strip_punctuation(clean(text)).lower().split():
        word = NUMBERS.get(word, word)
        if word not in ("a", "an", "the"):
            words.append(SPELLING.get(word, word))
    return " ".join(words)


def accuracy(answer: str, truth: list[str]) -> float:
    """vqaEval.py: min(1, matches / 3) against all people but one, mean over who is left out.

    0 to 1. Both sides are normalised only where the people's answers differ: of the answer "Yes",
    ten times "yes" are no match.
    """
    differ = len({clean(t) for t in truth}) > 1
    form = normalise if differ else clean
    matches = [form(t) == form(answer) for t in truth]
    return sum(min(1.0, (sum(matches) - left_out) / 3) for left_out in matches) / len(matches)


def score(questions: list[Question], answers: list[str]) -> dict[str, float]:
    """Percent overall and per answer type, of normalised answers, as published numbers are."""
    require(all(q.answers for q in questions), "VQAv2",
            "scores need the annotations file; test splits have a server")
    groups = defaultdict(list)
    for q, answer in zip(questions, answers, strict=True):
        value = accuracy(normalise(answer), q.answers)
        groups["overall"].append(value)
        groups[q.answer_type].append(value)
    return {group: percent(values) for group, values in groups.items()}


def raw_score(questions: list[Question], answers: list[str]) -> float:
    """Percent, of the answers as they are: what vqaEval.py says of a file of these."""
    return percent([accuracy(a, q.answers) for q, a in zip(questions, answers, strict=True)])


def write(path, questions: list[Question], answers: list[str]) -> None:
    """Results for the evaluation server, normalised as before an upload."""
    results = []
    for q, answer in zip(questions, answers, strict=True):
        results.append({"question_id": q.question_id, "answer": normalise(answer)})
    write_text(path, json.dumps(results))


def run(data: Path, out: Path, ask) -> dict:
    """Accuracies; of a test split, whose answers are not public, predictions alone."""
    questions = read(only(data, "v2_OpenEnded_mscoco_*_questions.json"), data)
    answers = ask([(data / "images" / q.image, prompt(q)) for q in questions])
    write(out / "vqa_results.json", questions, answers)
    if not questions[0].answers:
        return PREDICTIONS_ONLY
    return score(questions, answers) | {RAW: raw_score(questions, answers)}
