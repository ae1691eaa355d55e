# SPDX-License-Identifier: Apache-2.0
"""What `trainer.rollout_data_dir` gets, through a real TransferQueue and verl's own writer."""

import hashlib
import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from tensordict import TensorDict
from tensordict.tensorclass import NonTensorStack
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from avar_verl.data.images import image_file, open_image
from avar_verl.objectives.vars import VISUAL_FIELDS
from avar_verl.plugin.config import OWN_TOKENS, TOOL_FILES, VISUAL_OUTPUT, VarsConfig
from avar_verl.plugin.trainer.ppo import AvarPPOTrainer
from avar_verl.plugin.trainer.rollouts import image_reference, images_of, sort_key, visual_columns, write_images


def picture(color: str) -> Image.Image:
    return Image.new("RGB", (12, 8), color)


def encoded(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def prompt(*images, question: str = "What?") -> list[dict]:
    blocks = [{"type": "image", **(image if isinstance(image, dict) else {"image": image})} for image in images]
    content = [*blocks, {"type": "text", "text": question}]
    return [{"role": "system", "content": "Look."}, {"role": "user", "content": content}]


def tokenizer() -> PreTrainedTokenizerFast:
    """Ids are characters; 0 is special."""
    vocabulary = {"#": 0, **{chr(code): code for code in range(65, 123)}}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="#"))
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="#")


def nested(*rows) -> torch.Tensor:
    return torch.nested.as_nested_tensor([torch.tensor(row) for row in rows], layout=torch.jagged)


def trainer(vars_config: VarsConfig, skip_special_tokens: bool = True) -> AvarPPOTrainer:
    out = object.__new__(AvarPPOTrainer)
    out.vars, out.tokenizer, out.global_steps = vars_config, tokenizer(), 7
    out.config = OmegaConf.create({"avar": {"reward": {"skip_special_tokens": skip_special_tokens}}})
    out._init_dump_executor()
    return out


def put(queue) -> SimpleNamespace:
    """Two prompts, a padding row; rollouts in another order than that of their keys.

    Rewards 1.1 (right), 0.1 (wrong), 1 (right); image shares 0.6, 0.5, not defined.
    """
    jpeg = encoded(picture("red"), "JPEG")
    visual = torch.full((4, len(VISUAL_FIELDS)), 0.5)
    visual[:, VISUAL_FIELDS.index("image_share")] = torch.tensor([0.6, 0.5, torch.nan, 0.9])
    parts = [{"acc": acc, "score": acc, "why": "short", "same": np.bool_(True)} for acc in (1.0, 0.0, 1.0, 1.0)]
    extras = [{"reward_extra_info": part, "image_sizes": [[28, 56]]} for part in parts]
    fields = TensorDict(
        {
            "uid": NonTensorStack("b", "a", "a", "b"),
            "prompts": nested([65, 66], [67], [67], [65, 66]),
            "responses": nested([97, 0], [98], [99, 100, 0], [97]),
            "response_mask": nested([1, 1], [1], [0, 1, 1], [0]),
            "advantages": nested([0.5, 0.5], [-1.0], [9.0, 2.0, 3.0], [0.0]),
            "rm_scores": nested([0.0, 1.1], [0.1], [0.0, 0.0, 1.0], [0.0]),
            "reward_model": NonTensorStack(*({"ground_truth": truth} for truth in ("x", "y", "y", "x"))),
            "data_source": NonTensorStack("geo", "grid", "grid", "geo"),
            "extra_fields": NonTensorStack(*extras),
            "extra_info": NonTensorStack(*({"index": i, "tools": object} for i in (4, 3, 3, 4))),
            "raw_prompt": NonTensorStack(
                prompt({"bytes": jpeg, "path": None}, question="b?"),
                prompt(picture("blue"), question="a?"),
                prompt(picture("blue"), question="a?"),
                prompt({"bytes": jpeg, "path": None}, question="b?"),
            ),  # fmt: skip
            VISUAL_OUTPUT: visual,
        },
        batch_size=4,
    )
    keys, tags = ["b_0_0", "a_1_0", "a_0_0", "b_1_0"], [{}, {}, {}, {"is_padding": True}]
    batch = queue.kv_batch_put(keys=keys, partition_id="train", fields=fields, tags=tags)
    batch.tags = tags
    return batch


@pytest.mark.e2e
def test_every_rollout_is_written_with_its_parts_masses_and_images(queue, tmp_path):
    batch = put(queue)
    dumping = trainer(VarsConfig(statistic="image_share", lambda_v=0.5))
    timing: dict = {}
    dumping._log_rollout_data(batch, timing, str(tmp_path))
    dumping._log_rollout_data(batch, timing, str(tmp_path))  # The images are there already.
    dumping._shutdown_dump_executor()
    queue.kv_clear(keys=batch.keys, partition_id="train")
    assert "dump_rollout_generations" in timing
    rows = [json.loads(line) for line in (tmp_path / "7.jsonl").read_text().splitlines()]
    assert [row["uid"] for row in rows] == ["a_0_0", "a_1_0", "b_0_0"]
    first, second, third = rows
    assert [(row["input"], row["output"], row["gts"]) for row in rows] == [
        ("C", "cd", "y"), ("C", "b", "y"), ("AB", "a", "x"),
    ]  # fmt: skip
    assert [row["score"] for row in rows] == pytest.approx([1.0, 0.1, 1.1]) and {row["step"] for row in rows} == {7}
    assert [row["correct"] for row in rows] == [True, False, True]
    assert [row["data_source"] for row in rows] == ["grid", "grid", "geo"]
    assert first["parts"] == {"acc": 1.0, "score": 1.0, "why": "short", "same": True}
    assert [row["advantage"] for row in rows] == [2.5, -1.0, 0.5]  # a masked token does not count
    assert third["visual"]["image_share"] == pytest.approx(0.6) and third["visual"]["system_mass"] == 0.5
    assert third["visual"]["r_visual_weighted"] == pytest.approx(0.3)
    assert second["visual"]["r_visual_gated"] == 0 and "dependency" not in second["visual"]
    assert first["visual"]["image_share"] is None
    assert third["extra_info"] == {"index": 4, "image_sizes": [[28, 56]], "prompt_text": "b?"}

    assert first["images"] == second["images"] != third["images"]
    assert sorted(f"images/{path.name}" for path in (tmp_path / "images").iterdir()) == sorted(
        {*first["images"], *third["images"]}
    )
    red, blue = encoded(picture("red"), "JPEG"), open_image(str(tmp_path / first["images"][0]))
    assert (tmp_path / third["images"][0]).read_bytes() == red
    assert third["images"] == [f"images/{hashlib.sha256(red).hexdigest()[:32]}.jpeg"]
    assert blue.size == (12, 8) and blue.getpixel((3, 3)) == (0, 0, 255)


