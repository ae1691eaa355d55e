# SPDX-License-Identifier: Apache-2.0
"""LLaVA-NeXT (v1.6) on Mistral, Vicuna, Yi, Qwen and Llama 3: five chat formats, distinguished by the chat template.

Mistral's and Vicuna's turns open with ordinary words, so a user who writes `[INST]` or `USER:` opens a turn too.
"""

from avar_verl.model.family import Family
from avar_verl.model.turns import CHATML, LLAMA3, TurnFormat

MISTRAL = TurnFormat(system=("<s>",), user=("[INST]",), assistant=("[/INST]",), tokens=("<s>",), ends=("</s>",))
VICUNA = TurnFormat(system=("<s>",), user=("USER:",), assistant=("ASSISTANT:",), tokens=("<s>",), ends=("</s>",))
# A mark in the chat template -> its format.
FORMATS = {
    "<|im_start|>": CHATML,
    "<|start_header_id|>": LLAMA3,
    "[INST]": MISTRAL,
    "USER:": VICUNA,
}


def turns(tokenizer) -> TurnFormat:
    """The format of the tokenizer's chat template.

    Raises:
        ValueError: no chat template, or one without any of these formats.
    """
    template = tokenizer.chat_template
    for mark, turn_format in FORMATS.items():
        if isinstance(template, str) and mark in template:
            return turn_format
    raise ValueError(
        f"LLaVA-NeXT's roles need a chat template with one of {list(FORMATS)}; got {template!r}. Set the tokenizer's "
        "chat_template to the checkpoint's."
    )


FAMILY = Family(
    model_types=("llava_next",),
    turns=turns,
    system="on Mistral and Vicuna everything before the first user turn, at least `<s>`; else the system turn",
    placeholders=("image_token_index", "image_token_id"),
    vision_tower="model.vision_tower",
    projectors=("model.multi_modal_projector",),
    coordinates="normalized",
)
