# SPDX-License-Identifier: Apache-2.0
"""The tool agent loop with verl's token builders and the families' processors, on replies that are written here."""

import asyncio
import functools
from types import SimpleNamespace

import pytest
import torch
import verl.experimental.agent_loop  # noqa: F401  before what registers itself with it
from verl.experimental.agent_loop.agent_loop import DictConfigWrap, ToolListWrap
from verl.tools.function_tool import FunctionTool
from verl.tools.schemas import OpenAIFunctionToolSchema, ToolResponse
from verl.utils.dataset.rl_dataset import RLHFDataset
from verl.workers.config import HFModelConfig
from verl.workers.rollout.replica import TokenOutput

from avar_verl.model.render import render
from avar_verl.model.roles import RoleMap, TokenRole, prompt_images
from avar_verl.plugin.compat.verl.rollout_features import FEATURES
from avar_verl.plugin.config import OWN_TOKENS, PROMPT_ROWS, TOOL_FILES
from avar_verl.plugin.rollout.tool_agent_loop import AvarToolAgentLoop
from avar_verl.plugin.rollout.zoom_in import SCHEMA, ImageZoomIn
from tests.e2e.tool_data import call
from tests.model.families.tiny import sample_images
from tests.plugin.test_config import recipe

pytestmark = pytest.mark.e2e

