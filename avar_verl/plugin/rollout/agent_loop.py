# SPDX-License-Identifier: Apache-2.0
"""verl's agent loops for any known family, without image placeholders in the response.

A policy that samples `<|image_pad|>` writes a response with more image tokens than image features, and the actor's
forward pass ends the run ("Image features and image tokens do not match"). So the logits of the family's placeholders
get vLLM's lowest bias whenever a rollout is sampled.
"""

import functools
from typing import Any

from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop

from avar_verl.data.messages import check_kinds, place_images, read_messages
from avar_verl.model.render import Rendered, render
from avar_verl.model.roles import RoleMap
from avar_verl.plugin.compat.verl.rollout_features import FEATURES
from avar_verl.plugin.rollout.shared import CURRENT
from avar_verl.plugin.switch import switch_on

FORBIDDEN = -100.0  # vLLM's smallest logit bias: a factor of exp(-100)


def forbid(sampling_params: dict[str, Any], token_ids: list[int]) -> dict[str, Any]:
    """A copy of `sampling_params` that prevents sampling of `token_ids`; other biases stay."""
    bias = {**(sampling_params.get("logit_bias") or {}), **dict.fromkeys(token_ids, FORBIDDEN)}
    return {**sampling_params, "logit_bias": bias}


def image_fields(mm_inputs: dict, patch_size: int | None) -> dict[str, list]:
    """Sizes of the images as the model saw them, for the reward; from the processor's output.

    `image_grids`: (t, h, w) patches of every image; `image_sizes`: its (width, height) in pixels. Empty without a grid,
    for families that do not keep the shape of an image.
    """
    grids = mm_inputs.get("image_grid_thw")
    if grids is None or patch_size is None:
        return {}
    grids = [[int(n) for n in grid] for grid in grids]
    return {"image_grids": grids, "image_sizes": [[w * patch_size, h * patch_size] for _, h, w in grids]}


class _Client:
    """verl's server client, which sends prompts with one placeholder per image, as vLLM expects."""

    def __init__(self, client, loop: "RenderedPrompts"):
        self._client, self._loop = client, loop

    def __getattr__(self, name: str):
        return getattr(self._client, name)

    async def generate(self, *args, **kwargs):
        if kwargs.get("image_data"):
            kwargs["prompt_ids"] = self._loop.sent_ids
        return await self._client.generate(*args, **kwargs)


class RenderedPrompts:
    """Over an agent loop of verl's; changes:

    - in `rollout.worker.AvarAgentLoopWorker`, a prompt's pictures are opened and rendered once for all of its rollouts;
    - the prompt is rendered by `avar_verl.model.render`: no second BOS, and vLLM gets one placeholder per image (verl
      does this only for Qwen's image processor, verl/workers/rollout/utils.py:93-113);
    - the features of the prompt go with the rollout (`plugin.compat.verl.rollout_features`);
    - a logit bias on the family's image and video placeholders;
    - `image_fields` among the rollout's extra fields, which reach the reward function as `extra_info`.

    Videos and audio are refused. One instance runs one rollout (agent_loop.py, `_run_agent_loop`).
    """

    rendered: Rendered | None = None
    """The prompt; None without a processor."""
    sent_ids: list[int]
    """What vLLM gets: the ids so far with one placeholder per image."""

    def template_kwargs(self, tools) -> dict[str, Any]:
        return {**self.apply_chat_template_kwargs, **({"tools": tools} if tools else {})}

    async def process_multi_modal_info(self, messages):
        shared = CURRENT.get()
        if shared is None or not shared.is_of(messages):
            return await super().process_multi_modal_info(messages)
        media = await shared.once("media", functools.partial(super().process_multi_modal_info, messages))
        # Lists of its own: a loop may append what tools return.
        return {name: list(items) if isinstance(items, list) else items for name, items in media.items()}

    async def ct_build_initial_tokens(self, messages, tools=None, images=None, videos=None, audios=None, **kwargs):
        check_kinds(name for name, media in (("video", videos), ("audio", audios)) if media)
        if self.processor is None:
            return await super().ct_build_initial_tokens(messages, tools, images=images, **kwargs)
        work = functools.partial(
            render,
            self.processor,
            place_images(read_messages(messages, markers=False), images or []),
            add_generation_prompt=True,
            template_kwargs=self.template_kwargs(tools),
            processor_kwargs=dict(self.mm_processor_kwargs or {}),
        )
        shared = CURRENT.get()
        if shared is not None and shared.is_of(messages):
            name = ("rendered", repr(tools))
            self.rendered = await shared.once(name, lambda: self.loop.run_in_executor(None, work))
            shared.features = self.rendered.features
        else:
            self.rendered = await self.loop.run_in_executor(None, work)
        ids, longest = self.rendered.ids_S.tolist(), self.rollout_config.prompt_length
        if images and len(ids) > longest:
            raise ValueError(
                f"a prompt with images must have at most rollout.prompt_length={longest} tokens; got {len(ids)}. "
                "Raise data.max_prompt_length, or make the images smaller."
            )
        capped = self._cap_text_prompt_length(ids)
        self.sent_ids = list(self.rendered.prompt_ids if images else capped)
        return capped

    async def run(self, sampling_params: dict[str, Any], priority: int = 0, **kwargs):
        if self.processor is not None:
            role_map = RoleMap.from_pretrained(self.processor, self.processor.config)
            sampling_params = forbid(sampling_params, list(role_map.image_token_ids))
        self.server_manager = _Client(self.server_manager, self)
        output = await super().run(sampling_params, priority, **kwargs)
        if self.rendered is not None:
            self._add_images(output)
        return output

    def _image_fields(self, features: dict) -> dict[str, list]:
        return image_fields(features, getattr(self.processor.image_processor, "patch_size", None))

    def _add_images(self, output) -> None:
        """Put the features and the sizes of the images into the rollout."""
        features = self.rendered.features
        output.multi_modal_data = {**(output.multi_modal_data or {}), FEATURES: features}
        output.extra_fields.update(self._image_fields(features))


class AvarSingleTurnAgentLoop(RenderedPrompts, SingleTurnAgentLoop):
    """`SingleTurnAgentLoop` with `RenderedPrompts`."""


# hydra imports this module when a run asks for the loop.
switch_on()
