"""Judges that are transformers models. Loading one needs no torchvision wherever that is possible.

Many processors (what turns a picture and a question into a model's inputs) also read videos, with
torchvision, which nothing else here needs: without it they are loaded for images only.
"""

from itertools import groupby, islice
from types import SimpleNamespace

import torch
from PIL import Image
from transformers import (
    MODEL_FOR_VISUAL_QUESTION_ANSWERING_MAPPING,
    PROCESSOR_MAPPING,
    AutoConfig,
    AutoModelForImageTextToText,
    AutoModelForVisualQuestionAnswering,
    AutoProcessor,
    LogitsProcessor,
    LogitsProcessorList,
    ProcessorMixin,
)

from hermesflow.checkpoints import load_hf
from hermesflow.files import InputError
from hermesflow.records import Question, Record
from hermesflow.scoring import meanings

JUDGED_AT_ONCE = 8  # questions about a picture: bounds a judge's memory

# ------------------------------------------------------------------------------------------ loading

# the order in which a processor's parts are given to it; without the last one the others fit
PARTS = ["image_processor", "tokenizer", "video_processor"]


class ImagesOnly:
    """Goes in front of a processor's class, which then neither loads nor asks for its last part."""

    video_processor = SimpleNamespace(num_frames=None, fps=None)  # SmolVLM's looks at both

    @classmethod
    def get_attributes(cls) -> list[str]:
        return [name for name in super().get_attributes() if name != "video_processor"]

    @classmethod
    def from_args_and_dict(cls, args, processor_dict: dict, **settings):
        return super().from_args_and_dict([*args, None], processor_dict, **settings)


def torchvision_command() -> str:
    """Installs the torchvision of this torch, and leaves torch as it is."""
    version, _, build = torch.__version__.partition("+")
    minor = int(version.split(".")[1])
    command = f"pip install --no-deps torchvision==0.{minor + 15}.{version.split('.')[2]}"
    return f"{command} --index-url https://download.pytorch.org/whl/{build}" if build else command


def load_processor(name: str, config):
    """The processor of the model `name`. Raises InputError if it needs torchvision for images."""
    try:
        return load_hf(AutoProcessor, name)
    except InputError as error:
        if "torchvision" not in str(error).lower():
            raise
    kind = PROCESSOR_MAPPING.get(type(config), None)
    usable = isinstance(kind, type) and issubclass(kind, ProcessorMixin)
    if not usable or kind.get_attributes() != PARTS:
        raise InputError(f"{name}: its processor needs torchvision: {torchvision_command()}")
    return load_hf(type(kind.__name__, (ImagesOnly, kind), {}), name)


# ---------------------------------------------------------------------------------------- answering


def require_finite(values: torch.Tensor, name: str) -> torch.Tensor:
    """`values`. Raises InputError naming the model that gave them if they are NaN or infinite."""
    if not values.isfinite().all():
        raise InputError(f"{name}: its outputs are NaN or infinite")
    return values


class RefuseNaN(LogitsProcessor):
    """Stops a text that a damaged model writes: the best of NaN is an answer like any other."""

    def __init__(self, name: str):
        self.name = name

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        require_finite(scores.amax(-1), self.name)  # (B,); −inf is a token that is not allowed
        return scores


