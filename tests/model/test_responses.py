# SPDX-License-Identifier: Apache-2.0
"""Which tokens are trained on: the responses of the row, or an error."""

import copy

import pytest
import torch

from avar_verl.model.families import FAMILIES, get_family
from avar_verl.model.render import render
from avar_verl.model.responses import response_mask, special_tokens
from avar_verl.model.roles import TokenRole
from tests.model.families.tiny import SPECS, TEMPLATES, sample_messages

RESPONSE = "<think>I look at the top left: a cat.</think><answer>cat</answer>"
THOUGHT = "I look at the top left: a cat.\n</think>\n\n<answer>cat</answer>"  # As a template writes it.
CONTENT = "{{ content['text'] }}"
# How templates of published models treat responses, in place of CONTENT.
DROPS = "{{ content['text'].split('</think>')[-1] if message['role'] == 'assistant' else content['text'] }}"
DROPS_EARLIER = DROPS.replace("== 'assistant'", "== 'assistant' and message != messages[-1]")
ADDS = "{{ ('<think>\n\n</think>\n\n' if message['role'] == 'assistant' else '') + content['text'] }}"
STRIPS = "{{ content['text'] | replace('<answer>', '') | replace('</answer>', '') }}"
STRIPS_SPACE = "{{ content['text'] | trim }}"
# A thinking model: it writes the reasoning itself, whether the row's response begins with <think> or not.
THINKS = (
    "{{ '<think>\n' + content['text'].split('</think>')[0].split('<think>')[-1] + '\n</think>\n\n' "
    "+ content['text'].split('</think>')[-1] if message['role'] == 'assistant' else content['text'] }}"
)
PROMPT = "<|im_start|>assistant\n"
GENERATION = "{% if add_generation_prompt %}" + PROMPT + "{% endif %}"
END = "<|im_end|>\n"


def turn(role: str, text: str, **flags) -> dict:
    return {"role": role, "content": [{"type": "text", "text": text}], **flags}


def conversation(*answers: str) -> list[dict]:
    return [one for answer in answers for one in (turn("user", "What is top left?"), turn("assistant", answer))]


@pytest.fixture
def trained(tiny_processor, tiny_config):
    """`trained(messages, content, opening)` -> what is trained on, with these parts of the template."""

    def run(messages, content=CONTENT, opening="", **kwargs) -> str:
        processor = copy.copy(tiny_processor)
        template = tiny_processor.chat_template
        assert CONTENT in template and template.endswith(GENERATION)
        template = template.removesuffix(GENERATION).replace(CONTENT, content)
        processor.chat_template = template + GENERATION.replace(PROMPT, PROMPT + opening)
        role_map = get_family("qwen2_5_vl").role_map(processor.tokenizer, tiny_config)
        rendered = render(processor, messages, template_kwargs=kwargs)
        mask_S = response_mask(processor, role_map, messages, rendered, kwargs)
        return processor.tokenizer.decode(rendered.ids_S[mask_S])

    return run


@pytest.mark.parametrize(
    ("messages", "content", "opening", "expected"),
    [
        (conversation(RESPONSE), CONTENT, "", RESPONSE + END),
        (conversation("  cat \n"), STRIPS_SPACE, "", "cat" + END),
        (conversation("cat\u0301 \U0001f408 猫"), CONTENT, "", "cat\u0301 \U0001f408 猫" + END),
        (conversation(RESPONSE), CONTENT, "<think>", RESPONSE.removeprefix("<think>") + END),
        (conversation(RESPONSE), THINKS, "<think>\n", THOUGHT + END),
        # A row that leaves the opening to the prompt.
        (
            conversation(RESPONSE.removeprefix("<think>")),
            THINKS,
            "<think>\n",
            THOUGHT + END,
        ),
        (conversation("<think>\ncat"), CONTENT, "<think>\n", "cat" + END),
        # A template that would take the opening out of a response.
        (conversation("cat"), DROPS, "<think></think>", "cat" + END),
        (conversation(" <answer>cat</answer>"), DROPS, "<think>\n\n</think>\n\n", " <answer>cat</answer>" + END),
        (conversation(RESPONSE, RESPONSE), CONTENT, "<think>", (RESPONSE.removeprefix("<think>") + END) * 2),
        (
            [turn("user", "a"), turn("assistant", "wrong", loss_mask=0), *conversation("right")],
            CONTENT,
            "",
            "right" + END,
        ),
        (
            [turn("user", "a"), turn("assistant", "wrong", trainable=False), *conversation(RESPONSE)],
            CONTENT,
            "<think>",
            RESPONSE.removeprefix("<think>") + END,
        ),
    ],
)  # fmt: skip
def test_what_is_trained_on(trained, messages, content, opening, expected):
    assert trained(messages, content, opening) == expected


