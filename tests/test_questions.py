"""hermesflow/questions.py: TIFA's recorded cases, its two models, and questions written once."""

import json
import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, T5Config,
                          T5ForConditionalGeneration)

from conftest import GOLDEN, ROOT, main, results_of
from hermesflow import questions as asking
from hermesflow.files import HELD, InputError
from hermesflow.inputs import read_records
from hermesflow.records import Question

TIFA = json.loads((GOLDEN / "tifa_cases.json").read_text())


def question(data: dict) -> Question:
    return Question(data["question"], data["choices"], data["answer"], data.get("element", ""))


# -------------------------------------------------------------------------------- TIFA, as recorded


def test_tifa_prompt():
    case = TIFA["_prompt"]
    assert asking.TIFA_PROMPT.format(caption=case["caption"]) == case["prompt"]


def test_tifa_prompt_takes_braces_in_a_caption():
    prompt = asking.TIFA_PROMPT.format(caption="{0} and {caption}")
    assert "Description: {0} and {caption} [/INST]" in prompt


@pytest.mark.parametrize("name", [name for name in TIFA if not name.startswith("_")])
def test_tifa_parse(name):
    parsed = asking.parse_questions(TIFA[name]["response"])
    recorded = [(q["element"], q["question"], q["answer"]) for q in TIFA[name]["parsed"]]
    assert [(q.element, q.question, q.answer) for q in parsed] == recorded
    for ours, theirs in zip(parsed, TIFA[name]["parsed"]):
        assert ours.choices[: len(theirs["choices"])] == theirs["choices"]
        # where the recorded answer is not among the choices, it is added: nobody could give it
        assert set(ours.choices) == {*theirs["choices"], theirs["answer"]}


def test_tifa_filter():
    case = TIFA["_filter"]
    questions = [question(q) for q in case["questions"]]
    multiple_choice = [case["multiple_choice_answers"][q.question] for q in questions]
    free_form = [case["free_form_answers"][q.question] for q in questions]
    kept = asking.keep_questions(questions, multiple_choice, free_form)
    assert [q.question for q in kept] == case["kept"]


# -------------------------------------------------------------------------------- writing questions


def byte_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """One token per byte, so that decoding gives the text back.

    template: where the special tokens go.
    """
    vocabulary = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(vocabulary)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        clean_up_tokenization_spaces=False)


@pytest.fixture(scope="module")
def question_writer(tmp_path_factory):
    """TIFA's two models, tiny and random.

    Their tokenizers add <s> in front and </s> behind, as the real ones do.
    """
    torch.manual_seed(0)
    question_model = tmp_path_factory.mktemp("question_model")
    qa_model = tmp_path_factory.mktemp("qa_model")
    tokenizer = byte_tokenizer("<s> $A")
    tokenizer.save_pretrained(question_model)
    byte_tokenizer("$A </s>").save_pretrained(qa_model)
    special = dict(vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=1, eos_token_id=2)
    llama = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                        num_attention_heads=2, **special)
    t5 = T5Config(d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2,
                  decoder_start_token_id=0, **special)
    pair = (LlamaForCausalLM(llama), question_model), (T5ForConditionalGeneration(t5), qa_model)
    for model, folder in pair:
        for p in model.parameters():  # so that what it says depends on what it is told
            p.data.mul_(6 if p.ndim == 2 else 1)
        model.save_pretrained(folder)
    return asking.QuestionWriter(str(question_model), str(qa_model), "cpu")


@pytest.fixture
def prompts(question_writer, monkeypatch):
    """What reaches the two models, as (name, token ids of a row without padding, settings).

    The models still run, but for few tokens.
    """
    seen = []
    for name in ("question_model", "qa_model"):
        model = getattr(question_writer, name)

        def generate(ids, attention_mask, name=name, original=model.generate, **how):
            for row, mask in zip(ids, attention_mask.bool()):
                seen.append((name, row[mask].tolist(), how))
            how = {**how, "max_new_tokens": 8}
            return original(ids, attention_mask=attention_mask, **how)

        monkeypatch.setattr(model, "generate", generate)
    return seen


