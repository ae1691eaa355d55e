#!/usr/bin/env bash
#SBATCH --job-name=avar
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#
# Either stage of the recipe on Slurm, from an environment in which the package is installed:
#
#   STAGE=sft TRAIN=cold_start.parquet sbatch recipes/avar/cluster/slurm.sh [overrides]
#   STAGE=grpo MODEL=FOLDER_OF_THE_COLD_START sbatch recipes/avar/cluster/slurm.sh [overrides]
#
# Both stages go on from their last checkpoint when the job is submitted again.
set -euo pipefail

: "${STAGE:?sft or grpo}"
RECIPE=$(python -m recipes.avar) # sbatch runs a copy of this file.
export NNODES=$SLURM_JOB_NUM_NODES GPUS=$SLURM_GPUS_ON_NODE
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
export HEAD MASTER_ADDR=$HEAD

case $STAGE in
    sft) SCRIPT=$RECIPE/run_sft_qwen2_5_vl_7b.sh ;;
    grpo) SCRIPT=$RECIPE/cluster/on_every_node.sh ;;
    *) echo "STAGE must be sft or grpo; got $STAGE" >&2 && exit 2 ;;
esac
srun --kill-on-bad-exit=1 bash -c 'NODE_RANK=$SLURM_NODEID exec bash "$@"' slurm "$SCRIPT" "$@"
