# SPDX-License-Identifier: Apache-2.0
r"""Turns of a chat format, found in token ids.

A format says which texts open a turn of each role and which tokens close a turn. The texts become token ids once, when
the tokenizer is known; after that, only ids are compared.

Shape suffixes: B = samples, S = positions.
"""

from dataclasses import dataclass

import torch

from avar_verl.model.roles import TokenRole


@dataclass(frozen=True, kw_only=True)
class TurnFormat:
    """How a chat template writes turns.

    A turn runs from its header through the token that closes it and the trailing text. If nothing closes it, it runs to
    the next header or the end of the row. The header of an assistant turn is OTHER, because the model does not write
    it. Positions outside every turn are OTHER.

    system, user, assistant: texts that open a turn of this role. The first token of every prompt (BOS) may be listed
        under `system`: the attention sink before the first turn then counts as the system turn.
    other: texts that open a turn without a role, if none of the texts above matches there.
    header_tail: number of header tokens after these texts, whatever they are (the newline in ChatML).
    tokens: texts in these headers that must each be one token; otherwise the tokenizer is not the model's.
    ends: texts, each one token, that close a turn.
    trailing: text, one token, that belongs to a turn if it follows the turn's end.
    anchored: headers count only at the start of a row, after an end (and its trailing text), after a one-token `system`
        header, or after padding; for headers that are ordinary words ("User:").
    """

    system: tuple[str, ...] = ()
    user: tuple[str, ...]
    assistant: tuple[str, ...]
    other: tuple[str, ...] = ()
    header_tail: int = 0
    tokens: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()
    trailing: str = ""
    anchored: bool = False


def _one_token(tokenizer, text: str) -> int:
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        raise ValueError(
            f"turns need {text!r} as one token of the vocabulary; got {ids}. "
            "Check that this is the tokenizer the model was trained with."
        )
    return ids[0]


def _spellings(tokenizer, text: str, ends: tuple[str, ...], trailing: str) -> tuple[tuple[int, ...], ...]:
    """Ids of `text` at the start of a prompt and after anything that a turn may end with.

    There can be several, because a tokenizer may encode a word differently at the start of a text and after a special
    token.
    """
    spellings = {tuple(tokenizer.encode(text, add_special_tokens=False))}
    for before in (*ends, *(end + trailing for end in ends), "\n"):
        prefix = tokenizer.encode(before, add_special_tokens=False)
        ids = tokenizer.encode(before + text, add_special_tokens=False)
        if ids[: len(prefix)] == prefix:
            spellings.add(tuple(ids[len(prefix) :]))
    # After a word: " [/INST]", whose space many tokenizers merge into the first token of the header.
    word = tokenizer.encode("a", add_special_tokens=False)
    ids = tokenizer.encode(f"a {text}", add_special_tokens=False)
    if ids[: len(word)] == word and tuple(ids[len(word) + 1 :]) not in spellings:
        spellings.add(tuple(ids[len(word) :]))
    unknown = [ids for ids in spellings if not ids or tokenizer.unk_token_id in ids]
    if unknown:
        raise ValueError(
            f"turns need a tokenizer that can write {text!r}; got the ids {unknown[0]}. "
            "Check that this is the tokenizer the model was trained with."
        )
    return tuple(sorted(spellings, key=len))


