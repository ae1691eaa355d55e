# SPDX-License-Identifier: Apache-2.0
"""verl's processors, for those outside the plugin."""

import verl  # noqa: F401  Reads the plugin entry points, as every training process does.
from verl.utils import hf_processor

__all__ = ["hf_processor"]
