"""Official scoring rules: every recorded case; then readers and writers of official files."""

import csv
import inspect
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import ROOT
from evals import clipscore, dpg, fid, flickr30k, geneval, gqa, mme, mmmu, pope, tifa, vqav2
from hermesflow.files import InputError
from hermesflow.records import Question

CASES = Path(os.environ.get("EVAL_CASES", ROOT / "tests" / "eval_cases"))


def recorded(name: str):
    return json.loads((CASES / f"{name}_cases.json").read_text(encoding="utf-8"))


CIDER = recorded("cider")
DPG = recorded("dpg")
GENEVAL = recorded("geneval")
MME = recorded("mme")
MMMU = recorded("mmmu_parse")
POPE = recorded("pope")
TIFA = recorded("tifa")
VQA = recorded("vqa_norm")


def ids(cases: list, *names: str) -> dict:
    """Parameters of a test with readable names."""
    shown = []
    for i, case in enumerate(cases):
        shown.append(" ".join([str(i), *(ascii(case[name])[:40] for name in names)]))
    return {"argvalues": cases, "ids": shown}


def close(value):
    return pytest.approx(value, rel=1e-9, abs=1e-9)


# ----------------------------------------------------------------------------------- recorded cases


@pytest.mark.parametrize("case", **ids(POPE["answer_parse_cases"], "answer"))
def test_pope_answer(case):
    assert pope.parse_answer(case["answer"]) == case["parsed"]


@pytest.mark.parametrize("case", **ids(POPE["metric_cases"], "id"))
def test_pope_score(case):
    score = pope.score(case["labels"], case["answers"])
    assert score == close({name: case[name] for name in score})
    assert set(case) == {*score, "id", "answers", "labels"}


MME_ANSWERS = MME["parse_cases_input_is_lowercased_before_parse"]


@pytest.mark.parametrize("case", **ids(MME_ANSWERS, "answer"))
def test_mme_answer(case):
    assert mme.parse_answer(case["answer"]) == case["label"]
    assert mme.parse_answer(case["answer"].strip()) == case["label_after_strip"]


def test_mme_score():
    tasks = {}
    for task, rows in MME["mini_set"]["files"].items():
        tasks[task] = mme.task_score([r[2] for r in rows], [r[3] for r in rows])
    scores = mme.total_scores(tasks)
    assert scores.keys() == MME["mini_set"]["expected"].keys()
    for group, expected in MME["mini_set"]["expected"].items():
        assert scores[group]["tasks"] == close(expected["tasks"])
        assert scores[group]["total"] == close(expected["total"])


@pytest.mark.parametrize("case", **ids(VQA["normaliser_cases"], "in"))
def test_vqa_normaliser(case):
    assert vqav2.strip_punctuation(vqav2.clean(case["in"])) == case["after_punct"]
    assert vqav2.normalise(case["in"]) == case["out"]


@pytest.mark.parametrize("case", **ids(VQA["accuracy_cases"], "prediction"))
def test_vqa_accuracy(case):
    assert (len(set(case["answers"])) == 1) == case["answers_all_identical"]
    accuracy = 100 * vqav2.accuracy(case["prediction"], case["answers"])
    assert accuracy == pytest.approx(case["accuracy_percent"], abs=1e-6)  # recorded with 6 decimals


@pytest.mark.parametrize("case", **ids(MMMU["multi_choice_cases"], "response"))
def test_mmmu_choice(case):
    options = {c: case["index2ans"][c] for c in case["all_choices"]}
    assert mmmu.parse_choice(case["response"], options) == case["parsed"]
    assert (case["parsed"] is None) == case["random_fallback"]


@pytest.mark.parametrize("case", **ids(MMMU["open_cases"], "response", "gold"))
def test_mmmu_open(case):
    gold = case["gold"] if isinstance(case["gold"], list) else [case["gold"]]
    parsed = mmmu.parse_open(case["response"])
    assert sorted(parsed, key=repr) == sorted(case["parsed_sorted"], key=repr)
    assert mmmu.is_correct(case["response"], gold) == case["correct"]


@pytest.mark.parametrize("case", **ids(MMMU["normalize_str_cases"], "in"))
def test_mmmu_normalise(case):
    assert mmmu.normalise(case["in"]) == case["out"]


@pytest.mark.parametrize("case", **ids(CIDER["cases"], "id"))
def test_cider_d(case):
    result = flickr30k.cider_d(case["hyps"], case["refs"])
    assert result["cider_d"] == close(case["cider_d"])
    assert result["per_image"] == close(case["per_image"])


def recorded_tifa() -> list[tifa.TifaQuestion]:
    questions = []
    for record in TIFA["question_answers"]:
        fields = {name: record[name] for name in tifa.TifaQuestion.__dataclass_fields__}
        questions.append(tifa.TifaQuestion(**fields))
    return questions


def test_tifa():
    choices = {(id, question): c for id, question, c in TIFA["multiple_choice_predictions"]}
    questions = recorded_tifa()
    result = tifa.score(questions, [choices[q.id, q.question] for q in questions])
    assert result.keys() == TIFA["expected"].keys()
    for name, expected in TIFA["expected"].items():
        assert result[name] == close(expected), name


