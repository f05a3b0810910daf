"""Code in a checkpoint's folder: it never runs, and nobody is asked whether it should."""

import ast
import json
import os
import subprocess
import sys
from functools import cache

from transformers import BertConfig, BertModel

from conftest import ROOT
from tiny import tiny_tokenizer

CLASSES = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM",
           "AutoModelForImageTextToText", "AutoModelForVisualQuestionAnswering")
TOKENIZERS = {"auto_map": {"AutoTokenizer": ["code.Any", "code.Any"]}}

# ------------------------------------------------------------------------------- in every source


@cache
def calls() -> list[tuple[str, str, dict]]:
    """Place, function and constant keyword arguments of every call outside the tests."""
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        inside = path.relative_to(ROOT)
        if inside.parts[0] in ("tests", "runs") or inside.parts[0].startswith("."):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                constants = [k for k in node.keywords if isinstance(k.value, ast.Constant)]
                given = {k.arg: k.value.value for k in constants}
                found.append((f"{inside}:{node.lineno}", ast.unparse(node.func), given))
    return found


def test_every_call_says_that_no_code_runs():
    loads = [c for c in calls() if c[1].endswith(".from_pretrained")]
    assert {place.split(":")[0] for place, _, _ in loads} == {"hermesflow/checkpoints.py"}
    for place, _, given in loads:
        assert given.get("trust_remote_code") is False, place


def test_every_pickle_is_read_as_plain_values():
    seen = []
    for place, function, given in calls():
        seen.append(function)
        assert function.split(".")[0] not in ("pickle", "dill", "joblib"), place
        assert not given.get("allow_pickle", False), place  # which is numpy's default
        if function == "torch.load":
            assert given.get("weights_only") is True, place
    assert "torch.load" in seen and "np.load" in seen


# ---------------------------------------------------------------------------------- in a folder

# how everything of a folder is loaded; the last line proves that the code would run if allowed
PROBE = """
import json
import os
import sys
from types import SimpleNamespace

from transformers import AutoTokenizer, CLIPModel, Mask2FormerForUniversalSegmentation

from evals.detector import Detector, load_mask2former
from evals.judges import Clip, load_judge
from hermesflow.checkpoints import load_hf, load_tokenizer
from hermesflow.files import InputError
from hermesflow.questions import QuestionWriter
from hermesflow.scoring import answer_matcher, caption_scorer
from model import load

folder, base, marker = sys.argv[1:]
model = SimpleNamespace(device="cpu")
loaders = {
    "tokenizer": lambda: load_tokenizer(folder),
    "checkpoint": lambda: load(base, text_tokenizer=folder),
    "judge": lambda: load_judge(folder, model, None, 8),
    "caption scorer": lambda: caption_scorer(folder, "cpu"),
    "matcher": lambda: answer_matcher(folder, "cpu"),
    "question model": lambda: QuestionWriter(folder, folder, "cpu"),
    "detector": lambda: Detector(folder, folder, [], "cpu"),
    "segmentation": lambda: load_mask2former(folder),
    "clip": lambda: Clip(folder, "cpu"),
    "clip model": lambda: load_hf(CLIPModel, folder),
}
results = {}
for name, loader in loaders.items():
    try:
        loader()
        results[name] = "loaded"
    except InputError as error:
        results[name] = str(error)
ran = os.path.exists(marker)
try:
    AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
except Exception:
    pass  # it is a trap, not a tokenizer
print(json.dumps({"results": results, "ran": ran, "armed": os.path.exists(marker)}))
"""


def probe(tmp_path) -> dict[str, str]:
    """What becomes of everything in tmp_path/folder, while stdin says yes to any question."""
    folder = tmp_path / "folder"
    marker = tmp_path / "ran"
    code = (f"open({str(marker)!r}, 'w').close()\n"
            "from transformers import PreTrainedTokenizerFast\n"
            "class Any(PreTrainedTokenizerFast): pass\n")
    (folder / "code.py").write_text(code)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code)
    (tmp_path / "probe.py").write_text(PROBE)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1",
                   "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(tmp_path / "probe.py"), str(folder), str(ROOT / "toy" / "base"),
               str(marker)]
    done = subprocess.run(command, input="y\n" * 100, text=True, capture_output=True, cwd=ROOT,
                          env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "[y/N]" not in done.stdout + done.stderr
    printed = json.loads(done.stdout.splitlines()[-1])
    assert printed["armed"] and not printed["ran"]
    assert all("\n" not in result for result in printed["results"].values())
    return printed["results"]


def test_a_folder_of_nothing_but_code_is_refused(tmp_path):
    """Its classes are not in transformers; each refusal is one line that names the folder."""
    folder = tmp_path / "folder"
    tiny_tokenizer().save_pretrained(folder)
    config = {"model_type": "code", "auto_map": dict.fromkeys(CLASSES, "code.Any")}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = {**TOKENIZERS, "tokenizer_class": "Any"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    for name in ("processor", "preprocessor"):
        custom = {"AutoProcessor": "code.Any", "AutoImageProcessor": "code.Any"}
        (folder / f"{name}_config.json").write_text(json.dumps({"auto_map": custom}))
    results = probe(tmp_path)
    assert len(results) == 10
    for name, result in results.items():
        assert result.startswith(f"{folder}: cannot load as "), name


def test_code_beside_a_known_model_is_left_alone(tmp_path):
    """A BERT whose files also name code: it loads as the BERT that it is."""
    folder = tmp_path / "folder"
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    for name, more in (("config", {"auto_map": dict.fromkeys(CLASSES, "code.Any")}),
                       ("tokenizer_config", TOKENIZERS)):
        path = folder / f"{name}.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **more}))
    results = probe(tmp_path)
    assert results["tokenizer"] == results["caption scorer"] == results["matcher"] == "loaded"
    assert "'llm_vocab_size'" in results["checkpoint"]  # it has read the tokenizer
    for name in ("question model", "detector"):
        assert results[name].startswith(f"{folder}: cannot load"), name
