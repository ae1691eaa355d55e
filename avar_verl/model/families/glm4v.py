# SPDX-License-Identifier: Apache-2.0
"""GLM-4.1V: `<|user|>` and similar tokens open turns, and no token closes them.

A response ends where the next turn opens; the model stops by writing `<|user|>` or `<|endoftext|>`. After the last
response, the chat template writes neither.
"""

import dataclasses

from avar_verl.model.families import qwen2_vl
from avar_verl.model.turns import TurnFormat

TURNS = TurnFormat(
    system=("[gMASK]", "<|system|>"),
    user=("<|user|>",),
    assistant=("<|assistant|>",),
    other=("<|observation|>",),
    header_tail=1,
    tokens=("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    ends=("<|endoftext|>",),
)

FAMILY = dataclasses.replace(
    qwen2_vl.FAMILY,
    model_types=("glm4v",),
    turns=TURNS,
    system="`[gMASK]<sop>` and the system turn after it, if there is one",
    unpackable="verl replaces its attention with one that the capture does not see",
)
