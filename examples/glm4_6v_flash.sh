#!/usr/bin/env bash
# GLM-4.6V-Flash (9B): cold start with guidance, then GRPO with the visual attention reward.
#   TRAIN=cold_start.parquet bash examples/glm4_6v_flash.sh
source "$(dirname "$0")/common.sh"

MODEL=${MODEL:-zai-org/GLM-4.6V-Flash}
OUT=${OUT:-checkpoints/glm4_6v_flash}

# The architecture of GLM-4.1V. verl's packed attention of this family is not captured, so samples are padded.
# VAS needs a system turn: `[gMASK]<sop>` is always there, and is all of it in conversations without a system message.
cold_start "$MODEL" "$OUT/cold_start" \
    model.use_remove_padding=false
grpo "$(last_checkpoint "$OUT/cold_start")" "$OUT/grpo" \
    actor_rollout_ref.model.use_remove_padding=false \
    reward.custom_reward_function.path=pkg://reward_fns.visual_anchor \
    +reward.custom_reward_function.reward_kwargs.coordinates=relative_1000
