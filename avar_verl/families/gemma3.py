# SPDX-License-Identifier: Apache-2.0
"""Gemma 3. An image is 256 tokens of a square; image tokens of one image see each other in both directions.

The chat template folds the system message into the first user turn, where no id tells the two apart. So the text of a
system message is USER, and SYSTEM is `<bos>`, the attention sink before the first turn.
"""

from avar_verl.families.family import Family
from avar_verl.families.turns import TurnFormat

TURNS = TurnFormat(
    system=("<bos>",),
    user=("<start_of_turn>user",),
    assistant=("<start_of_turn>model",),
    other=("<start_of_turn>",),
    header_tail=1,
    tokens=("<bos>", "<start_of_turn>"),
    ends=("<end_of_turn>",),
    trailing="\n",
)


FAMILY = Family(
    model_types=("gemma3",),
    turns=TURNS,
    system="`<bos>`, the attention sink; a system message is part of the first user turn",
    placeholders=("image_token_id",),
    vision_tower="model.vision_tower",
    projectors=("model.multi_modal_projector",),
)
