# SPDX-License-Identifier: Apache-2.0
"""LFM2-VL. Most layers are short convolutions, which have no softmax; ChatML behind a BOS."""

import dataclasses

from avar_verl.model.family import Family
from avar_verl.model.turns import CHATML

TURNS = dataclasses.replace(
    CHATML, system=("<|startoftext|>", "<|im_start|>system"), tokens=("<|startoftext|>", "<|im_start|>")
)

FAMILY = Family(
    model_types=("lfm2_vl",),
    turns=TURNS,
    system="`<|startoftext|>` and the system turn after it, if there is one",
    placeholders=("image_token_id",),
    vision_tower="model.vision_tower",
    projectors=("model.multi_modal_projector",),
    leaks_packed=True,
    unpackable="a short convolution would mix the first tokens of a sample with the last ones of the sample before",
)
