"""evals/judges.py, metrics.py and `compare`: judges, metrics, their intervals and the table."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (BlipConfig, BlipForQuestionAnswering, BlipImageProcessorPil,
                          BlipProcessor, CLIPImageProcessorPil, CLIPVisionConfig, LlamaConfig,
                          LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor,
                          PreTrainedTokenizerFast, ViltConfig, ViltForQuestionAnswering,
                          ViltImageProcessorPil, ViltProcessor)

from conftest import main, stage
from evals import judge_models, metrics
from evals.compare import CELL, TITLE, titled
from evals.html import COLORS
from evals.judges import ModelJudge, SelfJudge, ToyJudge, load_judge
from evals.metrics import EvalRecord
from hermesflow.files import InputError
from hermesflow.outputs import FORMAT
from hermesflow.pictures import to_pil
from hermesflow.records import Question, Record, vqa_question
from hermesflow.scoring import are_right, nearest_text
from hermesflow.tables import write_table
from model import TextRequest
from tiny import tiny_model
from toy import world

evaluation = stage("04_eval")

# ------------------------------------------------------------------- a transformers model as judge

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} : {% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %} assistant :{% endif %}"
)
LLAVA_WORDS = ("<pad> <s> </s> <unk> <image> user assistant : , . ? what color is it how many one "
               "two red blue green yes no Choose of Answer with the choice only").split()
BLIP_WORDS = ("[PAD] [UNK] [CLS] [SEP] [DEC] [ENC] what color is it how many red ? yes no two "
              "blue").split()
SMALL = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)


def word_tokenizer(words: list[str], unknown: str, template: str, special: list[tuple]):
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single=template,
                                                             special_tokens=special)
    return tokenizer


def save_llava(folder, template: str) -> None:
    """A LLaVA with random weights.

    Its tokenizer adds <s> in front, as Llama's does; its image is four tokens.
    """
    words = word_tokenizer(LLAVA_WORDS, "<unk>", "<s> $A", [("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        pad_token="<pad>", extra_special_tokens=["<image>"],
        model_input_names=["input_ids", "attention_mask"])
    pixels = CLIPImageProcessorPil(size={"shortest_edge": 28},
                                   crop_size={"height": 28, "width": 28})
    LlavaProcessor(image_processor=pixels, tokenizer=tokenizer, patch_size=14,
                   vision_feature_select_strategy="default", num_additional_image_tokens=1,
                   chat_template=template).save_pretrained(folder)
    torch.manual_seed(1)
    vision = CLIPVisionConfig(image_size=28, patch_size=14, **SMALL)
    text = LlamaConfig(vocab_size=len(LLAVA_WORDS), bos_token_id=1, eos_token_id=2,
                       pad_token_id=0, **SMALL)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=4)
    LlavaForConditionalGeneration(config).save_pretrained(folder)


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    save_llava(folder, TEMPLATE)
    return folder


QUESTIONS = [Question("what color is it?", ["red", "blue", "green"], "blue"),
             Question("how many?", ["one", "two"], "two"),
             Question("is it red?", ["yes", "no"], "no")]
PICTURE = Image.new("RGB", (64, 64), "red")


def record_inputs(judge, monkeypatch) -> list:
    """Everything that reaches the judge's model from now on; it still answers."""
    inputs = []
    generate = judge.model.generate

    def recorded(**given):
        inputs.append(given)
        return generate(**given)

    monkeypatch.setattr(judge.model, "generate", recorded)
    return inputs


def test_model_judge_answers(llava):
    judge = ModelJudge(str(llava), nearest_text, "cpu")
    answers = judge.answer(PICTURE, QUESTIONS)
    assert len(answers) == 3 and judge.answer(PICTURE, QUESTIONS) == answers  # greedy
    assert judge.meanings(answers, QUESTIONS) == [
        nearest_text(a, q.choices) for a, q in zip(answers, QUESTIONS)]


