# SPDX-License-Identifier: Apache-2.0
"""Qwen3.5, 3.6 and 3.8-27B, which are one architecture, and its mixture of experts.

Three of four layers are gated DeltaNet, a linear attention: only every fourth layer has a softmax, whose output is
multiplied by a sigmoid gate. A generation prompt ends in `<think>` or, with `enable_thinking=False`, in an empty block.
"""

import dataclasses

from avar_verl.model.families import qwen2_vl

FAMILY = dataclasses.replace(
    qwen2_vl.FAMILY,
    model_types=("qwen3_5", "qwen3_5_moe"),
    system="the system turn; the chat template adds none, so give every prompt one",
)
