# SPDX-License-Identifier: Apache-2.0
"""Roles against tokenizations labelled by hand."""

import re
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf

from avar_verl.model.roles import prompt_images
from avar_verl.model.turns import CHATML, Turns
from avar_verl.roles import RoleMap, TokenRole
from avar_verl.tools.demo import photo_grid

ROLE = {"o": TokenRole.OTHER, "s": TokenRole.SYSTEM, "i": TokenRole.IMAGE, "u": TokenRole.USER, "r": TokenRole.RESPONSE}

# One token per list entry, one letter per token.
SYSTEM = (["<|im_start|>", "system", "\n", "You", " are", "<|im_end|>", "\n"], "sssssss")
USER_IMAGE = (
    ["<|im_start|>", "user", "\n", "<|vision_start|>", "<|image_pad|>", "<|image_pad|>", "<|vision_end|>", "What"]
    + ["<|im_end|>", "\n"],
    "uuuuiiuuuu",
)
USER_TWO_IMAGES = (
    ["<|im_start|>", "user", "\n", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"]
    + ["<|vision_start|>", "<|image_pad|>", "<|image_pad|>", "<|vision_end|>", "What", "<|im_end|>", "\n"],
    "uuuuiu" + "uiiuuuu",
)
USER_TEXT = (["<|im_start|>", "user", "\n", "What", "<|im_end|>", "\n"], "uuuuuu")
USER_VIDEO = (["<|im_start|>", "user", "\n", "<|video_pad|>", "What", "<|im_end|>", "\n"], "uuuiuuu")
HEADER = (["<|im_start|>", "assistant", "\n"], "ooo")
ANSWER = (["<|im_start|>", "assistant", "\n", " cat", ".", "<|im_end|>", "\n"], "ooorrrr")
ROLLOUT = (["<|im_start|>", "assistant", "\n", " cat", "<|im_end|>"], "ooorr")  # a policy stops at the delimiter
CUT = (["<|im_start|>", "assistant", "\n", " cat", "."], "ooorr")
TOOL = (["<|im_start|>", "t", "o", "o", "l", "\n", "8", "<|im_end|>", "\n"], "ooooooooo")
PAD = (["<|endoftext|>"] * 3, "ooo")

CASES = {
    "one image": [SYSTEM, USER_IMAGE, ANSWER],
    "text only": [SYSTEM, USER_TEXT, ANSWER],
    "no system turn": [USER_IMAGE, ANSWER],
    "two images in one turn": [SYSTEM, USER_TWO_IMAGES, ANSWER],
    "two images in two turns": [SYSTEM, USER_IMAGE, ANSWER, USER_IMAGE, ANSWER],
    "video": [SYSTEM, USER_VIDEO, ANSWER],
    "tool turn": [SYSTEM, USER_IMAGE, ANSWER, TOOL, ANSWER],
    "prompt only": [SYSTEM, USER_IMAGE, HEADER],
    "rollout": [SYSTEM, USER_IMAGE, ROLLOUT],
    "packed": [SYSTEM, USER_IMAGE, ANSWER, SYSTEM, USER_TEXT, ANSWER],
    "packed, the first cut short": [SYSTEM, USER_IMAGE, CUT, SYSTEM, USER_TEXT, ANSWER],
    "packed and padded": [SYSTEM, USER_IMAGE, ROLLOUT, SYSTEM, USER_TEXT, CUT, PAD],
    "cut short": [SYSTEM, USER_IMAGE, CUT],
    "cut short after its header": [SYSTEM, USER_IMAGE, (["<|im_start|>", "assistant"], "oo")],
    "cut short after its delimiter": [SYSTEM, USER_IMAGE, (["<|im_start|>"], "o")],
    "padded on the right": [SYSTEM, USER_IMAGE, ANSWER, PAD],
    "a rollout padded on the right": [SYSTEM, USER_IMAGE, ROLLOUT, PAD],
    "cut short and padded": [SYSTEM, USER_IMAGE, CUT, PAD],
    "padded on the left": [PAD, SYSTEM, USER_IMAGE, ANSWER],
    "a prompt padded on both sides": [PAD, SYSTEM, USER_IMAGE, HEADER, PAD],
    "padding only": [PAD],
}


def ids_and_roles(tokenizer, parts):
    tokens = [token for part, _ in parts for token in part]
    letters = "".join(letters for _, letters in parts)
    table = [tokenizer.encode(token, add_special_tokens=False) for token in tokens]
    assert all(len(entry) == 1 for entry in table), "the hand labelling assumes one id a token"
    return torch.tensor([[entry[0] for entry in table]]), torch.tensor([[int(ROLE[letter]) for letter in letters]])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("with_mask", [False, True])
def test_roles_equal_the_hand_labelled_tokenization(role_map, tiny_processor, name, with_mask):
    ids, expected = ids_and_roles(tiny_processor.tokenizer, CASES[name])
    mask = (ids != tiny_processor.tokenizer.pad_token_id).long() if with_mask else None
    roles = role_map(ids, mask)
    assert roles.tolist() == expected.tolist() and roles.dtype == torch.int64


DEFAULT_SYSTEM = (
    ["<|im_start|>", "system", "\n", "You", " are", " a", " helpful", " assistant", ".", "<|im_end|>", "\n"],
    "sssssssssss",
)
SHORT_SYSTEM = (["<|im_start|>", "system", "\n", "You", " are", "<|im_end|>", "\n"], "sssssss")
TEMPLATE_IMAGE = (
    ["<|im_start|>", "user", "\n", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "You", "<|im_end|>", "\n"],
    "uuuuiuuuu",
)
TEMPLATE_VIDEO = (
    ["<|im_start|>", "user", "\n", "<|vision_start|>", "<|video_pad|>", "<|vision_end|>", "You", "<|im_end|>", "\n"],
    "uuuuiuuuu",
)
TEMPLATE_TEXT = (["<|im_start|>", "user", "\n", "You", "<|im_end|>", "\n"], "uuuuuu")
TEMPLATE_ANSWER = (["<|im_start|>", "assistant", "\n", "You", " are", "<|im_end|>", "\n"], "ooorrrr")
TEMPLATE_TOOL = (["<|im_start|>", "t", "o", "o", "l", "\n", "You", "<|im_end|>", "\n"], "ooooooooo")


def message(role: str, text: str, *media: str) -> dict:
    return {"role": role, "content": [*({"type": kind} for kind in media), {"type": "text", "text": text}]}


@pytest.mark.parametrize(
    "messages, parts",
    [
        (
            [message("user", "You", "image"), message("assistant", "You are")],
            [DEFAULT_SYSTEM, TEMPLATE_IMAGE, TEMPLATE_ANSWER],
        ),
        (
            [message("system", "You are"), message("user", "You", "image"), message("assistant", "You are")],
            [SHORT_SYSTEM, TEMPLATE_IMAGE, TEMPLATE_ANSWER],
        ),
        (
            [message("user", "You"), message("assistant", "You are")],
            [DEFAULT_SYSTEM, TEMPLATE_TEXT, TEMPLATE_ANSWER],
        ),
        (
            [message("user", "You", "video"), message("assistant", "You are")],
            [DEFAULT_SYSTEM, TEMPLATE_VIDEO, TEMPLATE_ANSWER],
        ),
        (
            [message("user", "You", "image"), message("assistant", "You are"), message("tool", "You")]
            + [message("assistant", "You are"), message("user", "You"), message("assistant", "You are")],
            [DEFAULT_SYSTEM, TEMPLATE_IMAGE, TEMPLATE_ANSWER, TEMPLATE_TOOL, TEMPLATE_ANSWER, TEMPLATE_TEXT]
            + [TEMPLATE_ANSWER],
        ),
    ],
    ids=["default system", "explicit system", "text only", "video", "tool and turns"],
)
def test_roles_of_the_chat_template(role_map, tiny_processor, messages, parts):
    tokenizer = tiny_processor.tokenizer
    ids = tokenizer.encode(tiny_processor.apply_chat_template(messages), add_special_tokens=False)
    assert [tokenizer.decode([token]) for token in ids] == [token for part, _ in parts for token in part]
    expected = [int(ROLE[letter]) for _, letters in parts for letter in letters]
    assert role_map(torch.tensor([ids])).tolist() == [expected]


def test_rows_of_a_batch_do_not_touch(role_map, tiny_processor):
    first, first_roles = ids_and_roles(tiny_processor.tokenizer, [SYSTEM, USER_IMAGE, CUT, PAD])
    second, second_roles = ids_and_roles(tiny_processor.tokenizer, [PAD, SYSTEM, USER_IMAGE, CUT])
    roles = role_map(torch.cat([first, second]))
    assert roles.tolist() == first_roles.tolist() + second_roles.tolist()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.float32])
