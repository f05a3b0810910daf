"""04_eval.py: the two judges, the metrics, their intervals and the table."""

import shutil
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (BlipConfig, BlipForQuestionAnswering, BlipImageProcessorPil, BlipProcessor, CLIPImageProcessorPil, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration,
                          LlavaProcessor, PreTrainedTokenizerFast)

from conftest import stage
from model import InputError, Question, Record, write_jsonl

evaluation = stage("04_eval")
nearest_text = import_module("02_score").nearest_text
world = import_module("toy.world")
Verdict = evaluation.Verdict

# -------------------------------------------------------------------------------------- a transformers model as judge

TEMPLATE = ("{% for m in messages %}{{ m['role'] }} : {% for part in m['content'] %}{% if part['type'] == 'image' %}<image> "
            "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
            "{% if add_generation_prompt %} assistant :{% endif %}")


def save_llava(folder, template: str) -> None:
    """A LLaVA with random weights. Its tokenizer adds <s> in front, as Llama's does; its image is four tokens."""
    words = ("<pad> <s> </s> <unk> <image> user assistant : , . ? what color is it how many one two red blue green yes no "
             "Choose of Answer with the choice only").split()
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
                                        pad_token="<pad>", extra_special_tokens=["<image>"],
                                        model_input_names=["input_ids", "attention_mask"])
    pixels = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    LlavaProcessor(image_processor=pixels, tokenizer=tokenizer, patch_size=14, vision_feature_select_strategy="default",
                   num_additional_image_tokens=1, chat_template=template).save_pretrained(folder)
    torch.manual_seed(1)
    small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    vision = CLIPVisionConfig(image_size=28, patch_size=14, **small)
    text = LlamaConfig(vocab_size=len(words), bos_token_id=1, eos_token_id=2, pad_token_id=0, **small)
    LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_id=4)).save_pretrained(folder)


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    save_llava(folder, TEMPLATE)
    return folder


QUESTIONS = [Question("what color is it?", ["red", "blue", "green"], "blue"),
             Question("how many?", ["one", "two"], "two"), Question("is it red?", ["yes", "no"], "no")]
PICTURE = Image.new("RGB", (64, 64), "red")


def heard(judge, monkeypatch) -> list:
    """Everything that reaches the judge's model from now on; it still answers."""
    seen, generate = [], judge.model.generate

    def listen(**inputs):
        seen.append(inputs)
        return generate(**inputs)

    monkeypatch.setattr(judge.model, "generate", listen)
    return seen


def test_model_judge_answers(llava):
    judge = evaluation.ModelJudge(str(llava), nearest_text, "cpu")
    answers = judge.answer(PICTURE, QUESTIONS)
    assert len(answers) == 3 and judge.answer(PICTURE, QUESTIONS) == answers  # greedy
    assert judge.right(answers, QUESTIONS) == [nearest_text(a, q.choices) == q.answer for a, q in zip(answers, QUESTIONS)]


def test_model_judge_matches_what_the_model_said(llava, monkeypatch):
    judge = evaluation.ModelJudge(str(llava), nearest_text, "cpu")
    said = iter(["It is BLUE.", "2", "no"])
    monkeypatch.setattr(judge, "chat", lambda picture, q: next(said))
    answers = judge.answer(PICTURE, QUESTIONS)
    assert answers == ["It is BLUE.", "2", "no"]  # as it was said, so that the judge can be audited
    assert judge.right(answers, QUESTIONS) == [True, True, True]


def test_model_judge_sees_picture_question_and_choices(llava, monkeypatch):
    judge = evaluation.ModelJudge(str(llava), nearest_text, "cpu")
    seen = heard(judge, monkeypatch)
    judge.answer(PICTURE, QUESTIONS[:1])
    judge.answer(Image.new("RGB", (64, 64), "blue"), QUESTIONS[:1])
    assert judge.processor.tokenizer.decode(seen[0]["input_ids"][0]) == (
        "<s> user : <image> <image> <image> <image> what color is it ? Choose one of : red , blue , green . "
        "Answer with the choice only . assistant :")
    red, blue = (inputs["pixel_values"][0].mean((1, 2)) for inputs in seen)
    assert red[0] > 1 > red[2] and blue[2] > 1 > blue[0]  # channels of the picture, normalised


