#!/usr/bin/env bash
# HermesFlow, the whole protocol: in every round sample, score, Pair-DPO and evaluate.
#
#   bash run_selfplay.sh                          the toy world, 3 to 5 minutes on 2 CPU cores
#   bash run_selfplay.sh configs/showo.sh         the paper's run
#   OUT=runs/n16 SAMPLE="--images 16" bash run_selfplay.sh    one setting changed, the others kept
#
# Rerun the same command to resume: finished stages are skipped, and refuse other settings.
set -euo pipefail

fail() {  # a mistake in the settings: one line, before any work
  echo "error: ${*//$'\n'/ }" >&2
  exit 2
}

# ----------------------------------------------------------------------------------------- settings

[ $# -le 1 ] || fail "one file of settings is read, not $#: $*"
CONFIG=${1-$(dirname "$0")/configs/toy.sh}
[ -f "$CONFIG" ] && [ -r "$CONFIG" ] || fail "'$CONFIG' is no file of settings that can be read"
CONFIG=$(realpath "$CONFIG")
cd "$(dirname "$0")"
# in a shell of its own first: a mistake in the file would end this one, whatever it prints
SAID=$( (set -u; source "$CONFIG") 2>&1 > /dev/null) ||
  fail "${SAID:-$CONFIG: its last command fails}"
source "$CONFIG"
LAUNCH_DPO=${LAUNCH_DPO:-${LAUNCH-}}

for NAME in OUT ROUNDS SEED LAUNCH BASE TRAIN HELD_OUT JUDGE PAIRS; do
  [[ ${!NAME-} == *[![:space:]]* ]] || fail "$NAME is empty, or $CONFIG does not set it"
done
for NAME in ASK TRAIN_PART HELD_OUT_PART; do  # which a file of settings need not have
  declare -p "$NAME" &> /dev/null || declare -a "$NAME=()"
done
for NAME in SAMPLE SCORE DPO EVAL ASK TRAIN_PART HELD_OUT_PART; do
  [[ $(declare -p "$NAME" 2> /dev/null) == "declare -a"* ]] ||
    fail "$NAME is not set as an array by $CONFIG"
done
for OPTION in "${SAMPLE[@]}" "${SCORE[@]}" "${DPO[@]}" "${EVAL[@]}"; do
  case ${OPTION%%=*} in
    --out | --model | --records | --round | --seed | --samples | --pairs | --previous | --judge)
      fail "$OPTION is set by the loop, not in SAMPLE, SCORE, DPO or EVAL" ;;
  esac
done
for OPTION in "${SAMPLE[@]}" "${EVAL[@]}"; do
  case ${OPTION%%=*} in
    --skip | --limit | --questions | --image-folder)
      fail "$OPTION belongs in TRAIN_PART or HELD_OUT_PART, not in SAMPLE or EVAL" ;;
  esac
done
[[ $ROUNDS =~ ^[1-9][0-9]*$ ]] || fail "ROUNDS=$ROUNDS is not a whole number from 1 on"
[[ $SEED =~ ^[0-9]+$ ]] || fail "SEED=$SEED is not a whole number from 0 on"
[[ $PAIRS == self-play || $PAIRS == fresh ]] || fail "PAIRS=$PAIRS is neither self-play nor fresh"
# records are given, or the toy world's, which are made below
[[ $TRAIN == "$OUT/preference/records.jsonl" || -e $TRAIN ]] || fail "TRAIN=$TRAIN: no such file"
[[ $HELD_OUT == "$OUT/held_out/records.jsonl" || -e $HELD_OUT ]] ||
  fail "HELD_OUT=$HELD_OUT: no such file"

# ------------------------------------------------------------------------------------------- stages

PREVIOUS=()  # where the last round's pairs are, for self-play
TRAIN_RECORDS=(--records "$TRAIN" ${TRAIN_PART[@]+"${TRAIN_PART[@]}"})
HELD_OUT_RECORDS=(--records "$HELD_OUT" ${HELD_OUT_PART[@]+"${HELD_OUT_PART[@]}"})

[ "${TRAIN_RECORDS[*]}" != "${HELD_OUT_RECORDS[*]}" ] ||
  fail "TRAIN and HELD_OUT are the same records: HELD_OUT_PART should take others"

