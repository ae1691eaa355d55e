# SPDX-License-Identifier: Apache-2.0
"""Turns a conversation with images into token ids and features, and samples into a batch.

There is one path for every family and every use (cold start, rollouts, measurement, `avar doctor`): the processor's
chat template, then the processor, without a second BOS if the template has written one.

Shape suffixes: B = samples, S = positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from avar_verl.data.messages import check_kinds, images_of, read_messages, shown
from avar_verl.model.families import Family

# Per-position outputs of a processor. They are recomputed from ids (`Family.token_inputs`), because rollouts append ids
# that no processor has seen.
PER_TOKEN = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids", "cross_attention_mask")


@dataclass(frozen=True)
class Rendered:
    """One sample. `ids_S` are the model's input ids. `prompt_ids` are the ids before placeholders are repeated for
    every image token, which vLLM expects. `features` are the processor's outputs that are not per position.
    """

    ids_S: torch.Tensor
    prompt_ids: list[int]
    features: dict[str, torch.Tensor]


def _chat_text(processor, messages: Sequence[dict], **kwargs) -> str:
    """The output of the chat template for messages whose content is a list of blocks.

    GLM-4.1V's template accepts only text in system and assistant turns, and Llama 3.2 Vision's in the system turn;
    given a list of blocks, both print it as Python would. Other templates accept only lists. So turns that were printed
    this way are passed as text, and all others stay as they are.
    """
    text = processor.apply_chat_template(messages, tokenize=False, **kwargs)
    printed = [str(message["content"]) in text for message in messages]
    if not any(printed):
        return text
    messages = [
        {**message, "content": "".join(block["text"] for block in message["content"])} if as_text else message
        for message, as_text in zip(messages, printed, strict=True)
    ]
    return processor.apply_chat_template(messages, tokenize=False, **kwargs)


def _after_prompt(processor, messages: Sequence[dict], text: str, template_kwargs: dict) -> str:
    """`text` with the last response after what a rollout's prompt ends in, if the template takes that out of responses.

    The templates of Gemma 4 26B and 31B end a prompt in an empty thought and leave thoughts out of responses, so no row
    could begin as a rollout does. Other templates write what a response begins with, and the row decides.
    """
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        return text
    prompt = _chat_text(processor, messages[:-1], add_generation_prompt=True, **template_kwargs)
    response = "".join(block.get("text", "") for block in messages[-1]["content"])
    start = text.rfind(response.strip())
    while start > 0 and text[start - 1].isspace() and not prompt.startswith(text[:start]):
        start -= 1
    if text.startswith(prompt) or start < 0 or not prompt.startswith(text[:start]) or not prompt[start:].strip():
        return text
    opened = {**messages[-1], "content": [{"type": "text", "text": prompt[start:] + response}]}
    if _chat_text(processor, [*messages[:-1], opened], **template_kwargs).split() != text.split():
        return text
    return prompt + text[start:]


def _check_texts(text: str, messages: Sequence[dict]) -> None:
    """Whether the template has written what the system and the user say. Responses: `avar_verl.model.responses`.

    Raises:
        ValueError: it has not, up to white space.
    """
    squeezed = "".join(text.split())
    for message in messages:
        for block in message["content"] if message["role"] in ("system", "user") else ():
            if "".join(block.get("text", "").split()) not in squeezed:
                raise ValueError(
                    f"a chat template must write the text of every turn; got none of {shown(block['text'])} of the "
                    f"{message['role']}. Use a template that writes it as it is."
                )


def _special_tokens(tokenizer, text: str) -> bool:
    """Whether the tokenizer shall add its special tokens: not if the template has written BOS."""
    return not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))


def generation_prompt(processor, messages: Sequence[dict], template_kwargs: dict) -> list[int]:
    """`Rendered.prompt_ids` of a conversation of blocks, with the generation prompt; its images are not read."""
    text = _chat_text(processor, messages, add_generation_prompt=True, **template_kwargs)
    return processor.tokenizer(text, add_special_tokens=_special_tokens(processor.tokenizer, text))["input_ids"]


def render(
    processor,
    messages: Sequence[dict],
    *,
    add_generation_prompt: bool = False,
    template_kwargs: dict | None = None,
    processor_kwargs: dict | None = None,
) -> Rendered:
    """Tokenize a conversation whose images are blocks `{"type": "image", "image": PIL}`.

    Args:
        template_kwargs: for the chat template (`tools`, `enable_thinking`).
        processor_kwargs: for the processor (`min_pixels`).

    Raises:
        ValueError: text that contains the placeholder, text that the template does not write, or anything that the
            processor refuses.
    """
    messages = read_messages(messages, markers=False)
    check_kinds(block["type"] for message in messages for block in message["content"])
    placeholder = getattr(processor, "image_token", None)
    for message in messages:
        for block in message["content"]:
            if block["type"] == "text" and placeholder and placeholder in block["text"]:
                raise ValueError(
                    f"text must not spell the image placeholder; got {placeholder!r} in a {message['role']} turn. "
                    "Give images as image blocks, and strip the placeholder from the text."
                )
    text = _chat_text(processor, messages, add_generation_prompt=add_generation_prompt, **(template_kwargs or {}))
    _check_texts(text, messages)
    text = _after_prompt(processor, messages, text, template_kwargs or {})
    tokenizer = processor.tokenizer
    add_special_tokens = _special_tokens(tokenizer, text)
    images = images_of(messages)
    inputs = processor(
        text=[text],
        # A flat list: with a list per text, LLaVA-OneVision does not tile images that come in pairs, but vLLM does.
        images=images or None,
        add_special_tokens=add_special_tokens,
        # One text needs none, and a tokenizer that changes between texts is not for threads, in which rollouts render.
        padding=False,
        return_tensors="pt",
        **(processor_kwargs or {}),
    )
    return Rendered(
        ids_S=inputs["input_ids"][0],
        prompt_ids=tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"],
        features={key: value for key, value in inputs.items() if key not in PER_TOKEN},
    )


# Positions of patches (Gemma 4): 0 is one.
FILL = {"image_position_ids": -1}


def _padded(values: Sequence[torch.Tensor], fill: int = 0) -> list[torch.Tensor]:
    """The tensors padded with `fill` at the end, so that only their first dimension differs."""
    shape = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)]
    out = []
    for value in values:
        missing = [wanted - have for wanted, have in zip(shape, value.shape[1:], strict=True)]
        pad = [amount for size in reversed(missing) for amount in (0, size)]
        out.append(torch.nn.functional.pad(value, pad, value=fill) if any(missing) else value)
    return out


def merge_features(
    family: Family, samples: Sequence[dict[str, torch.Tensor] | None], like: dict[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """Features of a batch: the features of its samples, concatenated; a sample without an image has none.

    If images of one sample have more tiles than those of another, the missing tiles are zeros (or FILL), which every
    family recognises by its own sizes or masks. `like`: features of any image, for `Family.fill_text_only` in a batch
    without one.
    """
    samples = [dict(sample or {}) for sample in samples]
    like = next((sample for sample in samples if sample), like)
    if family.fill_text_only is not None and like is not None:
        samples = [sample or family.fill_text_only(like) for sample in samples]
    keys = dict.fromkeys(key for sample in samples for key, value in sample.items() if value is not None)
    columns = {key: [sample[key] for sample in samples if sample.get(key) is not None] for key in keys}
    return {
        key: torch.cat(values, dim=-1) if key in family.row_features else torch.cat(_padded(values, FILL.get(key, 0)))
        for key, values in columns.items()
    }


def collate(
    family: Family, config, samples: Sequence[Rendered], pad_id: int | None, padding_side: str = "right"
) -> dict[str, torch.Tensor]:
    """Model inputs of a batch: `input_ids` and `attention_mask` (B, S), features, and per-position inputs.

    Args:
        pad_id: the tokenizer's; a tokenizer without one gets 0, since the mask hides padding whatever its id.
    """
    length = max(len(sample.ids_S) for sample in samples)
    ids_BS = torch.full((len(samples), length), pad_id or 0, dtype=torch.long)
    mask_BS = torch.zeros_like(ids_BS)
    for row, sample in enumerate(samples):
        count = len(sample.ids_S)
        where = slice(length - count, length) if padding_side == "left" else slice(0, count)
        ids_BS[row, where], mask_BS[row, where] = sample.ids_S, 1
    features = merge_features(family, [sample.features for sample in samples])
    inputs = {"input_ids": ids_BS, "attention_mask": mask_BS, **features}
    if "image_grid_thw" in features:
        # Qwen-VL and GLM-4.1V compute positions in time, height and width from this. Without it they refuse, or
        # (Qwen2.5-VL) silently count tokens.
        image_ids = ids_BS.new_tensor(family.placeholder_ids(config))
        inputs["mm_token_type_ids"] = torch.isin(ids_BS, image_ids).long()
    if family.token_inputs is not None:
        inputs.update(family.token_inputs(config, ids_BS, features))
    return inputs
