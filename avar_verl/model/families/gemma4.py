# SPDX-License-Identifier: Apache-2.0
"""Gemma 4. Five of six layers have a sliding window; the others have larger heads and, in 26B and 31B, K = V.

An image is a grid of tokens of its shape. In 26B and 31B (`use_bidirectional_attention="vision"`) tokens of one image
see each other in both directions in the layers with a window. In E2B and E4B late layers read the keys of an earlier
one: a gradient of their attention reaches the projections of that layer.
"""

from typing import Any

import torch

from avar_verl.model.family import Family
from avar_verl.model.regions import grid_places
from avar_verl.model.turns import TurnFormat

TURNS = TurnFormat(
    system=("<bos>", "<|turn>system"),
    user=("<|turn>user",),
    assistant=("<|turn>model",),
    other=("<|turn>",),
    header_tail=1,
    tokens=("<bos>", "<|turn>"),
    ends=("<turn|>",),
    trailing="\n",
)


def token_inputs(config, ids_BS: torch.Tensor, features: dict) -> dict[str, torch.Tensor]:
    """`mm_token_type_ids`, 1 on image tokens and 2 on those of videos; without it no image token sees a later one."""
    types_BS = (ids_BS == config.image_token_id).long() + 2 * (ids_BS == config.video_token_id).long()
    return {"mm_token_type_ids": types_BS}


def places(processor, features: dict, image_sizes: list | None) -> list[torch.Tensor]:
    """A whole image is one grid of squares of patches, whose positions are -1 on padding."""
    side = processor.image_processor.pooling_kernel_size
    out = []
    for columns, rows in (features["image_position_ids"].amax(1) + 1).tolist():
        out.append(grid_places(rows // side, columns // side))
    return out


def attends_both_ways(text_config) -> bool:
    """Whether tokens of one image see each other in both directions."""
    return getattr(text_config, "use_bidirectional_attention", None) is not None


def no_flash(text_config) -> str | None:
    """See `Family.no_flash`."""
    if attends_both_ways(text_config):
        return "its mask is causal, and tokens of one image see each other"
    size = max(text_config.head_dim, getattr(text_config, "global_head_dim", None) or 0)
    return (
        f"its heads have at most 256 dimensions, and those of layers without a window have {size}"
        if size > 256
        else None
    )


def keep_full_layers_causal(model: torch.nn.Module) -> None:
    """Where tokens of one image see each other, do so only in the layers with a window, as in the models' training.

    Transformers 5.9 lets them in all layers (models/gemma4/modeling_gemma4.py:2327, masking_utils.py:1505; later
    versions do not), vLLM as here (vllm/model_executor/models/gemma4_mm.py:1618): otherwise log-probabilities of
    rollouts and of the trained model would differ.
    """
    decoder: Any = model.get_submodule("model.language_model")
    if not attends_both_ways(decoder.config):
        return

    def hide_later(_decoder, args, kwargs):
        masks = kwargs["attention_mask"]
        mask = masks["full_attention"]
        if not isinstance(mask, torch.Tensor) or mask.dim() != 4:
            raise ValueError(
                "Gemma 4 with attention in both directions needs a mask of every pair of positions, of sdpa or eager "
                f"attention; got {type(mask).__name__} with attn_implementation="
                f"{decoder.config._attn_implementation!r}. Set attn_implementation=sdpa."
            )
        queries, keys = mask.shape[-2:]
        is_later = torch.ones(queries, keys, dtype=torch.bool, device=mask.device).triu(keys - queries + 1)
        hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        return args, {**kwargs, "attention_mask": {**masks, "full_attention": mask.masked_fill(is_later, hidden)}}

    decoder.register_forward_pre_hook(hide_later, with_kwargs=True)


FAMILY = Family(
    model_types=("gemma4",),
    turns=TURNS,
    system="`<bos>` and the system turn after it, if there is one",
    placeholders=("image_token_id", "video_token_id"),
    vision_tower="model.vision_tower",
    projectors=("model.embed_vision", "model.embed_audio"),
    other_towers=("model.audio_tower",),
    token_inputs=token_inputs,
    places=places,
    prepare=keep_full_layers_causal,
    no_flash=no_flash,
)