def test_integer_and_mask_types(role_map, tiny_processor, dtype, mask_dtype):
    ids, expected = ids_and_roles(tiny_processor.tokenizer, [SYSTEM, USER_IMAGE, CUT, PAD])
    mask = (ids != tiny_processor.tokenizer.pad_token_id).to(mask_dtype)
    roles = role_map(ids.to(dtype), mask, (expected == TokenRole.RESPONSE).to(mask_dtype))
    assert roles.tolist() == expected.tolist() and roles.dtype == torch.int64


def test_a_response_that_ends_with_the_padding_token(role_map, tiny_processor):
    """`<|endoftext|>` also ends a generation: a mask tells it from padding, and without one it cannot be told."""
    ids, roles = ids_and_roles(tiny_processor.tokenizer, [SYSTEM, USER_IMAGE, CUT, (["<|endoftext|>"], "r"), PAD])
    mask = torch.ones_like(ids)
    mask[:, -len(PAD[0]) :] = 0
    assert role_map(ids, mask).tolist() == roles.tolist()
    roles[:, -len(PAD[0]) - 1] = TokenRole.OTHER
    assert role_map(ids).tolist() == roles.tolist()


def test_response_mask_wins_over_ids_a_policy_has_written(role_map, tiny_processor):
    """A rollout may hold an image placeholder or open a user turn: that stays a response, nothing else becomes one."""
    written = ["<|image_pad|>", "<|im_start|>", "user", "\n", " cat", "<|im_end|>", "\n", "<|im_start|>", "system"]
    earlier = (ANSWER[0], "ooooooo")  # an answer of the prompt, not of this rollout
    parts = [SYSTEM, USER_IMAGE, earlier, USER_TEXT, HEADER, (written, "r" * len(written)), PAD]
    ids, expected = ids_and_roles(tiny_processor.tokenizer, parts)
    response = (expected == TokenRole.RESPONSE).long()
    assert role_map(ids, None, response).tolist() == expected.tolist()
    # Padding is never a response, even where a response mask covers the whole tail.
    attention = torch.ones_like(ids)
    attention[:, -3:] = 0
    response[:, -3:] = 1
    assert role_map(ids, attention, response).tolist() == expected.tolist()