def test_model_judge_matches_the_models_words(llava, monkeypatch):
    judge = ModelJudge(str(llava), nearest_text, "cpu")
    words = ["It is BLUE.", "2", "no"]
    monkeypatch.setattr(judge.processor, "decode", lambda ids, **_: words[int(ids[0])])
    monkeypatch.setattr(judge.model, "generate",
                        lambda input_ids, **_: torch.cat([input_ids, torch.arange(3)[:, None]], 1))
    answers = judge.answer(PICTURE, QUESTIONS)
    assert answers == words  # unchanged, so that the judge can be audited
    assert judge.meanings(answers, QUESTIONS) == ["blue", "two", "no"]


def test_model_judge_sees_picture_question_and_choices(llava, monkeypatch):
    judge = ModelJudge(str(llava), nearest_text, "cpu")
    inputs = record_inputs(judge, monkeypatch)
    judge.answer(PICTURE, QUESTIONS[:1])
    judge.answer(Image.new("RGB", (64, 64), "blue"), QUESTIONS[:1])
    assert judge.processor.tokenizer.decode(inputs[0]["input_ids"][0]) == (
        "<s> user : <image> <image> <image> <image> what color is it ? Choose one of : red , "
        "blue , green . Answer with the choice only . assistant :")
    # channels of the picture, normalised
    red, blue = (given["pixel_values"][0].mean((1, 2)) for given in inputs)
    assert red[0] > 1 > red[2] and blue[2] > 1 > blue[0]


def test_model_judge_leaves_the_prompt_out_of_the_answer(llava, monkeypatch):
    judge = ModelJudge(str(llava), nearest_text, "cpu")
    answer = judge.processor.tokenizer(" green.", add_special_tokens=False, return_tensors="pt")
    end = torch.tensor([[2]])

    def generate(input_ids, **_):
        return torch.cat([input_ids, answer.input_ids, end], 1)

    monkeypatch.setattr(judge.model, "generate", generate)
    assert judge.answer(PICTURE, QUESTIONS[:1]) == ["green ."]
    assert judge.meanings(["green ."], QUESTIONS[:1]) == ["green"]


def test_model_judge_does_not_double_the_first_token(tmp_path, monkeypatch):
    """Many chat templates (Llama 3.2, Gemma 3) write <s>; the tokenizer must not add another."""
    save_llava(tmp_path, "{{ bos_token }} " + TEMPLATE)
    judge = ModelJudge(str(tmp_path), nearest_text, "cpu")
    inputs = record_inputs(judge, monkeypatch)
    judge.answer(PICTURE, QUESTIONS[:1])
    ids = inputs[0]["input_ids"][0].tolist()
    assert ids[0] == 1 and ids.count(1) == 1


def test_model_judge_all_correct(llava):
    judge = ModelJudge(str(llava), nearest_text, "cpu")
    assert judge.all_correct(PICTURE, Record("a", "", ""), [True, True]) is True
    assert judge.all_correct(PICTURE, Record("a", "", ""), [True, False]) is False


def test_unknown_judge_is_one_line(tmp_path):
    with pytest.raises(InputError, match="nothing here") as error:
        ModelJudge(str(tmp_path / "nothing here"), nearest_text, "cpu")
    assert "\n" not in str(error.value)


