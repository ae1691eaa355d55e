# SPDX-License-Identifier: Apache-2.0
"""verl's checkpoint engine between training and rollout processes of their own, over gloo: backend `gloo`.

verl's own (`verl.checkpoint_engine`) need CUDA, NPU or RDMA, and `naive` needs both in one process, so without this one
separate_async cannot run on the CPU. verl imports the module that `rollout.checkpoint_engine.custom_backend_module`
names (verl/workers/engine_workers.py:704, checkpoint_engine/base.py:324).

One rank of the trainer sends every tensor to all rollout workers; the group lives for one update.
"""

import pickle
from collections.abc import AsyncGenerator, Iterable
from datetime import timedelta

import ray
import torch
from torch.distributed import ProcessGroupGloo, TCPStore
from verl.checkpoint_engine.base import CheckpointEngine, CheckpointEngineRegistry
from verl.utils.net_utils import get_free_port
from verl.workers.rollout.utils import ensure_async_iterator

TIMEOUT = timedelta(minutes=10)


@CheckpointEngineRegistry.register("gloo")
class GlooCheckpointEngine(CheckpointEngine):
    """Broadcasts tensors on the CPU from the first training process to every rollout worker."""

    def __init__(self, bucket_size: int, is_master: bool = False):
        """`bucket_size` is verl's; every tensor is sent on its own."""
        self.is_master = is_master
        self.rank = -1
        self._store = self._group = None

    def prepare(self) -> tuple[str, int] | None:
        """Address of the group, from the process that sends."""
        if not self.is_master:
            return None
        host = ray.util.get_node_ip_address().strip("[]")
        return host, get_free_port(host)[0]

    @classmethod
    def build_topology(cls, actor_wg_world_size: int, rollout_world_size: int, metadata: list):
        world_size = 1 + rollout_world_size

        def arguments(ranks: list[int]) -> dict[str, list]:
            return {
                "rank": ranks,
                "world_size": [world_size] * len(ranks),
                "address": [metadata[0]] * len(ranks),
            }

        return arguments([0] + [-1] * (actor_wg_world_size - 1)), arguments(list(range(1, world_size)))

    def init_process_group(self, rank: int, world_size: int, address: tuple[str, int]) -> None:
        self.rank = rank
        if rank >= 0:
            self._store = TCPStore(*address, world_size, is_master=rank == 0, timeout=TIMEOUT)
            self._group = ProcessGroupGloo(self._store, rank, world_size, TIMEOUT)

    def finalize(self) -> None:
        self._group = self._store = None

    def _broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        self._group.broadcast([tensor]).wait()
        return tensor

    def _send(self, message) -> None:
        data = torch.frombuffer(bytearray(pickle.dumps(message)), dtype=torch.uint8)
        self._broadcast(torch.tensor([len(data)]))
        self._broadcast(data)

    def _receive(self):
        length = int(self._broadcast(torch.zeros(1, dtype=torch.long)))
        return pickle.loads(self._broadcast(torch.empty(length, dtype=torch.uint8)).numpy().tobytes())

    @torch.no_grad()
    async def send_weights(self, weights: Iterable[tuple[str, torch.Tensor]], global_steps: int | None = None) -> None:
        # Processes that send nothing take part in gathering the weights.
        async for name, weight in ensure_async_iterator(weights):
            if self.rank == 0:
                weight = weight.detach().cpu().contiguous()
                self._send((name, weight.shape, weight.dtype))
                self._broadcast(weight)
        if self.rank == 0:
            self._send(None)

    @torch.no_grad()
    async def receive_weights(self, global_steps: int | None = None) -> AsyncGenerator[tuple[str, torch.Tensor], None]:
        while (message := self._receive()) is not None:
            name, shape, dtype = message
            yield name, self._broadcast(torch.empty(shape, dtype=dtype))
