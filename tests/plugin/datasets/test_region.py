# SPDX-License-Identifier: Apache-2.0
"""Samples with boxes through verl's data set and collator."""

import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf

from avar_verl.tools.demo import photo_grid


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Three grids: the top right cell, no box, a text-only sample."""
    path = tmp_path_factory.mktemp("regions") / "sft.parquet"
    photo_grid.make_sft_parquet(path, 3, 0, "train")
    rows = pd.read_parquet(path)
    messages = [dict(message) for message in rows.at[2, "messages"]]
    messages[0]["content"] = messages[0]["content"].replace("<image>", "")
    rows.at[2, "messages"], rows.at[2, "images"] = messages, []
    rows["boxes"] = [[[[56.0, 0.0, 112.0, 56.0]]], [[]], []]
    return rows


@pytest.fixture(scope="module")
def processor(tiny_model_path):
    from verl.utils import hf_processor

    return hf_processor(tiny_model_path)


def dataset(rows, processor, folder):
    from avar_verl.plugin.datasets.region import RegionSFTDataset

    rows.to_parquet(folder / "rows.parquet")
    config = OmegaConf.create({"max_length": 512, "truncation": "error", "pad_mode": "no_padding"})
    return RegionSFTDataset(str(folder / "rows.parquet"), processor.tokenizer, config, processor=processor)


def test_regions_follow_the_tokens_into_the_batch(rows, processor, tmp_path):
    from verl.utils.dataset.dataset_utils import SFTTensorCollator

    samples = dataset(rows, processor, tmp_path)
    image_id = processor.image_token_id
    of_first = samples[0]["image_region"][samples[0]["input_ids"] == image_id]
    assert of_first.reshape(4, 4).tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
    batch = SFTTensorCollator("no_padding")([samples[index] for index in range(3)])
    assert torch.equal(batch["image_region"].offsets(), batch["input_ids"].offsets())
    assert [int(region.sum()) for region in batch["image_region"].unbind()] == [4, 16, 0]


def test_what_does_not_fit_is_refused_with_its_row(rows, processor, tmp_path):
    with pytest.raises(ValueError, match="RegionSFTDataset needs a column 'boxes'"):
        dataset(rows.drop(columns="boxes"), processor, tmp_path)
    wrong = rows.copy()
    wrong["boxes"] = [[[[56.0, 0.0, 200.0, 56.0]]], [[]], []]
    with pytest.raises(ValueError, match="row 0: a box must be"):
        dataset(wrong, processor, tmp_path)[0]


def test_the_engine_takes_the_role_from_image_tokens_outside(rows, processor, role_map, tmp_path):
    from tensordict import TensorDict
    from verl.utils.dataset.dataset_utils import SFTTensorCollator

    from avar_verl.plugin.engine.fsdp import AvarFSDPEngine
    from avar_verl.roles import TokenRole

    samples = dataset(rows, processor, tmp_path)
    batch = SFTTensorCollator("no_padding")([samples[index] for index in range(3)])
    data = TensorDict({key: batch[key] for key in ("input_ids", "loss_mask", "image_region")}, batch_size=3)
    engine = object.__new__(AvarFSDPEngine)
    engine._role_map = role_map
    roles_BS = engine._roles(data)
    assert (roles_BS == TokenRole.IMAGE).sum(1).tolist() == [4, 16, 0]
    whole_BS = engine._roles(data.exclude("image_region"))
    changed = roles_BS != whole_BS
    assert (whole_BS[changed] == TokenRole.IMAGE).all() and (roles_BS[changed] == TokenRole.OTHER).all()
    assert changed.sum(1).tolist() == [12, 0, 0]
