# SPDX-License-Identifier: Apache-2.0
"""Roles of every family's chat format against tokens labelled by hand, one letter a token.

The tokenizers hold the special tokens of the family and spell everything else in words and single characters.
"""

from types import SimpleNamespace

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from avar_verl.model.families import FAMILIES, get_family
from avar_verl.roles import RoleMap, TokenRole

ROLE = {"o": TokenRole.OTHER, "s": TokenRole.SYSTEM, "i": TokenRole.IMAGE, "u": TokenRole.USER, "r": TokenRole.RESPONSE}
WORDS = ["system", "user", "assistant", "model", "INST", "USER", "ASSISTANT", "User", "Assistant", "System", "tool"]
WORDS += ["Be", "kind", "What", "cat", "dog", "\n", "\n\n", "[", "]", "/", ":", "<<", ">>", "SYS", "</"]

CHATML = [
    ("<|im_start|> system \n Be kind <|im_end|> \n", "sssssss"),
    ("<|im_start|> user \n IMG IMG What <|im_end|> \n", "uuuiiuuu"),
    ("<|im_start|> assistant \n cat <|im_end|> \n", "ooorrr"),
    ("<|im_start|> tool \n dog <|im_end|> \n", "oooooo"),
    ("<|im_start|> user \n IMG What <|im_end|> \n", "uuuiuuu"),
    ("<|im_start|> assistant \n dog <|im_end|>", "ooorr"),
]
LLAMA3 = [
    ("<|begin_of_text|>", "s"),
    ("<|start_header_id|> system <|end_header_id|> \n\n Be kind <|eot_id|>", "sssssss"),
    ("<|start_header_id|> user <|end_header_id|> \n\n IMG What <|eot_id|>", "uuuuiuu"),
    ("<|start_header_id|> assistant <|end_header_id|> \n\n cat dog <|eot_id|>", "oooorrr"),
    ("<|start_header_id|> user <|end_header_id|> \n\n What <|eot_id|>", "uuuuuu"),
    ("<|start_header_id|> assistant <|end_header_id|> \n\n dog", "oooor"),
]
# Family -> placeholder, special tokens, turns.
CASES = {
    "qwen2_5_vl": ("<|image_pad|>", ["<|im_start|>", "<|im_end|>"], CHATML),
    "qwen2_vl": ("<|image_pad|>", ["<|im_start|>", "<|im_end|>"], CHATML),
    "qwen3_vl": ("<|image_pad|>", ["<|im_start|>", "<|im_end|>"], CHATML),
    "qwen3_vl_moe": ("<|image_pad|>", ["<|im_start|>", "<|im_end|>"], CHATML),
    "qwen3_5": ("<|image_pad|>", ["<|im_start|>", "<|im_end|>"], CHATML),
    "qwen3_5_moe": ("<|image_pad|>", ["<|im_start|>", "<|im_end|>"], CHATML),
    "minicpmv4_6": ("<|image_pad|>", ["<|im_start|>", "<|im_end|>"], CHATML),
    "internvl": ("<IMG_CONTEXT>", ["<|im_start|>", "<|im_end|>"], CHATML),
    "llava_onevision": ("<image>", ["<|im_start|>", "<|im_end|>"], CHATML),
    "gemma3": (
        "<image_soft_token>",
        ["<bos>", "<start_of_turn>", "<end_of_turn>"],
        [
            ("<bos>", "s"),
            ("<start_of_turn> user \n Be kind \n\n IMG IMG What <end_of_turn> \n", "uuuuuuiiuuu"),
            ("<start_of_turn> model \n cat <end_of_turn> \n", "ooorrr"),
            ("<start_of_turn> user \n What <end_of_turn> \n", "uuuuuu"),
            ("<start_of_turn> model \n dog <end_of_turn>", "ooorr"),
        ],
    ),
    "glm4v": (
        "<|image|>",
        ["[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<|endoftext|>"],
        [
            ("[gMASK] <sop> <|system|> \n Be kind", "ssssss"),
            ("<|user|> \n IMG IMG What", "uuiiu"),
            ("<|assistant|> \n cat dog", "oorr"),
            ("<|observation|> \n cat", "ooo"),
            ("<|user|> \n What", "uuu"),
            ("<|assistant|> \n dog <|endoftext|>", "oorr"),
        ],
    ),
    "idefics3": (
        "<image>",
        ["<|begin_of_text|>", "<end_of_utterance>", "<fake_token_around_image>"],
        [
            ("<|begin_of_text|> System : Be kind <end_of_utterance> \n", "sssssss"),
            ("User : <fake_token_around_image> IMG IMG What <end_of_utterance> \n", "uuuiiuuu"),
            ("Assistant : cat User : dog <end_of_utterance> \n", "oorrrrrr"),  # Ordinary words open no turn inside one.
            ("User : What <end_of_utterance> \n", "uuuuu"),
            ("Assistant : dog <end_of_utterance>", "oorr"),
        ],
    ),
    "smolvlm": (
        "<image>",
        ["<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>"],
        [
            ("<|im_start|>", "s"),
            ("User : <fake_token_around_image> IMG What <end_of_utterance> \n", "uuuiuuu"),
            ("Assistant : cat <end_of_utterance> \n", "oorrr"),
        ],
    ),
    "llava_next": (
        "<image>",
        ["<s>", "</s>"],
        [
            ("<s> << SYS >> \n Be kind \n << / SYS >>", "ssssssssssss"),
            ("[ INST ] IMG IMG What", "uuuiiu"),
            ("[ / INST ] cat </s>", "oooorr"),
            ("[ INST ] What", "uuuu"),
            ("[ / INST ] dog", "oooor"),
        ],
    ),
    "mllama": (
        "<|image|>",
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        # No feature replaces the placeholder, so it is a token of its turn.
        [(text, letters.replace("i", "u")) for text, letters in LLAMA3],
    ),
}
CASES["glm4v_moe"] = CASES["glm4v"]
CASES["mistral3"] = (
    "[IMG]",
    ["<s>", "</s>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]", "[IMG_BREAK]", "[IMG_END]"],
    [
        ("<s> [SYSTEM_PROMPT] Be kind [/SYSTEM_PROMPT]", "sssss"),
        ("[INST] IMG [IMG_BREAK] IMG [IMG_END] What", "uiuiuu"),
        ("[/INST] cat dog </s>", "orrr"),
        ("[INST] What", "uu"),
        ("[/INST] dog", "or"),
    ],
)
CASES["lfm2_vl"] = (
    "<image>",
    ["<|startoftext|>", "<|im_start|>", "<|im_end|>"],
    [("<|startoftext|>", "s"), *CHATML],
)
CASES["gemma4"] = (
    "<|image|>",
    ["<bos>", "<|turn>", "<turn|>", "<|image>", "<image|>"],
    [
        ("<bos>", "s"),
        ("<|turn> system \n Be kind <turn|> \n", "sssssss"),
        ("<|turn> user \n <|image> IMG IMG <image|> What <turn|> \n", "uuuuiiuuuu"),
        ("<|turn> model \n cat <turn|> \n", "ooorrr"),
        ("<|turn> tool \n dog <turn|> \n", "oooooo"),
        ("<|turn> user \n What <turn|> \n", "uuuuuu"),
        ("<|turn> model \n dog <turn|>", "ooorr"),
    ],
)
VICUNA = [
    ("<s> Be kind", "sss"),
    ("USER : IMG What", "uuiu"),
    ("ASSISTANT : cat </s>", "oorr"),
    ("USER : What", "uuu"),
    ("ASSISTANT : dog", "oor"),
]
LLAVA_NEXT = {
    "mistral": (CASES["llava_next"][1], CASES["llava_next"][2], "[INST]"),
    "vicuna": (["<s>", "</s>"], VICUNA, "USER:"),
    "chatml": (["<|im_start|>", "<|im_end|>"], CHATML, "<|im_start|>"),
    "llama3": (CASES["mllama"][1], LLAMA3, "<|start_header_id|>"),
}


