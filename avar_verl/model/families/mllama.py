# SPDX-License-Identifier: Apache-2.0
"""Llama 3.2 Vision. Images are read in cross-attention layers, text in self-attention layers.

The softmax of a cross-attention layer has only image keys, so the image mass there is 1 and the system mass 0; in a
self-attention layer the image mass is 0. No softmax has both, so image mass over system mass is not defined, L_enhance
is a constant, and r_visual does not exist. `<|image|>` is an ordinary token of its turn: no feature replaces it.
"""

import torch

from avar_verl.model.family import Family
from avar_verl.model.turns import LLAMA3


def token_inputs(config, ids_BS: torch.Tensor, features: dict) -> dict[str, torch.Tensor]:
    """`cross_attention_mask` (B, S, images, tiles): who sees which image, as MllamaProcessor makes it."""
    if "aspect_ratio_mask" not in features:
        return {}
    from transformers.models.mllama.processing_mllama import (
        convert_sparse_cross_attention_mask_to_dense,
        get_cross_attention_token_mask,
    )

    num_images, num_tiles = features["aspect_ratio_mask"].shape[1:]
    seen = [get_cross_attention_token_mask(ids_S.tolist(), config.image_token_index) for ids_S in ids_BS]
    # This hides tiles that an image does not have; `aspect_ratio_mask` hides them in the vision tower.
    tiles = features["aspect_ratio_mask"].sum(-1).tolist()
    mask = convert_sparse_cross_attention_mask_to_dense(seen, tiles, num_tiles, ids_BS.shape[1])
    mask = torch.from_numpy(mask).to(ids_BS.device)
    return {"cross_attention_mask": torch.nn.functional.pad(mask, (0, 0, 0, num_images - mask.shape[2]))}


def fill_text_only(like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Features of a sample without an image: one black image that no token sees."""
    features = {key: torch.zeros_like(value[:1, :1]) for key, value in like.items()}
    # As the image processor does for images that a sample does not have: without any tile, the tower would have no
    # keys.
    features["aspect_ratio_mask"][..., 0] = 1
    return features


def hide_images_from_rows_without(model: torch.nn.Module) -> None:
    """Make a token that sees no image read nothing from images, as in the model's reference implementation.

    Transformers unmasks the row of such a token (models/mllama/modeling_mllama.py:73 in 5.9.0) and multiplies what the
    MLP adds by 0, but not what the attention adds. So tokens before an image, and samples without images in a batch
    with images, read the mean of all images that the batch is padded to, and the result for a sample depends on its
    batch.
    """
    from transformers.models.mllama.modeling_mllama import MllamaCrossAttentionDecoderLayer

    for layer in model.modules():
        if not isinstance(layer, MllamaCrossAttentionDecoderLayer):
            continue
        rows = {}

        def remember(_layer, _args, kwargs, rows=rows):
            rows["mask"] = kwargs["full_text_row_masked_out_mask"]

        def mask(_attention, _args, output, rows=rows):
            return output if rows["mask"] is None else (output[0] * rows["mask"][:, 0], *output[1:])

        layer.register_forward_pre_hook(remember, with_kwargs=True)
        layer.cross_attn.register_forward_hook(mask)


FAMILY = Family(
    model_types=("mllama",),
    turns=LLAMA3,
    system="`<|begin_of_text|>` and the system turn after it, if there is one",
    placeholders=(),
    vision_tower="model.vision_model",
    projectors=("model.multi_modal_projector",),
    cross_attention=True,
    token_inputs=token_inputs,
    fill_text_only=fill_text_only,
    prepare=hide_images_from_rows_without,
    unpackable="a cross-attention layer would show every image to every sample",
)
