# SPDX-License-Identifier: Apache-2.0
"""Prompts of MiniCPM-V 4.6 with slices.

vLLM writes the placeholders of an image's slices itself and takes the image processor's (rows, columns) for (columns,
rows) (vllm/model_executor/models/minicpmv4_6.py:599 in 0.24.0; transformers 5.9.0, processing_minicpmv4_6.py, reads
`num_rows, num_cols`). Rows of slices are separated by newlines, so if there are not as many rows as columns, rollouts
would have another prompt than the model is trained on.
"""

import functools


def apply(minicpmv4_6) -> None:
    """Turn the grid of `vllm.model_executor.models.minicpmv4_6` around. Idempotent."""
    info = minicpmv4_6.MiniCPMV4_6ProcessingInfo
    original = info._compute_visual_tokens
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def _compute_visual_tokens(self, *args, **kwargs):
        grid, num_whole, num_slice = original(self, *args, **kwargs)
        return list(reversed(grid)), num_whole, num_slice

    info._compute_visual_tokens = _compute_visual_tokens
