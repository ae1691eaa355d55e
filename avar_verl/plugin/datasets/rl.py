# SPDX-License-Identifier: Apache-2.0
"""RL data set that keeps images as they are stored; the default of the GRPO recipe.

    data.custom_cls.path=pkg://avar_verl.plugin.datasets.rl data.custom_cls.name=AvarRLDataset

verl's data set puts a decoded picture beside the bytes of every image (verl/utils/dataset/rl_dataset.py:340-342), and
both are stored with every rollout of the prompt. This one keeps the bytes or a path, and pictures are made where the
prompt is rendered. Prompts and pictures are those of verl's data set.
"""

import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from PIL import Image
from verl.utils.dataset.rl_dataset import RLHFDataset

from avar_verl.data.images import as_verl_image, load_image, to_rgb, write_new
from avar_verl.plugin.switch import switch_on

# In a block: the image was a column of Hugging Face's type Image. datasets decodes it, verl's data set drops the
# transparency of what it gets, where that of bytes is put on white.
BARE = "bare"


def write_once(folder: Path, content: bytes) -> Path:
    """The file of `content` in `folder`, named by its sha256 (the first 32 digits); written if it is not there.

    Raises:
        ValueError: content that is no image.
    """
    path = folder / hashlib.sha256(content).hexdigest()[:32]
    if not path.exists():
        load_image(content)
        write_new(path, content)
    return path


def opened(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages with a picture in the place of the bytes of every image block; the given ones stay as they are.

    Raises:
        ValueError: bytes that are no image.
    """

    def open_block(block: Any) -> Any:
        if not isinstance(block, Mapping) or block.get("type") != "image" or not (BARE in block or "bytes" in block):
            return block
        image = load_image({key: value for key, value in block.items() if key in ("bytes", "image")})
        rest = {key: value for key, value in block.items() if key not in (BARE, "bytes")}
        return {**rest, "image": to_rgb(image, bare=True) if block.get(BARE) else image}

    return [
        {**message, "content": [open_block(block) for block in message["content"]]}
        if isinstance(message["content"], list)
        else dict(message)
        for message in messages
    ]


class AvarRLDataset(RLHFDataset):
    """`RLHFDataset` whose `raw_prompt` holds every image once: `{"type": "image", "bytes": ...}`, or its path or URL
    under `image`, with the row's other keys, such as `max_pixels`.

    The column of the prompt is not returned beside it: verl's rollouts store it a second time, and nothing reads it.

    Also opens what verl's data set does not: bytes without a dict, and a dict of a path whose `bytes` are null.

    Args:
        config: verl's `data` node. `image_folder` (default null): absolute path of a folder that every node sees;
            images that rows hold as bytes are written there once, and prompts hold their paths.

    Raises:
        ValueError: a relative `image_folder`, or an image of an unknown type.
    """

    def __init__(self, data_files, tokenizer, config, processor=None, max_samples: int = -1):
        switch_on()
        folder = config.get("image_folder", None)
        if folder is not None and not Path(folder).is_absolute():
            raise ValueError(
                f"data.image_folder must be null or an absolute path, which every node sees; got {str(folder)!r}. "
                "Write it from the root, or set data.image_folder=null to keep the images' bytes in the prompts."
            )
        self.image_folder = None if folder is None else Path(folder)
        if self.image_folder is not None:
            self.image_folder.mkdir(parents=True, exist_ok=True)
        self._bare = False
        super().__init__(data_files, tokenizer, config, processor=processor, max_samples=max_samples)

    def maybe_filter_out_long_prompts(self, dataframe: datasets.Dataset = None):
        # What verl does first with the rows it has read. Lists of images, the one layout that its data set reads.
        feature = dataframe.features.get(self.image_key)
        inner = getattr(feature, "feature", None)
        self._bare = isinstance(inner, datasets.Image) and inner.decode
        if self._bare:
            dataframe = dataframe.cast_column(self.image_key, type(feature)(datasets.Image(decode=False)))
        return super().maybe_filter_out_long_prompts(dataframe)

    def _stored(self, value: Any) -> dict[str, Any]:
        """Block of an image as the row stores it."""
        block = {**as_verl_image(value), **({BARE: True} if self._bare else {})}
        if isinstance(block.get("image"), Image.Image):  # Of a column of dicts, which datasets has decoded.
            buffer = io.BytesIO()
            to_rgb(block.pop("image"), bare=isinstance(value, Image.Image)).save(buffer, "PNG")
            block["bytes"] = buffer.getvalue()
        if self.image_folder is not None and "bytes" in block:
            block["image"] = str(write_once(self.image_folder, block.pop("bytes")))
        return {"type": "image", **block}

    def _build_messages(self, example: dict, key: str) -> list[dict]:
        # verl's method reads markers and counts; it gets numbers for images, which it would decode.
        stored = [self._stored(value) for value in example.get(self.image_key) or []]
        numbered = {**example, self.image_key: [{"number": number} for number in range(len(stored))]}
        messages = super()._build_messages(numbered, key)
        for message in messages if stored else []:
            if isinstance(message["content"], list):
                message["content"] = [
                    stored[block["number"]] if block.get("type") == "image" and "number" in block else block
                    for block in message["content"]
                ]
        return messages

    def __getitem__(self, item) -> dict:
        row = super().__getitem__(item)
        if self.prompt_key != "raw_prompt":
            del row[self.prompt_key]  # The same list as raw_prompt, which would be stored a second time.
        return row

    @classmethod
    async def process_vision_info(cls, messages, image_patch_size, config):
        return await super().process_vision_info(opened(messages), image_patch_size, config)

    @classmethod
    def _process_multi_modal_info(cls, messages, image_patch_size, config):
        return super()._process_multi_modal_info(opened(messages), image_patch_size, config)
