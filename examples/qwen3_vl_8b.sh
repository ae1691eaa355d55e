#!/usr/bin/env bash
# Qwen3-VL-8B: cold start with guidance, then GRPO with the visual attention reward.
#   TRAIN=cold_start.parquet bash examples/qwen3_vl_8b.sh
source "$(dirname "$0")/common.sh"

MODEL=${MODEL:-Qwen/Qwen3-VL-8B-Instruct}
OUT=${OUT:-checkpoints/qwen3_vl_8b}

# Its chat template writes no system turn of its own, and VAS needs one: give every conversation a system message.
# Its boxes are relative, 0 to 1000, which the anchor reward must be told.
cold_start "$MODEL" "$OUT/cold_start"
grpo "$(last_checkpoint "$OUT/cold_start")" "$OUT/grpo" \
    reward.custom_reward_function.path=pkg://reward_fns.visual_anchor \
    +reward.custom_reward_function.reward_kwargs.coordinates=relative_1000
