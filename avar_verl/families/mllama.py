# SPDX-License-Identifier: Apache-2.0
"""Llama 3.2 Vision. Images are read in cross-attention layers, text in self-attention layers.

A softmax of a cross-attention layer has image keys alone, so the image mass there is 1 for every token behind an image
and 0 before it, and the system mass is 0; in a self-attention layer it is the other way round. No softmax has both, so
image mass over system mass is not defined, L_enhance is a constant, and r_visual does not exist. `<|image|>` is a token
of its turn: no feature replaces it.
"""

from avar_verl.families.family import Family
from avar_verl.families.turns import LLAMA3

FAMILY = Family(
    model_types=("mllama",),
    turns=LLAMA3,
    system="`<|begin_of_text|>` and the system turn behind it, if there is one",
    placeholders=(),
    vision_tower="model.vision_model",
    projectors=("model.multi_modal_projector",),
    cross_attention=True,
)
