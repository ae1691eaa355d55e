#!/usr/bin/env bash
# AVAR GRPO of a cold-started Qwen2.5-VL-7B with the visual attention reward: 2 nodes of 8 GPUs with 80 GB, one Ray
# cluster. Run it on the head, or let cluster/on_every_node.sh start the cluster. NNODES and GPUS change the size.
#
#   MODEL=checkpoints/avar/cold_start/global_step_N/huggingface bash recipes/avar/run_grpo_qwen2_5_vl_7b.sh [overrides]
#
# Data: python -m recipes.avar.data.geo3k --out data/geo3k
# Tests compose and validate the config; the script has not been run on this hardware.
set -euo pipefail

MODEL=${MODEL:?the Hugging Face folder that the cold start wrote}
TRAIN=${TRAIN:-data/geo3k/train.parquet}
VAL=${VAL:-data/geo3k/test.parquet}
NNODES=${NNODES:-2}
GPUS=${GPUS:-8} # of a node
OUT=${OUT:-checkpoints/avar/grpo}

# Paper: lr 1e-6, batch 256, 4 epochs, n = 8, KL 0, lambda_v = 0.3, lambda_f = 0.1.
python -m verl.trainer.main_ppo --config-name avar_grpo \
    actor_rollout_ref.model.path="$MODEL" \
    data.train_files="$TRAIN" \
    data.val_files="$VAL" \
    trainer.nnodes="$NNODES" \
    trainer.n_gpus_per_node="$GPUS" \
    trainer.default_local_dir="$OUT" \
    "$@"
