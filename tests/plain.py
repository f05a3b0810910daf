"""The plain path: what the original program computes, written down without any of our shortcuts.

No cache, no packing, dense masks, padding, the whole vocabulary at every position, everything again at every step, texts
one at a time. Tests prove that the fast path gives the same; bench/bench.py measures what it saves.
"""

import torch
import torch.nn.functional as F

from model import IGNORE, mask_least_confident, pick, slots_to_mask, uniforms


def logits_of(model, ids: torch.Tensor, attend: torch.Tensor) -> torch.Tensor:
    """(B, T) ids under dense (B, T, T) masks -> (B, T, V)."""
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    return model.showo.lm_head(model.hidden(ids, positions, mask=attend[:, None]))


def attend_drawing(tokens, ids: torch.Tensor) -> torch.Tensor:
    """Left-padded rows: text causal, soi … eoi bidirectional, padding seen by nobody (but itself)."""
    B, T = ids.shape
    soi = int((ids[0] == tokens.soi).nonzero()[0])
    attend = torch.ones(B, T, T, dtype=torch.bool, device=ids.device).tril()
    attend[:, soi:, soi:] = True
    attend &= (ids != tokens.pad)[:, None]
    return attend | torch.eye(T, dtype=torch.bool, device=ids.device)


def attend_reading(T: int, image: int, device=None) -> torch.Tensor:
    """An image prefix that everybody sees, then causal text."""
    attend = torch.ones(1, T, T, dtype=torch.bool, device=device).tril()
    attend[:, :, :image] = True
    return attend


@torch.no_grad()
def draw(model, texts: list[str], noise, steps: int, guidance: float, anneal: str = "compound") -> torch.Tensor:
    """(B, N) codes; noise (B, steps, 2, N), or None for greedy decoding."""
    tokens, N, B = model.tokens, model.tokens.image_tokens, len(texts)
    prompts = [tokens.draw(text) for text in texts] + ([tokens.draw("")] * B if guidance else [])
    prompts = [[tokens.pad] * (tokens.window - len(p)) + p for p in prompts]
    ids = torch.tensor([p + tokens.image([-1] * N) for p in prompts], device=model.device)
    attend, temperature = attend_drawing(tokens, ids), 1.0
    for step in range(steps):
        logits = logits_of(model, ids, attend)  # (2B, T, V)
        if guidance:
            logits = (1 + guidance) * logits[:B] - guidance * logits[B:]
        probs = logits[:, -N - 1 : -1, tokens.first_code : tokens.mask].softmax(-1)  # (B, N, C)
        sampled = probs.argmax(-1) if noise is None else pick(probs, noise[:, step, 0])
        slots = ids[:B, -N - 1 : -1]
        unknown = slots == tokens.mask
        sampled = torch.where(unknown, sampled, slots - tokens.first_code)
        if step == steps - 1:
            return sampled
        ratio = (step + 1) / steps
        temperature = temperature * (1 - ratio) if anneal == "compound" else 1 - ratio
        confidence = probs.gather(2, sampled[..., None])[..., 0].masked_fill(~unknown, torch.inf)
        gumbel = torch.zeros_like(confidence) if noise is None else -(-noise[:, step, 1].log()).log()
        count = (unknown.sum(1, keepdim=True) - 1).clamp(max=slots_to_mask(step, steps, N)).clamp(min=1)
        again = mask_least_confident(confidence, gumbel, count, temperature)
        ids[:, -N - 1 : -1] = torch.where(again, tokens.mask, tokens.first_code + sampled).repeat(len(ids) // B, 1)


@torch.no_grad()
def write(model, codes: torch.Tensor, ask, max_new_tokens: int) -> list[int]:
    """One answer about one image (N,): the whole sequence again for every token."""
    tokens, answer = model.tokens, []
    image = tokens.look(codes.tolist())
    for step in range(max_new_tokens):
        ids = torch.tensor([image + ask.prompt + answer], device=model.device)
        logits = logits_of(model, ids, attend_reading(ids.shape[1], len(image), ids.device))[0, -1].float()
        ranked = (logits if ask.top_k == 1 else logits / ask.temperature).sort(descending=True)
        keep = ask.top_k or len(logits)
        u = uniforms(ask.seed, max_new_tokens)[step].to(model.device)
        token = int(ranked.indices[:keep][pick(ranked.values[:keep].softmax(-1), u)])
        if token == tokens.eot:
            break
        answer.append(token)
    return answer


def logprobs(model, ids: torch.Tensor, targets: torch.Tensor, attend: torch.Tensor) -> torch.Tensor:
    """(B, T) ids, targets (IGNORE: none) and (B, T, T) masks -> (B,) sums of log-probs."""
    logprobs = logits_of(model, ids, attend).float().log_softmax(-1)  # (B, T, V)
    chosen = logprobs.gather(2, targets.clamp(min=0)[..., None])[..., 0]
    return (chosen * (targets != IGNORE)).sum(1)


def sequence(tokens, row: list, branch: int, device=None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One branch of a packed row as a sequence of its own, drawings left-padded: ids, targets, attend with B = 1."""
    prefix, segment = row[0], row[branch]
    pad = [] if prefix.bidirectional else [tokens.pad] * (tokens.window - len(prefix.ids))
    ids = torch.tensor([pad + prefix.ids + segment.ids], device=device)
    targets = segment.targets or [IGNORE] * len(segment.ids)
    targets = torch.tensor([[IGNORE] * (len(pad) + len(prefix.ids)) + targets], device=device)
    attend = attend_reading(ids.shape[1], len(prefix.ids), device) if prefix.bidirectional else attend_drawing(tokens, ids)
    return ids, targets, attend


def pair_dpo(policy, reference, rows: list[list], beta: float) -> torch.Tensor:
    """The loss of one record, its two rows (prefix, win, lose) unpacked: four forwards, of policy and reference, for win
    and lose; the two halves are one batch, padded on the right to one length."""
    deltas = []
    for branch, sign in ((1, 1), (2, -1)):
        halves = [sequence(policy.tokens, row, branch, policy.device) for row in rows]
        T = max(ids.shape[1] for ids, _, _ in halves)
        ids = torch.cat([F.pad(i, (0, T - i.shape[1]), value=policy.tokens.pad) for i, _, _ in halves])
        targets = torch.cat([F.pad(t, (0, T - t.shape[1]), value=IGNORE) for _, t, _ in halves])
        attend = torch.cat([F.pad(a, (0, T - a.shape[1], 0, T - a.shape[1])) for _, _, a in halves])
        attend = attend | torch.eye(T, dtype=torch.bool, device=ids.device)
        with torch.no_grad():
            theirs = logprobs(reference, ids, targets, attend)
        deltas.append(sign * (logprobs(policy, ids, targets, attend) - theirs))
    return -F.logsigmoid(beta * sum(deltas)).sum()


def dense(pack: dict) -> torch.Tensor:
    """The (T, T) mask that the layout of a pack of one row stands for, padding left out."""
    P, S, causal, mask = pack["layout"]
    segments, T = pack["segments"][0], pack["ids"].shape[1]
    n = (T - P) // S
    attend = torch.zeros(T, T, dtype=torch.bool)
    attend[:P, :P] = torch.ones(P, P).tril() if causal else 1
    for s in range(S):
        at = slice(P + s * n, P + (s + 1) * n)
        visible = torch.ones(n, P + n, dtype=torch.bool) if mask is None else mask[s, 0].expand(n, -1)
        attend[at, :P], attend[at, at] = visible[:, :P], visible[:, P:]
    real = segments >= 0
    return attend[real][:, real]
