# SPDX-License-Identifier: Apache-2.0
"""LLaVA-OneVision: a base view and tiles of it; the model drops the padding and adds a newline feature to every row."""

import dataclasses

from avar_verl.model.families import llava_next
from avar_verl.model.turns import CHATML

FAMILY = dataclasses.replace(
    llava_next.FAMILY,
    model_types=("llava_onevision",),
    turns=CHATML,
    system="the system turn; the chat template adds none, so give every prompt one",
    placeholders=("image_token_id", "video_token_id"),
)
