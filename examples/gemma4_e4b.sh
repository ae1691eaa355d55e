#!/usr/bin/env bash
# Gemma 4 E4B: cold start with guidance, then GRPO with the visual attention reward, on 1, 8 or 16 GPUs.
#   TRAIN=cold_start.parquet GPUS=8 bash examples/gemma4_e4b.sh
source "$(dirname "$0")/common.sh"

MODEL=${MODEL:-google/gemma-4-E4B-it}
OUT=${OUT:-checkpoints/gemma4_e4b}

# Five of six layers have a sliding window; guidance and reward use the others, by default. Heads of these have 512
# dimensions, more than flash attention runs: attention is sdpa, and samples are padded, as in verl's tests of the model
# (a packed row would need a mask of its length squared). The system turn is one of its own.
SFT=() GRPO=()
if fewer_than 8; then
    SFT=("${SFT_OFFLOAD[@]}") GRPO=("${GRPO_OFFLOAD[@]}" actor_rollout_ref.rollout.gpu_memory_utilization=0.4)
fi
cold_start "$MODEL" "$OUT/cold_start" \
    model.use_remove_padding=false \
    model.override_config.attn_implementation=sdpa \
    "${SFT[@]}"
grpo "$(last_checkpoint "$OUT/cold_start")" "$OUT/grpo" \
    actor_rollout_ref.model.use_remove_padding=false \
    actor_rollout_ref.model.override_config.attn_implementation=sdpa \
    "${GRPO[@]}"
