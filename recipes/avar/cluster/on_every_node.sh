#!/usr/bin/env bash
# GRPO on several nodes: run it on each of them, at about the same time, with the same HEAD, NNODES and GPUS. The first
# node starts a Ray cluster, waits for the others, trains and stops it; the others join and end with it.
#
#   HEAD=node0 NNODES=2 GPUS=8 NODE_RANK=0 MODEL=... bash recipes/avar/cluster/on_every_node.sh [overrides]
#
# The package must be installed on every node, and checkpoints need a file system that all of them share. Ray keeps its
# token in the home folder; where nodes do not share that, set the same RAY_AUTH_TOKEN on all. RUN is what the first
# node runs, by default the recipe's GRPO. RAY_OPTIONS: more options of `ray start`, such as --num-cpus=64 where a
# container hides cores.
set -euo pipefail

: "${HEAD:?host name or address of the first node}" "${NODE_RANK:?0 on the first node, 1 .. NNODES-1 on the others}"
export NNODES=${NNODES:?number of nodes} GPUS=${GPUS:-8}
PORT=${PORT:-6379}
export RAY_ADDRESS=$HEAD:$PORT
RUN=${RUN:-bash $(dirname "$0")/../run_grpo_qwen2_5_vl_7b.sh}

# A head asks for the token as soon as there is one; whoever joins by an address sends it only if told to.
if [ -n "${RAY_AUTH_TOKEN:-}" ] || [ -e "${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}" ]; then
    export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token}
fi

wait_for_head() { until (exec 3<> "/dev/tcp/$HEAD/$PORT") 2> /dev/null; do sleep 1; done; }

if [ "$NODE_RANK" -ne 0 ]; then
    wait_for_head
    ray start --address="$RAY_ADDRESS" --num-gpus="$GPUS" --block ${RAY_OPTIONS:-} || true # Ends with an error when the head stops.
    exit 0
fi

# Here RAY_ADDRESS would make it join a cluster that is not there yet. Ended by its id: `ray stop` would stop every
# Ray of the machine.
env -u RAY_ADDRESS ray start --head --port="$PORT" --num-gpus="$GPUS" --include-dashboard=false \
    --disable-usage-stats --block ${RAY_OPTIONS:-} &
HEAD_ID=$!
trap 'kill $HEAD_ID; wait $HEAD_ID || true' EXIT
wait_for_head
# verl ends at once if the processes that it needs do not fit.
python - << 'END'
import os, time, ray

wanted = int(os.environ["NNODES"]) * int(os.environ["GPUS"])
ray.init(log_to_driver=False)
while (found := int(ray.cluster_resources().get("GPU", 0))) < wanted:
    print(f"{found} of {wanted} GPUs have joined", flush=True)
    time.sleep(2)
END
$RUN "$@"
