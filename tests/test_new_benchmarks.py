"""MMBench, SEED-Bench, PickScore, GenEval 2 and T2I-CompBench: readers, rules, runs.

Runs go from files in the official layouts to files, on tiny random models of the published classes.
"""

import base64
import csv
import io
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (BlipForQuestionAnswering, BlipProcessor, CLIPConfig,
                          CLIPImageProcessorPil, CLIPModel, CLIPProcessor,
                          LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast)

from evals import geneval2, mmbench, pickscore, seedbench, t2i_compbench
from evals.judges import ModelJudge, ModelNames
from evals.letters import letter_prompt, parse_letter
from evals.policy import asker, drawer
from hermesflow.files import InputError
from hermesflow.sampling import ImageSampling
from test_judges import TEMPLATE, save_blip, save_llava
from tiny import tiny_model

DIRECTLY = "Answer with the option's letter from the given choices directly."


@pytest.fixture(scope="module")
def policy():
    return tiny_model(seed=5)


def photo(path, seed: int, size=(90, 70)):
    path.parent.mkdir(parents=True, exist_ok=True)
    small = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(path, format="PNG")
    return path


def put_lines(path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))


def drawing(policy, out, name: str):
    return drawer(policy, out, 4, name, 0, ImageSampling(3, 1.5))


def undrawn(wanted) -> None:
    """A judge that cannot judge is noticed before anything is drawn."""
    raise AssertionError("drawn")


def scored_by(**names) -> ModelNames:
    return ModelNames(**{"detector": "", "clip": None, "vqa": "", **names})


def spoil(folder, kind, parameter: str) -> None:
    """One weight of a saved model becomes NaN."""
    model = kind.from_pretrained(folder)
    with torch.no_grad():
        model.get_parameter(parameter).view(-1)[0] = math.nan
    model.save_pretrained(folder)


# ------------------------------------------------------------------------------------------- policy


def test_blank_texts_are_not_drawn(policy, tmp_path):
    """Whatever the benchmark, and before anything else is drawn."""
    wanted = [("a", "a ring", [tmp_path / "a.png"]), ("b", " ", [tmp_path / "b.png"])]
    with pytest.raises(InputError, match="b.png: the text to draw here is empty .any, id 'b'"):
        drawing(policy, tmp_path / "out", "any")(wanted)
    assert not (tmp_path / "a.png").exists()


def test_missing_images_are_said_at_once(policy, tmp_path):
    there = photo(tmp_path / "0.png", 0)
    asked = [(there, "?"), (tmp_path / "1.png", "?"), (tmp_path / "1.png", "!")]
    message = "1.png: not found; expected here: an image of pope .1 of 2 are missing"
    with pytest.raises(InputError, match=message):
        asker(policy, tmp_path / "out", 2, "pope", 6)(asked)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------ letters

ANIMALS = {"A": "cat", "B": "dog"}
LETTERS = [
    ("A", "A"), ("B.", "B"), ("(B)", "B"), ("B: dog", "B"), ("The answer is A.", "A"),
    ("A, not B", None),  # two letters, and no text
    ("a dog", "B"),  # no letter; the text of one option
    ("a cat, a dog", None),  # of both
    ("C", None), ("", None), ("b", None),
    ("Z", None), ("Z dog", None),  # "none of them" comes before texts
    ("Cannot determine the answer: dog", None),
    # five words: the first one is not among the last four (0 > 5 - 5 is false), the second is
    ("A w x y z", None), ("w A x y z", "A"),
    # 12 characters are twice as long as all options, 13 are more
    ("xxxxxxxx dog", "B"), ("xxxxxxxxx dog", None),
]


@pytest.mark.parametrize("answer, letter", LETTERS)
def test_letters(answer, letter):
    assert parse_letter(answer, ANIMALS) == letter


def test_letter_prompt():
    assert letter_prompt("What is it?", ANIMALS) == f"What is it?\nA. cat\nB. dog\n{DIRECTLY}"


# ------------------------------------------------------------------------------------------ mmbench

COLUMNS = ("index question hint A B C D answer category image source l2-category comment "
           "split").split()


def base64_image(seed: int) -> str:
    pixels = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((80, 60), Image.Resampling.BICUBIC).save(file, format="JPEG")
    return base64.b64encode(file.getvalue()).decode()


