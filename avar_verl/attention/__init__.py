# SPDX-License-Identifier: Apache-2.0
"""Attention masses of token roles, without the attention matrix."""

from avar_verl.attention.capture import CapturedMass, capture_mass
from avar_verl.attention.mass import attention_mass

__all__ = ["CapturedMass", "attention_mass", "capture_mass"]