ROW = "a rendered response must be the row's text; got "


@pytest.mark.parametrize(
    ("messages", "content", "opening", "message"),
    [
        (conversation(RESPONSE), DROPS, "", ROW + "'<answer>cat</answer>' for '<think>I look"),
        (conversation(RESPONSE, RESPONSE + '.'), DROPS_EARLIER, "", ROW + "'<answer>cat</answer>' .* in turn 1"),
        (conversation("cat"), ADDS, "", ROW + r"'<think>\\n\\n</think>\\n\\ncat' for 'cat'"),
        (conversation("cat"), THINKS, "<think>\n", ROW),
        (conversation(RESPONSE), STRIPS, "", ROW + "'.*</think>cat'"),
        ([*conversation("a"), turn("assistant", "b" + END)], CONTENT, "", ROW),
        (conversation(f"a{END}{PROMPT}b"), CONTENT, "", "got 2 for 1"),
        (conversation("<answer>cat</answer>"), CONTENT, "<think>", "begin as the generation prompt of rollouts"),
    ],
)  # fmt: skip
def test_what_would_be_another_text(trained, messages, content, opening, message):
    with pytest.raises(ValueError, match=message):
        trained(messages, content, opening)


def test_what_the_template_leaves_out_of_other_turns(trained):
    with pytest.raises(ValueError, match="must write the text of every turn; got none of 'Tag <b>cat</b>' of the user"):
        trained([turn("user", "Tag <b>cat</b>"), turn("assistant", "a")], "{{ content['text'] | striptags }}")


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_every_family_trains_on_its_responses(model_type, family_processor, family_model):
    """The templates of the families write responses as they are: the mask is that of the roles."""
    processor, config = family_processor(model_type), family_model(model_type).config
    role_map = get_family(model_type).role_map(processor.tokenizer, config)
    thinks = "{think}" in SPECS[model_type].reply
    several = sample_messages(2, turns=2, system=True)
    kwargs = SPECS[model_type].template_kwargs
    if kwargs:  # Otherwise a prompt ends in an empty thought.
        with pytest.raises(ValueError, match="begin as the generation prompt of rollouts does"):
            response_mask(processor, role_map, several[:3], render(processor, several[:3]))
    if thinks:  # Their templates drop the thought of an earlier turn, which is not trained on then.
        with pytest.raises(ValueError, match="a rendered response must be the row's text"):
            response_mask(processor, role_map, several, render(processor, several, template_kwargs=kwargs), kwargs)
        several = several[:3]
    for messages in (sample_messages(1), several, sample_messages(0)):
        rendered = render(processor, messages, template_kwargs=kwargs)
        mask_S = response_mask(processor, role_map, messages, rendered, kwargs)
        ids_1S = rendered.ids_S[None]
        response_S = role_map(ids_1S, torch.ones_like(ids_1S))[0] == TokenRole.RESPONSE
        if thinks:  # A rollout gets the opening as part of its prompt.
            opening = processor.tokenizer.decode(rendered.ids_S[response_S & ~mask_S])
            assert opening == "<think>\n" and not bool((mask_S & ~response_S).any())
            assert int(response_S.nonzero()[0]) < int(mask_S.nonzero()[0])
        else:
            assert torch.equal(mask_S, response_S)
        untrained = [{**message, "loss_mask": 0} for message in messages]
        assert not bool(response_mask(processor, role_map, untrained, rendered, kwargs).any())
    assert special_tokens(processor.tokenizer, role_map, config)


THOUGHT_ROW = "<think>I look.</think><answer>cat</answer>"
NAMES = [*sorted(FAMILIES), "gemma4_large", "glm4_6v"]
# Which rows the prompts of these settings go with, where it is not both: with a thought, or without.
WITH, WITHOUT = [THOUGHT_ROW], ["cat"]
SETTINGS = {"default": {}, "off": {"enable_thinking": False}, "on": {"enable_thinking": True}}
ROWS_OF = {
    **dict.fromkeys(["qwen3_5", "qwen3_5_moe"], {"default": WITH, "off": WITHOUT, "on": WITH}),
    "minicpmv4_6": {"default": WITHOUT, "off": WITHOUT, "on": WITH},
    "glm4_6v": {"default": WITH, "off": WITHOUT, "on": WITH},
}


