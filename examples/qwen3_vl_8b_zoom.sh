#!/usr/bin/env bash
# Qwen3-VL-8B with a tool that zooms into the image: cold start with guidance, then multi-turn GRPO.
#   TRAIN=cold_start.parquet bash examples/qwen3_vl_8b_zoom.sh
source "$(dirname "$0")/common.sh"

MODEL=${MODEL:-Qwen/Qwen3-VL-8B-Instruct}
OUT=${OUT:-checkpoints/qwen3_vl_8b_zoom}
TOOLS=$(cd "$(dirname "$0")" && pwd)/zoom_in.yaml

# The chat template of Qwen3-VL writes the tools into the prompt; that of Qwen2.5-VL does not, so there the system
# message must name them. Masses count the images of the prompt alone: avar.vars.images (docs/multi-turn.md).
cold_start "$MODEL" "$OUT/cold_start"
grpo "$(last_checkpoint "$OUT/cold_start")" "$OUT/grpo" \
    actor_rollout_ref.rollout.agent.default_agent_loop=avar_tool_agent \
    actor_rollout_ref.rollout.multi_turn.tool_config_path="$TOOLS" \
    actor_rollout_ref.rollout.multi_turn.max_assistant_turns=4
