# SPDX-License-Identifier: Apache-2.0
"""Which tokens are trained on: the responses of the row, or an error."""

import copy

import pytest
import torch

from avar_verl.model.families import FAMILIES, get_family
from avar_verl.model.render import render
from avar_verl.model.responses import response_mask, special_tokens
from avar_verl.model.roles import TokenRole
from tests.model.families.tiny import SPECS, sample_messages

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
