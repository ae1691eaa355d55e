# SPDX-License-Identifier: Apache-2.0
"""The checks by topic, imported in the order in which they run."""

from avar_verl.tools.doctor.checks import loading, prompts, images, attention, rewards, data, rollout, memory  # noqa: F401, I001
