"""Stage 3, Pair-DPO: each step sees both halves of the same homologous records.

reads   pairs.jsonl of stage 2 and a checkpoint: the policy, and by default also the reference
writes  OUT/checkpoint          what stage 1 (and the original program) loads
        OUT/train.jsonl         one line per step: losses, margins, log-prob changes, accuracy, …
        OUT/previews/000100.png   what the policy draws of fixed texts, if asked to
        OUT/reference.safetensors, OUT/state   what an interrupted run continues from

    python 03_pair_dpo.py --pairs runs/try/pairs/pairs.jsonl --out runs/try/train

Per record, with Δ = [log π(win) − log π_ref(win)] − [log π(lose) − log π_ref(lose)]:

    loss = −log σ(β Δ_und) − log σ(β Δ_gen)     (Eq. 12; Eq. 6 and 15 print one σ of a product)

Text: the sum over answer tokens and <|eot|>, behind the prompt they were sampled behind. Image: the
sum over the slots of one random mask, the same for win and lose, policy and reference.
"""

from pathlib import Path

from hermesflow.options import (COUNT, GUIDANCE, SEED, SHARE, above_zero, add_checkpoint_options,
                                add_dry_run, folder, integer, model_inputs, stage_parser,
                                unless_dry_run)
from hermesflow.outputs import Output, exit_if_complete, finish, run_main
from hermesflow.training_options import (SCHEDULES, WEIGHT, check_training, epochs, lora_rank,
                                         number_of_steps, tracker)


def parse_args(argv=None):
    parser = stage_parser(__doc__)
    add = parser.add_argument_group("input and output").add_argument
    add("--pairs", type=Path, required=True, help="pairs.jsonl of 02_score.py")
    add("--out", type=folder, required=True, help="output folder")
    add("--overwrite", action="store_true", help="empty OUT first")
    add_checkpoint_options(parser.add_argument_group("model"))
    add = parser.add_argument_group("loss").add_argument
    add("--reference", help="another checkpoint as reference [the policy at the start]")
    add("--beta", type=WEIGHT, default=0.2, help="β of Eq. 12")
    add("--und", type=WEIGHT, default=1.0, help="weight of the understanding half")
    add("--gen", type=WEIGHT, default=1.0, help="weight of the generation half")
    add("--nll-und", type=WEIGHT, default=0.0, help="winning caption's NLL per token, times --und")
    add("--nll-gen", type=WEIGHT, default=0.0, help="winning image's NLL per slot, times --gen")
    add("--complementary", action="store_true", help="score all slots: the rest under the complement")
    add("--cond-dropout", type=SHARE, default=0.1, help="share of images behind an empty text")
    add("--guidance", type=GUIDANCE, default=0.0, help="image log-probs of (1 + g)·cond − g·uncond")
    add = parser.add_argument_group("optimization").add_argument
    add("--steps", type=integer(1, 10**7), default=3000, help="optimizer steps")
    add("--epochs", type=epochs, dest="steps", metavar="EPOCHS",
        help="passes over the pairs; the last of --steps and --epochs counts")
    add("--batch", type=COUNT, default=32, help="records per step, of all processes (paper: 8 x 4)")
    add("--micro-batch", type=COUNT, default=4, help="records per forward pass and process")
    add("--lr", type=above_zero(10), default=2e-5, help="highest learning rate")
    add("--lora", type=lora_rank, metavar="RANK", help="train adapters only; takes ten times --lr")
    add("--warmup", type=SHARE, default=0.05, help="share of the steps")
    add("--schedule", choices=SCHEDULES, default="cosine", help="of the learning rate")
    add("--weight-decay", type=WEIGHT, default=0.01, help="of matrices")
    add("--clip", type=above_zero(1e6), default=1.0, help="largest gradient norm")
    add("--precision", choices=["no", "bf16", "fp16"], default="no", help="autocast")
    add("--gradient-checkpointing", action="store_true", help="less memory, a fifth more work")
    add = parser.add_argument_group("run").add_argument
    add("--round", type=COUNT, default=1, help="self-play round: enters all seeds")
    add("--seed", type=SEED, default=0, help="enters all seeds")
    add("--device", choices=["cpu"], help="cpu, also where there is an accelerator")
    add("--save-every", type=integer(0), default=100, help="steps between states; 0: at signals")
    add("--grad-norms-every", type=integer(0), default=100,
        help="steps between looks at each half's own gradient, which cost two more; 0: never")
    add("--preview-every", type=integer(0), default=0, help="steps between drawings; 0: never")
    add("--preview-guidance", type=GUIDANCE, default=5.0, help="of the drawings, in 16 steps")
    add("--track", type=tracker, help="also log to accelerate's tracker: tensorboard, wandb, …")
    add_dry_run(parser)
    args = parser.parse_args(argv)
    check_training(parser, args)
    return unless_dry_run(args, reference=args.reference, **model_inputs(args))


