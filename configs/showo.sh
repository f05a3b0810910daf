# The paper's run: Show-o at 512 px, 5,000 JourneyDB pairs, three rounds, 8 GPUs.
# The defaults of sampling and training are the paper's; those of scoring need no download, so the
# paper's encoders are set here.
# Set a variable in the environment to change it. What you put into SAMPLE, SCORE, DPO or EVAL comes
# after the flags below, so it wins over them and drops none of the others.

OUT=${OUT-runs/show-o}          # everything is written here
ROUNDS=${ROUNDS-3}
SEED=${SEED-0}
# one process per GPU; said in full, so that accelerate has nothing to remark
ONE_HOST="--num_machines 1 --mixed_precision no --dynamo_backend no"
LAUNCH=${LAUNCH-accelerate launch --num_processes 8 $ONE_HOST}
LAUNCH_DPO=${LAUNCH_DPO-$LAUNCH}    # of 03_pair_dpo.py; sharded over 24 GB cards:
                                    # "accelerate launch --config_file configs/fsdp.yaml"
BASE=${BASE-showlab/show-o-512x512}                     # the policy of round 0
TRAIN=${TRAIN-initial_data.json}                        # in any format of hermesflow/datasets.py
TRAIN_LIMIT=${TRAIN_LIMIT-5000}                         # its first records, to learn from
HELD_OUT=${HELD_OUT-$TRAIN}                             # for the gap; of the same file, these are
HELD_OUT_LIMIT=${HELD_OUT_LIMIT-600}                    # the records behind those to learn from
IMAGES=${IMAGES-}                                       # folder of images that are not beside TRAIN
JUDGE=${JUDGE-Qwen/Qwen2.5-VL-7B-Instruct}              # answers about drawings (the paper: GPT-4o)
PAIRS=${PAIRS-self-play}        # Eq. 9-10, as the paper; fresh: each round's own best and worst

# Questions come from a file, with the records (JourneyDB's annotations: QUESTIONS=), or from
# QUESTION_MODEL, which writes them once, before the first round, about records that have none. The
# paper's is tifa-benchmark/llama2_tifa_question_generation; QA_MODEL is the paper's by default.
QUESTION_MODEL=${QUESTION_MODEL-}
QA_MODEL=${QA_MODEL-}
QUESTIONS=${QUESTIONS-vqa_data.json}                    # the original's, joined by id
[ -z "$QUESTION_MODEL" ] || QUESTIONS=

ABOUT=(${QUESTIONS:+--questions "$QUESTIONS"} ${IMAGES:+--image-folder "$IMAGES"})
TRAIN_PART=(--limit "$TRAIN_LIMIT" ${ABOUT[@]+"${ABOUT[@]}"} ${TRAIN_PART:-})
if [ "$HELD_OUT" = "$TRAIN" ]; then
  HELD_OUT_PART=(--skip "$TRAIN_LIMIT" --limit "$HELD_OUT_LIMIT" ${ABOUT[@]+"${ABOUT[@]}"}
                 ${HELD_OUT_PART:-})
else
  HELD_OUT_PART=(${HELD_OUT_PART:-})    # of another file nothing is assumed
fi
ASK=(                           # of hermesflow/questions.py
  --dtype bfloat16
  ${ASK:-}
)

SAMPLE=(                        # 10 captions as released; 16 images, 50 steps, guidance 5
  --dtype bfloat16
  ${SAMPLE:-}
)
SCORE=(                         # the best image must answer more than 60 % of its questions
  --dtype bfloat16
  --reencode                    # judge images after decoding and encoding, as the original does
  --caption-scorer google-bert/bert-large-uncased                   # cosine of [CLS] vectors
  --matcher sentence-transformers/all-mpnet-base-v2                 # answers to choices
  ${SCORE:-}
)
DPO=(                           # beta 0.2, lr 2e-5 cosine, weight decay 0.01, 3,000 steps of 32
  --precision bf16
  --gradient-checkpointing      # 30 GB less per GPU, a fifth more work
  ${DPO:-}
)
EVAL=(                          # 50 steps, guidance 5; answers understood as in scoring
  --dtype bfloat16
  --caption-scorer google-bert/bert-large-uncased
  --matcher sentence-transformers/all-mpnet-base-v2
  ${EVAL:-}
)