def test_question_writer_runs(question_writer, prompts):
    texts = ["a blue rabbit {and} a red plane", "a fox"]
    questions = question_writer(texts)
    assert questions == [[], []]  # of a random model
    assert [name for name, *_ in prompts] == ["question_model"] * 2
    for text, (_, ids, how) in zip(texts, prompts):
        assert (how["num_beams"], how["do_sample"]) == (5, False)
        assert ids.count(1) == 1 and ids[0] == 1 and 2 not in ids  # one <s>: the prompt's own
        written = question_writer.question_tokenizer.decode(ids[1:])
        assert written == asking.TIFA_PROMPT.format(caption=text).removeprefix("<s>")


def test_generated_text_leaves_the_prompt_out(question_writer, monkeypatch):
    tokenizer = question_writer.question_tokenizer
    response = tokenizer(" fox\nActivities:", add_special_tokens=False, return_tensors="pt")
    end = torch.tensor([[2]])

    def generate(ids, **how):
        return torch.cat([ids, response.input_ids, end], 1)

    monkeypatch.setattr(question_writer.question_model, "generate", generate)
    assert question_writer.write(["x"]) == [" fox\nActivities:"]


def test_texts_at_a_time_change_no_answer(question_writer, monkeypatch):
    """Texts of several lengths, padded beside one another and alone."""
    texts = ["a fox", "a big red ring left of a small blue square", "two"]
    for name, run in (("question", question_writer.write), ("qa", question_writer.answer)):
        model = getattr(question_writer, f"{name}_model")

        def generate(ids, original=model.generate, **how):
            return original(ids, **{**how, "max_new_tokens": 16})

        monkeypatch.setattr(model, "generate", generate)
        together = run(texts)
        assert together == [run([text])[0] for text in texts]
        assert len(set(together)) > 1


RESPONSE = (" rabbit\nActivities:\nColors: blue\nCounting: 2\nOther attributes:\n"
            "Questions and answers are below:\n"
            "About rabbit (animal):\nQ: what animal is it?\nChoices: rabbit, Cat\nA: rabbit\n"
            "About blue (color):\nQ: is it blue?\nChoices: yes, no\nA: yes\n"
            "About two (counting):\nQ: how many?\nChoices: 1, 2\nA: 2")
RABBIT = Question("what animal is it?", ["rabbit", "Cat"], "rabbit", "rabbit")
BLUE = Question("is it blue?", ["yes", "no"], "yes", "blue")


@pytest.fixture
def written(question_writer, monkeypatch):
    """The question model writes RESPONSE; the QA model is the real random one."""
    monkeypatch.setattr(question_writer, "write", lambda captions: [RESPONSE] * len(captions))


def test_qa_model_prompts(question_writer, prompts, written):
    """UnifiedQA's two prompts per question, each with one </s> at its end.

    `{q} \\n {caption} \\n (A) a (B) b `, and the same without choices.
    """
    question_writer(["A Blue rabbit"])
    ids = [ids for name, ids, _ in prompts if name == "qa_model"]
    assert all(i.count(2) == 1 and i[-1] == 2 and 1 not in i for i in ids)
    assert [question_writer.qa_tokenizer.decode(i[:-1]) for i in ids] == [
        "what animal is it? \n A Blue rabbit \n (A) rabbit (B) Cat ",
        "is it blue? \n A Blue rabbit \n (A) yes (B) no ",
        "how many? \n A Blue rabbit \n (A) 1 (B) 2 ",
        "what animal is it? \n A Blue rabbit",
        "is it blue? \n A Blue rabbit",
        "how many? \n A Blue rabbit",
    ]


def test_qa_model_filters(question_writer, written, monkeypatch):
    """Right with choices and without: kept.

    Right only with choices: dropped, unless the answer is yes or no.
    """
    answers = iter([["rabbit", "yes", "2", "a rabbit", "black", "seven of them"],
                    ["Cat", "no", "2", "rabbit", "blue", "2"]])
    monkeypatch.setattr(question_writer, "answer", lambda prompts: next(answers))
    kept = question_writer(["a blue rabbit", "two"])
    assert kept == [[RABBIT, BLUE], [Question("how many?", ["1", "2"], "2", "two")]]


