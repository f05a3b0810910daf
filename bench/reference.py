"""The original program's algorithm, written plainly: the results every fast path must equal.

Nothing is cached, packed or left out: dense masks, padded prompts, the whole vocabulary at every
position, the whole sequence again at every step, texts one at a time. The tests prove that the fast
paths give the same; bench.py measures what they save.

`net` is a Showo (`model.net`). Shapes: B rows, T positions, N image tokens, V vocabulary, C image
codes.
"""

import torch
import torch.nn.functional as F

from hermesflow.packed import IGNORE, Pack, Segment
from hermesflow.sampling import (MASKED, TextRequest, cosine_mask_count, mask_by_random_topk,
                                 sample_categorical, uniforms)
from hermesflow.showo import Showo, Tokens

# ------------------------------------------------------------------------------ logits under a mask


def logits_of(net: Showo, ids: torch.Tensor, attend: torch.Tensor) -> torch.Tensor:
    """(B, T) ids under dense (B, T, T) masks, True where a row may look -> (B, T, V) logits."""
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    return net.showo.lm_head(net.hidden(ids, positions, mask=attend[:, None]))


def attend_t2i(tokens: Tokens, ids: torch.Tensor) -> torch.Tensor:
    """(B, T) text, then image, padded on the left -> (B, T, T) mask.

    Text is causal, soi … eoi sees everything, padding is seen by nobody but itself.
    """
    B, T = ids.shape
    soi = int((ids[0] == tokens.soi).nonzero()[0])
    attend = torch.ones(B, T, T, dtype=torch.bool, device=ids.device).tril()
    attend[:, soi:, soi:] = True
    attend &= (ids != tokens.pad)[:, None]
    return attend | torch.eye(T, dtype=torch.bool, device=ids.device)


def attend_mmu(T: int, image_width: int, device=None) -> torch.Tensor:
    """(1, T, T) mask: an image of `image_width` positions that all see, then causal text."""
    attend = torch.ones(1, T, T, dtype=torch.bool, device=device).tril()
    attend[:, :, :image_width] = True
    return attend


# --------------------------------------------------------------------------------------- generation