class ModelJudge:
    """A transformers model: image-text-to-text (chat, with choices) or VQA (the plain question).

    It answers a picture's questions in batches, as it would answer each of them alone.
    """

    def __init__(self, name: str, match, device):
        config = load_hf(AutoConfig, name)
        self.is_vqa = type(config) in MODEL_FOR_VISUAL_QUESTION_ANSWERING_MAPPING
        self.processor = load_processor(name, config)
        kind = AutoModelForVisualQuestionAnswering if self.is_vqa else AutoModelForImageTextToText
        self.model = load_hf(kind, name).to(device).eval()
        self.match = match
        self.name = name
        self.refuse_nan = LogitsProcessorList([RefuseNaN(name)])
        tokenizer = self.processor.tokenizer
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token

    @torch.inference_mode()
    def answer(self, picture: Image.Image, questions: list[Question]) -> list[str]:
        if self.is_vqa:
            return self.vqa_answers(picture, [q.question for q in questions])
        answers = []
        texts = [f"{q.question} Choose one of: {', '.join(q.choices)}. Answer with the choice only."
                 for q in questions]
        for inputs in self.chats(picture, texts):
            ids = self.model.generate(**inputs, max_new_tokens=20, do_sample=False,
                                      logits_processor=self.refuse_nan)
            ids = ids[:, inputs["input_ids"].shape[1] :]  # without the prompts
            answers += [self.processor.decode(i, skip_special_tokens=True).strip() for i in ids]
        return answers

    @torch.inference_mode()
    def first_tokens(self, picture: Image.Image, texts: list[str]) -> torch.Tensor:
        """(B, V) probabilities of the first token of the answers."""
        probabilities = []
        for inputs in self.chats(picture, texts):
            out = self.model.generate(**inputs, max_new_tokens=1, do_sample=False,
                                      output_scores=True, return_dict_in_generate=True)
            rows = out.scores[0].float().softmax(-1)  # (B, V)
            probabilities.append(require_finite(rows, self.name).cpu())
        return torch.cat(probabilities)

    def chats(self, picture: Image.Image, texts: list[str]):
        """A batch's inputs at a time: the picture and a text, as what a user says."""
        # many templates write the first token themselves
        first = self.processor.tokenizer.bos_token
        for i in range(0, len(texts), JUDGED_AT_ONCE):
            prompts = [self.chat_prompt(text) for text in texts[i : i + JUDGED_AT_ONCE]]
            begins = first is not None and prompts[0].startswith(first)
            yield self.processor(
                text=prompts,
                images=[[picture]] * len(prompts),
                add_special_tokens=not begins,
                padding=True,
                padding_side="left",  # answers go on where the questions end
                return_tensors="pt",
            ).to(self.model.device)

    def chat_prompt(self, text: str) -> str:
        content = [{"type": "image"}, {"type": "text", "text": text}]
        return self.processor.apply_chat_template([{"role": "user", "content": content}],
                                                  add_generation_prompt=True)

    def vqa_answers(self, picture: Image.Image, questions: list[str]) -> list[str]:
        """Questions of one length together: BLIP's decoder does not mask the padding of others."""
        lengths = [len(ids) for ids in self.processor.tokenizer(questions)["input_ids"]]
        by_length = sorted(range(len(questions)), key=lambda i: lengths[i])
        answers = {}
        for _, same in groupby(by_length, key=lambda i: lengths[i]):
            while some := list(islice(same, JUDGED_AT_ONCE)):
                answered = self.vqa_batch(picture, [questions[i] for i in some])
                answers.update(zip(some, answered))
        return [answers[i] for i in range(len(questions))]

    @torch.inference_mode()
    def vqa_batch(self, picture: Image.Image, questions: list[str]) -> list[str]:
        """Of questions of equal length."""
        inputs = self.processor(images=[picture] * len(questions), text=questions,
                                return_tensors="pt").to(self.model.device)
        # an answer is a class (ViLT) or a text (BLIP)
        if hasattr(self.model.config, "id2label") and not self.model.can_generate():
            best = require_finite(self.model(**inputs).logits, self.name).argmax(-1)  # (B,)
            return [self.model.config.id2label[i] for i in best.tolist()]
        ids = self.model.generate(**inputs, max_new_tokens=20, logits_processor=self.refuse_nan)
        return [self.processor.decode(i, skip_special_tokens=True).strip() for i in ids]

    def meanings(self, answers: list[str], questions: list[Question]) -> list[str]:
        return meanings(answers, questions, self.match)

    def all_correct(self, picture: Image.Image, record: Record, correct: list[bool]) -> bool:
        return all(correct)