@pytest.mark.parametrize("case", **ids(GENEVAL["cases"], "id"))
def test_geneval(case):
    options = {**GENEVAL["defaults"], **case["options"]}
    position = options.pop("position_threshold")
    objects = geneval.kept_objects(case["detections"], case["metadata"]["tag"], **options)
    counts = {name: len(kept) for name, kept in objects.items()}
    assert counts == case["expected"]["kept_counts"]
    result = geneval.check_image(case["metadata"], objects, position)
    assert result["correct"] == case["expected"]["correct"]
    assert result["categories"] == case["expected"]["categories"]
    assert len(result["reasons"]) == len(result["categories"])


@pytest.mark.parametrize("tag, threshold", [("colors", 0.3), ("counting", 0.9)])
def test_geneval_scores_are_float32(tag, threshold):
    """A float32 score of the threshold is larger in float64, but not in float32."""
    equal = float(np.float32(threshold))
    above = float(np.nextafter(np.float32(threshold), np.float32(1)))
    for score, kept in ((equal, {}), (threshold, {}), (above, {"dog"})):
        detection = {"class": "dog", "score": score, "box": (0, 0, 9, 9)}
        assert geneval.kept_objects([detection], tag).keys() == set(kept)


def test_geneval_defaults():
    ours = {}
    for function in (geneval.kept_objects, geneval.check_image):
        for name, parameter in inspect.signature(function).parameters.items():
            if parameter.default is not parameter.empty:
                ours[name] = parameter.default
    assert ours == GENEVAL["defaults"]


def test_geneval_colors_that_are_needed():
    """Only the colours of the objects that `colored_objects` names can change a result."""
    for case in GENEVAL["cases"]:
        options = {n: v for n, v in case["options"].items() if n != "position_threshold"}
        objects = geneval.kept_objects(case["detections"], case["metadata"]["tag"], **options)
        needed = {id(o) for o in geneval.colored_objects(case["metadata"], objects)}
        bare = {}
        for name, kept in objects.items():
            bare[name] = [o if id(o) in needed else {**o, "color": "none"} for o in kept]
        without_others = geneval.check_image(case["metadata"], bare)
        assert without_others == geneval.check_image(case["metadata"], objects)


def test_geneval_summary():
    results = [(c["metadata"], c["expected"]["correct"]) for c in GENEVAL["cases"]]
    summary = geneval.summary(results)
    shares = {}
    for tag in {metadata["tag"] for metadata, _ in results}:
        shares[tag] = np.mean([correct for metadata, correct in results if metadata["tag"] == tag])
    assert summary["tags"] == close(shares)
    assert summary["overall"] == close(np.mean(list(shares.values())))
    assert summary["images"] == len(results)
    assert summary["correct_images"] == close(np.mean([correct for _, correct in results]))

    dog = {"tag": "position", "prompt": "dog"}
    cat = {"tag": "colors", "prompt": "cat"}
    assert geneval.summary([(dog, False), (dog, True), (dog, False), (cat, False)]) == {
        "overall": close(1 / 6),
        "tags": {"position": close(1 / 3), "colors": 0.0},
        "images": 4,
        "prompts": 2,
        "correct_images": 0.25,
        "correct_prompts": 0.5,
    }


