#!/usr/bin/env bash
# Stage 1 with one process and with two, one thread each: seconds, and whether the files are equal.
#   bash bench/scaling.sh [RECORDS]
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
RECORDS=${1-128}
if [ $# -gt 1 ] || ! [[ $RECORDS =~ ^[1-9][0-9]*$ ]]; then
  echo "error: takes one argument, RECORDS, a whole number from 1 on; not '$*'" >&2
  exit 2
fi
OUT=$(mktemp -d)
trap 'rm -r "$OUT"' EXIT
python toy/world.py --split preference --n "$RECORDS" --seed 0 --out "$OUT/world" > /dev/null

for N in 1 2; do
  START=$(date +%s.%N)
  if ! torchrun --nproc-per-node "$N" 01_sample.py --records "$OUT/world/records.jsonl" \
    --captions 10 --images 16 --steps 20 --guidance 2 --show 1 --out "$OUT/$N" > "$OUT/log" 2>&1
  then
    cat "$OUT/log"
    exit 1
  fi
  ALL=$(echo "$(date +%s.%N) - $START" | bc)
  # the last progress bar: 100%|███| 128/128 [01:07<00:00, …]
  BAR=$(tr '\r' '\n' < "$OUT/log" | grep -o '100%.*\[[0-9:]*<' | tail -1)
  SAMPLING=$(echo "$BAR" | grep -o '[0-9:]*<' | tr -d '<')
  echo "$N processes: $ALL s with start-up, $SAMPLING min:s sampling"
done
for FILE in "$OUT"/1/samples*; do
  cmp "$FILE" "$OUT/2/${FILE##*/}"
done
echo "the same samples"
