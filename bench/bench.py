"""The original algorithm against ours: time, memory, counted work and results of every stage, on the same random weights.

    python bench/bench.py --size mid                                        # about 10 minutes on 2 CPU cores
    python bench/bench.py --size 1.3b --device cuda --dtype bfloat16        # Show-o's size on a GPU

"plain" is the original's algorithm in float32, as tests/plain.py writes it down; "ours" is what the stages call, in --dtype.
Every measurement is a process of its own, so that peak memory belongs to it. The plain path runs a part of the work and is
scaled up (texts and image batches cost the same each); the table says how much of it ran. Work is counted by torch's
FlopCounterMode. Results of both are compared: tokens one by one, log-probs and losses by their largest difference.

    captions   ten captions of one image (the ten released settings)
    questions  ten questions about each of four images, greedy
    images     sixteen images of one prompt with guidance; per step, without the first, which ours shares
    dpo        one Pair-DPO record: reference, forward, backward
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PhiConfig
from transformers.activations import ACT2FN

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import plain  # noqa: E402
from conftest import stage  # noqa: E402
from model import (CAPTION_QUESTION, Ask, Drawing, Segment, Tokens, answer_segment, build, draw_images,  # noqa: E402
                   image_segment, load, load_tokenizer, pack, random_mask, save_tensors, load_tensors, seed_of, uniforms,
                   write_text)
from transformers.models.phi.modeling_phi import PhiRotaryEmbedding  # noqa: E402

SIZES = {"mid": dict(hidden_size=512, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8), "1.3b": {}}
TASKS = ("captions", "questions", "images", "dpo")
PROMPT = "a photograph of an old fisherman mending a blue net beside his red boat at dawn"
QUESTIONS = ["what color is the net?", "is there a boat?", "what is the man doing?", "is the man young?",
             "what color is the boat?", "what time of day is it?", "is the net blue or green?", "how many boats are there?",
             "is he a fisherman?", "where is the boat?"]


# --------------------------------------------------------------------------------------------------------------- model


def empty_model(size: str):
    tokenizer = load_tokenizer(ROOT / "tests" / "golden" / "phi-1_5-tokenizer")
    text = len(tokenizer)
    config = dict(vocab_size=text + len(Tokens.SPECIAL) + 8193, llm_vocab_size=text, codebook_size=8192,
                  num_vq_tokens=1024)
    return build(config, PhiConfig(**SIZES[size]), tokenizer)


def random_model(size: str, device: str, dtype, seed: int = 0):
    """Show-o with random weights: Phi-1.5's tokenizer, 8,192 codes, 1,024 image tokens; or the toy's base."""
    if size == "toy":
        model = load(ROOT / "toy" / "base", device=device, dtype=dtype)[0]
        for p in model.parameters():
            p.data *= 1 + 0.1 * seed  # another seed: another model
        return model
    model = empty_model(size).to(dtype).to_empty(device=device)
    model.showo.model.rotary_emb = PhiRotaryEmbedding(model.showo.config).to(device)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                p.fill_(1.0)
            else:
                sharp = 5 if "lm_head" in name else 1  # decided choices, as a trained model's, not 8,192 ties
                p.normal_(0, 0.04 * sharp, generator=generator)
    return model.eval()


def as_published(model):
    """The plain path computes gelu_new as transformers does, in eight kernels; ours in one."""
    for layer in model.showo.model.layers:
        layer.mlp.activation_fn = ACT2FN[model.showo.config.hidden_act]
    return model


# --------------------------------------------------------------------------------------------------------------- tasks


def codes(model, n: int) -> torch.Tensor:
    rows = [uniforms(seed_of("codes", i), model.tokens.image_tokens) for i in range(n)]
    return (torch.stack(rows) * model.tokens.codes).long().to(model.device)


def caption_asks(model) -> list[Ask]:
    sampling = stage("01_sample")
    settings = [sampling.setting(s) for s in sampling.RELEASED_SETTINGS]
    prompt = model.tokens.ask(CAPTION_QUESTION)
    return [Ask(0, prompt, k, t, seed_of("caption", i)) for i, (k, t) in enumerate(settings)]


def question_asks(model) -> list[Ask]:
    return [Ask(i, model.tokens.ask(f"Question:{q} Choice:['yes', 'no']")) for i in range(4) for q in QUESTIONS]


def texts(model, asks: list[Ask], images: int, tokens: int, path: str, some: list[int]):
    """Ours: all texts. Plain: those numbered in `some`, one after the other."""
    pictures = codes(model, images)
    if path == "ours":
        written = write_text(model, pictures, asks, tokens)
        return {str(i): torch.tensor(w) for i, w in enumerate(written)}, 1.0
    written = {str(i): torch.tensor(plain.write(model, pictures[asks[i].image], asks[i], tokens)) for i in some}
    return written, len(asks) / len(some)


def images(model, steps: int, path: str, args):
    """Ours: sixteen images. Plain: the first of them, as many as fit into memory together."""
    seeds = [seed_of("image", k) for k in range(16)]
    if path == "ours":
        how = Drawing(steps, args.guidance)
        return {"codes": draw_images(model, [PROMPT] * 16, seeds, how)}, 1.0
    some = seeds[: args.plain_images]
    noise = torch.stack([uniforms(s, steps, 2, model.tokens.image_tokens) for s in some]).to(model.device)
    return {"codes": plain.draw(model, [PROMPT] * len(some), noise, steps, args.guidance)}, 16 / len(some)


def dpo_rows(tokens, pictures: list[list[int]]) -> tuple[list, list]:
    """The rows of one record: captions of 71 and 72 tokens about picture 0; pictures 1 and 2 under one mask."""
    prompt = tokens.ask(CAPTION_QUESTION)
    captions = [f"{PROMPT}. {' '.join(QUESTIONS)}", f"{QUESTIONS[0]} {PROMPT} in the harbour, and {PROMPT} again. {PROMPT}."]
    und = [Segment(tokens.look(pictures[0]), bidirectional=True),
           *(answer_segment(prompt, [*tokens.encode(c), tokens.eot]) for c in captions)]
    mask = random_mask(tokens.image_tokens, 9)
    gen = [Segment(tokens.draw(PROMPT)), *(image_segment(tokens, p, mask) for p in pictures[1:])]
    return und, gen


def dpo(size, path: str, args):
    """The loss of one record and its gradients. Plain holds policy and reference; ours asks the reference first.
    Making the models takes no time here."""
    training = stage("03_pair_dpo")
    reference = random_model(size, args.device, torch.float32, seed=1)
    und, gen = dpo_rows(reference.tokens, codes(reference, 3).tolist())
    policy = random_model(size, args.device, torch.float32) if path == "plain" else None
    autocast = torch.autocast(args.device, getattr(torch, args.dtype), enabled=path == "ours" and args.dtype != "float32")
    wait(args.device)
    start = time.perf_counter()
    if path == "ours":
        with torch.no_grad(), autocast:
            theirs = [reference.logprobs([row])[0] for row in (und, gen)]
        del reference
        wait(args.device)
        pause = time.perf_counter()
        policy = random_model(size, args.device, torch.float32)
        if args.gradient_checkpointing:
            policy.train().showo.gradient_checkpointing_enable()
        start += time.perf_counter() - pause
    with autocast:
        if path == "plain":
            loss = plain.pair_dpo(as_published(policy), as_published(reference), [und, gen], 0.2)
        else:
            packs = [pack([row], policy.tokens.pad, policy.device) for row in (und, gen)]
            loss = sum(training.preference_loss(training.margins(sums, ref), 0.2).sum()
                       for (sums, _), ref in zip(policy(*packs), theirs))
    loss.backward()
    wait(args.device)
    seconds = time.perf_counter() - start
    gradient = torch.stack([p.grad.float().norm() for p in policy.parameters()])
    return {"loss": loss.detach()[None].cpu(), "gradient": gradient.cpu()}, 1.0, seconds


# ---------------------------------------------------------------------------------------------------------- measuring


def attention_flops(query, key, value, *_, out_shape=None, **__):  # FlopCounterMode does not know the CPU's kernel
    (B, H, Q, d), K = query, key[2]
    return 4 * B * H * Q * K * d


def attention_backward_flops(grad, query, key, *_, out_shape=None, **__):
    return 5 * attention_flops(query, key, None) // 2


def counter() -> FlopCounterMode:
    aten = torch.ops.aten
    return FlopCounterMode(display=False, custom_mapping={
        aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops})


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def memory(device: str) -> float:
    """Peak GB of this process so far (CPU), or of its tensors (GPU)."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def measure(task: str, path: str, args) -> dict:
    """One task on one path, in this process. Plain is counted while it runs; ours runs again for that."""
    empty = memory(args.device)
    dtype = torch.float32 if path == "plain" else getattr(torch, args.dtype)
    if task == "dpo":
        def work(_):
            return dpo(args.size, path, args)
    else:
        model = random_model(args.size, args.device, dtype)
        if path == "plain":
            as_published(model)

        def work(length):  # tokens or steps, if not those of the command line
            if task == "captions":
                return texts(model, caption_asks(model), 1, length or args.caption_tokens, path, [0, 9])
            if task == "questions":
                return texts(model, question_asks(model), 4, length or args.answer_tokens, path, [0, 39])
            return images(model, length or args.steps, path, args)

    def timed(length=None, counting=nullcontext()):
        wait(args.device)
        start = time.perf_counter()
        with counting:
            found, scale, *seconds = work(length)
        wait(args.device)
        return *(seconds or [time.perf_counter() - start]), found, scale

    if path == "ours" and (args.device == "cuda" or args.size == "toy"):
        timed()  # warm up
    flops = counter()
    seconds, found, scale = timed(None, flops if path == "plain" else nullcontext())
    peak, first = memory(args.device) - empty, 0.0
    if path == "ours":
        first = timed(1)[0] if task in ("captions", "images") else 0.0
        timed(None, flops)
    save_tensors(Path(args.results) / f"{task}-{path}.safetensors", {k: v.cpu() for k, v in found.items()})
    result = dict(seconds=seconds * scale, flops=flops.get_total_flops() * scale, peak=peak, part=1 / scale, first=first)
    if task == "captions":
        step = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if "embed" not in n)
        keys = 2 * model.showo.config.num_hidden_layers * (model.tokens.image_tokens + 3) * model.showo.config.hidden_size
        result["bytes"] = (step + keys * dtype.itemsize) * (args.caption_tokens - 1)  # to read again for every token
    return result


