#!/usr/bin/env bash
#SBATCH --job-name=hermesflow
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
# The whole protocol over several nodes, under Slurm. From this repository's folder, on a disk that
# all nodes share; what your cluster wants besides (--account, --partition) goes before the script:
#
#   sbatch configs/slurm.sh                           configs/showo.sh on two nodes of 8 GPUs
#   sbatch --nodes 4 --account mine configs/slurm.sh configs/mine.sh
#   LAUNCH_DPO=replicated sbatch configs/slurm.sh     in training, a GPU holds everything
#
# The loop runs on the first node, every stage on all. Two minutes before its time is over, the job
# saves its state and is queued again; it continues by itself, as the same command does.
set -euo pipefail

# on each node, from srun: the processes of one stage; the first node's hold rank 0
if [ "${1-}" = on-node ]; then
  # what the first node has just written is seen on the others when their listings expire
  [ "$SLURM_NODEID" = 0 ] || [[ " $* " == *" --dry-run "* ]] || sleep "$SETTLE"
  if [ "$2" = sharded ]; then
    exec accelerate launch --config_file configs/fsdp.yaml --num_machines "$SLURM_NNODES" \
      --num_processes $((SLURM_NNODES * GPUS)) --machine_rank "$SLURM_NODEID" \
      --main_process_ip "$HEAD" --main_process_port "$PORT" "${@:3}"
  fi
  exec torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "$GPUS" --node-rank "$SLURM_NODEID" \
    --master-addr "$HEAD" --master-port "$PORT" "${@:3}"
fi

cd "${SLURM_SUBMIT_DIR:?"is not set: this is for sbatch"}"
export GPUS=${GPUS-${SLURM_GPUS_ON_NODE-8}}  # processes on a node
HOSTS=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export HEAD=${HOSTS%%$'\n'*}  # the first one
export PORT=$((20000 + SLURM_JOB_ID % 20000))
export SETTLE=${SETTLE-60}  # seconds, of NFS; 0 for Lustre, GPFS and others without stale listings
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE-1}  # what to fetch before: bench/README.md
export OMP_NUM_THREADS=${OMP_NUM_THREADS-4}
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=100  # seconds that a stage has to save its state
# a node that fails ends the stage on all, which would wait for it
SRUN="srun --kill-on-bad-exit=1 bash configs/slurm.sh on-node"
export LAUNCH="$SRUN replicated"
export LAUNCH_DPO="$SRUN ${LAUNCH_DPO-sharded}"
# 32 records are a step: of two nodes of 8 GPUs, each takes 2 at a time
MICRO=$((32 / (SLURM_NNODES * GPUS)))
export DPO="--micro-batch $((MICRO < 1 ? 1 : MICRO > 4 ? 4 : MICRO)) ${DPO-}"

set -m  # the loop and what it starts are a process group
bash run_selfplay.sh "${1-configs/showo.sh}" &
LOOP=$!

requeue() {
  trap '' TERM
  kill -TERM $LOOP 2> /dev/null || true   # no other stage begins,
  scancel --signal=TERM "$SLURM_JOB_ID"   # and this one saves its state
  for _ in {1..100}; do
    kill -0 -- -$LOOP 2> /dev/null || break
    sleep 1
  done
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
}
trap requeue TERM
wait $LOOP