def test_unknown_models_are_one_line(tmp_path, capsys):
    records = tmp_path / "records.jsonl"
    command = [sys.executable, "-m", "hermesflow.questions", "--out", tmp_path / "out",
               "--records", records, "--question-model", tmp_path / "none"]
    for there, named in ((False, "records.jsonl: No such file"), (True, "none: no such folder")):
        if there:
            records.write_text(json.dumps({"id": "a", "image": "a.png", "caption": "c"}))
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2 and not done.stdout and not (tmp_path / "out").exists()
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
        assert named in done.stderr


# ------------------------------------------------------------------------------------ written once

RECORDS = [{"id": "a", "image": "a.png", "caption": "a blue rabbit"},
           {"id": "own", "image": "a.png", "caption": "c",
            "questions": [{"question": "own?", "choices": ["yes", "no"], "answer": "no"}]},
           {"id": "b", "image": "a.png", "caption": "c", "prompt": "a drawn rabbit"},
           {"id": "none", "image": "a.png", "caption": "nothing to ask"},
           {"id": "é", "image": "a.png", "caption": "a rabbit\u2028on two lines"}]


@pytest.fixture
def writer(monkeypatch):
    """Models that ask RABBIT about rabbits; the texts that they were given."""
    given = []

    def write(self, captions):
        given.append(captions)
        return [RESPONSE if "rabbit" in caption else "" for caption in captions]

    def answer(self, prompts):
        return ["rabbit" if prompt.startswith("what animal") else "?" for prompt in prompts]

    monkeypatch.setattr(asking.QuestionWriter, "__init__", lambda *_: None)
    monkeypatch.setattr(asking.QuestionWriter, "write", write)
    monkeypatch.setattr(asking.QuestionWriter, "answer", answer)
    return given


def put(folder, records=RECORDS):
    (folder / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder / "records.jsonl"


def ask(folder, *more, out="out"):
    """What is written, as (id, question)."""
    models = {}
    for name in ("question", "qa"):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "config.json").write_text("{}")
        models[f"--{name}-model"] = folder / name
    settings = [part for pair in models.items() for part in pair]
    main(asking, "--records", folder / "records.jsonl", "--out", folder / out, *settings, *more)
    HELD.clear()
    text = (folder / out / "questions.jsonl").read_text()
    values = [json.loads(line) for line in text.split("\n") if line]
    assert all(list(v) == ["id", "question", "choices", "answer", "element"] for v in values)
    return [(v["id"], v["question"]) for v in values]


def test_questions_are_written_about_records_without(tmp_path, writer, capsys):
    """About what is drawn, in the order of the file, whatever the batch."""
    put(tmp_path)
    asked = [("a", RABBIT.question), ("b", RABBIT.question), ("é", RABBIT.question)]
    assert ask(tmp_path, "--batch", 3) == asked
    assert "3 questions about 3 records, none about 1" in capsys.readouterr().out
    texts = [r.get("prompt") or r["caption"] for r in RECORDS if r["id"] != "own"]
    assert sorted(sum(writer, [])) == sorted(texts) and list(map(len, writer)) == [3, 1]
    assert ask(tmp_path, "--batch", 1, out="one") == asked
    assert results_of(tmp_path / "one") == results_of(tmp_path / "out")


def test_questions_of_journeydb_that_cannot_be_read_are_said(tmp_path, writer, capsys):
    """Before others are written."""
    value = {"img_path": "a.png", "Task2": {"Caption": "a rabbit"}, "Task3": {"Content": [3]}}
    put(tmp_path, [value])
    assert ask(tmp_path) == [("a", RABBIT.question)]
    assert "1 of 1 records have questions that cannot be read" in capsys.readouterr().out


def test_questions_join_their_records(tmp_path, writer):
    """In read_records as in both stages, of a part of the records, too."""
    put(tmp_path)
    ask(tmp_path)
    path = tmp_path / "out" / "questions.jsonl"
    joined = read_records(tmp_path / "records.jsonl", path)
    assert [[q.question for q in r.questions] for r in joined] == [
        [RABBIT.question], ["own?"], [RABBIT.question], [], [RABBIT.question]]
    assert joined[0].questions == [RABBIT]
    part = read_records(tmp_path / "records.jsonl", path, skip=2, limit=2)
    assert [(r.id, len(r.questions)) for r in part] == [("b", 1), ("none", 0)]
    # the questions of another file
    put(tmp_path, RECORDS[1:])
    with pytest.raises(InputError, match=r"questions.jsonl: line 1: field 'id': 'a' is not in "):
        read_records(tmp_path / "records.jsonl", path)
    assert len(read_records(tmp_path / "records.jsonl", path, limit=4)) == 4
    path.write_text("")
    without = read_records(tmp_path / "records.jsonl", path)
    assert [len(r.questions) for r in without] == [1, 0, 0, 0]


