"""Main result: three rounds with the toy's settings, five seeds (data, sampling, order of training), one base.

    python toy/studies/main_result.py        # or --tables: only print those of toy/results/main_result.json
"""

import numpy as np

import loop

if __name__ == "__main__":
    by_seed = loop.study("main_result", {"Pair-DPO": dict(n=3)}, against="Pair-DPO", seeds=(0, 1, 2, 3, 4))["Pair-DPO"]
    names = ("base", "round1", "round2", "round3")
    found = {n: np.stack([loop.metrics(cells[n][""]) for cells in by_seed.values()]) for n in names}  # (seeds, records, 5)
    pairs = [*zip(names, names[1:]), ("base", "round3")]
    loop.markdown([["paired difference", *loop.METRICS]] + [
        [f"{a} to {b}", *(loop.interval((found[b] - found[a])[..., m], "+") for m in range(len(loop.METRICS)))]
        for a, b in pairs])
    loop.markdown([["seed", *(f"{n}: gap, everything right" for n in names)]] + [
        [seed, *(f"{found[n][s, :, 2].mean():.3f}, {found[n][s, :, 3].mean():.3f}" for n in names)]
        for s, seed in enumerate(by_seed)])
    gaps = {n: found[n][..., 2].mean(1) for n in names}
    closed = 1 - gaps["round3"] / gaps["base"]
    print(f"\nshare of the base's gap closed by round 3: mean {closed.mean():.2f}, by seed {np.round(closed, 2).tolist()}")
