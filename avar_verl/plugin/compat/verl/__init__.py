# SPDX-License-Identifier: Apache-2.0
"""Patches of verl 0.9.1, active on every machine."""
