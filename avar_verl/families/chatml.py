# SPDX-License-Identifier: Apache-2.0
r"""Turns of the ChatML format, `<|im_start|>role\n ... <|im_end|>\n`, found in token ids.

Shape suffixes: B = samples, S = positions.
"""

from dataclasses import dataclass

import torch

from avar_verl.roles import TokenRole

ROLE_NAMES = {"system": TokenRole.SYSTEM, "user": TokenRole.USER, "assistant": TokenRole.RESPONSE}


@dataclass(frozen=True)
class ChatMLTurns:
    """Callable (B, S) ids, (B, S) mask or None -> (B, S) roles by turn.

    A turn runs from its start delimiter through its end delimiter and the newline behind it, or, when it was cut short,
    to the next start delimiter or the end of the row. The assistant's header (delimiter, name, newline) is OTHER: the
    model is given it. Turns of other names (tool, function) are OTHER. Without a mask, padding tokens behind an open
    turn are OTHER too; with one they are what the mask says, since a response may end with that token.
    """

    start_id: int
    end_id: int
    newline_id: int
    names: tuple[tuple[tuple[int, ...], TokenRole], ...]
    pad_id: int | None = None

    @classmethod
    def from_tokenizer(cls, tokenizer, start: str = "<|im_start|>", end: str = "<|im_end|>") -> "ChatMLTurns":
        """Read the ids off a tokenizer.

        Raises:
            ValueError: a delimiter or the newline is not one token of the vocabulary.
        """
        ids = []
        for text in (start, end, "\n"):
            encoded = tokenizer.encode(text, add_special_tokens=False)
            if len(encoded) != 1 or encoded[0] == tokenizer.unk_token_id:
                raise ValueError(
                    f"ChatML roles need {text!r} as one token of the vocabulary; got {encoded}. "
                    "Check that this is the tokenizer the model was trained with."
                )
            ids.append(encoded[0])
        names = tuple(
            (tuple(tokenizer.encode(name, add_special_tokens=False)), role) for name, role in ROLE_NAMES.items()
        )
        # Where the delimiter itself pads, what follows the first one is outside the turn anyway.
        pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id != ids[1] else None
        return cls(*ids, names=names, pad_id=pad_id)

    def __call__(self, ids_BS: torch.Tensor, mask_BS: torch.Tensor | None = None) -> torch.Tensor:
        S = ids_BS.shape[1]
        positions_S = torch.arange(S, device=ids_BS.device)
        starts_BS, ends_BS = ids_BS == self.start_id, ids_BS == self.end_id

        # At every start delimiter: the turn's role and the length of its header (delimiter, name, newline).
        role_at_start_BS = torch.zeros_like(ids_BS, dtype=torch.long)
        header_at_start_BS = torch.zeros_like(role_at_start_BS)
        for name, role in self.names:
            match_BS = starts_BS.clone()
            for offset, token in enumerate(name, start=1):
                match_BS &= torch.nn.functional.pad(ids_BS[:, offset:] == token, (0, min(offset, S)))
            role_at_start_BS = role_at_start_BS.masked_fill(match_BS, int(role))
            header_at_start_BS = header_at_start_BS.masked_fill(match_BS, len(name) + 2)

        # Every position looks back to the start delimiter of its turn, and counts the end delimiters since.
        last_start_BS = torch.where(starts_BS, positions_S, -1).cummax(dim=1).values
        anchor_BS = last_start_BS.clamp(min=0)
        ends_before_BS = ends_BS.long().cumsum(dim=1) - ends_BS.long()
        ends_since_BS = ends_before_BS - ends_before_BS.gather(1, anchor_BS)
        closes_BS = torch.nn.functional.pad(ends_BS[:, :-1], (1, 0)) & (ids_BS == self.newline_id)
        inside_BS = (last_start_BS >= 0) & ((ends_since_BS == 0) | ((ends_since_BS == 1) & closes_BS))

        roles_BS = role_at_start_BS.gather(1, anchor_BS) * inside_BS
        in_header_BS = positions_S - anchor_BS < header_at_start_BS.gather(1, anchor_BS)
        roles_BS = roles_BS.masked_fill((roles_BS == TokenRole.RESPONSE) & in_header_BS, int(TokenRole.OTHER))
        if self.pad_id is not None and mask_BS is None:
            # Padding on the right of an open turn: a run of the padding token up to the end of the row.
            other_BS = (ids_BS != self.pad_id).long()
            tail_BS = other_BS.flip(1).cumsum(1).flip(1) == 0
            roles_BS = roles_BS.masked_fill(tail_BS, int(TokenRole.OTHER))
        return roles_BS
