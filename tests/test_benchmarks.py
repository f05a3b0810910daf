"""Official scoring rules: every recorded case, then the readers and writers of official files, FID and CLIPScore."""

import csv
import inspect
import json
import os
from pathlib import Path

import numpy as np
import pytest

import benchmarks as b
from conftest import ROOT
from model import InputError

CASES = Path(os.environ.get("EVAL_CASES", ROOT / "tests" / "eval_cases"))


def recorded(name: str):
    return json.loads((CASES / f"{name}_cases.json").read_text(encoding="utf-8"))


CIDER, DPG, GENEVAL, MME = map(recorded, ("cider", "dpg", "geneval", "mme"))
MMMU, POPE, TIFA, VQA = map(recorded, ("mmmu_parse", "pope", "tifa", "vqa_norm"))


def ids(cases: list, *names: str) -> dict:
    """Parameters of a test with readable names."""
    shown = [f"{i} {' '.join(ascii(c[n])[:40] for n in names)}" for i, c in enumerate(cases)]
    return {"argvalues": cases, "ids": shown}


def close(value):
    return pytest.approx(value, rel=1e-9, abs=1e-9)


# ---------------------------------------------------------------------------------------------------- recorded cases


@pytest.mark.parametrize("case", **ids(POPE["answer_parse_cases"], "answer"))
def test_pope_answer(case):
    assert b.pope_answer(case["answer"]) == case["parsed"]


@pytest.mark.parametrize("case", **ids(POPE["metric_cases"], "id"))
def test_pope_score(case):
    score = b.pope_score(case["labels"], case["answers"])
    assert score == close({name: case[name] for name in score})
    assert set(case) == {*score, "id", "answers", "labels"}


@pytest.mark.parametrize("case", **ids(MME["parse_cases_input_is_lowercased_before_parse"], "answer"))
def test_mme_answer(case):
    assert b.mme_answer(case["answer"]) == case["label"]
    assert b.mme_answer(case["answer"].strip()) == case["label_after_strip"]


def test_mme_score():
    rows = MME["mini_set"]["files"]
    scores = b.mme_score({task: b.mme_task([r[2] for r in r4], [r[3] for r in r4]) for task, r4 in rows.items()})
    assert scores.keys() == MME["mini_set"]["expected"].keys()
    for group, expected in MME["mini_set"]["expected"].items():
        assert scores[group]["tasks"] == close(expected["tasks"]) and scores[group]["total"] == close(expected["total"])


@pytest.mark.parametrize("case", **ids(VQA["normaliser_cases"], "in"))
def test_vqa_normaliser(case):
    assert b.vqa_punctuation(b.vqa_clean(case["in"])) == case["after_punct"]
    assert b.vqa_normalise(case["in"]) == case["out"]


@pytest.mark.parametrize("case", **ids(VQA["accuracy_cases"], "prediction"))
def test_vqa_accuracy(case):
    assert (len(set(case["answers"])) == 1) == case["answers_all_identical"]
    accuracy = 100 * b.vqa_accuracy(case["prediction"], case["answers"])
    assert accuracy == pytest.approx(case["accuracy_percent"], abs=1e-6)  # recorded with 6 decimals


@pytest.mark.parametrize("case", **ids(MMMU["multi_choice_cases"], "response"))
def test_mmmu_choice(case):
    options = {c: case["index2ans"][c] for c in case["all_choices"]}
    assert b.mmmu_choice(case["response"], options) == case["parsed"]
    assert (case["parsed"] is None) == case["random_fallback"]


@pytest.mark.parametrize("case", **ids(MMMU["open_cases"], "response", "gold"))
def test_mmmu_open(case):
    gold = case["gold"] if isinstance(case["gold"], list) else [case["gold"]]
    assert sorted(b.mmmu_open(case["response"]), key=repr) == sorted(case["parsed_sorted"], key=repr)
    assert b.mmmu_right(case["response"], gold) == case["correct"]


@pytest.mark.parametrize("case", **ids(MMMU["normalize_str_cases"], "in"))
def test_mmmu_normalise(case):
    assert b.mmmu_normalise(case["in"]) == case["out"]


@pytest.mark.parametrize("case", **ids(CIDER["cases"], "id"))
def test_cider_d(case):
    result = b.cider_d(case["hyps"], case["refs"])
    assert result["cider_d"] == close(case["cider_d"]) and result["per_image"] == close(case["per_image"])


