# SPDX-License-Identifier: Apache-2.0
"""GLM-4.1V: `<|user|>` and similar tokens open turns, and no token closes them.

A response ends where the next turn opens; the model stops by writing `<|user|>` or `<|endoftext|>`. After the last
response, the chat template writes neither.
"""

from avar_verl.model.families.grid import grid_thw_places
from avar_verl.model.family import Family
from avar_verl.model.turns import TurnFormat

TURNS = TurnFormat(
    system=("[gMASK]", "<|system|>"),
    user=("<|user|>",),
    assistant=("<|assistant|>",),
    other=("<|observation|>",),
    header_tail=1,
    tokens=("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    ends=("<|endoftext|>",),
)

FAMILY = Family(
    model_types=("glm4v",),
    turns=TURNS,
    system="`[gMASK]<sop>` and the system turn after it, if there is one",
    placeholders=("image_token_id", "video_token_id"),
    vision_tower="model.visual",
    projectors=("model.visual.merger",),
    coordinates="relative_1000",
    verl_forward=True,
    places=grid_thw_places,
    unpackable="verl replaces its attention with one that the capture does not see",
)
