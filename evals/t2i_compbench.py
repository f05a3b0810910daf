"""T2I-CompBench, attribute binding: is every object drawn with its own colour, shape or texture?

source       Karine-Huang/T2I-CompBench (BLIPvqa_eval: BLIP_vqa.py, models/blip_vqa.py)
DATA         any of color_val.txt, shape_val.txt, texture_val.txt (examples/dataset). The official
             program finds noun phrases with spaCy; where it has run on OUT/images/<category>, copy
             its annotation1_blip to annotation8_blip to DATA/<category>, and they are read
writes       OUT/images/<category>/samples/<prompt>_<number>.png, ten images per prompt: the
             official layout; OUT/<category>_vqa_result.json, as the official program
exact        questions, score
approximated without these annotations, a plain rule finds the noun phrases of the four prompts in
             five that are like "a green bench and a blue bowl" (the same as spaCy 3.8 in 141 of 151
             tried); sentences are drawn, but not scored. The weights see 384 pixels in the
             transformers port (--vqa Salesforce/blip-vqa-capfilt-large), 480 in the official code

    python 04_eval.py --benchmark t2i_compbench --data T2I --model toy/base --out runs/t2i
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm
from transformers import AutoConfig, AutoProcessor, BlipForQuestionAnswering

from evals.judges import ModelNames, require_finite
from evals.official import expected, get, read_json, read_picture, require
from hermesflow.checkpoints import load_hf
from hermesflow.files import read_text, write_text
from hermesflow.records import about

CATEGORIES = ("color", "shape", "texture")
WRITES = tuple(f"{category}_vqa_result.json" for category in CATEGORIES)  # and the images
IMAGES = 10  # per prompt
PHRASES = 8  # of a prompt, at most
MAX_WORDS = 50  # of a question
MAX_TOKENS = 35
NOT_IN_A_PHRASE = {"with", "on", "in", "at", "by", "near", "from", "to"}


def read(path) -> list[str]:
    """The prompts, one a line; they become file names."""
    what = f"{Path(path).name} of Karine-Huang/T2I-CompBench (examples/dataset)"
    prompts = []
    for n, line in enumerate(read_text(expected(path, what)).splitlines(), 1):
        prompt = line.split("\t")[0]
        if prompt.strip():
            fits = prompt.isprintable() and "/" not in prompt and len(prompt.encode()) <= 200
            require(fits, f"{path}: line {n}", f"{prompt[:40]!r} cannot be part of a file name")
            prompts.append(prompt)
    require(prompts, path, f"no prompts; expected here: {what}")
    return prompts


def read_questions(folder: Path) -> dict[str, list[str]] | None:
    """prompt -> questions, from the files that the official program leaves; None without any.

    annotation<i>_blip/vqa_test.json asks every image about the i-th phrase of its prompt.
    """
    if not (folder / "annotation1_blip").is_dir():
        return None
    questions = {}
    for i in range(1, PHRASES + 1):
        path = folder / f"annotation{i}_blip" / "vqa_test.json"
        for n, record in enumerate(read_json(path, "what BLIP_vqa.py writes", list), 1):
            where = f"{path}: record {n}"
            question = get(record, "question", str, where)
            prompt = Path(get(record, "image", str, where)).name.split("_")[0]
            own = questions.setdefault(prompt, [])
            if question and len(own) < i:  # the prompt's other images ask the same
                own.append(question)
    return questions


def noun_phrases(prompt: str) -> list[str] | None:
    """["a slice", "cheese", "a blue bowl"] of "a slice of cheese and a blue bowl"; None of others.

    Only two phrases, joined by "and", in lower case. "of" divides a phrase, as in spaCy.
    """
    text = prompt.strip().rstrip(".")
    sides = text.split(" and ")
    words = text.split(" ")
    if len(sides) != 2 or "," in text or not text[:1].islower() or NOT_IN_A_PHRASE & set(words):
        return None
    return sides[0].split(" of ") + sides[1].split(" of ")


def clean_question(question: str) -> str:
    """What BLIP reads (data/utils.py): lower case, some punctuation less, at most 50 words."""
    text = re.sub(r"[.!\"()*#:;~]", "", question.lower()).rstrip(" ")
    return " ".join(text.split(" ")[:MAX_WORDS])


def image_score(probabilities: list[float]) -> str:
    """The product over an image's questions, as the official program writes it.

    It rounds to four decimals twice, and multiplies in single precision; without questions it is 1.
    """
    product = np.float32(1)
    for p in probabilities:
        product *= np.float32(f"{p:.4f}")
    return f"{product:.4f}"


class BlipVqa:
    """How sure BLIP is of "yes"."""

    def __init__(self, name: str, device):
        model_type = load_hf(AutoConfig, name).model_type
        require(model_type == "blip", name, f"BLIP-VQA needs a BLIP model, not {model_type}")
        self.name = name
        self.processor = load_hf(AutoProcessor, name)
        self.model = load_hf(BlipForQuestionAnswering, name).to(device).eval()
        tokens = self.processor.tokenizer.convert_tokens_to_ids
        self.yes_and_no = [tokens("yes"), tokens("no")]
        # BLIP's tokenizer has [DEC] and [ENC] behind BERT's words; the port knows only the first
        self.decode_token = self.model.config.text_config.bos_token_id
        self.encode_token = self.decode_token + 1

    @torch.inference_mode()
    def yes(self, picture: Image.Image, questions: list[str]) -> list[float]:
        """p(yes) / (p(yes) + p(no)) for the first token of each answer."""
        pixels = self.processor(images=picture, return_tensors="pt").to(self.model.device)
        image = self.model.vision_model(**pixels).last_hidden_state  # (1, P, D)
        # one by one: the port's decoder does not mask the padding of shorter questions
        return [self.yes_to(image, question) for question in questions]

    def yes_to(self, image: torch.Tensor, question: str) -> float:
        text = self.processor(text=question, truncation=True, max_length=MAX_TOKENS,
                              return_tensors="pt").to(self.model.device)
        ids = text["input_ids"].clone()  # (1, L)
        ids[:, 0] = self.encode_token
        asked = self.model.text_encoder(ids, encoder_hidden_states=image).last_hidden_state
        start = torch.full_like(ids[:, :1], self.decode_token)  # (1, 1)
        logits = self.model.text_decoder(start, encoder_hidden_states=asked).logits  # (1, 1, V)
        chosen = require_finite(logits[0, 0, self.yes_and_no].float(), self.name)  # (2,)
        return chosen.softmax(-1)[0].item()


@dataclass
class Case:
    prompt: str
    files: list[Path]  # its images; their numbers go on from prompt to prompt
    questions: list[str] | None  # about each of them; None: left out


def cases_of(data: Path, out: Path, category: str) -> list[Case]:
    annotated = read_questions(data / category)
    folder = out / "images" / category / "samples"
    cases = []
    for i, prompt in enumerate(read(data / f"{category}_val.txt")):
        files = [folder / f"{prompt}_{i * IMAGES + k:06d}.png" for k in range(IMAGES)]
        if annotated is None:
            phrases = noun_phrases(prompt)
            questions = None if phrases is None else [f"{phrase}?" for phrase in phrases]
        else:
            require(prompt in annotated, data / category, f"no annotations of {prompt!r}")
            questions = annotated[prompt]
        cases.append(Case(prompt, files, questions))
    return cases


def results_of(blip: BlipVqa, cases: list[Case], category: str) -> list[dict]:
    """The official program's results, of the images whose questions are known."""
    results = []
    for case in tqdm([c for c in cases if c.questions is not None], desc=category):
        questions = [clean_question(q) for q in case.questions[:PHRASES]]
        for file in case.files:
            picture = read_picture(file)
            with about(str(file)):
                score = image_score(blip.yes(picture, questions) if questions else [])
            number = int(file.stem.split("_")[-1])
            results.append({"question_id": number, "answer": score})
    return results


def run(data: Path, out: Path, draw, device, names: ModelNames) -> dict:
    """Per category the mean over its images, their number, and how many were left out."""
    present = [name for name in CATEGORIES if (data / f"{name}_val.txt").exists()]
    require(present, data, "none of color_val.txt, shape_val.txt, texture_val.txt is there")
    categories = {name: cases_of(data, out, name) for name in present}
    wanted = []
    for name, cases in categories.items():
        scored = [c for c in cases if c.questions is not None]
        require(scored, data / f"{name}_val.txt", "no prompt whose noun phrases are known")
        wanted += [(f"{name} {i}", c.prompt, c.files) for i, c in enumerate(cases)]
    blip = BlipVqa(names.vqa, device)
    draw(wanted)

    metrics = {"model": f"{names.vqa} (the official one sees 480 pixels)"}
    for name, cases in categories.items():
        results = results_of(blip, cases, name)
        write_text(out / f"{name}_vqa_result.json", json.dumps(results) + "\n")
        scores = [float(r["answer"]) for r in results]
        metrics[name] = {"BLIP-VQA": sum(scores) / len(scores), "images": len(scores),
                         "images left out": IMAGES * len(cases) - len(scores)}
    return metrics