@pytest.mark.e2e
def test_what_tools_returned_is_beside_what_the_policy_wrote(queue, tmp_path):
    """In the one rollout that called a tool: its own text, the whole conversation, and the image of the tool."""
    batch = put(queue)
    called = {"reward_extra_info": {"acc": 1.0}, OWN_TOKENS: [1, 0, 1], "tool_image_sizes": [[12, 8]]}
    extras = [{"reward_extra_info": {"acc": 1.0}}] * 2 + [{**called, TOOL_FILES: [image_file(picture("green"))]}] * 2
    fields = TensorDict({"extra_fields": NonTensorStack(*extras)}, batch_size=4)
    queue.kv_batch_put(keys=batch.keys, partition_id="train", fields=fields)
    dumping = trainer(VarsConfig(lambda_v=0))
    dumping._log_rollout_data(batch, {}, str(tmp_path))
    dumping._shutdown_dump_executor()
    queue.kv_clear(keys=batch.keys, partition_id="train")
    first, second, third = [json.loads(line) for line in (tmp_path / "7.jsonl").read_text().splitlines()]
    assert (first["output"], first["transcript"]) == ("c", "cd#")
    assert first["extra_info"]["tool_image_sizes"] == [[12, 8]] and "tool_image_sizes" not in second["extra_info"]
    assert (second["output"], second["transcript"], second["tool_images"]) == ("b", None, [])
    (part,) = first["tool_images"]
    assert open_image(str(tmp_path / part)).getpixel((3, 3)) == (0, 128, 0) and third["tool_images"] == []


@pytest.mark.e2e
def test_text_is_what_the_reward_function_read_and_nothing_need_be_measured(queue, tmp_path):
    batch = put(queue)
    dumping = trainer(VarsConfig(lambda_v=0), skip_special_tokens=False)
    dumping._log_rollout_data(batch, {}, str(tmp_path))
    dumping._shutdown_dump_executor()
    queue.kv_clear(keys=batch.keys, partition_id="train")
    rows = [json.loads(line) for line in (tmp_path / "7.jsonl").read_text().splitlines()]
    assert [row["output"] for row in rows] == ["cd#", "b", "a#"]
    assert [row["visual"] for row in rows] == [{}] * 3


def test_order_of_keys():
    keys = ["b_0_0", "a_10_0", "a_9_1", "a_9_0"]
    assert sorted(keys, key=sort_key) == ["a_9_0", "a_9_1", "a_10_0", "b_0_0"]


def test_images_of_a_conversation_are_those_of_its_blocks_in_order(tmp_path):
    path = tmp_path / "red.png"
    picture("red").save(path)
    messages = [*prompt(picture("blue"), str(path)), {"role": "user", "content": "an <image> in words"}]
    files: dict[str, bytes] = {}
    references = [image_reference(value, files) for value in images_of(messages)]
    assert len(references) == len(files) == 2 and references[1].endswith(".png")
    assert files[references[1].split("/")[1]] == path.read_bytes()
    address = "https://example.com/a.png"
    of_web = images_of([{"role": "user", "content": [{"type": "image_url", "image_url": address}]}])
    assert [image_reference(value, files) for value in of_web] == [address] and len(files) == 2


def test_equal_images_are_one_file_and_none_is_written_twice(tmp_path):
    name, content = image_file(picture("red"))
    assert image_file({"image": picture("red")}) == (name, content) != image_file(picture("blue"))
    write_images(tmp_path / "images", {name: content})
    (tmp_path / "images" / name).write_bytes(b"kept")
    write_images(tmp_path / "images", {name: content, "other.png": b"new"})
    assert {path.name: path.read_bytes() for path in (tmp_path / "images").iterdir()} == {
        name: b"kept",
        "other.png": b"new",
    }


@pytest.mark.parametrize("value", [b"no image", "/missing/image.png", {"bytes": None}])
def test_what_is_no_image_is_refused(value):
    with pytest.raises(ValueError, match="an image"):
        image_file(value)


def test_columns_are_those_that_are_measured():
    visual = torch.full((1, len(VISUAL_FIELDS)), 0.25)
    names = {"ratio", "image_share", "image_mass", "system_mass", "vas", "r_visual_raw"}
    measured = VarsConfig(lambda_v=0, measure=True)
    assert visual_columns(visual, [{}], ["a"], measured) == [dict.fromkeys(names, 0.25)]
    only_use = VarsConfig(lambda_v=0, measure_dependency=True)
    assert visual_columns(visual, [{}], ["a"], only_use) == [{"dependency": 0.25}]
