"""04_eval.py --benchmark from files to files.

On tiny random models of the classes that are really used.
"""

import json
import math
import re
import shutil
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (BlipForQuestionAnswering, BlipProcessor, CLIPConfig,
                          CLIPImageProcessorPil, CLIPModel, CLIPProcessor, Mask2FormerConfig,
                          Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessorPil,
                          PreTrainedTokenizerFast, SwinConfig)
from transformers.models.mask2former import modeling_mask2former

from conftest import main, results_of, stage
from evals import (clipscore, dpg, flickr30k, geneval, gqa, inception, judges, mme, mmmu, pope,
                   tifa, vqav2)
from evals.detector import Detector, load_mask2former
from hermesflow.files import InputError
from hermesflow.pictures import load_image, to_pil
from hermesflow.sampling import stable_seed
from hermesflow.scoring import nearest_text
from model import ImageSampling, Model, TextRequest, load, save
from test_judges import TEMPLATE, save_blip, save_llava
from tiny import tiny_model

evaluation = stage("04_eval")
SHORT = "\nAnswer the question using a single word or phrase."


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny checkpoint that gives different answers; it draws 64 x 64 pixels."""
    folder = tmp_path_factory.mktemp("checkpoint") / "base"
    save(tiny_model(seed=5), folder)
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


def put_lines(path, records: list[dict]) -> None:
    put(path, "".join(json.dumps(r) + "\n" for r in records))


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(base, name: str, data, out, *more) -> dict:
    main(evaluation, "--benchmark", name, "--data", data, "--out", out, "--model", base,
         "--device", "cpu", *more)
    return json.loads((out / "metrics.json").read_text())


# ------------------------------------------------------------------------- understanding benchmarks
# Each function writes official files and returns the (image, prompt) pairs that the model must get,
# in order, and a function that checks the prediction files against the answers and returns the
# metrics. answer(image, prompt) is the model's own answer: some truths are made of it.


def pope_case(data, answer):
    splits = {}
    asked = []
    for k, split in enumerate(("random", "popular", "adversarial")):
        splits[split] = []
        for n, (thing, label) in enumerate([("ring", "yes"), ("square", "no")]):
            name = f"COCO_val2014_{n + 1 + k:012d}.jpg"
            text = f"Is there a {thing} in the image?"
            splits[split].append(dict(question_id=n + 1, image=name, text=text, label=label))
            asked.append((photo(data / "val2014" / name, n + k), text + SHORT))
        put_lines(data / f"coco_pope_{split}.json", splits[split])

    def check(out, answers):
        scores = {}
        for k, (split, questions) in enumerate(splits.items()):
            own = answers[2 * k : 2 * k + 2]
            assert lines(out / f"coco_pope_{split}_answers.jsonl") == [
                {"question_id": q["question_id"], "question": q["text"], "answer": a}
                for q, a in zip(questions, own)]
            scores[split] = pope.score(["yes", "no"], own)
        return {"mean": pope.mean_scores(scores), **scores}

    return asked, check


# tasks whose official folders keep images and texts apart
SPLIT_TASKS = ("artwork", "celebrity", "landmark", "posters", "scene")


def mme_case(data, answer):
    tasks = [*mme.TASKS["Perception"], *mme.TASKS["Cognition"]]
    asked = []
    for n, task in enumerate(tasks):
        images = "images" if task in SPLIT_TASKS else ""
        texts = "questions_answers_YN" if task in SPLIT_TASKS else ""
        file = photo(data / task / images / "0001.png", n % 3)
        put(data / task / texts / "0001.txt",
            f"Is it a {task}? Please answer yes or no.\tYes\n"
            "Is it red? Please answer yes or no.\tNo\n")
        asked += [(file, f"Is it a {task}?" + SHORT), (file, "Is it red?" + SHORT)]

    def check(out, answers):
        scores = {}
        for n, task in enumerate(tasks):
            one, two = answers[2 * n : 2 * n + 2]
            assert (out / "mme_results" / f"{task}.txt").read_text() == (
                f"0001.png\tIs it a {task}? Please answer yes or no.\tYes\t{one}\n"
                f"0001.png\tIs it red? Please answer yes or no.\tNo\t{two}\n")
            scores[task] = mme.task_score(["Yes", "No"], [one, two])
        return mme.total_scores(scores)

    return asked, check


def vqav2_case(data, answer, subset="val2014", public=True):
    asked = []
    questions = []
    for n, (i, text) in enumerate([(7, "What color is it?"), (7, "Is it big?"), (8, "How many?")]):
        name = f"COCO_{subset.replace('test-dev', 'test')}_{i:012d}.jpg"
        asked.append((photo(data / "images" / name, i), text + SHORT))
        questions.append(dict(image_id=i, question=text, question_id=10 * i + n))
    put(data / f"v2_OpenEnded_mscoco_{subset}_questions.json",
        dict(data_subtype=subset, questions=questions))
    truths = [[answer(*asked[0])] * 10,  # right
              ["yes"] * 10,  # wrong
              [answer(*asked[2])] * 2 + ["two"] * 8]  # 0.6
    kinds = ["other", "yes/no", "number"]
    annotations = []
    for q, kind, truth in zip(questions, kinds, truths):
        answers = [dict(answer=a) for a in truth]
        annotations.append(dict(question_id=q["question_id"], answer_type=kind, answers=answers))
    if public:
        put(data / f"v2_mscoco_{subset}_annotations.json", dict(annotations=annotations))

    def check(out, answers):
        assert json.loads((out / "vqa_results.json").read_text()) == [
            {"question_id": q["question_id"], "answer": vqav2.normalise(a)}
            for q, a in zip(questions, answers)]
        if not public:
            return {"answers": "none in DATA: predictions only"}
        known = [vqav2.Question(0, "", "", t, k) for t, k in zip(truths, kinds)]
        raw = {"overall of raw answers": vqav2.raw_score(known, answers)}
        return vqav2.score(known, answers) | raw

    return asked, check


def gqa_case(data, answer):
    texts = [f"Is the {t} left of the ring?" for t in ("square", "blue ring", "big square")]
    asked = []
    for i, text in enumerate(texts):
        asked.append((photo(data / "images" / f"n{i}.jpg", i), text + SHORT))
    truths = [answer(*asked[0]), "yes", "no"]
    questions = {}
    for i, (text, truth) in enumerate(zip(texts, truths)):
        questions[f"20{i}"] = dict(question=text, imageId=f"n{i}", answer=truth, isBalanced=i < 2)
    put(data / "testdev_balanced_questions.json", questions)

    def check(out, answers):
        assert json.loads((out / "testdev_balanced_predictions.json").read_text()) == [
            {"questionId": f"20{i}", "prediction": a.rstrip(".").lower()}
            for i, a in enumerate(answers)]
        known = [gqa.Question("", "", t, i < 2) for i, t in enumerate(truths)]
        return {"accuracy": gqa.score(known, answers)}

    return asked, check


MMMU_END = "Answer with the option's letter from the given choices directly."


def mmmu_case(data, answer):
    files = [photo(data / "images" / f"{i}.png", i) for i in range(3)]
    asked = [
        (files[0], f"<image 1> What is it?\n(A) ring\n(B) square\n\n{MMMU_END}"),
        (files[1], f"<image 1> or <image 2>?\n(A) red\n(B) blue\n(C) big\n\n{MMMU_END}"),
        (files[0], f"How many in <image 1>?{SHORT}"),
    ]
    subjects = ("Art", "Art_Theory", "Art")
    options = [["ring", "square"], ["red", "blue", "big"], []]
    truths = ["A", "B", answer(*asked[2])]
    records = []
    for i, (file, prompt) in enumerate(asked):
        records.append(dict(
            id=f"validation_{subjects[i]}_{i}",
            question=prompt.split("\n")[0],
            options=str(options[i]),
            answer=truths[i],
            image_1=f"images/{file.name}",
            image_2="images/2.png" if i == 1 else None,
            question_type="multiple-choice" if options[i] else "open",
        ))
    put_lines(data / "validation.jsonl", records)

    def check(out, answers):
        questions = mmmu.read(data / "validation.jsonl")
        predicted = mmmu.predictions(questions, answers)
        assert predicted[0] in "AB" and predicted[1] in "ABC" and predicted[2] == answers[2]
        ids = [q.id for q in questions]
        written = json.loads((out / "mmmu_predictions.json").read_text())
        assert written == dict(zip(ids, predicted))
        score = mmmu.score(questions, predicted)
        assert score["subjects"].keys() == {"Art", "Art_Theory"}
        return score

    return asked, check


def flickr30k_case(data, answer):
    prompt = "Provide a one-sentence caption for the provided image."
    asked = [(photo(data / "images" / f"{i}.jpg", i), prompt) for i in (5, 6, 7)]
    references = {}
    images = []
    for n, (file, _) in enumerate(asked):
        texts = [answer(file, prompt) + ".", f"a big ring {n} left of a square"]
        references[file.name] = texts
        sentences = [dict(raw=t) for t in texts]
        images.append(dict(filename=file.name, split="test", sentences=sentences))
    images.append(dict(filename="no.jpg", split="train", sentences=[]))
    put(data / "dataset_flickr30k.json", dict(images=images))

    def check(out, answers):
        captions = dict(zip(references, answers))
        assert json.loads((out / "flickr30k_captions.json").read_text()) == [
            {"image_id": name, "caption": a} for name, a in captions.items()]
        tokenised = {name: flickr30k.ptb_words(a) for name, a in captions.items()}
        tokenised_references = {}
        for name, texts in references.items():
            tokenised_references[name] = [flickr30k.ptb_words(t) for t in texts]
        score = flickr30k.cider_d(tokenised, tokenised_references)
        assert score["cider_d"] > 1
        return {"CIDEr-D x 100 (PTB tokeniser approximated)": 100 * score["cider_d"]}

    return asked, check


CASES = {"pope": pope_case, "mme": mme_case, "vqav2": vqav2_case, "gqa": gqa_case,
         "mmmu": mmmu_case, "flickr30k": flickr30k_case}
OFFICIAL = {"pope": "coco_pope_popular.json", "mme": "posters",
            "vqav2": "v2_OpenEnded_mscoco_val2014_questions.json",
            "gqa": "testdev_balanced_questions.json", "mmmu": "validation.jsonl",
            "flickr30k": "dataset_flickr30k.json"}
TOKENS = 6  # per answer


def answerer(base, tokens: int = TOKENS):
    """The checkpoint's answer to a prompt about one image, by direct calls."""
    model = load(base)

    def answer(file, prompt: str) -> str:
        codes = model.encode_image(load_image(file, 64)[None])
        generated = model.generate_text(codes, [TextRequest(0, prompt)], tokens)
        return model.decode_text(generated[0].ids).strip()

    return answer


