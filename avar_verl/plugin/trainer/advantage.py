# SPDX-License-Identifier: Apache-2.0
"""r_visual normalised on its own and added to verl's advantages: `avar.vars.advantage=normalize_then_sum`.

Shape suffixes: B = rollouts, T = response tokens
"""

import torch
import transfer_queue as tq
from tensordict import TensorDict
from transfer_queue import KVBatchMeta

from avar_verl.objectives.groups import group_index, group_normalize


def visual_advantage(visual_B: torch.Tensor, batch: KVBatchMeta, groups: list) -> torch.Tensor:
    """(B,) float32: `group_normalize` of r_visual over the rollouts of a prompt; 0 for padding.

    GDPO (arXiv 2601.05242) for a reward conditioned on another one, without its last step, the rescaling of the batch,
    which would let lambda_v change the size of the accuracy's part.

    As in verl's GRPO, the last output of a rollout stands for it, and its other outputs share its advantage
    (trainer/ppo/v1/utils.py:148 compute_advantage_for_multi_trajectories).

    Args:
        visual_B: r_visual, gated and shaped; 0 for wrong answers, which count in mean and standard deviation.
        groups: B ids of prompts (uid).
    """
    outputs: dict[str, list[int]] = {}  # Rows of a rollout: keys are {uid}_{session}_{output}.
    for row, (key, tag) in enumerate(zip(batch.keys, batch.tags, strict=True)):
        if not tag.get("is_padding", False):
            outputs.setdefault(key.rsplit("_", 1)[0], []).append(row)
    last = [max(rows, key=lambda row: int(batch.keys[row].rsplit("_", 1)[1])) for rows in outputs.values()]
    normalized = group_normalize(visual_B[last], group_index([groups[row] for row in last]))
    advantage_B = torch.zeros(len(batch.keys))
    for rows, value in zip(outputs.values(), normalized, strict=True):
        advantage_B[rows] = value
    return advantage_B


def add_to_advantages(batch: KVBatchMeta, advantage_B: torch.Tensor) -> None:
    """Add a number per rollout to `advantages` and `returns` of its response tokens, in the TransferQueue.

    `response_mask` is read after verl's advantage, which writes the mask of rejected tokens to it.
    """
    fields = ["advantages", "returns", "response_mask"]
    data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=fields)
    masks = list(data["response_mask"].unbind())
    added = {
        name: torch.nested.as_nested_tensor(
            [
                row_T + value * mask_T
                for row_T, mask_T, value in zip(data[name].unbind(), masks, advantage_B, strict=True)
            ],
            layout=torch.jagged,
        )
        for name in ("advantages", "returns")
    }
    tq.kv_batch_put(
        keys=batch.keys, partition_id=batch.partition_id, fields=TensorDict(added, batch_size=len(batch.keys))
    )
