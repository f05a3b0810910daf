"""The original algorithm against ours on the same random weights: time, memory, work and results.

    python bench/bench.py --size mid                                  # 10 minutes on 2 CPU cores
    python bench/bench.py --size 1.3b --device cuda --dtype bfloat16  # Show-o's size on a GPU

"plain" is the original's algorithm in float32, as bench/reference.py writes it down; "ours" is what
the stages call, in --dtype. Every measurement is a process of its own, so that peak memory belongs
to it. The plain path runs a share of each task and is scaled up (texts and image batches cost the
same each); the output says which share. Work is counted by torch's FlopCounterMode. The results of
both are compared: tokens one by one, losses and gradient norms by their largest difference.

    captions   ten captions of each of four images (the ten released settings, stage 1's --batch)
    questions  ten questions about each of four images, greedy
    images     sixteen images of one prompt with guidance; per step, without the first, which all
               images of a prompt share in ours
    dpo        one Pair-DPO record: reference, forward, backward
"""

import sys
from argparse import SUPPRESS
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from hermesflow.options import COUNT, GUIDANCE, folder, integer, stage_parser

SIZES = {  # differences from Phi-1.5
    "mid": dict(hidden_size=512, intermediate_size=2048, num_hidden_layers=8,
                num_attention_heads=8),
    "1.3b": {},
}
TASKS = ("captions", "questions", "images", "dpo")
PATHS = ("plain", "ours")


