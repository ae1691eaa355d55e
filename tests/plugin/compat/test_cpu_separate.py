# SPDX-License-Identifier: Apache-2.0
"""What separate_async needs on the CPU: weights sent over gloo, and a saved policy that stays what it was."""

import subprocess
import sys

import pytest

SEND = """
import asyncio, multiprocessing, sys
import torch
from avar_verl.plugin.compat.cpu.checkpoint_engine import GlooCheckpointEngine as Engine

WEIGHTS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, 2], dtype=torch.bfloat16), "c": torch.tensor(3)}

def rollout(arguments, queue):
    engine = Engine(1)
    assert engine.prepare() is None
    engine.init_process_group(**arguments)
    async def read():
        return {name: tensor async for name, tensor in engine.receive_weights()}
    received = asyncio.run(read())
    engine.finalize()
    queue.put(all(received[name].dtype == w.dtype and torch.equal(received[name], w) for name, w in WEIGHTS.items())
              and list(received) == list(WEIGHTS))

if __name__ == "__main__":
    import ray.util
    ray.util.get_node_ip_address = lambda: "127.0.0.1"
    senders = [Engine(1, is_master=True), Engine(1)]
    actors, rollouts = Engine.build_topology(2, 2, [engine.prepare() for engine in senders])
    assert actors["rank"] == [0, -1] and rollouts["rank"] == [1, 2] and rollouts["world_size"] == [3, 3]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    for index in range(2):
        own = {name: values[index] for name, values in rollouts.items()}
        context.Process(target=rollout, args=(own, queue)).start()
    taken = []
    def weights(own):
        for name, weight in WEIGHTS.items():
            taken.append((own, name))
            yield name, weight
    for index, engine in enumerate(senders):
        engine.init_process_group(**{name: values[index] for name, values in actors.items()})
        asyncio.run(engine.send_weights(weights(index)))
        engine.finalize()
    assert taken == [(own, name) for own in (0, 1) for name in WEIGHTS], "all training processes gather every weight"
    print([queue.get(timeout=60) for _ in range(2)])
"""

SAVE = """
import torch, torch.distributed as dist
import verl
from torch.distributed.fsdp import fully_shard
from verl.utils import fsdp_utils
dist.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
def kept(save):
    model = torch.nn.Linear(2, 2)
    fully_shard(model)
    before = model.weight.full_tensor().clone()
    saved = save(model)
    with torch.no_grad():
        model.weight.mul_(2)
    fsdp_utils.fsdp2_sharded_load_from_cpu(model, *saved)
    return torch.equal(model.weight.full_tensor(), before)
print(kept(fsdp_utils.fsdp2_sharded_save_to_cpu), kept(fsdp_utils.fsdp2_sharded_save_to_cpu.__wrapped__))
"""


@pytest.fixture(scope="module")
def printed(tmp_path_factory) -> list[str]:
    """What both programs print, in one process."""
    program = tmp_path_factory.mktemp("separate") / "program.py"
    program.write_text(SEND + "".join(f"    {line}\n" for line in SAVE.splitlines()))
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.mark.e2e
def test_weights_are_sent_from_one_training_process_to_every_rollout_worker(printed):
    assert printed[-2] == "[True, True]"


@pytest.mark.e2e
def test_a_saved_policy_stays_what_it_was(printed):
    """And verl's own copy does not, or the patch has nothing to do."""
    assert printed[-1] == "True False"