def make_tokenizer(placeholder: str, specials: list[str], chat_template: str = "") -> PreTrainedTokenizerFast:
    vocab = {token: index for index, token in enumerate(["<pad>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n+|\p{L}+|<<|>>|</|[^\p{L}\n]"), behavior="isolated")
    tokenizer.add_special_tokens(["<pad>", "<unk>", *specials, placeholder])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token=specials[0],
        chat_template=chat_template,
    )


def labelled(tokenizer, turns, placeholder: str):
    tokens = [
        placeholder if token == "IMG" else token for text, _ in turns for token in text.replace("\n", "\\n").split(" ")
    ]
    ids = [tokenizer.convert_tokens_to_ids(token.replace("\\n", "\n")) for token in tokens]
    roles = [int(ROLE[letter]) for _, letters in turns for letter in letters]
    assert len(ids) == len(roles) and tokenizer.unk_token_id not in ids, "the labelling must fit the vocabulary"
    return ids, roles


def make_role_map(model_type: str, tokenizer, placeholder: str) -> RoleMap:
    names = get_family(model_type).placeholders
    config = SimpleNamespace(
        model_type=model_type, **dict.fromkeys(names, tokenizer.convert_tokens_to_ids(placeholder))
    )
    return RoleMap.from_pretrained(tokenizer, config)