QWEN3 = """{%- macro text_of(content) %}{% if content is string %}{{ content }}{% else %}{% for item in content -%}
{% if item.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ item.text }}{% endif %}
{%- endfor %}{% endif %}{% endmacro -%}
{% for message in messages %}{{ '<|im_start|>' + ('user' if message.role == 'tool' else message.role) + '\n' }}
{%- if message.role == 'tool' %}{{ '<tool_response>\n' + text_of(message.content) + '\n</tool_response>' }}
{%- else %}{{ text_of(message.content) }}{% endif %}{{ '<|im_end|>\n' }}{% endfor -%}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
QWEN = "<|vision_start|><|image_pad|><|vision_end|>"
# What stands between two replies of every family whose rollouts run in vLLM here and whose template writes such a turn.
BETWEEN = {
    "qwen2_vl": f"\n<|im_start|>tool\n{QWEN}<|im_end|>\n<|im_start|>assistant\n",
    "qwen2_5_vl": f"\n<|im_start|>tool\n{QWEN}<|im_end|>\n<|im_start|>assistant\n",
    # With a template as Qwen3-VL's.
    "qwen3_vl": f"\n<|im_start|>user\n<tool_response>\n{QWEN}\n</tool_response><|im_end|>\n<|im_start|>assistant\n",
    "qwen3_5": f"\n<|im_start|>tool\n{QWEN}<|im_end|>\n<|im_start|>assistant\n<think>\n",
    "internvl": "\n<|im_start|>tool\n<IMG_CONTEXT>\n<|im_end|>\n<|im_start|>assistant\n",
    "llava_onevision": "<|im_start|>tool <image><|im_end|><|im_start|>assistant\n",
    "lfm2_vl": "\n<|im_start|>tool\n<image><|im_end|>\n<|im_start|>assistant\n",
}
BOX = [0, 0, 56, 84]


class Replies:
    """A server that says what it is told to, and keeps what it was asked."""

    def __init__(self, tokenizer, replies: list[str]):
        self.replies = [[*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id] for text in replies]
        self.asked: list[dict] = []

    async def generate(self, **kwargs) -> TokenOutput:
        images = list(kwargs["image_data"] or [])
        self.asked.append({**kwargs, "prompt_ids": list(kwargs["prompt_ids"]), "image_data": images})
        return TokenOutput(token_ids=self.replies[len(self.asked) - 1])


@functools.cache
def model_of(path, template: str | None) -> HFModelConfig:
    """Of an agent-loop worker."""
    return HFModelConfig(path=str(path), **({} if template is None else {"custom_chat_template": template}))


@functools.cache
def config_of(path, *overrides: str):
    return recipe(
        "avar_grpo",
        "machine=cpu_grpo",
        f"actor_rollout_ref.model.path={path}",
        "data.train_files=x",
        "data.val_files=x",
        "data.max_response_length=512",
        *overrides,
    )


def start(path, replies: list[str], tools: list, *overrides: str, template: str | None = None):
    """A loop and its server."""
    config, model = config_of(path, *overrides), model_of(path, template)
    tokenizer, processor = model.tokenizer, model.processor
    if template is not None:  # As the worker does.
        processor.chat_template = tokenizer.chat_template = template
    server = Replies(tokenizer, replies)
    loop = AvarToolAgentLoop(
        trainer_config=DictConfigWrap(config),
        server_manager=server,
        tokenizer=tokenizer,
        processor=processor,
        dataset_cls=RLHFDataset,
        data_config=DictConfigWrap(config.data),
        hf_model_type=processor.config.model_type,
        tools=ToolListWrap(tools),
    )
    return loop, server


def rollout(path, replies: list[str], messages: list[dict], *overrides: str, tools=None, template=None):
    """(output, server, loop) of one rollout."""

    async def run():
        own = [ImageZoomIn({"type": "native"})] if tools is None else tools
        loop, server = start(path, replies, own, *overrides, template=template)
        return await loop.run({"temperature": 1.0}, raw_prompt=messages), server, loop

    return asyncio.run(run())


def question(*images) -> list[dict]:
    blocks = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": "What is it?"}]
    return [{"role": "system", "content": "Be brief."}, {"role": "user", "content": blocks}]


def told(text: str, image=None):
    """A tool that returns what it was made with."""
    schema = OpenAIFunctionToolSchema.model_validate(SCHEMA)

    def tool(bbox_2d):
        return ToolResponse(text=text, **({"image": [image]} if image else {}))

    return FunctionTool(name="image_zoom_in", fn=tool, tool_schema=schema)


@pytest.mark.parametrize("model_type", BETWEEN)
def test_a_rollout_is_the_conversation(model_type, family_path):
    """Ids, what vLLM gets, features and roles of a prompt with an image, a call, the tool's image, and an answer."""
    (image,) = sample_images(1)
    template = QWEN3 if model_type == "qwen3_vl" else None
    output, server, loop = rollout(
        family_path(model_type), [call(BOX), "<answer>cat</answer>"], question(image), template=template
    )
    processor = loop.processor
    seen = server.asked[0]["image_data"][0]
    crop = seen.crop(tuple(BOX))
    assert [asked["image_data"] for asked in server.asked] == [[seen], [seen, crop]]

    def ids_of(text: str, **images) -> list[int]:
        if images:
            return processor(text=[text], add_special_tokens=False, **images)["input_ids"][0]
        return processor.tokenizer.encode(text, add_special_tokens=False)

    first, second = server.replies
    between = BETWEEN[model_type]
    assert output.response_ids == [*first, *ids_of(between, images=[crop]), *second]
    assert output.response_mask == [1] * len(first) + [0] * len(ids_of(between, images=[crop])) + [1] * len(second)
    assert server.asked[0]["prompt_ids"] == loop.rendered.prompt_ids
    assert server.asked[1]["prompt_ids"] == [*loop.rendered.prompt_ids, *first, *ids_of(between)]

    ids = output.prompt_ids + output.response_ids
    blocks = [{"type": "image", "image": picture} for picture in (seen, crop)]
    both = render(processor, [{"role": "user", "content": blocks}]).features
    features, prompt = output.multi_modal_data[FEATURES], loop.rendered.features
    assert features.keys() == both.keys() == prompt.keys()
    for key, value in both.items():
        assert torch.equal(features[key], value), key
        first_rows = features[key][: output.extra_fields[PROMPT_ROWS][key]]
        # Where tiles are padded, behind them.
        inside = tuple(slice(0, size) for size in prompt[key].shape)
        assert len(first_rows) == len(prompt[key]) and torch.equal(first_rows[inside], prompt[key]), key

    assert output.extra_fields[OWN_TOKENS] == output.response_mask
    bias = server.asked[1]["sampling_params"]["logit_bias"]
    role_map = RoleMap.from_pretrained(processor, processor.config)
    assert set(bias) == set(role_map.image_token_ids)

    mask = torch.tensor([[0] * len(output.prompt_ids) + output.response_mask])
    roles = role_map(torch.tensor([ids]), None, mask)
    is_image = torch.isin(torch.tensor([ids]), torch.tensor(role_map.image_token_ids))
    assert ((roles == TokenRole.IMAGE) == is_image).all()
    of_prompt = prompt_images(roles)
    assert ((of_prompt == TokenRole.IMAGE) == is_image & (torch.arange(len(ids)) < len(output.prompt_ids))).all()
    assert 0 < (of_prompt == TokenRole.IMAGE).sum() < is_image.sum()


