#!/usr/bin/env bash
# What the approximate drawing options cost in the toy world: held-out accuracy and seconds, paired with the exact setting.
#   bash bench/approximate.sh            # tables in runs/approximate/compare
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-runs/approximate}
export OMP_NUM_THREADS=1
[ -f "$OUT/world/records.jsonl" ] || python toy/world.py --split eval --n 600 --seed 0 --out "$OUT/world" > /dev/null

evaluate() {  # evaluate NAME OPTIONS
  python 04_eval.py --records "$OUT/world/records.jsonl" --guidance 2 --batch 32 --out "$OUT/$1" "${@:2}" > /dev/null 2>&1
}

evaluate exact --steps 20 & evaluate first-half --steps 20 --guidance-interval 0 0.5; wait
evaluate steps-10 --steps 10 & evaluate steps-5 --steps 5; wait
evaluate every-2 --steps 20 --guidance-every 2 & evaluate every-4 --steps 20 --guidance-every 4; wait
evaluate last-half --steps 20 --guidance-interval 0.5 1
python 04_eval.py --compare "$OUT"/{exact,steps-10,steps-5,first-half,last-half,every-2,every-4} --out "$OUT/compare"

python - <<'END'  # drawing alone, best of three
import time
from model import Drawing, draw_images, load
model, texts = load("toy/base")[0], ["a big red circle left of a small blue square"] * 256
for name, how in {"exact": {}, "steps-10": dict(steps=10), "steps-5": dict(steps=5), "half": dict(guidance_interval=(0, 0.5)),
                  "every-2": dict(guidance_every=2), "every-4": dict(guidance_every=4)}.items():
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        draw_images(model, texts, list(range(256)), Drawing(**{"steps": 20, "guidance": 2.0} | how))
        seconds.append(time.perf_counter() - start)
    print(f"{name}: {min(seconds):.2f} s for 256 images")
END