@pytest.fixture(scope="module", params=CASES)
def understood(request, base, tmp_path_factory):
    """(name, DATA, OUT of a finished run, the expected answers, the check of prediction files)."""
    name = request.param
    folder = tmp_path_factory.mktemp(name)
    answer = answerer(base, 64 if name == "flickr30k" else TOKENS)  # captions may be longer
    asked, check = CASES[name](folder / "data", answer)
    run(base, name, folder / "data", folder / "out", "--batch", 3, "--max-new-tokens", TOKENS)
    return name, folder / "data", folder / "out", [answer(*a) for a in asked], check


def test_predictions_and_metrics(understood):
    name, _, out, answers, check = understood
    assert len(set(answers)) > 1  # the tiny model does not always answer the same
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics == {"benchmark": name, **check(out, answers)}
    assert not (out / "parts").exists()


def test_finished_runs_are_left_alone(understood, base, monkeypatch, capsys):
    name, data, out, *_ = understood
    before = results_of(out)
    monkeypatch.setattr(Model, "generate_text", None)  # a call would fail
    run(base, name, data, out, "--max-new-tokens", TOKENS)
    assert results_of(out) == before and f"| {name} " in capsys.readouterr().out
    with pytest.raises(InputError, match="other settings.*max-new-tokens 6 -> 7"):
        run(base, name, data, out, "--max-new-tokens", 7)


