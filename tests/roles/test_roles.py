# SPDX-License-Identifier: Apache-2.0
"""Roles against tokenizations labelled by hand."""

from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf

from avar_verl.demo import photo_grid
from avar_verl.families.chatml import ChatMLTurns
from avar_verl.roles import RoleMap, TokenRole

ROLE = {"o": TokenRole.OTHER, "s": TokenRole.SYSTEM, "i": TokenRole.IMAGE, "u": TokenRole.USER, "r": TokenRole.RESPONSE}

# One token per line entry, one letter per token.
SYSTEM = (["<|im_start|>", "system", "\n", "You", " are", "<|im_end|>", "\n"], "sssssss")
USER_IMAGE = (
    ["<|im_start|>", "user", "\n", "<|vision_start|>", "<|image_pad|>", "<|image_pad|>", "<|vision_end|>", "What"]
    + ["<|im_end|>", "\n"],
    "uuuuiiuuuu",
)
USER_TEXT = (["<|im_start|>", "user", "\n", "What", "<|im_end|>", "\n"], "uuuuuu")
USER_VIDEO = (["<|im_start|>", "user", "\n", "<|video_pad|>", "What", "<|im_end|>", "\n"], "uuuiuuu")
ANSWER = (["<|im_start|>", "assistant", "\n", " cat", ".", "<|im_end|>", "\n"], "ooorrrr")
CUT = (["<|im_start|>", "assistant", "\n", " cat", "."], "ooorr")
TOOL = (["<|im_start|>", "t", "o", "o", "l", "\n", "8", "<|im_end|>", "\n"], "ooooooooo")
PAD = (["<|endoftext|>"] * 3, "ooo")

CASES = {
    "one image": [SYSTEM, USER_IMAGE, ANSWER],
    "text only": [SYSTEM, USER_TEXT, ANSWER],
    "no system turn": [USER_IMAGE, ANSWER],
    "two images in two turns": [SYSTEM, USER_IMAGE, ANSWER, USER_IMAGE, ANSWER],
    "video": [SYSTEM, USER_VIDEO, ANSWER],
    "tool turn": [SYSTEM, USER_IMAGE, ANSWER, TOOL, ANSWER],
    "packed": [SYSTEM, USER_IMAGE, ANSWER, SYSTEM, USER_TEXT, ANSWER],
    "packed, the first cut short": [SYSTEM, USER_IMAGE, CUT, SYSTEM, USER_TEXT, ANSWER],
    "cut short": [SYSTEM, USER_IMAGE, CUT],
    "padded on the right": [SYSTEM, USER_IMAGE, ANSWER, PAD],
    "cut short and padded": [SYSTEM, USER_IMAGE, CUT, PAD],
    "padded on the left": [PAD, SYSTEM, USER_IMAGE, ANSWER],
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
    assert role_map(ids, mask).tolist() == expected.tolist()


def test_rows_of_a_batch_do_not_touch(role_map, tiny_processor):
    first, first_roles = ids_and_roles(tiny_processor.tokenizer, [SYSTEM, USER_IMAGE, CUT, PAD])
    second, second_roles = ids_and_roles(tiny_processor.tokenizer, [PAD, SYSTEM, USER_IMAGE, CUT])
    roles = role_map(torch.cat([first, second]))
    assert roles.tolist() == first_roles.tolist() + second_roles.tolist()


def test_response_mask_wins_over_ids_a_policy_has_written(role_map, tiny_processor):
    """A rollout may hold an image placeholder or open a user turn: it stays a response, alone."""
    written = ["<|image_pad|>", "<|im_start|>", "user", "\n", " cat"]
    earlier = (ANSWER[0], "ooooooo")  # an answer of the prompt, not of this rollout
    header = (["<|im_start|>", "assistant", "\n"], "ooo")
    parts = [SYSTEM, USER_IMAGE, earlier, USER_TEXT, header, (written, "rrrrr")]
    ids, expected = ids_and_roles(tiny_processor.tokenizer, parts)
    response = torch.zeros_like(ids)
    response[:, -len(written) :] = 1
    assert role_map(ids, None, response).tolist() == expected.tolist()


def test_response_is_what_verl_trains_on(role_map, tiny_processor, tmp_path):
    from verl.utils.dataset.multiturn_sft_dataset import MultiTurnSFTDataset

    photo_grid.make_sft_parquet(tmp_path / "sft.parquet", 6, 0, "train")
    rows = pd.read_parquet(tmp_path / "sft.parquet")
    assert len(rows) == 6
    config = OmegaConf.create({"pad_mode": "no_padding", "max_length": 512})
    dataset = MultiTurnSFTDataset(str(tmp_path / "sft.parquet"), tiny_processor.tokenizer, config, tiny_processor)
    for index in range(6):
        row = dataset[index]
        roles = role_map(row["input_ids"][None])[0]
        assert ((roles == TokenRole.RESPONSE) == row["loss_mask"].bool()).all()
        assert int((roles == TokenRole.IMAGE).sum()) == 16


def test_names_of_several_tokens_and_a_delimiter_that_pads():
    vocabulary = {"<|im_start|>": 0, "<|im_end|>": 1, "\n": 2, "sys": 3, "tem": 4, "user": 5, "assis": 6, "tant": 7}
    pieces = {"system": [3, 4], "user": [5], "assistant": [6, 7]}
    tokenizer = SimpleNamespace(
        encode=lambda text, add_special_tokens: pieces.get(text) or [vocabulary[text]],
        unk_token_id=None,
        pad_token_id=1,
    )
    turns = ChatMLTurns.from_tokenizer(tokenizer)
    ids = torch.tensor([[0, 3, 4, 2, 9, 1, 2, 0, 6, 7, 2, 9, 9, 1, 1, 1]])
    #                    s  s  s  s  s  s  s  o  o  o  o  r  r  r  o  o
    assert turns(ids).tolist() == [[1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 4, 4, 4, 0, 0]]


def test_unknown_family_names_the_known_ones(tiny_processor):
    with pytest.raises(ValueError, match="got model_type='llava'.*Known families: .*qwen2_5_vl"):
        RoleMap.from_pretrained(tiny_processor, SimpleNamespace(model_type="llava"))


def test_a_tokenizer_without_delimiters_is_refused(tiny_config):
    tokenizer = SimpleNamespace(encode=lambda text, add_special_tokens: [1, 2], unk_token_id=None, pad_token_id=None)
    with pytest.raises(ValueError, match=r"need '<\|im_start\|>' as one token"):
        RoleMap.from_pretrained(tokenizer, tiny_config)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((torch.zeros(3, dtype=torch.long),), "input_ids must be"),
        ((torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 4)), "attention_mask must have the shape"),
        ((torch.zeros(1, 3, dtype=torch.long), None, torch.ones(2, 3)), "response_mask must have the shape"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(role_map, arguments, message):
    with pytest.raises(ValueError, match=message):
        role_map(*arguments)
