# SPDX-License-Identifier: Apache-2.0
"""The intervention in a transformers model, with any attention backend.

As in `attention.capture`, the attention function in use is registered again under its own name with a wrapper around
it, and the state of a forward pass is passed as a keyword argument from the decoder to its attention layers. The
wrapper scales the keys that attention reads, so a key/value cache holds the model's own keys: it can be filled inside
the block and read outside, or vice versa. All kinds of cache work the same way, because the factor of a key depends
only on its position.

A `capture_mass` inside or around the block sees the scaled keys.

Relies on: what `attention.capture` relies on; caches that hand attention their keys in the order of positions, from
position 0 on, or, with a sliding window, the last ones (transformers 5.9.0, cache_utils.py `DynamicLayer.update`,
`DynamicSlidingWindowLayer.update`, `StaticLayer.update`, `StaticSlidingWindowLayer.update`).

Shape suffixes:
    B = samples, S = positions, P = positions whose role is known, T = keys that attention reads, K = key/value heads,
    D = head size, R = token roles
"""

from collections.abc import Callable, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from avar_verl.attention import capture
from avar_verl.attention.capture import find_decoder
from avar_verl.intervention.spec import InterventionSpec, scale_keys
from avar_verl.model.layers import key_value_heads, layer_kinds
from avar_verl.model.roles import RoleMap

KWARG = "avar_intervention"


class _Scaling:
    """The key factors of one forward pass of the decoder.

    A plain class: FSDP rebuilds dataclasses and tuples among the keyword arguments, and this must stay one object.
    """

    def __init__(self, layers: tuple[int, ...], factors_BKP: torch.Tensor, num_seen: int):
        self.layers = layers
        self.factors_BKP = factors_BKP
        self.num_seen = num_seen  # Positions so far, including those of this pass.
        self.scaled: set[int] = set()

    def scale(self, module, key_BKTD: torch.Tensor) -> torch.Tensor:
        """The keys of one layer; positions without a role are response tokens."""
        layer = module.layer_idx
        if layer not in self.layers:
            return key_BKTD
        self.scaled.add(layer)
        batch, num_keys = key_BKTD.shape[0], key_BKTD.shape[2]
        if batch != self.factors_BKP.shape[0]:
            raise ValueError(
                f"roles must have one row for every row of the batch; got {self.factors_BKP.shape[0]} for {batch}. "
                "With beams or several sequences a prompt, repeat each row of roles as often, or use "
                "avar_verl.intervention.transformers_hook.generate."
            )
        # A static cache has free space after the last position; a sliding window has only the last keys.
        first = max(0, self.num_seen - num_keys)
        if first and getattr(module, "sliding_window", None) is None:
            raise ValueError(
                f"attention without a window must read every key so far; got {num_keys} of {self.num_seen} in layer "
                f"{layer}. Use a dynamic or static cache."
            )
        known_BKT = self.factors_BKP[:, :, first : first + num_keys]
        factors_BKT = torch.nn.functional.pad(known_BKT, (0, num_keys - known_BKT.shape[2]), value=1.0)
        return scale_keys(key_BKTD, factors_BKT[..., None])


def _wrap(name: str) -> None:
    """Register the attention function `name` again with the scaling around it. Idempotent."""
    capture._wrap(name)
    inner = ALL_ATTENTION_FUNCTIONS[name]
    if getattr(inner, "_avar_intervention", False):
        return

    def attention(module, query, key, value, attention_mask, *args, **kwargs):
        scaling = kwargs.pop(KWARG, None)
        if scaling is not None:
            key = scaling.scale(module, key)
        return inner(module, query, key, value, attention_mask, *args, **kwargs)

    attention._avar_intervention = True
    # The capture's wrapper is inside this one. If it were also outside, it would see unscaled keys.
    attention._avar_capture = True
    AttentionInterface.register(name, attention)


def check_decoder(decoder: Any) -> None:
    """Refuse models in which rescaling keys would not rescale logits.

    Raises:
        ValueError: cross-attention layers, or paged attention.
    """
    if "cross_attention" in layer_kinds(decoder.config):
        raise ValueError(
            "the intervention weighs image keys against other keys of the same softmax; got cross-attention layers "
            "(Llama 3.2 Vision), whose softmax has only image keys, and self-attention layers without any. Use a "
            "model that reads images in its self-attention."
        )
    if "paged" in decoder.config._attn_implementation:
        raise ValueError(
            f"the intervention needs the keys of whole samples; got "
            f"attn_implementation={decoder.config._attn_implementation!r}. Generate without continuous batching."
        )


