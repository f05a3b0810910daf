"""Stage 3, Pair-DPO: one step sees both halves of the same homologous records and prefers their winners.

reads   pairs.jsonl of stage 2 and a checkpoint: the policy, and by default also the reference
writes  OUT/checkpoint          what stage 1 (and the original program) loads
        OUT/train.jsonl         one line per step: losses, margins, log-prob changes, accuracy, lengths, gradient norm
        OUT/reference.safetensors, OUT/state   what an interrupted run continues from

    python 03_pair_dpo.py --model toy/base --pairs runs/toy/round1/pairs/pairs.jsonl --out runs/toy/round1/train

Per record, with Δ = [log π(win) − log π_ref(win)] − [log π(lose) − log π_ref(lose)]:

    loss = −log σ(β Δ_und) − log σ(β Δ_gen)     (Eq. 12; Eq. 6 and 15 print one σ of a product)

Text: the sum over answer tokens and <|eot|>, in the very format that was sampled. Image: the sum over the slots of one
random mask, the same for win and lose, policy and reference. With --guidance, image log-probs are those of the guided
policy, which is what guided drawings are drawn from. Defaults are the paper's.
"""

import argparse
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from tqdm import tqdm
from transformers import get_scheduler

from model import (CAPTION_QUESTION, InputError, Pair, Segment, add_model_arguments, answer_segment, claim, decay_groups,
                   image_segment, load, load_tensors, model_inputs, pack, random_mask, read_jsonl, read_text, remove, run,
                   save, save_tensors, seed_of, uniforms, write_file, writing)

WIN, LOSE = 1, 2  # segments of a packed row; 0 is the prefix they share


# -------------------------------------------------------------------------------------------------------------- loss


