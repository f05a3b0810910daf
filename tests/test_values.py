"""Right values in cases that people meet: answers, captions, prompts, files, pictures."""

import io
import json
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, PngImagePlugin

from conftest import stage
from evals.official import read_picture
from hermesflow.files import InputError
from hermesflow.inputs import read_records
from hermesflow.pictures import load_image
from hermesflow.questions import parse_questions
from hermesflow.records import Question, Sample, check_question
from hermesflow.sampling import maskgit_decode, sample_tokens
from hermesflow.options import ImageSampling
from hermesflow.scoring import NOTHING, answer_matcher, are_right, meanings, nearest_text
from model import TextBatch
from tiny import tiny_model

# ------------------------------------------------------------------------------------------ answers


@pytest.mark.parametrize("answer,choices,meant", [
    ("", ["red", "blue"], NOTHING),
    ("...", ["red", "blue"], NOTHING),
    ("zzz", ["red", "blue"], NOTHING),
    ("5", ["red", "blue"], NOTHING),
    ("rad", ["red", "blue"], NOTHING),
    ("12", ["1", "2"], NOTHING),
    ("1", ["12", "1"], "1"),
    ("two", ["1", "2"], "2"),
    ("2 rings", ["one ring", "two rings"], "two rings"),
    ("Yes.", ["yes", "no"], "yes"),
    ("it is red", ["blue", "red"], "red"),
    ("the red ring", ["ring", "red ring"], "red ring"),
    ("-1", ["1", "2"], NOTHING), ("−1", ["1", "-1"], "-1"), ("1.5", ["1", "5"], NOTHING),
    ("1,000", ["1", "10"], NOTHING), ("1/2", ["1", "2"], NOTHING), ("twelve", ["12", "2"], "12"),
    ("it is 1.", ["1", "2"], "1"), ("10-12", ["10", "2"], "10"),  # a range names its ends
    ("?", ["!", "?"], "?"),  # a choice without a word matches itself
])
def test_an_answer_means_a_choice_with_its_words_or_nothing(answer, choices, meant):
    assert nearest_text(answer, choices) == meant
    assert nearest_text(answer, choices[::-1]) == meant


def test_an_answer_that_means_nothing_is_wrong():
    questions = [Question("what color?", ["red", "blue"], "red"), Question("?", ["1", "2"], "1")]
    match = answer_matcher("text", "cpu")
    for answers, right in ((["", "12"], [False, False]), (["red", "one"], [True, True])):
        assert are_right(meanings(answers, questions, match), questions) == right
    assert meanings(["zzz", "2"], questions, match) == [NOTHING, "2"]


def test_choices_compare_as_words():
    """TIFA's "A: Yes" is the choice "yes", and no third one."""
    text = "About ring (object):\nQ: is there a ring?\nChoices: yes, no\nA: Yes"
    assert parse_questions(text) == [Question("is there a ring?", ["yes", "no"], "yes", "ring")]
    text = "About ring (object):\nQ: what is it?\nChoices: ring, cross\nA: square"
    assert parse_questions(text)[0].choices == ["ring", "cross", "square"]
    question = Question("is there a ring?", ["yes", "no"], "Yes")
    check_question(question, "here")
    assert question.answer == "yes"
    with pytest.raises(InputError, match="field 'choices' holds an empty one"):
        check_question(Question("is there a ring?", ["yes", " "], "yes"), "here")


def test_records_without_questions_leave_the_others_alone(monkeypatch):
    """In one batch: each record has the answers about its own images, however many it has."""
    score = stage("02_score")
    counts = {"a": 2, "b": 3, "c": 1}
    samples = [Sample(id, "", "ring", questions=[Question(f"{id}?", ["yes", "no"], "yes")] * n,
                      captions=["ring"], ended=[True]) for id, n in (("a", 1), ("b", 0), ("c", 2))]
    monkeypatch.setattr(score, "sample_tensors",
                        lambda s: {"images": torch.full((counts[s.id], 4), ord(s.id))})

    def answer(model, images, questions, max_new_tokens):
        return [[q.question + chr(int(image[0])) for q in asked]
                for image, asked in zip(images, questions)]

    monkeypatch.setattr(score, "answer_questions", answer)
    scores = score.score_records(SimpleNamespace(device="cpu"), samples, lambda c, t: [1.0],
                                 nearest_text, False, False, 4)
    assert [s.answers for s in scores] == [[["a?a"]] * 2, [[]] * 3, [["c?c"] * 2]]
    assert [len(s.image_scores) for s in scores] == [2, 0, 1]


# ----------------------------------------------------------------------------------- captions, prompts


