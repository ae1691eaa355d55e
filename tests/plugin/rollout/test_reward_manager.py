# SPDX-License-Identifier: Apache-2.0
"""The reward manager inside verl's own loader, and inside a Ray worker of verl's, with every shipped reward."""

import asyncio
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import verl.experimental.agent_loop  # noqa: F401  before what registers itself with it
import verl.experimental.reward_loop.reward_manager  # noqa: F401
from tensordict import TensorDict

from avar_verl.plugin.config import OWN_TOKENS, PROMPT_ROWS, TOOL_FILES
from avar_verl.plugin.rollout.agent_loop import image_fields
from avar_verl.plugin.rollout.reward_manager import FAILED, own_tokens, prompt_text
from avar_verl.tools.demo import photo_grid
from tests.plugin.test_config import recipe

RESPONSE = "<think>In the image there is a cup: <|box_start|>(10,20),(300,400)<|box_end|> so</think><answer>4</answer>"
USERS = """
import time
def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    kind = ground_truth
    if kind == "raises":
        raise KeyError("column")
    if kind == "hangs":
        time.sleep(30)
    if kind == "nan":
        return {"score": float("nan"), "acc": 1.0}
    if kind == "number":
        return 0.5
    seen = {"images": extra_info["image_sizes"], "internal": [name for name in extra_info if name.startswith("avar_")]}
    seen["prompt"] = extra_info["prompt_text"]
    return {"score": 1.0, "acc": 1.0, "characters": float(len(solution_str)), **seen}
async def compute_score_async(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    return compute_score(data_source, solution_str, ground_truth, extra_info)
"""


@pytest.fixture
def config(tmp_path, tiny_model_path):
    """`config(*overrides)` of the GRPO recipe, with the function above as the reward."""
    (tmp_path / "mine.py").write_text(USERS)

    def make(*overrides: str):
        return recipe(
            "avar_grpo",
            "machine=cpu_grpo",
            f"actor_rollout_ref.model.path={tiny_model_path}",
            f"reward.custom_reward_function.path={tmp_path / 'mine.py'}",
            "data.train_files=x",
            "data.val_files=x",
            *overrides,
        )

    return make


@pytest.fixture
def manager(config, tiny_processor):
    from verl.trainer.ppo.reward import load_reward_manager

    return lambda *overrides: load_reward_manager(config(*overrides), tiny_processor.tokenizer)


def rollout(tokenizer, ground_truth, response: str = RESPONSE, **extra):
    """One finished rollout as verl's agent loop hands it to the reward."""
    from verl import DataProto

    ids = torch.tensor(tokenizer.encode(response, add_special_tokens=False))[None]
    prompts = torch.zeros(1, 3, dtype=torch.long)
    batch = TensorDict(
        {
            "prompts": prompts,
            "responses": torch.nn.functional.pad(ids, (0, 2)),
            "attention_mask": torch.nn.functional.pad(torch.ones(1, 3 + ids.shape[1], dtype=torch.long), (0, 2)),
        },
        batch_size=1,
    )
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "how many cups?"}]},
    ]
    fields = {
        "data_source": "cups",
        "reward_model": {"ground_truth": ground_truth},
        "extra_info": {"index": 7, "boxes": [], "boxes_size": [10, 10]},
        "tool_extra_fields": {"image_sizes": [[640, 480]], **extra},
        "raw_prompt": messages,
    }
    non_tensor = {}
    for key, value in fields.items():
        non_tensor[key] = np.empty(1, dtype=object)
        non_tensor[key][0] = value
    return DataProto(batch=batch, non_tensor_batch=non_tensor)


def score(manager, data) -> dict:
    return asyncio.run(manager.run_single(data))


@pytest.mark.parametrize("name", ["compute_score", "compute_score_async"])
def test_special_tokens_reach_the_reward_when_asked(manager, tiny_processor, name):
    function = f"reward.custom_reward_function.name={name}"
    data = rollout(tiny_processor.tokenizer, "4")
    with_tokens = score(manager(function, "avar.reward.skip_special_tokens=false"), data)
    without = score(manager(function), data)
    lost = len("<|box_start|><|box_end|>")
    assert with_tokens["reward_extra_info"]["characters"] - without["reward_extra_info"]["characters"] == lost
    assert with_tokens["reward_score"] == 1.0 and with_tokens["reward_extra_info"][FAILED] == 0.0
    assert with_tokens["reward_extra_info"]["prompt"] == "how many cups?"