def dpg_case(path, crops: int):
    """The recorded rows through a CSV file, and the answers by question number."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, DPG["csv_rows"][0])
        writer.writeheader()
        writer.writerows(DPG["csv_rows"])
    questions = dpg.read(path)
    answers = {}
    for item, given in DPG["answers"].items():
        asked = [q for q in questions if q.item == item]
        answers[item] = []
        for crop in given[:crops]:
            answers[item].append({q.number: crop[q.question.rstrip("?")] for q in asked})
    return questions, answers


DPG_RUNS = {}  # name: (crops, whether the first row is skipped)
for run_name in DPG:
    if "pic_num_" in run_name:
        crop_count = int(run_name.split("pic_num_")[1].split("_")[0])
        DPG_RUNS[run_name] = (crop_count, "not_skipped" not in run_name)


@pytest.mark.parametrize("name", DPG_RUNS)
def test_dpg(name, tmp_path):
    crops, skip = DPG_RUNS[name]
    expected = DPG[name]
    questions, answers = dpg_case(tmp_path / "dpg_bench.csv", crops)
    result = dpg.score(questions, answers, skip, last_crop_categories=True)
    assert result["dpg_score"] == close(expected["dpg_score"])
    assert result["L1"] == close(expected["L1"])
    assert result["L2"] == close(expected["L2"])
    failed = {item for item, image in expected["per_image"].items() if isinstance(image, str)}
    assert set(result["failed"]) == failed
    for item, image in result["per_image"].items():
        assert image["score"] == close(expected["per_image"][item]["score"])
        plain = expected["per_image"][item]["category_inputs_last_crop_before_zeroing"]
        assert image["last_crop"] == {int(n): v for n, v in plain.items()}
    assert len(result["per_image"]) + len(result["failed"]) == len(expected["per_image"])

    both = dpg.both_scores(questions, answers)
    if skip:
        assert both["official-bug-compatible"] == result
    else:  # only the categories differ from the correct numbers
        assert both["correct"]["dpg_score"] == result["dpg_score"]
        assert both["correct"]["per_image"] == result["per_image"]


def test_dpg_correct_categories():
    """Means over crops, after dependencies: the child counts in one of two crops."""
    questions = [
        dpg.DpgQuestion("i", 1, [], "entity - whole", "dog?"),
        dpg.DpgQuestion("i", 2, [1], "attribute - color", "red?"),
    ]
    answers = {"i": [{1: "yes", 2: "yes"}, {1: "no", 2: "yes"}]}
    result = dpg.both_scores(questions, answers)["correct"]
    assert result["L1"] == {"entity": 50.0, "attribute": 50.0}
    assert result["L2"] == {"entity - whole": 50.0, "attribute - color": 50.0}
    assert result["dpg_score"] == 50.0


def test_every_recorded_file_is_read():
    names = {"cider", "dpg", "geneval", "mme", "mmmu_parse", "pope", "tifa", "vqa_norm"}
    assert {p.name for p in CASES.glob("*.json")} == {f"{n}_cases.json" for n in names}


# ------------------------------------------------------------------------------ rules without cases


def test_pope_mean_and_no_positives():
    none = pope.score(["no", "no"], ["no", "no"])
    assert (none["precision"], none["recall"], none["f1"], none["accuracy"]) == (0, 0, 0, 1)
    half = pope.score(["yes", "no"], ["yes", "yes"])
    assert pope.mean_scores({"random": none, "popular": half}) == close(
        {"accuracy": 0.75, "precision": 0.25, "recall": 0.5, "f1": 1 / 3, "yes_ratio": 0.5}
    )


def test_vqa_first_32_periods():
    assert vqav2.strip_punctuation("a." * 40) == "a" * 32 + "a." * 8


def test_gqa():
    truth = [("yes", True), ("left", True), ("dog", True), ("no", False)]
    questions = [gqa.Question("q", "1", answer, balanced) for answer, balanced in truth]
    assert gqa.score(questions, ["Yes.", "left side", "DOG..", "yes"]) == close(200 / 3)


def mmmu_record(id="validation_Art_Theory_3", options=("x", "y"), answer="A", **more) -> dict:
    return {
        "id": id,
        "question": "<image 1> q?",
        "options": repr(list(options)),
        "answer": answer,
        "image_1": "1.png",
        "image_2": None,
        "question_type": "multiple-choice" if options else "open",
        **more,
    }


def save_lines(path, *records) -> Path:
    """A file of lines: JSON, or a text as it is."""
    texts = [r if isinstance(r, str) else json.dumps(r) for r in records]
    path.write_text("".join(text + "\n" for text in texts))
    return path


def save(path, value) -> Path:
    path.write_text(json.dumps(value))
    return path


def test_mmmu(tmp_path):
    path = save_lines(
        tmp_path / "val.jsonl",
        mmmu_record(),
        mmmu_record("validation_Math_1", (), "['24/7', '3.429']"),
        mmmu_record("validation_Math_2", "pqrstu", "F"),
        mmmu_record("test_Math_2", "pq", "?"),
    )
    questions = mmmu.read(path)
    assert questions[0].images == [str(tmp_path / "1.png")]
    assert questions[1].answer == ["24/7", "3.429"]
    assert mmmu.prompt(questions[0]) == (
        "<image 1> q?\n(A) x\n(B) y\n\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert mmmu.prompt(questions[1]) == (
        "<image 1> q?\nAnswer the question using a single word or phrase."
    )
    predicted = mmmu.predictions(questions, ["A", "it is 3.43", "F.", "?"])
    assert predicted[:3] == ["A", "it is 3.43", "F"]
    assert predicted[3] in "AB"
    assert mmmu.score(questions, predicted) == {
        "overall": 100.0,
        "subjects": {"Art_Theory": 100.0, "Math": 100.0},
    }
    guesses = mmmu.predictions(questions[2:3] * 50, [""] * 50)
    assert guesses == mmmu.predictions(questions[2:3] * 50, [""] * 50)
    assert len(set(guesses)) == 6
    assert mmmu.score(questions[3:], predicted[3:]) == {
        "answers": "none in DATA: predictions only"
    }


@pytest.mark.parametrize(
    "text, words",
    [
        ("A man isn't riding the dog's T-shirt, \"fast\" (really)!",
         "a man is n't riding the dog 's t-shirt fast -lrb- really -rrb-"),
        ("Two cats -- 3.5 or 1,000; can't. ", "two cats 3.5 or 1,000 ca n't"),
        ("red,white & blue...", "red white & blue"),
        ("The dog\u2019s toy and \u201ca ball\u201d isn\u2019t here\u2026 really",
         "the dog 's toy and a ball is n't here really"),
        ("At 10:30 a.m. St. Bernard (c) in the U.S. dog",
         "at 10:30 a.m. st. bernard -lrb- c -rrb- in the u.s. dog"),
        ("a man in the u.s.", "a man in the u.s."),
        ("a man on St.", "a man on st."),
        ("a no. 7 jersey, and no.", "a no. 7 jersey and no"),
        ("He cannot see the '90s kids' 10:30am R&B", "he can not see the '90s kids 10:30 am r&b"),
        ("a dog \u2013 here \u2014 there", "a dog here there"),
        ("\u00bd of 50% for $5 (#1!!)", "1/2 of 50 % for $ 5 -lrb- # 1 !! -rrb-"),
        ("Y'all went at 5 o'clock, Mr. Smith", "y' all went at 5 o'clock mr. smith"),
    ],
)
def test_ptb_words(text, words):
    """Recorded from pycocoevalcap's PTBTokenizer (Stanford CoreNLP 3.4.1)."""
    assert flickr30k.ptb_words(text) == words


