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
  mkdir -p "toy/results/main/seed$1"
  for NAME in base round1 round2 round3; do
    python - "runs/main/seed$1/eval/$NAME" "toy/results/main/seed$1/$NAME.json" <<'END'
import json, sys  # per record: shares of right answers about the real image and the drawing, all right, caption score
rows = [json.loads(line) for line in open(f"{sys.argv[1]}/answers.jsonl")]
kept = [[r["id"], sum(r["und_right"]), sum(r["gen_right"]), len(r["questions"]), int(r["all_right"]), round(r["caption_score"], 4)]
        for r in rows]
json.dump({"columns": ["id", "understood", "drawn right", "questions", "everything right", "caption score"], "records": kept},
          open(sys.argv[2], "w"))
END
  done
  echo "seed $1: done"
}

mkdir -p runs/main
for SEED in $SEEDS; do
  one "$SEED" &
  [ "$(jobs -rp | wc -l)" -lt 2 ] || wait -n
done
wait
