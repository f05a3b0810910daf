#!/usr/bin/env bash
# What fewer steps and less guidance cost in the toy world: held-out accuracy, paired with the exact
# setting, and seconds.
#   bash bench/approximate.sh            # tables in runs/approximate/compare
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT-runs/approximate}
if [ $# -gt 0 ] || [ -z "$OUT" ]; then
  echo "error: takes no arguments, and OUT, if it is set, is a folder" >&2
  exit 2
fi
export OMP_NUM_THREADS=1
if [ ! -f "$OUT/world/records.jsonl" ]; then
  python toy/world.py --split validation --n 600 --seed 0 --out "$OUT/world" > /dev/null
fi

evaluate() {  # evaluate NAME OPTIONS
  python 04_eval.py --records "$OUT/world/records.jsonl" --guidance 0.5 --batch 32 \
    --out "$OUT/$1" "${@:2}" > /dev/null 2>&1
}

# two at a time
evaluate exact --steps 16 &
evaluate first-half --steps 16 --guidance-interval 0 0.5
wait $!
evaluate steps-8 --steps 8 &
evaluate steps-4 --steps 4
wait $!
evaluate last-half --steps 16 --guidance-interval 0.5 1
python 04_eval.py --compare "$OUT"/{exact,steps-8,steps-4,first-half,last-half} \
  --across steps guidance-interval --out "$OUT/compare"
python bench/approximate.py
