# SPDX-License-Identifier: Apache-2.0
"""SFT data set for any known model family; the default of the cold-start recipe.

    data.custom_cls.path=pkg://avar_verl.plugin.datasets.sft data.custom_cls.name=AvarSFTDataset

Rows are those of verl's `MultiTurnSFTDataset`: `messages` with `<image>` for each image, and `images`. verl's data set
tokenizes every message separately, which the chat templates of Gemma, Idefics and LLaVA do not allow, requires a patch
size of every image processor, and gives GLM-4.1V the positions of text. This data set renders the whole conversation
once, and the token roles define the response; for Qwen2.5-VL the samples are identical. Turns with `loss_mask` 0 or
`trainable` false are read and not trained on.

Shape suffixes: S = positions.
"""

from typing import Any

import pandas
import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch.utils.data import Dataset
from verl.utils.fs import copy_local_path_from_hdfs
from verl.utils.tokenizer import get_processor_token_id

from avar_verl.data.check import RowResult, check_media, check_messages, check_special_tokens
from avar_verl.data.messages import place_images, plain, template_kwargs
from avar_verl.data.rows import read_rows
from avar_verl.model.render import Rendered, render
from avar_verl.model.responses import response_mask, special_tokens
from avar_verl.model.roles import RoleMap
from avar_verl.plugin.datasets.images import open_resized, patch_size_of
from avar_verl.plugin.switch import switch_on

TRUNCATIONS = ("error", "right")


def position_ids(processor, ids_S: torch.Tensor, features: dict[str, torch.Tensor]) -> torch.Tensor:
    """Positions of a sample, (S,); for families with multimodal RoPE (4, S): text, then time, row and column.

    As verl's agent loop makes them (verl/experimental/agent_loop/agent_loop.py:920-964).
    """
    text_S = torch.arange(len(ids_S))
    if not hasattr(processor, "get_rope_index"):
        return text_S
    types_S = torch.zeros_like(ids_S)
    for value, name in ((1, "image"), (2, "video")):
        token_id = get_processor_token_id(processor, name)
        if token_id is not None:
            types_S[ids_S == token_id] = value
    vision_3BS, _ = processor.get_rope_index(
        input_ids=ids_S[None],
        mm_token_type_ids=types_S[None],
        image_grid_thw=features.get("image_grid_thw"),
        video_grid_thw=None,
        attention_mask=torch.ones_like(ids_S)[None],
    )
    return torch.cat([text_S[None], vision_3BS[:, 0]])