def ceiling(args) -> dict:
    """Measured matmul FLOP/s in float32 and --dtype, and copy bandwidth in bytes/s."""
    n = 8192 if args.device == "cuda" else 2048

    def best(f, times=8):
        found = []
        for _ in range(times):
            wait(args.device)
            start = time.perf_counter()
            f()
            wait(args.device)
            found.append(time.perf_counter() - start)
        return min(found)

    result = {}
    for name in {"float32", args.dtype}:
        a = torch.randn(n, n, device=args.device).to(getattr(torch, name))
        result[name] = 2 * n**3 / best(lambda: a @ a)
    x = torch.randn(2**27, device=args.device)
    y = torch.empty_like(x)
    result["bandwidth"] = 2 * x.nbytes / best(lambda: y.copy_(x))
    return result


# -------------------------------------------------------------------------------------------------------------- report


def compare(task: str, folder: Path) -> str:
    ours, theirs = (load_tensors(folder / f"{task}-{path}.safetensors") for path in ("ours", "plain"))
    if task == "dpo":
        loss = (ours["loss"] - theirs["loss"]).abs().item()
        gradient = ((ours["gradient"] - theirs["gradient"]).abs() / theirs["gradient"].clamp(min=1e-6)).max().item()
        return f"loss {theirs['loss'].item():.4f}, differs by {loss:.0e}; gradient norms by at most {gradient:.0e} of each"
    same = total = 0
    for key, b in theirs.items():
        a = ours[key][: len(b)]
        total += b.numel()
        same += int((a == b).sum()) if a.shape == b.shape else 0
    return f"{same} of {total} tokens equal"