def test_tifa():
    said = {(id, question): answer for id, question, answer in TIFA["multiple_choice_predictions"]}
    fields = b.TifaQuestion.__dataclass_fields__
    questions = [b.TifaQuestion(**{f: q[f] for f in fields}) for q in TIFA["question_answers"]]
    result = b.tifa_score(questions, [said[q.id, q.question] for q in questions])
    assert result.keys() == TIFA["expected"].keys()
    for name, expected in TIFA["expected"].items():
        assert result[name] == close(expected), name


@pytest.mark.parametrize("case", **ids(GENEVAL["cases"], "id"))
def test_geneval(case):
    options = {**GENEVAL["defaults"], **case["options"]}
    position = options.pop("position_threshold")
    objects = b.geneval_objects(case["detections"], case["metadata"]["tag"], **options)
    assert {name: len(found) for name, found in objects.items()} == case["expected"]["kept_counts"]
    verdict = b.geneval_check(case["metadata"], objects, position)
    assert verdict["correct"] == case["expected"]["correct"]
    assert verdict["categories"] == case["expected"]["categories"]
    assert len(verdict["reasons"]) == len(verdict["categories"])


def test_geneval_defaults():
    ours = {name: p.default for f in (b.geneval_objects, b.geneval_check)
            for name, p in inspect.signature(f).parameters.items() if p.default is not p.empty}
    assert ours == GENEVAL["defaults"]


def test_geneval_colors_that_are_needed():
    """Without the colours of the objects that `geneval_colored` names, and only then, verdicts change."""
    for case in GENEVAL["cases"]:
        options = {name: v for name, v in case["options"].items() if name != "position_threshold"}
        objects = b.geneval_objects(case["detections"], case["metadata"]["tag"], **options)
        needed = b.geneval_colored(case["metadata"], objects)
        bare = {name: [o if any(o is n for n in needed) else {**o, "color": "none"} for o in found]
                for name, found in objects.items()}
        assert b.geneval_check(case["metadata"], bare) == b.geneval_check(case["metadata"], objects)


def test_geneval_summary():
    results = [(c["metadata"], c["expected"]["correct"]) for c in GENEVAL["cases"]]
    summary = b.geneval_summary(results)
    tags = {m["tag"] for m, _ in results}
    shares = {tag: np.mean([right for m, right in results if m["tag"] == tag]) for tag in tags}
    assert summary["tags"] == close(shares) and summary["overall"] == close(np.mean(list(shares.values())))
    assert summary["images"] == len(results) and summary["correct_images"] == close(np.mean([r for _, r in results]))
    dog, cat = {"tag": "position", "prompt": "dog"}, {"tag": "colors", "prompt": "cat"}
    assert b.geneval_summary([(dog, False), (dog, True), (dog, False), (cat, False)]) == {
        "overall": close(1 / 6), "tags": {"position": close(1 / 3), "colors": 0.0}, "images": 4, "prompts": 2,
        "correct_images": 0.25, "correct_prompts": 0.5}