def output_of(args) -> Output:
    """What decides the checkpoint. pairs.jsonl holds digests of its tensors."""
    steps = number_of_steps(args.steps, args.pairs, args.batch)
    return Output(args.out, "03_pair_dpo", "checkpoint/config.json",
                  writes=("checkpoint", "train.jsonl", "reference.safetensors", "previews"),
                  args={k: v for k, v in vars(args).items() if v is not None} | {"steps": steps},
                  inputs={"pairs": args.pairs, "reference": args.reference, **model_inputs(args)},
                  free=("device", "micro_batch", "save_every", "track", "gradient_checkpointing",
                        "grad_norms_every", "preview_every", "preview_guidance"),
                  derived=(), code=(__file__,))


# before the heavy imports, so that --help, a mistake and a complete output are answered at once
if __name__ == "__main__":
    ARGS = parse_args()
    run_main(lambda: exit_if_complete(output_of(ARGS)))

from functools import partial

import torch
import torch.nn.functional as F
from transformers import get_scheduler

from hermesflow.jsonl import read_jsonl
from hermesflow.lora import add_adapters, merge_adapters
from hermesflow.records import CAPTION_QUESTION, Pair
from hermesflow.runs import prepare_output, say
from hermesflow.sampling import stable_seed, uniforms
from hermesflow.states import State, final_weights
from hermesflow.tables import check_pairs, tensors_of
from hermesflow.training import (Interruptions, ReferenceFile, Visit, decay_groups, micro_batches,
                                 remaining_steps, start_accelerator, training_order)
from hermesflow.watching import (Previews, assert_healthy, distance, due, figures, gradient_figures,
                                 half_norms, mean_figures, start_trackers, write_log)
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
    log_und = figures("und", loss_und, nll_und, delta_und, und, ref_und, beta)
    log_gen = figures("gen", loss_gen, nll_gen, delta_gen, gen, ref_gen, beta)
    return loss, {"loss": loss} | log_und | log_gen


# --------------------------------------------------------------------------------------------- data


def make_batch(model: Model, visits: list[Visit], seed: tuple, cond_dropout=0.0, guidance_scale=0.0,
               complementary=False) -> tuple[TextBatch, ImageBatch]:
    """Both halves of the same records: captions of the image x, and images of the text y.

    Win and lose share text (dropped for some records, for guidance) and mask, both seeded by (seed,
    round, id, epoch). complementary: what the mask leaves out is scored under its complement.
    """
    tensors = [tensors_of(pair) for pair, _ in visits]
    mask_seeds = [stable_seed(*seed, pair.id, epoch, "mask") for pair, epoch in visits]
    texts = []
    for pair, epoch in visits:
        draw = uniforms(stable_seed(*seed, pair.id, epoch, "drop"), 1).item()
        texts.append("" if draw < cond_dropout else pair.drawing_text)
    masks = model.training_masks(mask_seeds)  # (B, N)
    if complementary and masks is not None:
        masks = torch.stack([masks, ~masks], 1)  # (B, 2, N)
    codes = torch.stack([t["image"] for t in tensors])  # (B, N)
    x = model.looked_at([pair.image for pair, _ in visits], codes)
    captions = [[t["win_caption"].tolist(), t["lose_caption"].tolist()] for t in tensors]
    ended = [[p.win_ended, p.lose_ended] for p, _ in visits]
    images = [torch.stack([t["win_image"], t["lose_image"]]) for t in tensors]
    return (TextBatch(x, [CAPTION_QUESTION] * len(visits), captions, ended),
            ImageBatch(texts, torch.stack(images), masks, guidance_scale,  # (B, 2, N)
                       [pair.drawing_text for pair, _ in visits]))


# ----------------------------------------------------------------------------------------- training


@torch.no_grad()
def compute_reference(model: Model, reference: ReferenceFile, batch_at, ids_at, micro_batch: int,
                      interruptions: Interruptions) -> None:
    """Log-probs of all that training will see, under the model as it is now.

    Masks are seeded, so this is known in advance: no reference model sits in memory in training.
    """
    for at in reference.missing(micro_batch, interruptions):
        und, gen = model.pair_logps(*batch_at(model, at))
        reference.add(at, torch.stack([und.sums, gen.sums], 1), ids_at(at))  # (B, 2, 2)
    reference.save()


def add_gradient(model, visits, micro_batch, batch_at, reference, loss_fn, accelerator) -> list:
    """The gradient of a step, over the micro-batches of all processes; figures of this one's."""
    watched = []
    for at in micro_batches(visits, micro_batch, accelerator):
        with accelerator.accumulate(model.net):
            und, gen = model.pair_logps(*batch_at(model, at))
            ref = reference[at.start : at.stop].to(accelerator.device)  # (B, 2, 2)
            loss, log = loss_fn(und, gen, ref)
            accelerator.backward(loss)
        watched.append(log | {"distance": distance(torch.stack([und.sums, gen.sums], 1), ref)})
    return watched