def test_without_a_response_mask_written_ids_are_taken_at_their_word(role_map, tiny_processor):
    written = (["<|image_pad|>", " cat", "<|im_start|>", "user", "\n", " cat"], "ir" + "uuuu")
    ids, expected = ids_and_roles(tiny_processor.tokenizer, [SYSTEM, USER_IMAGE, HEADER, written])
    assert role_map(ids).tolist() == expected.tolist()


def messages_of(index: int, messages: list) -> list:
    """Variants of one photo-grid sample: as it is, with a system turn, with another question and answer."""
    system = {"role": "system", "content": "You are"}
    more = [{"role": "user", "content": "What"}, {"role": "assistant", "content": " cat."}]
    return [list(messages), [system, *messages], [*messages, *more], [system, *messages, *more]][index % 4]


def test_response_is_what_verl_trains_on(role_map, tiny_processor, tmp_path):
    from verl.utils.dataset.multiturn_sft_dataset import MultiTurnSFTDataset

    path = tmp_path / "sft.parquet"
    photo_grid.make_sft_parquet(path, 8, 0, "train")
    rows = pd.read_parquet(path)
    rows["messages"] = [messages_of(index, messages) for index, messages in enumerate(rows["messages"])]
    rows.to_parquet(path)
    config = OmegaConf.create({"pad_mode": "no_padding", "max_length": 512})
    dataset = MultiTurnSFTDataset(str(path), tiny_processor.tokenizer, config, tiny_processor)
    assert len(dataset) == 8
    for row in (dataset[index] for index in range(8)):
        roles = role_map(row["input_ids"][None])[0]
        assert ((roles == TokenRole.RESPONSE) == row["loss_mask"].bool()).all()
        assert int((roles == TokenRole.IMAGE).sum()) == 16
        assert bool((roles == TokenRole.SYSTEM).any()) and bool((roles == TokenRole.RESPONSE).any())


VOCABULARY = {"<|im_start|>": 0, "<|im_end|>": 1, "\n": 2}
PIECES = {"system": [3, 4], "user": [5], "assistant": [6, 7]}


def fake_tokenizer(pad_token_id=None, unk_token_id=None, **changes):
    table = {**{text: [token] for text, token in VOCABULARY.items()}, **PIECES, **changes}
    known = re.compile("|".join(map(re.escape, table)))

    def encode(text, add_special_tokens):
        return [token for piece in known.findall(text) for token in table[piece]]

    return SimpleNamespace(encode=encode, unk_token_id=unk_token_id, pad_token_id=pad_token_id)


