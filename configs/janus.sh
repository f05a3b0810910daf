# Janus-Pro 1B, which transformers loads: the paper's method over another backbone, with its settings
# (configs/showo.sh, whose variables all hold here, too). Images are 576 codes of 384 px, drawn one
# after the other: --steps, --anneal and masks have no meaning. The published weights were not run.

OUT=${OUT-runs/janus}
BASE=${BASE-deepseek-community/Janus-Pro-1B}    # or Janus-Pro-7B, on cards of more memory

# (1 + g)·cond − g·uncond: 4 is the 5 of Janus' own cfg_weight; softmax temperature 1
SAMPLE="--guidance 4 ${SAMPLE-}"
EVAL="--guidance 4 ${EVAL-}"
DPO="--preview-guidance 4 ${DPO-}"
MINE=${SCORE-}

source configs/showo.sh

SCORE=(                         # without --reencode: what is looked at is decoded anyway
  --dtype bfloat16
  --caption-scorer google-bert/bert-large-uncased
  --matcher sentence-transformers/all-mpnet-base-v2
  $MINE
)
