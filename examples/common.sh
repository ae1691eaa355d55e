# Sourced by the scripts of this folder: the two stages of the recipe, on one node of 8 GPUs with 80 GB.
# TRAIN: cold-start parquet. RL_TRAIN, RL_VAL: prompts (python -m recipes.avar.data.geo3k --out data/geo3k).
# GPUS: of a node. NNODES: nodes; each runs the script with its NODE_RANK and the MASTER_ADDR of the first, and GRPO
# starts on the first, in a Ray cluster of all (recipes/avar/cluster/on_every_node.sh).
set -euo pipefail

RL_TRAIN=${RL_TRAIN:-data/geo3k/train.parquet}
RL_VAL=${RL_VAL:-data/geo3k/test.parquet}
GPUS=${GPUS:-8}
NNODES=${NNODES:-1}
NODE_RANK=${NODE_RANK:-0}
MASTER_ADDR=${MASTER_ADDR:-127.0.0.1}
MASTER_PORT=${MASTER_PORT:-29500}

# fewer_than GPUS: whether this run has fewer in all
fewer_than() {
    ((GPUS * NNODES < $1))
}

# Where weights and optimizer states do not fit into the GPUs beside activations, or beside vLLM.
SFT_OFFLOAD=(engine.param_offload=true engine.optimizer_offload=true)
GRPO_OFFLOAD=(
    actor_rollout_ref.actor.fsdp_config.param_offload=true
    actor_rollout_ref.actor.fsdp_config.optimizer_offload=true
    actor_rollout_ref.ref.fsdp_config.param_offload=true
)

# cold_start MODEL OUT [overrides]
cold_start() {
    local model=$1 out=$2
    shift 2
    torchrun --nnodes="$NNODES" --nproc_per_node="$GPUS" --node_rank="$NODE_RANK" \
        --master_addr="$MASTER_ADDR" --master_port="$MASTER_PORT" -m verl.trainer.sft_trainer \
        --config-name avar_sft \
        model.path="$model" data.train_files="${TRAIN:?the cold-start parquet file}" \
        trainer.nnodes="$NNODES" trainer.n_gpus_per_node="$GPUS" trainer.default_local_dir="$out" "$@"
}

# last_checkpoint OUT: the Hugging Face folder of the last step
last_checkpoint() {
    echo "$1/global_step_$(cat "$1/latest_checkpointed_iteration.txt")/huggingface"
}

# grpo MODEL OUT [overrides]
grpo() {
    local model=$1 out=$2
    shift 2
    ((NODE_RANK == 0)) || return 0
    python -m verl.trainer.main_ppo --config-name avar_grpo \
        actor_rollout_ref.model.path="$model" data.train_files="$RL_TRAIN" data.val_files="$RL_VAL" \
        trainer.nnodes="$NNODES" trainer.n_gpus_per_node="$GPUS" trainer.default_local_dir="$out" "$@"
}
