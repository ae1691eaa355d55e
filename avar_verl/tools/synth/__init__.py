# SPDX-License-Identifier: Apache-2.0
"""VARD, visual-anchored reflection data: describe, reason with reflection, integrate anchors (docs/synth.md)."""