def test_answers_do_not_depend_on_the_batch(understood, base, tmp_path):
    name, data, out, *_ = understood
    run(base, name, data, tmp_path / "out", "--batch", 1, "--max-new-tokens", TOKENS)
    assert results_of(tmp_path / "out") == results_of(out)


def test_interrupted_runs_continue(understood, base, tmp_path, monkeypatch):
    name, data, out, answers, _ = understood
    sizes = []
    generate_text = Model.generate_text

    def cut(model, images, requests, *more):
        sizes.append(len(requests))
        if len(sizes) == 2:
            raise KeyboardInterrupt
        return generate_text(model, images, requests, *more)

    monkeypatch.setattr(Model, "generate_text", cut)
    more = ("--batch", 2, "--max-new-tokens", TOKENS)
    with pytest.raises(KeyboardInterrupt):
        run(base, name, data, tmp_path / "out", *more)
    assert not (tmp_path / "out" / "metrics.json").exists()
    run(base, name, data, tmp_path / "out", *more)
    assert sum(sizes) - sizes[1] == len(answers)  # nothing twice but the chunk that was cut
    assert results_of(tmp_path / "out") == results_of(out)


def test_missing_official_files(understood, base, tmp_path):
    name, data, *_ = understood
    shutil.copytree(data, tmp_path / "data")
    gone = tmp_path / "data" / OFFICIAL[name]
    if gone.is_dir():
        shutil.rmtree(gone)
    else:
        gone.unlink()
    patterns = {"vqav2": "v2_OpenEnded_mscoco_*_questions.json", "mmmu": "*.jsonl"}
    with pytest.raises(InputError, match=re.escape(patterns.get(name, OFFICIAL[name]))):
        run(base, name, tmp_path / "data", tmp_path / "out")


def test_missing_images(understood, base, tmp_path):
    name, data, *_ = understood
    shutil.copytree(data, tmp_path / "data")
    for gone in sorted(p for p in tmp_path.rglob("*") if p.suffix in (".jpg", ".png")):
        gone.unlink()
    asked = f"not found; expected here: (the image|an image of {name} .* are missing)"
    with pytest.raises(InputError, match=rf"\.(jpg|png): {asked}"):
        run(base, name, tmp_path / "data", tmp_path / "out")


def test_vqav2_test_split_gives_predictions_only(base, tmp_path):
    answer = answerer(base)
    data = tmp_path / "data"
    out = tmp_path / "out"
    asked, check = vqav2_case(data, answer, "test-dev2015", public=False)
    metrics = run(base, "vqav2", data, out, "--max-new-tokens", TOKENS)
    assert metrics == {"benchmark": "vqav2", **check(out, [answer(*a) for a in asked])}


def test_mmmu_question_without_an_image(base, tmp_path):
    mmmu_case(tmp_path / "data", lambda *_: "two")
    records = lines(tmp_path / "data" / "validation.jsonl")
    records[1].update(image_1=None, image_2=None)
    put_lines(tmp_path / "data" / "validation.jsonl", records)
    with pytest.raises(InputError, match="image_1|validation_Art_Theory_1"):
        run(base, "mmmu", tmp_path / "data", tmp_path / "out")


# ---------------------------------------------------------------------------------- tiny judges


def spread(model, by: float):
    """Random weights make all outputs alike; larger ones do not."""
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(by if p.ndim >= 2 else 1)
    return model.eval()


