#!/usr/bin/env bash
# InternVL3.5-8B in its Hugging Face form: cold start with guidance, then GRPO with the visual attention reward.
#   TRAIN=cold_start.parquet bash examples/internvl3_5_8b.sh
source "$(dirname "$0")/common.sh"

MODEL=${MODEL:-OpenGVLab/InternVL3_5-8B-HF}
OUT=${OUT:-checkpoints/internvl3_5_8b}

# Every conversation needs a system message: the chat template adds none, and without one there is no VAS.
# An image has up to 12 tiles of 256 tokens and a thumbnail, so prompts are long.
cold_start "$MODEL" "$OUT/cold_start"
grpo "$(last_checkpoint "$OUT/cold_start")" "$OUT/grpo" \
    data.max_prompt_length=4096 \
    reward.custom_reward_function.path=pkg://reward_fns.visual_anchor \
    +reward.custom_reward_function.reward_kwargs.coordinates=relative_1000