def test_cider_needs_the_same_images():
    with pytest.raises(InputError, match="different images"):
        flickr30k.cider_d({"1": "a"}, {"2": ["a"]})


class ScriptedJudge:
    """Answers of a table (caption, question) -> answer, about files that name their caption."""

    def __init__(self, answers: dict):
        self.answers = answers
        self.asked = []

    def answer(self, picture: Image.Image, questions: list[Question]) -> list[str]:
        caption = "coco_1" if picture.getpixel((0, 0)) == (0, 0, 0) else "coco_2"
        self.asked += [(caption, q) for q in questions]
        return [self.answers[caption, q.question] for q in questions]


def test_tifa_run(tmp_path):
    record = {"id": "coco_1", "caption": "a dog", "question": "dog?", "choices": ["yes", "no"],
              "answer": "yes", "element_type": "animal"}
    records = [
        record,
        {**record, "id": "coco_2", "caption": "a red cat", "question": "cat?"},
        {**record, "question": "what color?", "choices": ["red", "blue"], "answer": "blue",
         "element_type": "color"},
    ]
    save(tmp_path / "tifa_v1.0_question_answers.json", records)
    judge = ScriptedJudge({
        ("coco_1", "dog?"): "yes",
        ("coco_1", "what color?"): "bluish",
        ("coco_2", "cat?"): "dunno",
    })
    drawn = []
    matched = []

    def draw(wanted: list[tuple]) -> None:
        for id, caption, files in wanted:
            drawn.append((id, caption))
            files[0].parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (2, 2), "black" if id == "coco_1" else "white").save(files[0])

    def match(answer: str, choices: list[str]) -> str:
        matched.append((answer, choices))
        return choices[1]

    out = tmp_path / "out"
    metrics = tifa.run(tmp_path, out, draw, judge, match)
    assert drawn == [("coco_1", "a dog"), ("coco_2", "a red cat")]
    assert sorted(p.name for p in (out / "images").iterdir()) == ["coco_1.png", "coco_2.png"]
    # what is a choice already is not matched
    assert matched == [("bluish", ["red", "blue"]), ("dunno", ["yes", "no"])]
    assert judge.asked == [
        ("coco_1", Question("dog?", ["yes", "no"], "yes", "animal")),
        ("coco_1", Question("what color?", ["red", "blue"], "blue", "color")),
        ("coco_2", Question("cat?", ["yes", "no"], "yes", "animal")),
    ]
    assert json.loads((out / "answers.json").read_text()) == [
        {"id": "coco_1", "question": "dog?", "answer": "yes", "choice": "yes"},
        {"id": "coco_1", "question": "what color?", "answer": "bluish", "choice": "blue"},
        {"id": "coco_2", "question": "cat?", "answer": "dunno", "choice": "no"},
    ]
    assert metrics == {
        "tifa_average": 0.5,
        "tifa_stdev": close(0.5**0.5),
        "accuracy_by_type": {"animal": 0.5, "color": 1.0},
    }


@pytest.mark.parametrize(
    "text, cleaned",
    [
        ("the dog\u2019s \u201cball\u201d\u2026", "the dog's \"ball\"\u2026"),
        ("Tom &amp;amp; \u02bcem ", "Tom & 'em"),
        ("\uff21\u3000\ufb01sh cafe\u0301", "A fish caf\u00e9"),
        ("a<b &rsquo;", "a<b \u2019"),
    ],
)
def test_clip_text(text, cleaned):
    """Recorded from basic_clean of openai/CLIP with ftfy 6.3.1."""
    assert clipscore.clip_text(text) == cleaned


def test_clipscore():
    assert clipscore.clip_score([0.3, -0.2, 0]).tolist() == close([0.75, 0, 0])
    assert clipscore.plain_cosine([0.3, -0.2]).tolist() == close([30, -20])


def test_fid_of_diagonal_covariances():
    """|Δmu|² + Σ (√a − √b)²."""
    ours = (np.zeros(3), np.diag([1.0, 4.0, 9.0]))
    theirs = (np.array([1.0, 0, 2.0]), np.diag([4.0, 4.0, 1.0]))
    assert fid.frechet_distance(ours, theirs) == close(5 + 1 + 0 + 4)


def test_fid_of_features():
    rng = np.random.default_rng(0)
    ours = fid.statistics(rng.normal(size=(40, 6)))
    theirs = fid.statistics(rng.normal(size=(50, 6)) @ rng.normal(size=(6, 6)))
    roots = np.sqrt(np.linalg.eigvals(ours[1] @ theirs[1]).real)  # the definition
    traces = np.trace(ours[1]) + np.trace(theirs[1]) - 2 * roots.sum()
    expected = ((ours[0] - theirs[0]) ** 2).sum() + traces
    assert fid.frechet_distance(ours, theirs) == pytest.approx(expected)
    assert fid.frechet_distance(theirs, ours) == pytest.approx(expected)
    assert fid.frechet_distance(ours, ours) == pytest.approx(0, abs=1e-8)
    few = fid.statistics(rng.normal(size=(3, 6)))  # fewer images than features
    assert fid.frechet_distance(few, few) == pytest.approx(0, abs=1e-6)
    with pytest.raises(InputError, match="different sizes"):
        fid.frechet_distance(ours, (np.zeros(2), np.eye(2)))


