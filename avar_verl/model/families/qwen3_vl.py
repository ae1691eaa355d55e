# SPDX-License-Identifier: Apache-2.0
"""Qwen3-VL and its mixture of experts.

Features from three depths of the vision tower enter the language model (deepstack), each through its own merger.
"""

from avar_verl.model.families.grid import grid_thw_places
from avar_verl.model.family import Family
from avar_verl.model.turns import CHATML

FAMILY = Family(
    model_types=("qwen3_vl", "qwen3_vl_moe"),
    turns=CHATML,
    system="the system turn; the chat template adds none, so give every prompt one",
    placeholders=("image_token_id", "video_token_id"),
    vision_tower="model.visual",
    projectors=("model.visual.merger", "model.visual.deepstack_merger_list"),
    coordinates="relative_1000",
    verl_forward=True,
    places=grid_thw_places,
)