@contextmanager
def intervene(model: torch.nn.Module, roles: torch.Tensor | RoleMap, spec: InterventionSpec | str):
    """Run a model under an intervention: forward passes, with or without a key/value cache, and `model.generate`.

    Args:
        model: a transformers vision-language model with self-attention over image tokens, bare or wrapped.
        roles: (B, P) `TokenRole` of the first P positions of every row, padding included; later positions are response
            tokens, which are never scaled. Or a `RoleMap`, which reads the `input_ids` and the `attention_mask` of
            every pass that starts a sequence: all positions get the role of their ids.
        spec: what to change. With alpha_img = alpha_sys = 0 the outputs are bit-identical.

    Raises:
        ValueError: layers or heads that the model does not have or that cannot be selected, or anything that
            `check_decoder` refuses; in a forward pass, roles of another batch, a cache that drops keys, or an attention
            that bypasses transformers' attention interface.

    >>> with intervene(model, role_map, "alpha_img=0.15,alpha_sys=0.4"):  # doctest: +SKIP
    ...     ids = model.generate(**inputs)
    """
    spec = InterventionSpec.of(spec)
    decoder: Any = find_decoder(model)
    check_decoder(decoder)
    config = decoder.config
    layers = spec.chosen_layers(config)
    factors_KR = spec.key_factors(config.num_attention_heads, key_value_heads(config, layers))
    if spec.is_identity:
        yield
        return
    _wrap(config._attn_implementation)
    factors_of: dict[str, torch.Tensor] = {}

    def keep(roles_BP: torch.Tensor) -> None:
        factors_of["prompt"] = factors_KR.to(roles_BP.device)[:, roles_BP].transpose(0, 1)

    def read_roles(_module, args, kwargs):
        past = kwargs.get("past_key_values")
        if past is not None and int(past.get_seq_length()) > 0:
            return
        ids_BS = kwargs.get("input_ids", args[0] if args else None)
        if ids_BS is None:
            raise ValueError(
                "a RoleMap reads roles from input_ids; got a pass without them. Pass roles as a tensor instead."
            )
        mask = kwargs.get("attention_mask")
        if mask is not None and not (isinstance(mask, torch.Tensor) and mask.dim() == 2):
            raise ValueError(
                f"a RoleMap reads padding from a (B, S) attention_mask; got {type(mask).__name__}. Pass roles as a "
                "tensor instead."
            )
        keep(roles(ids_BS, mask))  # pyright: ignore[reportCallIssue]  A RoleMap, see below.

    scalings: list[_Scaling] = []

    def attach(_module, args, kwargs):
        if not factors_of:
            raise ValueError(
                "a RoleMap reads roles from a pass that starts a sequence; got one that goes on from a filled cache. "
                "Pass roles as a tensor instead."
            )
        states = kwargs.get("inputs_embeds", kwargs.get("input_ids", args[0] if args else None))
        past = kwargs.get("past_key_values")
        num_seen = states.shape[1] + (int(past.get_seq_length()) if past is not None else 0)
        scalings.append(_Scaling(layers, factors_of["prompt"], num_seen))
        return args, {**kwargs, KWARG: scalings[-1]}

    def check(_module, _args, _output):
        missing = sorted(set(layers) - scalings.pop().scaled)
        if missing:
            raise ValueError(
                f"every chosen layer must call transformers' attention interface; layers {missing} did not "
                f"(attn_implementation={config._attn_implementation!r}). An attention that is patched to bypass it "
                "cannot be intervened in."
            )

    handles = [
        decoder.register_forward_pre_hook(attach, with_kwargs=True),
        decoder.register_forward_hook(check),
    ]
    if isinstance(roles, RoleMap):
        handles.append(model.register_forward_pre_hook(read_roles, with_kwargs=True))
    else:
        keep(roles)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def generate(
    model: Any,
    roles: torch.Tensor | Callable[..., torch.Tensor],
    spec: InterventionSpec | str,
    inputs: Mapping[str, Any],
    **kwargs: Any,
) -> torch.Tensor:
    """`model.generate(**inputs, **kwargs)` under an intervention, including beams and several sequences per prompt.

    Args:
        roles: (B, P) `TokenRole` of the prompts, or a `RoleMap`.
        inputs: outputs of the processor; batches must be padded on the left.

    Raises:
        ValueError: anything that `intervene` refuses.
    """
    if not isinstance(roles, torch.Tensor):
        roles = roles(inputs["input_ids"], inputs.get("attention_mask"))
    settings = kwargs.get("generation_config") or model.generation_config
    counts = [kwargs.get(name) or getattr(settings, name) or 1 for name in ("num_beams", "num_return_sequences")]
    with intervene(model, roles.repeat_interleave(max(counts), dim=0), spec):
        return model.generate(**inputs, **kwargs)