def test_names_of_several_tokens_and_a_delimiter_that_pads():
    turns = Turns.from_tokenizer(fake_tokenizer(pad_token_id=1), CHATML)
    ids = torch.tensor([[1, 1, 0, 3, 4, 2, 9, 1, 2, 0, 5, 2, 9, 1, 2, 0, 6, 7, 2, 9, 9, 1, 1, 1]])
    #                    o  o  s  s  s  s  s  s  s  u  u  u  u  u  u  o  o  o  o  r  r  r  o  o
    expected = [[0, 0, 1, 1, 1, 1, 1, 1, 1, 3, 3, 3, 3, 3, 3, 0, 0, 0, 0, 4, 4, 4, 0, 0]]
    assert turns(ids).tolist() == expected
    # The first piece of a name is not a name.
    assert turns(torch.tensor([[0, 6, 9, 9], [0, 3, 2, 9]])).tolist() == [[0, 0, 0, 0], [0, 0, 0, 0]]


def test_a_tokenizer_will_do_for_a_processor(tiny_processor, tiny_config):
    ids, expected = ids_and_roles(tiny_processor.tokenizer, CASES["one image"])
    assert RoleMap.from_pretrained(tiny_processor.tokenizer, tiny_config)(ids).tolist() == expected.tolist()


def test_unknown_family_names_the_known_ones(tiny_processor):
    with pytest.raises(ValueError, match="got model_type='llava'.*Known families: .*qwen2_5_vl"):
        RoleMap.from_pretrained(tiny_processor, SimpleNamespace(model_type="llava"))


@pytest.mark.parametrize("text", ["<|im_start|>", "<|im_end|>", "\n"])
@pytest.mark.parametrize("encoded", [[1, 2], [], [8]], ids=["split", "dropped", "unknown"])
def test_a_tokenizer_without_delimiters_is_refused(tiny_config, text, encoded):
    tokenizer = fake_tokenizer(unk_token_id=8, **{text: encoded})
    with pytest.raises(ValueError, match="as one token of the vocabulary") as error:
        RoleMap.from_pretrained(tokenizer, tiny_config)
    assert f"need {text!r}" in str(error.value)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((torch.zeros(3, dtype=torch.long),), r"input_ids must be \(B, S\); got \(3,\)"),
        ((torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 4)), "attention_mask must have the shape"),
        ((torch.zeros(1, 3, dtype=torch.long), None, torch.ones(2, 3)), "response_mask must have the shape"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(role_map, arguments, message):
    with pytest.raises(ValueError, match=message):
        role_map(*arguments)


def test_values_of_the_roles_are_fixed():
    assert {role.name: int(role) for role in TokenRole} == dict(OTHER=0, SYSTEM=1, IMAGE=2, USER=3, RESPONSE=4)


# What a policy wrote (its mask), what verl's agent loop put after it, and what the loop appended for a tool.
CALL = (["<|im_start|>", "assistant", "\n", " cat", "<|im_end|>", "\n"], "ooorro")
TOOL_TURN = (
    ["<|im_start|>", "t", "o", "o", "l", "\n", "<|vision_start|>", "<|image_pad|>", "<|image_pad|>", "<|vision_end|>"]
    + ["You", "<|im_end|>", "\n"],
    "oooooo" + "oiiooo" + "o",  # As Qwen2.5-VL writes it: a turn with a name of its own.
)
USER_TURN = (USER_IMAGE[0], "uuuuiiuuuu")  # As Qwen3-VL writes it: a user's turn.


@pytest.mark.parametrize("tool", [TOOL_TURN, USER_TURN], ids=["tool", "user"])
def test_roles_of_a_rollout_with_images_from_a_tool(role_map, tiny_processor, tool):
    """Images of a tool are IMAGE, or nothing where those of the prompt alone count; its turn is OTHER or USER."""
    ids, expected = ids_and_roles(tiny_processor.tokenizer, [SYSTEM, USER_IMAGE, CALL, tool, ROLLOUT, PAD])
    roles = role_map(ids, ids != tiny_processor.tokenizer.pad_token_id, expected == TokenRole.RESPONSE)
    assert roles.tolist() == expected.tolist()
    prompt = ids_and_roles(
        tiny_processor.tokenizer, [SYSTEM, USER_IMAGE, CALL, (tool[0], tool[1].replace("i", "o")), ROLLOUT, PAD]
    )[1]
    assert prompt_images(roles).tolist() == prompt.tolist()
    assert prompt_images(expected[:, :17]).tolist() == expected[:, :17].tolist(), "a prompt loses nothing"


def test_images_of_a_prompt_with_several_turns(role_map, tiny_processor):
    """Earlier answers in a prompt are no response, so that all of its images count."""
    ids, expected = ids_and_roles(tiny_processor.tokenizer, [SYSTEM, USER_IMAGE, ANSWER, USER_IMAGE, ROLLOUT])
    mask = torch.zeros_like(ids)
    mask[:, -2:] = 1
    roles = role_map(ids, None, mask)
    assert (roles == TokenRole.IMAGE).sum() == 4 and prompt_images(roles).tolist() == roles.tolist()
