# SPDX-License-Identifier: Apache-2.0
"""Which layers of a decoder have a full softmax over system and image keys, read off its config.

These layers are the default of everything that selects layers: capture, guidance, reward, VAS, doctor, intervention.
"""

from collections.abc import Sequence
from typing import Any

# Names in `layer_types` (transformers' configuration_utils.py, ALLOWED_LAYER_TYPES) of layers in which a query sees
# every key before it.
FULL = ("full_attention", "attention")
# A query sees the last keys only: in a long response neither the system turn nor the image.
WINDOWED = {
    "sliding_attention": ("a sliding window", "sliding_window"),
    "chunked_attention": ("attention within chunks", "attention_chunk_size"),
}
WITHOUT_SOFTMAX = {
    "linear_attention": "linear attention (gated DeltaNet and its like), which has no softmax",
    "conv": "a short convolution, which has no softmax",
    "mamba": "a state space, which has no softmax",
    "cross_attention": "cross-attention, whose softmax has only image keys",
}
# Text models whose softmax has a learned logit beside those of the keys.
SINKS = ("gpt_oss",)


def layer_kinds(text_config: Any) -> list[str]:
    """For every layer its name in `layer_types`, or "cross_attention"."""
    count = text_config.num_hidden_layers
    kinds: list[str] = list(getattr(text_config, "layer_types", None) or ())
    if not kinds:  # Mistral and its like have a window in every layer, or in none.
        windowed = getattr(text_config, "sliding_window", None) is not None
        kinds = ["sliding_attention" if windowed else "full_attention"] * count
    for layer in getattr(text_config, "cross_attention_layers", None) or ():
        kinds[layer] = "cross_attention"
    return kinds


def refused_layers(text_config: Any, windowed: bool = False) -> dict[int, str]:
    """Layers without a plain softmax over all keys before the query, each with the reason.

    Args:
        windowed: let layers pass that see the last keys only.
    """
    cap = getattr(text_config, "attn_logit_softcapping", None)
    refused = {}
    for layer, kind in enumerate(layer_kinds(text_config)):
        if kind in WINDOWED:
            if not windowed:
                what, field = WINDOWED[kind]
                refused[layer] = f"{what} of {getattr(text_config, field, None)} tokens"
        elif kind not in FULL:
            refused[layer] = WITHOUT_SOFTMAX.get(kind, f"{kind!r}, a kind of layer that is not known here")
        if layer not in refused and cap is not None:
            refused[layer] = f"logits that are capped at {cap}"
        if layer not in refused and getattr(text_config, "model_type", None) in SINKS:
            refused[layer] = "attention sinks, a learned logit that belongs to no key"
    return refused


def full_softmax_layers(text_config: Any) -> tuple[int, ...]:
    """Ascending layers with a full softmax over system and image keys; () if there are none."""
    refused = refused_layers(text_config)
    return tuple(layer for layer in range(text_config.num_hidden_layers) if layer not in refused)


def select_layers(text_config: Any, layers: Sequence[int] | None, windowed: bool = False) -> tuple[int, ...]:
    """Ascending indices of a selection of layers; None selects `full_softmax_layers`.

    Args:
        layers: negative indices count from the end.
        windowed: layers that see the last keys only may be named.

    Raises:
        ValueError: from `resolve_indices`, or a layer that is refused, with the reason and the layers that are not.
    """
    full = full_softmax_layers(text_config)
    refused = refused_layers(text_config, windowed)
    chosen = full if layers is None else resolve_indices("layers", layers, text_config.num_hidden_layers)
    wrong: dict[str, list[int]] = {}
    for layer in chosen if chosen else refused:
        if layer in refused:
            wrong.setdefault(refused[layer], []).append(layer)
    if wrong:
        got = "; ".join(f"{reason} in layers {numbers}" for reason, numbers in wrong.items())
        todo = f"Select some of {list(full)}, or null for all of these." if full else "Use another model."
        raise ValueError(
            f"layers must have a softmax in which a response sees the system turn and the image; got {got}. {todo}"
        )
    return chosen


def head_size(text_config: Any, layers: Sequence[int]) -> int:
    """The largest size of a query or key in these layers.

    A head may be larger in layers without a window (Gemma 4, `global_head_dim`), or have parts with and without
    rotation (multi-head latent attention).
    """
    kinds = layer_kinds(text_config)
    latent = getattr(text_config, "qk_nope_head_dim", None)
    size = getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
    if latent is not None:
        size = latent + text_config.qk_rope_head_dim
    full = getattr(text_config, "global_head_dim", None) or size
    return max(full if kinds[layer] in FULL else size for layer in layers)


def key_value_heads(text_config: Any, layers: Sequence[int]) -> int:
    """The number of key/value heads in these layers. Layers without a window may have fewer (Gemma 4 with K = V).

    Raises:
        ValueError: layers with different numbers.
    """
    kinds = layer_kinds(text_config)
    common = text_config.num_key_value_heads
    full = text_config.num_global_key_value_heads if getattr(text_config, "attention_k_eq_v", False) else common
    counts = {layer: full if kinds[layer] in FULL else common for layer in layers}
    if len(set(counts.values())) > 1:
        raise ValueError(
            f"layers must have one number of key/value heads; got {counts} by layer. Select layers of one kind."
        )
    return next(iter(counts.values()), common)


def resolve_indices(name: str, indices: Sequence[int] | None, count: int) -> tuple[int, ...]:
    """Ascending indices of a selection among `count` layers or heads; None selects all, negative indices count from the
    end.

    Raises:
        ValueError: an empty selection, or an index that is out of range or repeated.
    """
    if indices is None:
        return tuple(range(count))
    resolved = sorted(index + count if index < 0 else index for index in indices)
    if not resolved or len(set(resolved)) != len(resolved) or resolved[0] < 0 or resolved[-1] >= count:
        raise ValueError(
            f"{name} must be distinct indices among the {count} that the decoder has; got {list(indices)}. "
            "Use null for all of them."
        )
    return tuple(resolved)
