"""04_eval.py --benchmark and --report from files to files, on tiny random models of the classes that are really used."""

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (BlipForQuestionAnswering, BlipProcessor, CLIPConfig, CLIPImageProcessorPil, CLIPModel,
                          CLIPProcessor, Mask2FormerConfig, Mask2FormerForUniversalSegmentation,
                          Mask2FormerImageProcessorPil, PreTrainedTokenizerFast, SwinConfig)

import benchmarks as rules
from conftest import stage
from model import (Ask, Drawing, InputError, Pair, Question, draw_images, load, load_image, save, seed_of, to_pil, write_jsonl,
                   write_text)
from test_judges import save_blip
from test_stages import main
from tiny import tiny_model

evaluation = stage("04_eval")
SHORT = "\nAnswer the question using a single word or phrase."


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny checkpoint that gives different answers; it draws 64 x 64 pixels."""
    folder = tmp_path_factory.mktemp("checkpoint") / "base"
    save(*tiny_model(seed=5), folder)
    return folder


def photo(path, seed: int, size=(90, 70)) -> Path:
    """Soft coloured blobs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    small = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


def put(path, value) -> None:
    """A file of JSON, or of a text as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def put_lines(path, records: list[dict]) -> None:
    put(path, "".join(json.dumps(r) + "\n" for r in records))


def run(base, name: str, data, out, *more) -> dict:
    main(evaluation, "--benchmark", name, "--data", data, "--out", out, "--model", base, "--device", "cpu", *more)
    return json.loads((out / "metrics.json").read_text())


def files_of(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*"))
            if p.is_file() and p.name not in ("settings.json", ".lock")}


# --------------------------------------------------------------------------------------------- understanding benchmarks
# Each function writes official files and returns what the model must be asked, in order, and a function that checks the
# prediction files against the answers and returns the metrics. `say` is what the model says: some truths are made of it.


def pope(data, say):
    splits, asked = {}, []
    for k, split in enumerate(("random", "popular", "adversarial")):
        splits[split] = [dict(question_id=n, image=f"COCO_val2014_{n + k:012d}.jpg", text=f"Is there a {thing} in the image?",
                              label=label) for n, (thing, label) in enumerate([("ring", "yes"), ("square", "no")], 1)]
        put_lines(data / f"coco_pope_{split}.json", splits[split])
        asked += [(photo(data / "val2014" / q["image"], n + k), q["text"] + SHORT) for n, q in enumerate(splits[split])]

    def check(out, answers):
        scores = {}
        for k, (split, questions) in enumerate(splits.items()):
            said = answers[2 * k : 2 * k + 2]
            assert lines(out / f"coco_pope_{split}_answers.jsonl") == [
                {"question_id": q["question_id"], "question": q["text"], "answer": a} for q, a in zip(questions, said)]
            scores[split] = rules.pope_score(["yes", "no"], said)
        return {"mean": rules.pope_mean(scores), **scores}

    return asked, check


def mme(data, say):
    tasks, asked = [t for group in rules.MME_TASKS.values() for t in group], []
    for n, task in enumerate(tasks):
        split = task in ("artwork", "celebrity", "landmark", "posters", "scene")  # as in the official folder
        images, texts = (("images", "questions_answers_YN") if split else ("", ""))
        file = photo(data / task / images / "0001.png", n % 3)
        put(data / task / texts / "0001.txt", f"Is it a {task}? Please answer yes or no.\tYes\n"
                                              "Is it red? Please answer yes or no.\tNo\n")
        asked += [(file, f"Is it a {task}?" + SHORT), (file, "Is it red?" + SHORT)]

    def check(out, answers):
        scores = {}
        for n, task in enumerate(tasks):
            one, two = answers[2 * n : 2 * n + 2]
            assert (out / "mme_results" / f"{task}.txt").read_text() == (
                f"0001.png\tIs it a {task}? Please answer yes or no.\tYes\t{one}\n"
                f"0001.png\tIs it red? Please answer yes or no.\tNo\t{two}\n")
            scores[task] = rules.mme_task(["Yes", "No"], [one, two])
        return rules.mme_score(scores)

    return asked, check


def vqav2(data, say, subset="val2014", public=True):
    asked = [(photo(data / "images" / f"COCO_{subset.replace('test-dev', 'test')}_{i:012d}.jpg", i), q + SHORT)
             for i, q in ((7, "What color is it?"), (7, "Is it big?"), (8, "How many?"))]
    questions = [dict(image_id=i, question=t.removesuffix(SHORT), question_id=10 * i + n)
                 for n, (i, (_, t)) in enumerate(zip((7, 7, 8), asked))]
    put(data / f"v2_OpenEnded_mscoco_{subset}_questions.json", dict(data_subtype=subset, questions=questions))
    truths = [[say(*asked[0])] * 10, ["yes"] * 10, [say(*asked[2])] * 2 + ["two"] * 8]  # right, wrong, 0.6
    kinds = ["other", "yes/no", "number"]
    if public:
        put(data / f"v2_mscoco_{subset}_annotations.json", dict(annotations=[
            dict(question_id=q["question_id"], answer_type=k, answers=[dict(answer=a) for a in t])
            for q, k, t in zip(questions, kinds, truths)]))

    def check(out, answers):
        assert json.loads((out / "vqa_results.json").read_text()) == [
            {"question_id": q["question_id"], "answer": a} for q, a in zip(questions, answers)]
        return rules.vqa_score([rules.VqaQuestion(0, "", "", t, k) for t, k in zip(truths, kinds)], answers) if public else {}

    return asked, check


def gqa(data, say):
    asked = [(photo(data / "images" / f"n{i}.jpg", i), f"Is the {t} left of the ring?" + SHORT)
             for i, t in enumerate(("square", "blue ring", "big square"))]
    truths = [say(*asked[0]), "yes", "no"]
    put(data / "testdev_balanced_questions.json", {
        f"20{i}": dict(question=a[1].removesuffix(SHORT), imageId=f"n{i}", answer=t, isBalanced=i < 2)
        for i, (a, t) in enumerate(zip(asked, truths))})

    def check(out, answers):
        assert json.loads((out / "testdev_balanced_predictions.json").read_text()) == [
            {"questionId": f"20{i}", "prediction": a.rstrip(".").lower()} for i, a in enumerate(answers)]
        questions = [rules.GqaQuestion("", "", t, i < 2) for i, t in enumerate(truths)]
        return {"accuracy": rules.gqa_score(questions, answers)}

    return asked, check


MMMU_END = "Answer with the option's letter from the given choices directly."


def mmmu(data, say):
    files = [photo(data / "images" / f"{i}.png", i) for i in range(3)]
    asked = [(files[0], f"<image 1> What is it?\n\n(A) ring\n(B) square\n\n\n{MMMU_END}"),
             (files[1], f"<image 1> or <image 2>?\n\n(A) red\n(B) blue\n(C) big\n\n\n{MMMU_END}"),
             (files[0], f"How many in <image 1>?\n{SHORT}")]
    options = [["ring", "square"], ["red", "blue", "big"], []]
    truths = ["A", "B", say(*asked[2])]
    put_lines(data / "validation.jsonl", [
        dict(id=f"validation_{s}_{i}", question=a[1].split("\n")[0], options=str(o), answer=t, image_1=f"images/{a[0].name}",
             image_2="images/2.png" if i == 1 else None, question_type="multiple-choice" if o else "open")
        for i, (s, a, o, t) in enumerate(zip(("Art", "Art_Theory", "Art"), asked, options, truths))])

    def check(out, answers):
        questions = rules.read_mmmu(data / "validation.jsonl")
        said = rules.mmmu_predictions(questions, answers)
        assert said[0] in "AB" and said[1] in "ABC" and said[2] == answers[2]
        assert json.loads((out / "mmmu_predictions.json").read_text()) == dict(zip((q.id for q in questions), said))
        score = rules.mmmu_score(questions, said)
        assert score["subjects"].keys() == {"Art", "Art_Theory"}
        return score

    return asked, check


def flickr30k(data, say):
    prompt = "Provide a one-sentence caption for the provided image."
    asked = [(photo(data / "images" / f"{i}.jpg", i), prompt) for i in (5, 6, 7)]
    references = [[say(*a) + ".", f"a big ring {n} left of a square"] for n, a in enumerate(asked)]
    images = [dict(filename=f"{i}.jpg", split="test", sentences=[dict(raw=t) for t in texts])
              for i, texts in zip((5, 6, 7), references)]
    put(data / "dataset_flickr30k.json", dict(images=[*images, dict(filename="no.jpg", split="train", sentences=[])]))

    def check(out, answers):
        assert json.loads((out / "flickr30k_captions.json").read_text()) == [
            {"image_id": f"{i}.jpg", "caption": a} for i, a in zip((5, 6, 7), answers)]
        score = rules.cider_d({str(i): rules.ptb_words(a) for i, a in enumerate(answers)},
                              {str(i): [rules.ptb_words(t) for t in texts] for i, texts in enumerate(references)})
        assert score["cider_d"] > 1
        return {"CIDEr-D x 100 (PTB tokeniser approximated)": 100 * score["cider_d"]}

    return asked, check


UNDERSTANDING = [pope, mme, vqav2, gqa, mmmu, flickr30k]
OFFICIAL = {"pope": "coco_pope_popular.json", "mme": "posters", "vqav2": "v2_OpenEnded_mscoco_val2014_questions.json",
            "gqa": "testdev_balanced_questions.json", "mmmu": "validation.jsonl", "flickr30k": "dataset_flickr30k.json"}
TOKENS = 6  # per answer


def speaker(base, tokens: int = TOKENS):
    """What the checkpoint says about one image, by direct calls."""
    model, vq = load(base)

    @torch.inference_mode()
    def say(file, prompt: str) -> str:
        codes = vq.encode(load_image(file, 64)[None])
        return model.tokens.decode(write_text(model, codes, [Ask(0, model.tokens.ask(prompt))], tokens)[0]).strip()

    return say


@pytest.fixture(scope="module", params=UNDERSTANDING, ids=lambda f: f.__name__)
def understood(request, base, tmp_path_factory):
    """(name, DATA, OUT of a finished run, the answers there should be, the check of the prediction files)."""
    folder = tmp_path_factory.mktemp(request.param.__name__)
    say = speaker(base, 64 if request.param is flickr30k else TOKENS)  # captions may be longer
    asked, check = request.param(folder / "data", say)
    run(base, request.param.__name__, folder / "data", folder / "out", "--batch", 3, "--max-new-tokens", TOKENS)
    return request.param.__name__, folder / "data", folder / "out", [say(*a) for a in asked], check


def test_predictions_and_metrics(understood):
    name, _, out, answers, check = understood
    assert len(set(answers)) > 1  # the tiny model has something to say
    assert json.loads((out / "metrics.json").read_text()) == {"benchmark": name, **check(out, answers)}
    assert not (out / "parts").exists()


def test_finished_runs_are_left_alone(understood, base, monkeypatch, capsys):
    name, data, out, *_ = understood
    before = files_of(out)
    monkeypatch.setattr(evaluation, "write_text", None)  # a call would fail
    run(base, name, data, out, "--max-new-tokens", TOKENS)
    assert files_of(out) == before and f"| {name} " in capsys.readouterr().out
    with pytest.raises(InputError, match="other settings.*max_new_tokens 6 -> 7"):
        run(base, name, data, out, "--max-new-tokens", 7)


def test_answers_do_not_depend_on_the_batch(understood, base, tmp_path):
    name, data, out, *_ = understood
    run(base, name, data, tmp_path / "out", "--batch", 1, "--max-new-tokens", TOKENS)
    assert files_of(tmp_path / "out") == files_of(out)


def test_interrupted_runs_continue(understood, base, tmp_path, monkeypatch):
    name, data, out, answers, _ = understood
    asked, real = [], evaluation.write_text

    def cut(model, codes, asks, *more):
        asked.append(len(asks))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return real(model, codes, asks, *more)

    monkeypatch.setattr(evaluation, "write_text", cut)
    more = ("--batch", 2, "--max-new-tokens", TOKENS)
    with pytest.raises(KeyboardInterrupt):
        run(base, name, data, tmp_path / "out", *more)
    assert not (tmp_path / "out" / "metrics.json").exists()
    run(base, name, data, tmp_path / "out", *more)
    assert sum(asked) - asked[1] == len(answers)  # nothing twice but what was cut
    assert files_of(tmp_path / "out") == files_of(out)


def test_missing_official_files(understood, base, tmp_path):
    name, data, *_ = understood
    shutil.copytree(data, tmp_path / "data")
    gone = tmp_path / "data" / OFFICIAL[name]
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    pattern = {"vqav2": "v2_OpenEnded_mscoco_*_questions.json", "mmmu": "*.jsonl"}.get(name, OFFICIAL[name])
    with pytest.raises(InputError, match=re.escape(pattern)):
        run(base, name, tmp_path / "data", tmp_path / "out")


def test_missing_images(understood, base, tmp_path):
    name, data, *_ = understood
    shutil.copytree(data, tmp_path / "data")
    for gone in sorted(p for p in tmp_path.rglob("*") if p.suffix in (".jpg", ".png")):
        gone.unlink()
    with pytest.raises(InputError, match=r"\.(jpg|png): "):
        run(base, name, tmp_path / "data", tmp_path / "out")


def test_vqav2_test_split_gives_predictions_only(base, tmp_path):
    say = speaker(base)
    asked, check = vqav2(tmp_path / "data", say, "test-dev2015", public=False)
    metrics = run(base, "vqav2", tmp_path / "data", tmp_path / "out", "--max-new-tokens", TOKENS)
    assert metrics == {"benchmark": "vqav2", **check(tmp_path / "out", [say(*a) for a in asked])}


def test_mmmu_question_without_an_image(base, tmp_path):
    mmmu(tmp_path / "data", lambda *_: "two")
    records = lines(tmp_path / "data" / "validation.jsonl")
    records[1].update(image_1=None, image_2=None)
    put_lines(tmp_path / "data" / "validation.jsonl", records)
    with pytest.raises(InputError, match="image_1|validation_Art_Theory_1"):
        run(base, "mmmu", tmp_path / "data", tmp_path / "out")


# ------------------------------------------------------------------------------------------------------ tiny judges


def spread(model, by: float):
    """Random weights make all outputs alike; larger ones do not."""
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(by if p.ndim >= 2 else 1)
    return model.eval()


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    words = [*"<unk> <s> . </s> a photo of depicts A colored object big ring square".split(), *rules.GENEVAL_COLORS]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 3)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
                                        pad_token="</s>", model_max_length=77)
    pixels = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    CLIPProcessor(image_processor=pixels, tokenizer=tokenizer).save_pretrained(folder)
    torch.manual_seed(2)
    small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    config = CLIPConfig(text_config=dict(vocab_size=len(words), bos_token_id=1, eos_token_id=3, pad_token_id=3, **small),
                        vision_config=dict(image_size=28, patch_size=14, **small), projection_dim=8)
    spread(CLIPModel(config), 8).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def mask2former(tmp_path_factory):
    """80 labels, 8 queries; sure of its classes and masks."""
    folder = tmp_path_factory.mktemp("mask2former")
    swin = SwinConfig(embed_dim=4, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=7,
                      out_features=["stage1", "stage2", "stage3", "stage4"])
    torch.manual_seed(3)
    model = Mask2FormerForUniversalSegmentation(Mask2FormerConfig(
        backbone_config=swin, num_labels=80, num_queries=8, feature_size=32, mask_feature_size=32, hidden_dim=32,
        encoder_feedforward_dim=16, dim_feedforward=16, encoder_layers=1, decoder_layers=2, num_attention_heads=2)).eval()
    with torch.no_grad():
        model.class_predictor.weight.mul_(30)
    model.save_pretrained(folder)
    Mask2FormerImageProcessorPil(size={"height": 384, "width": 384}).save_pretrained(folder)  # as on the hub
    return folder


NAMES = [f"thing {i}" for i in range(80)]


@pytest.fixture(scope="module")
def detector(mask2former, clip):
    return evaluation.Detector(str(mask2former), str(clip), NAMES, "cpu")


# ------------------------------------------------------------------------------------------------------------ geneval


def enlarged(n: int, size: int) -> np.ndarray:
    """(size, n) weights of bilinear interpolation between n points."""
    weights = np.zeros((size, n))
    for i in range(size):
        x = min(max((i + 0.5) * n / size - 0.5, 0), n - 1)
        left = min(int(x), n - 2)
        weights[i, left], weights[i, left + 1] = left + 1 - x, x - left
    return weights


def test_detector_by_hand(detector, mask2former, tmp_path):
    image = Image.open(photo(tmp_path / "a.png", 0, (75, 50)))
    model = Mask2FormerForUniversalSegmentation.from_pretrained(mask2former).eval()
    pixels = Mask2FormerImageProcessorPil(size={"shortest_edge": 800, "longest_edge": 1333})(image, return_tensors="pt")
    with torch.inference_mode():
        out = model(**pixels)
    classes, small = (t[0].double().numpy() for t in (out.class_queries_logits, out.masks_queries_logits))
    expected = []
    for query in range(8):
        powers = np.exp(classes[query] - classes[query].max())
        mask = enlarged(small.shape[1], 50) @ small[query] @ enlarged(small.shape[2], 75).T
        rows, columns = np.nonzero(mask > 0)
        expected += [(powers[c] / powers.sum(), c, mask, rows, columns) for c in range(80)]
    expected = [e for e in sorted(expected, key=lambda e: -e[0])[:100] if len(e[3])]
    found = detector.objects(image)
    assert len(found) == len(expected) > 8 and len({d["class"] for d in found}) > 8
    for d, (p, c, mask, rows, columns) in zip(found, expected):
        assert d["class"] == f"thing {c}" and d["box"] == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        assert (d["mask"].numpy() == (mask > 0)).all()
        assert d["score"] == pytest.approx(p * np.mean(1 / (1 + np.exp(-mask[mask > 0]))), rel=1e-3)
    assert found[0]["score"] > 0.3


@pytest.mark.parametrize("size, pixels", [((75, 50), (800, 1216)), ((64, 64), (800, 800)), ((200, 50), (352, 1344))])
def test_detector_sees_large_images(detector, size, pixels):
    """Short side 800, long side at most 1333, both rounded up to a multiple of 32; not the saved 384 x 384."""
    seen = []
    hook = detector.model.register_forward_pre_hook(lambda model, args, given: seen.append(given["pixel_values"].shape),
                                                    with_kwargs=True)
    detector.objects(Image.new("RGB", size, "red"))
    hook.remove()
    assert seen == [(1, 3, *pixels)]
    assert dict(detector.processor.size) | {"shortest_edge": 800, "longest_edge": 1333} == dict(detector.processor.size)


def test_detector_color(detector, clip, monkeypatch):
    image, mask = Image.new("RGB", (40, 30), "blue"), torch.zeros(30, 40, dtype=torch.bool)
    mask[5:15, 10:30] = True
    mask[5, 10] = False
    seen, real = [], detector.clip.processor
    monkeypatch.setattr(detector.clip, "processor", lambda **given: seen.append(given) or real(**given))
    color = detector.color(image, {"class": "ring", "box": (8, 5, 30, 15), "mask": mask})
    cut = next(given["images"][0] for given in seen if "images" in given)
    assert cut.size == (22, 10)
    assert cut.getpixel((1, 4)) == cut.getpixel((2, 0)) == (0x99, 0x99, 0x99) and cut.getpixel((3, 0)) == (0, 0, 255)
    texts = [given["text"] for given in seen if "text" in given]
    assert [t[0].split()[-2] for t in texts] == rules.GENEVAL_COLORS
    assert texts[0] == ["a photo of a red ring", "a photo of a red-colored ring", "a photo of a red object"]
    model, processor = CLIPModel.from_pretrained(clip).eval(), CLIPProcessor.from_pretrained(clip)
    with torch.inference_mode():
        eye = model(**processor(text=sum(texts, []), images=cut, padding=True, return_tensors="pt"))
    prototypes = eye.text_embeds.view(10, 3, -1).mean(1)
    best = (prototypes / prototypes.norm(dim=-1, keepdim=True) @ eye.image_embeds[0]).argmax()
    assert color == rules.GENEVAL_COLORS[best]


DRAWING = ("--steps", 3, "--guidance", 1.5)


def geneval_data(folder, sure: str) -> list[dict]:
    records = [dict(tag="single_object", include=[{"class": sure, "count": 1}], prompt="a photo of a ring"),
               dict(tag="color_attr", prompt="a photo of a red ring and a blue square",
                    include=[{"class": sure, "count": 1, "color": "red"}, {"class": "thing 79", "count": 3, "color": "blue"}]),
               dict(tag="counting", include=[{"class": sure, "count": 1}], exclude=[{"class": sure, "count": 2}],
                    prompt="a photo of one ring")]
    put_lines(folder / "evaluation_metadata.jsonl", records)
    put(folder / "object_names.txt", "\n".join(NAMES) + "\n")
    return records


def drawn(base, name: str, id: str, text: str, count: int) -> list[Image.Image]:
    """The pictures that the checkpoint should draw."""
    model, vq = load(base)
    codes = draw_images(model, [text] * count, [seed_of(0, name, id, k) for k in range(count)], Drawing(3, 1.5))
    with torch.inference_mode():
        return to_pil(vq.decode(codes))


def same(a, b) -> bool:
    return np.array_equal(np.asarray(a), np.asarray(b))


def test_geneval(base, detector, mask2former, clip, tmp_path, monkeypatch):
    data, out = tmp_path / "data", tmp_path / "out"
    first = drawn(base, "geneval", "00000", "a photo of a ring", 4)
    sure = max(detector.objects(first[0]), key=lambda d: d["score"])["class"]
    records, more = geneval_data(data, sure), (*DRAWING, "--detector", mask2former, "--clip", clip)
    metrics = run(base, "geneval", data, out, *more)
    samples = sorted((out / "images").rglob("*.png"))
    assert [str(p.relative_to(out / "images")) for p in samples] == [
        f"{i:05d}/samples/{k:05d}.png" for i in range(3) for k in range(4)]
    assert all(same(a, Image.open(b)) for a, b in zip(first, samples, strict=False))
    expected = []
    for n, file in enumerate(samples):
        prompt, image = records[n // 4], Image.open(file).convert("RGB")
        assert lines(file.parent.parent / "metadata.jsonl") == [prompt]
        objects = rules.geneval_objects(detector.objects(image), prompt["tag"])
        for found in rules.geneval_colored(prompt, objects):
            found["color"] = detector.color(image, found)
        verdict = rules.geneval_check(prompt, objects)
        expected.append(dict(filename=str(file), tag=prompt["tag"], prompt=prompt["prompt"], **verdict))
    assert lines(out / "results.jsonl") == expected
    assert metrics == {"benchmark": "geneval", **rules.geneval_summary(
        [(records[n // 4], e["correct"]) for n, e in enumerate(expected)])}
    assert expected[0]["correct"] and not all(e["correct"] for e in expected) and metrics["images"] == 12
    before = files_of(out)
    monkeypatch.setattr(evaluation, "Detector", None)  # a call would fail
    run(base, "geneval", data, out, *more)
    assert files_of(out) == before


def test_geneval_keeps_images(base, mask2former, clip, tmp_path):
    """One picture of another model is there already; three are drawn, as if it were not."""
    data, out = tmp_path / "data", tmp_path / "out"
    put_lines(data / "evaluation_metadata.jsonl", geneval_data(data, "thing 0")[:1])
    kept = photo(out / "images" / "00000" / "samples" / "00001.png", 0)
    before = kept.read_bytes()
    run(base, "geneval", data, out, *DRAWING, "--detector", mask2former, "--clip", clip)
    assert kept.read_bytes() == before
    pictures = drawn(base, "geneval", "00000", "a photo of a ring", 4)
    assert all(same(pictures[k], Image.open(kept.with_name(f"{k:05d}.png"))) for k in (0, 2, 3))


@pytest.mark.parametrize("name", ["evaluation_metadata.jsonl", "object_names.txt"])
def test_geneval_missing_files(base, tmp_path, name):
    geneval_data(tmp_path / "data", "thing 0")
    (tmp_path / "data" / name).unlink()
    with pytest.raises(InputError, match=f"{name}: not found.*djghosh13/geneval"):
        run(base, "geneval", tmp_path / "data", tmp_path / "out")


# ---------------------------------------------------------------------------------------------------------------- dpg


def test_dpg(base, tmp_path, monkeypatch):
    data, out = tmp_path / "data", tmp_path / "out"
    save_blip(tmp_path / "blip")
    put(data / "prompts" / "7.txt", "a big red ring\n")
    put(data / "prompts" / "coco 8.txt", "a blue square")
    put(data / "dpg_bench.csv", """\