def margins(policy: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Δ: (B, 3) log-prob sums per segment under policy and reference -> (B,)."""
    ratio = policy - reference
    return ratio[:, WIN] - ratio[:, LOSE]


def preference_loss(delta: torch.Tensor, beta: float) -> torch.Tensor:
    """−log σ(βΔ), per record; one term of Eq. 12."""
    return -F.logsigmoid(beta * delta)


# -------------------------------------------------------------------------------------------------------------- rows


def understanding_row(tokens, pair: Pair) -> list[Segment]:
    """The image, and behind it the winning and the losing caption."""
    prompt = tokens.ask(CAPTION_QUESTION)
    captions = [answer_segment(prompt, [*ids, tokens.eot]) for ids in (pair.win_caption_ids, pair.lose_caption_ids)]
    return [Segment(tokens.look(pair.image_codes), bidirectional=True), *captions]


def generation_row(tokens, pair: Pair, epoch: int, args) -> list[Segment]:
    """The text, and behind it the winning and the losing image under one mask. Some texts are dropped, for guidance."""
    draw = uniforms(seed_of(args.seed, args.round, pair.id, epoch, "drop"), 1).item()
    text = "" if draw < args.drop_text else pair.drawing_text
    mask = random_mask(tokens.image_tokens, seed_of(args.seed, args.round, pair.id, epoch, "mask"))
    images = [image_segment(tokens, codes, mask) for codes in (pair.win_image_codes, pair.lose_image_codes)]
    return [Segment(tokens.draw(text)), *images]


def visits(pairs: list[Pair], steps: int, batch: int, seed: int) -> list[tuple[Pair, int]]:
    """The records in training order, each with its epoch: a new seeded permutation every epoch, steps·batch in all."""
    order, epoch = [], 0
    while len(order) < steps * batch:
        shuffled = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed_of(seed, epoch, "order")))
        order += [(pairs[i], epoch) for i in shuffled]
        epoch += 1
    return order[: steps * batch]


def micro_batches(step: int, args, accelerator) -> list[range]:
    """The visits that this process sees in a step, one range per forward pass."""
    size = args.micro_batch
    first = step * args.batch + accelerator.process_index * size
    return [range(start, start + size)
            for start in range(first, (step + 1) * args.batch, size * accelerator.num_processes)]


def both_halves(model, tokens, chunk, device, args):
    """Log-probs of one micro-batch: (B, 3) sums and (B, 3) counts for understanding, then for generation."""
    und = pack([understanding_row(tokens, pair) for pair, _ in chunk], tokens.pad, device)
    rows = [generation_row(tokens, pair, epoch, args) for pair, epoch in chunk]
    gen = pack(rows, tokens.pad, device)
    if args.guidance:
        untold = [[Segment(tokens.draw("")), *images] for _, *images in rows]
        gen |= dict(untold=pack(untold, tokens.pad, device), guidance=args.guidance)
    return model(und, gen)


# --------------------------------------------------------------------------------------------------------- reference


@torch.no_grad()
def reference_logprobs(model, tokens, order, accelerator, args) -> torch.Tensor:
    """(visits, 2, 3) log-probs of everything that training will see, under the model as it is now.

    Masks are seeded, so this is known in advance: no reference model sits in memory during training. Batches are those
    of training, which makes the step-0 ratio exactly one.
    """
    found = torch.zeros(len(order), 2, 3, device=accelerator.device)
    for step in tqdm(range(args.steps), desc="reference", disable=not accelerator.is_main_process):
        for at in micro_batches(step, args, accelerator):
            (und, _), (gen, _) = both_halves(model, tokens, [order[v] for v in at], accelerator.device, args)
            found[at.start : at.stop] = torch.stack([und, gen], 1)
    return accelerator.reduce(found, "sum").cpu()  # every visit was filled by one process, zero in the others


# ---------------------------------------------------------------------------------------------------------- training


def loss_and_log(model, tokens, chunk, reference, args, device) -> tuple[torch.Tensor, dict]:
    """The loss of one micro-batch, and the figures to watch. reference: (B, 2, 3)."""
    loss, log = 0.0, {}
    halves = both_halves(model, tokens, chunk, device, args)
    for half, (sums, counts), ref, weight, nll_weight in zip(("und", "gen"), halves, reference.to(device).unbind(1),
                                                             (args.und, args.gen), (args.nll_und, args.nll_gen)):
        delta = margins(sums, ref)
        preference = preference_loss(delta, args.beta).mean()
        nll = -(sums[:, WIN] / counts[:, WIN]).mean()  # per token of the winner
        loss = loss + weight * (preference + nll_weight * nll)
        change = (sums - ref).mean(0)
        log |= {f"loss_{half}": preference, f"nll_{half}": nll, f"margin_{half}": args.beta * delta.mean(),
                f"accuracy_{half}": (delta > 0).float().mean(), f"win_change_{half}": change[WIN],
                f"lose_change_{half}": change[LOSE], f"win_length_{half}": counts[:, WIN].mean(),
                f"lose_length_{half}": counts[:, LOSE].mean()}
    return loss, {"loss": loss} | log


def train(model, optimizer, tokens, order, reference, accelerator, args) -> None:
    """Warm-up and decay; continues from OUT/state if it is there."""
    scheduler = get_scheduler(args.schedule, optimizer, round(args.warmup * args.steps), args.steps)
    accelerator.register_for_checkpointing(scheduler)
    start = resume(accelerator, args.out)
    model.train()
    with tqdm(range(start, args.steps), desc="Pair-DPO", initial=start, total=args.steps,
              disable=not accelerator.is_main_process) as bar:
        for step in bar:
            figures = []
            for at in micro_batches(step, args, accelerator):
                with accelerator.accumulate(model):
                    loss, log = loss_and_log(model, tokens, [order[v] for v in at], reference[at.start : at.stop], args,
                                             accelerator.device)
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        norm = accelerator.clip_grad_norm_(model.parameters(), args.clip)
                    optimizer.step()
                    optimizer.zero_grad()
                    figures.append(torch.stack([v.detach().float() for v in log.values()]))
            mean = accelerator.reduce(torch.stack(figures).mean(0), "mean").tolist()
            log = {"step": step, **dict(zip(log, mean)), "grad_norm": float(norm), "lr": scheduler.get_last_lr()[0]}
            check(log, [order[v][0].id for v in range(step * args.batch, (step + 1) * args.batch)], args)
            scheduler.step()
            write_log(log, accelerator, args.out)
            bar.set_postfix({k: f"{log[k]:.2f}" for k in ("loss", "accuracy_und", "accuracy_gen")})
            if args.save_every and (step + 1) % args.save_every == 0 and step + 1 < args.steps:
                save_state(accelerator, args.out, step + 1)


def check(log: dict, ids: list[str], args) -> None:
    """Stop before anything is lost: at a loss that is no number, or a first step where policy and reference differ."""
    if not (math.isfinite(log["loss"]) and math.isfinite(log["grad_norm"])):
        raise InputError(f"step {log['step']}: loss {log['loss']}, gradient norm {log['grad_norm']}; records "
                         f"{', '.join(ids)}; the last state is kept, a lower --lr or --precision no may help")
    start = log["loss_und"] + log["loss_gen"]
    if log["step"] == 0 and args.reference is None and abs(start - 2 * math.log(2)) > 1e-5:
        raise InputError(f"step 0: loss {start:.6f} instead of 2·ln 2 = {2 * math.log(2):.6f}: "
                         f"{args.out}/reference.safetensors does not belong to this policy; use --overwrite")


def write_log(log: dict, accelerator, out: Path) -> None:
    accelerator.log({k: v for k, v in log.items() if k != "step"}, step=log["step"])
    if accelerator.is_main_process:
        with writing(out / "train.jsonl"), open(out / "train.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(log) + "\n")


def save_state(accelerator, out: Path, step: int) -> None:
    """Model, optimizer, schedule and random state, complete or not at all: a state without `step` does not count."""
    with writing(out / "state"):
        accelerator.save_state(str(out / "state.new"))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            write_file(out / "state.new" / "step", str(step))
            remove(out / "state")
            (out / "state.new").rename(out / "state")
    accelerator.wait_for_everyone()


def resume(accelerator, out: Path) -> int:
    """The step to start at; log lines of steps that will be done again are removed."""
    state = out / "state.new" if (out / "state.new" / "step").exists() else out / "state"  # the first if half replaced
    start = int(read_text(state / "step")) if (state / "step").exists() else 0
    if start:
        accelerator.load_state(str(state))
    if accelerator.is_main_process and (out / "train.jsonl").exists():
        lines = read_text(out / "train.jsonl").splitlines(keepends=True)[:start]
        write_file(out / "train.jsonl", "".join(lines))
    return start


# -------------------------------------------------------------------------------------------------------------- main


def check_pairs(pairs: list[Pair], tokens, path) -> None:
    for p in pairs:
        for name in ("image_codes", "win_image_codes", "lose_image_codes"):
            codes = getattr(p, name)
            if len(codes) != tokens.image_tokens or not all(0 <= c < tokens.codes for c in codes):
                raise InputError(f"{path}: id {p.id!r}: field '{name}' should be {tokens.image_tokens} codes below "
                                 f"{tokens.codes}; were the pairs made with another model?")
        for name in ("win_caption_ids", "lose_caption_ids"):
            if not all(0 <= t < tokens.vocab_size for t in getattr(p, name)):
                raise InputError(f"{path}: id {p.id!r}: field '{name}': a token is outside the vocabulary")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--pairs", type=Path, required=True, help="pairs.jsonl of 02_score.py")
    parser.add_argument("--reference", help="another checkpoint as reference [the policy at the start of the round]")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--overwrite", action="store_true", help="empty OUT first")
    parser.add_argument("--beta", type=float, default=0.2)
    parser.add_argument("--und", type=float, default=1.0, help="weight of the understanding half; 0: generation only")
    parser.add_argument("--gen", type=float, default=1.0, help="weight of the generation half; 0: understanding only")
    parser.add_argument("--nll-und", type=float, default=0.0, help="weight of the winning caption's NLL per token")
    parser.add_argument("--nll-gen", type=float, default=0.0, help="weight of the winning image's NLL per masked slot")
    parser.add_argument("--drop-text", type=float, default=0.1, help="share of records with an empty text, as Show-o")
    parser.add_argument("--guidance", type=float, default=0.0, help="image log-probs under the policy guided by this "
                        "much, (1 + g)·cond − g·uncond, at the price of a second generation half; paper: 0")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--epochs", type=float, help="instead of --steps: passes over the pairs")
    parser.add_argument("--batch", type=int, default=32, help="records per step, over all processes (paper: 8 x 4)")
    parser.add_argument("--micro-batch", type=int, default=4, help="records per forward pass and process")
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument("--warmup", type=float, default=0.05, help="share of the steps")
    parser.add_argument("--schedule", choices=["cosine", "linear", "constant_with_warmup"], default="cosine")
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--clip", type=float, default=1.0, help="largest gradient norm")
    parser.add_argument("--precision", choices=["no", "bf16", "fp16"], default="no", help="autocast")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--save-every", type=int, default=100, help="steps between states to continue from")
    parser.add_argument("--track", help="also log to one of accelerate's trackers: tensorboard, wandb, …")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--round", type=int, default=1)
    return parser.parse_args()


def main():
    args = parse_args()
    pairs = read_jsonl(args.pairs, Pair)
    args.steps = max(1, math.ceil(args.epochs * len(pairs) / args.batch)) if args.epochs else args.steps
    accelerator = Accelerator(mixed_precision=args.precision, log_with=args.track, project_dir=str(args.out),
                              cpu=args.device == "cpu" or not torch.accelerator.is_available())
    accelerator.gradient_accumulation_steps, rest = divmod(args.batch, args.micro_batch * accelerator.num_processes)
    if rest:
        raise InputError(f"--batch {args.batch} is not a multiple of --micro-batch {args.micro_batch} times "
                         f"{accelerator.num_processes} processes")
    inputs = {"pairs": args.pairs, "reference": args.reference}
    if not claim(args.out, args, "checkpoint/config.json", inputs | model_inputs(args)):
        return print(f"{args.out / 'checkpoint'} is complete")
    set_seed(args.seed)
    accelerator.init_trackers("pair-dpo", {k: str(v) for k, v in vars(args).items()})

    def prepared(folder):  # model and optimizer together, as sharding wants it
        model, vq = load(folder, args.image_tokenizer, args.text_tokenizer)
        if args.gradient_checkpointing:
            model.showo.gradient_checkpointing_enable()
        optimizer = torch.optim.AdamW(decay_groups(model, args.weight_decay), lr=args.lr, betas=(0.9, 0.999))
        return *accelerator.prepare(model, optimizer), model, vq

    order = visits(pairs, args.steps, args.batch, seed_of(args.seed, args.round))
    saved = args.out / "reference.safetensors"
    policy = None
    if not saved.exists():
        policy, optimizer, bare, vq = prepared(args.reference or args.model)
        check_pairs(pairs, bare.tokens, args.pairs)
        reference = reference_logprobs(policy, bare.tokens, order, accelerator, args)
        if accelerator.is_main_process:
            save_tensors(saved, {"logprobs": reference})
        accelerator.wait_for_everyone()
    if policy is None or args.reference:
        accelerator.free_memory()
        policy, optimizer, bare, vq = prepared(args.model)
    train(policy, optimizer, bare.tokens, order, load_tensors(saved)["logprobs"], accelerator, args)

    weights = accelerator.get_state_dict(policy)
    if accelerator.is_main_process:
        save(bare, vq, args.out / "checkpoint", weights)
        remove(args.out / "state", args.out / "state.new")
        print(f"{len(pairs)} pairs, {args.steps} steps: {args.out / 'checkpoint'}")
    accelerator.free_memory()
    del policy, optimizer  # a DDP model that outlives its process group can hang
    accelerator.end_training()


if __name__ == "__main__":
    run(main, "--micro-batch 1, --gradient-checkpointing or --precision bf16")
