# SPDX-License-Identifier: Apache-2.0
"""Qwen2-VL, the same as Qwen2.5-VL except for the coordinates."""

import dataclasses

from avar_verl.model.families import qwen2_5_vl

FAMILY = dataclasses.replace(qwen2_5_vl.FAMILY, model_types=("qwen2_vl",), coordinates="relative_1000")
