# SPDX-License-Identifier: Apache-2.0
import dataclasses

import pytest

from avar_verl.tools.synth.chain import make_request
from avar_verl.tools.synth.prompts import box_texts, load_prompt, parse_chain, parse_description, render, versions

EARLIER = {"description": "DESCRIPTION", "reasoning": "REASONING", "final_answer": "FINAL"}


def text_of(messages) -> str:
    return "\n".join(message["content"] for message in messages)


def test_stage_1_sees_the_question_and_boxes_but_never_the_answer(make_config, grid_item):
    item = grid_item(0, answers=("ANSWER",))
    text = text_of(render(make_config().stages.describe, item, "absolute", {}))
    assert item.words in text and "[56, 0, 112, 56]" in text and "ANSWER" not in text


def test_stage_2_gets_description_question_and_answer(make_config, grid_item):
    item = grid_item(0, answers=("ANSWER", "OTHER"))
    text = text_of(render(make_config().stages.reason, item, "absolute", {"description": "DESCRIPTION"}))
    for part in ("<description>\nDESCRIPTION\n</description>", item.words, "ANSWER or OTHER"):
        assert part in text


def test_stage_3_gets_the_reasoning_alone(make_config, grid_item):
    item = grid_item(0, answers=("ANSWER",))
    text = text_of(render(make_config().stages.integrate, item, "absolute", EARLIER))
    assert "<reasoning>REASONING</reasoning>\n<answer>FINAL</answer>" in text
    assert "ANSWER" not in text and "DESCRIPTION" not in text


def test_no_boxes_no_word_of_them(make_config, grid_item):
    item = grid_item(0, boxes=())
    assert "regions" not in text_of(render(make_config().stages.describe, item, "absolute", {}))


def test_boxes_in_thousandths(grid_item):
    assert box_texts(grid_item(0, boxes=(((0, 28, 56, 112),),)), "relative_1000") == ["[0, 250, 500, 1000]"]
    two = grid_item(0, pictures=grid_item(0).pictures * 2, boxes=(((0, 0, 1, 2),), ((3, 4, 5, 6),)))
    assert box_texts(two, "absolute") == ["image 1: [0, 0, 1, 2]", "image 2: [3, 4, 5, 6]"]


def test_a_prompt_of_ones_own(make_config, grid_item, tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text("{% block user %}Say {{ question }}{% endblock %}")
    stage = dataclasses.replace(make_config().stages.describe, prompt=str(path))
    assert render(stage, grid_item(0), "absolute", {}) == [{"role": "user", "content": f"Say {grid_item(0).words}"}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{% block user %}", "must be a jinja template"),
        ("hello", "a prompt must have the block user"),
        ("{% block user %}{{ description }}{% endblock %}", "prompt bad must render; got: 'description' is undefined"),
    ],
)
def test_bad_prompts(make_config, grid_item, tmp_path, text, message):
    path = tmp_path / "bad.jinja"
    path.write_text(text)
    stage = dataclasses.replace(make_config().stages.describe, prompt=str(path))
    load_prompt.cache_clear()
    with pytest.raises(ValueError, match=message):
        render(stage, grid_item(0), "absolute", {})


def test_no_such_prompt():
    with pytest.raises(ValueError, match=r"a prompt must be one of \['describe_v1', 'integrate_v1', 'reason_v1'\]"):
        load_prompt("describe_v9")


@pytest.mark.parametrize(
    ("text", "chain"),
    [
        ("<reasoning>a\nb</reasoning>\n<answer> 4 </answer>\n", ("a\nb", "4")),
        ("<think>own <reasoning></think><reasoning>a</reasoning><answer>4</answer>", ("a", "4")),
        ("<reasoning>a</reasoning>", None),
        ("Sure: <reasoning>a</reasoning><answer>4</answer>", None),
        ("<reasoning>a</reasoning><answer>4</answer> Done.", None),
        ("<reasoning> </reasoning><answer>4</answer>", None),
        ("<reasoning>a</reasoning><answer></answer>", None),
        ("<reasoning>a <answer>3</answer> b</reasoning><answer>4</answer>", None),
        ("<reasoning>a</reasoning><answer>4</answer><reasoning>a</reasoning><answer>4</answer>", None),
    ],
)
def test_parse_chain(text, chain):
    assert parse_chain(text) == chain


def test_parse_description():
    assert parse_description("<think>hm</think>\n A cat. ") == "A cat."


def test_versions_name_the_text(make_config):
    assert versions(make_config())["reason"].startswith("reason_v1 (")


def test_the_key_is_everything_an_answer_depends_on(make_config, grid_item):
    def key(*overrides, stage="describe", item=None, earlier=None):
        return make_request(make_config(*overrides), stage, item or grid_item(0), earlier or {}).key

    keys = [
        key(),
        key("models.describer.model=other"),
        key("stages.describe.temperature=0.5"),
        key("stages.describe.seed=1"),
        key("stages.describe.extra={top_k: 3}"),
        key("output.coordinates=relative_1000"),
        key(item=grid_item(1)),
        key(item=grid_item(0, pictures=grid_item(1).pictures)),
        key(stage="reason", earlier={"description": "a"}),
        key(stage="reason", earlier={"description": "b"}),
        key("stages.reason.sees_images=true", stage="reason", earlier={"description": "b"}),
    ]
    assert len(set(keys)) == len(keys)
    # Where a model is and what it costs does not matter.
    assert key() == key("endpoints.vision.url=http://elsewhere/v1", "models.describer.input_usd=9")
    # Text-only stages do not depend on the picture itself.
    same = {"stage": "reason", "earlier": {"description": "a"}}
    assert key(**same) == key(**same, item=grid_item(0, pictures=grid_item(1).pictures))