def train_step(net, optimizer, gradient_of, loss_fn, clip, halves, accelerator) -> dict:
    """One optimizer step; the mean figures of all. halves: with the norm of each one's gradient."""
    alone = half_norms(net, optimizer, gradient_of, loss_fn, accelerator) if halves else None
    watched = gradient_of(loss_fn=loss_fn)
    norms = gradient_figures(net, alone, accelerator) if halves else {}
    norm = accelerator.clip_grad_norm_(net.parameters(), clip)
    optimizer.step()
    optimizer.zero_grad()
    return mean_figures(watched, {"grad_norm": float(norm), **norms}, optimizer, accelerator)


# --------------------------------------------------------------------------------------------- main


def main(args):
    pairs = read_jsonl(args.pairs, Pair)
    output = output_of(args)
    steps = output.args["steps"]
    accelerator = start_accelerator(args.batch, args.micro_batch, args.device, args.precision,
                                    log_with=args.track, project_dir=str(args.out))
    if not prepare_output(output):
        return
    say(f"round {args.round}: training {args.model} on {len(pairs)} pairs, "
        f"{steps} steps of {args.batch} records")
    seed = (args.seed, args.round)
    order = training_order(pairs, steps, args.batch, stable_seed(*seed))

    def batch_at(model: Model, at: range) -> tuple[TextBatch, ImageBatch]:
        visits = [Visit(pairs[i], epoch) for i, epoch in order[at.start : at.stop].tolist()]
        return make_batch(model, visits, seed, args.cond_dropout, args.guidance, args.complementary)

    def ids_at(at: range) -> list[str]:
        return [pairs.ids[i] for i in order[at.start : at.stop, 0].tolist()]

    def prepare(folder) -> tuple:  # model and optimizer together, as sharding wants it
        model = load(folder, args.image_tokenizer, args.text_tokenizer)
        model.net.checkpoint_activations(args.gradient_checkpointing)
        if args.lora:  # without an update, the model is its own reference
            add_adapters(model.net, args.lora, seed, args.precision)
        optimizer = torch.optim.AdamW(decay_groups(model.net, args.weight_decay), lr=args.lr)
        model.net, optimizer = accelerator.prepare(model.net, optimizer)
        return model, optimizer

    with Interruptions(accelerator) as interruptions:
        # the reference first, so that it never shares the memory with the optimizer's state
        reference = ReferenceFile(args.out, len(order), args.reference is None, accelerator)
        model = None
        if not reference.exists():
            model, optimizer = prepare(args.reference or args.model)
            check_pairs(model, pairs)
            compute_reference(model, reference, batch_at, ids_at, args.micro_batch, interruptions)
        reference_logps = reference.load()  # (visits, 2, 2)
        if model is None or args.reference:
            model = optimizer = None
            accelerator.free_memory()
            model, optimizer = prepare(args.model)

        scheduler = get_scheduler(args.schedule, optimizer, round(args.warmup * steps), steps)
        state = State(args.out, model.net, optimizer, scheduler, accelerator)
        bar = remaining_steps(steps, args.save_every, state, interruptions)
        start_trackers(output, bar.n, accelerator)
        previews = Previews(model, pairs, args.preview_every, args.preview_guidance, args.seed,
                            accelerator, args.out)
        loss_fn = partial(pair_dpo, beta=args.beta, und_weight=args.und, gen_weight=args.gen,
                          nll_und_weight=args.nll_und, nll_gen_weight=args.nll_gen)
        model.net.train()
        for step in bar:
            previews.draw(step)
            visits = range(step * args.batch, (step + 1) * args.batch)
            gradient_of = partial(add_gradient, model, visits, args.micro_batch, batch_at,
                                  reference_logps, accelerator=accelerator)
            log = train_step(model.net, optimizer, gradient_of, loss_fn, args.clip,
                             due(step + 1, args.grad_norms_every), accelerator)
            log = {"step": step, **log, "lr": scheduler.get_last_lr()[0]}
            assert_healthy(log, ids_at(visits), reference)
            if not optimizer.step_was_skipped:
                scheduler.step()
            write_log(log, accelerator, args.out)
            bar.set_postfix({k: f"{log[k]:.2f}" for k in ("loss", "accuracy_und", "accuracy_gen")})

        previews.draw(steps)
        weights = final_weights(model.net, steps, accelerator)
        if accelerator.is_main_process:
            if args.lora:  # into the weights of the file, which bfloat16 has not rounded
                base = load(args.model, args.image_tokenizer, args.text_tokenizer)
                weights = merge_adapters(base.net, weights)
            save(model, args.out / "checkpoint", weights)
            finish(output)
            print(f"{len(pairs)} pairs, {steps} steps: {args.out / 'checkpoint'}")
    accelerator.free_memory()
    del model, optimizer, state, gradient_of  # a DDP model that outlives its process group can hang
    accelerator.end_training()


if __name__ == "__main__":
    run_main(lambda: main(ARGS), "--micro-batch 1, --gradient-checkpointing or --precision bf16")