def parse_args(argv=None):
    parser = stage_parser(__doc__)
    add = parser.add_argument_group("what to measure").add_argument
    add("--tasks", nargs="+", choices=TASKS, default=TASKS, help="[all]")
    add("--paths", nargs="+", choices=PATHS, default=PATHS, help="[both]")
    add("--size", choices=["toy", *SIZES], default="mid", help="of the model")
    add = parser.add_argument_group("amount of work").add_argument
    add("--caption-tokens", type=COUNT, default=40, help="per caption")
    add("--answer-tokens", type=COUNT, default=8, help="per answer")
    add("--steps", type=COUNT, default=3, help="decoding steps of the images")
    add("--guidance", type=GUIDANCE, default=5.0, help="of the images")
    add("--plain-images", type=COUNT, default=4, help="that the plain path decodes together")
    add = parser.add_argument_group("machine").add_argument
    add("--device", choices=["cpu", "cuda"], default="cpu", help="of both paths")
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="float32",
        help="of ours: weights for sampling, autocast for training")
    add("--gradient-checkpointing", action="store_true", help="in ours")
    add("--threads", type=integer(1, 1024), help="of the CPU [torch's choice]")
    # what a process of one measurement is told: a task and a path, and where its results go
    parser.add_argument("--worker", nargs=2, choices=("ceiling", *TASKS, *PATHS), help=SUPPRESS)
    parser.add_argument("--results", type=folder, help=SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    ARGS = parse_args()  # before the heavy imports, so that --help answers at once

import json
import resource
import runpy
import subprocess
import tempfile
import time
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import PhiConfig
from transformers.activations import ACT2FN
from transformers.models.phi.modeling_phi import PhiRotaryEmbedding

from bench import reference
from hermesflow.checkpoints import load_tokenizer
from hermesflow.files import InputError
from hermesflow.magvit import Magvit, MagvitConfig
from hermesflow.outputs import run_main
from hermesflow.packed import Segment, answer_segment
from hermesflow.records import CAPTION_QUESTION
from hermesflow.sampling import random_mask, stable_seed, uniforms
from hermesflow.showo import Showo, Tokens, build_showo, image_segment
from hermesflow.tables import load_tensors, save_tensors
from model import (ImageBatch, ImageSampling, LogProbs, Model, TextBatch, TextRequest,
                   load)

BETA = 0.2
IMAGES = 16  # per prompt
PROMPT = "a photograph of an old fisherman mending a blue net beside his red boat at dawn"
QUESTIONS = ["what color is the net?", "is there a boat?", "what is the man doing?",
             "is the man young?", "what color is the boat?", "what time of day is it?",
             "is the net blue or green?", "how many boats are there?", "is he a fisherman?",
             "where is the boat?"]
# win and lose: 71 and 72 tokens
CAPTIONS = [f"{PROMPT}. {' '.join(QUESTIONS)}",
            f"{QUESTIONS[0]} {PROMPT} in the harbour, and {PROMPT} again. {PROMPT}."]


# ------------------------------------------------------------------------------------------- models


def empty_net(size: str) -> Showo:
    """Show-o without weights: Phi-1.5's tokenizer, 8,192 codes, 1,024 image tokens."""
    tokenizer = load_tokenizer(ROOT / "tests" / "golden" / "phi-1_5-tokenizer")
    text = len(tokenizer)
    vocab_size = text + len(Tokens.SPECIAL) + 8192 + 1
    config = dict(vocab_size=vocab_size, llm_vocab_size=text, codebook_size=8192,
                  num_vq_tokens=1024)
    return build_showo(config, PhiConfig(**SIZES[size]), tokenizer)


def random_model(size: str, device: str, dtype, seed: int = 0) -> Model:
    """Show-o with random weights and no image tokenizer; or the toy's base model, scaled."""
    if size == "toy":
        model = load(ROOT / "toy" / "base", device=device, dtype=dtype)
        for p in model.net.parameters():
            p.data *= 1 + 0.1 * seed  # another seed: another model
        return model
    net = empty_net(size).to(dtype).to_empty(device=device)
    net.showo.model.rotary_emb = PhiRotaryEmbedding(net.showo.config).to(device)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "norm" in name and name.endswith("weight"):
                p.fill_(1.0)
            else:
                # a sharp head decides like a trained model's, without ties among 8,192 codes
                sharpness = 5 if "lm_head" in name else 1
                p.normal_(0, 0.04 * sharpness, generator=generator)
    with torch.device("meta"):
        vq = Magvit(MagvitConfig())
    return Model(net.eval(), vq)


def as_published(net: Showo) -> Showo:
    """With transformers' gelu_new, which takes eight kernels; ours takes one."""
    for layer in net.showo.model.layers:
        layer.mlp.activation_fn = ACT2FN[net.showo.config.hidden_act]
    return net


# -------------------------------------------------------------------------------------------- tasks


class Outcome(NamedTuple):
    """What one run of a task gives."""

    tensors: dict  # name -> tensor, to compare the paths
    share: float  # of the whole task that ran
    seconds: float | None = None  # where making models takes no time


def random_codes(model: Model, n: int) -> torch.Tensor:
    """(n, N) image codes."""
    rows = [uniforms(stable_seed("codes", i), model.image_tokens) for i in range(n)]
    return (torch.stack(rows) * model.tokens.codes).long().to(model.device)


def caption_requests() -> list[TextRequest]:
    stage = runpy.run_path(str(ROOT / "01_sample.py"), run_name="stage")
    requests = []
    for image in range(4):
        for i, (top_k, temperature) in enumerate(stage["RELEASED_SETTINGS"]):
            seed = stable_seed("caption", image, i)
            requests.append(TextRequest(image, CAPTION_QUESTION, top_k, temperature, seed))
    return requests


def question_requests() -> list[TextRequest]:
    prompts = [f"Question:{q} Choice:['yes', 'no']" for q in QUESTIONS]
    return [TextRequest(image, prompt) for image in range(4) for prompt in prompts]


def write_texts(model: Model, path: str, requests: list[TextRequest], max_new_tokens: int,
                plain_requests: list[int]) -> Outcome:
    """Ours: all requests together. Plain: those with these numbers, one after the other."""
    codes = random_codes(model, 1 + max(r.image for r in requests))
    if path == "ours":
        texts = model.generate_text(codes, requests, max_new_tokens)
        tensors = {str(i): torch.tensor(text.ids) for i, text in enumerate(texts)}
        return Outcome(tensors, 1.0)
    tensors = {}
    for i in plain_requests:
        image = codes[requests[i].image]
        ids = reference.generate_text(model.net, image, requests[i], max_new_tokens)
        tensors[str(i)] = torch.tensor(ids)
    return Outcome(tensors, len(plain_requests) / len(requests))


def draw_images(model: Model, path: str, steps: int, guidance_scale: float,
                plain_images: int) -> Outcome:
    """Ours: sixteen images. Plain: the first of them, as many as fit into memory together."""
    seeds = [stable_seed("image", k) for k in range(IMAGES)]
    if path == "ours":
        sampling = ImageSampling(steps, guidance_scale)
        codes = model.generate_images([PROMPT] * IMAGES, seeds, sampling)
        return Outcome({"codes": codes}, 1.0)
    noise = [uniforms(seed, steps, 2, model.image_tokens) for seed in seeds[:plain_images]]
    noise = torch.stack(noise).to(model.device)  # (B, steps, 2, N)
    texts = [PROMPT] * len(noise)
    codes = reference.generate_images(model.net, texts, noise, steps, guidance_scale)
    return Outcome({"codes": codes}, len(noise) / IMAGES)


def dpo_rows(tokens: Tokens, codes: list[list[int]]) -> list[list[Segment]]:
    """One record as rows of prefix, win, lose.

    Two captions of image 0, and images 1 and 2 under one mask.
    """
    question = tokens.text_prompt(CAPTION_QUESTION)
    und = [Segment(tokens.mmu_prompt(codes[0]), bidirectional=True)]
    und += [answer_segment(question, [*tokens.encode(c), tokens.eot]) for c in CAPTIONS]
    mask = random_mask(tokens.image_tokens, 9).tolist()
    gen = [Segment(tokens.t2i_prompt(PROMPT))]
    gen += [image_segment(tokens, c, mask) for c in codes[1:]]
    return [und, gen]


def dpo_batches(model: Model) -> tuple[TextBatch, ImageBatch]:
    """The same record, as stage 3 gives it to the model."""
    codes = random_codes(model, 3)
    captions = [model.encode_text(c) for c in CAPTIONS]
    masks = random_mask(model.image_tokens, 9)[None]
    text = TextBatch(codes[:1], [CAPTION_QUESTION], [captions])
    return text, ImageBatch([PROMPT], codes[None, 1:], masks)


def dpo_loss(policy: LogProbs, reference_sums: torch.Tensor) -> torch.Tensor:
    """−log σ(β Δ) of one half, win before lose."""
    ratio = policy.sums - reference_sums  # (1, 2)
    return -F.logsigmoid(BETA * (ratio[:, 0] - ratio[:, 1])).sum()


def plain_dpo(size: str, device: str) -> Outcome:
    """Loss and gradients of one record, with policy and reference in memory together."""
    reference_model = random_model(size, device, torch.float32, seed=1)
    policy = random_model(size, device, torch.float32)
    rows = dpo_rows(policy.tokens, random_codes(policy, 3).tolist())
    policy_net = as_published(policy.net)
    reference_net = as_published(reference_model.net)
    clock = Clock(device)
    loss = reference.pair_dpo(policy_net, reference_net, rows, BETA)
    loss.backward()
    return Outcome(loss_and_gradients(loss, policy_net), 1.0, clock.seconds())


def our_dpo(size: str, device: str, dtype, gradient_checkpointing: bool) -> Outcome:
    """The same as stage 3 computes it: reference log-probs first, then the policy alone."""
    model = random_model(size, device, torch.float32, seed=1)
    autocast = torch.autocast(device, dtype, enabled=dtype != torch.float32)
    text, image = dpo_batches(model)
    clock = Clock(device)
    with torch.no_grad(), autocast:
        und_ref, gen_ref = model.pair_logps(text, image)
    reference_seconds = clock.seconds()

    del model
    model = random_model(size, device, torch.float32)
    if gradient_checkpointing:
        model.net.train()
        model.net.checkpoint_activations(True)
    clock = Clock(device)
    with autocast:
        und, gen = model.pair_logps(text, image)
        loss = dpo_loss(und, und_ref.sums) + dpo_loss(gen, gen_ref.sums)
    loss.backward()
    seconds = reference_seconds + clock.seconds()
    return Outcome(loss_and_gradients(loss, model.net), 1.0, seconds)


def loss_and_gradients(loss: torch.Tensor, net: Showo) -> dict:
    gradient = torch.stack([p.grad.float().norm() for p in net.parameters()])
    return {"loss": loss.detach()[None], "gradient": gradient}


# ---------------------------------------------------------------------------------------- measuring


class Clock:
    """Seconds of finished work since the clock was made."""

    def __init__(self, device: str):
        self.device = device
        self.wait()
        self.start = time.perf_counter()

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def seconds(self) -> float:
        self.wait()
        return time.perf_counter() - self.start


def attention_flops(query, key, value, *_, out_shape=None, **__) -> int:
    """Shapes of the CPU's attention kernel, which FlopCounterMode does not know -> FLOP."""
    B, H, Q, d = query
    return 4 * B * H * Q * key[2] * d


def attention_backward_flops(grad, query, key, *_, out_shape=None, **__) -> int:
    return 5 * attention_flops(query, key, None) // 2


def flop_counter() -> FlopCounterMode:
    aten = torch.ops.aten
    kernels = {
        aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
    }
    return FlopCounterMode(display=False, custom_mapping=kernels)


def peak_gb(device: str) -> float:
    """Peak GB of this process so far (CPU), or of its tensors (GPU)."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def timed(run, device: str) -> tuple[Outcome, float]:
    """The outcome of run() and its seconds, by its own clock if it has one."""
    clock = Clock(device)
    outcome = run()
    seconds = clock.seconds()
    return outcome, seconds if outcome.seconds is None else outcome.seconds


def decoding_bytes(net: Showo, tokens: int, images: int) -> int:
    """Bytes of weights and image keys and values that are read again for every further token."""
    weights = [p for name, p in net.named_parameters() if "embed" not in name]
    phi = net.showo.config
    image = 2 * phi.num_hidden_layers * (net.tokens.image_tokens + 3) * phi.hidden_size
    once = sum(p.nbytes for p in weights) + images * image * weights[0].element_size()
    return once * (tokens - 1)


def measure(task: str, path: str, size: str, device: str, dtype, length: int | None,
            guidance_scale: float, plain_images: int, gradient_checkpointing: bool,
            results: Path) -> dict:
    """One task on one path, in this process; its tensors go to a file below `results`.

    length: tokens per text, or decoding steps. FLOP of the plain path are counted while it is
    timed; ours runs again for that.
    """
    ours = path == "ours"
    at_start = peak_gb(device)
    if task != "dpo":
        model = random_model(size, device, dtype if ours else torch.float32)
        if not ours:
            as_published(model.net)

    def run(length=length) -> Outcome:
        if task == "captions":
            return write_texts(model, path, caption_requests(), length, [0, 39])
        if task == "questions":
            return write_texts(model, path, question_requests(), length, [0, 39])
        if task == "images":
            return draw_images(model, path, length, guidance_scale, plain_images)
        if ours:
            return our_dpo(size, device, dtype, gradient_checkpointing)
        return plain_dpo(size, device)

    if ours and (device == "cuda" or size == "toy"):
        run()  # warm up
    flops = flop_counter()
    with nullcontext() if ours else flops:
        outcome, seconds = timed(run, device)
    peak = peak_gb(device) - at_start
    first = 0.0  # seconds of the first token or step, with what precedes it
    if ours:
        if task in ("captions", "images"):
            _, first = timed(lambda: run(1), device)
        with flops:
            run()
    tensors = {name: t.cpu() for name, t in outcome.tensors.items()}
    save_tensors(results / f"{task}-{path}.safetensors", tensors)
    figures = dict(seconds=seconds / outcome.share, first=first, peak=peak, share=outcome.share,
                   flops=flops.get_total_flops() / outcome.share)
    if task == "captions":
        figures["bytes"] = decoding_bytes(model.net, length, images=4)
    return figures


def ceiling(device: str, dtypes: set[str]) -> dict:
    """Measured limits of the machine: matmul FLOP/s of every dtype, and bytes/s of a copy."""
    n = 8192 if device == "cuda" else 2048
    limits = {}
    for name in dtypes:
        a = torch.randn(n, n, device=device).to(getattr(torch, name))
        limits[name] = 2 * n**3 / least_seconds(lambda: a @ a, device)
    x = torch.randn(2**27, device=device)
    y = torch.empty_like(x)
    limits["bandwidth"] = 2 * x.nbytes / least_seconds(lambda: y.copy_(x), device)
    return limits


def least_seconds(run, device: str, times: int = 8) -> float:
    seconds = []
    for _ in range(times):
        clock = Clock(device)
        run()
        seconds.append(clock.seconds())
    return min(seconds)


# ------------------------------------------------------------------------------------------- report


def in_own_process(task: str, path: str, results: Path) -> dict:
    """The figures of one measurement, made by this script in another process."""
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", task, path]
    command += ["--results", str(results)]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if process.returncode:
        sys.exit(f"{task}, {path}: failed")
    return json.loads(process.stdout.splitlines()[-1])


def compare(task: str, results: Path) -> str:
    """How far the results of both paths agree."""
    ours = load_tensors(results / f"{task}-ours.safetensors")
    plain = load_tensors(results / f"{task}-plain.safetensors")
    if task == "dpo":
        loss = plain["loss"].item()
        loss_difference = abs(ours["loss"].item() - loss)
        norms = plain["gradient"].clamp(min=1e-6)
        difference = ((ours["gradient"] - plain["gradient"]).abs() / norms).max().item()
        return (f"loss {loss:.4f}, differs by {loss_difference:.0e}; gradient norms by at most "
                f"{difference:.0e} of each")
    equal = 0
    total = 0
    for name, expected in plain.items():
        found = ours[name][: len(expected)]
        total += expected.numel()
        if found.shape == expected.shape:
            equal += int((found == expected).sum())
    return f"{equal} of {total} tokens equal"


def print_figures(task: str, path: str, figures: dict, matmul_rate: float) -> None:
    """One row: work, time, memory, and the share of the measured matmul rate."""
    rate = figures["flops"] / figures["seconds"]
    print(f"{task:10} {path:6} {figures['flops'] / 1e12:10.3f} TFLOP {figures['seconds']:10.2f} s "
          f"{figures['peak']:7.2f} GB {rate / 1e9:9.1f} GFLOP/s, {rate / matmul_rate:4.0%} of "
          f"matmul; ran {figures['share']:.0%}", flush=True)


def print_ratios(task: str, plain: dict, ours: dict, steps: int, bandwidth: float,
                 agreement: str) -> None:
    """How much less ours takes, and what the task adds to that."""
    ratio = {name: plain[name] / ours[name] for name in ("flops", "seconds", "peak")}
    print(f"{task:10} ratio  work {ratio['flops']:.2f}, time {ratio['seconds']:.2f}, memory "
          f"{ratio['peak']:.2f}; {agreement}", flush=True)
    later = ours["seconds"] - ours["first"]  # seconds after the first token or step
    if task == "captions":
        rate = ours["bytes"] / later
        print(f"{task:10} decoding reads {rate / 1e9:.1f} GB/s of weights and image keys, "
              f"{rate / bandwidth:.0%} of bandwidth", flush=True)
    if task == "images" and steps > 1:
        plain_step = plain["seconds"] / steps
        our_step = later / (steps - 1)
        plain_all = 50 * plain_step
        our_all = ours["first"] + 49 * our_step
        print(f"{task:10} per step {plain_step:.2f} s and {our_step:.2f} s: "
              f"{plain_step / our_step:.2f}; all 50 steps {plain_all:.0f} s and {our_all:.0f} s: "
              f"{plain_all / our_all:.2f}", flush=True)


def main(args):
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: there is none")
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.worker:
        task, path = args.worker
        if task == "ceiling":
            figures = ceiling(args.device, {"float32", args.dtype})
        else:
            lengths = {"captions": args.caption_tokens, "questions": args.answer_tokens,
                       "images": args.steps}
            figures = measure(task, path, args.size, args.device, getattr(torch, args.dtype),
                              lengths.get(task), args.guidance, args.plain_images,
                              args.gradient_checkpointing, args.results)
        print(json.dumps(figures))
        return

    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder)
        limits = in_own_process("ceiling", "ours", results)
        bandwidth = limits["bandwidth"]
        rates = [f"{k} {v / 1e9:,.0f} GFLOP/s" for k, v in limits.items() if k != "bandwidth"]
        print(f"size {args.size}, {args.device}, ours in {args.dtype}, torch {torch.__version__}, "
              f"{torch.get_num_threads()} threads; bandwidth {bandwidth / 1e9:,.0f} GB/s, "
              f"{', '.join(sorted(rates))}", flush=True)
        for task in args.tasks:
            figures = {}
            for path in args.paths:
                figures[path] = in_own_process(task, path, results)
                rate = limits["float32" if path == "plain" else args.dtype]
                print_figures(task, path, figures[path], rate)
            if len(figures) == 2:
                agreement = compare(task, results)
                print_ratios(task, figures["plain"], figures["ours"], args.steps, bandwidth,
                             agreement)


if __name__ == "__main__":
    run_main(lambda: main(ARGS))