def save_blip(folder) -> None:
    """A BLIP VQA model with random weights, of the class that DPG-Bench's nearest judge has."""
    words = word_tokenizer(BLIP_WORDS, "[UNK]", "[CLS] $A [SEP]", [("[CLS]", 2), ("[SEP]", 3)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]",
                                        unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")
    pixels = BlipImageProcessorPil(size={"height": 28, "width": 28})
    BlipProcessor(pixels, tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    text = dict(vocab_size=len(BLIP_WORDS), bos_token_id=4, eos_token_id=3, sep_token_id=3,
                pad_token_id=0, encoder_hidden_size=16, max_position_embeddings=64, **SMALL)
    vision = dict(image_size=28, patch_size=14, **SMALL)
    config = BlipConfig(text_config=text, vision_config=vision, projection_dim=16)
    BlipForQuestionAnswering(config).save_pretrained(folder)


def test_vqa_model_as_judge(tmp_path, monkeypatch):
    save_blip(tmp_path)
    judge = ModelJudge(str(tmp_path), nearest_text, "cpu")
    inputs = record_inputs(judge, monkeypatch)
    answers = judge.answer(PICTURE, QUESTIONS)
    assert judge.is_vqa and len(answers) == 3 and all(isinstance(a, str) for a in answers)
    # the plain questions, no choices
    asked = [judge.processor.decode(ids) for given in inputs for ids in given["input_ids"]]
    assert sorted(asked) == sorted(f"[CLS] {q} [SEP]" for q in (
        "what color is it ?", "how many ?", "is it red ?"))
    assert not any(word in " ".join(answers) for word in ("[CLS]", "[SEP]", "[PAD]"))


def lively_blip(folder) -> ModelJudge:
    """Its answers depend on the question."""
    save_blip(folder)
    judge = ModelJudge(str(folder), nearest_text, "cpu")
    torch.manual_seed(3)
    for p in judge.model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.5)
    return judge


@pytest.mark.parametrize("at_once, sizes", [(8, [1, 4, 2]), (2, [1, 2, 2, 2])])
def test_vqa_batches_answer_as_one_by_one(tmp_path, monkeypatch, at_once, sizes):
    """Questions of one length together: nothing is padded, which BLIP's decoder would see."""
    judge = lively_blip(tmp_path)
    texts = ("is it red?", "what color is it?", "how many red?", "is it two?", "how many?",
             "is it blue?", "what color is blue?")
    questions = [Question(t, ["yes"], "yes") for t in texts]
    alone = [judge.vqa_answers(PICTURE, [t])[0] for t in texts]
    assert len(set(alone)) > 1
    inputs = record_inputs(judge, monkeypatch)
    monkeypatch.setattr(judge_models, "JUDGED_AT_ONCE", at_once)
    assert judge.answer(PICTURE, questions) == alone
    assert [len(given["input_ids"]) for given in inputs] == sizes
    assert all(given["attention_mask"].all() for given in inputs)
    assert all(len(given["pixel_values"]) == len(given["input_ids"]) for given in inputs)


def test_vqa_model_that_classifies(tmp_path):
    """ViLT's answers are classes."""
    words = word_tokenizer(BLIP_WORDS, "[UNK]", "[CLS] $A [SEP]", [("[CLS]", 2), ("[SEP]", 3)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]",
                                        unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")
    ViltProcessor(ViltImageProcessorPil(size={"shortest_edge": 32}, size_divisor=16),
                  tokenizer).save_pretrained(tmp_path)
    torch.manual_seed(1)
    labels = {0: "red", 1: "blue", 2: "two", 3: "yes"}
    config = ViltConfig(vocab_size=len(BLIP_WORDS), image_size=32, patch_size=16, id2label=labels,
                        initializer_range=0.5, max_position_embeddings=16, **SMALL)
    ViltForQuestionAnswering(config).save_pretrained(tmp_path)
    judge = ModelJudge(str(tmp_path), nearest_text, "cpu")
    answers = judge.answer(PICTURE, QUESTIONS)
    direct = []
    for q in QUESTIONS:
        inputs = judge.processor(PICTURE, q.question, return_tensors="pt")
        direct.append(labels[int(judge.model(**inputs).logits.argmax())])
    assert answers == direct and len(set(answers)) > 1


# -------------------------------------------------------------------------- the policy as its judge


def test_self_judge_answers_about_the_picture():
    """The same answers as about the picture's codes; marked by the matcher."""
    model = tiny_model(seed=5)
    codes = torch.arange(model.image_tokens)[None] % 32
    picture = to_pil(model.decode_image(codes))[0]
    judge = SelfJudge(model, nearest_text, 6)
    answers = judge.answer(picture, QUESTIONS)
    pixels = np.asarray(picture, dtype=np.float32) / 127.5 - 1  # (H, W, 3)
    encoded = model.encode_image(torch.from_numpy(pixels).permute(2, 0, 1)[None])
    requests = [TextRequest(0, vqa_question(q)) for q in QUESTIONS]
    expected = [model.decode_text(g.ids).strip() for g in model.generate_text(encoded, requests, 6)]
    assert answers == expected
    assert judge.meanings(["It is BLUE.", "1", "no"], QUESTIONS) == ["blue", "one", "no"]


def test_load_judge(llava):
    model = tiny_model()
    assert isinstance(load_judge("toy", model, nearest_text, 6), ToyJudge)
    assert isinstance(load_judge("self", model, nearest_text, 6), SelfJudge)
    assert isinstance(load_judge(str(llava), model, nearest_text, 6), ModelJudge)


# --------------------------------------------------------------------------- the toy world's oracle


def captions_of(kind: str) -> list[str]:
    return [c for c in world.CAPTIONS if world.parse(c).kind == kind]


SCENES = captions_of("single")[::7] + captions_of("pair")[::311] + captions_of("count")[::13]


def toy_record(caption: str) -> Record:
    questions = [Question(**q) for q in world.questions(caption)]
    return Record(caption, "", caption, questions=questions)


def toy_judgement(picture: Image.Image, record: Record) -> tuple[list[bool], bool]:
    judge = ToyJudge()
    answers = judge.answer(picture, record.questions)
    correct = [a == q.answer for a, q in zip(answers, record.questions, strict=True)]
    assert are_right(judge.meanings(answers, record.questions), record.questions) == correct
    return correct, judge.all_correct(picture, record, correct)


def toy_image(grid) -> Image.Image:
    return Image.fromarray(world.render(grid))


@pytest.mark.parametrize("caption", SCENES)
def test_toy_judge(caption):
    """A correct drawing has every answer right; with one object of another type it has not."""
    record = toy_record(caption)
    grid = world.scene(caption, np.random.default_rng(3))
    correct, all_correct = toy_judgement(toy_image(grid), record)
    assert all_correct is True and correct == [True] * len(record.questions) and len(correct) >= 8
    for row, column in np.argwhere(grid != world.EMPTY):
        swapped = grid.copy()
        swapped[row, column] = next(t for t in range(len(world.TYPES)) if t not in grid)
        correct, all_correct = toy_judgement(toy_image(swapped), record)
        assert all_correct is False and not all(correct)


def all_correct_by_caption(drawn: str, captions: tuple[str, ...]) -> dict[str, bool]:
    """A drawing of one caption, judged by each of several."""
    picture = toy_image(world.scene(drawn, np.random.default_rng(0)))
    return {c: toy_judgement(picture, toy_record(c))[1] for c in captions}


def test_toy_judge_sees_order_and_number():
    left = "a big red ring left of a small blue cross"
    right = "a small blue cross left of a big red ring"
    above = "a big red ring above a small blue cross"
    assert all_correct_by_caption(left, (left, right, above)) == {
        left: True, right: False, above: False}
    two, three, four = (f"{n} big red rings" for n in ("two", "three", "four"))
    assert all_correct_by_caption(three, (two, three, four)) == {
        two: False, three: True, four: False}


def test_toy_judge_on_noise():
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    correct, all_correct = toy_judgement(Image.fromarray(pixels), toy_record("a big red ring"))
    assert all_correct is False and sum(correct) < len(correct) / 2 + 1


def test_toy_judge_judges_the_prompt():
    """The prompt, where a record has one, and not the caption."""
    record = Record("a", "", "a small blue cross", "a big red ring")
    picture = toy_image(world.scene("a big red ring", np.random.default_rng(0)))
    assert ToyJudge().all_correct(picture, record, [])


def test_toy_judge_only_knows_toy_captions():
    with pytest.raises(InputError, match="'id7'.*a photo of a cat.*--judge self"):
        ToyJudge().all_correct(PICTURE, Record("id7", "", "a photo of a cat"), [])


# ------------------------------------------------------------------------------------------ metrics


def test_bootstrap_by_hand():
    """Two records, 0 and 1: resampled means are 0, 0.5 and 1 with probability 1/4, 1/2, 1/4."""
    assert metrics.bootstrap([np.array([0.0, 1.0])]) == [(0.5, 0.0, 1.0)]
    assert metrics.bootstrap([np.full(5, 0.25)]) == [(0.25, 0.25, 0.25)]
    assert metrics.bootstrap([np.array([0.75])]) == [(0.75, 0.75, 0.75)]


def test_bootstrap_interval():
    values = np.random.default_rng(7).random(1600)
    widths = []
    for n in (25, 100, 400, 1600):
        [(mean, low, high)] = metrics.bootstrap([values[:n]])
        assert mean == float(values[:n].mean()) and low < mean < high
        normal = 2 * 1.96 * values[:n].std() / n**0.5  # the normal approximation
        assert high - low == pytest.approx(normal, rel=0.06)
        widths.append(high - low)
    assert widths == sorted(widths, reverse=True)
    first = [values[:25]]
    assert metrics.bootstrap(first) == metrics.bootstrap([values[:25].copy()])
    assert metrics.bootstrap(first, seed=1) != metrics.bootstrap(first)


def test_bootstrap_of_several_metrics():
    """All resample the same records, and each has the interval that it has alone."""
    values = np.random.default_rng(3).random((5, 333))
    together = metrics.bootstrap(list(values))
    rng = np.random.default_rng(0)
    draws = [rng.integers(333, size=333) for _ in range(10_000)]
    for column, interval in zip(values, together):
        assert metrics.bootstrap([column]) == [interval]
        means = np.array([column[records].mean() for records in draws])
        low, high = np.percentile(means, [2.5, 97.5])
        assert interval == (column.mean(), low, high)  # to the last bit


def eval_record(id, und_right, gen_right, caption_score, all_right, text="a cat") -> EvalRecord:
    return EvalRecord(id, "a.png", text, [], "a caption", caption_score, [], [], und_right, [], [],
                      gen_right, all_right)


T = True
F = False
FOUR = [eval_record("a", [T, T, T, F], [T, F, F, F], 0.5, F),
        eval_record("b", [T, T], [T, T], 1.0, T),
        eval_record("c", [F], [T], 0.0, T, "a dog"),
        eval_record("d", [T, F], [F, F], 0.5, F)]


def test_metrics_are_means_over_records():
    values = {name: v.tolist() for name, v in metrics.summarize(FOUR).values.items()}
    assert values == {
        "understanding": [0.75, 1.0, 0.0, 0.5],
        "generation": [0.25, 1.0, 1.0, 0.0],
        "gap": [0.5, 0.0, -1.0, 0.5],
        "caption score": [0.5, 1.0, 0.0, 0.5],
        "everything right": [0, 1, 1, 0],
    }


def test_evaluate():
    result = metrics.evaluate(FOUR)
    assert (result["records"], result["different texts"]) == (4, 2)
    assert {name: result[name]["mean"] for name in metrics.METRICS} == {
        "understanding": 0.5625, "caption score": 0.5, "generation": 0.5625,
        "everything right": 0.5, "gap": 0.0}
    for name, values in metrics.summarize(FOUR).values.items():
        low, mean, high = (result[name][k] for k in ("low", "mean", "high"))
        assert values.min() <= low < mean < high <= values.max()
    assert result["understanding"]["mean"] - result["generation"]["mean"] == result["gap"]["mean"]


def test_the_gap_is_paired():
    """Hard records are hard for both: the gap's interval comes from differences per record."""
    both = [eval_record(str(i), [i % 2 == 0, T], [i % 2 == 0, F], 0.0, F) for i in range(10)]
    result = metrics.evaluate(both)
    assert result["gap"] == {"mean": 0.5, "low": 0.5, "high": 0.5}
    assert result["understanding"]["low"] < result["understanding"]["high"]


def test_table():
    same = [eval_record(i, [T, F], [T, F, F, F], 0.125, T) for i in "abc"]
    evaluations = {"base": metrics.evaluate(same), "round1": metrics.evaluate(same[:1])}
    cells = " | ".join(["0.500 [0.500, 0.500]", "0.125 [0.125, 0.125]", "0.250 [0.250, 0.250]",
                        "1.000 [1.000, 1.000]", "0.250 [0.250, 0.250]"])
    assert metrics.table(evaluations).split("\n") == [
        "| | understanding | caption score | generation | everything right | gap |",
        "|---|---|---|---|---|---|",
        f"| base | {cells} |",
        f"| round1 | {cells} |",
    ]


# ------------------------------------------------------------------------------------------ compare


SETTINGS = {"benchmark": "None", "judge": "toy", "guidance": "0.0", "seed": "0"}


def put_evaluation(folder, records: list[EvalRecord], inputs=(), **settings) -> None:
    """The files of a finished evaluation, but for the pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [(r, {"codes": torch.tensor([i])}) for i, r in enumerate(records)]
    write_table(folder / "answers.jsonl", rows)
    mark = {"stage": "04_eval", "format": FORMAT, "complete": True,
            "settings": {**SETTINGS, **settings},
            "inputs": {"records": {"items": 2, "content": "r"}, "model": {"content": folder.name},
                       **dict(inputs)},
            "derived": {"show": "12"}, "code": {"04_eval.py": "c"}}
    (folder / "settings.json").write_text(json.dumps(mark))


@pytest.fixture
def finished(tmp_path):
    """Two finished evaluations of the same two records, side by side."""
    real = tmp_path / "real.png"
    Image.new("RGB", (64, 64), "blue").save(real)
    for name, right in (("base", F), ("round1", T)):
        records = [eval_record(id, [T], [right], 1.0, right) for id in ("a", "b")]
        images = tmp_path / name / "images"
        images.mkdir(parents=True)
        for r in records:
            r.image = str(real)
            Image.new("RGB", (64, 64), "red").save(images / f"{r.id}.png")
        put_evaluation(tmp_path / name, records)
    return tmp_path


def compare(folder, names: list[str]):
    """OUT/table.md and the colours of OUT/comparison.png."""
    out = folder / "out"
    main(evaluation, "--compare", *(folder / name for name in names), "--out", out)
    picture = Image.open(out / "comparison.png").convert("RGB")
    colors = {color for _, color in picture.getcolors(1 << 24)}
    return (out / "table.md").read_text(), colors


def test_compare(finished, capsys):
    text, colors = compare(finished, ["base", "round1"])
    rows = [line.split("|") for line in text.split("\n") if line.startswith(("| base", "| round1"))]
    base, after, difference = (row[2:7] for row in rows)
    always = " 1.000 [1.000, 1.000] "
    never = " 0.000 [0.000, 0.000] "
    assert base == [always, always, never, never, always]
    assert after == [always, always, always, always, never]
    up = " +1.000 [+1.000, +1.000] "
    same = " +0.000 [+0.000, +0.000] "
    down = " -1.000 [-1.000, -1.000] "
    assert difference == [same, same, up, up, down]
    assert text.startswith("2 records, ") and "Paired difference to base" in text
    assert text.strip() in capsys.readouterr().out
    # real image, drawing, frames of right and wrong drawings
    frames = {ImageColor.getrgb(COLORS[name]) for name in ("right", "wrong")}
    assert {(0, 0, 255), (255, 0, 0)} | frames <= colors


def test_frames_differ_without_colour():
    """A right drawing has a whole frame and a check mark, a wrong one dashes and a cross."""
    picture = Image.new("RGB", (64, 64), "red")
    right, wrong = (titled(picture, "base", all_right) for all_right in (T, F))
    assert right.size == wrong.size == (CELL, CELL)

    def whites(cell, box) -> float:
        part = np.array(cell.crop(box))
        return float((part == 255).all(-1).mean())

    frame = (TITLE // 2, CELL - 1, CELL - TITLE // 2, CELL)
    assert whites(right, frame) == 0 and 0.4 < whites(wrong, frame) < 0.6
    corner = (CELL - 22, 0, CELL, TITLE)
    assert right.crop(corner).convert("L").tobytes() != wrong.crop(corner).convert("L").tobytes()
    real = titled(picture, "real")
    assert whites(real, frame) == 0 and whites(real, corner) == 1


def test_compare_refuses_other_records(finished):
    other = [eval_record("a", [T], [T], 1.0, T)]
    put_evaluation(finished / "round1", other)
    with pytest.raises(InputError, match="round1.*other records"):
        compare(finished, ["base", "round1"])


def test_compare_without_an_evaluation(finished):
    with pytest.raises(InputError, match="answers.jsonl"):
        compare(finished, ["base", "nothing"])


def test_compare_tells_folders_of_one_name_apart(finished):
    """The same round of two runs: two lines and a difference, not one line."""
    other = finished / "other" / "base"
    other.parent.mkdir()
    shutil.copytree(finished / "round1", other)
    text, _ = compare(finished, ["base", "other/base"])
    assert text.count(f"| {finished / 'base'} |") == 1 and text.count(f"| {other} |") == 2