CLIP_WORDS = [*"<unk> <s> . </s> a photo of depicts A colored object big ring square".split(),
              *geneval.COLORS]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
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
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    spread(CLIPModel(config), 8).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def mask2former(tmp_path_factory):
    """80 labels, 8 queries; sure of its classes and masks."""
    folder = tmp_path_factory.mktemp("mask2former")
    swin = SwinConfig(embed_dim=4, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=7,
                      out_features=["stage1", "stage2", "stage3", "stage4"])
    config = Mask2FormerConfig(
        backbone_config=swin, num_labels=80, num_queries=8, feature_size=32, mask_feature_size=32,
        hidden_dim=32, encoder_feedforward_dim=16, dim_feedforward=16, encoder_layers=1,
        decoder_layers=2, num_attention_heads=2)
    torch.manual_seed(3)
    with patch.object(modeling_mask2former, "requires_backends"):  # scipy, for the training loss
        model = Mask2FormerForUniversalSegmentation(config).eval()
    with torch.no_grad():
        model.class_predictor.weight.mul_(30)
    model.save_pretrained(folder)
    # as on the hub
    Mask2FormerImageProcessorPil(size={"height": 384, "width": 384}).save_pretrained(folder)
    return folder


NAMES = [f"thing {i}" for i in range(80)]


@pytest.fixture(scope="module")
def detector(mask2former, clip):
    return Detector(str(mask2former), str(clip), NAMES, "cpu")


# ------------------------------------------------------------------------------------------ geneval


def enlarged(n: int, size: int) -> np.ndarray:
    """(size, n) weights of bilinear interpolation between n points."""
    weights = np.zeros((size, n))
    for i in range(size):
        x = min(max((i + 0.5) * n / size - 0.5, 0), n - 1)
        left = min(int(x), n - 2)
        weights[i, left] = left + 1 - x
        weights[i, left + 1] = x - left
    return weights


