# SPDX-License-Identifier: Apache-2.0
"""What the trainer does for the visual dependency: partners for swapped images, weights of tokens.

Shape suffixes: B = rollouts, T = response tokens
"""

import torch
import transfer_queue as tq
from tensordict import TensorDict
from tensordict.tensorclass import NonTensorStack
from transfer_queue import KVBatchMeta
from verl.workers.utils.padding import response_from_nested

from avar_verl.model.corrupt import first_rows, partners
from avar_verl.objectives.dependency import dependency_weights
from avar_verl.plugin.compat.verl.shared_features import read_features
from avar_verl.plugin.config import DEPENDENCY_OUTPUT, PARTITION, PARTNER


def choose_partners(batch: KVBatchMeta) -> None:
    """Write to every row PARTNER, the key of the rollout whose prompt's images replace its own in the corrupted pass.

    The choice is made among all prompts of the batch, so it does not depend on micro-batches or on the number of
    processes; the rollouts of a prompt share a partner. Only keys travel, and the engine fetches the features.

    Raises:
        ValueError: a prompt whose images are the only ones of their shape.
    """
    # Here, because the trainers are registered in every verl run, and this package switches the plugin on.
    from avar_verl.plugin.engine.inputs import prompt_rows, sample_features

    uids = list(tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=["uid"])["uid"])
    first = {uid: key for uid, key in zip(reversed(uids), reversed(batch.keys), strict=True)}
    data = tq.kv_batch_get(
        keys=list(first.values()), partition_id=batch.partition_id, select_fields=["multi_modal_inputs", "extra_fields"]
    )
    chosen = partners([*map(first_rows, read_features(sample_features(data)), prompt_rows(data))])
    keys = list(first.values())
    partner_of = {uid: "" if index is None else keys[index] for uid, index in zip(first, chosen, strict=True)}
    fields = TensorDict({PARTNER: NonTensorStack(*(partner_of[uid] for uid in uids))}, batch_size=len(batch))
    tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=fields)
    batch.extra_info[PARTITION] = batch.partition_id


def weigh_tokens(batch: KVBatchMeta) -> dict[str, float]:
    """Multiply `advantages` in the TransferQueue by the `dependency_weights` of each response; metrics.

    `avar/token_weights/zero`: share of the response tokens whose advantage becomes 0.
    """
    fields = ["advantages", "response_mask", DEPENDENCY_OUTPUT]
    data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=fields)
    mask = data["response_mask"]
    dependency = response_from_nested(data[DEPENDENCY_OUTPUT], mask)
    weighted, num_zero, num_tokens = [], 0, 0
    for advantage_T, dependency_T, mask_T in zip(
        data["advantages"].unbind(), dependency.unbind(), mask.unbind(), strict=True
    ):
        weights_T = dependency_weights(dependency_T[None], mask_T[None])[0]
        weighted.append(advantage_T * weights_T.to(advantage_T.dtype))
        num_zero += int((weights_T[mask_T.bool()] == 0).sum())
        num_tokens += int(mask_T.sum())
    advantages = torch.nested.as_nested_tensor(weighted, layout=torch.jagged)
    tq.kv_batch_put(
        keys=batch.keys,
        partition_id=batch.partition_id,
        fields=TensorDict({"advantages": advantages}, batch_size=len(batch)),
    )
    return {"avar/token_weights/zero": num_zero / num_tokens} if num_tokens else {}
