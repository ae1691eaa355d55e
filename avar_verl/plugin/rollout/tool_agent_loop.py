# SPDX-License-Identifier: Apache-2.0
"""verl's tool agent for any known family whose chat template has tool turns: images from tools, and what they are for.

actor_rollout_ref.rollout.agent.default_agent_loop=avar_tool_agent        (docs/multi-turn.md)
"""

import functools
from dataclasses import replace

from verl.experimental.agent_loop.tool_agent_loop import AgentState, ToolAgentLoop
from verl.utils.tokenizer.continuous_token import MergeResult

from avar_verl.data.images import image_file
from avar_verl.data.messages import blocks_of, shown
from avar_verl.model.families import get_family
from avar_verl.model.render import Rendered, merge_features, render
from avar_verl.model.roles import RoleMap
from avar_verl.plugin.compat.verl.rollout_features import FEATURES
from avar_verl.plugin.config import OWN_TOKENS, PROMPT_ROWS, TOOL_FILES
from avar_verl.plugin.rollout.agent_loop import RenderedPrompts
from avar_verl.plugin.switch import switch_on


class _ToolTurns:
    """The turns of tools after one reply, by our rendering, in the place of verl's (`VLContinuousTokenMixin`).

    verl's builder renders made-up turns without and with those of the tools, and takes the difference. It does so twice
    here: for the model's ids, and for what vLLM gets. What the template writes behind the end of a turn, verl inserts
    for the families that it knows; here it comes from the rendering.
    """

    def __init__(self, loop: "AvarToolAgentLoop", builder):
        self._loop, self._builder = loop, builder
        self._rendered: list[Rendered] = []
        self._merge = type(builder)._merge_context_token_ids.__get__(builder)
        builder.render_tokens_with_mm = self._render
        builder._merge_context_token_ids = self._merge_with_separator
        self.sent_ids: list[int] = []

    @property
    def features(self) -> list[dict]:
        """Of the tools' images."""
        return [rendered.features for rendered in self._rendered if rendered.features]

    def with_one_placeholder(self) -> None:
        """Repeat the renderings, in their order, with one placeholder per image."""
        again = iter(self._rendered)
        self._builder.render_tokens_with_mm = lambda *_args, **_kwargs: next(again).prompt_ids

    def check(self, messages: list[dict], ids: list[int]) -> None:
        """Refuse a chat template that leaves out what tools returned.

        Raises:
            ValueError: no placeholder for images, or not the text.
        """
        found = set(ids) & set(self._loop.role_map.image_token_ids)
        tokenizer = self._loop.tokenizer
        written = "".join(tokenizer.decode(ids, skip_special_tokens=False).split())
        for message in messages:
            for block in blocks_of(message["content"]):
                if block["type"] == "image" and not found:
                    what = "an image"
                elif "".join(block.get("text", "").split()) not in written:
                    what = shown(block["text"])
                else:
                    continue
                raise ValueError(
                    f"a chat template must write the turns of tools; got {tokenizer.decode(ids)!r} for {what}. Use one "
                    "that writes them (actor_rollout_ref.model.custom_chat_template)."
                )

    def _render(self, messages, _images, *, add_generation_prompt, tools=None, **_media) -> list[int]:
        loop = self._loop
        rendered = render(
            loop.processor,
            messages,
            add_generation_prompt=add_generation_prompt,
            template_kwargs=loop.template_kwargs(tools),
            processor_kwargs=dict(loop.mm_processor_kwargs or {}),
        )
        self._rendered.append(rendered)
        return rendered.ids_S.tolist()

    def _merge_with_separator(self, runtime_token_ids, appended_token_ids, **kwargs) -> MergeResult:
        merged = self._merge(runtime_token_ids, appended_token_ids, **kwargs)
        ends = set(self._loop.role_map.find_turns.end_ids)
        if merged.inserted_token_ids or merged.removed_prefix_token_count or runtime_token_ids[-1] not in ends:
            return merged
        before = self._rendered[0].ids_S.tolist()  # Up to the made-up turn of the assistant.
        after_end = next((at for at, token in enumerate(reversed(before)) if token in ends), 0)
        separator = before[len(before) - after_end :]
        token_ids = [*runtime_token_ids, *separator, *appended_token_ids]
        return replace(merged, token_ids=token_ids, inserted_token_ids=separator)