ask() {  # ask NAME OPTION…: write questions about the records that have none
  $LAUNCH -m hermesflow.questions --out "$OUT/questions/$1" --question-model "$QUESTION_MODEL" \
    ${QA_MODEL:+--qa-model "$QA_MODEL"} ${ASK[@]+"${ASK[@]}"} "${@:2}"
}

evaluate() {  # evaluate POLICY NAME OPTION…
  $LAUNCH 04_eval.py --model "$1" "${HELD_OUT_RECORDS[@]}" --judge "$JUDGE" --seed "$SEED" \
    --out "$OUT/eval/$2" "${EVAL[@]}" "${@:3}"
}

sample() {  # sample POLICY ROUND OPTION…
  $LAUNCH 01_sample.py --model "$1" "${TRAIN_RECORDS[@]}" --round "$2" --seed "$SEED" \
    --out "$OUT/round$2/samples" "${SAMPLE[@]}" "${@:3}"
}

score() {  # score POLICY ROUND OPTION…
  $LAUNCH 02_score.py --model "$1" --samples "$OUT/round$2/samples" --out "$OUT/round$2/pairs" \
    ${PREVIOUS[@]+"${PREVIOUS[@]}"} "${SCORE[@]}" "${@:3}"
}

train() {  # train POLICY ROUND OPTION…
  $LAUNCH_DPO 03_pair_dpo.py --model "$1" --pairs "$OUT/round$2/pairs/pairs.jsonl" --round "$2" \
    --seed "$SEED" --out "$OUT/round$2/train" "${DPO[@]}" "${@:3}"
}

# Every stage checks its options, and its batch against the number of processes, before the first
# one works for hours.
check() {  # check VARIABLE STAGE POLICY NAME
  local said line
  if ! said=$("${@:2}" --dry-run 2>&1 > /dev/null); then
    line=$(grep -o -m 1 'error: .*' <<< "$said") || line="its launcher: ${said##*$'\n'}"
    fail "$1: ${line#error: }"
  fi
}

if [ -n "${QUESTION_MODEL-}" ]; then
  check "ASK or TRAIN_PART" ask train "${TRAIN_RECORDS[@]}"
  check HELD_OUT_PART ask held_out "${HELD_OUT_RECORDS[@]}"
fi
check "EVAL or HELD_OUT_PART" evaluate "$BASE" base
check "SAMPLE or TRAIN_PART" sample "$BASE" "$ROUNDS"
check SCORE score "$BASE" "$ROUNDS"
check DPO train "$BASE" "$ROUNDS"

# ------------------------------------------------------------------------------------------- rounds

# the toy world's records: captions to learn from, and 300 held-out ones
if [ "$TRAIN" = "$OUT/preference/records.jsonl" ] && [ ! -f "$TRAIN" ]; then
  python toy/world.py --split preference --n 320 --seed "$SEED" --out "$OUT/preference"
fi
if [ "$HELD_OUT" = "$OUT/held_out/records.jsonl" ] && [ ! -f "$HELD_OUT" ]; then
  python toy/world.py --split test --n 300 --seed 0 --out "$OUT/held_out"
fi

if [ -n "${QUESTION_MODEL-}" ]; then
  ask train "${TRAIN_RECORDS[@]}"
  ask held_out "${HELD_OUT_RECORDS[@]}"
  TRAIN_RECORDS+=(--questions "$OUT/questions/train/questions.jsonl")
  HELD_OUT_RECORDS+=(--questions "$OUT/questions/held_out/questions.jsonl")
fi

evaluate "$BASE" base
POLICY=$BASE
EVALUATED=("$OUT/eval/base")
for ROUND in $(seq 1 "$ROUNDS"); do
  R=$OUT/round$ROUND
  sample "$POLICY" "$ROUND"
  score "$POLICY" "$ROUND"
  train "$POLICY" "$ROUND"
  POLICY=$R/train/checkpoint
  if [ "$PAIRS" = self-play ]; then PREVIOUS=(--previous "$R/pairs/pairs.jsonl"); fi
  evaluate "$POLICY" "round$ROUND"
  EVALUATED+=("$OUT/eval/round$ROUND")
done

python 04_eval.py --compare "${EVALUATED[@]}" --out "$OUT/eval"
python 04_eval.py --report "$OUT"
