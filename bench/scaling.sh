#!/usr/bin/env bash
# Sampling with one process and with two, one thread each: time, and whether files are equal.
#   bash bench/scaling.sh
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
OUT=$(mktemp -d)
trap 'rm -r "$OUT"' EXIT
python toy/world.py --split preference --n 128 --seed 0 --out "$OUT/world" > /dev/null
for N in 1 2; do
  START=$(date +%s.%N)
  torchrun --nproc-per-node "$N" 01_sample.py --records "$OUT/world/records.jsonl" --captions 10 --images 16 --steps 20 \
    --guidance 2 --show 1 --out "$OUT/$N" > "$OUT/log" 2>&1 || { cat "$OUT/log"; exit 1; }
  SECONDS_ALL=$(echo "$(date +%s.%N) - $START" | bc)
  SAMPLING=$(tr '\r' '\n' < "$OUT/log" | grep -o '100%.*\[[0-9:]*<' | tail -1 | grep -o '[0-9:]*<' | tr -d '<')
  echo "$N processes: $SECONDS_ALL s with start-up, $SAMPLING min:s sampling"
done
cmp "$OUT/1/samples.safetensors" "$OUT/2/samples.safetensors" && echo "the same samples"