def test_model_judge_leaves_the_prompt_out_of_the_answer(llava, monkeypatch):
    judge = evaluation.ModelJudge(str(llava), nearest_text, "cpu")
    answer = judge.processor.tokenizer(" green.", add_special_tokens=False, return_tensors="pt").input_ids
    monkeypatch.setattr(judge.model, "generate", lambda input_ids, **_: torch.cat([input_ids, answer, torch.tensor([[2]])], 1))
    assert judge.answer(PICTURE, QUESTIONS[:1]) == ["green ."]
    assert judge.right(["green ."], QUESTIONS[:1]) == [False]


def test_model_judge_does_not_double_the_first_token(tmp_path, monkeypatch):
    """Many chat templates (Llama 3.2, Gemma 3) write <s> themselves; the tokenizer must not add another."""
    save_llava(tmp_path, "{{ bos_token }} " + TEMPLATE)
    judge = evaluation.ModelJudge(str(tmp_path), nearest_text, "cpu")
    seen = heard(judge, monkeypatch)
    judge.answer(PICTURE, QUESTIONS[:1])
    ids = seen[0]["input_ids"][0].tolist()
    assert ids[0] == 1 and ids.count(1) == 1


def test_model_judge_everything_right(llava):
    judge = evaluation.ModelJudge(str(llava), nearest_text, "cpu")
    assert judge.all_right(PICTURE, Record("a", "", ""), [True, True]) is True
    assert judge.all_right(PICTURE, Record("a", "", ""), [True, False]) is False


def test_unknown_judge_is_one_line(tmp_path):
    with pytest.raises(InputError, match="nothing here") as error:
        evaluation.ModelJudge(str(tmp_path / "nothing here"), nearest_text, "cpu")
    assert "\n" not in str(error.value)


