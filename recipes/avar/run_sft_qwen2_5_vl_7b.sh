#!/usr/bin/env bash
# AVAR cold start of Qwen2.5-VL-7B with attention guidance: 2 nodes of 8 GPUs with 80 GB.
# Run it on every node, with NODE_RANK=0..NNODES-1 and MASTER_ADDR set to the first node. NNODES and GPUS: the size.
#
#   MODEL=Qwen/Qwen2.5-VL-7B-Instruct TRAIN=cold_start.parquet bash recipes/avar/run_sft_qwen2_5_vl_7b.sh [overrides]
#
# Tests compose and validate the config; the script has not been run on this hardware.
set -euo pipefail

MODEL=${MODEL:-Qwen/Qwen2.5-VL-7B-Instruct}
TRAIN=${TRAIN:?the parquet file of the cold start, columns messages and images}
NNODES=${NNODES:-2}
GPUS=${GPUS:-8} # of a node
NODE_RANK=${NODE_RANK:-0}
MASTER_ADDR=${MASTER_ADDR:-127.0.0.1}
MASTER_PORT=${MASTER_PORT:-29500}
OUT=${OUT:-checkpoints/avar/cold_start}

# Paper: lr 5e-6, batch 512, 20 epochs, alpha = beta = 0.15. Released config: lr 1e-5, 10 epochs, cosine, warm-up 0.1,
# bf16, cutoff 8192. avar_sft.yaml has them, with their sources.
torchrun --nnodes="$NNODES" --nproc_per_node="$GPUS" --node_rank="$NODE_RANK" \
    --master_addr="$MASTER_ADDR" --master_port="$MASTER_PORT" \
    -m verl.trainer.sft_trainer --config-name avar_sft \
    model.path="$MODEL" \
    data.train_files="$TRAIN" \
    trainer.total_epochs=20 \
    trainer.nnodes="$NNODES" \
    trainer.n_gpus_per_node="$GPUS" \
    trainer.default_local_dir="$OUT" \
    "$@"
