# SPDX-License-Identifier: Apache-2.0
"""The formula of the intervention on the full matrix of logits, as an attention function of its own.

Shape suffixes: B = samples, S = positions, H = query heads, K = key/value heads, D = head size
"""

from contextlib import contextmanager

import torch
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.modeling_utils import AttentionInterface

from avar_verl.attention.capture import find_decoder
from avar_verl.intervention.spec import InterventionSpec
from avar_verl.model.layers import full_softmax_layers
from avar_verl.roles import TokenRole

NAME = "avar_reference"
_now: dict = {}


def _attention(module, query_BHSD, key_BKSD, value_BKSD, attention_mask, scaling=None, **kwargs):
    """softmax(Z + alpha_img * M_img (*) Z - alpha_sys * M_sys (*) Z + mask) v."""
    shared = query_BHSD.shape[1] // key_BKSD.shape[1]
    key_BHSD, value_BHSD = (x.repeat_interleave(shared, dim=1) for x in (key_BKSD, value_BKSD))
    scale = query_BHSD.shape[-1] ** -0.5 if scaling is None else scaling
    logits_BHSS = scale * query_BHSD @ key_BHSD.transpose(2, 3)
    spec, roles_BS = _now["spec"], _now["roles"]
    layers = full_softmax_layers(module.config) if spec.layers is None else spec.layers
    if module.layer_idx in layers:
        heads_H = torch.zeros(query_BHSD.shape[1])
        heads_H[list(range(len(heads_H)) if spec.heads is None else spec.heads)] = 1
        chosen_1H11 = heads_H[None, :, None, None]
        enhanced = chosen_1H11 * (roles_BS == TokenRole.IMAGE)[:, None, None]
        suppressed = chosen_1H11 * (roles_BS == TokenRole.SYSTEM)[:, None, None]
        logits_BHSS = logits_BHSS + spec.alpha_img * enhanced * logits_BHSS - spec.alpha_sys * suppressed * logits_BHSS
    if attention_mask is not None:
        logits_BHSS = logits_BHSS + attention_mask[..., : key_BHSD.shape[2]]
    weights_BHSS = logits_BHSS.softmax(-1)
    _now["weights"].append(weights_BHSS.detach())
    return (weights_BHSS @ value_BHSD).transpose(1, 2).contiguous(), weights_BHSS


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, eager_mask)


@contextmanager
def attention_of(model, name: str):
    """The decoder runs with the attention function `name`; the vision tower keeps its own."""
    config = find_decoder(model).config
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


@torch.no_grad()
def reference(model, inputs, roles_BS, spec) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (B, S, V) of one pass without a cache, and its attention weights (B, L, H, S, S)."""
    _now.update(spec=InterventionSpec.of(spec), roles=roles_BS, weights=[])
    with attention_of(model, NAME):
        logits_BSV = model(**inputs, use_cache=False).logits
    return logits_BSV, torch.stack(_now["weights"], dim=1)