@pytest.mark.parametrize("model_type", ["qwen3_vl", "glm4v"])
def test_a_template_that_leaves_the_turns_of_tools_out_is_refused(model_type, family_path):
    """Those of the tests do; with an image, and with text alone."""
    (image,) = sample_images(1)
    for tools, what in (([told("", image)], "an image"), ([told("the tool says no")], "'the tool says no'")):
        with pytest.raises(ValueError, match=f"a chat template must write the turns of tools; got .* for {what}"):
            rollout(family_path(model_type), [call(BOX), "cat"], question(image), tools=tools)


def test_sizes_and_files_of_the_images_of_tools(tiny_model_path, tmp_path):
    """Two calls; the second zooms into what the first returned. Files only where rollouts are written."""
    first, second = sample_images(2, shapes=[(112, 112)])
    replies = [call(BOX), call([0, 0, 40, 40]).replace("}}", ', "image": 3}}'), "cat"]
    for folder in ("", str(tmp_path)):
        overrides = [f"trainer.rollout_data_dir={folder}"] if folder else []
        output, server, _ = rollout(tiny_model_path, replies, question(first, second), *overrides)
        extra = output.extra_fields
        assert extra["image_sizes"] == [[112, 112], [112, 112]]
        assert len(extra["tool_image_sizes"]) == len(extra["tool_image_grids"]) == 2
        third, fourth = server.asked[2]["image_data"][2:]
        assert third.size == (56, 84) and fourth.tobytes() == third.crop((0, 0, 40, 40)).tobytes()
        assert output.num_turns == 6 and len(server.asked) == 3
        assert extra[PROMPT_ROWS]["image_grid_thw"] == extra[PROMPT_ROWS]["images_seqlens"] == 2
        assert len(extra.get(TOOL_FILES, [])) == (2 if folder else 0)


def test_without_a_call_it_is_a_single_turn(tiny_model_path):
    (image,) = sample_images(1)
    output, _, loop = rollout(tiny_model_path, ["cat"], question(image))
    assert output.multi_modal_data[FEATURES] is loop.rendered.features
    assert not output.extra_fields.keys() & {OWN_TOKENS, PROMPT_ROWS, TOOL_FILES, "tool_image_sizes"}
    assert set(output.response_mask) == {1}


def test_a_turn_that_does_not_fit_is_left_out(tiny_model_path, tiny_processor):
    """With its image, in the features too."""
    (image,) = sample_images(1)
    length = len(tiny_processor.tokenizer.encode(call(BOX))) + 10
    output, server, loop = rollout(tiny_model_path, [call(BOX)], question(image), f"data.max_response_length={length}")
    assert output.response_ids == server.replies[0] and len(output.multi_modal_data["images"]) == 1
    assert output.multi_modal_data[FEATURES] is loop.rendered.features


def test_a_prompt_without_an_image_and_a_tool_with_one(tiny_model_path):
    (image,) = sample_images(1, shapes=[(112, 112)])
    output, _, _ = rollout(tiny_model_path, [call(BOX), "cat"], question(), tools=[told("", image)])
    assert output.extra_fields[PROMPT_ROWS] == {}
    assert output.multi_modal_data[FEATURES]["pixel_values"].shape[0] == 64


