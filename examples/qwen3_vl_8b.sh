#!/usr/bin/env bash
# Qwen3-VL-8B: cold start with guidance, then GRPO with the visual attention reward.
#   TRAIN=cold_start.parquet bash examples/qwen3_vl_8b.sh
source "$(dirname "$0")/common.sh"

MODEL=${MODEL:-Qwen/Qwen3-VL-8B-Instruct}
OUT=${OUT:-checkpoints/qwen3_vl_8b}

# VAS needs a system turn, and the chat template adds none: give every conversation a system message.
# The model writes boxes in relative coordinates, 0 to 1000; the anchor reward must be configured for that.
cold_start "$MODEL" "$OUT/cold_start"
grpo "$(last_checkpoint "$OUT/cold_start")" "$OUT/grpo" \
    reward.custom_reward_function.path=pkg://reward_fns.visual_anchor \
    +reward.custom_reward_function.reward_kwargs.coordinates=relative_1000
