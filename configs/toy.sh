# The toy world: two rounds on 2 CPU cores in 3 to 5 minutes, without any download.
# Set a variable in the environment to change it. What you put into SAMPLE, SCORE, DPO or EVAL comes
# after the flags below, so it wins over them and drops none of the others.

OUT=${OUT-runs/toy}             # everything is written here
ROUNDS=${ROUNDS-2}
SEED=${SEED-0}
LAUNCH=${LAUNCH-python}         # two processes: "torchrun --nproc-per-node 2", OMP_NUM_THREADS=1
LAUNCH_DPO=${LAUNCH_DPO-$LAUNCH}   # of 03_pair_dpo.py
BASE=${BASE-toy/base}           # the policy of round 0
TRAIN=${TRAIN-$OUT/preference/records.jsonl}    # made by toy/world.py if they are not there
HELD_OUT=${HELD_OUT-$OUT/held_out/records.jsonl}
TRAIN_PART=(${TRAIN_PART:-})    # which records of TRAIN, where images are: --limit, --skip, …
HELD_OUT_PART=(${HELD_OUT_PART:-})
ASK=(${ASK:-})                  # of hermesflow/questions.py, if QUESTION_MODEL is set
JUDGE=${JUDGE-toy}              # the toy world's exact oracle answers about drawings
PAIRS=${PAIRS-fresh}            # fresh: a round's own best and worst; self-play: Eq. 9-10

SAMPLE=(
  --captions 4                  # per image
  --caption-settings 0:2.0      # the whole vocabulary at temperature 2
  --max-new-tokens 20
  --images 4                    # per caption
  --steps 16                    # one image token per step
  --guidance 0.25
  --batch 16
  ${SAMPLE:-}
)
SCORE=(
  --batch 4
  ${SCORE:-}
)
DPO=(
  --beta 1
  --und 0.3                     # beside --gen 1: captions are good already
  --nll-und 1                   # keeps captions where they are
  --nll-gen 2                   # keeps winning drawings likely
  --complementary               # all slots of a drawing count: less noise
  --lr 3e-5
  --schedule linear
  --warmup 0.1
  --epochs 4                    # or --steps N
  --batch 16
  --micro-batch 16              # with N processes: 16 / N
  ${DPO:-}
)
EVAL=(
  --steps 16
  --guidance 0.25
  --batch 32
  ${EVAL:-}
)