def test_what_a_tool_repeats_is_no_image(tiny_model_path):
    """A policy can spell a placeholder; text of a tool that had one would ask for an image that nobody has."""
    (image,) = sample_images(1)
    tools = [told("No <|image_pad|> such <|video_pad|> box")]
    output, _, loop = rollout(tiny_model_path, [call(BOX), "cat"], question(image), tools=tools)
    text = loop.tokenizer.decode(output.response_ids)
    assert "No  such  box" in text and "_pad|>" not in text
    reply = '<tool_call>\n{"name": "<|image_pad|>", "arguments": {}}\n</tool_call>'.replace("<|", "< |")
    assert rollout(tiny_model_path, [reply, "cat"], question(image))[0].num_turns == 4


def images(*sizes) -> SimpleNamespace:
    return SimpleNamespace(image_data=sample_images(len(sizes), shapes=sizes))


def zoom(config: dict, parameters: dict, *sizes):
    tool = ImageZoomIn({"type": "native", **config})
    data = images(*sizes)
    response, reward, _ = asyncio.run(tool.execute("id", parameters, agent_data=data))
    assert reward == 0.0
    return response, data.image_data


@pytest.mark.parametrize(
    "config, parameters, number, box",
    [
        ({}, {"bbox_2d": [10, 20, 60, 70]}, 0, (10, 20, 60, 70)),
        ({}, {"bbox_2d": [-5, 20.4, 60, 700], "image": 2}, 1, (0, 20, 60, 100)),
        ({"coordinates": "relative"}, {"bbox_2d": [500, 0, 1000, 500]}, 0, (100, 0, 200, 50)),
        ({"min_side": 1}, {"bbox_2d": [3, 3, 4, 4]}, 0, (3, 3, 4, 4)),
    ],
)
def test_a_part_of_an_image(config, parameters, number, box):
    response, given = zoom(config, parameters, (200, 100), (80, 100))
    (part,) = response.image
    assert part.tobytes() == given[number].crop(box).tobytes() and response.text is None


@pytest.mark.parametrize(
    "parameters, message",
    [
        ({}, "bbox_2d must be [x1, y1, x2, y2]; got None."),
        ({"bbox_2d": "10, 20"}, "bbox_2d must be [x1, y1, x2, y2]; got '10, 20'."),
        ({"bbox_2d": [0, 0, 50, float("nan")]}, "cannot convert float NaN"),
        ({"bbox_2d": [0, 0, 50, True]}, "bbox_2d must be [x1, y1, x2, y2]; got [0, 0, 50, True]."),
        ({"bbox_2d": [60, 0, 0, 60]}, "at least 28 x 28 pixels of the image of 200 x 100; got [60, 0, 0, 60]."),
        ({"bbox_2d": [500, 500, 600, 600]}, "at least 28 x 28 pixels"),
        ({"bbox_2d": [0, 0, 60, 60], "image": 2}, "image must be the number of an image, 1 to 1; got 2."),
        ({"bbox_2d": [0, 0, 60, 60], "image": "1"}, "1 to 1; got '1'."),
    ],
)
def test_a_wrong_call_is_told_why(parameters, message):
    response, _ = zoom({}, parameters, (200, 100))
    assert response.image is None and response.text.startswith("Error: ") and message in response.text


@pytest.mark.parametrize(
    "config, message",
    [
        ({"coordinates": "pixels"}, r"coordinates must be one of \('absolute', 'relative'\); got 'pixels'"),
        ({"min_side": 0}, "min_side must be an integer >= 1; got 0"),
        ({"side": 3}, r"the keys of image_zoom_in are type, coordinates and min_side; got \['side'\]"),
    ],
)
def test_a_config_that_is_wrong_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        ImageZoomIn({"type": "native", **config})


def test_images_of_tools_need_features_by_image():
    loop = object.__new__(AvarToolAgentLoop)
    loop._tool_features, loop.rendered = [{}], SimpleNamespace(features={})
    loop.processor = SimpleNamespace(
        config=SimpleNamespace(model_type="minicpmv4_6"), image_processor=SimpleNamespace(patch_size=14)
    )
    output = SimpleNamespace(extra_fields={}, response_mask=[1], multi_modal_data={})
    with pytest.raises(ValueError, match=r"with a row for every image.*; got minicpmv4_6, with one row for all in \["):
        loop._add_images(output)
