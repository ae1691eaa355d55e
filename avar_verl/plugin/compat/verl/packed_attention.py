# SPDX-License-Identifier: Apache-2.0
"""Capture in verl's packed attention of Qwen2-VL and Qwen2.5-VL.

`qwen2_vl_attn_forward` (verl/models/transformers/qwen2_vl.py:268) calls flash-attn itself instead of transformers'
attention interface and drops the keyword arguments of its caller, the capture among them. So three functions of that
module are wrapped: the attention forward takes the capture out of its keyword arguments, and the two attention kernels
below it show it q and k, after the rotary embedding and, under Ulysses, after the exchange: the whole sequence, with
this rank's share of the heads.

Shape suffixes: B = rows, T = packed positions, H = query heads of this rank, D = head size
"""

import functools
from contextvars import ContextVar

from avar_verl.attention.capture import KWARG
from avar_verl.attention.lse_mass import LseTap

_CURRENT = ContextVar("avar_capture", default=None)


def wrap_attention(original):
    """`qwen2_vl_attn_forward` that announces the capture among its keyword arguments to the kernels below."""

    @functools.wraps(original)
    def attention_forward(self, *args, **kwargs):
        forward = kwargs.pop(KWARG, None)
        if forward is None:
            return original(self, *args, **kwargs)
        token = _CURRENT.set((forward, self))
        try:
            return original(self, *args, **kwargs)
        finally:
            _CURRENT.reset(token)

    return attention_forward


def _observed(run, query_THD, key_THD, cu_seqlens, window, scale):
    """`run()`, the kernel; q and k go to the capture, behind it with its log-sum-exp if that is wanted, else before."""
    current = _CURRENT.get()
    if current is None:
        return run()
    forward, module = current
    if forward.wants_lse(module.layer_idx, query_THD):
        with LseTap() as tap:
            out = run()
        _observe(forward, module, query_THD, key_THD, cu_seqlens, window, scale, tap)
        return out
    _observe(forward, module, query_THD, key_THD, cu_seqlens, window, scale, None)
    return run()


def _observe(forward, module, query_THD, key_THD, cu_seqlens, window, scale, tap) -> None:
    # verl repeats the key heads (repeat_kv). A rank holds whole groups of them, or a part of one group each.
    groups = module.num_key_value_groups
    if query_THD.shape[1] % groups == 0:
        key_THD = key_THD[:, ::groups]
    arguments = {"sliding_window": window, "scaling": scale}
    forward.observe_packed(module, query_THD, key_THD, cu_seqlens, arguments, tap)


def wrap_varlen(original):
    """`flash_attn_varlen_func` that shows its packed q and k to the capture."""

    @functools.wraps(original)
    def varlen(*args, **kwargs):
        left, _ = kwargs.get("window_size", (-1, -1))
        window = left + 1 if left >= 0 else None
        scale = kwargs.get("softmax_scale")
        return _observed(
            lambda: original(*args, **kwargs), kwargs["q"], kwargs["k"], kwargs["cu_seqlens_q"], window, scale
        )

    return varlen


def wrap_flash(original):
    """`_flash_attention_forward` that shows its q and k, one row that is one segment, to the capture."""

    @functools.wraps(original)
    def flash(query_states, key_states, *args, **kwargs):
        if _CURRENT.get() is not None and query_states.shape[0] != 1:
            raise ValueError(
                f"packed attention has one row; got {query_states.shape[0]}. Set model.use_remove_padding=True, "
                "or load the model without verl's patch."
            )
        return _observed(
            lambda: original(query_states, key_states, *args, **kwargs),
            query_states[0],
            key_states[0],
            None,
            kwargs.get("sliding_window"),
            kwargs.get("softmax_scale"),
        )

    return flash


def apply(qwen2_vl) -> None:
    """Wrap the functions of `verl.models.transformers.qwen2_vl`."""
    qwen2_vl.qwen2_vl_attn_forward = wrap_attention(qwen2_vl.qwen2_vl_attn_forward)
    # Imported by that module, from transformers and flash-attn; elsewhere they stay.
    qwen2_vl._flash_attention_forward = wrap_flash(qwen2_vl._flash_attention_forward)
    # Missing on a machine without flash-attn, where verl's packed attention cannot run.
    if hasattr(qwen2_vl, "flash_attn_varlen_func"):
        qwen2_vl.flash_attn_varlen_func = wrap_varlen(qwen2_vl.flash_attn_varlen_func)
