# SPDX-License-Identifier: Apache-2.0
"""What this package needs to know about a model family."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from avar_verl.model.roles import RoleMap
from avar_verl.model.turns import TurnFormat, Turns


@dataclass(frozen=True, kw_only=True)
class Family:
    """One model family, found by `config.model_type`. Roles, freezing and the engine read its fields.

    model_types: the values of `config.model_type`.
    turns: the chat format, or a function of the tokenizer if the family's checkpoints have several.
    system: what counts as the system turn, in words, for logs and documentation.
    placeholders: names of the config's placeholder ids, which vision features replace; none for cross-attention.
    vision_tower, projectors: prefixes of parameter names; a projector may be inside the tower.
    other_towers: prefixes of towers for what no sample here has (audio); they are frozen with the vision tower.
    coordinates: how the model writes boxes, a value of `parse_anchors(coordinates=)`; None if it was not trained on
        boxes.
    cross_attention: the model reads images in separate layers, whose softmax has only image keys. Then the ratio of
        image to system mass is not defined: only L_suppress can guide, and the engine refuses the reward.
    places: `places(processor, features, image_sizes) -> [(N, 4), ...]`, for every image the rectangles that its tokens
        represent (`avar_verl.model.regions`); `image_sizes` are the (width, height) that the processor saw, or None.
        None: boxes cannot be mapped to tokens.
    unpackable: why its samples cannot be packed into one row (use_remove_padding); None if they can.
    leaks_packed: verl packs its samples without an error and mixes them, also in runs without masses. Then packing is
        refused in every run.
    no_flash: `no_flash(text_config)`, why flash attention cannot run a model, or would run another one; it returns None
        for a model that it runs, and is None if there is no other.
    verl_forward: verl replaces the model's forward by one of its own (verl/models/transformers/monkey_patch.py).
    token_inputs: `token_inputs(config, ids_BS, features) -> dict` of model inputs with one entry per position.
    row_features: names of features that are one row for all images: they are joined at the end, not in their first
        dimension.
    fill_text_only: `fill_text_only(features of another sample) -> features` of a sample without an image, if the first
        dimension of features is the sample; None if it is the image.
    prepare: `prepare(model)`, called on a loaded model before its first batch; None if not needed.
    """

    model_types: tuple[str, ...]
    turns: TurnFormat | Callable[[Any], TurnFormat]
    system: str
    placeholders: tuple[str, ...]
    vision_tower: str
    projectors: tuple[str, ...]
    other_towers: tuple[str, ...] = ()
    coordinates: str | None = None
    cross_attention: bool = False
    places: Callable[[Any, dict, list | None], list[torch.Tensor]] | None = None
    unpackable: str | None = None
    leaks_packed: bool = False
    no_flash: Callable[[Any], str | None] | None = None
    verl_forward: bool = False
    token_inputs: Callable[[Any, torch.Tensor, dict], dict] | None = None
    row_features: tuple[str, ...] = ()
    fill_text_only: Callable[[dict], dict] | None = None
    prepare: Callable[[torch.nn.Module], None] | None = None

    @property
    def towers(self) -> tuple[str, ...]:
        """Prefixes of the vision tower and of others."""
        return (self.vision_tower, *self.other_towers)

    def role_map(self, tokenizer, config) -> RoleMap:
        """`RoleMap` of a model of this family.

        Raises:
            ValueError: a tokenizer without the family's delimiters.
        """
        turn_format = self.turns if isinstance(self.turns, TurnFormat) else self.turns(tokenizer)
        return RoleMap(Turns.from_tokenizer(tokenizer, turn_format), self.placeholder_ids(config))

    def image_places(self, processor, features: dict, image_sizes: list | None = None) -> list[torch.Tensor]:
        """For every image the places (N, 4) of its tokens; [] without an image.

        Raises:
            ValueError: a family whose tokens do not represent rectangles, or one that needs `image_sizes`.
        """
        if self.places is None:
            raise ValueError(
                f"boxes need a family whose image tokens represent known rectangles; got {self.model_types[0]}. Leave "
                "regions out, or add `places` to its file in avar_verl/model/families."
            )
        return self.places(processor, features, image_sizes) if features else []

    def placeholder_ids(self, config) -> tuple[int, ...]:
        """Ids of the image and video placeholders."""
        ids = (getattr(config, name, None) for name in self.placeholders)
        return tuple(dict.fromkeys(token for token in ids if token is not None))
