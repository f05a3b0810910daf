#!/usr/bin/env bash
# HermesFlow, the whole protocol: for every round, sample, score, Pair-DPO, evaluate. Toy world by default.
# Rerunning continues where it stopped: a stage that is complete is skipped, an interrupted one goes on.
set -euo pipefail
cd "$(dirname "$0")"

OUT=${OUT:-runs/toy}                 # everything is written here
ROUNDS=${ROUNDS:-2}
SEED=${SEED:-0}
LAUNCH=${LAUNCH:-python}             # several GPUs: "accelerate launch --num_processes 8"; CPUs: "torchrun --nproc-per-node 2"
BASE=${BASE:-toy/base}               # the policy of round 0
TRAIN=${TRAIN:-$OUT/preference/records.jsonl}
HELD_OUT=${HELD_OUT:-$OUT/held_out/records.jsonl}
JUDGE=${JUDGE:-toy}
PAIRS=${PAIRS:-fresh}                # fresh: this round's best and worst; self-play: against the last round's (Eq. 9-10)

# The toy's settings; the stages' own defaults are the paper's.
SAMPLE=${SAMPLE:---captions 8 --caption-settings 0:2.0 --max-new-tokens 20 --images 8 --steps 16 --guidance 0 --batch 16}
SCORE=${SCORE:---batch 4}
DPO=${DPO:---beta 0.2 --lr 5e-5 --schedule linear --warmup 0.1 --epochs 1 --batch 16 --micro-batch 16 --nll-und 1}
EVAL=${EVAL:---steps 16 --guidance 0 --batch 32}

# Full size, with the paper's settings (Show-o 512 px, JourneyDB):
#   BASE=showlab/show-o-512x512 OUT=runs/show-o ROUNDS=3 LAUNCH="accelerate launch --num_processes 8" \
#   TRAIN=initial_data.json HELD_OUT=held_out.jsonl JUDGE=Qwen/Qwen2.5-VL-7B-Instruct PAIRS=self-play \
#   SAMPLE="--questions vqa_data.json --dtype bfloat16" \
#   SCORE="--dtype bfloat16 --reencode --caption-scorer google-bert/bert-large-uncased
#          --matcher sentence-transformers/all-mpnet-base-v2" \
#   DPO="--precision bf16 --gradient-checkpointing" EVAL="--dtype bfloat16" bash run_selfplay.sh

if [ "$TRAIN" = "$OUT/preference/records.jsonl" ] && [ ! -f "$TRAIN" ]; then
  python toy/world.py --split preference --n 512 --seed "$SEED" --out "$OUT/preference"
fi
if [ "$HELD_OUT" = "$OUT/held_out/records.jsonl" ] && [ ! -f "$HELD_OUT" ]; then
  python toy/world.py --split eval --n 600 --seed 0 --out "$OUT/held_out"
fi

evaluate() {  # evaluate POLICY NAME
  $LAUNCH 04_eval.py --model "$1" --records "$HELD_OUT" --judge "$JUDGE" --seed "$SEED" --out "$OUT/eval/$2" $EVAL
}

POLICY=$BASE
evaluate "$POLICY" base
EVALUATED=("$OUT/eval/base")
PREVIOUS=()
for ROUND in $(seq 1 "$ROUNDS"); do
  R=$OUT/round$ROUND
  $LAUNCH 01_sample.py --model "$POLICY" --records "$TRAIN" --round "$ROUND" --seed "$SEED" --out "$R/samples" $SAMPLE
  $LAUNCH 02_score.py --model "$POLICY" --samples "$R/samples" --out "$R/pairs" ${PREVIOUS[@]+"${PREVIOUS[@]}"} $SCORE
  $LAUNCH 03_pair_dpo.py --model "$POLICY" --pairs "$R/pairs/pairs.jsonl" --round "$ROUND" --seed "$SEED" --out "$R/train" $DPO
  POLICY=$R/train/checkpoint
  [ "$PAIRS" = fresh ] || PREVIOUS=(--previous "$R/pairs/pairs.jsonl")
  evaluate "$POLICY" "round$ROUND"
  EVALUATED+=("$OUT/eval/round$ROUND")
done

python 04_eval.py --compare "${EVALUATED[@]}" --out "$OUT/eval"
python 04_eval.py --report "$OUT"
