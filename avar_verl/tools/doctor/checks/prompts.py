# SPDX-License-Identifier: Apache-2.0
"""Whether the chat template, the tokenizer and the roles agree on a conversation."""

import torch

from avar_verl.model.render import render
from avar_verl.model.responses import response_mask
from avar_verl.model.roles import TokenRole
from avar_verl.tools.doctor.check import Finding, check
from avar_verl.tools.doctor.samples import assistant, conversations, picture, system, user
from avar_verl.tools.doctor.subject import Subject

ROLE_OF = {"system": TokenRole.SYSTEM, "user": TokenRole.USER, "assistant": TokenRole.RESPONSE}
PADDING = 3


def _shared_prefix(first: list[int], second: list[int]) -> int:
    """Length of the longest common prefix."""
    return next(
        (i for i, (one, other) in enumerate(zip(first, second, strict=False)) if one != other),
        min(len(first), len(second)),
    )


@check(
    "chat template",
    prevents="If a prompt is rendered differently in rollouts and in training, the model learns a header that it never "
    "sees; with a second BOS, or none, it gets prompts that it was not trained on.",
    fix="Use chat_template.jinja of the original checkpoint; with add_generation_prompt, it must write exactly the "
    "start of the assistant's turn.",
    needs=["processor"],
)
def chat_template(subject: Subject) -> Finding:
    tokenizer = subject.tokenizer
    question = user("What is in this picture?", [picture(112, 112)])
    prompt_ids = subject.render([system(), question], add_generation_prompt=True).ids_S.tolist()
    opening = subject.opening()
    # A thinking model's response begins as its generation prompt ends.
    thought = f"{opening}I look.</think>" if opening.strip() == "<think>" else ""
    answer = f"{thought}A pattern of squares."
    whole_ids = subject.render([system(), question, assistant(answer)]).ids_S.tolist()
    shared = _shared_prefix(prompt_ids, whole_ids)
    prompt_text, whole_text = ("".join(tokenizer.decode(ids).split()) for ids in (prompt_ids, whole_ids))
    differs = ""
    if shared < len(prompt_ids):
        differs = (
            f"{tokenizer.decode(prompt_ids[shared:])!r} at token {shared}, where the conversation has "
            f"{tokenizer.decode(whole_ids[shared : shared + 8])!r}"
        )
        if not whole_text.startswith(prompt_text):
            raise ValueError(
                f"a prompt with its generation prompt must be the beginning of the whole conversation; got {differs}."
            )
    bare = subject.render([question], add_generation_prompt=True)
    detail = f"generation prompt {_generation_prompt(subject, prompt_ids)!r} begins the response"
    bos = tokenizer.bos_token_id
    if bos is not None:
        starts = tokenizer("a")["input_ids"][:1] == [bos]
        counts = {ids.count(bos) for ids in (whole_ids, prompt_ids, bare.ids_S.tolist(), bare.prompt_ids)}
        if max(counts) > 1 or (starts and counts != {1}):
            raise ValueError(
                f"a prompt must have exactly one BOS; got {sorted(counts)} times {tokenizer.bos_token!r} in prompts "
                "with and without a system message."
            )
        detail += f", one {tokenizer.bos_token}" if counts == {1} else f", {tokenizer.bos_token} is not used"
    warnings = []
    if differs:
        warnings.append(
            f"A rollout's prompt and the same turns in training differ in white space: {differs}. Write the generation "
            "prompt in chat_template.jinja as the template writes the assistant's header."
        )
    num_system = int((subject.role_map(bare.ids_S[None]) == TokenRole.SYSTEM).sum())
    if num_system:
        detail += f"; {num_system} system tokens without a system message"
    else:
        detail += "; no system turn without a system message"
        warnings.append(
            "A prompt without a system message has no VAS and no L_suppress, and r_visual refuses it (SYSTEM is "
            f"{subject.family.system}). Give every row a system message."
        )
    return Finding(detail, " ".join(warnings))


