# SPDX-License-Identifier: Apache-2.0
"""verl's single-turn agent loop for vision-language models: the policy cannot write image placeholders.

A policy that samples `<|image_pad|>` makes a sequence with more image tokens than image features, and the actor's
forward pass dies on it, often hours into a run. verl 0.9.1 has no guard (no logit_bias anywhere).
"""

from typing import Any

from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop
from verl.utils.tokenizer import get_processor_token_id

FORBIDDEN = -100.0  # vLLM's smallest logit bias: a factor of exp(-100)


def forbid(sampling_params: dict[str, Any], token_ids: list[int]) -> dict[str, Any]:
    """A copy of `sampling_params` under which `token_ids` are not sampled; other biases stay."""
    bias = {**(sampling_params.get("logit_bias") or {}), **dict.fromkeys(token_ids, FORBIDDEN)}
    return {**sampling_params, "logit_bias": bias}


class AvarSingleTurnAgentLoop(SingleTurnAgentLoop):
    """`SingleTurnAgentLoop`; the only change is a logit bias on the processor's image and video placeholders."""

    async def run(self, sampling_params: dict[str, Any], priority: int = 0, **kwargs):
        ids = [get_processor_token_id(self.processor, name) for name in ("image", "video")]
        sampling_params = forbid(sampling_params, [token_id for token_id in ids if token_id is not None])
        return await super().run(sampling_params, priority, **kwargs)
