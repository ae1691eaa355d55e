# SPDX-License-Identifier: Apache-2.0
"""GLM-4.5V and GLM-4.6V (106B), mixtures of experts in the chat format of GLM-4.1V. verl replaces none of it."""

import dataclasses

from avar_verl.model.families import glm4v

FAMILY = dataclasses.replace(
    glm4v.FAMILY,
    model_types=("glm4v_moe",),
    verl_forward=False,
    unpackable="its attention does not tell the capture where packed samples start",
)
