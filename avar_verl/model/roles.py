# SPDX-License-Identifier: Apache-2.0
"""Token roles: the role of every position of a prompt and its response, derived exactly from token ids.

Shape suffixes: B = samples, S = positions.
"""

from collections.abc import Callable
from enum import IntEnum

import torch


class TokenRole(IntEnum):
    """Role of one position.

    SYSTEM: the whole system turn, its delimiters included. IMAGE: every placeholder that a vision feature replaces, not
    the markers around them. USER: user turns without IMAGE, delimiters included. RESPONSE: assistant turns after their
    header, the closing delimiter included (what a loss mask covers). OTHER: padding, the assistant header, the rest.
    """

    OTHER = 0
    SYSTEM = 1
    IMAGE = 2
    USER = 3
    RESPONSE = 4


class RoleMap:
    """Maps token ids to roles for one model family. Build it with `RoleMap.from_pretrained`.

    Args:
        find_turns: `find_turns(ids_BS, mask_BS) -> (B, S)` roles by turn, before IMAGE is marked; `mask_BS`, if not
            None, is False on padding.
        image_token_ids: ids of the image and video placeholders.
    """

    def __init__(
        self,
        find_turns: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor],
        image_token_ids: tuple[int, ...],
    ):
        self.find_turns = find_turns
        self.image_token_ids = tuple(image_token_ids)

    @classmethod
    def from_pretrained(cls, processor, config) -> "RoleMap":
        """The role map of the family that `config.model_type` names.

        Args:
            processor: the model's processor (or its tokenizer), for the ids of the turn delimiters.
            config: the model's Hugging Face config, for the family and the placeholder ids.

        Raises:
            ValueError: an unknown family, or a tokenizer without the family's delimiters.
        """
        from avar_verl.model.families import get_family  # Here, because the families import this module.

        family = get_family(config.model_type)
        return family.role_map(getattr(processor, "tokenizer", processor), config)

    def __call__(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        response_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Roles of every position.

        Args:
            input_ids: (B, S) integers; a row may hold one sample, padded on either side, or several packed ones.
            attention_mask: (B, S), 0 on padding, which becomes OTHER. Without it, padding tokens at the end of a row
                count as padding, even if a response ended with one.
            response_mask: (B, S), 1 on the tokens that are trained or were rolled out. These positions become RESPONSE
                whatever their ids are (a policy can write any id), and no others do.

        Returns:
            (B, S) int64 of `TokenRole`.

        Raises:
            ValueError: shapes that do not match.
        """
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids must be (B, S); got {tuple(input_ids.shape)}. Add the batch dimension.")
        for name, mask in [("attention_mask", attention_mask), ("response_mask", response_mask)]:
            if mask is not None and mask.shape != input_ids.shape:
                raise ValueError(
                    f"{name} must have the shape of input_ids {tuple(input_ids.shape)}; got {tuple(mask.shape)}. "
                    "Give one value for every token."
                )
        roles = self.find_turns(input_ids, attention_mask)
        is_image = torch.isin(input_ids, input_ids.new_tensor(self.image_token_ids))
        roles = roles.masked_fill(is_image, TokenRole.IMAGE)
        if response_mask is not None:
            roles = roles.masked_fill(roles == TokenRole.RESPONSE, TokenRole.OTHER)
            roles = roles.masked_fill(response_mask.bool(), TokenRole.RESPONSE)
        if attention_mask is not None:
            roles = roles.masked_fill(~attention_mask.bool(), TokenRole.OTHER)
        return roles


def prompt_images(roles_BS: torch.Tensor) -> torch.Tensor:
    """Roles in which only the images of the prompt have the image role: IMAGE after a row's first RESPONSE is OTHER.

    In a rollout those are the images that tools returned.

    Args:
        roles_BS: (B, S) of `RoleMap`, one sample a row, with the response of its response mask.
    """
    answered_BS = (roles_BS == TokenRole.RESPONSE).cumsum(1) > 0
    return roles_BS.masked_fill(answered_BS & (roles_BS == TokenRole.IMAGE), int(TokenRole.OTHER))
