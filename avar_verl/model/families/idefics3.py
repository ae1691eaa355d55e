# SPDX-License-Identifier: Apache-2.0
"""Idefics3 and SmolVLM: turns open with `User:` and `Assistant:` and close with `<end_of_utterance>`.

`<fake_token_around_image>`, `<row_1_col_1>` and `<global-img>` between the placeholders keep the role of their turn.
"""

from avar_verl.model.family import Family
from avar_verl.model.turns import TurnFormat


def turns(tokenizer) -> TurnFormat:
    """The first token of a prompt is the tokenizer's bos_token: `<|im_start|>` in SmolVLM, `<|begin_of_text|>` in
    Idefics3.
    """
    first = [text for text in ("<|im_start|>", "<|begin_of_text|>") if text == tokenizer.bos_token]
    if not first:
        raise ValueError(
            "Idefics3's roles need the bos_token that its chat template writes, <|im_start|> or <|begin_of_text|>; got "
            f"{tokenizer.bos_token!r}. Check that this is the tokenizer the model was trained with."
        )
    return TurnFormat(
        system=(*first, "System:"),
        user=("User:",),
        assistant=("Assistant:",),
        tokens=tuple(first),
        ends=("<end_of_utterance>",),
        trailing="\n",
        anchored=True,
    )


FAMILY = Family(
    model_types=("idefics3", "smolvlm"),
    turns=turns,
    system="the first token and the system turn after it, if there is one",
    placeholders=("image_token_id",),
    vision_tower="model.vision_model",
    projectors=("model.connector",),
)
