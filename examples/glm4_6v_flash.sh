#!/usr/bin/env bash
# GLM-4.6V-Flash (9B): cold start with guidance, then GRPO with the visual attention reward, on 1, 8 or 16 GPUs.
#   TRAIN=cold_start.parquet GPUS=8 bash examples/glm4_6v_flash.sh
source "$(dirname "$0")/common.sh"

MODEL=${MODEL:-zai-org/GLM-4.6V-Flash}
OUT=${OUT:-checkpoints/glm4_6v_flash}

# The architecture of GLM-4.1V. verl's packed attention of this family is not captured, so samples are padded.
# VAS needs a system turn: `[gMASK]<sop>` is always there, and is all of it in conversations without a system message.
SFT=() GRPO=(actor_rollout_ref.rollout.tensor_model_parallel_size=2)
if fewer_than 8; then
    SFT=("${SFT_OFFLOAD[@]}")
    GRPO=("${GRPO_OFFLOAD[@]}" actor_rollout_ref.rollout.gpu_memory_utilization=0.4)
fi
cold_start "$MODEL" "$OUT/cold_start" \
    model.use_remove_padding=false \
    "${SFT[@]}"
# No chunked prefill, as in verl's script for GLM-4.1V.
grpo "$(last_checkpoint "$OUT/cold_start")" "$OUT/grpo" \
    actor_rollout_ref.model.use_remove_padding=false \
    actor_rollout_ref.rollout.enable_chunked_prefill=false \
    reward.custom_reward_function.path=pkg://reward_fns.visual_anchor \
    +reward.custom_reward_function.reward_kwargs.coordinates=relative_1000 \
    "${GRPO[@]}"