def test_the_turns_of_tools_are_not_scored(manager, tiny_processor):
    """A response of three parts, of which the policy wrote two; what is for the trainer is not passed on."""
    tokenizer = tiny_processor.tokenizer
    parts = [tokenizer.encode(text, add_special_tokens=False) for text in ("<think>a", " the cat [0, 0, 56, 56]", "b")]
    own = [int(at != 1) for at, ids in enumerate(parts) for _ in ids]
    response = tokenizer.decode([token for ids in parts for token in ids])
    data = rollout(tokenizer, "4", response, **{OWN_TOKENS: own, PROMPT_ROWS: {}, TOOL_FILES: [("a", b"b")]})
    scored = score(manager(), data)["reward_extra_info"]
    assert scored["characters"] == len("<think>ab") and scored["images"] == [[640, 480]] and not scored["internal"]
    with pytest.raises(ValueError, match="got 2 marks for 3 tokens. Give one for every token"):
        own_tokens(torch.arange(3), [1, 0])


def test_a_number_is_the_accuracy(manager, tiny_processor):
    result = score(manager(), rollout(tiny_processor.tokenizer, "number"))
    assert result == {"reward_score": 0.5, "reward_extra_info": {"score": 0.5, "acc": 0.5, FAILED: 0.0}}


@pytest.mark.parametrize("kind, word", [("raises", "failed"), ("nan", "failed"), ("hangs", "timed out")])
def test_one_bad_sample_costs_itself_alone(manager, tiny_processor, caplog, kind, word):
    """Its parts have the keys of the others, all 0, and the log names it."""
    good = manager("avar.reward.timeout_s=0.3")
    first = score(good, rollout(tiny_processor.tokenizer, "4"))
    start = time.monotonic()
    bad = score(good, rollout(tiny_processor.tokenizer, kind))
    assert time.monotonic() - start < 10
    assert bad["reward_score"] == 0 and bad["reward_extra_info"][FAILED] == 1.0
    assert set(bad["reward_extra_info"]) == set(first["reward_extra_info"])
    assert f"reward function {word} for data_source 'cups', index 7" in caplog.text
    assert score(good, rollout(tiny_processor.tokenizer, "4")) == first


def test_the_gate_is_there_even_if_the_first_sample_fails(manager, tiny_processor):
    bad = score(manager("avar.vars.gate_key=right"), rollout(tiny_processor.tokenizer, "raises"))
    assert bad["reward_extra_info"] == {"score": 0.0, "right": 0.0, FAILED: 1.0}


def test_a_function_that_never_works_ends_the_run(manager, tiny_processor):
    good = manager("avar.reward.max_failures=3")
    bad, fine = rollout(tiny_processor.tokenizer, "raises"), rollout(tiny_processor.tokenizer, "4")
    for data in (bad, bad, fine, bad, bad):  # A success starts the count anew.
        score(good, data)
    with pytest.raises(RuntimeError, match="must work for some sample; got 3 failures in a row.*index 7: KeyError"):
        score(good, bad)


def test_prompt_text():
    messages = [
        {"role": "system", "content": "no"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "no"},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "two"}]},
    ]
    assert prompt_text(messages) == "one\ntwo"


def test_image_fields():
    fields = image_fields({"image_grid_thw": torch.tensor([[1, 8, 6], [1, 4, 4]])}, 14)
    assert fields == {"image_grids": [[1, 8, 6], [1, 4, 4]], "image_sizes": [[84, 112], [56, 56]]}
    assert image_fields({}, 14) == image_fields({"image_grid_thw": torch.tensor([[1, 8, 6]])}, None) == {}