@pytest.mark.parametrize("line, named", [
    ("{", "not valid JSON"), ("3", "expected an object"), ('{"id": "a"}', "'question' is missing"),
    ('{"id": "a", "question": "q", "choices": ["x"], "answer": "y"}', "not among the choices"),
    ('{"id": "zz", "question": "q", "choices": ["x"], "answer": "x"}', "'zz' is not in"),
])
def test_a_bad_question_is_named(tmp_path, line, named):
    """Its file, its line; where bad records are skipped, it alone is left out."""
    good = '{"id": "a", "question": "is it?", "choices": ["yes", "no"], "answer": "yes"}'
    path = tmp_path / "q.jsonl"
    path.write_text(f"{good}\n\n{line}\n")
    with pytest.raises(InputError, match="q.jsonl: line 3: .*" + named):
        read_records(put(tmp_path), path)
    skipped = []
    records = read_records(put(tmp_path), path, skipped)
    assert [len(r.questions) for r in records] == [1, 1, 0, 0, 0] and len(skipped) == 1


def test_nothing_to_write_is_an_empty_file(tmp_path, writer):
    put(tmp_path, RECORDS[1:2])
    assert ask(tmp_path) == [] and writer == []
    path = tmp_path / "out" / "questions.jsonl"
    assert [len(r.questions) for r in read_records(tmp_path / "records.jsonl", path)] == [1]


def test_a_killed_run_continues(tmp_path, writer, monkeypatch):
    """What was written is kept; no final file is there before all is."""
    put(tmp_path)
    whole = ask(tmp_path, "--batch", 1, out="whole")
    write = asking.QuestionWriter.write
    del writer[:]

    def killed(self, captions):
        if len(writer) == 2:
            raise KeyboardInterrupt
        return write(self, captions)

    with monkeypatch.context() as patch:
        patch.setattr(asking.QuestionWriter, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            ask(tmp_path, "--batch", 1)
    HELD.clear()
    assert not (tmp_path / "out" / "questions.jsonl").exists()
    assert ask(tmp_path, "--batch", 1) == whole
    assert len(writer) == 4  # nothing twice
    assert results_of(tmp_path / "out") == results_of(tmp_path / "whole")


def test_more_records_ask_about_the_new_ones(tmp_path, writer):
    put(tmp_path)
    whole = ask(tmp_path, out="whole")
    del writer[:]
    assert ask(tmp_path, "--limit", 3) == whole[:2]
    assert ask(tmp_path, "--limit", 5) == whole
    assert sorted(map(len, writer)) == [2, 2]
    assert results_of(tmp_path / "out") == results_of(tmp_path / "whole")
    ask(tmp_path)  # complete
    assert len(writer) == 2
    for more in (["--skip", 1], ["--limit", 2]):
        with pytest.raises(InputError, match="content of --records"):
            ask(tmp_path, *more)
    (tmp_path / "qa" / "weights").write_text("other")
    # another text, another model
    put(tmp_path, [RECORDS[0] | {"caption": "other"}, *RECORDS[1:]])
    with pytest.raises(InputError, match="content of --records"):
        ask(tmp_path)


def test_images_need_not_be_there(tmp_path, writer):
    """Only texts are read: other pictures, or none, ask for no other questions."""
    put(tmp_path, [r | {"image": "elsewhere/b.png"} for r in RECORDS])
    first = ask(tmp_path)
    put(tmp_path)
    assert ask(tmp_path) == first and len(writer) == 1


@pytest.mark.parametrize("options, named", [
    ([], "--records is needed"), (["--records", "r", "--batch", "0"], "--batch"),
    (["--records", "r", "--skip", "-1"], "--skip"), (["--records", "r", "--limit", "0"], "--limit"),
    (["--records", "r", "--out", "q.jsonl"], "questions.jsonl is written into it"),
])
def test_options(options, named, capsys):
    with pytest.raises(SystemExit) as ended:
        asking.parse_args(["--out", "o", *options])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1 and named in error
