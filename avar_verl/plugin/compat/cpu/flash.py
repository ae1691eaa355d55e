# SPDX-License-Identifier: Apache-2.0
"""verl's packed attention of Qwen2.5-VL on the CPU.

With `use_remove_padding=True` or Ulysses sequence parallelism verl replaces the attention of Qwen2-VL and Qwen2.5-VL by
`qwen2_vl_attn_forward` (verl/models/transformers/qwen2_vl.py:268), which calls flash-attn. Without that package the
module lacks `flash_attn_varlen_func` (:46) and three flags beside it, transformers' `_flash_attention_forward` does not
run, and float32 queries, keys and values are cast to bfloat16 (`fa_peft_integration_check`, :210), which flash-attn
wants and the float32 output projection refuses. Here both functions are built from torch's
scaled_dot_product_attention, one call a segment, in the type of their inputs.

Shape suffixes: B = rows, S = positions, T = positions of all segments, H = heads (keys are repeated), D = head size
"""

import torch


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False
):
    """Attention inside every segment of packed (T, H, D) tensors; (T, H, D).

    Raises:
        ValueError: queries and keys of different segments.
    """
    bounds = cu_seqlens_q.tolist()
    if bounds != cu_seqlens_k.tolist():
        raise ValueError(
            f"packed attention on the CPU needs the same segments for queries and keys; got {bounds} and "
            f"{cu_seqlens_k.tolist()}. Run without a key/value cache."
        )
    out = []
    for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
        q_HSD, k_HSD, v_HSD = (x[start:stop].transpose(0, 1) for x in (q, k, v))
        out_HSD = torch.nn.functional.scaled_dot_product_attention(
            q_HSD[None], k_HSD[None], v_HSD[None], dropout_p=dropout_p, is_causal=causal, scale=softmax_scale
        )
        out.append(out_HSD[0].transpose(0, 1))
    return torch.cat(out)


def flash_attention_forward(
    query_states,
    key_states,
    value_states,
    attention_mask,
    query_length,
    is_causal,
    dropout=0.0,
    softmax_scale=None,
    sliding_window=None,
    use_top_left_mask=False,
    deterministic=None,
    **kwargs,
):
    """Attention over whole rows, (B, S, H, D) in and out.

    Raises:
        ValueError: a padding mask or a sliding window, which verl does not pass here.
    """
    if attention_mask is not None or (sliding_window is not None and key_states.shape[1] > sliding_window):
        raise ValueError(
            "packed attention on the CPU takes no padding mask and no sliding window; got attention_mask="
            f"{None if attention_mask is None else tuple(attention_mask.shape)}, sliding_window={sliding_window}. "
            "Set model.use_remove_padding=False."
        )
    q_BHSD, k_BHSD, v_BHSD = (x.transpose(1, 2) for x in (query_states, key_states, value_states))
    out_BHSD = torch.nn.functional.scaled_dot_product_attention(
        q_BHSD, k_BHSD, v_BHSD, dropout_p=dropout, is_causal=is_causal, scale=softmax_scale
    )
    return out_BHSD.transpose(1, 2)


def keep_dtype(query_states, key_states, value_states, target_dtype=None):
    """`fa_peft_integration_check` where float32 is as good as any type."""
    return query_states, key_states, value_states


def apply(qwen2_vl) -> None:
    """Fill in what `verl.models.transformers.qwen2_vl` lacks without flash-attn."""
    qwen2_vl.flash_attn_varlen_func = flash_attn_varlen_func
    qwen2_vl._flash_attention_forward = flash_attention_forward
    qwen2_vl.fa_peft_integration_check = keep_dtype
    qwen2_vl._flash_supports_window_size = False
    qwen2_vl._flash_supports_deterministic = False
    qwen2_vl._flash_use_top_left_mask = False
