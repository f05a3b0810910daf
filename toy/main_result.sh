#!/usr/bin/env bash
# The main result: the whole loop with three rounds for five seeds (data, sampling, order of training), one base.
#   bash toy/main_result.sh               # about 8 minutes a seed on one core; two at a time; continues where it stopped
#   python toy/main_result.py             # the tables of toy/RESULTS.md, from toy/results/main
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 ROUNDS=3
SEEDS=${SEEDS:-0 1 2 3 4}

one() {  # one SEED
  SEED=$1 OUT=runs/main/seed$1 bash run_selfplay.sh > "runs/main/seed$1.log" 2>&1
  python toy/main_result.py --keep "runs/main/seed$1" > /dev/null
  echo "seed $1: done"
}

mkdir -p runs/main
for SEED in $SEEDS; do
  one "$SEED" &
  [ "$(jobs -rp | wc -l)" -lt 2 ] || wait -n
done
wait
