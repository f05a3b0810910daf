"""Stage 3, Pair-DPO: each step sees both halves of the same homologous records.

reads   pairs.jsonl of stage 2 and a checkpoint: the policy, and by default also the reference
writes  OUT/checkpoint          what stage 1 (and the original program) loads
        OUT/train.jsonl         one line per step: losses, margins, log-prob changes, accuracy, …
        OUT/reference.safetensors, OUT/state   what an interrupted run continues from

    python 03_pair_dpo.py --pairs runs/try/pairs/pairs.jsonl --out runs/try/train

Per record, with Δ = [log π(win) − log π_ref(win)] − [log π(lose) − log π_ref(lose)]:

    loss = −log σ(β Δ_und) − log σ(β Δ_gen)     (Eq. 12; Eq. 6 and 15 print one σ of a product)

Text: the sum over answer tokens and <|eot|>, behind the prompt they were sampled behind. Image: the
sum over the slots of one random mask, the same for win and lose, policy and reference.
"""

from pathlib import Path

from hermesflow.options import add_model_options, model_inputs, require_positive, stage_parser


def parse_args(argv=None):
    parser = stage_parser(__doc__)
    add = parser.add_argument_group("input and output").add_argument
    add("--pairs", type=Path, required=True, help="pairs.jsonl of 02_score.py")
    add("--out", type=Path, required=True, help="output folder")
    add("--overwrite", action="store_true", help="empty OUT first")
    add_model_options(parser)
    add("--reference", help="another checkpoint as reference [the policy at the start]")
    add = parser.add_argument_group("loss").add_argument
    add("--beta", type=float, default=0.2, help="β of Eq. 12")
    add("--und", type=float, default=1.0, help="weight of the understanding half")
    add("--gen", type=float, default=1.0, help="weight of the generation half")
    add("--nll-und", type=float, default=0.0, help="winning caption's NLL per token, times --und")
    add("--nll-gen", type=float, default=0.0, help="winning image's NLL per slot, times --gen")
    add("--cond-dropout", type=float, default=0.1, help="share of images behind an empty text")
    add("--guidance", type=float, default=0.0, help="image log-probs of (1 + g)·cond − g·uncond")
    add = parser.add_argument_group("optimization").add_argument
    add("--steps", type=int, default=3000, help="optimizer steps")
    add("--epochs", type=float, help="passes over the pairs, instead of --steps [0: --steps]")
    add("--batch", type=int, default=32, help="records per step, over all processes (paper: 8 x 4)")
    add("--micro-batch", type=int, default=4, help="records per forward pass and process")
    add("--lr", type=float, default=2e-5, help="highest learning rate")
    add("--warmup", type=float, default=0.05, help="share of the steps")
    add("--schedule", choices=["cosine", "linear", "constant_with_warmup"], default="cosine",
        help="of the learning rate")
    add("--weight-decay", type=float, default=0.01, help="of matrices")
    add("--clip", type=float, default=1.0, help="largest gradient norm")
    add("--precision", choices=["no", "bf16", "fp16"], default="no", help="autocast")
    add("--gradient-checkpointing", action="store_true", help="less memory, a fifth more work")
    add = parser.add_argument_group("run").add_argument
    add("--round", type=int, default=1, help="self-play round: enters all seeds")
    add("--seed", type=int, default=0, help="enters all seeds")
    add("--save-every", type=int, default=100, help="steps between states to continue from")
    add("--track", help="also log to one of accelerate's trackers: tensorboard, wandb, …")
    args = parser.parse_args(argv)
    require_positive(parser, args, "steps", "batch", "micro_batch")
    return args


if __name__ == "__main__":
    ARGS = parse_args()  # before the heavy imports, so that --help answers at once

import math
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import get_scheduler

from hermesflow.files import InputError, load_tensors, remove, save_tensors
from hermesflow.records import CAPTION_QUESTION, Pair, check_pairs, read_jsonl
from hermesflow.runs import (micro_batches, prepare_output, resume, run_main, save_state, say,
                             start_accelerator, write_log)
from hermesflow.sampling import stable_seed, uniforms
from hermesflow.showo import decay_groups
from model import ImageBatch, LogProbs, Model, TextBatch, load, save

WIN, LOSE = 0, 1  # columns of (B, 2) log-probs

# --------------------------------------------------------------------------------------------- loss


