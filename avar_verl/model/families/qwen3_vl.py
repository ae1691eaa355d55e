# SPDX-License-Identifier: Apache-2.0
"""Qwen3-VL and its mixture of experts.

Features from three depths of the vision tower enter the language model (deepstack), each through its own merger.
"""

import dataclasses

from avar_verl.model.families import qwen2_vl

FAMILY = dataclasses.replace(
    qwen2_vl.FAMILY,
    model_types=("qwen3_vl", "qwen3_vl_moe"),
    system="the system turn; the chat template adds none, so give every prompt one",
    projectors=("model.visual.merger", "model.visual.deepstack_merger_list"),
)