# ------------------------------------------------------------------------------ files in, files out

POPE_LINE = {
    "question_id": 1,
    "image": "COCO_val2014_000000310196.jpg",
    "text": "Is there a cat?",
    "label": "yes",
}
VQA_QUESTIONS = {
    "data_subtype": "val2014",
    "questions": [{"image_id": 42, "question": "What?", "question_id": 420}],
}
VQA_ANSWERS = {
    "annotations": [
        {
            "question_id": 420,
            "answer_type": "other",
            "question_type": "what",
            "answers": [{"answer": a, "answer_id": 1} for a in ["cat"] * 3 + ["dog"] * 7],
        }
    ]
}
GQA_QUESTIONS = {
    "7": {"question": "Left?", "imageId": "n1", "answer": "yes", "isBalanced": True, "semantic": []}
}
FLICKR = {
    "images": [
        {"filename": "1.jpg", "split": split, "sentences": [{"raw": split, "tokens": []}]}
        for split in ("train", "test")
    ]
}
TIFA_FILE = [
    {
        "id": "coco_1",
        "caption": "c",
        "question": "q?",
        "choices": ["yes", "no"],
        "answer": "yes",
        "element_type": "object",
        "element": "dog",
    }
]
GENEVAL_LINE = {
    "tag": "position",
    "include": [
        {"class": "cat", "count": 1},
        {"class": "dog", "count": 1, "position": ["right of", 0]},
    ],
    "prompt": "a photo of a dog right of a cat",
}
DPG_HEAD = (
    "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,"
    "question_natural_language"
)


@pytest.fixture
def pope_folder(tmp_path):
    for split in pope.SPLITS:
        second = {**POPE_LINE, "question_id": 2, "label": "no"}
        save_lines(tmp_path / f"coco_pope_{split}.json", POPE_LINE, second)
    return tmp_path


def test_pope_files(pope_folder):
    splits = pope.read(pope_folder)
    assert list(splits) == list(pope.SPLITS)
    assert splits["random"][0] == pope.Question(**POPE_LINE)
    file = pope_folder / "out" / "answers.jsonl"
    pope.write(file, splits["random"], ["Yes, é", "no\nno"])
    written = [json.loads(line) for line in file.read_text().splitlines()]
    assert [w["answer"] for w in written] == ["Yes, é", "no\nno"]
    assert written[1]["question_id"] == 2


@pytest.fixture
def mme_folder(tmp_path):
    """Every other task has images and texts side by side."""
    folder = tmp_path / "MME"
    for n, task in enumerate([*mme.TASKS["Perception"], *mme.TASKS["Cognition"]]):
        texts = folder / task / ("questions_answers_YN" if n % 2 else "")
        images = folder / task / ("images" if n % 2 else "")
        for home in (texts, images):
            home.mkdir(parents=True, exist_ok=True)
        for name, end in (("b", ".png"), ("a", ".jpg")):
            (images / f"{name}{end}").touch()
            text = f"{task} {name}? Please answer yes or no.\tYes\nNot?\tNo\n\n"
            (texts / f"{name}.txt").write_text(text)
    return folder


def test_mme_files(mme_folder, tmp_path):
    tasks = mme.read(mme_folder)
    assert len(tasks) == 14
    assert all(len(questions) == 4 for questions in tasks.values())
    assert tasks["OCR"][3].question == "Not?"
    assert tasks["existence"][0] == mme.Question(
        str(mme_folder / "existence/a.jpg"), "existence a? Please answer yes or no.", "Yes"
    )
    assert tasks["count"][2].image == str(mme_folder / "count/images/b.png")
    assert tasks["count"][3].label == "No"
    prompt = mme.prompt(tasks["count"][0])
    assert prompt == "count a?\nAnswer the question using a single word or phrase."
    two_spaces = mme.Question("", "Is it red?  Please answer yes or no.", "Yes")
    end = "\nAnswer the question using a single word or phrase."
    assert mme.prompt(two_spaces) == "Is it red?" + end

    answers = {task: ["Yes", "no", "yes\tor no", "Yes\nno"] for task in tasks}
    scores = {}
    for task, questions in tasks.items():
        scores[task] = mme.task_score([q.label for q in questions], answers[task])
    totals = mme.total_scores(scores)
    assert totals["Perception"]["total"] == close(1250)
    assert totals["Cognition"]["total"] == close(500)

    mme.write(tmp_path / "results", tasks, answers)
    lines = (tmp_path / "results" / "OCR.txt").read_text().splitlines()
    rows = [line.split("\t") for line in lines]
    assert rows[0] == ["a.jpg", "OCR a? Please answer yes or no.", "Yes", "Yes"]
    assert rows[3][3] == "Yes no"
    assert len(list((tmp_path / "results").iterdir())) == 14


