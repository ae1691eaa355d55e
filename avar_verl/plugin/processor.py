# SPDX-License-Identifier: Apache-2.0
"""verl's processors, for those outside the plugin, as a training loads them."""

from avar_verl.plugin.switch import switch_on

switch_on()

from verl.utils import hf_processor  # noqa: E402  Patched by now.

__all__ = ["hf_processor"]