def check_row(role_map, tokenizer, ids, roles):
    assert role_map(torch.tensor([ids])).tolist() == [roles]
    pad, other = [tokenizer.pad_token_id] * 3, [0] * 3
    padded = torch.tensor([pad + ids + pad])
    mask = (padded != tokenizer.pad_token_id).long()
    assert role_map(padded, mask).tolist() == [other + roles + other]
    assert role_map(padded).tolist() == [other + roles + other]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_roles_equal_the_labels_alone_padded_and_packed(model_type):
    placeholder, specials, turns = CASES[model_type]
    tokenizer = make_tokenizer(placeholder, specials, chat_template=LLAVA_NEXT["mistral"][2])
    role_map = make_role_map(model_type, tokenizer, placeholder)
    ids, roles = labelled(tokenizer, turns, placeholder)
    check_row(role_map, tokenizer, ids, roles)
    check_row(role_map, tokenizer, ids + ids, roles + roles)
    # A sample that was cut inside its last response, and one without an image, in front of another one.
    cut = len(ids) - 1
    check_row(role_map, tokenizer, ids[:cut], roles[:cut])
    if tokenizer.bos_token_id != ids[0] or turns is CHATML:
        return
    text_only = [(token, role) for token, role in zip(ids, roles, strict=True) if role != TokenRole.IMAGE]
    check_row(role_map, tokenizer, [t for t, _ in text_only] + ids, [r for _, r in text_only] + roles)


@pytest.mark.parametrize("name", LLAVA_NEXT)
def test_llava_next_reads_its_format_off_the_chat_template(name):
    specials, turns, mark = LLAVA_NEXT[name]
    tokenizer = make_tokenizer("<image>", specials, chat_template=f"{{{{ '{mark}' }}}}")
    role_map = make_role_map("llava_next", tokenizer, "<image>")
    check_row(role_map, tokenizer, *labelled(tokenizer, turns, "<image>"))


def test_llava_next_without_a_known_chat_template_is_refused():
    tokenizer = make_tokenizer("<image>", ["<s>", "</s>"], chat_template="{{ messages }}")
    with pytest.raises(ValueError, match="LLaVA-NeXT's roles need a chat template with one of"):
        make_role_map("llava_next", tokenizer, "<image>")


def test_idefics3_with_another_first_token_is_refused():
    tokenizer = make_tokenizer("<image>", ["<s>", "<end_of_utterance>"])
    with pytest.raises(ValueError, match="Idefics3's roles need the bos_token.*got '<s>'"):
        make_role_map("idefics3", tokenizer, "<image>")


@pytest.mark.parametrize("model_type", [name for name in FAMILIES if name != "llava_next"])
def test_a_tokenizer_of_another_model_is_refused(model_type):
    tokenizer = make_tokenizer(CASES[model_type][0], ["<x>"])
    with pytest.raises(ValueError, match="Check that this is the tokenizer the model was trained with"):
        make_role_map(model_type, tokenizer, CASES[model_type][0])


def test_every_family_is_reachable_by_all_its_model_types():
    for model_type in FAMILIES:
        assert model_type in get_family(model_type).model_types
    assert set(FAMILIES) == {name for key in FAMILIES for name in get_family(key).model_types}
