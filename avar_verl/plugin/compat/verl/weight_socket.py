# SPDX-License-Identifier: Apache-2.0
"""Runs of different Rays on one machine have weight sockets of their own.

The actor hands new weights to vLLM through the socket `/tmp/rl-colocate-zmq-<job>-replica-<n>-rank-<n>.sock`
(verl/workers/rollout/vllm_rollout/vllm_rollout.py:141, utils.py:431; the sender deletes and binds it, the receiver
connects, bucketed_weight_transfer.py:170). Every Ray calls its first job 01000000, so two runs that each start a Ray of
their own share the name, and a vLLM may load the other run's weights. Ray gives its workers, and through them vLLM's
processes, the process id of their raylet: both ends of a socket are on one node and have the same.
"""

import functools
import os

RAYLET = "RAY_RAYLET_PID"


def own(handle: str) -> str:
    """`handle` with the process id of this node's raylet in its file name.

    Raises:
        ValueError: a process that does not belong to a Ray.
    """
    raylet = os.environ.get(RAYLET)
    if not raylet:
        raise ValueError(
            f"weights are sent between processes of one Ray, which names itself in {RAYLET}; got none. Start rollouts "
            "through verl's launcher."
        )
    return handle.replace("rl-colocate-zmq-", f"rl-colocate-zmq-{raylet}-", 1)


def apply_sender(vllm_rollout) -> None:
    """Wrap `ServerAdapter` of `verl.workers.rollout.vllm_rollout.vllm_rollout`."""
    original = vllm_rollout.ServerAdapter.__init__

    @functools.wraps(original)
    def __init__(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.zmq_handle = own(self.zmq_handle)

    vllm_rollout.ServerAdapter.__init__ = __init__


def apply_receiver(utils) -> None:
    """Wrap `vLLMColocateWorkerExtension` of `verl.workers.rollout.vllm_rollout.utils`."""
    original = utils.vLLMColocateWorkerExtension._get_zmq_handle

    @functools.wraps(original)
    def _get_zmq_handle(self):
        return own(original(self))

    utils.vLLMColocateWorkerExtension._get_zmq_handle = _get_zmq_handle
