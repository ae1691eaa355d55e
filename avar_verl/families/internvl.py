# SPDX-License-Identifier: Apache-2.0
"""InternVL in its Hugging Face form (InternVL2.5-hf, InternVL3-hf, InternVL3.5-HF).

An image is cut into square tiles of a canvas that fits its shape, and, when there are several, a thumbnail of the whole
image follows. `<img>` and `</img>` around the placeholders keep the role of their turn.
"""

from avar_verl.families.family import Family
from avar_verl.families.turns import CHATML

FAMILY = Family(
    model_types=("internvl",),
    turns=CHATML,
    system="the system turn; the chat template writes none of its own, so give every prompt one",
    placeholders=("image_token_id",),
    vision_tower="model.vision_tower",
    projectors=("model.multi_modal_projector",),
)