def _generation_prompt(subject: Subject, prompt_ids: list[int]) -> str:
    """The text after the last user token of a prompt."""
    roles = subject.role_map(torch.tensor([prompt_ids]))[0].tolist()
    last = max((i for i, role in enumerate(roles) if role != TokenRole.OTHER), default=-1)
    return subject.tokenizer.decode(prompt_ids[last + 1 :])


def role_runs(ids: list[int], roles: list[int]) -> list[tuple[int, int, int]]:
    """(role, start, stop) of every stretch of one role."""
    runs: list[tuple[int, int, int]] = []
    for position, role in enumerate(roles):
        if runs and runs[-1][0] == role:
            runs[-1] = (role, runs[-1][1], position + 1)
        else:
            runs.append((role, position, position + 1))
    return runs


def _folds_system(subject: Subject) -> bool:
    """Whether the template may write a system message into the user's turn: only BOS opens a system turn."""
    headers = getattr(subject.role_map.find_turns, "headers", ())
    return all(len(ids) == 1 for ids, role in headers if role == TokenRole.SYSTEM)


def check_texts(subject: Subject, name: str, messages: list[dict], ids: list[int], roles: list[int]) -> None:
    """Compare the roles of a sample with its texts: each text is one contiguous stretch of its role, and occurs nowhere
    else.

    Raises:
        ValueError: a text is not, or a response is not exactly its text and what ends the turn.
    """
    tokenizer, turns = subject.tokenizer, subject.role_map.find_turns
    closing = {*getattr(turns, "end_ids", ()), getattr(turns, "trailing_id", None)}
    runs = role_runs(ids, roles)
    decoded = [tokenizer.decode(ids[start:stop], clean_up_tokenization_spaces=False) for _, start, stop in runs]
    responses = []
    for message in messages:
        allowed = {ROLE_OF[message["role"]]}
        if message["role"] == "system" and _folds_system(subject):
            allowed.add(TokenRole.USER)
        for text in (block["text"] for block in message["content"] if "text" in block):
            found = [TokenRole(run[0]) for run, run_text in zip(runs, decoded, strict=True) if text in run_text]
            if len(found) != 1 or found[0] not in allowed:
                got = " and ".join(role.name for role in found) if found else "no stretch of one role with all of it"
                raise ValueError(
                    f"the tokens of a text of the {message['role']} must have the role "
                    f"{ROLE_OF[message['role']].name}; got {got} for {text!r} (sample: {name})."
                )
            if message["role"] == "assistant":
                responses.append(text)
    got = []
    for role, start, stop in runs:
        if role != TokenRole.RESPONSE:
            continue
        last = stop
        while last > start and ids[last - 1] in closing:
            last -= 1
        got.append(tokenizer.decode(ids[start:last], clean_up_tokenization_spaces=False).strip())
        if stop < len(ids) and ids[stop] in getattr(turns, "end_ids", ()):
            raise ValueError(
                f"the end of a response must be RESPONSE, or the model never learns to stop; got "
                f"{tokenizer.decode(ids[stop])!r} outside of it (sample: {name})."
            )
    # An empty thinking block, which rollouts without a thought get as part of their prompt.
    empty = subject.opening(subject.plain).strip()
    got = [text.removeprefix(empty).lstrip() for text in got]
    if got != responses:
        raise ValueError(
            f"RESPONSE must be the responses and nothing else; got {got} for {responses} (sample: {name})."
        )


