# SPDX-License-Identifier: Apache-2.0
"""A tool that returns a part of an image, for verl's `multi_turn.tool_config_path` (examples/zoom_in.yaml).

verl 0.9.1 comes without image tools.
"""

from typing import Any
from uuid import uuid4

from verl.tools.base_tool import BaseTool
from verl.tools.schemas import OpenAIFunctionToolSchema, ToolResponse

COORDINATES = ("absolute", "relative")
SCHEMA = {
    "type": "function",
    "function": {
        "name": "image_zoom_in",
        "description": "Zoom into a part of an image: returns the part inside a box as a new image.",
        "parameters": {
            "type": "object",
            "properties": {
                "bbox_2d": {"type": "array", "description": "The box, [x1, y1, x2, y2]."},
                "image": {"type": "integer", "description": "Number of the image, from 1; without it, the first."},
            },
            "required": ["bbox_2d"],
        },
    },
}


class ImageZoomIn(BaseTool):
    """`image_zoom_in(bbox_2d, image=1)`: the part of an image of the conversation inside a box.

    Images are counted through the conversation, those of the prompt first, then those that tools returned. A call that
    is wrong gets a text that says why; it ends nothing.

    Config:
        coordinates: absolute (pixels of the image as the agent loop has it, after `data.custom_cls` or verl has resized
            it: Qwen2.5-VL) or relative (thousandths of width and height: Qwen3-VL, InternVL).
        min_side: smallest width and height in pixels that is returned, >= 1; a smaller box is an error of the call.

    Raises:
        ValueError: another key or value of the config.
    """

    def __init__(self, config: dict, tool_schema: OpenAIFunctionToolSchema | None = None):
        super().__init__(config, tool_schema or OpenAIFunctionToolSchema.model_validate(SCHEMA))
        own = {"coordinates": "absolute", "min_side": 28, **{k: v for k, v in config.items() if k != "type"}}
        self.coordinates, self.min_side = own.pop("coordinates"), own.pop("min_side")
        for ok, rule, got in (
            (not own, "the keys of image_zoom_in are type, coordinates and min_side", sorted(own)),
            (self.coordinates in COORDINATES, f"coordinates must be one of {COORDINATES}", self.coordinates),
            (type(self.min_side) is int and self.min_side >= 1, "min_side must be an integer >= 1", self.min_side),
        ):
            if not ok:
                raise ValueError(f"{rule}; got {got!r}. Correct the tool's config in multi_turn.tool_config_path.")

    async def create(self, instance_id: str | None = None, **kwargs) -> tuple[str, ToolResponse]:
        return instance_id or uuid4().hex, ToolResponse()

    async def execute(self, instance_id: str, parameters: dict[str, Any], *, agent_data, **kwargs):
        try:
            response = ToolResponse(image=[self.crop(parameters, agent_data.image_data or [])])
        except ValueError as error:  # Of the call: the policy reads it.
            response = ToolResponse(text=f"Error: {error}")
        return response, 0.0, {}

    def crop(self, parameters: dict[str, Any], images: list):
        """The part of the image that a call asks for.

        Raises:
            ValueError: no such image, no box, or a box without `min_side` pixels inside the image.
        """
        number, box = parameters.get("image", 1), parameters.get("bbox_2d")
        if type(number) is not int or not 1 <= number <= len(images):
            raise ValueError(f"image must be the number of an image, 1 to {len(images)}; got {number!r}.")
        numbers = isinstance(box, list) and len(box) == 4 and all(type(edge) in (int, float) for edge in box)
        if not numbers:
            raise ValueError(f"bbox_2d must be [x1, y1, x2, y2]; got {box!r}.")
        width, height = images[number - 1].size
        scale = (1.0, 1.0) if self.coordinates == "absolute" else (width / 1000, height / 1000)
        edges = [edge * scale[at % 2] for at, edge in enumerate(box)]
        inside = [round(min(max(edge, 0), (width, height)[at % 2])) for at, edge in enumerate(edges)]
        if inside[2] - inside[0] < self.min_side or inside[3] - inside[1] < self.min_side:
            raise ValueError(
                f"bbox_2d must have at least {self.min_side} x {self.min_side} pixels of the image of {width} x "
                f"{height}; got {box!r}."
            )
        return images[number - 1].crop(tuple(inside))
