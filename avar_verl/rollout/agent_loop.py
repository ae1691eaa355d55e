# SPDX-License-Identifier: Apache-2.0
"""verl's single-turn agent loop without image placeholders in the response, and with image sizes for the reward.

A policy that samples `<|image_pad|>` writes a response with more image tokens than image features, and the actor's
forward pass ends the run ("Image features and image tokens do not match"). The logits of the processor's placeholders
get vLLM's lowest bias in every sampling of a rollout.
"""

from typing import Any

from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop
from verl.utils.tokenizer import get_processor_token_id

FORBIDDEN = -100.0  # vLLM's smallest logit bias: a factor of exp(-100)


def forbid(sampling_params: dict[str, Any], token_ids: list[int]) -> dict[str, Any]:
    """A copy of `sampling_params` under which `token_ids` are not sampled; other biases stay."""
    bias = {**(sampling_params.get("logit_bias") or {}), **dict.fromkeys(token_ids, FORBIDDEN)}
    return {**sampling_params, "logit_bias": bias}


def image_fields(mm_inputs: dict, patch_size: int | None) -> dict[str, list]:
    """What the reward learns about the images as the model saw them, from the processor's output.

    `image_grids`: (t, h, w) patches of every image; `image_sizes`: its (width, height) in pixels. Empty without a grid,
    as in families that do not keep the shape of an image.
    """
    grids = mm_inputs.get("image_grid_thw")
    if grids is None or patch_size is None:
        return {}
    grids = [[int(n) for n in grid] for grid in grids]
    return {"image_grids": grids, "image_sizes": [[w * patch_size, h * patch_size] for _, h, w in grids]}


class AvarSingleTurnAgentLoop(SingleTurnAgentLoop):
    """`SingleTurnAgentLoop`; changes: a logit bias on the processor's image and video placeholders, and `image_fields`
    among the rollout's extra fields, which reach the reward function as `extra_info`.
    """

    async def ct_build_initial_tokens(self, messages, **kwargs):
        ids = await super().ct_build_initial_tokens(messages, **kwargs)
        # One instance runs one rollout (verl/experimental/agent_loop/agent_loop.py, `_run_agent_loop`).
        patch_size = getattr(getattr(self.processor, "image_processor", None), "patch_size", None)
        self._image_fields = image_fields(kwargs.get("mm_inputs_out") or {}, patch_size)
        return ids

    async def run(self, sampling_params: dict[str, Any], priority: int = 0, **kwargs):
        ids = [get_processor_token_id(self.processor, name) for name in ("image", "video")]
        sampling_params = forbid(sampling_params, [token_id for token_id in ids if token_id is not None])
        output = await super().run(sampling_params, priority, **kwargs)
        output.extra_fields.update(self._image_fields)
        return output