@check(
    "roles",
    prevents="If roles are wrong, guidance, VAS and the reward use the attention to the wrong tokens, and no loss "
    "shows it.",
    fix="Correct the family's TurnFormat in avar_verl/model/families, or use the chat template that it was written "
    "for.",
    needs=["vocabulary"],
)
def roles(subject: Subject) -> Finding | str:
    role_map, tokenizer = subject.role_map, subject.tokenizer
    pad_id = tokenizer.pad_token_id
    known: dict[str, tuple[list[int], list[int]]] = {}
    for name, messages in conversations().items():
        ids_S = subject.samples[name].ids_S
        found = role_map(ids_S[None], torch.ones_like(ids_S)[None])[0].tolist()
        check_texts(subject, name, messages, ids_S.tolist(), found)
        known[name] = (ids_S.tolist(), found)
    padding, nobody = [pad_id] * PADDING, [int(TokenRole.OTHER)] * PADDING
    names = list(known)
    rows: dict[str, tuple[list[int], list[int], list[int] | None]] = {}
    for name, (ids, found) in known.items():
        mask, hidden = [1] * len(ids), [0] * PADDING
        rows[f"{name}, padded on the left"] = (padding + ids, nobody + found, hidden + mask)
        rows[f"{name}, padded on the right"] = (ids + padding, found + nobody, mask + hidden)
    for first, second in zip(names, names[1:] + names[:1], strict=True):
        ids, found = (one + other for one, other in zip(known[first], known[second], strict=True))
        rows[f"{first} and {second}, packed"] = (ids, found, None)
    for name, (ids, wanted, mask) in rows.items():
        got = role_map(torch.tensor([ids]), None if mask is None else torch.tensor([mask]))[0].tolist()
        if got != wanted:
            place = next(i for i, (one, other) in enumerate(zip(got, wanted, strict=True)) if one != other)
            raise ValueError(
                f"roles must not depend on padding and packing; got {TokenRole(got[place]).name} for "
                f"{TokenRole(wanted[place]).name} at {tokenizer.decode(ids[place])!r}, position {place} of {name}."
            )
    total = sum(len(ids) for ids, _ in known.values())
    detail = f"{len(known)} samples: single, padded on either side and packed; all {total} tokens are right"
    once = [user("What is in the corner?"), assistant("<think>I look at the corner.</think><answer>a cup</answer>")]
    again = [user("And beside it?"), assistant("<think>I look beside it.</think><answer>a plate</answer>")]
    kwargs, processor = subject.thinking, subject.processor
    response_mask(processor, role_map, once, render(processor, once, template_kwargs=kwargs), kwargs)
    if kwargs:
        detail += f"; rows with a thought need data.apply_chat_template_kwargs={kwargs}"
    try:
        both = render(processor, once + again, template_kwargs=kwargs)
        response_mask(processor, role_map, once + again, both, kwargs)
    except ValueError as error:
        return Finding(detail, f"Rows with several turns of reasoning are refused: {error}")
    return detail


@check(
    "long prompts",
    prevents="A tokenizer that truncates silently cuts prompts and their image tokens.",
    fix="Delete truncation and max_length from tokenizer_config.json and processor_config.json; limit the length with "
    "data.max_prompt_length, which drops whole rows.",
    needs=["processor"],
)
def long_prompts(subject: Subject) -> Finding | str:
    tokenizer = subject.tokenizer
    longest = subject.config.get_text_config().max_position_embeddings
    sentence, last = "One more word about the picture. ", "This is where it ends."
    count = len(tokenizer(sentence * 16, add_special_tokens=False)["input_ids"]) / 16
    text = sentence * (int(longest / count) + 2) + last
    ids = subject.render([user(text)], add_generation_prompt=True).ids_S.tolist()
    if len(ids) <= longest or last not in tokenizer.decode(ids[-200:]):
        raise ValueError(
            f"a prompt must be rendered whole; got {len(ids)} tokens of one longer than max_position_embeddings="
            f"{longest}, which end in {tokenizer.decode(ids[-8:])!r}."
        )
    detail = f"{len(ids)} tokens rendered whole, max_position_embeddings={longest}"
    limit = tokenizer.model_max_length
    if limit < longest:
        return Finding(
            f"{detail}, model_max_length={limit}",
            f"Code that truncates without a length of its own cuts at model_max_length={limit}. Set it to "
            "max_position_embeddings in tokenizer_config.json.",
        )
    return detail
