#!/usr/bin/env bash
# Gemma 3 12B: cold start with guidance, then GRPO with the visual attention reward.
#   TRAIN=cold_start.parquet bash examples/gemma3_12b.sh
source "$(dirname "$0")/common.sh"

MODEL=${MODEL:-google/gemma-3-12b-it}
OUT=${OUT:-checkpoints/gemma3_12b}

# Five of six layers have a sliding window of 1024 tokens, so late tokens of a long response do not see the image and
# <bos>. Guidance and reward use only the layers without a window, every sixth of 48. The system turn is <bos>
# (avar_verl/model/families/gemma3.py). Samples cannot be packed, because image tokens of one image see each other.
# Flash attention does not support the mask that this needs, so attention is sdpa.
LAYERS="[5,11,17,23,29,35,41,47]"

cold_start "$MODEL" "$OUT/cold_start" \
    model.use_remove_padding=false \
    model.override_config.attn_implementation=sdpa \
    avar.agto.layers="$LAYERS"
grpo "$(last_checkpoint "$OUT/cold_start")" "$OUT/grpo" \
    actor_rollout_ref.model.use_remove_padding=false \
    actor_rollout_ref.model.override_config.attn_implementation=sdpa \
    avar.vars.layers="$LAYERS"