def child(task: str, path: str, folder: Path, argv: list[str]) -> dict:
    command = [sys.executable, __file__, *argv, "--worker", task, path, "--results", str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{task}, {path}: failed")
    return json.loads(done.stdout.splitlines()[-1])


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["toy", *SIZES], default="mid")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", default="float32", help="of ours: weights for sampling, autocast for training")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--paths", nargs="+", choices=["plain", "ours"], default=["plain", "ours"])
    parser.add_argument("--caption-tokens", type=int, default=40)
    parser.add_argument("--answer-tokens", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3, help="decoding steps of the images")
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--plain-images", type=int, default=4, help="images that the plain path draws together")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--results", help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    args = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.worker:
        task, path = args.worker
        return print(json.dumps(ceiling(args) if task == "ceiling" else measure(task, path, args)))
    with tempfile.TemporaryDirectory() as folder:
        top = child("ceiling", "ours", Path(folder), sys.argv[1:])
        print(f"size {args.size}, {args.device}, ours in {args.dtype}, torch {torch.__version__}, "
              f"{torch.get_num_threads()} threads; " + ", ".join(
                  f"{k} {v / 1e9:,.0f} G{'B' if k == 'bandwidth' else 'FLOP'}/s" for k, v in sorted(top.items())))
        for task in args.tasks:
            found = {path: child(task, path, Path(folder), sys.argv[1:]) for path in args.paths}
            for path, r in found.items():
                name = "float32" if path == "plain" else args.dtype
                rate = r["flops"] / r["seconds"]
                print(f"{task:10} {path:6} {r['flops'] / 1e12:10.3f} TFLOP {r['seconds']:10.2f} s {r['peak']:7.2f} GB "
                      f"{rate / 1e9:9.1f} GFLOP/s, {rate / top[name]:4.0%} of matmul; ran {r['part']:.0%}", flush=True)
            if len(found) < 2:
                continue
            p, o = found["plain"], found["ours"]
            print(f"{task:10} ratio  work {p['flops'] / o['flops']:.2f}, time {p['seconds'] / o['seconds']:.2f}, memory "
                  f"{p['peak'] / o['peak']:.2f}; {compare(task, Path(folder))}")
            if task == "captions":
                rate = o["bytes"] / (o["seconds"] - o["first"])
                print(f"{task:10} decoding reads {rate / 1e9:.1f} GB/s of weights and image keys, "
                      f"{rate / top['bandwidth']:.0%} of bandwidth")
            if task == "images":
                theirs, later = p["seconds"] / args.steps, (o["seconds"] - o["first"]) / (args.steps - 1)
                print(f"{task:10} per step {theirs:.2f} s and {later:.2f} s: {theirs / later:.2f}; all 50 steps "
                      f"{50 * theirs:.0f} s and {o['first'] + 49 * later:.0f} s: {50 * theirs / (o['first'] + 49 * later):.2f}",
                      flush=True)


if __name__ == "__main__":
    main()
