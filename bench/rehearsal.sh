#!/usr/bin/env bash
# One record's way through all stages at the published size, with random weights: seconds of CPU and
# of the clock by phase, and peak memory. Everything is run again, too: what is complete is skipped.
#   bash bench/rehearsal.sh [OUT]           half an hour on 2 CPU cores, 24 GB of memory, 20 of disk
#   COUNTS=real bash bench/rehearsal.sh     the paper's counts, for a GPU
#   MODEL=showlab/show-o-512x512 VQ=showlab/magvitv2 TEXT=microsoft/phi-1_5 bash bench/rehearsal.sh
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${1-runs/rehearsal}
COUNTS=${COUNTS-small}
if [ $# -gt 1 ] || [ -z "$OUT" ] || ! [[ $COUNTS == small || $COUNTS == real ]]; then
  echo "error: takes one argument, OUT, a folder; COUNTS is small or real" >&2
  exit 2
fi
export HF_HUB_OFFLINE=1
export HF_HOME=${HF_HOME-${XDG_CACHE_HOME-$HOME/.cache}/huggingface}
export XDG_CACHE_HOME=$PWD/$OUT/cache  # empty: every file is hashed once
[[ $OUT != /* ]] || XDG_CACHE_HOME=$OUT/cache

if [ $COUNTS = small ]; then
  RECORDS=1
  SAMPLE="--captions 2 --max-new-tokens 8 --images 2 --steps 2 --guidance 0"
  SCORE="--image-scorer likelihood"  # random weights answer every image alike
  DPO="--steps 1 --batch 1 --micro-batch 1 --grad-norms-every 0"
  EVAL="--max-new-tokens 4 --steps 2 --guidance 0"
else
  RECORDS=64
  SAMPLE=
  SCORE=
  DPO="--steps 20"
  EVAL=
fi
if [ -z "${MODEL-}" ] && [ ! -f "$OUT/records/records.jsonl" ]; then
  python bench/rehearsal.py --make "$OUT" --records "$RECORDS"
fi
MODEL=(--model "${MODEL-$OUT/show-o}" --image-tokenizer "${VQ-$OUT/magvitv2}"
       --text-tokenizer "${TEXT-tests/golden/phi-1_5-tokenizer}")
RECORDS=(--records "$OUT/records/records.jsonl")
ENCODERS=(--caption-scorer "$OUT/bert" --matcher "$OUT/mpnet")
LOG=$OUT/$COUNTS.log
RUN=$OUT/$COUNTS
if [ -e "$RUN" ] && [ ! -f "$LOG" ]; then
  echo "error: $RUN: is there already, and no rehearsal made it" >&2
  exit 2
fi
rm -rf "$LOG" "$XDG_CACHE_HOME" "$RUN"

stage() {  # stage SCRIPT OPTION…: run it, then again, when it is complete
  python bench/rehearsal.py --log "$LOG" --stage "$@"
  python bench/rehearsal.py --log "$LOG" --stage "$@"
}

stage 01_sample.py "${MODEL[@]}" "${RECORDS[@]}" --dtype bfloat16 --show 1 $SAMPLE \
  --out "$RUN/samples"
# any pair will do
stage 02_score.py "${MODEL[@]}" --samples "$RUN/samples" --dtype bfloat16 --reencode --show 1 \
  --min-image-score -1 "${ENCODERS[@]}" $SCORE --out "$RUN/pairs"
stage 03_pair_dpo.py "${MODEL[@]}" --pairs "$RUN/pairs/pairs.jsonl" --precision bf16 \
  --gradient-checkpointing --lora 16 $DPO --out "$RUN/train"
stage 04_eval.py --model "$RUN/train/checkpoint" "${RECORDS[@]}" --judge self --dtype bfloat16 \
  --show 1 "${ENCODERS[@]}" $EVAL --out "$RUN/eval"
python bench/rehearsal.py --table "$LOG"