class AvarSFTDataset(Dataset):
    """Samples of `input_ids` (S,), `loss_mask` (S,), `position_ids` and `multi_modal_inputs` (features, {} for text).

    Args:
        parquet_files: one or several parquet or jsonl files.
        config: verl's `data` node: `messages_key`, `image_key`, `tools_key`, `max_length`, `truncation`,
            `apply_chat_template_kwargs`, `image_patch_size`; `allow_urls` (default false) allows image URLs.

    Raises:
        ValueError: no processor of a known family, or a missing column; in `__getitem__`, naming the row: what
            `avar data check` finds, a sample whose rendered responses are not the row's (`model.responses`), is longer
            than `max_length`, or would lose image tokens to it.
    """

    def __init__(self, parquet_files, tokenizer, config: DictConfig, processor=None, max_samples: int = -1):
        switch_on()
        config = config or OmegaConf.create()
        if processor is None or getattr(processor, "config", None) is None:
            raise ValueError(
                f"AvarSFTDataset needs the model's processor, as verl's hf_processor loads it, with its config; got "
                f"{type(processor).__name__}. "
                "Check that the folder holds a processor of a family in avar_verl/model/families."
            )
        self.processor, self.tokenizer = processor, tokenizer
        self.role_map = RoleMap.from_pretrained(processor, processor.config)
        self.special_tokens = special_tokens(processor.tokenizer, self.role_map, processor.config)
        self.messages_key = config.get("messages_key", "messages")
        self.image_key = config.get("image_key", "images")
        self.tools_key = config.get("tools_key", "tools")
        self.enable_thinking_key = config.get("enable_thinking_key", "enable_thinking")
        self.enable_thinking = config.get("enable_thinking_default", None)
        self.template_kwargs = dict(config.get("apply_chat_template_kwargs") or {})
        self.max_length = config.get("max_length", 1024)
        self.truncation = config.get("truncation", "error")
        self.allow_urls = config.get("allow_urls", False)
        self.image_patch_size = config.get("image_patch_size", None) or patch_size_of(processor)
        if self.truncation not in TRUNCATIONS:
            raise ValueError(
                f"data.truncation must be one of {TRUNCATIONS}, which keep a prompt whole; got {self.truncation!r}. "
                "Set data.truncation=error."
            )
        files = list(parquet_files) if isinstance(parquet_files, list | tuple | ListConfig) else [parquet_files]
        self.dataframe = pandas.concat([self._read(file) for file in files], ignore_index=True)
        if self.messages_key not in self.dataframe.columns:
            raise ValueError(
                f"the data need a column {self.messages_key!r}; got {list(self.dataframe.columns)}. Set "
                "data.messages_key."
            )
        if 0 < max_samples < len(self.dataframe):
            if config.get("shuffle", False):
                self.dataframe = self.dataframe.sample(max_samples, random_state=config.get("seed"))
            self.dataframe = self.dataframe.iloc[:max_samples]

    @staticmethod
    def _read(file: str) -> pandas.DataFrame:
        local = copy_local_path_from_hdfs(file, verbose=True)
        if str(local).endswith((".jsonl", ".json")):
            return pandas.DataFrame([row.values for row in read_rows(local)])
        return pandas.read_parquet(local, dtype_backend="pyarrow")

    def __len__(self) -> int:
        return len(self.dataframe)

    def row(self, item: int) -> dict:
        """A row in plain Python; absent values are None."""
        row = {}
        for key, value in self.dataframe.iloc[item].items():
            value = plain(value)
            row[key] = None if not isinstance(value, list | dict | str | bytes) and pandas.isna(value) else value
        return row

    def images(self, row: dict) -> list:
        """The images of a row as stored."""
        return row.get(self.image_key) or []

    def _open(self, image) -> Any:
        return open_resized(image, self.image_patch_size, allow_urls=self.allow_urls)

    def _messages(self, row: dict) -> list[dict]:
        """The conversation of a row with its images, after the checks of `avar data check`."""
        values = {"messages": row[self.messages_key], "images": row.get(self.image_key), "videos": row.get("videos")}
        result = RowResult()
        turns = check_messages(values["messages"], "sft", result)
        if turns is not None:
            images = check_media(values, turns, "sft", result)
            check_special_tokens(turns, self.special_tokens, result)
        if result.errors:
            raise ValueError(result.errors[0][1])
        return place_images(turns, images, self._open)

    def render(self, row: dict) -> tuple[Rendered, torch.Tensor]:
        """The conversation of a row as ids and features, and its loss mask (S,)."""
        messages = self._messages(row)
        thinking = row.get(self.enable_thinking_key, self.enable_thinking)
        kwargs = {**self.template_kwargs, **template_kwargs(row.get(self.tools_key), thinking)}
        rendered = render(self.processor, messages, template_kwargs=kwargs)
        return rendered, response_mask(self.processor, self.role_map, messages, rendered, kwargs).long()

    def _sample(self, row: dict) -> dict:
        rendered, mask_S = self.render(row)
        ids_S = rendered.ids_S
        if len(ids_S) > self.max_length:
            if self.truncation == "error":
                raise ValueError(
                    f"a sample must have at most data.max_length={self.max_length} tokens; got {len(ids_S)}. Raise it, "
                    "leave the row out, or set data.truncation=right."
                )
            if bool(torch.isin(ids_S[self.max_length :], ids_S.new_tensor(self.role_map.image_token_ids)).any()):
                raise ValueError(
                    f"truncation must not cut image tokens; got one after data.max_length={self.max_length}. Raise it "
                    "or leave the row out."
                )
        positions = position_ids(self.processor, ids_S, rendered.features)[..., : self.max_length]
        loss_mask_S = mask_S[: self.max_length]
        if not bool(loss_mask_S.any()):
            raise ValueError(
                f"a sample must have a response within data.max_length={self.max_length} tokens; got none. Raise it, "
                "or leave the row out."
            )
        return {
            "input_ids": ids_S[: self.max_length],
            "loss_mask": loss_mask_S,
            "position_ids": positions,
            # Always present: verl's collator takes the keys of a batch from its first sample.
            "multi_modal_inputs": rendered.features,
        }

    def __getitem__(self, item: int) -> dict:
        try:
            return self._sample(self.row(item))
        except ValueError as error:
            raise ValueError(f"row {item}: {error}") from error
