# SPDX-License-Identifier: Apache-2.0
"""Qwen2.5-VL: ChatML turns; `<|image_pad|>` and `<|video_pad|>` stand for the vision features.

The markers `<|vision_start|>` and `<|vision_end|>` around them keep the role of their turn. Its chat template writes a
default system turn when the messages have none.
"""

from avar_verl.families.chatml import ChatMLTurns
from avar_verl.roles import RoleMap

VISION_TOWER = "model.visual"
PROJECTOR = "model.visual.merger"


def role_map(tokenizer, config) -> RoleMap:
    """`RoleMap` of `config.model_type == "qwen2_5_vl"`."""
    return RoleMap(ChatMLTurns.from_tokenizer(tokenizer), (config.image_token_id, config.video_token_id))