def bilinear(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    return enlarged(mask.shape[0], height) @ mask @ enlarged(mask.shape[1], width).T


def detections_by_hand(folder, image: Image.Image) -> list[tuple]:
    """(class probability, class, mask logits, rows, columns) in numpy, best first."""
    model = load_mask2former(folder)
    width, height = image.size
    scale = min(1333 / max(image.size), 800 / min(image.size))
    new_width = int(width * scale + 0.5)
    new_height = int(height * scale + 0.5)
    resized = image.resize((new_width, new_height), Image.Resampling.BILINEAR)
    mean = np.array([123.675, 116.28, 103.53])
    std = np.array([58.395, 57.12, 57.375])
    padded_height = math.ceil(new_height / 32) * 32
    padded_width = math.ceil(new_width / 32) * 32
    padded = np.zeros((padded_height, padded_width, 3), dtype=np.float32)
    padded[:new_height, :new_width] = (np.asarray(resized) - mean) / std
    with torch.inference_mode():
        out = model(torch.from_numpy(padded).permute(2, 0, 1)[None])
    classes = out.class_queries_logits[0].double().numpy()
    small = out.masks_queries_logits[0].double().numpy()
    detections = []
    for query in range(8):
        powers = np.exp(classes[query] - classes[query].max())
        # to the padded input, cropped, then to the image
        mask = bilinear(small[query], padded_height, padded_width)
        mask = bilinear(mask[:new_height, :new_width], height, width)
        rows, columns = np.nonzero(mask > 0)
        detections += [(powers[c] / powers.sum(), c, mask, rows, columns) for c in range(80)]
    detections = sorted(detections, key=lambda d: -d[0])[:100]
    return [d for d in detections if len(d[3])]


@pytest.mark.parametrize("size", [(75, 50), (50, 75), (64, 64)])
def test_detector_by_hand(detector, mask2former, tmp_path, size):
    image = Image.open(photo(tmp_path / "a.png", 0, size))
    expected = detections_by_hand(mask2former, image)
    detections = detector.objects(image)
    assert len(detections) == len(expected) > 8
    assert len({d["class"] for d in detections}) > 8
    for d, (p, c, mask, rows, columns) in zip(detections, expected):
        box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        assert d["class"] == f"thing {c}" and d["box"] == box
        assert (d["mask"].numpy() == (mask > 0)).all()
        inside = 1 / (1 + np.exp(-mask[mask > 0]))
        assert d["score"] == pytest.approx(p * np.mean(inside), rel=1e-3)
    assert detections[0]["score"] > 0.3


SEEN_SIZES = [((75, 50), (800, 1216)), ((64, 64), (800, 800)), ((200, 50), (352, 1344))]


@pytest.mark.parametrize("size, pixels", SEEN_SIZES)
def test_detector_sees_large_images(detector, size, pixels):
    """Short side 800, long side at most 1333, both rounded up to multiples of 32; not 384 x 384."""
    shapes = []

    def note_shape(model, positional, named):
        shapes.append(named["pixel_values"].shape)

    hook = detector.model.register_forward_pre_hook(note_shape, with_kwargs=True)
    detector.objects(Image.new("RGB", size, "red"))
    hook.remove()
    assert shapes == [(1, 3, *pixels)]
    size = dict(detector.processor.size)
    assert size | {"shortest_edge": 800, "longest_edge": 1333} == size


def test_detector_needs_no_scipy_and_leaves_transformers_alone(mask2former):
    check = modeling_mask2former.requires_backends
    load_mask2former(mask2former)
    assert modeling_mask2former.requires_backends is check


def test_detector_color(detector, clip, monkeypatch):
    image = Image.new("RGB", (40, 30), "blue")
    mask = torch.zeros(30, 40, dtype=torch.bool)
    mask[5:15, 10:30] = True
    mask[5, 10] = False
    inputs = []
    processor = detector.clip.processor

    def recorded(**given):
        inputs.append(given)
        return processor(**given)

    monkeypatch.setattr(detector.clip, "processor", recorded)
    color = detector.color(image, {"class": "ring", "box": (8, 5, 30, 15), "mask": mask})
    cut = next(given["images"][0] for given in inputs if "images" in given)
    grey = (0x99, 0x99, 0x99)
    assert cut.size == (22, 10)
    assert cut.getpixel((1, 4)) == cut.getpixel((2, 0)) == grey
    assert cut.getpixel((3, 0)) == (0, 0, 255)
    texts = [given["text"] for given in inputs if "text" in given]
    assert [t[0].split()[-2] for t in texts] == list(geneval.COLORS)
    assert texts[0] == ["a photo of a red ring", "a photo of a red-colored ring",
                        "a photo of a red object"]

    model = CLIPModel.from_pretrained(clip).eval()
    processor = CLIPProcessor.from_pretrained(clip)
    with torch.inference_mode():
        eye = model(**processor(text=sum(texts, []), images=cut, padding=True, return_tensors="pt"))
    prototypes = eye.text_embeds.view(10, 3, -1).mean(1)
    prototypes = prototypes / prototypes.norm(dim=-1, keepdim=True)
    assert color == geneval.COLORS[(prototypes @ eye.image_embeds[0]).argmax()]


DRAWING = ("--steps", 3, "--guidance", 1.5)


def geneval_data(folder, sure: str) -> list[dict]:
    """Three prompts about the class that the detector is sure of."""
    one = {"class": sure, "count": 1}
    three = {"class": "thing 79", "count": 3, "color": "blue"}
    records = [
        dict(tag="single_object", include=[one], prompt="a photo of a ring"),
        dict(tag="color_attr", include=[{**one, "color": "red"}, three],
             prompt="a photo of a red ring and a blue square"),
        dict(tag="counting", include=[one], exclude=[{"class": sure, "count": 2}],
             prompt="a photo of one ring"),
    ]
    put_lines(folder / "evaluation_metadata.jsonl", records)
    put(folder / "object_names.txt", "\n".join(NAMES) + "\n")
    return records


def drawn(base, name: str, id: str, text: str, count: int) -> list[Image.Image]:
    """The pictures that the checkpoint should draw."""
    model = load(base)
    seeds = [stable_seed(0, name, id, k) for k in range(count)]
    codes = model.generate_images([text] * count, seeds, ImageSampling(3, 1.5))
    return to_pil(model.decode_image(codes))


def same(a, b) -> bool:
    return np.array_equal(np.asarray(a), np.asarray(b))


def same_drawing(a, b) -> bool:
    """Equal but for rounding: the size of the batch changes the last digits of pixels."""
    difference = np.asarray(a, dtype=int) - np.asarray(b, dtype=int)
    return abs(difference).max() <= 1


def geneval_result(detector, prompt: dict, file: Path) -> dict:
    """The expected line of results.jsonl."""
    image = Image.open(file).convert("RGB")
    objects = geneval.kept_objects(detector.objects(image), prompt["tag"])
    for detection in geneval.colored_objects(prompt, objects):
        detection["color"] = detector.color(image, detection)
    result = geneval.check_image(prompt, objects)
    return dict(filename=str(file), tag=prompt["tag"], prompt=prompt["prompt"], **result,
                metadata=json.dumps(prompt))


def test_geneval(base, detector, mask2former, clip, tmp_path, monkeypatch):
    data = tmp_path / "data"
    out = tmp_path / "out"
    first = drawn(base, "geneval", "00000", "a photo of a ring", 4)
    sure = max(detector.objects(first[0]), key=lambda d: d["score"])["class"]
    records = geneval_data(data, sure)
    more = (*DRAWING, "--detector", mask2former, "--clip", clip)
    metrics = run(base, "geneval", data, out, *more)

    samples = sorted((out / "images").rglob("*.png"))
    assert len(samples) == 12
    for n, file in enumerate(samples):
        place = f"{n // 4:05d}/samples/{n % 4:05d}.png"
        assert str(file.relative_to(out / "images")) == place
        assert lines(file.parent.parent / "metadata.jsonl") == [records[n // 4]]
    assert all(same_drawing(a, Image.open(b)) for a, b in zip(first, samples, strict=False))

    expected = [geneval_result(detector, records[n // 4], f) for n, f in enumerate(samples)]
    assert lines(out / "results.jsonl") == expected
    results = [(records[n // 4], e["correct"]) for n, e in enumerate(expected)]
    assert metrics == {"benchmark": "geneval", **geneval.summary(results)}
    assert expected[0]["correct"] and not all(e["correct"] for e in expected)
    assert metrics["images"] == 12

    before = results_of(out)
    monkeypatch.setattr(geneval, "Detector", None)  # a call would fail
    run(base, "geneval", data, out, *more)
    assert results_of(out) == before


def test_geneval_keeps_images(base, mask2former, clip, tmp_path):
    """One picture of another model is there already; three are drawn, as if it were not."""
    data = tmp_path / "data"
    out = tmp_path / "out"
    put_lines(data / "evaluation_metadata.jsonl", geneval_data(data, "thing 0")[:1])
    kept = photo(out / "images" / "00000" / "samples" / "00001.png", 0)
    before = kept.read_bytes()
    run(base, "geneval", data, out, *DRAWING, "--detector", mask2former, "--clip", clip)
    assert kept.read_bytes() == before
    pictures = drawn(base, "geneval", "00000", "a photo of a ring", 4)
    for k in (0, 2, 3):
        assert same_drawing(pictures[k], Image.open(kept.with_name(f"{k:05d}.png")))


@pytest.mark.parametrize("name", ["evaluation_metadata.jsonl", "object_names.txt"])
def test_geneval_missing_files(base, mask2former, clip, tmp_path, name):
    geneval_data(tmp_path / "data", "thing 0")
    (tmp_path / "data" / name).unlink()
    with pytest.raises(InputError, match=f"{name}: not found.*djghosh13/geneval"):
        run(base, "geneval", tmp_path / "data", tmp_path / "out", "--detector", mask2former,
            "--clip", clip)


# ---------------------------------------------------------------------------------------------- dpg

DPG_BENCH = """\
item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,\
question_natural_language
7,t,k,1,0,entity,whole,"entity - whole (ring)",is it?
7,t,k,2,1,attribute,color,"attribute - color (ring, red)",is it red?
coco 8,t,k,1,0,entity,whole,"entity - whole (square)",is it two?
coco 8,t,k,2,"1, 3",attribute,color,"attribute - color (square, blue)",what color is it?
coco 8,t,k,3,0,entity,whole,"entity - whole (x)",how many?
"""


def blip_answerer(folder):
    """BLIP's answer to a plain question, by direct calls."""
    model = BlipForQuestionAnswering.from_pretrained(folder).eval()
    processor = BlipProcessor.from_pretrained(folder)

    def answer(picture, question: str) -> str:
        inputs = processor(picture, question, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=20)
        return processor.decode(ids[0], skip_special_tokens=True).strip()

    return answer


def test_dpg(base, tmp_path, monkeypatch):
    data = tmp_path / "data"
    out = tmp_path / "out"
    blip = tmp_path / "blip"
    save_blip(blip)
    put(data / "prompts" / "7.txt", "a big red ring\n")
    put(data / "prompts" / "coco 8.txt", "a blue square")
    put(data / "dpg_bench.csv", DPG_BENCH)
    # drawn by another model: scored as it is
    there = photo(out / "images" / "coco 8.png", 1, (60, 40))
    before = there.read_bytes()
    judged = []
    vqa_answers = judges.ModelJudge.vqa_answers

    def recorded(judge, crop, questions):
        judged.extend([crop] * len(questions))
        return vqa_answers(judge, crop, questions)

    monkeypatch.setattr(judges.ModelJudge, "vqa_answers", recorded)
    metrics = run(base, "dpg", data, out, *DRAWING, "--vqa", blip)
    assert there.read_bytes() == before and not (out / "crops" / "coco 8").exists()

    grid = Image.open(out / "images" / "7.png")
    pictures = drawn(base, "dpg", "7", "a big red ring", 4)
    assert grid.size == (128, 128) and not same(pictures[0], pictures[1])
    # top left, top right, bottom left, bottom right
    for k, (x, y) in enumerate([(0, 0), (64, 0), (0, 64), (64, 64)]):
        crop = grid.crop((x, y, x + 64, y + 64))
        assert same_drawing(crop, pictures[k])
        assert same(crop, Image.open(out / "crops" / "7" / f"{k}.png"))

    answer = blip_answerer(blip)
    questions = dpg.read(data / "dpg_bench.csv")
    expected = {}
    crops = []
    for item, (w, h) in (("7", (64, 64)), ("coco 8", (30, 20))):
        picture = Image.open(out / "images" / f"{item}.png")
        expected[item] = []
        for x, y in ((0, 0), (w, 0), (0, h), (w, h)):
            crop = picture.crop((x, y, x + w, y + h))
            own = [q for q in questions if q.item == item]
            expected[item].append({q.number: answer(crop, q.question) for q in own})
            crops += [crop] * len(own)
    written = json.loads((out / "answers.json").read_text())
    assert written == json.loads(json.dumps(expected))  # JSON's keys are texts
    assert len(judged) == len(crops) == 4 * 5
    assert all(same(a, b) for a, b in zip(judged, crops))

    scores = dpg.both_scores(questions, expected)
    for name in ("correct", "official-bug-compatible"):
        kept = {k: scores[name][k] for k in ("dpg_score", "L1", "L2", "failed")}
        assert metrics[name] == {**kept, "failed_count": len(kept["failed"])}
    assert metrics["judge"] == f"{blip} (the official one is mPLUG-large)"
    assert metrics["correct"]["failed"] == []
    # without the first row, the parent of item 7's other question is missing
    assert metrics["official-bug-compatible"]["failed"] == ["7"]
    assert metrics["official-bug-compatible"]["failed_count"] == 1


def small_dpg(data, prompt="a ring") -> None:
    put(data / "prompts" / "7.txt", prompt)
    put(data / "dpg_bench.csv",
        "item_id,proposition_id,dependency,tuple,question_natural_language\n"
        "7,1,0,entity - whole (ring),is it?\n")


def test_dpg_needs_a_vqa_model(tmp_path):
    """Said before anything is drawn: a call of `draw` would fail."""
    save_llava(tmp_path / "llava", TEMPLATE)
    small_dpg(tmp_path)
    names = judges.ModelNames("", None, str(tmp_path / "llava"))
    with pytest.raises(InputError, match=r"llava: DPG-Bench needs a VQA model"):
        dpg.run(tmp_path, tmp_path / "out", None, "cpu", names)


def test_dpg_blank_prompt(base, tmp_path):
    save_blip(tmp_path / "blip")
    small_dpg(tmp_path / "data", prompt=" \n")
    with pytest.raises(InputError, match=r"prompts/7.txt: is empty"):
        run(base, "dpg", tmp_path / "data", tmp_path / "out", *DRAWING, "--vqa", tmp_path / "blip")


@pytest.mark.parametrize("name", ["dpg_bench.csv", "prompts/7.txt"])
def test_dpg_missing_files(base, tmp_path, name):
    data = tmp_path / "data"
    blip = tmp_path / "blip"
    save_blip(blip)
    small_dpg(data)
    (data / name).unlink()
    with pytest.raises(InputError, match=name):
        run(base, "dpg", data, tmp_path / "out", *DRAWING, "--vqa", blip)


# --------------------------------------------------------------------------------------------- tifa

TIFA = [
    ("r1", "a big red ring", "what color is it?", ["red", "blue"], "red", "color"),
    ("s 2", "a blue square", "how many?", ["two", "red"], "two", "counting"),
    ("r1", "a big red ring", "is it red?", ["yes", "no"], "yes", "color"),
]


def tifa_data(folder) -> None:
    fields = ("id", "caption", "question", "choices", "answer", "element_type")
    records = [dict(zip(fields, values)) for values in TIFA]
    put(folder / "tifa_v1.0_question_answers.json", records)


def tifa_scores(answered: list[dict]) -> dict:
    """The scores of the choices in answers.json, whose captions stand together."""
    questions = [tifa.TifaQuestion(*TIFA[n]) for n in (0, 2, 1)]
    scores = tifa.score(questions, [line["choice"] for line in answered])
    return {k: scores[k] for k in ("tifa_average", "tifa_stdev", "accuracy_by_type")}


def test_tifa(base, tmp_path, capsys):
    """Captions are drawn once; a VQA model answers, the nearest choice counts."""
    data = tmp_path / "data"
    out = tmp_path / "out"
    blip = tmp_path / "blip"
    save_blip(blip)
    tifa_data(data)
    metrics = run(base, "tifa", data, out, *DRAWING, "--judge", blip)
    first, *_ = capsys.readouterr().out.splitlines()
    assert first == f"evaluating {base} on benchmark tifa of {data}"
    files = sorted(p.name for p in (out / "images").iterdir())
    assert files == ["r1.png", "s 2.png"]
    pictures = {}
    for id, text in (("r1", "a big red ring"), ("s 2", "a blue square")):
        pictures[id] = Image.open(out / "images" / f"{id}.png")
        assert same_drawing(drawn(base, "tifa", id, text, 1)[0], pictures[id])

    answer = blip_answerer(blip)
    expected = []
    for id, _, question, choices, _, _ in (TIFA[n] for n in (0, 2, 1)):
        text = answer(pictures[id], question)
        choice = nearest_text(text, choices)
        expected.append(dict(id=id, question=question, answer=text, choice=choice))
    answered = json.loads((out / "answers.json").read_text())
    assert answered == expected
    assert metrics == {"benchmark": "tifa", **tifa_scores(answered)}
    assert not (out / "parts").exists()


def test_tifa_by_the_policy_itself(base, tmp_path):
    """--judge self, also about a picture of another model and size."""
    data = tmp_path / "data"
    out = tmp_path / "out"
    tifa_data(data)
    there = photo(out / "images" / "s 2.png", 1)
    before = there.read_bytes()
    metrics = run(base, "tifa", data, out, *DRAWING, "--judge", "self", "--max-new-tokens", TOKENS)
    assert there.read_bytes() == before
    answered = json.loads((out / "answers.json").read_text())
    assert [(line["id"], line["question"]) for line in answered] == [
        (TIFA[n][0], TIFA[n][2]) for n in (0, 2, 1)]
    assert metrics == {"benchmark": "tifa", **tifa_scores(answered)}


def test_tifa_refuses_the_toy_judge(base, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(base, "tifa", tmp_path, tmp_path / "out")
    assert "--judge" in capsys.readouterr().err.splitlines()[-1]


def test_tifa_missing_file(base, tmp_path):
    with pytest.raises(InputError, match="tifa_v1.0_question_answers.json: not found"):
        (tmp_path / "data").mkdir()
        run(base, "tifa", tmp_path / "data", tmp_path / "out", "--judge", "self")


# -------------------------------------------------------------------------------- clipscore and fid

RECORDS = [dict(id="a", image="", caption="a big ring"),
           dict(id="b", image="", caption="no", prompt="red square " * 60),
           dict(id="c", image="", caption="a blue square")]


def cosine_by_hand(model, processor, picture: Image.Image, text: str) -> float:
    inputs = processor(text=text, images=picture, return_tensors="pt")
    ids = inputs["input_ids"][:, :77].clone()
    ids[0, -1] = 3  # the end, also of a text that was cut
    with torch.no_grad():
        out = model(input_ids=ids, pixel_values=inputs["pixel_values"])
    return (out.logits_per_image / model.logit_scale.exp()).item()


def test_clipscore(base, clip, tmp_path):
    put_lines(tmp_path / "records.jsonl", RECORDS)
    out = tmp_path / "out"
    there = photo(out / "images" / "c.png", 1)
    before = there.read_bytes()
    metrics = run(base, "clipscore", tmp_path / "records.jsonl", out, *DRAWING, "--clip", clip)
    assert there.read_bytes() == before
    own = drawn(base, "clipscore", "a", "a big ring", 1)[0]
    assert same_drawing(Image.open(out / "images" / "a.png"), own)

    model = CLIPModel.from_pretrained(clip).eval()
    processor = CLIPProcessor.from_pretrained(clip)
    plain = []
    prefixed = []
    for id, text in (("a", "a big ring"), ("b", "red square " * 60), ("c", "a blue square")):
        picture = Image.open(out / "images" / f"{id}.png").convert("RGB")
        plain.append(cosine_by_hand(model, processor, picture, text))
        prefixed.append(cosine_by_hand(model, processor, picture, "A photo depicts " + text))
    score = 2.5 * np.mean(np.maximum(prefixed, 0))
    papers = 100 * np.mean(plain)
    assert metrics == {
        "benchmark": "clipscore",
        "CLIPScore (2.5 max(cos, 0), with prefix)": pytest.approx(score, abs=1e-5),
        "100 x cosine (no prefix, as in papers)": pytest.approx(papers, abs=1e-4),
    }
    assert len({round(c, 4) for c in plain + prefixed}) > 3
    assert clipscore.PREFIX == "A photo depicts "


WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"
STATISTICS = "MS-COCO_val2014_fid_stats.npz"


def random_inception() -> inception.Inception:
    """The full network with random weights whose features differ between images."""
    torch.manual_seed(0)
    network = inception.Inception().eval()
    for p in network.parameters():
        if p.ndim == 4:
            torch.nn.init.kaiming_normal_(p)
    return network


def inception_features(network, pictures: list[Image.Image]) -> np.ndarray:
    pixels = []
    for p in pictures:
        resized = p.resize((299, 299), Image.Resampling.BICUBIC)
        pixels.append(np.asarray(resized, dtype=np.float32) / 127.5 - 1)
    batch = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
    with torch.inference_mode():
        return network(batch).double().numpy()


def test_fid(base, tmp_path):
    data = tmp_path / "data"
    out = tmp_path / "out"
    put_lines(data / "records.jsonl", RECORDS)
    network = random_inception()
    assert sum(p.numel() for p in network.parameters()) == 23_850_960
    # the published file also has the counts of batches
    weights = network.state_dict()
    for name in [k for k in weights if "running_mean" in k]:
        weights[name.replace("running_mean", "num_batches_tracked")] = torch.tensor(0)
    torch.save(weights, data / WEIGHTS)
    texts = {r["id"]: r.get("prompt", r["caption"]) for r in RECORDS}
    pictures = [drawn(base, "fid", id, text, 1)[0] for id, text in texts.items()]
    features = inception_features(network, pictures)
    mu = features.mean(0)
    sigma = np.cov(features.T)
    assert np.trace(sigma) > 0.1  # images differ
    np.savez(data / STATISTICS, mu=mu, sigma=sigma)
    metrics = run(base, "fid", data, out, *DRAWING)
    zero = pytest.approx(0, abs=1e-4 * np.trace(sigma))
    assert metrics == {"benchmark": "fid", "FID": zero, "images": 3}

    # works without the counts
    shift = np.linspace(0, 1, 2048)
    without = {k: v for k, v in weights.items() if "num_batches" not in k}
    torch.save(without, data / WEIGHTS)
    np.savez(data / STATISTICS, mu=mu + shift, sigma=sigma)
    metrics = run(base, "fid", data, out, *DRAWING, "--overwrite")
    assert metrics["FID"] == pytest.approx((shift**2).sum(), rel=1e-3)

    torch.save({**weights, "fc.weight": torch.zeros(1000, 2048)}, data / WEIGHTS)
    message = re.escape(f"{WEIGHTS}: parameters do not fit") + ".*fc.weight"
    with pytest.raises(InputError, match=message):
        run(base, "fid", data, tmp_path / "wrong", *DRAWING)


@pytest.mark.parametrize("name", [STATISTICS, WEIGHTS])
def test_fid_missing_files(base, tmp_path, name):
    data = tmp_path / "data"
    put(data / WEIGHTS, "not weights")
    np.savez(data / STATISTICS, mu=np.zeros(2), sigma=np.eye(2))
    (data / name).unlink()
    with pytest.raises(InputError, match=re.escape(name)):
        run(base, "fid", data, tmp_path / "out")
