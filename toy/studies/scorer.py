"""A self-contained image score: the policy's likelihood of the caption given the image, against its answers to questions.

How well each agrees with the oracle on the very same drawings, and what three rounds with each give.

    python toy/studies/scorer.py             # or --tables
"""

import json
import sys

import numpy as np

import loop
from model import load
from switches import oracle
from tables import RESULTS, markdown

SEEDS = (0, 1)
AGREEMENT = RESULTS / "scorer_agreement.json"
VARIANTS = {"questions": dict(n=3), "likelihood": dict(n=3, score="--image-scorer likelihood --min-image-score 0.3")}


def ranks(x: np.ndarray) -> np.ndarray:
    """Ranks, ties share their mean."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts + 1) / 2)[inverse]


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation, or nan where either says nothing."""
    a, b = ranks(a), ranks(b)
    return np.corrcoef(a, b)[0, 1] if a.std() > 0 and b.std() > 0 else np.nan


def agreement(score: np.ndarray, share: np.ndarray, right: np.ndarray) -> list[float]:
    """All (records, K). Rank correlations within records, and what best and worst by the score truly are."""
    rows, win, lose = np.arange(len(score)), score.argmax(1), score.argmin(1)
    kept = score[rows, win] > score[rows, lose]
    win_share, lose_share = share[rows, win][kept], share[rows, lose][kept]
    rho = np.nanmean([spearman(a, b) for a, b in zip(score, share)])
    rho_right = np.nanmean([spearman(a, b) for a, b in zip(score, right)])
    return [kept.sum(), rho, rho_right, (win_share > lose_share).mean(), (win_share < lose_share).mean(),
            right[rows, win][kept].mean(), right[rows, lose][kept].mean()]


def measure() -> None:
    """Both self-scores and the oracle on the drawings of the main result, into toy/results/scorer_agreement.json."""
    found, vq = {}, load("toy/base")[1]
    for seed in SEEDS:
        for r, (policy, samples, _, _) in enumerate(loop.play(seed, 3), 1):
            drawn, tensors = loop.STAGES["02"].read_samples(samples)
            share, right = zip(*(oracle(vq, s, tensors[f"{s.id}/images"]) for s in drawn))
            found[f"{seed}, round {r}"] = {"oracle": share, "right": right} | {
                name: [s["image_scores"] for s in loop.read(loop.step(
                    "02", f"{loop.DEFAULTS['SCORE']} {how.get('score', '')}", model=policy, samples=samples) / "scores.jsonl")]
                for name, how in VARIANTS.items()}
    rounded = {k: {n: [[round(x, 4) for x in row] for row in v] for n, v in cells.items()} for k, cells in found.items()}
    AGREEMENT.write_text(json.dumps(rounded, separators=(",", ":")) + "\n", encoding="utf-8")


def agreements(_) -> list[str]:
    if "--tables" not in sys.argv:
        measure()
    found = json.loads(AGREEMENT.read_text(encoding="utf-8"))
    table = [["512 records with 8 drawings each; mean over seeds (lowest–highest)", "records with a winner",
              "rank correlation with the oracle's share of questions", "with everything right", "winner truly better",
              "truly worse", "winner all right", "loser all right"]]
    for r in (1, 2, 3):
        for name in ("questions", "likelihood", "questions, then likelihood", "the oracle's share of questions"):
            rows = []
            for seed in SEEDS:
                cells = {k: np.array(v, float) for k, v in found[f"{seed}, round {r}"].items()}
                cells["questions, then likelihood"] = cells["questions"] + 1e-3 * cells["likelihood"]
                score = cells["oracle" if name.startswith("the oracle") else name]
                rows.append(agreement(score, cells["oracle"], cells["right"]))
            mean, low, high = np.mean(rows, 0), np.min(rows, 0), np.max(rows, 0)
            table.append([f"round {r}: {name}", f"{mean[0]:.0f}"])
            table[-1] += [f"{m:.3f} ({a:.3f}–{b:.3f})" for m, a, b in zip(mean[1:], low[1:], high[1:])]
    return [markdown(table)]


if __name__ == "__main__":
    loop.study("scorer", VARIANTS, against="questions", seeds=SEEDS, more=agreements)