def save_blip(folder) -> None:
    """A BLIP VQA model with random weights, of the class that DPG-Bench's nearest judge has."""
    words = "[PAD] [UNK] [CLS] [SEP] [DEC] [ENC] what color is it how many red ? yes no two blue".split()
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
                                        sep_token="[SEP]")
    BlipProcessor(BlipImageProcessorPil(size={"height": 28, "width": 28}), tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    text = dict(vocab_size=len(words), bos_token_id=4, eos_token_id=3, sep_token_id=3, pad_token_id=0, encoder_hidden_size=16,
                max_position_embeddings=64, **small)
    config = BlipConfig(text_config=text, vision_config=dict(image_size=28, patch_size=14, **small), projection_dim=16)
    BlipForQuestionAnswering(config).save_pretrained(folder)


def test_vqa_model_as_judge(tmp_path, monkeypatch):
    save_blip(tmp_path)
    judge = evaluation.ModelJudge(str(tmp_path), nearest_text, "cpu")
    seen = heard(judge, monkeypatch)
    answers = judge.answer(PICTURE, QUESTIONS)
    assert judge.is_vqa and len(answers) == 3 and all(isinstance(a, str) for a in answers)
    ids = seen[0]["input_ids"][0].tolist()
    assert judge.processor.decode(ids) == "[CLS] what color is it ? [SEP]"  # the plain question, no choices
    assert not any(word in " ".join(answers) for word in ("[CLS]", "[SEP]", "[PAD]"))


# ---------------------------------------------------------------------------------------------- the toy world's oracle

SINGLE = [c for c in world.CAPTIONS if world.parse(c).kind == "single"]
PAIRS = [c for c in world.CAPTIONS if world.parse(c).kind == "pair"]
COUNTS = [c for c in world.CAPTIONS if world.parse(c).kind == "count"]
SCENES = SINGLE[::7] + PAIRS[::311] + COUNTS[::13]


def toy_record(caption: str) -> Record:
    return Record(caption, "", caption, questions=[Question(**q) for q in world.questions(caption)])


def judged(picture: Image.Image, record: Record) -> tuple[list[bool], bool]:
    judge = evaluation.ToyJudge()
    right = [a == q.answer for a, q in zip(judge.answer(picture, record.questions), record.questions, strict=True)]
    return right, judge.all_right(picture, record, right)


@pytest.mark.parametrize("caption", SCENES)
def test_toy_judge(caption):
    """A correct drawing has every answer right; with one object of another type it has not."""
    record, grid = toy_record(caption), world.scene(caption, np.random.default_rng(3))
    right, everything = judged(Image.fromarray(world.render(grid)), record)
    assert everything is True and right == [True] * len(record.questions) and len(right) >= 8
    places = np.argwhere(grid != world.EMPTY)
    for row, column in places:
        swapped = grid.copy()
        swapped[row, column] = next(t for t in range(len(world.TYPES)) if t not in grid)
        right, everything = judged(Image.fromarray(world.render(swapped)), record)
        assert everything is False and not all(right)


def test_toy_judge_sees_order_and_number():
    left, right, above = ("a big red ring left of a small blue cross", "a small blue cross left of a big red ring",
                          "a big red ring above a small blue cross")
    grid = world.scene(left, np.random.default_rng(0))
    verdicts = {c: judged(Image.fromarray(world.render(grid)), toy_record(c))[1] for c in (left, right, above)}
    assert verdicts == {left: True, right: False, above: False}
    grid = world.scene("three big red rings", np.random.default_rng(0))
    verdicts = {c: judged(Image.fromarray(world.render(grid)), toy_record(c))[1]
                for c in ("two big red rings", "three big red rings", "four big red rings")}
    assert list(verdicts.values()) == [False, True, False]


def test_toy_judge_on_noise():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    right, everything = judged(noise, toy_record("a big red ring"))
    assert everything is False and sum(right) < len(right) / 2 + 1


def test_toy_judge_judges_what_was_to_be_drawn():
    """The prompt, where a record has one, and not the caption."""
    record = Record("a", "", "a small blue cross", "a big red ring")
    picture = Image.fromarray(world.render(world.scene("a big red ring", np.random.default_rng(0))))
    assert evaluation.ToyJudge().all_right(picture, record, [])


def test_toy_judge_only_knows_toy_captions():
    with pytest.raises(InputError, match="'id7'.*a photo of a cat.*--judge self"):
        evaluation.ToyJudge().all_right(PICTURE, Record("id7", "", "a photo of a cat"), [])


# ------------------------------------------------------------------------------------------------------------- metrics


def test_bootstrap_by_hand():
    """Two records, 0 and 1: resampled means are 0, 0.5 and 1 with probability 1/4, 1/2, 1/4."""
    assert evaluation.bootstrap(np.array([0.0, 1.0])) == (0.5, 0.0, 1.0)
    assert evaluation.bootstrap(np.full(5, 0.25)) == (0.25, 0.25, 0.25)
    assert evaluation.bootstrap(np.array([0.75])) == (0.75, 0.75, 0.75)


def test_bootstrap_interval():
    values = np.random.default_rng(7).random(1600)
    widths = []
    for n in (25, 100, 400, 1600):
        mean, low, high = evaluation.bootstrap(values[:n])
        assert mean == float(values[:n].mean()) and low < mean < high
        assert high - low == pytest.approx(2 * 1.96 * values[:n].std() / n**0.5, rel=0.06)  # the normal approximation
        widths.append(high - low)
    assert widths == sorted(widths, reverse=True)
    assert evaluation.bootstrap(values[:25]) == evaluation.bootstrap(values[:25].copy())
    assert evaluation.bootstrap(values[:25], seed=1) != evaluation.bootstrap(values[:25])


def verdict(id, und_right, gen_right, caption_score, all_right, text="a cat") -> Verdict:
    return Verdict(id, "a.png", text, [], "said", caption_score, [], und_right, [], gen_right, all_right, [])


T, F = True, False
VERDICTS = [verdict("a", [T, T, T, F], [T, F, F, F], 0.5, F), verdict("b", [T, T], [T, T], 1.0, T),
            verdict("c", [F], [T], 0.0, T, "a dog"), verdict("d", [T, F], [F, F], 0.5, F)]


def test_metrics_are_means_over_records():
    found = {name: values.tolist() for name, values in evaluation.per_record(VERDICTS).items()}
    assert found == {"understanding": [0.75, 1.0, 0.0, 0.5], "generation": [0.25, 1.0, 1.0, 0.0],
                     "gap": [0.5, 0.0, -1.0, 0.5], "caption score": [0.5, 1.0, 0.0, 0.5], "everything right": [0, 1, 1, 0]}


def test_evaluate():
    metrics = evaluation.evaluate(VERDICTS)
    assert (metrics["records"], metrics["different texts"]) == (4, 2)
    assert {name: metrics[name]["mean"] for name in evaluation.METRICS} == {
        "understanding": 0.5625, "caption score": 0.5, "generation": 0.5625, "everything right": 0.5, "gap": 0.0}
    for name, values in evaluation.per_record(VERDICTS).items():
        assert values.min() <= metrics[name]["low"] < metrics[name]["mean"] < metrics[name]["high"] <= values.max()
    assert metrics["understanding"]["mean"] - metrics["generation"]["mean"] == metrics["gap"]["mean"]


def test_the_gap_is_paired():
    """Hard records are hard for both: the gap's interval comes from differences per record."""
    both = [verdict(str(i), [i % 2 == 0, T], [i % 2 == 0, F], 0.0, F) for i in range(10)]
    metrics = evaluation.evaluate(both)
    assert metrics["gap"] == {"mean": 0.5, "low": 0.5, "high": 0.5}
    assert metrics["understanding"]["low"] < metrics["understanding"]["high"]


def test_table():
    same = [verdict(i, [T, F], [T, F, F, F], 0.125, T) for i in "abc"]
    lines = evaluation.table({"base": evaluation.evaluate(same), "round1": evaluation.evaluate(same[:1])}).split("\n")
    cells = ["0.500 [0.500, 0.500]", "0.125 [0.125, 0.125]", "0.250 [0.250, 0.250]", "1.000 [1.000, 1.000]",
             "0.250 [0.250, 0.250]"]
    assert lines == ["| | understanding | caption score | generation | everything right | gap |",
                     "|---|---|---|---|---|---|", f"| base | {' | '.join(cells)} |", f"| round1 | {' | '.join(cells)} |"]


# ------------------------------------------------------------------------------------------------------------- compare


@pytest.fixture
def finished(tmp_path):
    """Two finished evaluations of the same two records, side by side."""
    Image.new("RGB", (64, 64), "blue").save(tmp_path / "real.png")
    for name, right in (("base", F), ("round1", T)):
        verdicts = [verdict(id, [T], [right], 1.0, right) for id in ("a", "b")]
        for v in verdicts:
            v.image = str(tmp_path / "real.png")
            path = tmp_path / name / "images" / f"{v.id}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (64, 64), "red").save(path)
        write_jsonl(tmp_path / name / "answers.jsonl", verdicts)
    return tmp_path


def compared(folder, names, show=12):
    evaluation.compare(SimpleNamespace(compare=[folder / n for n in names], out=folder / "out", show=show))
    return (folder / "out" / "table.md").read_text(), Image.open(folder / "out" / "comparison.png").convert("RGB")


def test_compare(finished, capsys):
    text, picture = compared(finished, ["base", "round1"])
    base, after, difference = [line.split("|")[2:7] for line in text.split("\n") if line.startswith(("| base", "| round1"))]
    always, never = " 1.000 [1.000, 1.000] ", " 0.000 [0.000, 0.000] "
    assert base == [always, always, never, never, always] and after == [always, always, always, always, never]
    up, same, down = " +1.000 [+1.000, +1.000] ", " +0.000 [+0.000, +0.000] ", " -1.000 [-1.000, -1.000] "
    assert difference == [same, same, up, up, down]
    assert text.startswith("2 records, ") and "Paired difference to base" in text
    assert text.strip() in capsys.readouterr().out
    colors = {color for _, color in picture.getcolors(1 << 24)}
    assert {(0, 0, 255), (255, 0, 0), (0x22, 0xAA, 0x22), (0xDD, 0x33, 0x33)} <= colors  # real, drawn, right, wrong


def test_compare_refuses_other_records(finished):
    write_jsonl(finished / "round1" / "answers.jsonl", [verdict("a", [T], [T], 1.0, T)])
    with pytest.raises(InputError, match="round1.*other records"):
        compared(finished, ["base", "round1"])


def test_compare_without_an_evaluation(finished):
    with pytest.raises(InputError, match="answers.jsonl"):
        compared(finished, ["base", "nothing"])


def test_compare_tells_folders_of_one_name_apart(finished):
    """The same round of two runs: two lines and a difference, not one line."""
    other = finished / "other" / "base"
    other.parent.mkdir()
    shutil.copytree(finished / "round1", other)
    text, _ = compared(finished, ["base", "other/base"])
    assert text.count(f"| {finished / 'base'} |") == 1 and text.count(f"| {other} |") == 2
