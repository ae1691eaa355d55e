# SPDX-License-Identifier: Apache-2.0
"""The part of `avar data check` that needs a model's processor: it renders every row as the trainers do.

Shape suffixes: S = positions.
"""

import torch
from jinja2 import TemplateError
from PIL import Image

from avar_verl.data.check import Kind, RowResult, Settings
from avar_verl.data.messages import place_images, template_kwargs
from avar_verl.model.checkpoint import load_config, load_processor
from avar_verl.model.families import get_family
from avar_verl.model.render import render
from avar_verl.model.responses import response_mask, special_tokens
from avar_verl.model.roles import TokenRole
from avar_verl.plugin.datasets.images import patch_size_of, resized

# Exceptions of processors, chat templates and qwen_vl_utils for rows that they refuse.
REFUSALS = (ValueError, TypeError, LookupError, AttributeError, AssertionError, RuntimeError, TemplateError)


class Rendering:
    """`Rendering(settings)(...)` adds the findings about a row's tokens to its `RowResult`.

    special_tokens: see `avar_verl.model.responses`.
    factor: side of one token in pixels, if the image processor has a patch size and a merge size.

    Raises:
        ValueError: a missing model, one of an unknown family, or one without a processor.
    """

    def __init__(self, settings: Settings):
        self.settings = settings
        config, self.processor = load_config(settings.model), load_processor(settings.model)
        self.family = get_family(config.model_type)
        tokenizer = self.processor.tokenizer
        self.role_map = self.family.role_map(tokenizer, config)
        image_processor = self.processor.image_processor
        patch_size, merge_size = (getattr(image_processor, name, None) for name in ("patch_size", "merge_size"))
        self.patch_size = patch_size_of(self.processor)
        self.factor = patch_size * merge_size if patch_size and merge_size else None
        self.special_tokens = special_tokens(tokenizer, self.role_map, config)

    def __call__(
        self, values: dict, turns: list[dict], stored: list, images: list[Image.Image], kind: Kind, result: RowResult
    ) -> None:
        """Check a row without other errors; `images` are the opened `stored` ones, in the order of their blocks."""
        columns = (values.get("tools"), values.get("enable_thinking")) if kind == "sft" else (None, None)
        try:
            images = [resized(value, image, self.patch_size) for value, image in zip(stored, images, strict=True)]
            turns, kwargs = place_images(turns, images), template_kwargs(*columns)
            rendered = render(self.processor, turns, add_generation_prompt=kind == "rl", template_kwargs=kwargs)
        except REFUSALS as error:
            result.add("render", f"{type(error).__name__}: {error}")
            return
        ids_S = rendered.ids_S
        result.num_tokens = len(ids_S)
        limit = self.settings.max_length if kind == "sft" else self.settings.max_prompt_length
        if limit is not None and len(ids_S) > limit:
            name = "max_length" if kind == "sft" else "max_prompt_length"
            result.add("length", f"a row may have {name}={limit} tokens; got {len(ids_S)}.")
        roles_S = self.role_map(ids_S[None], torch.ones_like(ids_S)[None])[0]
        num_image_tokens = int((roles_S == TokenRole.IMAGE).sum())
        self._check_image_tokens(num_image_tokens, rendered.features, [image.size for image in images], result)
        wanted = [TokenRole.USER, *([TokenRole.RESPONSE] if kind == "sft" else [])]
        for role in wanted:
            if not bool((roles_S == role).any()):
                result.add("turns", f"a rendered row must have tokens of the role {role.name}; got none.")
        if kind == "sft" and not any(check == "turns" for check, _ in result.findings):
            try:
                response_mask(self.processor, self.role_map, turns, rendered, kwargs)
            except ValueError as error:
                result.add("responses", str(error))
        if not self.family.cross_attention and not bool((roles_S == TokenRole.SYSTEM).any()):
            result.add("no_system", "the row has no system turn, and the chat template writes none.")

    def _check_image_tokens(self, found: int, features: dict, sizes: list[tuple[int, int]], result: RowResult) -> None:
        """Compare `found` placeholders with the number that the family expects for images of (width, height)."""
        if self.family.cross_attention:  # No feature replaces a token.
            return
        if self.family.places is not None:
            promised = sum(len(places_N4) for places_N4 in self.family.image_places(self.processor, features, sizes))
            if found != promised:
                result.add(
                    "image_tokens", f"every image feature must have its placeholder; got {found} for {promised}."
                )
        elif bool(found) != bool(sizes) or found < len(sizes):
            result.add("image_tokens", f"every image must have placeholders; got {found} for {len(sizes)} images.")