def dpg_case(path, crops: int):
    """The recorded rows through a CSV file, and the answers by question number."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, DPG["csv_rows"][0])
        writer.writeheader()
        writer.writerows(DPG["csv_rows"])
    questions = b.read_dpg(path)
    answers = {item: [{q.number: crop[q.question.rstrip("?")] for q in questions if q.item == item}
                      for crop in given[:crops]] for item, given in DPG["answers"].items()}
    return questions, answers


DPG_RUNS = {name: (int(name.split("pic_num_")[1].split("_")[0]), "not_skipped" not in name)
            for name in DPG if "pic_num_" in name}


@pytest.mark.parametrize("name", DPG_RUNS)
def test_dpg(name, tmp_path):
    crops, skip = DPG_RUNS[name]
    questions, answers = dpg_case(tmp_path / "dpg_bench.csv", crops)
    result, expected = b.dpg_score(questions, answers, skip, last_crop_categories=True), DPG[name]
    assert result["dpg_score"] == close(expected["dpg_score"])
    assert result["L1"] == close(expected["L1"]) and result["L2"] == close(expected["L2"])
    assert set(result["failed"]) == {item for item, e in expected["per_image"].items() if isinstance(e, str)}
    for item, image in result["per_image"].items():
        assert image["score"] == close(expected["per_image"][item]["score"])
        plain = expected["per_image"][item]["category_inputs_last_crop_before_zeroing"]
        assert image["last_crop"] == {int(n): v for n, v in plain.items()}
    assert len(result["per_image"]) + len(result["failed"]) == len(expected["per_image"])
    if skip:
        assert b.dpg_scores(questions, answers)["official-bug-compatible"] == result
    else:  # only the categories differ from the correct numbers
        correct = b.dpg_scores(questions, answers)["correct"]
        assert (correct["dpg_score"], correct["per_image"]) == (result["dpg_score"], result["per_image"])


def test_dpg_correct_categories():
    """Means over crops, after dependencies: the child counts in one of two crops."""
    questions = [b.DpgQuestion("i", 1, [], "entity - whole", "dog?"),
                 b.DpgQuestion("i", 2, [1], "attribute - color", "red?")]
    result = b.dpg_scores(questions, {"i": [{1: "yes", 2: "yes"}, {1: "no", 2: "yes"}]})["correct"]
    assert result["L1"] == {"entity": 50.0, "attribute": 50.0}
    assert result["L2"] == {"entity - whole": 50.0, "attribute - color": 50.0} and result["dpg_score"] == 50.0


def test_every_recorded_file_is_read():
    names = {"cider", "dpg", "geneval", "mme", "mmmu_parse", "pope", "tifa", "vqa_norm"}
    assert {p.name for p in CASES.glob("*.json")} == {f"{n}_cases.json" for n in names}


# ------------------------------------------------------------------------------------------------- rules without cases


def test_pope_mean_and_no_positives():
    none = b.pope_score(["no", "no"], ["no", "no"])
    assert (none["precision"], none["recall"], none["f1"], none["accuracy"]) == (0, 0, 0, 1)
    assert b.pope_mean({"random": none, "popular": b.pope_score(["yes", "no"], ["yes", "yes"])}) == close(
        {"accuracy": 0.75, "precision": 0.25, "recall": 0.5, "f1": 1 / 3, "yes_ratio": 0.5})


def test_vqa_first_32_periods():
    assert b.vqa_punctuation("a." * 40) == "a" * 32 + "a." * 8


def test_gqa():
    asked = [b.GqaQuestion("q", "1", answer, balanced) for answer, balanced in
             [("yes", True), ("left", True), ("dog", True), ("no", False)]]
    assert b.gqa_score(asked, ["Yes.", "left side", "DOG..", "yes"]) == close(200 / 3)


def mmmu(id="validation_Art_Theory_3", options=("x", "y"), answer="A", **more) -> dict:
    kind = "multiple-choice" if options else "open"
    return {"id": id, "question": "<image 1> q?", "options": repr(list(options)), "answer": answer, "image_1": "1.png",
            "image_2": None, "question_type": kind, **more}


def lines(path, *records) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def test_mmmu(tmp_path):
    path = lines(tmp_path / "val.jsonl", mmmu(), mmmu("validation_Math_1", (), "['24/7', '3.429']"),
                 mmmu("validation_Math_2", "pqrstu", "F"), mmmu("test_Math_2", "pq", "?"))
    questions = b.read_mmmu(path)
    assert questions[0].images == [str(tmp_path / "1.png")] and questions[1].answer == ["24/7", "3.429"]
    assert b.mmmu_prompt(questions[0]) == ("<image 1> q?\n\n(A) x\n(B) y\n\n\nAnswer with the option's letter from the "
                                           "given choices directly.")
    assert b.mmmu_prompt(questions[1]) == "<image 1> q?\n\nAnswer the question using a single word or phrase."
    said = b.mmmu_predictions(questions, ["A", "it is 3.43", "F.", "?"])
    assert said[:3] == ["A", "it is 3.43", "F"] and said[3] in "AB"
    assert b.mmmu_score(questions, said) == {"overall": 100.0, "subjects": {"Art_Theory": 100.0, "Math": 100.0}}
    guesses = b.mmmu_predictions(questions[2:3] * 50, [""] * 50)
    assert guesses == b.mmmu_predictions(questions[2:3] * 50, [""] * 50) and len(set(guesses)) == 6
    with pytest.raises(InputError, match="no question has a public answer"):
        b.mmmu_score(questions[3:], said[3:])


@pytest.mark.parametrize("text, words", [
    ("A man isn't riding the dog's T-shirt, \"fast\" (really)!", "a man is n't riding the dog 's t-shirt fast really"),
    ("Two cats -- 3.5 or 1,000; can't. ", "two cats 3.5 or 1,000 ca n't"), ("red,white & blue...", "red white & blue")])
def test_ptb_words(text, words):
    assert b.ptb_words(text) == words


def test_cider_needs_the_same_images():
    with pytest.raises(InputError, match="different images"):
        b.cider_d({"1": "a"}, {"2": ["a"]})


def test_clipscore():
    assert b.clipscore([0.3, -0.2, 0]).tolist() == close([0.75, 0, 0])
    assert b.plain_cosine([0.3, -0.2]).tolist() == close([30, -20])


def test_fid_of_diagonal_covariances():
    """|Δmu|² + Σ (√a − √b)²."""
    a, c = np.array([1.0, 4.0, 9.0]), np.array([4.0, 4.0, 1.0])
    assert b.fid((np.zeros(3), np.diag(a)), (np.array([1.0, 0, 2.0]), np.diag(c))) == close(5 + 1 + 0 + 4)


def test_fid_of_features():
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(size=(40, 6)), rng.normal(size=(50, 6)) @ rng.normal(size=(6, 6))
    ours, theirs = b.fid_statistics(ours), b.fid_statistics(theirs)
    roots = np.sqrt(np.linalg.eigvals(ours[1] @ theirs[1]).real)  # the definition
    expected = ((ours[0] - theirs[0]) ** 2).sum() + np.trace(ours[1]) + np.trace(theirs[1]) - 2 * roots.sum()
    assert b.fid(ours, theirs) == pytest.approx(expected) and b.fid(theirs, ours) == pytest.approx(expected)
    assert b.fid(ours, ours) == pytest.approx(0, abs=1e-8)
    few = b.fid_statistics(rng.normal(size=(3, 6)))  # fewer images than features
    assert b.fid(few, few) == pytest.approx(0, abs=1e-6)
    with pytest.raises(InputError, match="different sizes"):
        b.fid(ours, (np.zeros(2), np.eye(2)))


# ------------------------------------------------------------------------------------------------- files in, files out

POPE_LINE = {"question_id": 1, "image": "COCO_val2014_000000310196.jpg", "text": "Is there a cat?", "label": "yes"}
VQA_QUESTIONS = {"data_subtype": "val2014", "questions": [{"image_id": 42, "question": "What?", "question_id": 420}]}
VQA_ANSWERS = {"annotations": [{"question_id": 420, "answer_type": "other", "question_type": "what",
                                "answers": [{"answer": a, "answer_id": 1} for a in ["cat"] * 3 + ["dog"] * 7]}]}
GQA_QUESTIONS = {"7": {"question": "Left?", "imageId": "n1", "answer": "yes", "isBalanced": True, "semantic": []}}
FLICKR = {"images": [{"filename": "1.jpg", "split": split, "sentences": [{"raw": split, "tokens": []}]}
                     for split in ("train", "test")]}
TIFA_FILE = [{"id": "coco_1", "caption": "c", "question": "q?", "choices": ["yes", "no"], "answer": "yes",
              "element_type": "object", "element": "dog"}]
GENEVAL_LINE = {"tag": "position", "include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1,
                "position": ["right of", 0]}], "prompt": "a photo of a dog right of a cat"}
DPG_HEAD = ("item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,"
            "question_natural_language")


@pytest.fixture
def pope(tmp_path):
    for split in b.POPE_SPLITS:
        lines(tmp_path / f"coco_pope_{split}.json", POPE_LINE, {**POPE_LINE, "question_id": 2, "label": "no"})
    return tmp_path


def test_pope_files(pope):
    splits = b.read_pope(pope)
    assert list(splits) == list(b.POPE_SPLITS) and splits["random"][0] == b.PopeQuestion(**POPE_LINE)
    b.write_pope(pope / "out" / "answers.jsonl", splits["random"], ["Yes, é", "no\nno"])
    written = [json.loads(line) for line in (pope / "out" / "answers.jsonl").read_text().splitlines()]
    assert [w["answer"] for w in written] == ["Yes, é", "no\nno"] and written[1]["question_id"] == 2


@pytest.fixture
def mme(tmp_path):
    folder = tmp_path / "MME"
    for n, task in enumerate(t for tasks in b.MME_TASKS.values() for t in tasks):
        texts, images = [folder / task / s for s in (("questions_answers_YN", "images") if n % 2 else ("", ""))]
        for home in (texts, images):
            home.mkdir(parents=True, exist_ok=True)
        for name, end in (("b", ".png"), ("a", ".jpg")):
            (images / f"{name}{end}").touch()
            (texts / f"{name}.txt").write_text(f"{task} {name}? Please answer yes or no.\tYes\nNot?\tNo\n\n")
    return folder


def test_mme_files(mme, tmp_path):
    tasks = b.read_mme(mme)
    assert len(tasks) == 14 and all(len(t) == 4 for t in tasks.values())
    assert tasks["OCR"][3].question == "Not?" and tasks["existence"][0] == b.MmeQuestion(
        str(mme / "existence/a.jpg"), "existence a? Please answer yes or no.", "Yes")
    assert tasks["count"][2].image == str(mme / "count/images/b.png") and tasks["count"][3].label == "No"
    assert b.mme_prompt(tasks["count"][0].question) == "count a?\nAnswer the question using a single word or phrase."
    answers = {task: ["Yes", "no", "yes\tor no", "Yes\nno"] for task in tasks}
    scores = b.mme_score({t: b.mme_task([q.label for q in qs], answers[t]) for t, qs in tasks.items()})
    assert scores["Perception"]["total"] == close(1250) and scores["Cognition"]["total"] == close(500)
    b.write_mme(tmp_path / "results", tasks, answers)
    rows = [line.split("\t") for line in (tmp_path / "results" / "OCR.txt").read_text().splitlines()]
    assert rows[0] == ["a.jpg", "OCR a? Please answer yes or no.", "Yes", "Yes"] and rows[3][3] == "Yes no"
    assert len(list((tmp_path / "results").iterdir())) == 14


def save(path, value) -> Path:
    path.write_text(json.dumps(value))
    return path


def test_vqa_files(tmp_path):
    questions, annotations = save(tmp_path / "q.json", VQA_QUESTIONS), save(tmp_path / "a.json", VQA_ANSWERS)
    assert b.read_vqa(questions)[0].answers == []
    records = b.read_vqa(questions, annotations)
    assert (records[0].image, records[0].answer_type) == ("COCO_val2014_000000000042.jpg", "other")
    assert b.vqa_score(records, ["the cat"]) == close({"overall": 90, "other": 90})
    save(questions, {**VQA_QUESTIONS, "data_subtype": "test-dev2015"})
    assert b.read_vqa(questions)[0].image == "COCO_test2015_000000000042.jpg"
    b.write_vqa(tmp_path / "r.json", records, ["the cat"])
    assert json.loads((tmp_path / "r.json").read_text()) == [{"question_id": 420, "answer": "the cat"}]


def test_gqa_files(tmp_path):
    questions = b.read_gqa(save(tmp_path / "q.json", GQA_QUESTIONS))
    assert questions == [b.GqaQuestion("Left?", "n1", "yes", True, "7")]
    b.write_gqa(tmp_path / "p.json", questions, ["Yes."])
    assert json.loads((tmp_path / "p.json").read_text()) == [{"questionId": "7", "prediction": "yes"}]


def test_mmmu_predictions_file(tmp_path):
    b.write_mmmu(tmp_path / "p.json", b.read_mmmu(lines(tmp_path / "v.jsonl", mmmu())), ["B"])
    assert json.loads((tmp_path / "p.json").read_text()) == {"validation_Art_Theory_3": "B"}


def test_flickr_and_tifa_files(tmp_path):
    assert b.read_flickr(save(tmp_path / "f.json", FLICKR)) == {"1.jpg": ["test"]}
    assert b.read_tifa(save(tmp_path / "t.json", TIFA_FILE))[0].element_type == "object"


def test_geneval_files(tmp_path):
    assert b.read_geneval(lines(tmp_path / "m.jsonl", GENEVAL_LINE)) == [GENEVAL_LINE]
    (tmp_path / "object_names.txt").write_text("\n".join(f"class {i}" for i in range(80)) + "\n")
    assert b.read_object_names(tmp_path / "object_names.txt")[79] == "class 79"


def test_dpg_file(tmp_path):
    rows = ['7,"a, b",,1,0,entity,whole,entity - whole (dog),dog?',
            '7,x,,2,"1, 3",attribute,color,attribute - color (a),b?']
    assert b.read_dpg(lines(tmp_path / "d.csv", DPG_HEAD, *rows)) == [
        b.DpgQuestion("7", 1, [], "entity - whole", "dog?"), b.DpgQuestion("7", 2, [1, 3], "attribute - color", "b?")]


def test_fid_statistics_file(tmp_path):
    np.savez(tmp_path / "s.npz", mu=np.zeros(3), sigma=np.eye(3))
    mu, sigma = b.read_fid_statistics(tmp_path / "s.npz")
    assert b.fid((mu, sigma), (mu, 4 * sigma)) == close(3)


# ---------------------------------------------------------------------------------------------------- wrong files

MISSING = {  # reader: what the message must say is expected
    b.read_pope: "coco_pope_random.json", b.read_mme: "MME_Benchmark_release_version", b.read_vqa: "questions.json",
    b.read_gqa: "testdev_balanced_questions.json", b.read_mmmu: "MMMU/MMMU", b.read_flickr: "dataset_flickr30k.json",
    b.read_tifa: "question_answers.json", b.read_geneval: "evaluation_metadata.jsonl", b.read_dpg: "dpg_bench.csv",
    b.read_object_names: "object_names.txt",
    b.read_fid_statistics: "MS-COCO_val2014_fid_stats.npz"}


@pytest.mark.parametrize("read", MISSING, ids=lambda read: read.__name__)
def test_missing_file(read, tmp_path):
    with pytest.raises(InputError) as error:
        read(tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in str(error.value) and MISSING[read] in str(error.value)


@pytest.mark.parametrize("read", MISSING, ids=lambda read: read.__name__)
@pytest.mark.parametrize("content", [b"", b"\n", b"{", b"[1]", b"{}", b'{"1": 2}', b"[[]]", b"null", b"\xff\xfe",
                                     b"a,b\n1,2"])
def test_file_of_something_else(read, content, tmp_path):
    """Never a traceback, whatever is in the file."""
    path = tmp_path / "coco_pope_random.json"
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        read(tmp_path if read is b.read_pope else path)
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
    "vqa field": (b.read_vqa, changed(VQA_QUESTIONS, "questions", 0, "image_id", "4"), ["question 1", "'image_id'"]),
    "vqa no subset": (b.read_vqa, without(VQA_QUESTIONS, "data_subtype"), ["'data_subtype'", "missing"]),
    "gqa field": (b.read_gqa, changed(GQA_QUESTIONS, "7", "isBalanced", "yes"), ["'7'", "'isBalanced'", "bool"]),
    "gqa missing": (b.read_gqa, {"7": without(GQA_QUESTIONS["7"], "answer")}, ["'7'", "'answer'", "missing"]),
    "flickr split": (b.read_flickr, {"images": FLICKR["images"][:1]}, ["no image of split 'test'"]),
    "flickr field": (b.read_flickr, changed(FLICKR, "images", 1, "sentences", []), ["image 2", "'sentences'"]),
    "tifa field": (b.read_tifa, changed(TIFA_FILE, 0, "choices", "yes"), ["record 1", "'choices'", "list"]),
    "geneval tag": (b.read_geneval, {**GENEVAL_LINE, "tag": "colour"}, ["line 1", "'tag'", "'colour'"]),
    "geneval count": (b.read_geneval, changed(GENEVAL_LINE, "include", 0, "count", "1"), ["'include'", "'count'"]),
    "geneval target": (b.read_geneval, changed(GENEVAL_LINE, "include", 1, "position", ["above", 1]), ["'position'"]),
    "geneval colour": (b.read_geneval, changed(GENEVAL_LINE, "include", 0, "color", "grey"), ["'color'", "'grey'"]),
    "geneval no prompt": (b.read_geneval, without(GENEVAL_LINE, "prompt"), ["'prompt'", "missing"]),
    "mmmu options": (b.read_mmmu, {**mmmu(), "options": "A"}, ["line 1", "'options'"]),
    "mmmu no options": (b.read_mmmu, {**mmmu(), "options": "[]"}, ["line 1", "'options'", "empty"]),
    "mmmu type": (b.read_mmmu, {**mmmu(), "question_type": "mc"}, ["line 1", "'question_type'", "'mc'"]),
    "mmmu image": (b.read_mmmu, {**mmmu(), "image_1": {"bytes": ""}}, ["line 1", "'image_1'", "str"]),
    "dpg columns": (b.read_dpg, "item_id,text\n1,x", ["line 2", "'proposition_id'", "missing"]),
    "dpg number": (b.read_dpg, f"{DPG_HEAD}\na,,,one,0,,,t,q?", ["line 2", "'proposition_id'", "'one'"]),
    "dpg dependency": (b.read_dpg, f"{DPG_HEAD}\na,,,1,none,,,t,q?", ["line 2", "'dependency'", "'none'"]),
    "dpg short row": (b.read_dpg, f"{DPG_HEAD}\na,,,1,0", ["line 2", "'tuple'"]),
    "names": (b.read_object_names, "person\nbicycle", ["80", "found 2"]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_file(name, tmp_path):
    read, content, parts = BROKEN[name]
    path = tmp_path / "broken"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InputError) as error:
        read(path)
    assert all(part in str(error.value) for part in [str(path), *parts]), str(error.value)


@pytest.mark.parametrize("line, parts", [
    (without(POPE_LINE, "text"), ["'text'", "missing"]), ({**POPE_LINE, "label": "Yes"}, ["'label'", "'Yes'"]),
    ("{", ["not valid JSON"]), ("[1]", ["object"])])
def test_broken_pope(line, parts, pope):
    path = lines(pope / "coco_pope_popular.json", POPE_LINE, line)
    with pytest.raises(InputError) as error:
        b.read_pope(pope)
    assert all(part in str(error.value) for part in [f"{path}: line 2", *parts]), str(error.value)


def test_broken_mme(mme):
    def error():
        with pytest.raises(InputError) as caught:
            b.read_mme(mme)
        return str(caught.value)

    text = mme / "count/questions_answers_YN/a.txt"
    good = text.read_text()
    text.write_text("q?\tYes\n")
    assert str(text) in error() and "two questions" in error()
    text.write_text("q?\tYes\nq? No\n")
    assert f"{text}: line 2" in error() and "<TAB>" in error()
    text.write_text(good)
    (mme / "count/images/a.jpg").unlink()
    assert str(mme / "count/images/a.jpg") in error() and "image of" in error()
    (mme / "existence").rename(mme / "elsewhere")
    assert str(mme / "existence") in error() and "MME task 'existence'" in error()


def test_broken_vqa_annotations(tmp_path):
    questions, path = save(tmp_path / "q.json", VQA_QUESTIONS), tmp_path / "a.json"
    for field, value, parts in [("question_id", 421, ["question_id 420", str(questions)]),
                                ("answers", ["cat"], ["annotation 1", "'answers'"]),
                                ("answers", [], ["annotation 1", "'answers'"])]:
        with pytest.raises(InputError) as error:
            b.read_vqa(questions, save(path, changed(VQA_ANSWERS, "annotations", 0, field, value)))
        assert all(part in str(error.value) for part in [str(path), *parts]), str(error.value)
    with pytest.raises(InputError, match="need the annotations"):
        b.vqa_score(b.read_vqa(questions), ["cat"])
    with pytest.raises(InputError, match="annotations.json"):
        b.read_vqa(questions, tmp_path / "nowhere.json")


def test_broken_fid_statistics(tmp_path):
    np.savez(tmp_path / "a.npz", mu=np.zeros(3))
    np.savez(tmp_path / "b.npz", mu=np.zeros(3), sigma=np.eye(2))
    for name, part in [("a", "sigma"), ("b", "do not fit")]:
        with pytest.raises(InputError, match=part) as error:
            b.read_fid_statistics(tmp_path / f"{name}.npz")
        assert str(tmp_path / f"{name}.npz") in str(error.value)


def test_a_parent_that_is_not_there_fails_the_image():
    questions = [b.DpgQuestion("i", 2, [1], "entity", "q?"), b.DpgQuestion("j", 1, [], "entity", "q?")]
    result = b.dpg_score(questions, {"i": [{2: "yes"}], "j": [{1: "yes"}], "k": [{1: "yes"}]})
    assert result["failed"] == ["i", "k"] and result["dpg_score"] == 100.0
    assert b.dpg_score(questions, {"i": [{2: "yes"}]})["dpg_score"] is None
