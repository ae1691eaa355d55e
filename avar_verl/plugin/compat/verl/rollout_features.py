# SPDX-License-Identifier: Apache-2.0
"""Rollouts keep the image features their prompt was rendered with.

verl throws the processor's output away after the prompt is tokenized, and for every finished rollout decodes its ids
without special tokens and runs the processor again on that text (verl/experimental/agent_loop/agent_loop.py:868-918).
Where the placeholder is a special token no placeholder is left, and the processors of Gemma 3, Idefics3, SmolVLM, LLaVA
and Llama 3.2 Vision refuse images that the text does not name. An agent loop that puts the features under FEATURES into
the rollout's `multi_modal_data`, which verl drops when the rollout is stored, is spared both.
"""

import functools

import torch

FEATURES = "avar_features"


def apply(agent_loop) -> None:
    """Wrap `AgentLoopWorker._compute_multi_modal_inputs` of `verl.experimental.agent_loop.agent_loop`."""
    worker = agent_loop.AgentLoopWorker
    original = worker._compute_multi_modal_inputs

    @functools.wraps(original)
    def _compute_multi_modal_inputs(self, output, input_ids):
        features = (output.multi_modal_data or {}).get(FEATURES)
        if features is None:
            return original(self, output, input_ids)
        features = dict(features)
        if hasattr(self.processor, "get_rope_index"):
            # Asks verl's _compute_position_ids to make them from the ids; it takes the entry out again.
            features["mm_token_type_ids"] = torch.zeros(1)
        grids = features.get("image_grid_thw")
        if grids is not None:  # As the original.
            features["images_seqlens"] = torch.repeat_interleave(grids[:, 1] * grids[:, 2], grids[:, 0])
        return features

    worker._compute_multi_modal_inputs = _compute_multi_modal_inputs