@dataclass(frozen=True)
class Turns:
    """Callable (B, S) ids, (B, S) mask or None -> (B, S) roles by turn.

    Without a mask, padding tokens after an open turn are OTHER. With a mask, the mask decides, because a response may
    end with that token.
    """

    headers: tuple[tuple[tuple[int, ...], TokenRole], ...]
    header_tail: int
    end_ids: tuple[int, ...]
    trailing_id: int | None
    anchored: bool
    pad_id: int | None = None

    @classmethod
    def from_tokenizer(cls, tokenizer, turn_format: TurnFormat) -> "Turns":
        """Look up the ids in a tokenizer.

        Raises:
            ValueError: an end is not one token of the vocabulary, or a header cannot be written with it.
        """
        ends, trailing = turn_format.ends, turn_format.trailing
        for text in turn_format.tokens:
            _one_token(tokenizer, text)
        end_ids = tuple(_one_token(tokenizer, end) for end in ends)
        trailing_id = _one_token(tokenizer, trailing) if trailing else None
        headers = [
            (ids, role)
            for texts, role in (
                (turn_format.other, TokenRole.OTHER),
                (turn_format.system, TokenRole.SYSTEM),
                (turn_format.user, TokenRole.USER),
                (turn_format.assistant, TokenRole.RESPONSE),
            )
            for text in texts
            for ids in _spellings(tokenizer, text, ends, trailing)
        ]
        # If an end token is also the padding token, everything after the first one is outside the turn anyway.
        pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id not in end_ids else None
        return cls(tuple(headers), turn_format.header_tail, end_ids, trailing_id, turn_format.anchored, pad_id)

    def __call__(self, ids_BS: torch.Tensor, mask_BS: torch.Tensor | None = None) -> torch.Tensor:
        S = ids_BS.shape[1]
        positions_S = torch.arange(S, device=ids_BS.device)
        ends_BS = torch.isin(ids_BS, ids_BS.new_tensor(self.end_ids))
        end_before_BS = torch.nn.functional.pad(ends_BS[:, :-1], (1, 0))
        closes_BS = torch.zeros_like(ends_BS)
        if self.trailing_id is not None:
            closes_BS = end_before_BS & (ids_BS == self.trailing_id)

        starts_BS = torch.zeros_like(ends_BS)
        role_at_start_BS = torch.zeros_like(ids_BS, dtype=torch.long)
        header_at_start_BS = torch.zeros_like(role_at_start_BS)
        allowed_BS = None
        if self.anchored:
            allowed_BS = end_before_BS | torch.nn.functional.pad(closes_BS[:, :-1], (1, 0)) | (positions_S == 0)
            openers = [ids[0] for ids, role in self.headers if role == TokenRole.SYSTEM and len(ids) == 1]
            before = ids_BS.new_tensor(openers + ([] if self.pad_id is None else [self.pad_id]))
            allowed_BS |= torch.nn.functional.pad(torch.isin(ids_BS[:, :-1], before), (1, 0))
            if openers:
                allowed_BS |= torch.isin(ids_BS, ids_BS.new_tensor(openers))
        for header, role in self.headers:
            match_BS = torch.ones_like(starts_BS) if allowed_BS is None else allowed_BS.clone()
            for offset, token in enumerate(header):
                match_BS &= torch.nn.functional.pad(ids_BS[:, offset:] == token, (0, min(offset, S)))
            starts_BS |= match_BS
            role_at_start_BS = role_at_start_BS.masked_fill(match_BS, int(role))
            header_at_start_BS = header_at_start_BS.masked_fill(match_BS, len(header) + self.header_tail)

        # For every position, find the start of its turn and count the ends since then.
        last_start_BS = torch.where(starts_BS, positions_S, -1).cummax(dim=1).values
        start_BS = last_start_BS.clamp(min=0)
        ends_before_BS = ends_BS.long().cumsum(dim=1) - ends_BS.long()
        ends_since_BS = ends_before_BS - ends_before_BS.gather(1, start_BS)
        inside_BS = (last_start_BS >= 0) & ((ends_since_BS == 0) | ((ends_since_BS == 1) & closes_BS))

        roles_BS = role_at_start_BS.gather(1, start_BS) * inside_BS
        in_header_BS = positions_S - start_BS < header_at_start_BS.gather(1, start_BS)
        roles_BS = roles_BS.masked_fill((roles_BS == TokenRole.RESPONSE) & in_header_BS, int(TokenRole.OTHER))
        if self.pad_id is not None and mask_BS is None:
            # Right padding after an open turn: a run of padding tokens up to the end of the row.
            other_BS = (ids_BS != self.pad_id).long()
            tail_BS = other_BS.flip(1).cumsum(1).flip(1) == 0
            roles_BS = roles_BS.masked_fill(tail_BS, int(TokenRole.OTHER))
        return roles_BS


# Qwen and InternVL, and LLaVA's models on Qwen. A turn with any other name (tool) has no role.
CHATML = TurnFormat(
    system=("<|im_start|>system",),
    user=("<|im_start|>user",),
    assistant=("<|im_start|>assistant",),
    other=("<|im_start|>",),
    header_tail=1,
    tokens=("<|im_start|>",),
    ends=("<|im_end|>",),
    trailing="\n",
)
# Llama 3: <|begin_of_text|> opens every prompt.
LLAMA3 = TurnFormat(
    system=("<|begin_of_text|>", "<|start_header_id|>system<|end_header_id|>"),
    user=("<|start_header_id|>user<|end_header_id|>",),
    assistant=("<|start_header_id|>assistant<|end_header_id|>",),
    other=("<|start_header_id|>",),
    header_tail=1,
    tokens=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
    ends=("<|eot_id|>",),
)