def test_a_cut_caption_has_no_end_label():
    """Its log-prob is the sum over its tokens; of a whole one, over <|eot|>, too."""
    model = tiny_model()
    images = torch.zeros(1, 16, dtype=torch.long)
    ids = model.encode_text("a big red ring")
    und = model.net(model.pack_text(TextBatch(images, ["what?"], [[ids, ids]], [[True, False]])))[0]
    sums, counts = und[0][0, 1:], und[1][0, 1:]
    assert counts.tolist() == [5, 4]

    # the plain path: every token behind those before it
    tokens = model.tokens
    prompt = [*tokens.mmu_prompt([0] * 16), *tokens.text_prompt("what?")]
    expected = []
    for length, label in enumerate([*ids, tokens.eot]):
        row = torch.tensor([prompt + ids[:length]])
        mask = torch.ones(len(row[0]), len(row[0])).tril().bool()
        mask[:19, :19] = True  # <|mmu|> <|soi|> codes <|eoi|> see one another
        positions = torch.arange(len(row[0]))[None]
        hidden = model.net.hidden(row, positions, mask=mask[None, None])
        logits = model.net.showo.lm_head(hidden[0, -1])
        expected.append(logits.log_softmax(-1)[label].item())
    assert torch.allclose(sums, torch.tensor([sum(expected), sum(expected[:4])]), atol=1e-4)
    whole = model.net(model.pack_text(TextBatch(images, ["what?"], [[ids]])))[0]
    assert whole[1][0, 1] == 5  # without a word of it, all have ended


def test_a_prompt_beyond_the_window_is_known_to_be_cut():
    model = tiny_model()
    fits = " ".join(["ring"] * (model.longest_prompt - 3))
    assert model.prompt_length(fits) == model.longest_prompt == len(model.tokens.t2i_prompt(fits))
    longer = fits + " red"
    assert model.prompt_length(longer) == model.longest_prompt + 1
    assert len(model.tokens.t2i_prompt(longer)) == model.longest_prompt


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_stop(value):
    logits = torch.zeros(2, 8)
    logits[1, 3] = value
    with pytest.raises(InputError, match="NaN or infinite logits"):
        sample_tokens(logits, torch.tensor([1, 1]), torch.ones(2), torch.ones(2))
    broken = torch.zeros(4, 8)
    broken[2, 3] = value
    with pytest.raises(InputError, match="NaN or infinite logits"):
        maskgit_decode(lambda codes, guidance: broken, (1, 4), None, ImageSampling(steps=2), "cpu")


# ---------------------------------------------------------------------------------- the original's files

RECORD = {"id": 7, "img_path": "a.png", "caption": "a ring", "prompt": "ring, trending, 8k --v 4"}


@pytest.mark.parametrize("text", [
    "{0},\n{1},\n",  # as the original's programs append them
    "{0},\n{1}",
    "[{0}, {1}]",
    "[{0},\n{1},\n]",
    "[\n{0}\n,{1},]\n",
])
def test_the_originals_files_as_its_programs_write_them(tmp_path, text):
    path = tmp_path / "initial_data.json"
    values = [json.dumps(RECORD | {"id": i}) for i in (7, 8)]
    path.write_text(text.replace("{0}", values[0]).replace("{1}", values[1]))
    records = read_records(path)
    assert [(r.id, r.caption) for r in records] == [("7", "a ring"), ("8", "a ring")]
    question = {"id": 8, "question": "is it?", "choices": ["yes", "no"], "answer": "yes"}
    (tmp_path / "vqa_data.json").write_text(json.dumps(question) + ",\n")
    asked = read_records(path, tmp_path / "vqa_data.json")
    assert [len(r.questions) for r in asked] == [0, 1]


@pytest.mark.parametrize("text", ["[{}, {", "{} {} x", "nonsense", "[1, 2", '{"a": 1}} '])
def test_other_text_is_no_array(tmp_path, text):
    path = tmp_path / "initial_data.json"
    path.write_text(text)
    with pytest.raises(InputError, match="initial_data.json"):
        read_records(path)


def test_the_original_draws_the_caption(tmp_path):
    """Its `prompt` is what another model made the image from; ours is a deliberate choice."""
    (tmp_path / "initial_data.json").write_text(json.dumps([RECORD]))
    assert read_records(tmp_path / "initial_data.json")[0].drawing_text == "a ring"
    ours = {"id": "7", "image": "a.png", "caption": "a ring", "prompt": "a big ring"}
    (tmp_path / "records.jsonl").write_text(json.dumps(ours) + "\n")
    assert read_records(tmp_path / "records.jsonl")[0].drawing_text == "a big ring"


# ----------------------------------------------------------------------------------------- pictures


def value_of(path) -> list[float]:
    """The colour in the centre, 0 to 255."""
    pixels = load_image(path, 16)
    return [round(float(v), 1) for v in (pixels[:, 8, 8] + 1) * 127.5]


def test_broken_exif_is_no_rotation(tmp_path):
    picture = Image.new("RGB", (20, 30), (10, 200, 30))
    chunk = PngImagePlugin.PngInfo()
    chunk.add(b"eXIf", b"II*\0\x08\0\0\0\xff\xff broken")
    picture.save(tmp_path / "a.png", pnginfo=chunk)
    assert value_of(tmp_path / "a.png") == [10, 200, 30]
    picture.save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff broken", quality=100)
    assert np.allclose(value_of(tmp_path / "a.jpg"), [10, 200, 30], atol=3)


