# SPDX-License-Identifier: Apache-2.0
"""A copy of the policy that stays what it was.

separate_async keeps the weights of the last synchronisation with `fsdp2_sharded_save_to_cpu`, which moves every shard
to the CPU (verl/utils/fsdp_utils.py:1184). Where they are there already, that copies nothing: the saved policy is the
one that is trained on, and old_log_probs of all mini-batches but the first are the current policy's.
"""

from types import ModuleType

import wrapt


def _cloned(wrapped, _instance, args, kwargs):
    state, spec = wrapped(*args, **kwargs)
    return {name: (tensor.clone(), own) for name, (tensor, own) in state.items()}, spec


def apply(fsdp_utils: ModuleType) -> None:
    """Patch `verl.utils.fsdp_utils`."""
    wrapt.wrap_function_wrapper(fsdp_utils, "fsdp2_sharded_save_to_cpu", _cloned)