def mmbench_rows() -> list[dict]:
    """Question 5 with its rotation, which names the first row's image; question 7 without any."""
    shared = dict(C="", D="", source="web", comment="", split="dev", hint="nan")
    return [
        dict(shared, index="5", question='Is it "big"?', A="ring", B="square", answer="B",
             category="shape", image=base64_image(0), **{"l2-category": "fine"}),
        dict(shared, index="7", question="Which?", hint="Look.", A="ring", B="square", C="cross",
             answer="B", category="object", image=base64_image(1), **{"l2-category": "fine"}),
        dict(shared, index="1000005", question='Is it "big"?', A="square", B="ring", answer="A",
             category="shape", image="5", **{"l2-category": "fine"}),
    ]


def put_mmbench(folder, rows=None, columns=COLUMNS) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "mmbench_dev_20230712.tsv", "w", newline="") as file:
        writer = csv.DictWriter(file, columns, delimiter="\t", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(mmbench_rows() if rows is None else rows)


def test_mmbench_reader(tmp_path):
    put_mmbench(tmp_path)
    limit = csv.field_size_limit()
    questions, images = mmbench.read(tmp_path / "mmbench_dev_20230712.tsv")
    assert csv.field_size_limit() == limit
    first, second, rotated = questions
    assert first.question == 'Is it "big"?' and first.options == {"A": "ring", "B": "square"}
    assert [q.image for q in questions] == [5, 7, 5] and images.keys() == {5, 7}
    assert images[5] == base64.b64decode(base64_image(0))
    assert [q.hint for q in questions] == ["", "Look.", ""]  # pandas reads "nan" as nothing
    assert mmbench.prompt(second) == (
        f"Look.\nWhich?\nA. ring\nB. square\nC. cross\n{DIRECTLY}")
    assert rotated.row["l2-category"] == "fine" and "image" not in rotated.row


def test_mmbench_images_that_occur_again_are_one(tmp_path):
    """Older files repeat the image in every row."""
    rows = mmbench_rows()
    rows[2]["image"] = rows[0]["image"]
    put_mmbench(tmp_path, rows)
    questions, images = mmbench.read(tmp_path / "mmbench_dev_20230712.tsv")
    assert [q.image for q in questions] == [5, 7, 5] and images.keys() == {5, 7}


def test_mmbench_long_fields(tmp_path):
    """Python's csv stops at 131,072 characters; images are longer."""
    noise = np.random.default_rng(0).integers(0, 255, (300, 300, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, format="PNG")
    rows = mmbench_rows()[:1]
    rows[0]["image"] = base64.b64encode(file.getvalue()).decode()
    assert len(rows[0]["image"]) > 131_072
    put_mmbench(tmp_path, rows)
    assert mmbench.read(tmp_path / "mmbench_dev_20230712.tsv")[1] == {5: file.getvalue()}


def test_mmbench_rotations(tmp_path):
    """Question 7 alone gets them: shifted by one and by two, with the answer's new letter."""
    put_mmbench(tmp_path)
    questions = mmbench.with_rotations(mmbench.read(tmp_path / "mmbench_dev_20230712.tsv")[0])
    assert [(q.index, "".join(text[0] for text in q.options.values()), q.answer)
            for q in questions] == [
        (5, "rs", "B"), (7, "rsc", "B"), (1000007, "scr", "A"), (2000007, "crs", "C"),
        (1000005, "sr", "A")]
    assert questions[2].row["A"] == "square" and questions[2].row["index"] == "1000007"
    assert questions[2].image == 7


def test_mmbench_score(tmp_path):
    """5 is right in one row of two, 7 in all three: 1 of 2 questions; first rows: 2 of 2."""
    put_mmbench(tmp_path)
    questions = mmbench.with_rotations(mmbench.read(tmp_path / "mmbench_dev_20230712.tsv")[0])
    questions[0].l2_category = "coarse"
    assert mmbench.score(questions, ["B", "B", "square", "The answer is C.", "B"]) == {
        "circular accuracy": 50.0, "one-pass accuracy": 100.0, "questions": 2,
        "l2-category": {"coarse": 0.0, "fine": 100.0},
        "category": {"object": 100.0, "shape": 0.0}}
    # what cannot be read is wrong
    assert mmbench.score(questions[:1], ["?"])["circular accuracy"] == 0.0


def test_mmbench_run(policy, tmp_path):
    data = tmp_path / "data"
    out = tmp_path / "out"
    put_mmbench(data)
    asked = []

    def ask(requests):
        asked.append(requests)
        return asker(policy, out, 2, "mmbench", 6)(requests)

    metrics = mmbench.run(data, out, ask)
    files = [(f.name, len(p.split("\n"))) for f, p in asked[0]]
    assert files == [("5.jpg", 4), ("7.jpg", 6), ("7.jpg", 6), ("7.jpg", 6), ("5.jpg", 4)]
    assert (out / "images" / "5.jpg").read_bytes() == base64.b64decode(base64_image(0))
    with open(out / "mmbench_predictions.tsv", newline="") as file:
        written = list(csv.DictReader(file, delimiter="\t"))
    answers = [row.pop("prediction") for row in written]
    assert len(set(answers)) > 1
    expected = mmbench_rows()[0]
    del expected["image"]
    assert written[0] == expected and list(written[0]) == [c for c in COLUMNS if c != "image"]
    questions = mmbench.with_rotations(mmbench.read(data / "mmbench_dev_20230712.tsv")[0])
    assert metrics == mmbench.score(questions, answers) and metrics["questions"] == 2


def test_mmbench_test_split(policy, tmp_path):
    """Without public answers: predictions, no scores."""
    put_mmbench(tmp_path / "data", columns=[c for c in COLUMNS if c != "answer"])
    out = tmp_path / "out"
    metrics = mmbench.run(tmp_path / "data", out, asker(policy, out, 2, "mmbench", 6))
    assert metrics == {"answers": "none in DATA: predictions only"}
    header = (out / "mmbench_predictions.tsv").read_text().split("\n")[0]
    assert "answer" not in header and header.endswith("\tprediction")


BROKEN_ROWS = [
    ({"image": "a" * 99}, "line 2: field 'image': not an image in base64"),
    ({"image": base64.b64encode(b"none" * 20).decode()}, "line 2: field 'image': not an image"),
    ({"image": "6"}, "index 5: field 'image': row 6 has none"),
    ({"image": "?"}, "line 2: field 'image' is '?'"),
    ({"answer": "C"}, "line 2: field 'answer' is 'C'"),
    ({"index": "x"}, "line 2: field 'index' is 'x'"),
    ({"index": "7"}, "line 3: field 'index': 7 occurs twice"),
    ({"index": "1000005"}, "line 4: field 'index': 1000005 occurs twice"),
    ({"answer": ""}, "index 5: field 'answer' is empty, and in other rows it is not"),
    ({"B": ""}, "line 2: fewer than two options .fields 'A', 'B', ….$"),
    ({"B": "None"}, "line 2: fewer than two options .*; 'None' counts as missing, as pandas"),
    ({"B": "NA", "C": "cross"}, "'answer' is 'B', which is no option; 'NA' counts as missing"),
]


@pytest.mark.parametrize("change, message", BROKEN_ROWS)
def test_mmbench_broken_rows(tmp_path, change, message):
    rows = mmbench_rows()
    rows[0] |= change
    put_mmbench(tmp_path, rows)
    with pytest.raises(InputError, match=message) as error:
        mmbench.read(tmp_path / "mmbench_dev_20230712.tsv")
    assert "mmbench_dev_20230712.tsv" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text, message", [
    ("", "no rows"),
    ("index\tquestion\n", "no rows"),
    ("index\tquestion\n\n\n", "no rows"),
    ("question\n?\n", "line 2: field 'index' is missing"),
    ("index\n5\t6\n", "line 2: more fields"),
    ("index\timage\n5\n", "line 2: field 'image' should be str"),
])
def test_mmbench_broken_files(tmp_path, text, message):
    (tmp_path / "a.tsv").write_text(text)
    with pytest.raises(InputError, match=f"a.tsv.*{message}"):
        mmbench.read(tmp_path / "a.tsv")