item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,question_natural_language
7,t,k,1,0,entity,whole,"entity - whole (ring)",is it?
7,t,k,2,1,attribute,color,"attribute - color (ring, red)",is it red?
coco 8,t,k,1,0,entity,whole,"entity - whole (square)",is it two?
coco 8,t,k,2,"1, 3",attribute,color,"attribute - color (square, blue)",what color is it?
coco 8,t,k,3,0,entity,whole,"entity - whole (x)",how many?
""")
    there = photo(out / "images" / "coco 8.png", 1, (60, 40))  # drawn by another model: scored as it is
    before = there.read_bytes()
    seen, looked, real = [], [], evaluation.ModelJudge.ask
    monkeypatch.setattr(evaluation.ModelJudge, "ask", lambda judge, crop, question: seen.append(crop) or real(judge, crop, question))
    metrics = run(base, "dpg", data, out, *DRAWING, "--vqa", tmp_path / "blip")
    assert there.read_bytes() == before and not (out / "crops" / "coco 8").exists()

    grid, pictures = Image.open(out / "images" / "7.png"), drawn(base, "dpg", "7", "a big red ring", 4)
    assert grid.size == (128, 128) and not same(pictures[0], pictures[1])
    for k, corner in enumerate([(0, 0), (64, 0), (0, 64), (64, 64)]):  # top left, top right, bottom left, bottom right
        crop = grid.crop((*corner, corner[0] + 64, corner[1] + 64))
        assert same(crop, pictures[k]) and same(crop, Image.open(out / "crops" / "7" / f"{k}.png"))

    model = BlipForQuestionAnswering.from_pretrained(tmp_path / "blip").eval()
    processor = BlipProcessor.from_pretrained(tmp_path / "blip")

    def ask(crop, question: str) -> str:
        looked.append(crop)
        ids = model.generate(**processor(crop, question, return_tensors="pt"), max_new_tokens=20)
        return processor.decode(ids[0], skip_special_tokens=True).strip()

    questions, expected = rules.read_dpg(data / "dpg_bench.csv"), {}
    for item, (w, h) in (("7", (64, 64)), ("coco 8", (30, 20))):
        picture = Image.open(out / "images" / f"{item}.png")
        crops = [picture.crop((x, y, x + w, y + h)) for x, y in ((0, 0), (w, 0), (0, h), (w, h))]
        expected[item] = [{str(q.number): ask(c, q.question) for q in questions if q.item == item} for c in crops]
    assert json.loads((out / "answers.json").read_text()) == expected
    assert len(seen) == len(looked) == 4 * 5 and all(same(a, b) for a, b in zip(seen, looked))
    answers = {item: [{int(n): a for n, a in crop.items()} for crop in crops] for item, crops in expected.items()}
    scores = rules.dpg_scores(questions, answers)
    for name in ("correct", "official-bug-compatible"):
        assert metrics[name] == {k: scores[name][k] for k in ("dpg_score", "L1", "L2")}
    assert metrics["judge"] == f"{tmp_path / 'blip'} (the official one is mPLUG-large)" and metrics["failed"] == []


@pytest.mark.parametrize("name", ["dpg_bench.csv", "prompts/7.txt"])
def test_dpg_missing_files(base, tmp_path, name):
    put(tmp_path / "prompts" / "7.txt", "a ring")
    put(tmp_path / "dpg_bench.csv", "item_id,proposition_id,dependency,tuple,question_natural_language\n"
                                    "7,1,0,entity - whole (ring),is it?\n")
    (tmp_path / name).unlink()
    with pytest.raises(InputError, match=name):
        run(base, "dpg", tmp_path, tmp_path / "out", *DRAWING)


# -------------------------------------------------------------------------------------------------- clipscore and fid


RECORDS = [dict(id="a", image="", caption="a big ring"), dict(id="b", image="", caption="no", prompt="red square " * 60),
           dict(id="c", image="", caption="a blue square")]


def test_clipscore(base, clip, tmp_path):
    put_lines(tmp_path / "records.jsonl", RECORDS)
    out = tmp_path / "out"
    there = photo(out / "images" / "c.png", 1)
    before = there.read_bytes()
    metrics = run(base, "clipscore", tmp_path / "records.jsonl", out, *DRAWING, "--clip", clip)
    assert there.read_bytes() == before
    assert same(Image.open(out / "images" / "a.png"), drawn(base, "clipscore", "a", "a big ring", 1)[0])
    model, processor = CLIPModel.from_pretrained(clip).eval(), CLIPProcessor.from_pretrained(clip)
    cosines = []
    for id, text in (("a", "a big ring"), ("b", "red square " * 60), ("c", "a blue square")):
        picture = Image.open(out / "images" / f"{id}.png").convert("RGB")
        for t in (text, "A photo depicts " + text):
            inputs = processor(text=t, images=picture, return_tensors="pt")
            ids = inputs["input_ids"][:, :77].clone()
            ids[0, -1] = 3  # the end, also of a text that was cut
            with torch.no_grad():
                logits = model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits_per_image
            cosines.append((logits / model.logit_scale.exp()).item())
    ours, papers = 2.5 * np.mean(np.maximum(cosines[1::2], 0)), 100 * np.mean(cosines[::2])
    assert metrics == {"benchmark": "clipscore", "CLIPScore (2.5 max(cos, 0), with prefix)": pytest.approx(ours, abs=1e-5),
                       "100 x cosine (no prefix, as in papers)": pytest.approx(papers, abs=1e-4)}
    assert len({round(c, 4) for c in cosines}) > 3


WEIGHTS, STATISTICS = "pt_inception-2015-12-05-6726825d.pth", "MS-COCO_val2014_fid_stats.npz"


def test_fid(base, tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    put_lines(data / "records.jsonl", RECORDS)
    torch.manual_seed(0)
    network = rules.Inception().eval()
    assert sum(p.numel() for p in network.parameters()) == 23_850_960
    for p in network.parameters():
        if p.ndim == 4:
            torch.nn.init.kaiming_normal_(p)
    weights = network.state_dict()  # the published file also has the counts of batches
    weights |= {k.replace("running_mean", "num_batches_tracked"): torch.tensor(0) for k in weights if "running_mean" in k}
    torch.save(weights, data / WEIGHTS)
    pictures = [drawn(base, "fid", r["id"], r.get("prompt", r["caption"]), 1)[0] for r in RECORDS]
    pixels = [np.asarray(p.resize((299, 299), Image.Resampling.BICUBIC), dtype=np.float32) / 127.5 - 1 for p in pictures]
    with torch.inference_mode():
        features = network(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)).double().numpy()
    mu, sigma = features.mean(0), np.cov(features.T)
    assert np.trace(sigma) > 0.1  # images differ
    np.savez(data / STATISTICS, mu=mu, sigma=sigma)
    metrics = run(base, "fid", data, out, *DRAWING)
    assert metrics == {"benchmark": "fid", "FID": pytest.approx(0, abs=1e-4 * np.trace(sigma)), "images": 3}
    shift = np.linspace(0, 1, 2048)
    torch.save({k: v for k, v in weights.items() if "num_batches" not in k}, data / WEIGHTS)  # works without them
    np.savez(data / STATISTICS, mu=mu + shift, sigma=sigma)
    metrics = run(base, "fid", data, out, *DRAWING, "--overwrite")
    assert metrics["FID"] == pytest.approx((shift**2).sum(), rel=1e-3)
    torch.save({**weights, "fc.weight": torch.zeros(1000, 2048)}, data / WEIGHTS)
    with pytest.raises(InputError, match=re.escape(f"{WEIGHTS}: parameters do not fit") + ".*fc.weight"):
        run(base, "fid", data, tmp_path / "wrong", *DRAWING)


@pytest.mark.parametrize("name", [STATISTICS, WEIGHTS])
def test_fid_missing_files(base, tmp_path, name):
    np.savez(tmp_path / STATISTICS, mu=np.zeros(2), sigma=np.eye(2))
    put(tmp_path / WEIGHTS, "not weights")
    (tmp_path / name).unlink()
    with pytest.raises(InputError, match=re.escape(name)):
        run(base, "fid", tmp_path, tmp_path / "out")


# ------------------------------------------------------------------------------------------------------------- report

NASTY = 'a <b>bold</b> & "quoted" ring'
SAFE = "a &lt;b&gt;bold&lt;/b&gt; &amp; &quot;quoted&quot; ring"


@pytest.fixture
def finished(tmp_path):
    """What run_selfplay.sh leaves behind after one round, as far as the report reads it."""
    folder = tmp_path / "toy run"
    questions = [Question("is it red?", ["yes", "no"], "yes", "color"),
                 Question("how many?", ["one", "two"], "two", "counting")]
    for name, right in (("base", [False, True]), ("round1", [True, True])):
        verdicts = [evaluation.Verdict(id, str(photo(tmp_path / "real.jpg", 0)), text, questions, "said", 0.25, ["yes", "two"],
                                       [True, True], ["no", "two"], right, all(right), [0])
                    for id, text in (("a", NASTY), ("b", "two blue squares"))]
        write_jsonl(folder / "eval" / name / "answers.jsonl", verdicts)
        for v in verdicts:
            photo(folder / "eval" / name / "images" / f"{v.id}.png", 1)
        put(folder / "eval" / name / "settings.json", {"judge": f"the judge of {name}"})
    pairs = [Pair(id, "", NASTY, "", [0], f"good {id} <i>", f"bad {id}", [0], [0], 0.875, 0.125, [0], [0], 0.75, 0.25, [],
                  ["is it <u>blue</u>?"]) for id in "xy"]
    write_jsonl(folder / "round1" / "pairs" / "pairs.jsonl", pairs)
    for side in ("real", "win", "lose"):  # of the first pair alone
        photo(folder / "round1" / "pairs" / "images" / f"x-{side}.png", 2)
    keys = [f"{name}_{side}" for name in ("loss", "nll", "accuracy", "win_change", "lose_change") for side in ("und", "gen")]
    put_lines(folder / "round1" / "train" / "train.jsonl", [dict(step=s, **{k: math.exp(-s) for k in keys}) for s in range(3)])
    put(folder / "round1" / "train" / "settings.json", {"lr": "<1e-3>"})
    return folder


def reported(folder, *more) -> str:
    main(evaluation, "--report", folder, *more)
    return (folder / "report.html").read_text(encoding="utf-8")


def test_report(finished):
    page = reported(finished)
    assert page.startswith("<!doctype html>") and "<title>HermesFlow: toy run</title>" in page
    assert not re.search(r"https?://|<script|<link|@import|url\(", page)
    images = re.findall(r"<img [^>]*>", page)
    assert len(images) == 2 * 3 + 3 and all('src="data:image/png;base64,' in i for i in images)
    for text in ("0.500 [0.500, 0.500]", "1.000 [1.000, 1.000]", "+0.500 [+0.500, +0.500]", "0.250 [0.250, 0.250]",  # numbers
                 "2 held-out records", "2 different texts", "base: 1/2", "round1: 2/2", "two blue squares",
                 "<td>color</td><td>2</td><td>1.000</td><td>1.000</td><td>0.000</td><td>1.000</td>",
                 "win 0.88", "lose 0.12", "win 0.75", "lose 0.25", "good x &lt;i&gt;", "bad x",
                 "is it &lt;u&gt;blue&lt;/u&gt;?", "nothing", "round1: training", "loss_und", "win_change_gen",
                 "the judge of base", "eval/round1", "&lt;1e-3&gt;"):
        assert text in page, text
    assert page.count(SAFE) == 2 and "<b>bold" not in page and "<i>" not in page and "<u>" not in page
    assert "good y" not in page  # a pair without pictures
    assert page.count("<svg") == page.count("</svg>") == 1 + 3


def test_report_shows_few(finished):
    assert "two blue squares" not in reported(finished, "--show", 1)


def test_report_without_rounds(finished):
    shutil.rmtree(finished / "round1")
    page = reported(finished)
    assert "Paired difference" not in page and page.count("<svg") == 1 and "round1: 2/2" not in page


def test_report_needs_the_base(finished):
    shutil.rmtree(finished / "eval" / "base")
    with pytest.raises(InputError, match="eval/base/answers.jsonl: missing"):
        reported(finished)


def test_report_refuses_other_records(finished):
    file = finished / "eval" / "round1" / "answers.jsonl"
    file.write_text(file.read_text().splitlines()[1] + "\n")
    with pytest.raises(InputError, match="round1.*other records"):
        reported(finished)
