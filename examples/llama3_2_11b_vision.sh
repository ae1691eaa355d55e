#!/usr/bin/env bash
# Llama 3.2 11B Vision: cold start with L_suppress.
#   TRAIN=cold_start.parquet bash examples/llama3_2_11b_vision.sh
source "$(dirname "$0")/common.sh"

MODEL=${MODEL:-meta-llama/Llama-3.2-11B-Vision-Instruct}
OUT=${OUT:-checkpoints/llama3_2_11b_vision}

# The model reads images in cross-attention layers, whose softmax has only image keys. The image mass there is always 1, so
# L_enhance is a constant (alpha=0) and there is no r_visual. L_suppress works on the self-attention layers
# (docs/families.md). Samples cannot be packed: a cross-attention layer would show every image to every sample.
# There is no GRPO stage: vLLM 0.24 has dropped this architecture, and verl has no other rollout for it.
cold_start "$MODEL" "$OUT/cold_start" \
    model.use_remove_padding=false \
    model.override_config.attn_implementation=sdpa \
    avar.agto.alpha=0
