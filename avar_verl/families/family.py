# SPDX-License-Identifier: Apache-2.0
"""What this package has to know about a model family."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from avar_verl.families.turns import TurnFormat, Turns
from avar_verl.roles import RoleMap


@dataclass(frozen=True, kw_only=True)
class Family:
    """One model family, found by `config.model_type`. Roles, freezing and the engine read its fields.

    model_types: the values of `config.model_type`.
    turns: the chat format, or a function of the tokenizer where the family's checkpoints have several.
    system: what counts as the system turn, in words, for logs and documentation.
    placeholders: names of the config's ids that vision features replace; none for cross-attention.
    vision_tower, projectors: prefixes of parameter names; a projector may lie inside the tower.
    cross_attention: images are read in layers of their own, whose softmax has image keys alone. Then the ratio of
        image to system mass is not defined, and the engine refuses guidance and reward.
    """

    model_types: tuple[str, ...]
    turns: TurnFormat | Callable[[Any], TurnFormat]
    system: str
    placeholders: tuple[str, ...]
    vision_tower: str
    projectors: tuple[str, ...]
    cross_attention: bool = False

    def role_map(self, tokenizer, config) -> RoleMap:
        """`RoleMap` of a model of this family.

        Raises:
            ValueError: a tokenizer without the family's delimiters.
        """
        turn_format = self.turns if isinstance(self.turns, TurnFormat) else self.turns(tokenizer)
        return RoleMap(Turns.from_tokenizer(tokenizer, turn_format), self.placeholder_ids(config))

    def placeholder_ids(self, config) -> tuple[int, ...]:
        """Ids of the image and video placeholders."""
        ids = (getattr(config, name, None) for name in self.placeholders)
        return tuple(dict.fromkeys(token for token in ids if token is not None))
