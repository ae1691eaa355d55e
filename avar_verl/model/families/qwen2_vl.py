# SPDX-License-Identifier: Apache-2.0
"""Qwen2-VL, the same as Qwen2.5-VL except for the coordinates."""

from avar_verl.model.families.grid import grid_thw_places
from avar_verl.model.family import Family
from avar_verl.model.turns import CHATML

FAMILY = Family(
    model_types=("qwen2_vl",),
    turns=CHATML,
    system="the system turn; the chat template adds a default one when the messages have none",
    placeholders=("image_token_id", "video_token_id"),
    vision_tower="model.visual",
    projectors=("model.visual.merger",),
    coordinates="relative_1000",
    verl_forward=True,
    places=grid_thw_places,
)
