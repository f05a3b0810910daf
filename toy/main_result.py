"""The tables of the main result in toy/RESULTS.md, from toy/results/main: python toy/main_result.py

--keep RUN first copies there what the tables need of a finished run, whose folder is named after its seed.
Records are resampled for the interval of one seed; for the mean over seeds, seeds and records both (10,000 draws, 95 %).
"""

import argparse
import json
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent / "results" / "main"
NAMES = ("base", "round1", "round2", "round3")
COLUMNS = ["id", "understood", "drawn right", "questions", "everything right", "caption score"]  # the middle ones: counts
METRICS = ("understanding", "generation", "gap", "everything right", "caption score")


def keep(run: Path) -> None:
    """Per record, what was answered right about the real image and the drawing, of how many questions."""
    (FOLDER / run.name).mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        with open(run / "eval" / name / "answers.jsonl", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        records = [[r["id"], sum(r["und_right"]), sum(r["gen_right"]), len(r["questions"]), int(r["all_right"]),
                    round(r["caption_score"], 4)] for r in rows]
        (FOLDER / run.name / f"{name}.json").write_text(json.dumps({"columns": COLUMNS, "records": records}))


def read(path: Path) -> np.ndarray:
    """(records, metrics)."""
    rows = sorted(json.loads(path.read_text())["records"])
    und, gen, n, right, caption = (np.array([r[i] for r in rows], dtype=float) for i in range(1, 6))
    return np.stack([und / n, gen / n, (und - gen) / n, right, caption], 1)


def interval(values: np.ndarray, rng, draws: int = 10_000) -> str:
    """values (seeds, records): mean over all, and 95 % of the means of resampled seeds and records."""
    S, N = values.shape
    means = []
    for _ in range(draws // 100):  # a hundred draws of records for each draw of seeds
        by_record = values[rng.integers(S, size=S)].mean(0)
        means.append(by_record[rng.integers(N, size=(100, N))].mean(1))
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return f"{values.mean():.3f} [{low:.3f}, {high:.3f}]"


def table(title: str, rows: dict[str, np.ndarray]) -> None:
    """rows: name -> (seeds, records, metrics)."""
    rng = np.random.default_rng(0)
    print(f"\n| {title} | " + " | ".join(METRICS) + " |\n" + "|---" * (len(METRICS) + 1) + "|")
    for name, values in rows.items():
        print(f"| {name} | " + " | ".join(interval(values[..., m], rng) for m in range(len(METRICS))) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, metavar="RUN")
    args = parser.parse_args()
    if args.keep:
        keep(args.keep)
    seeds = sorted(FOLDER.glob("seed*"))
    found = {name: np.stack([read(seed / f"{name}.json") for seed in seeds]) for name in NAMES}
    print(f"{len(seeds)} seeds, {found['base'].shape[1]} records")
    table("mean over seeds", found)
    pairs = list(zip(NAMES, NAMES[1:])) + [("base", "round3")]
    table("paired difference", {f"{a} to {b}": found[b] - found[a] for a, b in pairs})
    print("\n| seed | " + " | ".join(f"{name}: gap, everything right" for name in NAMES) + " |\n" + "|---" * (len(NAMES) + 1) + "|")
    for s, seed in enumerate(seeds):
        cells = [f"{found[n][s, :, 2].mean():.3f}, {found[n][s, :, 3].mean():.3f}" for n in NAMES]
        print(f"| {seed.name} | " + " | ".join(cells) + " |")
    gaps = {n: found[n][..., 2].mean(1) for n in NAMES}
    closed = 1 - gaps["round3"] / gaps["base"]
    print(f"\nshare of the base's gap closed by round 3: mean {closed.mean():.2f}, by seed {np.round(closed, 2).tolist()}")


if __name__ == "__main__":
    main()
