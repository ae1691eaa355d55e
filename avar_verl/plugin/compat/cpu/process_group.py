# SPDX-License-Identifier: Apache-2.0
"""gloo as the only process-group backend on the CPU.

verl builds the backend string "cpu:gloo,<device>:<backend>" (verl/utils/distributed.py:63 and :89). On the CPU that is
"cpu:gloo,cpu:gloo", which torch refuses as a duplicate device. Neither function has a parameter or a platform hook for
it, so `torch.distributed.init_process_group` is wrapped, in processes where the CPU platform is active, to read exactly
this string as "gloo".

gloo also has no `all_to_all` over a list of tensors, which verl's Ulysses sequence parallelism uses
(verl/utils/ulysses.py:144). It has `all_to_all_single`, which does the same for tensors of one shape.
"""

import functools

import torch.distributed

DUPLICATE = "cpu:gloo,cpu:gloo"


def all_to_all(output_tensor_list, input_tensor_list, group=None, async_op=False):
    """`torch.distributed.all_to_all` for tensors of one shape.

    Raises:
        ValueError: several shapes, or an asynchronous call.
    """
    shapes = {tuple(tensor.shape) for tensor in (*output_tensor_list, *input_tensor_list)}
    if len(shapes) != 1 or async_op:
        raise ValueError(
            f"all_to_all on gloo takes tensors of one shape and waits for them; got shapes {sorted(shapes)}, "
            f"async_op={async_op}. Pad the tensors."
        )
    received = torch.empty_like(torch.stack(output_tensor_list))
    torch.distributed.all_to_all_single(received, torch.stack(input_tensor_list), group=group)
    for output, tensor in zip(output_tensor_list, received.unbind(), strict=True):
        output.copy_(tensor)


def apply() -> None:
    """Wrap `torch.distributed.init_process_group` and replace `all_to_all`. Applying it twice applies it once."""
    original = torch.distributed.init_process_group
    if getattr(original, "_avar_cpu", False):
        return
    torch.distributed.all_to_all = all_to_all

    @functools.wraps(original)
    def init_process_group(backend=None, *args, **kwargs):
        return original("gloo" if backend == DUPLICATE else backend, *args, **kwargs)

    init_process_group._avar_cpu = True
    torch.distributed.init_process_group = init_process_group
