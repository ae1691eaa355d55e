# SPDX-License-Identifier: Apache-2.0
"""The instrument: VAS of any checkpoint on any data, its report, and checkpoints beside each other (docs/vas.md)."""
