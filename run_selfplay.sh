#!/usr/bin/env bash
# HermesFlow, the whole protocol: in every round sample, score, Pair-DPO and evaluate.
#
#   bash run_selfplay.sh                          the toy world, about 5 minutes on 2 CPU cores
#   bash run_selfplay.sh configs/showo.sh         the paper's run
#   OUT=runs/n16 SAMPLE="--images 16" bash run_selfplay.sh    one setting changed, the others kept
#
# Rerun the same command to resume: finished stages are skipped, and refuse other settings.
set -euo pipefail
CONFIG=$(realpath "${1:-$(dirname "$0")/configs/toy.sh}")
cd "$(dirname "$0")"
source "$CONFIG"

# the toy world's records: captions to learn from, and 600 held-out ones
if [ "$TRAIN" = "$OUT/preference/records.jsonl" ] && [ ! -f "$TRAIN" ]; then
  python toy/world.py --split preference --n 512 --seed "$SEED" --out "$OUT/preference"
fi
if [ "$HELD_OUT" = "$OUT/held_out/records.jsonl" ] && [ ! -f "$HELD_OUT" ]; then
  python toy/world.py --split eval --n 600 --seed 0 --out "$OUT/held_out"
fi

evaluate() {  # evaluate POLICY NAME
  $LAUNCH 04_eval.py --model "$1" --records "$HELD_OUT" --judge "$JUDGE" --seed "$SEED" \
    --out "$OUT/eval/$2" "${EVAL[@]}"
}

evaluate "$BASE" base
POLICY=$BASE
EVALUATED=("$OUT/eval/base")
PREVIOUS=()
for ROUND in $(seq 1 "$ROUNDS"); do
  R=$OUT/round$ROUND
  $LAUNCH 01_sample.py --model "$POLICY" --records "$TRAIN" --round "$ROUND" --seed "$SEED" \
    --out "$R/samples" "${SAMPLE[@]}"
  $LAUNCH 02_score.py --model "$POLICY" --samples "$R/samples" --out "$R/pairs" \
    ${PREVIOUS[@]+"${PREVIOUS[@]}"} "${SCORE[@]}"
  $LAUNCH 03_pair_dpo.py --model "$POLICY" --pairs "$R/pairs/pairs.jsonl" --round "$ROUND" \
    --seed "$SEED" --out "$R/train" "${DPO[@]}"
  POLICY=$R/train/checkpoint
  if [ "$PAIRS" = self-play ]; then PREVIOUS=(--previous "$R/pairs/pairs.jsonl"); fi
  evaluate "$POLICY" "round$ROUND"
  EVALUATED+=("$OUT/eval/round$ROUND")
done

python 04_eval.py --compare "${EVALUATED[@]}" --out "$OUT/eval"
python 04_eval.py --report "$OUT"
