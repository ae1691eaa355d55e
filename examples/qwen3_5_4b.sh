#!/usr/bin/env bash
# Qwen3.5-4B, and with MODEL=Qwen/Qwen3.5-27B the 27B: cold start with guidance, then GRPO with the visual attention reward.
#   TRAIN=cold_start.parquet bash examples/qwen3_5_4b.sh
#   TRAIN=cold_start.parquet MODEL=Qwen/Qwen3.5-27B GPUS=8 TP=4 bash examples/qwen3_5_4b.sh
source "$(dirname "$0")/common.sh"

MODEL=${MODEL:-Qwen/Qwen3.5-4B}
OUT=${OUT:-checkpoints/qwen3_5}
TP=${TP:-1}

# Only every fourth layer has a softmax; guidance and reward use these. Behind their output gate the ratio of masses says
# little, since the system turn need not be a sink: the reward is the image share.
# The chat template adds no system turn: give every conversation a system message. Responses begin with <think>, which the
# prompt of a rollout ends in. Packed samples need flash-linear-attention and causal-conv1d to be fast.
cold_start "$MODEL" "$OUT/cold_start" \
    model.use_remove_padding=true
grpo "$(last_checkpoint "$OUT/cold_start")" "$OUT/grpo" \
    actor_rollout_ref.model.use_remove_padding=true \
    actor_rollout_ref.rollout.tensor_model_parallel_size="$TP" \
    avar.vars.statistic=image_share \
    reward.custom_reward_function.path=pkg://reward_fns.visual_anchor \
    +reward.custom_reward_function.reward_kwargs.coordinates=relative_1000