def test_mmbench_image_names(tmp_path):
    """Images go below OUT/images and are written again if they are damaged."""
    files = {5: tmp_path / "images" / "5.jpg"}
    mmbench.write_images({5: b"abc"}, files)
    files[5].write_bytes(b"a")
    mmbench.write_images({5: b"abc"}, files)
    assert files[5].read_bytes() == b"abc" and "images" in mmbench.WRITES


# ---------------------------------------------------------------------------------------- seedbench

SEED = {
    "questions": [
        dict(question_id="101669", question="How many?", choice_a="One", choice_b="Two",
             choice_c="Three", choice_d="Four", answer="A", data_id="1454426_2591111986",
             data_type="image", question_type_id=5),
        dict(question_id="v1738", question="Which action?", choice_a="a", choice_b="b",
             choice_c="c", choice_d="d", answer="B", data_id="94328.webm", data_type="video",
             question_type_id=10),
        dict(question_id="2", question="Where?", choice_a="left", choice_b="right",
             choice_c="above", choice_d="below", answer="D", data_id="7_8", data_type="image",
             question_type_id=6),
    ],
    "question_type": {"Instances Counting": 5, "Spatial Relation": 6, "Action Recognition": 10},
}


def put_seed(folder, value=SEED):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "SEED-Bench.json").write_text(json.dumps(value))
    return folder / "SEED-Bench.json"