def test_pillow_warns_of_nothing(tmp_path, recwarn):
    """About pictures that can be read: broken EXIF, transparency of a palette, many pixels."""
    warnings.simplefilter("always")
    picture = Image.new("RGB", (20, 30), (10, 200, 30))
    cut = Image.Exif()
    cut[0x0112] = 1
    cut[0x010E] = "a description that is cut"
    picture.save(tmp_path / "exif.jpg", exif=cut.tobytes()[:-12], quality=100)
    picture.convert("P").save(tmp_path / "palette.png", transparency=bytes(range(9)))
    Image.new("1", (9600, 9600)).save(tmp_path / "large.png")
    with pytest.warns(UserWarning, match="Truncated File Read"):
        Image.open(tmp_path / "exif.jpg").getexif()
    with pytest.warns(UserWarning, match="Palette images with Transparency"):
        Image.open(tmp_path / "palette.png").convert("RGB")
    with pytest.warns(Image.DecompressionBombWarning):
        Image.open(tmp_path / "large.png")
    recwarn.clear()
    assert np.allclose(value_of(tmp_path / "exif.jpg"), [10, 200, 30], atol=3)
    assert load_image(tmp_path / "palette.png", 16).shape == (3, 16, 16)
    assert value_of(tmp_path / "large.png") == [0, 0, 0]
    for name in ("exif.jpg", "palette.png", "large.png"):
        read_picture(tmp_path / name, upright=True)
    assert recwarn.list == []


def test_sixteen_bits_are_scaled_and_thirty_two_refused(tmp_path):
    grey = np.full((16, 16), 0x8000, np.uint16)
    Image.fromarray(grey).save(tmp_path / "16.png")
    assert value_of(tmp_path / "16.png") == [128] * 3
    Image.fromarray(grey).save(tmp_path / "16.tif")
    assert value_of(tmp_path / "16.tif") == [128] * 3
    for array in (grey.astype(np.int32) * 9, grey.astype(np.float32)):
        Image.fromarray(array).save(tmp_path / "32.tif")
        with pytest.raises(InputError, match="32.tif: a picture of 32-bit numbers .* no known range"):
            load_image(tmp_path / "32.tif", 16)


def profile_with_gamma(gamma: float) -> bytes:
    """An RGB profile: sRGB's, with its three tone curves replaced by x ** gamma."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = int.from_bytes(data[128:132], "big")
    curve = b"curv" + bytes(4) + (1).to_bytes(4, "big") + round(gamma * 256).to_bytes(2, "big")
    for i in range(count):
        entry = 132 + 12 * i
        if data[entry : entry + 4] in (b"rTRC", b"gTRC", b"bTRC"):
            offset = int.from_bytes(data[entry + 4 : entry + 8], "big")
            data[offset : offset + len(curve)] = curve
            data[entry + 8 : entry + 12] = len(curve).to_bytes(4, "big")
        if data[entry : entry + 4] == b"desc":  # no longer sRGB by name
            offset = int.from_bytes(data[entry + 4 : entry + 8], "big")
            size = int.from_bytes(data[entry + 8 : entry + 12], "big")
            data[offset : offset + size] = data[offset : offset + size].replace(
                "sRGB".encode("utf-16-be"), "Mine".encode("utf-16-be")).replace(b"sRGB", b"Mine")
    return bytes(data)


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_a_colour_profile_becomes_srgb(tmp_path, mode):
    """Linear light of one half is 188 in sRGB; a viewer shows that."""
    picture = Image.new(mode, (16, 16), (128, 128, 128, 255)[: len(mode)])
    picture.save(tmp_path / "linear.png", icc_profile=profile_with_gamma(1.0))
    assert np.allclose(value_of(tmp_path / "linear.png"), 188, atol=1)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    picture.save(tmp_path / "srgb.png", icc_profile=srgb)
    picture.save(tmp_path / "broken.png", icc_profile=b"no profile")
    for name in ("srgb", "broken"):
        assert value_of(tmp_path / f"{name}.png") == [128] * 3


def test_pictures_of_all_kinds_are_read(tmp_path):
    for mode, colour in (("L", 77), ("P", 3), ("1", 1), ("CMYK", (0, 0, 0, 0)), ("LA", (50, 255))):
        buffer = io.BytesIO()
        Image.new(mode, (16, 16), colour).save(buffer, "TIFF" if mode == "CMYK" else "PNG")
        (tmp_path / "a").write_bytes(buffer.getvalue())
        assert load_image(tmp_path / "a", 16).shape == (3, 16, 16)


def test_drawings_of_sixteen_bits_are_scaled(tmp_path):
    """As benchmarks read them; 32 bits have no range."""
    levels = np.arange(0, 256, 17, dtype=np.uint16).reshape(4, 4)
    Image.fromarray(levels * 257).save(tmp_path / "a.png")
    assert (np.asarray(read_picture(tmp_path / "a.png"))[..., 0] == levels).all()
    Image.fromarray(levels.astype(np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(InputError, match="32-bit numbers"):
        read_picture(tmp_path / "a.tif")
