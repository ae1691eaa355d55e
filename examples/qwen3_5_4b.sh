#!/usr/bin/env bash
# Qwen3.5-4B: cold start with guidance, then GRPO with the visual attention reward, on 1, 8 or 16 GPUs.
#   TRAIN=cold_start.parquet GPUS=8 bash examples/qwen3_5_4b.sh
source "$(dirname "$0")/common.sh"

MODEL=${MODEL:-Qwen/Qwen3.5-4B}
OUT=${OUT:-checkpoints/qwen3_5_4b}

# Only every fourth layer has a softmax; guidance and reward use these. Behind their output gate the ratio of masses says
# little, since the system turn need not be a sink: the reward is the image share.
# The chat template adds no system turn: give every conversation a system message. Responses begin with <think>, which the
# prompt of a rollout ends in. Packed samples need flash-linear-attention and causal-conv1d to be fast.
SFT=() GRPO=()
if fewer_than 4; then
    SFT=("${SFT_OFFLOAD[@]}") GRPO=("${GRPO_OFFLOAD[@]}" actor_rollout_ref.rollout.gpu_memory_utilization=0.4)
fi
cold_start "$MODEL" "$OUT/cold_start" \
    model.use_remove_padding=true \
    "${SFT[@]}"
# As verl's own scripts for Qwen3.5: FSDP2, no prefix cache (of states, which cannot be cut), no torch.compile.
grpo "$(last_checkpoint "$OUT/cold_start")" "$OUT/grpo" \
    actor_rollout_ref.model.use_remove_padding=true \
    actor_rollout_ref.actor.strategy=fsdp2 \
    actor_rollout_ref.ref.strategy=fsdp2 \
    actor_rollout_ref.actor.use_torch_compile=false \
    actor_rollout_ref.ref.use_torch_compile=false \
    actor_rollout_ref.rollout.enable_prefix_caching=false \
    actor_rollout_ref.rollout.enable_chunked_prefill=true \
    actor_rollout_ref.rollout.max_num_batched_tokens=8192 \
    avar.vars.statistic=image_share \
    reward.custom_reward_function.path=pkg://reward_fns.visual_anchor \
    +reward.custom_reward_function.reward_kwargs.coordinates=relative_1000 \
    +reward.custom_reward_function.reward_kwargs.think_in_prompt=true \
    "${GRPO[@]}"
