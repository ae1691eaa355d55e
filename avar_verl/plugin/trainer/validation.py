# SPDX-License-Identifier: Apache-2.0
"""Validation rollouts with images and reward by part for wandb, trackio and tensorboard; verl logs their text.

verl's loggers take (input, output, score) (verl/utils/tracking.py:664), so the rows are logged beside them, as
`val/rollouts`.
"""

from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np
import transfer_queue as tq
from PIL import Image
from transfer_queue import KVBatchMeta

from avar_verl.data.images import open_image
from avar_verl.plugin.rollout.reward_manager import prompt_text
from avar_verl.plugin.trainer.rewards import reward_infos
from avar_verl.plugin.trainer.rollouts import images_of, sort_key

SIDE = 512
"""Longest side of a logged image, in pixels."""
COLUMNS = ("step", "data_source", "image", "prompt", "response", "ground_truth", "score")


def side_by_side(images: Sequence[Image.Image]) -> Image.Image | None:
    """The images of a prompt as one, each shrunk to SIDE; None without an image."""
    small = []
    for image in images:
        small.append(image.copy())
        small[-1].thumbnail((SIDE, SIDE))
    if not small:
        return None
    out = Image.new("RGB", (sum(image.width for image in small), max(image.height for image in small)), "white")
    left = 0
    for image in small:
        out.paste(image, (left, 0))
        left += image.width
    return out


def first_rollouts(keys: Sequence[str]) -> list[str]:
    """The last output of the first rollout of every prompt."""
    first: dict[str, tuple[int, str]] = {}
    for key in sorted(keys, key=sort_key):
        prompt, rollout, _ = sort_key(key)
        if prompt not in first or first[prompt][0] == rollout:
            first[prompt] = (rollout, key)
    return [key for _, key in first.values()]


class ValidationSamples:
    """The first `number` prompts of the validation data with one rollout each, the same prompts every time."""

    def __init__(self, number: int, tokenizer):
        self.number, self.tokenizer = number, tokenizer
        self.rows: list[dict[str, Any]] = []

    def add(self, batch: KVBatchMeta) -> None:
        """Take what is still wanted from a batch of validation rollouts, in the order of the data."""
        wanted = self.number - len(self.rows)
        if wanted <= 0:
            return
        keys = first_rollouts(batch.keys)
        place = tq.kv_batch_get(keys=keys, partition_id=batch.partition_id, select_fields=["extra_info"])["extra_info"]
        index_of = {key: (info or {}).get("index", 0) for key, info in zip(keys, place, strict=True)}
        keys = sorted(keys, key=index_of.__getitem__)[:wanted]
        fields = ["raw_prompt", "responses", "rm_scores", "reward_model", "data_source", "extra_fields"]
        data = tq.kv_batch_get(keys=keys, partition_id=batch.partition_id, select_fields=fields)
        infos = reward_infos(data["extra_fields"])
        columns = (data["raw_prompt"], data["responses"].unbind(), data["rm_scores"].unbind())
        columns += (data["reward_model"], data["data_source"], infos)
        for messages, ids, scores, model, source, info in zip(*columns, strict=True):
            self.rows.append(
                {
                    "data_source": str(source),
                    "image": side_by_side([open_image(value, allow_urls=True) for value in images_of(messages)]),
                    "prompt": prompt_text(messages),
                    "response": self.tokenizer.decode(ids, skip_special_tokens=True),
                    "ground_truth": str(model["ground_truth"]),
                    "score": float(scores.sum()),
                    "parts": {name: float(part) for name, part in info.items() if isinstance(part, Real | np.bool_)},
                }
            )

    def log(self, loggers: Sequence[str], step: int, texts) -> None:
        """Write the rows to wandb, trackio and tensorboard, as far as `loggers` (`trainer.logger`) names them.

        Args:
            texts: verl's ValidationGenerationsLogger, which has opened tensorboard's writer.
        """
        if "wandb" in loggers:
            import wandb

            wandb.log({"val/rollouts": self.table(wandb, step)}, step=step)
        if "trackio" in loggers:
            import trackio

            trackio.log({"val/rollouts": self.table(trackio, step)}, step=step)
        if "tensorboard" in loggers:
            for at, row in enumerate(self.rows):
                if row["image"] is not None:
                    texts.writer.add_image(f"val/rollouts/{at}", np.asarray(row["image"]), step, dataformats="HWC")
                texts.writer.add_text(f"val/rollouts/{at}", self.markdown(row), step)
            texts.writer.flush()

    def table(self, module, step: int):
        """A `Table` of wandb or trackio with COLUMNS and a column per part; None where a rollout does not have it."""
        parts = list(dict.fromkeys(name for row in self.rows for name in row["parts"] if name not in COLUMNS))
        data = []
        for row in self.rows:
            image = None if row["image"] is None else module.Image(row["image"])
            values = {**row, "step": step, "image": image}
            data.append([*(values[name] for name in COLUMNS), *(row["parts"].get(name) for name in parts)])
        return module.Table(columns=[*COLUMNS, *parts], data=data)

    def markdown(self, row: dict[str, Any]) -> str:
        """A rollout as tensorboard's text; text of the model is a block of code, which has no markup."""
        lines = [f"{name}: {row[name]}" for name in ("data_source", "prompt", "response", "ground_truth", "score")]
        lines += [f"{name}: {value:.4g}" for name, value in row["parts"].items()]
        return "\n".join(f"    {line}" for text in lines for line in text.splitlines())
