"""An image score without questions: the policy's likelihood of the caption, given the image.

How well it and the answers to questions agree with the oracle on the very same drawings, which
mistakes each of them sees, and what a round with each gives.

    python toy/studies/scorer.py             # or --tables
"""

import numpy as np

import loop
from hermesflow.jsonl import read_jsonl
from hermesflow.records import Sample, Score
from hermesflow.tables import tensors_of
from model import load
from switches import grids, judged
from tables import KINDS, markdown

SEEDS = (0, 1, 2)
ROUNDS = {1: "of the base", 2: "of round 1"}  # whose drawings these rounds learn from
VARIANTS = {
    "questions": dict(),
    "likelihood": dict(score="--image-scorer likelihood --min-image-score 0.3"),
}
NOTHING = "nothing"  # is wrong with a drawing


def ranks(x: np.ndarray) -> np.ndarray:
    """Ranks; ties share their mean."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts + 1) / 2)[inverse]


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation; NaN where all values of either are equal."""
    a = ranks(a)
    b = ranks(b)
    return np.corrcoef(a, b)[0, 1] if a.std() > 0 and b.std() > 0 else np.nan


def agreement(score: np.ndarray, share: np.ndarray, right: np.ndarray) -> list[float]:
    """How well a score orders the K drawings of each record, all arguments (records, K).

    Rank correlations within records, and what the best and the worst by the score truly are.
    """
    rows = np.arange(len(score))
    win = score.argmax(1)
    lose = score.argmin(1)
    kept = score[rows, win] > score[rows, lose]
    win_share = share[rows, win][kept]
    lose_share = share[rows, lose][kept]
    return [
        kept.sum(),
        np.nanmean([spearman(a, b) for a, b in zip(score, share)]),
        np.nanmean([spearman(a, b) for a, b in zip(score, right)]),
        (win_share > lose_share).mean(),
        (win_share < lose_share).mean(),
        right[rows, win][kept].mean(),
        right[rows, lose][kept].mean(),
    ]


def judge(model, sample: Sample) -> dict:
    """What the oracle finds in a record's drawings: share of questions, all right, what is wrong."""
    drawn = grids(model, tensors_of(sample)["images"])  # of (K, N)
    share, right = judged(sample, drawn)
    wrong = []
    for grid, is_right in zip(drawn, right):
        wrong.append(NOTHING if is_right else loop.fault(grid, sample.caption))
    return {"oracle": np.round(share, 4).tolist(), "right": right, "fault": wrong}


def measure() -> dict:
    """Both self-scores and the oracle on the drawings of the main result."""
    results = {}
    model = load("toy/base")  # its image tokenizer is that of all rounds
    for seed in SEEDS:
        for r, (policy, folder, _, _) in enumerate(loop.play(seed, len(ROUNDS)), 1):
            judged = [judge(model, s) for s in read_jsonl(folder / "samples.jsonl", Sample)]
            result = {name: [j[name] for j in judged] for name in judged[0]}
            for name, settings in VARIANTS.items():
                options = f"{loop.DEFAULTS['SCORE']} {settings.get('score', '')}"
                scored = loop.step("02", options, model=policy, samples=folder)
                scores = read_jsonl(scored / "scores.jsonl", Score)
                # likelihoods are near 1: fewer digits would make them equal
                result[name] = [np.round(s.image_scores, 7).tolist() for s in scores]
            results[f"{seed}, round {r}"] = result
    return results


def agreements(content: dict) -> list[str]:
    """The table of agreement with the oracle."""
    results = content["measured"]
    table = [["1,024 records with 4 drawings each; mean over seeds (lowest–highest)",
              "records with a winner", "rank correlation with the oracle's share of questions",
              "with everything right", "winner truly better", "truly worse", "winner all right",
              "loser all right"]]
    names = ("questions", "likelihood", "questions, then likelihood",
             "the oracle's share of questions")
    for r, drawn in ROUNDS.items():
        for name in names:
            rows = []
            for seed in SEEDS:
                cells = {k: np.array(v, float) for k, v in results[f"{seed}, round {r}"].items()
                         if k != "fault"}
                tie_broken = cells["questions"] + 1e-3 * cells["likelihood"]
                cells["questions, then likelihood"] = tie_broken
                cells["the oracle's share of questions"] = cells["oracle"]
                rows.append(agreement(cells[name], cells["oracle"], cells["right"]))
            mean = np.mean(rows, 0)
            low = np.min(rows, 0)
            high = np.max(rows, 0)
            row = [f"{drawn}: {name}", f"{mean[0]:.0f}"]
            row += [f"{m:.3f} ({a:.3f}–{b:.3f})" for m, a, b in zip(mean[1:], low[1:], high[1:])]
            table.append(row)
    return [markdown(table), noticed(results)]


def noticed(results: dict) -> str:
    """Which mistakes the answers to questions see, of all drawings of a round."""
    table = [["what is wrong", "of 100 drawings", "mean score", "full score"]]
    for r, drawn in ROUNDS.items():
        cells = [results[f"{seed}, round {r}"] for seed in SEEDS]
        fault = np.array([c["fault"] for c in cells]).ravel()
        score = np.array([c["questions"] for c in cells]).ravel()
        for kind in (NOTHING, *KINDS):
            of_kind = score[fault == kind]
            table.append([f"{drawn}: {kind}", f"{100 * len(of_kind) / len(score):.1f}",
                          f"{of_kind.mean():.3f}", f"{(of_kind == 1).mean():.3f}"])
    return markdown(table)


if __name__ == "__main__":
    loop.study("scorer", VARIANTS, against="questions", seeds=SEEDS,
               measure=measure, more=agreements)
