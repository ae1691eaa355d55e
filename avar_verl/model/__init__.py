# SPDX-License-Identifier: Apache-2.0
"""Models and their conversations: token roles, families, rendering, checkpoints."""