@torch.no_grad()
def generate_images(net: Showo, texts: list[str], noise: torch.Tensor | None, steps: int,
                    guidance_scale: float, anneal: str = "compound") -> torch.Tensor:
    """MaskGIT decoding of B texts -> (B, N) codes.

    noise: (B, steps, 2, N) uniform numbers for codes and Gumbel noise; None: greedy decoding.
    """
    tokens = net.tokens
    N = tokens.image_tokens
    B = len(texts)
    prompts = [tokens.t2i_prompt(text) for text in texts]
    if guidance_scale:
        prompts += [tokens.t2i_prompt("")] * B  # cond, then uncond
    image = tokens.image_block([MASKED] * N)
    rows = [[tokens.pad] * (tokens.window - len(p)) + p + image for p in prompts]
    ids = torch.tensor(rows, device=net.device)  # (B or 2B, T)
    attend = attend_t2i(tokens, ids)
    slots = slice(-N - 1, -1)
    temperature = 1.0
    for step in range(steps):
        logits = logits_of(net, ids, attend)  # (B or 2B, T, V)
        if guidance_scale:
            logits = (1 + guidance_scale) * logits[:B] - guidance_scale * logits[B:]
        probs = logits[:, slots, tokens.first_code : tokens.mask].softmax(-1)  # (B, N, C)

        # decided slots keep their codes
        unknown = ids[:B, slots] == tokens.mask  # (B, N)
        if noise is None:
            sampled = probs.argmax(-1)  # (B, N)
        else:
            sampled = sample_categorical(probs, noise[:, step, 0])
        sampled = torch.where(unknown, sampled, ids[:B, slots] - tokens.first_code)
        if step == steps - 1:
            return sampled

        # the least confident of the new codes become masks again
        ratio = (step + 1) / steps
        temperature = temperature * (1 - ratio) if anneal == "compound" else 1 - ratio
        confidence = probs.gather(2, sampled[..., None])[..., 0]  # (B, N)
        confidence = confidence.masked_fill(~unknown, torch.inf)
        if noise is None:
            gumbel = torch.zeros_like(confidence)
        else:
            gumbel = -(-noise[:, step, 1].log()).log()
        limit = cosine_mask_count(step, steps, N)
        count = (unknown.sum(1, keepdim=True) - 1).clamp(max=limit).clamp(min=1)  # (B, 1)
        again = mask_by_random_topk(confidence, gumbel, count, temperature)
        block = torch.where(again, tokens.mask, tokens.first_code + sampled)
        ids[:, slots] = block.repeat(len(ids) // B, 1)


@torch.no_grad()
def generate_text(net: Showo, codes: torch.Tensor, request: TextRequest,
                  max_new_tokens: int) -> list[int]:
    """One text about one image (N,), as token ids without `<|eot|>`."""
    tokens = net.tokens
    image = tokens.mmu_prompt(codes.tolist())
    prompt = tokens.text_prompt(request.prompt)
    draws = uniforms(request.seed, max_new_tokens).to(net.device)
    text = []
    for step in range(max_new_tokens):
        ids = torch.tensor([image + prompt + text], device=net.device)  # (1, T)
        attend = attend_mmu(ids.shape[1], len(image), ids.device)
        logits = logits_of(net, ids, attend)[0, -1].float()  # (V,)
        if request.top_k != 1:
            logits = logits / request.temperature
        best = logits.sort(descending=True)
        keep = request.top_k or len(logits)
        probs = best.values[:keep].softmax(-1)  # (top_k,)
        token = int(best.indices[sample_categorical(probs, draws[step])])
        if token == tokens.eot:
            break
        text.append(token)
    return text


# ---------------------------------------------------------------------------------------- log-probs


def logps(net: Showo, ids: torch.Tensor, targets: torch.Tensor,
          attend: torch.Tensor) -> torch.Tensor:
    """(B, T) ids and targets (IGNORE: none) under (B, T, T) masks -> (B,) sums of log-probs."""
    everything = logits_of(net, ids, attend).float().log_softmax(-1)  # (B, T, V)
    labels = everything.gather(2, targets.clamp(min=0)[..., None])[..., 0]  # (B, T)
    return (labels * (targets != IGNORE)).sum(1)


def sequence(tokens: Tokens, row: list[Segment], branch: int,
             device=None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Branch 1, 2, … of a packed row as a sequence of its own, texts to draw from left-padded.

    Returns ids (1, T), targets (1, T) and attend (1, T, T).
    """
    prefix = row[0]
    segment = row[branch]
    about_image = prefix.bidirectional
    padding = 0 if about_image else tokens.window - len(prefix.ids)
    before = padding + len(prefix.ids)
    targets = segment.targets or [IGNORE] * len(segment.ids)
    ids = torch.tensor([[tokens.pad] * padding + prefix.ids + segment.ids], device=device)
    targets = torch.tensor([[IGNORE] * before + targets], device=device)
    if about_image:
        attend = attend_mmu(ids.shape[1], before, device)
    else:
        attend = attend_t2i(tokens, ids)
    return ids, targets, attend


def pair_dpo(policy_net: Showo, reference_net: Showo, rows: list[list[Segment]],
             beta: float) -> torch.Tensor:
    """The Pair-DPO loss of one record (scalar); rows: [prefix, win, lose], understanding first.

    Four forwards: policy and reference, win and lose. Each is one batch of both halves, padded on
    the right to one length.
    """
    win = log_ratios(policy_net, reference_net, rows, 1)  # (2,)
    lose = log_ratios(policy_net, reference_net, rows, 2)
    return -F.logsigmoid(beta * (win - lose)).sum()


def log_ratios(policy_net: Showo, reference_net: Showo, rows: list[list[Segment]],
               branch: int) -> torch.Tensor:
    """log π − log π_ref of one branch of every row, (B,)."""
    tokens = policy_net.tokens
    sequences = [sequence(tokens, row, branch, policy_net.device) for row in rows]
    T = max(ids.shape[1] for ids, _, _ in sequences)
    all_ids = []
    all_targets = []
    all_attend = []
    for ids, targets, attend in sequences:
        more = T - ids.shape[1]
        all_ids.append(F.pad(ids, (0, more), value=tokens.pad))
        all_targets.append(F.pad(targets, (0, more), value=IGNORE))
        all_attend.append(F.pad(attend, (0, more, 0, more)))
    ids = torch.cat(all_ids)  # (B, T)
    targets = torch.cat(all_targets)  # (B, T)
    itself = torch.eye(T, dtype=torch.bool, device=ids.device)
    attend = torch.cat(all_attend) | itself  # (B, T, T)
    with torch.no_grad():
        reference_logps = logps(reference_net, ids, targets, attend)
    return logps(policy_net, ids, targets, attend) - reference_logps


# -------------------------------------------------------------------------------------------- masks


def dense(pack: Pack) -> torch.Tensor:
    """The (T, T) mask that the layout of a pack of one row stands for, without padding."""
    P, S, causal, mask = pack.layout
    T = pack.ids.shape[1]
    n = (T - P) // S
    attend = torch.zeros(T, T, dtype=torch.bool)
    prefix = torch.ones(P, P, dtype=torch.bool)
    attend[:P, :P] = prefix.tril() if causal else prefix
    for s in range(S):
        at = slice(P + s * n, P + (s + 1) * n)
        visible = torch.ones(n, P + n, dtype=torch.bool) if mask is None else mask[s, 0]
        visible = visible.expand(n, -1)  # (n, P + n)
        attend[at, :P] = visible[:, :P]
        attend[at, at] = visible[:, P:]
    real = pack.segments[0] >= 0
    return attend[real][:, real]
