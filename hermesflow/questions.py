"""Questions about the texts that are drawn, written once, for records that have none.

reads   records in any format of hermesflow/datasets.py
writes  OUT/questions.jsonl   id, question, choices, answer, element: a question a line, for
                              --questions of 01_sample.py and 04_eval.py, which join them by id

    python -m hermesflow.questions --records records.jsonl --out runs/questions

As TIFA (Hu et al., ICCV 2023; arXiv:2303.11897) and the paper: a language model writes questions
about a text, and those remain that another one answers right from the text alone.
"""

from hermesflow.datasets import source_of
from hermesflow.inputs import (question_values, read_records, record_items,
                               those_with_questions, unread_questions)
from hermesflow.options import (COUNT, add_dry_run, add_record_options, device, folder, part_of,
                                stage_parser, unless_dry_run)
from hermesflow.outputs import Output, exit_if_complete, finish, run_main


def parse_args(argv=None):
    parser = stage_parser(__doc__)
    parser.prog = "python -m hermesflow.questions"
    group = parser.add_argument_group("input and output")
    add_record_options(group, questions=False)
    add = group.add_argument
    add("--out", type=folder, required=True, help="output folder")
    add("--overwrite", action="store_true", help="empty OUT first")
    add = parser.add_argument_group("models").add_argument
    add("--question-model", default="tifa-benchmark/llama2_tifa_question_generation",
        help="writes questions")
    add("--qa-model", default="allenai/unifiedqa-v2-t5-large-1363200", help="filters them")
    add("--device", type=device, help="cpu, cuda, cuda:1, … [what accelerate finds]")
    add("--dtype", default="float32", choices=["float32", "bfloat16", "float16"],
        help="of both models")
    add = parser.add_argument_group("run").add_argument
    add("--batch", type=COUNT, default=4, help="texts at a time; does not change results")
    add_dry_run(parser)
    args = parser.parse_args(argv)
    if args.records is None:
        parser.error("--records is needed")
    if args.out.suffix in (".json", ".jsonl"):
        parser.error(f"--out {args.out} is a folder's place: questions.jsonl is written into it")
    return unless_dry_run(args, question_model=args.question_model, qa_model=args.qa_model)


def output_of(args) -> Output:
    """What decides the questions: what records say, and the two models."""
    source_of(args.records)  # a mistake is said at once

    def texts():
        for said, *_ in record_items(args.records, **part_of(args)):
            yield (said,)

    inputs = {"records": texts, "question_model": args.question_model, "qa_model": args.qa_model}
    return Output(args.out, "questions", "questions.jsonl", writes=("questions.jsonl",),
                  args=vars(args), inputs=inputs, derived=(), code=(__file__,),
                  free=("image_folder", "skip", "limit", "device", "batch"))


# before the heavy imports, so that --help, a mistake and a complete output are answered at once
if __name__ == "__main__":
    ARGS = parse_args()
    run_main(lambda: exit_if_complete(output_of(ARGS)))

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from hermesflow.checkpoints import load_hf
from hermesflow.files import parse_json, write_text
from hermesflow.records import Question, Record
from hermesflow.runs import map_records, prepare_output, processes, say
from hermesflow.scoring import token_f1, words

TIFA_PROMPT = """<s>[INST] <<SYS>>
Given an image description, generate one or two multiple-choice questions that verifies if the \
image description is correct.
Classify each concept into a type (object, human, animal, food, activity, attribute, counting, \
color, material, spatial, location, shape, other), and then generate a question for each type.

<</SYS>>

Description: {caption} [/INST] Entities:"""

# ------------------------------------------------------------------------------------- TIFA's rules


def parse_questions(response: str) -> list[Question]:
    """Questions in the text of TIFA's question model.

    Blocks `About X (type):`, then lines `Q:`, `Choices:`, `A:`. A question without element, choices
    or answer is left out; an answer that is not among the choices is added to them.
    """
    questions = []
    element = question = choices = None
    for line in response.split("\n\n")[0].splitlines():  # behind an empty line the model rambles
        key, _, value = line.strip().partition(":")
        value = value.strip()
        if key.startswith("About "):
            element = key.removeprefix("About ").rpartition(" (")[0] or None
            question = choices = None
        elif key == "Q":
            question = value
            choices = None
        elif key == "Choices":
            choices = [c for c in value.split(", ") if c]
        elif key == "A":
            if element and question and choices and value:
                # "Yes" is the choice "yes"
                same = [c for c in choices if words(c) == words(value)]
                value = same[0] if same and value not in choices else value
                if value not in choices:
                    choices = [*choices, value]
                questions.append(Question(question, choices, value, element))
            question = choices = None
    return questions


def keep_questions(questions: list[Question], multiple_choice: list[str],
                   free_form: list[str]) -> list[Question]:
    """TIFA's filter: the QA model must be right from the caption alone.

    With choices and, unless the answer is yes or no, without (token F1 above 0.6).
    """
    kept = []
    seen = set()
    for q, with_choices, without in zip(questions, multiple_choice, free_form):
        right = words(with_choices) == words(q.answer)
        free = q.answer in ("yes", "no") or token_f1(q.answer, without) > 0.6
        if right and free and q.question not in seen:
            kept.append(q)
        seen.add(q.question)
    return kept