SWITCHED = [*ROWS_OF, "gemma4", "gemma4_large"]  # Their templates read `enable_thinking`.


@pytest.mark.parametrize(
    "name, setting",
    [(name, setting) for name in NAMES for setting in SETTINGS if setting == "default" or name in SWITCHED],
)
def test_the_prompt_of_the_cold_start_is_that_of_rollouts(name, setting, family_processor, family_model):
    """Token by token up to the first one that is trained on; a row that cannot have it is refused."""
    model_type = {"gemma4_large": "gemma4", "glm4_6v": "glm4v"}.get(name, name)
    folder = "glm4v" if name == "glm4_6v" else name
    processor, config = family_processor(folder), family_model(folder).config
    if name == "glm4_6v":
        processor = copy.copy(processor)
        processor.chat_template = (TEMPLATES / "glm4_6v.jinja").read_text()
    role_map = get_family(model_type).role_map(processor.tokenizer, config)
    question, kwargs = sample_messages(1, system=True, answered=False), SETTINGS[setting]
    prompt = render(processor, question, add_generation_prompt=True, template_kwargs=kwargs).ids_S
    fits = []
    for answer in (THOUGHT_ROW, "cat"):
        messages = [*question, {"role": "assistant", "content": answer}]
        rendered = render(processor, messages, template_kwargs=kwargs)
        try:
            mask_S = response_mask(processor, role_map, messages, rendered, kwargs)
        except ValueError as error:
            assert "begin as the generation prompt" in str(error) or "must be the row's text" in str(error)
            continue
        fits.append(answer)
        first = int(mask_S.nonzero()[0])
        if model_type == "llava_onevision":  # Its header differs by a space.
            assert (
                processor.tokenizer.decode(rendered.ids_S[:first]).split() == processor.tokenizer.decode(prompt).split()
            )
        else:
            assert rendered.ids_S[:first].tolist() == prompt.tolist()
        assert bool(mask_S[first:].all()) or model_type not in ("qwen2_vl", "qwen3_5", "gemma4")
    assert fits == ROWS_OF.get(name, {}).get(setting, [THOUGHT_ROW, "cat"])


def test_a_native_thought_that_the_template_takes_out_is_refused(family_processor, family_model):
    processor, config = family_processor("gemma4_large"), family_model("gemma4_large").config
    role_map = get_family("gemma4").role_map(processor.tokenizer, config)
    messages = [turn("user", "What?"), turn("assistant", "<|channel>thought\nI look.<channel|>cat")]
    with pytest.raises(ValueError, match=ROW + "'.*cat' for '<.channel>thought"):
        response_mask(processor, role_map, messages, render(processor, messages))


@pytest.mark.parametrize("effort", ["low", "high"])
def test_a_text_of_effort_in_the_system_turn_is_prompt(effort, trained, tiny_processor, tiny_config):
    """As Qwen3.8 writes it: the setting decides the prompt of both stages, and the system turn is SYSTEM."""
    processor = copy.copy(tiny_processor)
    processor.chat_template = (
        "<|im_start|>system\nEffort: {{ reasoning_effort }}.<|im_end|>\n" + processor.chat_template
    )
    messages, kwargs = conversation("cat"), {"reasoning_effort": effort}
    role_map = get_family("qwen2_5_vl").role_map(processor.tokenizer, tiny_config)
    prompt = render(processor, messages[:-1], add_generation_prompt=True, template_kwargs=kwargs).ids_S
    rendered = render(processor, messages, template_kwargs=kwargs)
    mask_S = response_mask(processor, role_map, messages, rendered, kwargs)
    assert rendered.ids_S[: int(mask_S.nonzero()[0])].tolist() == prompt.tolist()
    system_S = role_map(prompt[None])[0] == TokenRole.SYSTEM
    assert f"Effort: {effort}." in processor.tokenizer.decode(prompt[system_S])
    with pytest.raises(ValueError, match="begin as the generation prompt|must be the row's text|one response"):
        response_mask(processor, role_map, [*messages, turn("assistant", "dog")], rendered, kwargs)