def test_vqa_files(tmp_path):
    questions = save(tmp_path / "q.json", VQA_QUESTIONS)
    annotations = save(tmp_path / "a.json", VQA_ANSWERS)
    assert vqav2.read(questions)[0].answers == []
    records = vqav2.read(questions, annotations)
    assert records[0].image == "COCO_val2014_000000000042.jpg"
    assert records[0].answer_type == "other"
    assert vqav2.score(records, ["the cat"]) == close({"overall": 90, "other": 90})
    save(questions, {**VQA_QUESTIONS, "data_subtype": "test-dev2015"})
    assert vqav2.read(questions)[0].image == "COCO_test2015_000000000042.jpg"
    vqav2.write(tmp_path / "r.json", records, ["The cat."])
    written = json.loads((tmp_path / "r.json").read_text())
    assert written == [{"question_id": 420, "answer": "cat"}]


def test_vqa_annotations_of_the_questions_split(tmp_path):
    """The answers of other splits may stand beside them."""
    questions = save(tmp_path / "q.json", VQA_QUESTIONS)
    assert vqav2.read(questions, tmp_path)[0].answers == []
    others = changed(VQA_ANSWERS, "annotations", 0, "answers", [{"answer": "of train"}])
    save(tmp_path / "v2_mscoco_train2014_annotations.json", others)
    assert_error(lambda: vqav2.read(questions, tmp_path), "v2_mscoco_val2014_annotations.json",
                 "found 1: v2_mscoco_train2014_annotations.json")
    save(tmp_path / "v2_mscoco_val2014_annotations.json", VQA_ANSWERS)
    assert vqav2.read(questions, tmp_path)[0].answers == ["cat"] * 3 + ["dog"] * 7
    save(questions, {**VQA_QUESTIONS, "data_subtype": "test2015"})
    assert vqav2.read(questions, tmp_path)[0].answers == []