def test_seedbench_reader_and_score(tmp_path):
    questions = seedbench.read(put_seed(tmp_path))
    assert [(q.question_id, q.dimension) for q in questions] == [
        ("101669", "Instances Counting"), ("2", "Spatial Relation")]
    assert seedbench.prompt(questions[0]) == (
        f"How many?\nA. One\nB. Two\nC. Three\nD. Four\n{DIRECTLY}")
    # "A." is read as A, but is not the letter alone; "left" is A and wrong: 1 of 2, 0 of 2
    assert seedbench.score(questions, ["A.", "left"]) == {
        "accuracy (letter read by VLMEvalKit's rule)": 50.0,
        "accuracy (answer is the letter, LLaVA's rule)": 0.0,
        "dimensions": {"Instances Counting": 100.0, "Spatial Relation": 0.0}}
    assert seedbench.score(questions, ["A", "D"])[
        "accuracy (answer is the letter, LLaVA's rule)"] == 100.0


def test_seedbench_run(policy, tmp_path):
    data = tmp_path / "data"
    out = tmp_path / "out"
    questions = seedbench.read(put_seed(data))
    for n, q in enumerate(questions):
        photo(data / "SEED-Bench-image" / q.data_id, n)  # without a suffix, as published
    answers = []

    def ask(requests):
        answers.extend(asker(policy, out, 2, "seedbench", 6)(requests))
        return answers

    metrics = seedbench.run(data, out, ask)
    assert metrics == seedbench.score(questions, answers) and len(answers) == 2
    lines = [json.loads(line) for line in (out / "results.json").read_text().splitlines()]
    assert lines == [
        dict(q_id=q.question_id, prediction=parse_letter(a, q.options) or "", gt=q.answer,
             q_type_id=q.question_type_id) for q, a in zip(questions, answers)]


@pytest.mark.parametrize("change, message", [
    ({"answer": "E"}, "question 1: field 'answer' is 'E'"),
    ({"answer": "AB"}, "question 1: field 'answer' is 'AB'"),
    ({"choice_b": 2}, "question 1: field 'choice_b' should be str, found 2"),
    ({"data_type": "audio"}, "question 1: field 'data_type' is 'audio'"),
    ({"question_type_id": 9}, "question 1: field 'question_type_id': 9 has no name"),
])
def test_seedbench_broken_questions(tmp_path, change, message):
    questions = [SEED["questions"][0] | change]
    with pytest.raises(InputError, match=f"SEED-Bench.json: {message}"):
        seedbench.read(put_seed(tmp_path, {**SEED, "questions": questions}))


@pytest.mark.parametrize("change, message", [
    ({"question_type": {"a": [1]}}, r"field 'question_type': field 'a' should be int, found \[1\]"),
    ({"questions": SEED["questions"][:1] * 2},
     "question 2: field 'question_id': '101669' occurs twice"),
])
def test_seedbench_broken_files(tmp_path, change, message):
    with pytest.raises(InputError, match=f"SEED-Bench.json: {message}"):
        seedbench.read(put_seed(tmp_path, SEED | change))


def test_seedbench_without_images(tmp_path):
    videos = {**SEED, "questions": SEED["questions"][1:2]}
    with pytest.raises(InputError, match="no questions about images"):
        seedbench.read(put_seed(tmp_path, videos))


# ---------------------------------------------------------------------------------------- pickscore

RECORDS = [dict(id="a", image="", caption="a big ring"),
           dict(id="b", image="", caption="no", prompt="a red square " * 60),
           dict(id="c", image="", caption="a blue square")]
CLIP_WORDS = "<unk> <s> . </s> a big ring square red blue".split()


def save_clip(folder) -> None:
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(CLIP_WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 3)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>",
                                        unk_token="<unk>", pad_token="</s>", model_max_length=77)
    pixels = CLIPImageProcessorPil(size={"shortest_edge": 28},
                                   crop_size={"height": 28, "width": 28})
    CLIPProcessor(image_processor=pixels, tokenizer=tokenizer).save_pretrained(folder)
    torch.manual_seed(2)
    small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    text = dict(vocab_size=len(CLIP_WORDS), bos_token_id=1, eos_token_id=3, pad_token_id=3, **small)
    vision = dict(image_size=28, patch_size=14, **small)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8 if p.ndim >= 2 else 1)
        model.logit_scale.fill_(math.log(100))  # as in PickScore_v1
    model.save_pretrained(folder)


