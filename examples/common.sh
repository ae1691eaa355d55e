# Sourced by the scripts of this folder: the two stages of the recipe on one node of 8 GPUs.
# TRAIN: cold-start parquet. RL_TRAIN, RL_VAL: prompts (python -m recipes.avar.data.geo3k --out data/geo3k).
set -euo pipefail

RL_TRAIN=${RL_TRAIN:-data/geo3k/train.parquet}
RL_VAL=${RL_VAL:-data/geo3k/test.parquet}
GPUS=${GPUS:-8}

# cold_start MODEL OUT [overrides]
cold_start() {
    local model=$1 out=$2
    shift 2
    torchrun --standalone --nproc_per_node="$GPUS" -m verl.trainer.sft_trainer \
        --config-name avar_sft \
        model.path="$model" data.train_files="${TRAIN:?the cold-start parquet file}" \
        trainer.n_gpus_per_node="$GPUS" trainer.default_local_dir="$out" "$@"
}

# last_checkpoint OUT: the Hugging Face folder of the last step
last_checkpoint() {
    echo "$1/global_step_$(cat "$1/latest_checkpointed_iteration.txt")/huggingface"
}

# grpo MODEL OUT [overrides]
grpo() {
    local model=$1 out=$2
    shift 2
    python -m verl.trainer.main_ppo --config-name avar_grpo \
        actor_rollout_ref.model.path="$model" data.train_files="$RL_TRAIN" data.val_files="$RL_VAL" \
        trainer.n_gpus_per_node="$GPUS" trainer.default_local_dir="$out" "$@"
}