def test_several_question_files_are_named(tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        save_lines(tmp_path / name, mmmu_record())
    with pytest.raises(InputError, match=r"expected one file \*.jsonl, found 2: a.jsonl, b.jsonl"):
        mmmu.run(tmp_path, tmp_path, None)


def test_vqa_answers_are_normalised():
    """vqaEval.py itself normalises nothing where all people agree."""
    truths = ["yes", "yes", "black"]
    questions = [vqav2.Question(i, "", "", [t] * 10, "other") for i, t in enumerate(truths)]
    answers = ["Yes", "Yes", "Black."]
    assert vqav2.score(questions, answers) == {"overall": 100.0, "other": 100.0}
    assert vqav2.raw_score(questions, answers) == 0.0


def test_gqa_files(tmp_path):
    questions = gqa.read(save(tmp_path / "q.json", GQA_QUESTIONS))
    assert questions == [gqa.Question("Left?", "n1", "yes", True, "7")]
    gqa.write(tmp_path / "p.json", questions, ["Yes."])
    written = json.loads((tmp_path / "p.json").read_text())
    assert written == [{"questionId": "7", "prediction": "yes"}]


def test_mmmu_predictions_file(tmp_path):
    questions = mmmu.read(save_lines(tmp_path / "v.jsonl", mmmu_record()))
    mmmu.write(tmp_path / "p.json", questions, ["B"])
    assert json.loads((tmp_path / "p.json").read_text()) == {"validation_Art_Theory_3": "B"}


def test_flickr_and_tifa_files(tmp_path):
    assert flickr30k.read(save(tmp_path / "f.json", FLICKR)) == {"1.jpg": ["test"]}
    assert tifa.read(save(tmp_path / "t.json", TIFA_FILE))[0].element_type == "object"


def test_recorded_tifa_file(tmp_path):
    path = save(tmp_path / "t.json", TIFA["question_answers"])
    assert tifa.read(path) == recorded_tifa()


def test_geneval_files(tmp_path):
    assert geneval.read(save_lines(tmp_path / "m.jsonl", GENEVAL_LINE)) == [GENEVAL_LINE]
    names = save_lines(tmp_path / "object_names.txt", *(f"class {i}" for i in range(80)))
    assert geneval.read_object_names(names)[79] == "class 79"


def test_dpg_file(tmp_path):
    path = save_lines(
        tmp_path / "d.csv",
        DPG_HEAD,
        '7,"a, b",,1,0,entity,whole,entity - whole (dog),dog?',
        '7,x,,2,"1, 3",attribute,color,attribute - color (a),b?',
    )
    assert dpg.read(path) == [
        dpg.DpgQuestion("7", 1, [], "entity - whole", "dog?"),
        dpg.DpgQuestion("7", 2, [1, 3], "attribute - color", "b?"),
    ]


@pytest.mark.parametrize("size, left, top", [((9, 4), 2, 0), ((4, 9), 0, 2), ((5, 5), 0, 0)])
def test_fid_crops_before_it_resizes(size, left, top):
    values = np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    side = min(size)
    square = Image.fromarray(values[top : top + side, left : left + side])
    expected = np.asarray(square.resize((299, 299), Image.Resampling.BICUBIC)) / 127.5 - 1
    pixels = fid.inception_pixels(Image.fromarray(values))
    assert np.allclose(pixels.permute(1, 2, 0), expected, atol=1e-6)


def test_fid_statistics_file(tmp_path):
    np.savez(tmp_path / "s.npz", mu=np.zeros(3), sigma=np.eye(3))
    mu, sigma = fid.read_statistics(tmp_path / "s.npz")
    assert fid.frechet_distance((mu, sigma), (mu, 4 * sigma)) == close(3)


# -------------------------------------------------------------------------------------- wrong files

READERS = {  # name: (reader, what the message must say is expected)
    "pope": (pope.read, "coco_pope_random.json"),
    "mme": (mme.read, "MME_Benchmark_release_version"),
    "vqav2": (vqav2.read, "questions.json"),
    "gqa": (gqa.read, "testdev_balanced_questions.json"),
    "mmmu": (mmmu.read, "MMMU/MMMU"),
    "flickr30k": (flickr30k.read, "dataset_flickr30k.json"),
    "tifa": (tifa.read, "question_answers.json"),
    "geneval": (geneval.read, "evaluation_metadata.jsonl"),
    "dpg": (dpg.read, "dpg_bench.csv"),
    "object names": (geneval.read_object_names, "object_names.txt"),
    "fid": (fid.read_statistics, "MS-COCO_val2014_fid_stats.npz"),
}


@pytest.mark.parametrize("name", READERS)
def test_missing_file(name, tmp_path):
    read, expected = READERS[name]
    with pytest.raises(InputError) as error:
        read(tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in str(error.value)
    assert expected in str(error.value)


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize(
    "content",
    [b"", b"\n", b"{", b"[1]", b"{}", b'{"1": 2}', b"[[]]", b"null", b"\xff\xfe", b"a,b\n1,2"],
)
def test_file_of_something_else(name, content, tmp_path):
    """Never a traceback, whatever is in the file."""
    read, _ = READERS[name]
    path = tmp_path / "coco_pope_random.json"
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        read(tmp_path if name == "pope" else path)
    assert str(path) in str(error.value)


def without(record: dict, name: str) -> dict:
    return {k: v for k, v in record.items() if k != name}


def changed(value, *keys):
    """A copy of JSON data with the last of `keys` replacing what the others lead to."""
    copy = json.loads(json.dumps(value))
    at = copy
    for key in keys[:-2]:
        at = at[key]
    at[keys[-2]] = keys[-1]
    return copy


BROKEN = {  # name: (reader, content, what the message must say)
    "vqa field": (
        vqav2.read,
        changed(VQA_QUESTIONS, "questions", 0, "image_id", "4"),
        ["question 1", "'image_id'"],
    ),
    "vqa no subset": (
        vqav2.read, without(VQA_QUESTIONS, "data_subtype"), ["'data_subtype'", "missing"]
    ),
    "vqa twice": (
        vqav2.read,
        {**VQA_QUESTIONS, "questions": VQA_QUESTIONS["questions"] * 2},
        ["question 2", "'question_id'", "420 occurs twice"],
    ),
    "gqa field": (
        gqa.read, changed(GQA_QUESTIONS, "7", "isBalanced", "yes"), ["'7'", "'isBalanced'", "bool"]
    ),
    "gqa missing": (
        gqa.read, {"7": without(GQA_QUESTIONS["7"], "answer")}, ["'7'", "'answer'", "missing"]
    ),
    "flickr split": (
        flickr30k.read, {"images": FLICKR["images"][:1]}, ["no image of split 'test'"]
    ),
    "flickr field": (
        flickr30k.read, changed(FLICKR, "images", 1, "sentences", []), ["image 2", "'sentences'"]
    ),
    "tifa field": (
        tifa.read, changed(TIFA_FILE, 0, "choices", "yes"), ["record 1", "'choices'", "list"]
    ),
    "tifa no choices": (
        tifa.read, changed(TIFA_FILE, 0, "choices", []), ["record 1", "'choices'", "empty"]
    ),
    "tifa blank caption": (
        tifa.read, changed(TIFA_FILE, 0, "caption", " "), ["record 1", "'caption'", "empty"]
    ),
    "tifa two captions": (
        tifa.read, [TIFA_FILE[0], {**TIFA_FILE[0], "caption": "d"}], ["record 2", "'caption'"]
    ),
    "geneval tag": (
        geneval.read, {**GENEVAL_LINE, "tag": "colour"}, ["line 1", "'tag'", "'colour'"]
    ),
    "geneval count": (
        geneval.read, changed(GENEVAL_LINE, "include", 0, "count", "1"), ["'include'", "'count'"]
    ),
    "geneval target": (
        geneval.read, changed(GENEVAL_LINE, "include", 1, "position", ["above", 1]), ["'position'"]
    ),
    "geneval colour": (
        geneval.read, changed(GENEVAL_LINE, "include", 0, "color", "grey"), ["'color'", "'grey'"]
    ),
    "geneval no prompt": (
        geneval.read, without(GENEVAL_LINE, "prompt"), ["'prompt'", "missing"]
    ),
    "mmmu options": (mmmu.read, {**mmmu_record(), "options": "A"}, ["line 1", "'options'"]),
    "mmmu no options": (
        mmmu.read, {**mmmu_record(), "options": "[]"}, ["line 1", "'options'", "empty"]
    ),
    "mmmu type": (
        mmmu.read, {**mmmu_record(), "question_type": "mc"}, ["line 1", "'question_type'", "'mc'"]
    ),
    "mmmu image": (
        mmmu.read, {**mmmu_record(), "image_1": {"bytes": ""}}, ["line 1", "'image_1'", "str"]
    ),
    "mmmu letter": (mmmu.read, mmmu_record(answer="C"), ["line 1", "'answer'", "'C'", "option"]),
    "mmmu empty": (mmmu.read, mmmu_record(options=(), answer=" "), ["line 1", "'answer'", "empty"]),
    "mmmu empty list": (mmmu.read, mmmu_record(options=(), answer="[]"), ["line 1", "'answer'"]),
    "mmmu one empty": (
        mmmu.read, mmmu_record(options=(), answer="['3', '']"), ["line 1", "'answer'", "empty"]
    ),
    "mmmu twice": (
        mmmu.read, "\n".join([json.dumps(mmmu_record())] * 2), ["line 2", "'id'", "occurs twice"]
    ),
    "dpg columns": (dpg.read, "item_id,text\n1,x", ["line 2", "'proposition_id'", "missing"]),
    "dpg number": (
        dpg.read, f"{DPG_HEAD}\na,,,one,0,,,t,q?", ["line 2", "'proposition_id'", "'one'"]
    ),
    "dpg dependency": (
        dpg.read, f"{DPG_HEAD}\na,,,1,none,,,t,q?", ["line 2", "'dependency'", "'none'"]
    ),
    "dpg short row": (dpg.read, f"{DPG_HEAD}\na,,,1,0", ["line 2", "'tuple'"]),
    "names": (geneval.read_object_names, "person\nbicycle", ["80", "found 2"]),
}


def assert_error(read, *parts: str) -> None:
    """read() raises InputError, and its message has all these parts."""
    with pytest.raises(InputError) as error:
        read()
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize("name", BROKEN)
def test_broken_file(name, tmp_path):
    read, content, parts = BROKEN[name]
    path = tmp_path / "broken"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    assert_error(lambda: read(path), str(path), *parts)


@pytest.mark.parametrize(
    "line, parts",
    [
        (without(POPE_LINE, "text"), ["'text'", "missing"]),
        ({**POPE_LINE, "question_id": 2, "label": "Yes"}, ["'label'", "'Yes'"]),
        (POPE_LINE, ["'question_id'", "1 occurs twice"]),
        ("{", ["not valid JSON"]),
        ("[1]", ["object"]),
    ],
)
def test_broken_pope(line, parts, pope_folder):
    path = save_lines(pope_folder / "coco_pope_popular.json", POPE_LINE, line)
    assert_error(lambda: pope.read(pope_folder), f"{path}: line 2", *parts)


def test_broken_mme(mme_folder):
    def read():
        mme.read(mme_folder)

    text = mme_folder / "count/questions_answers_YN/a.txt"
    good = text.read_text()
    text.write_text("q?\tYes\n")
    assert_error(read, str(text), "two questions")
    text.write_text("q?\tYes\nq? No\n")
    assert_error(read, f"{text}: line 2", "<TAB>")
    text.write_text(good)
    (mme_folder / "count/images/a.jpg").unlink()
    assert_error(read, str(mme_folder / "count/images/a.jpg"), "image of")
    (mme_folder / "existence").rename(mme_folder / "elsewhere")
    assert_error(read, str(mme_folder / "existence"), "MME task 'existence'")


def test_broken_vqa_annotations(tmp_path):
    questions = save(tmp_path / "q.json", VQA_QUESTIONS)
    path = tmp_path / "a.json"
    for field, value, parts in [
        ("question_id", 421, ["question_id 420", str(questions)]),
        ("answers", ["cat"], ["annotation 1", "'answers'"]),
        ("answers", [], ["annotation 1", "'answers'"]),
    ]:
        save(path, changed(VQA_ANSWERS, "annotations", 0, field, value))
        assert_error(lambda: vqav2.read(questions, path), str(path), *parts)
    save(path, {"annotations": VQA_ANSWERS["annotations"] * 2})
    assert_error(lambda: vqav2.read(questions, path), "annotation 2", "420 occurs twice")
    with pytest.raises(InputError, match="need the annotations"):
        vqav2.score(vqav2.read(questions), ["cat"])
    with pytest.raises(InputError, match="annotations.json"):
        vqav2.read(questions, tmp_path / "nowhere.json")


def test_broken_fid_statistics(tmp_path):
    np.savez(tmp_path / "a.npz", mu=np.zeros(3))
    np.savez(tmp_path / "b.npz", mu=np.zeros(3), sigma=np.eye(2))
    for name, part in [("a", "sigma"), ("b", "do not fit")]:
        path = tmp_path / f"{name}.npz"
        assert_error(lambda path=path: fid.read_statistics(path), str(path), part)


def test_a_parent_that_is_not_there_fails_the_image():
    questions = [
        dpg.DpgQuestion("i", 2, [1], "entity", "q?"),
        dpg.DpgQuestion("j", 1, [], "entity", "q?"),
    ]
    result = dpg.score(questions, {"i": [{2: "yes"}], "j": [{1: "yes"}], "k": [{1: "yes"}]})
    assert result["failed"] == ["i", "k"]
    assert result["dpg_score"] == 100.0
    assert dpg.score(questions, {"i": [{2: "yes"}]})["dpg_score"] is None