@pytest.fixture
def clip(tmp_path):
    save_clip(tmp_path / "clip")
    return tmp_path / "clip"


def test_pick_score():
    """100 · 0.21 = 21, the size of published scores."""
    score = pickscore.pick_score(torch.tensor(0.21), torch.tensor(math.log(100)))
    assert score.item() == pytest.approx(21)


def test_pickscore_run(policy, clip, tmp_path):
    data = tmp_path / "records.jsonl"
    out = tmp_path / "out"
    put_lines(data, RECORDS)
    there = photo(out / "images" / "c.png", 1)  # drawn by another model
    before = there.read_bytes()
    metrics = pickscore.run(data, out, drawing(policy, out, "pickscore"), "cpu",
                            scored_by(clip=str(clip)))
    assert there.read_bytes() == before
    model = CLIPModel.from_pretrained(clip).eval()
    processor = CLIPProcessor.from_pretrained(clip)
    expected = {}
    for record in RECORDS:
        text = record.get("prompt", record["caption"])
        picture = Image.open(out / "images" / f"{record['id']}.png").convert("RGB")
        inputs = processor(text=text, images=picture, truncation=True, return_tensors="pt")
        with torch.no_grad():
            expected[record["id"]] = model(**inputs).logits_per_image.item()
    scores = json.loads((out / "pickscores.json").read_text())
    assert scores == pytest.approx(expected, abs=1e-3) and len(set(scores.values())) == 3
    assert metrics == {"PickScore": pytest.approx(sum(scores.values()) / 3), "images": 3}


def test_pickscore_takes_the_official_processor(clip, tmp_path, monkeypatch):
    """PickScore_v1 has none of its own."""
    bare = tmp_path / "bare"
    CLIPModel.from_pretrained(clip).save_pretrained(bare)
    monkeypatch.setattr(pickscore, "PROCESSOR", str(clip))
    picture = Image.new("RGB", (40, 40), "red")
    scores = [pickscore.PickScore(str(m), "cpu").score(picture, "a red ring") for m in (bare, clip)]
    assert scores[0] == scores[1]


def test_pickscore_needs_clip(tmp_path):
    save_blip(tmp_path / "blip")
    put_lines(tmp_path / "records.jsonl", RECORDS)
    with pytest.raises(InputError, match="blip: cannot load as CLIPModel"):
        pickscore.run(tmp_path / "records.jsonl", tmp_path / "out", undrawn, "cpu",
                      scored_by(clip=str(tmp_path / "blip")))


def test_pickscore_nan(policy, clip, tmp_path):
    spoil(clip, CLIPModel, "text_projection.weight")
    put_lines(tmp_path / "records.jsonl", RECORDS[:1])
    out = tmp_path / "out"
    with pytest.raises(InputError, match="id 'a': .*clip: its outputs are NaN"):
        pickscore.run(tmp_path / "records.jsonl", out, drawing(policy, out, "pickscore"), "cpu",
                      scored_by(clip=str(clip)))


# ----------------------------------------------------------------------------------------- geneval2

GENEVAL2 = [
    dict(prompt="two red rings", atom_count=3,
         vqa_list=[["How many rings are in the image?", "two"], ["Are the rings red?", "Yes"],
                   ["Are there any rings in the image?", "Yes"]],
         skills=["count", "attribute", "object"]),
    dict(prompt="a ring behind a blue ring", atom_count=4,
         vqa_list=[["Is the ring behind the ring?", "Yes"]], skills=["position"]),
    dict(prompt="a ring", atom_count=3, vqa_list=[["Are there any rings in the image?", "Yes"]],
         skills=["object"]),
]


def put_geneval2(folder, records=GENEVAL2):
    folder.mkdir(parents=True, exist_ok=True)
    put_lines(folder / "geneval2_data.jsonl", records)
    return folder / "geneval2_data.jsonl"


def test_geneval2_accepted_answers():
    """As evaluation.py has them: a number in words and digits; else yes, whatever the answer is."""
    assert geneval2.accepted("How many rings are in the image?", "seven") == [
        "seven", "Seven", " seven", " Seven", "7", " 7"]
    assert geneval2.accepted("How many rings?", "ten")[4:] == ["10", " 10"]
    assert geneval2.accepted("How many rings?", "zero")[4:] == ["other", " other"]
    assert geneval2.accepted("Is it red?", "No") == ["Yes", "yes", " yes", " Yes"]
    assert geneval2.question_text("Is it red?") == "Is it red? Answer in one word."


