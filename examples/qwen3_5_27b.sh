#!/usr/bin/env bash
# Qwen3.5-27B: cold start with guidance, then GRPO with the visual attention reward, on 8 or 16 GPUs.
#   TRAIN=cold_start.parquet GPUS=8 bash examples/qwen3_5_27b.sh
source "$(dirname "$0")/common.sh"

MODEL=${MODEL:-Qwen/Qwen3.5-27B}
OUT=${OUT:-checkpoints/qwen3_5_27b}
TP=${TP:-4}

if fewer_than 8; then
    echo "27 billion parameters need at least 8 GPUs; got $((GPUS * NNODES)). See qwen3_5_4b.sh for fewer." >&2
    exit 1
fi

# What holds for qwen3_5_4b.sh holds here. The other settings are those of verl's script for this model
# (examples/grpo_trainer/run_qwen3_5_27b_fsdp.sh): everything is offloaded, one sample a micro-batch, entropy in chunks.
# With 16 GPUs, optimizer states are spread over all of them.
cold_start "$MODEL" "$OUT/cold_start" \
    model.use_remove_padding=true \
    data.micro_batch_size_per_gpu=1 \
    engine.strategy=fsdp2 \
    engine.reshard_after_forward=true \
    engine.offload_policy=true
grpo "$(last_checkpoint "$OUT/cold_start")" "$OUT/grpo" \
    data.train_batch_size=64 \
    actor_rollout_ref.model.use_remove_padding=true \
    actor_rollout_ref.actor.strategy=fsdp2 \
    actor_rollout_ref.actor.ppo_mini_batch_size=16 \
    actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1 \
    actor_rollout_ref.actor.use_torch_compile=false \
    actor_rollout_ref.actor.entropy_from_logits_with_chunking=true \
    actor_rollout_ref.actor.fsdp_config.entropy_checkpointing=true \
    actor_rollout_ref.actor.fsdp_config.reshard_after_forward=true \
    actor_rollout_ref.actor.fsdp_config.offload_policy=true \
    "${GRPO_OFFLOAD[@]}" \
    actor_rollout_ref.ref.strategy=fsdp2 \
    actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=1 \
    actor_rollout_ref.ref.use_torch_compile=false \
    actor_rollout_ref.ref.entropy_from_logits_with_chunking=true \
    actor_rollout_ref.ref.fsdp_config.reshard_after_forward=true \
    actor_rollout_ref.ref.fsdp_config.offload_policy=true \
    actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=1 \
    actor_rollout_ref.rollout.tensor_model_parallel_size="$TP" \
    actor_rollout_ref.rollout.enable_chunked_prefill=true \
    actor_rollout_ref.rollout.enable_prefix_caching=false \
    actor_rollout_ref.rollout.max_num_batched_tokens=8192 \
    actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes=6144 \
    avar.vars.statistic=image_share \
    reward.custom_reward_function.path=pkg://reward_fns.visual_anchor \
    +reward.custom_reward_function.reward_kwargs.coordinates=relative_1000 \
    +reward.custom_reward_function.reward_kwargs.think_in_prompt=true
