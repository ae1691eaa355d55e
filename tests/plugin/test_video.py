# SPDX-License-Identifier: Apache-2.0
"""Videos are refused wherever samples come in, for every family: rows of both stages, prompts of rollouts, what is
measured."""

import asyncio

import pandas as pd
import pytest
from omegaconf import OmegaConf
from PIL import Image

from avar_verl.data.check import Settings, check_files
from avar_verl.data.messages import check_kinds
from avar_verl.model.render import render
from avar_verl.plugin.datasets.sft import AvarSFTDataset
from avar_verl.plugin.processor import hf_processor
from avar_verl.plugin.rollout.agent_loop import AvarSingleTurnAgentLoop
from avar_verl.plugin.rollout.tool_agent_loop import AvarToolAgentLoop
from avar_verl.tools.rows import conversation

REFUSED = "a conversation must hold text and images; got a video. Leave the row out"
ASKED, ANSWER = {"role": "user", "content": "<video>What?"}, {"role": "assistant", "content": "A cat."}
ROWS = {
    "sft": {"messages": [ASKED, ANSWER], "images": [], "videos": [{"video": "a.mp4"}]},
    "rl": {
        "prompt": [ASKED],
        "images": [],
        "videos": [{"video": "a.mp4"}],
        "data_source": "a",
        "reward_model": {"style": "rule", "ground_truth": "cat"},
    },
}


@pytest.mark.parametrize("kind", ROWS)
def test_rows_are_errors_of_the_data_check(kind, tmp_path):
    pd.DataFrame([ROWS[kind]]).to_parquet(tmp_path / "rows.parquet")
    report = check_files([tmp_path / "rows.parquet"], Settings())
    assert [(one.check, one.level) for one in report.findings if one.level == "error"] == [("video", "error")]


def test_rows_of_the_cold_start(tmp_path, tiny_model_path):
    pd.DataFrame([ROWS["sft"]]).to_parquet(tmp_path / "rows.parquet")
    processor = hf_processor(tiny_model_path)
    data = AvarSFTDataset(str(tmp_path / "rows.parquet"), processor.tokenizer, OmegaConf.create({}), processor)
    with pytest.raises(ValueError, match="row 0: got 1 videos"):
        data[0]


@pytest.mark.parametrize("values", [ROWS["sft"], ROWS["rl"], {"question": "<video>What?"}], ids=["sft", "rl", "text"])
def test_what_is_measured(values):
    with pytest.raises(ValueError, match=REFUSED):
        conversation(values)


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "qwen3_vl", "qwen3_5", "gemma4"])
def test_what_is_rendered(model_type, family_processor):
    content = [{"type": "video", "video": "a.mp4"}, {"type": "text", "text": "What?"}]
    with pytest.raises(ValueError, match=REFUSED):
        render(family_processor(model_type), [{"role": "user", "content": content}])


@pytest.mark.parametrize("loop", [AvarSingleTurnAgentLoop, AvarToolAgentLoop])
@pytest.mark.parametrize("media", ["videos", "audios"])
def test_prompts_of_rollouts(loop, media, tiny_processor):
    one = object.__new__(loop)
    one.processor = tiny_processor
    refused = REFUSED if media == "videos" else REFUSED.replace("video", "audio")
    with pytest.raises(ValueError, match=refused):
        asyncio.run(one.ct_build_initial_tokens([], images=[Image.new("RGB", (8, 8))], **{media: [b"a"]}))


def test_text_and_images_pass():
    check_kinds(["text", "image", "text"])
