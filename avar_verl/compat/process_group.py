# SPDX-License-Identifier: Apache-2.0
"""gloo as the only process-group backend on the CPU.

verl builds the backend string "cpu:gloo,<device>:<backend>" (verl/utils/distributed.py:63 and :89). On the CPU that is
"cpu:gloo,cpu:gloo", which torch refuses as a duplicate device. Neither function has a parameter or a platform hook for
it, so `torch.distributed.init_process_group` is wrapped, in processes where the CPU platform is active, to read exactly
this string as "gloo".
"""

import functools

import torch.distributed

DUPLICATE = "cpu:gloo,cpu:gloo"


def apply() -> None:
    """Wrap `torch.distributed.init_process_group`. Applying it twice wraps once."""
    original = torch.distributed.init_process_group
    if getattr(original, "_avar_cpu", False):
        return

    @functools.wraps(original)
    def init_process_group(backend=None, *args, **kwargs):
        return original("gloo" if backend == DUPLICATE else backend, *args, **kwargs)

    init_process_group._avar_cpu = True
    torch.distributed.init_process_group = init_process_group