def margins(policy: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Δ: (B, 2) log-probs of win and lose under policy and reference -> (B,)."""
    ratio = policy - reference
    return ratio[:, WIN] - ratio[:, LOSE]


def dpo_loss(delta: torch.Tensor, beta: float) -> torch.Tensor:
    """−log σ(βΔ), per record: one term of Eq. 12."""
    return -F.logsigmoid(beta * delta)


def pair_dpo(und: LogProbs, gen: LogProbs, reference: torch.Tensor, beta: float,
             und_weight=1.0, gen_weight=1.0, nll_und_weight=0.0, nll_gen_weight=0.0) -> tuple:
    """The loss of a micro-batch, and the figures to watch. reference: (B, 2 halves, 2)."""
    ref_und, ref_gen = reference.unbind(1)  # (B, 2) each
    delta_und = margins(und.sums, ref_und)  # (B,)
    delta_gen = margins(gen.sums, ref_gen)  # (B,)

    # Eq. 12: each half is its own DPO term; the optional NLL of the winners is added
    loss_und = dpo_loss(delta_und, beta).mean()
    loss_gen = dpo_loss(delta_gen, beta).mean()
    nll_und = -(und.sums[:, WIN] / und.counts[:, WIN]).mean()  # per token
    nll_gen = -(gen.sums[:, WIN] / gen.counts[:, WIN]).mean()  # per masked slot
    loss = (und_weight * (loss_und + nll_und_weight * nll_und)
            + gen_weight * (loss_gen + nll_gen_weight * nll_gen))
    log = {"loss": loss}
    log |= figures("und", loss_und, nll_und, delta_und, und, ref_und, beta)
    log |= figures("gen", loss_gen, nll_gen, delta_gen, gen, ref_gen, beta)
    return loss, log


def figures(half: str, loss, nll, delta, logps: LogProbs, reference, beta: float) -> dict:
    """What to watch of one half: falling log-probs of winners are likelihood displacement."""
    change = (logps.sums - reference).mean(0)
    return {f"loss_{half}": loss, f"nll_{half}": nll, f"margin_{half}": beta * delta.mean(),
            f"accuracy_{half}": (delta > 0).float().mean(),
            f"win_change_{half}": change[WIN], f"lose_change_{half}": change[LOSE],
            f"win_length_{half}": logps.counts[:, WIN].mean(),
            f"lose_length_{half}": logps.counts[:, LOSE].mean()}


# --------------------------------------------------------------------------------------------- data


class Visit(NamedTuple):  # of a record, in one epoch
    pair: Pair
    epoch: int


def training_order(pairs: list[Pair], steps: int, batch: int, seed: int) -> list[Visit]:
    """steps·batch visits: a new seeded permutation of the records every epoch."""
    order = []
    epoch = 0
    while len(order) < steps * batch:
        generator = torch.Generator().manual_seed(stable_seed(seed, epoch, "order"))
        shuffled = torch.randperm(len(pairs), generator=generator)
        order += [Visit(pairs[i], epoch) for i in shuffled]
        epoch += 1
    return order[: steps * batch]


def make_batch(model: Model, visits: list[Visit], seed: tuple, cond_dropout: float,
               guidance_scale: float) -> tuple[TextBatch, ImageBatch]:
    """Both halves of the same records: captions of the image x, and images of the text y.

    Win and lose share the text (dropped for some records, as guidance needs it) and the mask, both
    seeded by (seed, round, id, epoch).
    """
    texts = []
    mask_seeds = []
    for pair, epoch in visits:
        draw = uniforms(stable_seed(*seed, pair.id, epoch, "drop"), 1).item()
        texts.append("" if draw < cond_dropout else pair.drawing_text)
        mask_seeds.append(stable_seed(*seed, pair.id, epoch, "mask"))
    masks = model.training_masks(mask_seeds)  # (B, N)
    x = torch.tensor([p.image_codes for p, _ in visits])  # (B, N)
    captions = [[p.win_caption_ids, p.lose_caption_ids] for p, _ in visits]
    images = torch.tensor([[p.win_image_codes, p.lose_image_codes] for p, _ in visits])  # (B, 2, N)
    return (TextBatch(x, [CAPTION_QUESTION] * len(visits), captions),
            ImageBatch(texts, images, masks, guidance_scale))


# ----------------------------------------------------------------------------------------- training


@torch.no_grad()
def reference_logps(model: Model, plan: list[list[range]], batch_at, total: int,
                    accelerator) -> torch.Tensor:
    """(total visits, 2, 2) log-probs of all that training will see, under the model as it is now.

    Masks are seeded, so this is known in advance: no reference model sits in memory in training.
    Batches are those of training, which makes the log ratio at step 0 exactly zero.
    """
    logps = torch.zeros(total, 2, 2, device=accelerator.device)
    for ranges in tqdm(plan, desc="reference", disable=not accelerator.is_main_process):
        for at in ranges:
            und, gen = model.pair_logps(*batch_at(model, at))
            logps[at.start : at.stop] = torch.stack([und.sums, gen.sums], 1)  # (B, 2, 2)
    return accelerator.reduce(logps, "sum").cpu()  # zero where another process has the visit


def train_step(model: Model, optimizer, ranges: list[range], batch_at, reference,
               loss_fn, clip: float, accelerator) -> dict[str, float]:
    """One optimizer step over the micro-batches of this process; the mean figures of all."""
    watched = []
    for at in ranges:
        with accelerator.accumulate(model.net):
            und, gen = model.pair_logps(*batch_at(model, at))
            ref = reference[at.start : at.stop].to(accelerator.device)  # (B, 2, 2)
            loss, log = loss_fn(und, gen, ref)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(model.net.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
        watched.append(torch.stack([v.detach().float() for v in log.values()]))
    mean = accelerator.reduce(torch.stack(watched).mean(0), "mean").tolist()
    return {**dict(zip(log, mean)), "grad_norm": float(norm)}


def assert_healthy(log: dict, ids: list[str], out: Path, own_reference: bool) -> None:
    """Abort on a NaN or infinite loss, or if step 0 is not at 2 ln 2 (policy = reference)."""
    if not (math.isfinite(log["loss"]) and math.isfinite(log["grad_norm"])):
        raise InputError(f"step {log['step']}: loss {log['loss']}, gradient norm "
                         f"{log['grad_norm']}; records {', '.join(ids)}; the last state is kept, "
                         "a lower --lr or --precision no may help")
    start = log["loss_und"] + log["loss_gen"]
    expected = 2 * math.log(2)
    if log["step"] == 0 and own_reference and abs(start - expected) > 1e-5:
        raise InputError(f"step 0: loss {start:.6f} instead of 2·ln 2 = {expected:.6f}: another loss, "
                         f"or {out}/reference.safetensors of another policy (use --overwrite)")


# --------------------------------------------------------------------------------------------- main


def main(args):
    pairs = read_jsonl(args.pairs, Pair)
    steps = args.steps
    if args.epochs:
        steps = max(1, math.ceil(args.epochs * len(pairs) / args.batch))
    accelerator = start_accelerator(args.batch, args.micro_batch, args.device,
                                    mixed_precision=args.precision, log_with=args.track,
                                    project_dir=str(args.out))
    settings = vars(args) | {"steps": steps, "records per step": args.batch}
    inputs = {"pairs": args.pairs, "reference": args.reference, **model_inputs(args)}
    if not prepare_output(args.out, settings, "checkpoint/config.json", inputs):
        return say(f"{args.out / 'checkpoint'} is complete")
    say(f"round {args.round}: training {args.model} on {len(pairs)} pairs, "
        f"{steps} steps of {args.batch} records")
    accelerator.init_trackers("pair-dpo", {k: str(v) for k, v in settings.items()})

    seed = (args.seed, args.round)
    order = training_order(pairs, steps, args.batch, stable_seed(*seed))
    plan = [micro_batches(s, args.batch, args.micro_batch, accelerator) for s in range(steps)]

    def batch_at(model: Model, at: range) -> tuple[TextBatch, ImageBatch]:
        visits = order[at.start : at.stop]
        return make_batch(model, visits, seed, args.cond_dropout, args.guidance)

    def prepare(folder) -> tuple:  # model and optimizer together, as sharding wants it
        model = load(folder, args.image_tokenizer, args.text_tokenizer)
        model.net.checkpoint_activations(args.gradient_checkpointing)
        optimizer = torch.optim.AdamW(decay_groups(model.net, args.weight_decay), lr=args.lr)
        model.net, optimizer = accelerator.prepare(model.net, optimizer)
        return model, optimizer

    # the reference first, so that it never shares the memory with the optimizer's state
    file = args.out / "reference.safetensors"
    model = None
    if not file.exists():
        model, optimizer = prepare(args.reference or args.model)
        check_pairs(model, pairs, args.pairs)
        logps = reference_logps(model, plan, batch_at, len(order), accelerator)
        if accelerator.is_main_process:
            save_tensors(file, {"logps": logps})
        accelerator.wait_for_everyone()
    if model is None or args.reference:
        accelerator.free_memory()
        model, optimizer = prepare(args.model)
    reference = load_tensors(file)["logps"]

    scheduler = get_scheduler(args.schedule, optimizer, round(args.warmup * steps), steps)
    accelerator.register_for_checkpointing(scheduler)
    start = resume(accelerator, args.out)
    loss_fn = partial(pair_dpo, beta=args.beta, und_weight=args.und, gen_weight=args.gen,
                      nll_und_weight=args.nll_und, nll_gen_weight=args.nll_gen)
    model.net.train()
    bar = tqdm(range(start, steps), desc="Pair-DPO", initial=start, total=steps,
               disable=not accelerator.is_main_process)
    for step in bar:
        log = {"step": step, **train_step(model, optimizer, plan[step], batch_at, reference,
                                          loss_fn, args.clip, accelerator)}
        log["lr"] = scheduler.get_last_lr()[0]
        ids = [v.pair.id for v in order[step * args.batch : (step + 1) * args.batch]]
        assert_healthy(log, ids, args.out, args.reference is None)
        scheduler.step()
        write_log(log, accelerator, args.out)
        bar.set_postfix({k: f"{log[k]:.2f}" for k in ("loss", "accuracy_und", "accuracy_gen")})
        if args.save_every and (step + 1) % args.save_every == 0 and step + 1 < steps:
            save_state(accelerator, args.out, step + 1)

    state = accelerator.get_state_dict(model.net)
    if accelerator.is_main_process:
        save(model, args.out / "checkpoint", state)
        remove(args.out / "state", args.out / "state.new")
        print(f"{len(pairs)} pairs, {steps} steps: {args.out / 'checkpoint'}")
    accelerator.free_memory()
    del model, optimizer  # a DDP model that outlives its process group can hang
    accelerator.end_training()


if __name__ == "__main__":
    run_main(lambda: main(ARGS), "--micro-batch 1, --gradient-checkpointing or --precision bf16")