@pytest.mark.e2e
def test_every_shipped_reward_in_a_ray_worker_of_verls(config, tiny_processor, tiny_model_path):
    """The same parts as in this process, for each reward chosen by one override, and for a user's own file."""
    import ray
    from verl.trainer.ppo.reward import load_reward_manager

    @ray.remote
    def in_a_worker(all_settings, rollouts):
        import asyncio

        from verl.experimental.reward_loop.reward_loop import RewardLoopWorker

        workers = [RewardLoopWorker(settings, None) for settings in all_settings]

        async def score_all():
            return [[await worker.compute_score(data) for data in rollouts] for worker in workers]

        return asyncio.run(score_all())

    samples = photo_grid.make_samples(2, 0, "train")
    texts = [samples[0].response, RESPONSE, "", "4"]
    rollouts = [rollout(tiny_processor.tokenizer, samples[0].answer, text) for text in texts]
    names = ("avar", "accuracy", "format", "visual_anchor", "grounding_iou")
    overrides = [[f"reward.custom_reward_function.path=pkg://reward_fns.{name}"] for name in names]
    parts = "{acc:{weight:1.0},anchor:{weight:0.3,gate:acc,settings:{coordinates:absolute}}}"
    composed = "reward.custom_reward_function.path=pkg://reward_fns.compose"
    overrides += [[composed, f"+reward.custom_reward_function.reward_kwargs.parts={parts}"], []]
    pixels = "+reward.custom_reward_function.reward_kwargs.coordinates=absolute"
    all_settings = [config(*override, pixels) for override in overrides]
    ray.init(num_cpus=2, include_dashboard=False)
    try:
        there = ray.get(in_a_worker.remote(all_settings, rollouts))
    finally:
        ray.shutdown()
    for settings, results, override in zip(all_settings, there, overrides, strict=True):
        here = load_reward_manager(settings, tiny_processor.tokenizer)
        assert results == [score(here, data) for data in rollouts], override
        assert all(result["reward_extra_info"][FAILED] == 0.0 for result in results), override
        assert len({tuple(result["reward_extra_info"]) for result in results}) == 1, override
    by_name = dict(zip(names, there, strict=False))
    assert by_name["visual_anchor"][0]["reward_extra_info"]["anchor"] > 0.5  # a demo's response is full of boxes
    assert by_name["avar"][0]["reward_extra_info"]["acc"] == 1.0


def test_the_loop_renders_the_prompt_once_and_keeps_what_it_learned(monkeypatch, tiny_model_path):
    """vLLM gets one placeholder for the image, training all of them, the reward its size; no placeholder is sampled."""
    from PIL import Image
    from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop
    from verl.utils import hf_processor

    from avar_verl.plugin.compat.verl.rollout_features import FEATURES
    from avar_verl.plugin.rollout.agent_loop import FORBIDDEN, AvarSingleTurnAgentLoop

    processor = hf_processor(tiny_model_path)
    image = Image.new("RGB", (112, 112))
    messages = [{"role": "user", "content": [{"type": "image", "image": "a path"}, {"type": "text", "text": "What?"}]}]
    sent = {}

    class Client:
        async def generate(self, **kwargs):
            sent.update(kwargs)

    async def run(self, sampling_params, priority=0, **kwargs):
        ids = await self.ct_build_initial_tokens(messages, images=[image], mm_inputs_out={})
        await self.server_manager.generate(prompt_ids=ids, image_data=[image], sampling_params=sampling_params)
        return SimpleNamespace(prompt_ids=ids, extra_fields={"kept": 1}, multi_modal_data={"images": [image]})

    monkeypatch.setattr(SingleTurnAgentLoop, "run", run)
    loop = AvarSingleTurnAgentLoop.__new__(AvarSingleTurnAgentLoop)
    loop.processor, loop.server_manager = processor, Client()
    loop.apply_chat_template_kwargs, loop.mm_processor_kwargs = {}, {}
    loop.rollout_config = SimpleNamespace(prompt_length=64)

    async def both():
        loop.loop = asyncio.get_running_loop()
        return await loop.run({"temperature": 1.0})

    output = asyncio.run(both())
    assert output.extra_fields == {"kept": 1, "image_grids": [[1, 8, 8]], "image_sizes": [[112, 112]]}
    assert output.multi_modal_data[FEATURES]["image_grid_thw"].tolist() == [[1, 8, 8]]
    assert output.prompt_ids.count(processor.image_token_id) == 16
    assert sent["prompt_ids"].count(processor.image_token_id) == 1
    assert sent["sampling_params"]["logit_bias"][processor.image_token_id] == FORBIDDEN
    loop.rollout_config = SimpleNamespace(prompt_length=8)
    with pytest.raises(ValueError, match="a prompt with images must have at most rollout.prompt_length=8 tokens; got"):
        asyncio.run(both())