# --------------------------------------------------------------------------------------- the models


class QuestionWriter:
    """Questions about texts: TIFA's question model writes them, a QA model filters them."""

    def __init__(self, question_model: str, qa_model: str, device, dtype=torch.float32):
        self.question_tokenizer = padded(load_hf(AutoTokenizer, question_model))
        self.question_model = load_hf(AutoModelForCausalLM, question_model, dtype=dtype).to(device)
        self.qa_tokenizer = padded(load_hf(AutoTokenizer, qa_model))
        self.qa_model = load_hf(AutoModelForSeq2SeqLM, qa_model, dtype=dtype).to(device)

    @torch.inference_mode()
    def write(self, captions: list[str]) -> list[str]:
        """What the question model says of each; the prompt holds its own <s>."""
        prompts = [TIFA_PROMPT.format(caption=caption) for caption in captions]
        tokenizer = self.question_tokenizer
        # padded on the left: the answer goes on where the prompt ends
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left",
                           add_special_tokens=False).to(self.question_model.device)
        output = self.question_model.generate(
            inputs.input_ids, attention_mask=inputs.attention_mask, do_sample=False, num_beams=5,
            max_new_tokens=512, pad_token_id=tokenizer.pad_token_id)
        written = output[:, inputs.input_ids.shape[1] :]  # (B, L)
        return tokenizer.batch_decode(written, skip_special_tokens=True)

    @torch.inference_mode()
    def answer(self, prompts: list[str]) -> list[str]:
        """What the QA model answers to each."""
        inputs = self.qa_tokenizer(prompts, return_tensors="pt", padding=True)
        inputs = inputs.to(self.qa_model.device)
        output = self.qa_model.generate(inputs.input_ids, attention_mask=inputs.attention_mask,
                                        do_sample=False, max_new_tokens=32)
        return self.qa_tokenizer.batch_decode(output, skip_special_tokens=True)

    def __call__(self, captions: list[str]) -> list[list[Question]]:
        kept = []
        for caption, response in zip(captions, self.write(captions)):
            questions = parse_questions(response)
            with_choices = []
            without = []
            for q in questions:
                listed = " ".join(f"({chr(65 + i)}) {c}" for i, c in enumerate(q.choices))
                with_choices.append(f"{q.question} \n {caption} \n {listed} ")
                without.append(f"{q.question} \n {caption}")
            if questions:
                answers = self.answer(with_choices + without)
                questions = keep_questions(questions, answers[: len(questions)],
                                           answers[len(questions) :])
            kept.append(questions)
        return kept


def padded(tokenizer):
    """Llama's has no token for padding; masked, any will do."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


# --------------------------------------------------------------------------------------------- main


class Written(list):
    """Results of a finished run, as `map_records` takes them."""

    @property
    def ids(self) -> list[str]:
        return [result["id"] for result in self]


def earlier_results(file: Path) -> Written:
    """By record; one that was left without questions is asked about again."""
    questions = {}
    for where, line in question_values(file) if file.exists() else ():
        value = parse_json(line, where)
        questions.setdefault(value.pop("id"), []).append(value)
    return Written({"id": id, "questions": asked} for id, asked in questions.items())


def without_questions(args) -> tuple[Sequence[Record], int]:
    """The records to write questions for, and how many have their own."""
    skipped = []
    records = read_records(args.records, None, skipped, **part_of(args))
    wanting = those_with_questions(records, False)
    if skipped:
        say(f"left out: {len(skipped)} bad records; the first: {skipped[0]}")
    unread = unread_questions(args.records, records, **part_of(args))
    if unread:
        say(unread)
    return wanting, len(records) - len(wanting)


def main(args):
    records, others = without_questions(args)
    output = output_of(args)
    if not prepare_output(output):
        return
    say(f"{len(records)} records without questions, {others} have their own")

    @cache
    def load_writer() -> QuestionWriter:  # if there is a record to write questions for
        place = args.device or processes().device
        return QuestionWriter(args.question_model, args.qa_model, place, getattr(torch, args.dtype))

    def ask(chunk: list[Record]) -> list[dict]:
        asked = load_writer()([r.drawing_text for r in chunk])
        return [{"id": r.id, "questions": list(map(asdict, questions))}
                for r, questions in zip(chunk, asked)]

    file = args.out / "questions.jsonl"
    results = map_records(ask, records, args.out, args.batch, "write questions",
                          length=lambda r: len(r.drawing_text), earlier=earlier_results(file))
    if results is None:
        return  # the main process writes
    lines = []
    empty = 0
    for result in results:
        empty += not result["questions"]
        for question in result["questions"]:
            lines.append(json.dumps({"id": result["id"], **question}, ensure_ascii=False) + "\n")
    write_text(file, "".join(lines))
    finish(output)
    counts = f"{len(lines)} questions about {len(records) - empty} records, none about {empty}"
    print(f"{counts}: {file}")


if __name__ == "__main__":
    run_main(lambda: main(ARGS))