class AvarToolAgentLoop(RenderedPrompts, ToolAgentLoop):
    """`ToolAgentLoop` with `RenderedPrompts`; more changes:

    - the turns of tools are rendered as prompts are, so vLLM gets one placeholder per image there, too, and the
      features of their images go with the rollout, behind those of the prompt;
    - placeholders in the text of a tool are taken out: a policy can spell one, and a tool may repeat it;
    - extra fields of a rollout in which a tool was called: PROMPT_ROWS, OWN_TOKENS, `image_fields` of the tools' images
      as `tool_image_grids` and `tool_image_sizes`, and their files as TOOL_FILES if `trainer.rollout_data_dir` is set.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._tool_features: list[dict] = []
        self._num_prompt_images = 0
        self._turns: _ToolTurns | None = None

    async def ct_build_initial_tokens(self, messages, tools=None, images=None, **kwargs):
        self._num_prompt_images = len(images or [])
        return await super().ct_build_initial_tokens(messages, tools, images, **kwargs)

    async def ct_merge_assistant_token(self, runtime_token_ids, assistant_token_ids, *args, **kwargs):
        if self.rendered is not None:
            merged = self.continuous_token_builder.merge_assistant_tokens(self.sent_ids, assistant_token_ids)
            self.sent_ids = merged.token_ids
        return await super().ct_merge_assistant_token(runtime_token_ids, assistant_token_ids, *args, **kwargs)

    async def ct_merge_context_msg(
        self, previous_messages, updated_messages, runtime_token_ids, response_mask, response_logprobs=None, tools=None
    ):
        own = (previous_messages, updated_messages, runtime_token_ids, response_mask, response_logprobs, tools)
        if self.rendered is None:
            return await super().ct_merge_context_msg(*own)
        self._turns = _ToolTurns(self, self.continuous_token_builder)
        merged = await super().ct_merge_context_msg(*own)
        added = updated_messages[len(previous_messages) :]
        self._turns.check(added, merged[0].token_ids[-merged[0].appended_token_count :])
        self._turns.with_one_placeholder()
        sent = self.continuous_token_builder.merge_context_tokens(
            previous_messages, updated_messages, self.sent_ids, tools=tools
        )
        self._turns.sent_ids = sent.token_ids
        return merged

    async def _handle_processing_tools_state(self, agent_data) -> AgentState:
        state = await super()._handle_processing_tools_state(agent_data)
        if state == AgentState.GENERATING and self.rendered is not None:  # Else the turn did not fit.
            self.sent_ids = self._turns.sent_ids
            self._tool_features += self._turns.features
        return state

    @functools.cached_property
    def role_map(self) -> RoleMap:
        return RoleMap.from_pretrained(self.processor, self.processor.config)

    @property
    def _placeholders(self) -> set[str]:
        ids = self.tokenizer.convert_ids_to_tokens(list(self.role_map.image_token_ids))
        return {*ids, *filter(None, [getattr(self.processor, "image_token", None)])}

    async def _call_tool(self, tool_call, tools_kwargs, agent_data):
        response, reward, metrics = await super()._call_tool(tool_call, tools_kwargs, agent_data)
        if self.processor is not None and response.text:
            for placeholder in self._placeholders:
                response.text = response.text.replace(placeholder, "")
        return response, reward, metrics

    def _add_images(self, output) -> None:
        super()._add_images(output)
        extra = output.extra_fields
        if 0 in output.response_mask:
            extra[OWN_TOKENS] = list(output.response_mask)
        if not self._tool_features:
            return
        prompt, family = self.rendered.features, get_family(self.processor.config.model_type)
        if family.row_features:
            raise ValueError(
                "images of tools need features with a row for every image, to tell the prompt's from others; got "
                f"{self.processor.config.model_type}, with one row for all in {list(family.row_features)}. Use a model "
                "of another family, or tools that return text."
            )
        output.multi_modal_data[FEATURES] = merge_features(family, [prompt, *self._tool_features])
        extra[PROMPT_ROWS] = {key: len(value) for key, value in prompt.items() if value is not None}
        if "image_grid_thw" in prompt:  # verl derives one more (compat.verl.rollout_features).
            extra[PROMPT_ROWS]["images_seqlens"] = int(prompt["image_grid_thw"][:, 0].sum())
        sizes = self._image_fields(merge_features(family, self._tool_features))
        extra.update({f"tool_{name}": value for name, value in sizes.items()})
        if self.config.trainer.get("rollout_data_dir"):
            images = output.multi_modal_data["images"][self._num_prompt_images :]
            extra[TOOL_FILES] = [image_file(image) for image in images]


# hydra imports this module when a run asks for the loop.
switch_on()