def test_geneval2_score(tmp_path):
    """AM: (.5 + .25 + 0)/3 = .25; GM: (∛(1·.25·.25) = .39685, .25, 0)/3 = .215617.

    Skills: count 1, attribute .25, object (.25 + 0)/2, position .25; atoms: 3 has .39685 and 0.
    """
    prompts = geneval2.read(put_geneval2(tmp_path))
    scores = geneval2.score(prompts, [[1.0, 0.25, 0.25], [0.25], [0.0]])
    assert scores.pop("Soft-TIFA AM") == pytest.approx(25)
    assert scores.pop("Soft-TIFA GM") == pytest.approx(21.5617, abs=1e-4)
    assert scores == {
        "skills (AM)": {"object": 12.5, "attribute": 25.0, "count": 100.0, "position": 25.0},
        "atoms (GM)": {"3": pytest.approx(19.8425, abs=1e-4), "4": pytest.approx(25)}}


@pytest.fixture
def llava(tmp_path):
    save_llava(tmp_path / "llava", TEMPLATE)
    return tmp_path / "llava"


def test_geneval2_probabilities(llava, monkeypatch):
    """By one forward pass; each token counts once, though two answers begin with it."""
    picture = Image.new("RGB", (40, 40), "red")
    model = LlavaForConditionalGeneration.from_pretrained(llava).eval()
    processor = LlavaProcessor.from_pretrained(llava)
    text = "<s> user : <image> how many? Answer in one word. assistant :"
    inputs = processor(text=text, images=picture, return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        probabilities = model(**inputs).logits[0, -1].softmax(-1)
    tokens = processor.tokenizer.convert_tokens_to_ids(["two", "<unk>"])
    judge = ModelJudge(str(llava), None, "cpu")
    # a longer question beside it changes nothing
    monkeypatch.setattr(geneval2, "accepted", lambda question, answer: ["two", " two", "2", "Two"])
    asked = [("how many?", "two"), ("how many red red red?", "two")]
    value, _ = geneval2.probabilities(judge, picture, asked)
    assert value == pytest.approx(probabilities[tokens].sum().item(), rel=1e-4)


def test_geneval2_run(policy, llava, tmp_path):
    data = tmp_path / "data"
    out = tmp_path / "out"
    prompts = geneval2.read(put_geneval2(data))
    metrics = geneval2.run(data, out, drawing(policy, out, "geneval2"), "cpu",
                           scored_by(vqa=str(llava)))
    files = [out / "images" / f"0000{i}.png" for i in range(3)]
    assert json.loads((out / "image_paths.json").read_text()) == {
        p.prompt: str(f) for p, f in zip(prompts, files)}
    scores = json.loads((out / "score_lists.json").read_text())
    judge = ModelJudge(str(llava), None, "cpu")
    picture = Image.open(files[0]).convert("RGB")
    alone = geneval2.probabilities(judge, picture, [prompts[0].vqa_list[1]])
    assert scores[0][1] == pytest.approx(alone[0], rel=1e-4)
    assert [len(own) for own in scores] == [3, 1, 1]
    assert metrics == {"judge": str(llava), **geneval2.score(prompts, scores)}


def test_geneval2_nan(policy, llava, tmp_path):
    spoil(llava, LlavaForConditionalGeneration, "lm_head.weight")
    out = tmp_path / "out"
    put_geneval2(tmp_path / "data")
    with pytest.raises(InputError, match="00000.png: .*llava: its outputs are NaN"):
        geneval2.run(tmp_path / "data", out, drawing(policy, out, "geneval2"), "cpu",
                     scored_by(vqa=str(llava)))


def test_geneval2_needs_a_chat_model(tmp_path):
    save_blip(tmp_path / "blip")
    put_geneval2(tmp_path / "data", GENEVAL2[2:])
    with pytest.raises(InputError, match="blip: GenEval 2 needs an image-text-to-text model"):
        geneval2.run(tmp_path / "data", tmp_path / "out", undrawn, "cpu",
                     scored_by(vqa=str(tmp_path / "blip")))


@pytest.mark.parametrize("change, message", [
    ({"skills": ["object", "object"]}, "field 'skills' has 2 entries for 1 questions"),
    ({"skills": ["colour"]}, "field 'skills': .'colour'. is none of object"),
    ({"vqa_list": [["only a question"]]}, "field 'vqa_list' should be pairs"),
    ({"vqa_list": []}, "field 'vqa_list' should be pairs"),
    ({"vqa_list": [["How many rings?", ""]]}, "field 'vqa_list': a question or an answer is empty"),
    ({"prompt": "  "}, "field 'prompt' is empty"),
    ({"atom_count": "3"}, "field 'atom_count' should be int"),
])
def test_geneval2_broken_lines(tmp_path, change, message):
    records = [GENEVAL2[0], GENEVAL2[2] | change]
    with pytest.raises(InputError, match=f"geneval2_data.jsonl: line 2: {message}"):
        geneval2.read(put_geneval2(tmp_path, records))


# ------------------------------------------------------------------------------------ t2i_compbench

# as spaCy's noun chunks, but for the third
PHRASES = [
    ("a green bench and a blue bowl", ["a green bench", "a blue bowl"]),
    ("rubber sole shoes and fluffy clouds", ["rubber sole shoes", "fluffy clouds"]),
    ("a red apple and yellow bananas", ["a red apple", "yellow bananas"]),
    ("a stop sign and red white line", ["a stop sign", "red white line"]),
    ("an oval sink and a rectangular mirror.", ["an oval sink", "a rectangular mirror"]),
    ("a cubic Rubik's cube and a pentagonal game box",
     ["a cubic Rubik's cube", "a pentagonal game box"]),
    ("a cubic book and a cylindrical can of soup", ["a cubic book", "a cylindrical can", "soup"]),
    ("a triangular slice of pizza and a pentagonal pizza box",
     ["a triangular slice", "pizza", "a pentagonal pizza box"]),
    # sentences
    ("The cylindrical tower and the spherical dome stood tall against the skyline.", None),
    ("A red carpet in a bathroom with white fixtures.", None),
    ("two white sheep, a black goat and a white goat in a field", None),
    ("a black gold and white vase sitting on a counter", None),
    ("a white bathroom with a black and white shower curtain", None),
    (".", None), ("a ring", None),
]


@pytest.mark.parametrize("prompt, phrases", PHRASES)
def test_noun_phrases(prompt, phrases):
    assert t2i_compbench.noun_phrases(prompt) == phrases


def test_t2i_questions():
    """data/utils.py: lower case; . ! " ( ) * # : ; ~ go; spaces at the end go; 50 words stay."""
    assert t2i_compbench.clean_question('The "Big" red-ring (1)?') == "the big red-ring 1?"
    assert t2i_compbench.clean_question("a" + " b" * 60) == "a" + " b" * 49
    assert t2i_compbench.clean_question("11:44. ") == "1144"


@pytest.mark.parametrize("probabilities, score", [
    ([0.71104, 0.5], "0.3555"),  # 0.7110 · 0.5
    ([0.00004, 1.0], "0.0000"),  # rounded before the product
    ([0.5, 0.5, 0.5], "0.1250"),
    ([], "1.0000"),
])
def test_t2i_image_score(probabilities, score):
    assert t2i_compbench.image_score(probabilities) == score


def blip_yes(folder, picture, question: str) -> float:
    """By direct calls: [ENC] first, the decoder's first token after [DEC], yes against no."""
    model = BlipForQuestionAnswering.from_pretrained(folder).eval()
    processor = BlipProcessor.from_pretrained(folder)
    inputs = processor(images=picture, text=question, return_tensors="pt")
    ids = torch.cat([torch.tensor([[5]]), inputs["input_ids"][:, 1:]], 1)
    yes, no = processor.tokenizer.convert_tokens_to_ids(["yes", "no"])
    with torch.no_grad():
        image = model.vision_model(inputs["pixel_values"])[0]
        asked = model.text_encoder(ids, encoder_hidden_states=image)[0]
        logits = model.text_decoder(torch.tensor([[4]]), encoder_hidden_states=asked).logits
    p = logits[0, 0].double().softmax(-1)
    return (p[yes] / (p[yes] + p[no])).item()


@pytest.fixture
def blip(tmp_path):
    """Its answers differ: weights are larger than random ones."""
    folder = tmp_path / "blip"
    save_blip(folder)
    model = BlipForQuestionAnswering.from_pretrained(folder)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(20 if p.ndim >= 2 else 1)
    model.save_pretrained(folder)
    return folder


TWO_COLORS = ("red?", "blue?")


def t2i_run(policy, data, out, blip):
    draw = drawing(policy, out, "t2i_compbench") if policy else undrawn
    return t2i_compbench.run(data, out, draw, "cpu", scored_by(vqa=str(blip)))


def test_t2i_run(policy, blip, tmp_path, monkeypatch):
    """Two images a prompt; the sentence is drawn and left out."""
    monkeypatch.setattr(t2i_compbench, "IMAGES", 2)
    data = tmp_path / "data"
    data.mkdir()
    (data / "color_val.txt").write_text("what color and two red\nA red one in two.\nred and blue.")
    out = tmp_path / "out"
    metrics = t2i_run(policy, data, out, blip)
    names = ["A red one in two._000002.png", "A red one in two._000003.png",
             "red and blue._000004.png", "red and blue._000005.png",
             "what color and two red_000000.png", "what color and two red_000001.png"]
    samples = out / "images" / "color" / "samples"
    assert sorted(f.name for f in samples.iterdir()) == names
    results = json.loads((out / "color_vqa_result.json").read_text())
    expected = []
    for n, questions in zip((4, 5, 2, 3), 2 * [("what color?", "two red?")] + 2 * [TWO_COLORS]):
        picture = Image.open(samples / names[n]).convert("RGB")
        expected.append(math.prod(blip_yes(blip, picture, q) for q in questions))
    assert [r["question_id"] for r in results] == [0, 1, 4, 5]
    values = [float(r["answer"]) for r in results]
    assert values == pytest.approx(expected, abs=2e-4) and len(set(values)) > 1
    assert metrics == {
        "model": f"{blip} (the official one sees 480 pixels)",
        "color": {"BLIP-VQA": sum(values) / 4, "images": 4, "images left out": 2}}


def put_annotations(folder, phrases: dict[str, list[str]]) -> None:
    """What the official program leaves: every image, eight times; no question behind the last."""
    for i in range(8):
        records = []
        for prompt, own in phrases.items():
            for _ in range(2):
                image = f"../examples/samples/{prompt}_{len(records):06d}.png"
                question = f"{own[i]}?" if i < len(own) else ""
                records.append(dict(image=image, question_id=len(records), question=question,
                                    dataset="color"))
        file = folder / f"annotation{i + 1}_blip" / "vqa_test.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(records))


def test_t2i_official_phrases(policy, blip, tmp_path, monkeypatch):
    """With spaCy's noun phrases sentences count, too; an image without any scores 1."""
    monkeypatch.setattr(t2i_compbench, "IMAGES", 2)
    data = tmp_path / "data"
    phrases = {"A red one in two.": ["A red one", "two"], "red and blue": []}
    put_annotations(data / "shape", phrases)
    (data / "shape_val.txt").write_text("\n".join(phrases) + "\n")
    assert t2i_compbench.read_questions(data / "shape") == {
        "A red one in two.": ["A red one?", "two?"], "red and blue": []}
    assert t2i_compbench.read_questions(data / "color") is None
    out = tmp_path / "out"
    metrics = t2i_run(policy, data, out, blip)
    results = json.loads((out / "shape_vqa_result.json").read_text())
    assert [r["answer"] for r in results[2:]] == ["1.0000", "1.0000"] != [
        r["answer"] for r in results[:2]]
    assert metrics["shape"]["images left out"] == 0
    (data / "shape_val.txt").write_text("red and one\n")
    with pytest.raises(InputError, match="shape: no annotations of 'red and one'"):
        t2i_run(policy, data, out, blip)


def test_t2i_nan(policy, blip, tmp_path):
    spoil(blip, BlipForQuestionAnswering, "text_decoder.cls.predictions.transform.dense.weight")
    data = tmp_path / "data"
    data.mkdir()
    (data / "texture_val.txt").write_text("red and blue\n")
    with pytest.raises(InputError, match="red and blue_000000.png: .*blip: its outputs are NaN"):
        t2i_run(policy, data, tmp_path / "out", blip)


def test_t2i_needs_blip(clip, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "color_val.txt").write_text("red and blue\n")
    with pytest.raises(InputError, match="clip: BLIP-VQA needs a BLIP model, not clip"):
        t2i_run(None, data, tmp_path / "out", clip)


@pytest.mark.parametrize("text, message", [
    ("a / b and c\n", "color_val.txt: line 1: 'a / b and c' cannot be part of a file name"),
    ("\n\n", "color_val.txt: no prompts"),
    ("A sentence.\n", "color_val.txt: no prompt whose noun phrases are known"),
])
def test_t2i_broken_prompts(tmp_path, text, message):
    (tmp_path / "color_val.txt").write_text(text)
    with pytest.raises(InputError, match=message):
        t2i_compbench.run(tmp_path, tmp_path / "out", None, "cpu", scored_by())


def test_t2i_without_prompts(tmp_path):
    with pytest.raises(InputError, match="none of color_val.txt, shape_val.txt, texture_val.txt"):
        t2i_compbench.run(tmp_path, tmp_path / "out", None, "cpu", scored_by())
