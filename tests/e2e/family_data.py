# SPDX-License-Identifier: Apache-2.0
"""Data for training any family: photo grids, two images in one sample, and text alone, in turn."""

from pathlib import Path

import pandas

from avar_verl.tools.demo import photo_grid

SYSTEM = {"role": "system", "content": "Look at the image."}


def _text_only(row: dict) -> dict:
    messages = [{**message, "content": message["content"].replace("<image>", "")} for message in row["messages"]]
    return {**row, "messages": messages, "images": []}


def _two_images(row: dict, other: dict) -> dict:
    question, answer = row["messages"]
    content = "<image>" + question["content"]
    return {**row, "messages": [{**question, "content": content}, answer], "images": [*row["images"], *other["images"]]}


def make_sft(path: Path, n: int, with_system: bool) -> Path:
    """n rows: every second one is text alone, every fourth has two images."""
    photo_grid.make_sft_parquet(path, n, 0, "train")
    rows = pandas.read_parquet(path).to_dict("records")
    for index, row in enumerate(rows):
        row["messages"], row["images"] = list(row["messages"]), list(row["images"])
        if index % 4 == 2:
            row.update(_two_images(row, rows[index - 2]))
        elif index % 2:
            row.update(_text_only(row))
        if with_system:
            row["messages"] = [SYSTEM, *row["messages"]]
    pandas.DataFrame(rows).to_parquet(path)
    return path


def make_rl(path: Path, n: int, with_system: bool) -> Path:
    """n prompts with an image, the first with a second one."""
    photo_grid.make_rl_parquet(path, n, 0, "train")
    rows = pandas.read_parquet(path).to_dict("records")
    for index, row in enumerate(rows):
        row["prompt"], row["images"] = [dict(message) for message in row["prompt"]], list(row["images"])
        if index == 0:
            row["prompt"][0]["content"] = "<image>" + row["prompt"][0]["content"]
            row["images"] = [*row["images"], *rows[1]["images"]]
        if with_system:
            row["prompt"] = [SYSTEM, *row["prompt"]]
    pandas.DataFrame(rows).to_parquet(path)
    return path
