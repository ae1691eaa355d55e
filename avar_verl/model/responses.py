# SPDX-License-Identifier: Apache-2.0
"""What a rendered conversation is trained on: the responses of the row, as the row has them.

A chat template may leave reasoning out, add a thinking block, or strip tags; the model would then learn another text
than the row's. And a generation prompt may end in `<think>`: rollouts get it as their prompt, so it is part of the
prompt in the cold start too. The cold start, `avar data check`, `avar doctor` and `avar vas` ask here.

Shape suffixes: S = positions.
"""

from collections.abc import Sequence
from typing import Any

import torch

from avar_verl.data.messages import is_trained, read_messages, shown
from avar_verl.model.render import Rendered, generation_prompt
from avar_verl.model.roles import RoleMap, TokenRole


def special_tokens(tokenizer, role_map: RoleMap, config) -> tuple[str, ...]:
    """Delimiters and placeholders, which text must not contain. Other special tokens may write boxes."""
    turns = role_map.find_turns
    ids = {token for header, _ in turns.headers for token in header} | {*turns.end_ids, tokenizer.eos_token_id}
    ids |= {tokenizer.bos_token_id, tokenizer.pad_token_id, *role_map.image_token_ids}
    named = config.to_dict().items()
    ids |= {value for key, value in named if key.endswith(("_token_id", "_token_index")) and isinstance(value, int)}
    added = tokenizer.added_tokens_decoder.items()
    return tuple(str(token) for index, token in added if token.special and index in ids)


def _squeezed(tokenizer, ids: Sequence[int]) -> str:
    """The text of ids without white space, which templates trim."""
    return "".join(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False).split())


def opening_of(processor, role_map: RoleMap, messages: Sequence[dict], template_kwargs: dict) -> list[int]:
    """What the generation prompt writes after the assistant's header, such as `<think>`; [] for white space."""
    ids = generation_prompt(processor, messages, template_kwargs)
    roles = role_map(torch.tensor([ids]))[0].tolist()
    start = len(ids)
    while start and roles[start - 1] == TokenRole.RESPONSE:
        start -= 1
    return ids[start:] if _squeezed(processor.tokenizer, ids[start:]) else []


def _length(tokenizer, ids: Sequence[int], opening: Sequence[int]) -> int:
    """Number of the first `ids` that hold the text of `opening`, with which they begin."""
    if list(ids[: len(opening)]) == list(opening):
        return len(opening)
    # Tokens merge with the text that follows, or white space differs.
    wanted = len(_squeezed(tokenizer, opening))
    count = next(count for count in range(1, len(ids) + 1) if len(_squeezed(tokenizer, ids[:count])) >= wanted)
    while count < len(ids) and not _squeezed(tokenizer, ids[count : count + 1]):
        count += 1
    return count


def response_mask(
    processor,
    role_map: RoleMap,
    messages: Sequence[dict[str, Any]],
    rendered: Rendered,
    template_kwargs: dict | None = None,
) -> torch.Tensor:
    """(S,) bool: the tokens that a rollout would have to write, of the turns that are trained on (`is_trained`).

    Args:
        messages: the conversation that was `rendered`, with blocks as content.
        template_kwargs: as in `render`.

    Raises:
        ValueError: a response that is not the row's text, up to white space, or that begins differently than the
            generation prompt says.
    """
    messages = read_messages(messages, markers=False)
    tokenizer, turns = processor.tokenizer, role_map.find_turns
    ids_S = rendered.ids_S
    ids = ids_S.tolist()
    is_response_S = role_map(ids_S[None], torch.ones_like(ids_S)[None])[0] == TokenRole.RESPONSE
    edges = torch.nn.functional.pad(is_response_S.long(), (1, 1)).diff()
    runs = list(zip((edges == 1).nonzero()[:, 0].tolist(), (edges == -1).nonzero()[:, 0].tolist(), strict=True))
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    if len(runs) != len(answers):
        raise ValueError(
            f"a rendered conversation must have one response for every assistant turn; got {len(runs)} for "
            f"{len(answers)}. Use the chat template of the model, and no delimiters and images in responses."
        )
    closing = {*turns.end_ids, turns.trailing_id}
    mask_S = torch.zeros_like(is_response_S)
    for number, (start, stop) in zip(answers, runs, strict=True):
        end = stop
        while end > start and ids[end - 1] in closing:
            end -= 1
        text = "".join(block.get("text", "") for block in messages[number]["content"])
        # Written and read by the tokenizer too, which may normalize characters.
        wanted = _squeezed(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"])
        got = _squeezed(tokenizer, ids[start:end])
        trained = is_trained(messages[number])
        opening = (
            opening_of(processor, role_map, messages[:number], template_kwargs or {})
            if trained or got != wanted
            else []
        )
        opened = _squeezed(tokenizer, opening)
        if got not in (wanted, opened + wanted):
            raise ValueError(
                f"a rendered response must be the row's text; got {shown(tokenizer.decode(ids[start:end]))} for "
                f"{shown(text)} in turn {number}. Use a chat template that writes responses as they are: this one "
                "leaves something out or adds something, such as reasoning or an empty thinking block."
            )
        if not trained:
            continue
        if not got.startswith(opened):
            raise ValueError(
                f"a response must begin as the generation prompt of rollouts does; got {shown(text)} in turn {number}, "
                f"where the template writes {tokenizer.decode(opening)!r}. Begin the response with it, or take it out "
                "of the generation prompt (data.apply_chat_template_kwargs, such as enable_thinking)."
            )
        begin = start + (_length(tokenizer, ids[start:end], opening) if opening else 0)
        if number == answers[-1]:
            # To the token where the prompt says so: it may end before the header's white space, which rollouts write.
            prompt = generation_prompt(processor, messages[:number], template_kwargs or {})
            if rendered.prompt_ids[: len(prompt)] == prompt:
                begin = len(ids) - (len(rendered.prompt_ids) - len(prompt))
        mask_S[begin:stop] = True
    return mask_S
