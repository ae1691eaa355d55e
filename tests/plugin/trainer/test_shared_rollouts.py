# SPDX-License-Identifier: Apache-2.0
"""The rollouts of a prompt share its rendering and its stored pixels: verl's agent-loop worker on a real TransferQueue.

What a worker reads must be bit for bit what it reads when every rollout stores its own.
"""

import asyncio
import copy
import random
from contextvars import ContextVar

import numpy
import pytest
import torch
from PIL import Image
from tensordict import NonTensorData
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopWorkerTQ
from verl.utils import tensordict_utils as tu
from verl.utils import transferqueue_utils
from verl.workers.rollout.replica import TokenOutput

from avar_verl.plugin.compat.verl.shared_features import FIELD, HOLDER, complete, missing, plain_rows
from avar_verl.plugin.config import PARTNER
from avar_verl.plugin.engine.inputs import partner_features, sample_features
from avar_verl.plugin.rollout import agent_loop
from avar_verl.plugin.rollout.shared import CURRENT, SharedPrompt
from avar_verl.plugin.switch import switch_on
from avar_verl.plugin.trainer.dependency import choose_partners
from benchmarks.memory import count_rows
from tests.plugin.test_config import recipe

# With models and a worker: not among the quick ones.
pytestmark = pytest.mark.e2e
N, N_VAL = 4, 2


ROLLOUT: ContextVar[int] = ContextVar("rollout")


class Client:
    """In the place of vLLM: every rollout gets other tokens after another time; those of the numbers `fail` fail."""

    def __init__(self, fail=()):
        self.fail, self.images = fail, []

    async def generate(self, **kwargs):
        number = ROLLOUT.get()
        self.images.append(kwargs["image_data"])
        await asyncio.sleep(random.Random(number).random() / 100)
        if number in self.fail:
            raise RuntimeError(f"rollout {number} fails")
        ids = [5 + number % 7] * (2 + number % 3)
        return TokenOutput(token_ids=ids, log_probs=[-0.5] * len(ids), extra_fields={})


def numbered(cls):
    """The worker, whose tasks know the number of their rollout."""

    async def _run_agent_loop(self, *args, **kwargs):
        ROLLOUT.set(int(kwargs["uid"][1:]) * 10 + kwargs["session_id"])
        return await cls._run_agent_loop(self, *args, **kwargs)

    return type(cls.__name__, (cls,), {"_run_agent_loop": _run_agent_loop})


@pytest.fixture(scope="module")
def config(tiny_model_path):
    overrides = [f"actor_rollout_ref.model.path={tiny_model_path}", f"actor_rollout_ref.rollout.n={N}"]
    overrides += [f"actor_rollout_ref.rollout.val_kwargs.n={N_VAL}", "data.max_prompt_length=64"]
    return recipe("avar_grpo", "machine=cpu_grpo", *overrides)


@pytest.fixture
def roll_out(queue, config, monkeypatch):
    """`roll_out(worker class, client, ...)` -> (raw rows by key, what a worker reads by key, renderings)."""
    switch_on()
    rendered = []
    original = agent_loop.render
    monkeypatch.setattr(agent_loop, "render", lambda *args, **kwargs: rendered.append(1) or original(*args, **kwargs))

    def work(cls, client, messages, validate=False, failed=()):
        rendered.clear()
        partition = "val" if validate else "train"
        uids = [f"u{index}" for index in range(len(messages))]
        batch = tu.get_tensordict(
            {
                "uid": uids,
                "raw_prompt": copy.deepcopy(messages),
                "index": list(range(len(messages))),
                "dummy_tensor": torch.zeros(len(messages), 1, dtype=torch.uint8),
            },
            {"global_steps": 1, **({"validate": True} if validate else {})},
        )
        batch["global_steps"] = NonTensorData(1)

        async def run():
            worker = numbered(cls)(config, client, None, None)
            await worker.generate_sequences(batch)
            await asyncio.gather(*worker.background_tasks)

        asyncio.run(run())
        listed = queue.kv_list(partition)[partition]
        assert {key: listed[key]["status"] for key in uids} == {
            key: "failure" if key in failed else "finished" for key in uids
        }
        keys = sorted(key for key in listed if "_" in key)
        raw = queue.kv_batch_get(keys=keys, partition_id=partition)
        meta = KVBatchMeta(keys=keys, tags=[{}] * len(keys), partition_id=partition, fields=None, extra_info={})
        return keys, raw, transferqueue_utils._meta_to_realdata(meta), len(rendered), meta

    yield work
    clear(queue)


def clear(queue) -> None:
    for partition, items in queue.kv_list().items():
        if items:
            queue.kv_clear(keys=list(items), partition_id=partition)


def stock():
    return AgentLoopWorkerTQ.__ray_metadata__.modified_class.__ray_actor_class__


def ours():
    from avar_verl.plugin.rollout.worker import AvarAgentLoopWorker

    return AvarAgentLoopWorker


def messages(seed: int, size=(112, 112)) -> list[dict]:
    pixels = numpy.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=numpy.uint8)
    image = {"type": "image", "image": Image.fromarray(pixels)}
    return [{"role": "user", "content": [image, {"type": "text", "text": f"What is {seed}?"}]}]


def text(seed: int) -> list[dict]:
    return [{"role": "user", "content": f"What is {seed}?"}]


def check_equal(name: str, one, other) -> None:
    assert type(one) is type(other), name
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other), name
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), name
        for key in one:
            check_equal(f"{name}.{key}", one[key], other[key])
    else:
        assert one == other, name


def check_same(one, other, skipped=("raw_prompt",)) -> None:
    """Two batches, field by field and row by row."""
    assert set(one.keys()) == set(other.keys()) and len(one) == len(other) > 0
    for name in set(one.keys()) - set(skipped):
        mine, theirs = one[name], other[name]
        if name == FIELD:
            mine, theirs = plain_rows(mine), plain_rows(theirs)
        elif isinstance(mine, torch.Tensor) and mine.is_nested:
            mine, theirs = mine.unbind(), theirs.unbind()
        elif not isinstance(mine, torch.Tensor):
            mine, theirs = list(mine), list(theirs)
        for row, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            if name != "metrics":  # Seconds.
                check_equal(f"{name} of row {row}", a, b)


def pixels(raw) -> list[bool]:
    return ["pixel_values" in row for row in plain_rows(raw[FIELD])]


@pytest.mark.parametrize("validate", [False, True])
def test_a_worker_reads_what_it_read_before(roll_out, queue, validate):
    """Two pictures and a text; verl's worker stores and renders for every rollout, ours for every prompt."""
    prompts, n = [messages(0), text(1), messages(2, size=(56, 112))], N_VAL if validate else N
    keys, raw, expected, renderings, _ = roll_out(stock(), Client(), prompts, validate)
    assert len(keys) == 3 * n and renderings == 3 * n and sum(pixels(raw)) == 2 * n
    check_same(raw, expected)
    clear(queue)

    client = Client()
    mine, raw, read, renderings, _ = roll_out(ours(), client, prompts, validate)
    assert mine == keys and renderings == 3 and sum(pixels(raw)) == 2
    check_same(read, expected)
    rows = plain_rows(read[FIELD])
    same = [row["pixel_values"].data_ptr() for key, row in zip(keys, rows, strict=True) if key.startswith("u0_")]
    assert len(same) == n and len(set(same)) == 1  # One tensor for all of them in the worker that reads.
    assert len({id(images[0]) for images in client.images if images}) == 2
    holders = [tuple(row[HOLDER]) for row in plain_rows(raw[FIELD]) if HOLDER in row]
    assert len(holders) == 2 * n and len(set(holders)) == 2


def test_bytes_of_stored_rows(roll_out, queue):
    """As benchmarks/memory.py counts them: an image of 112 x 112 pixels has 64 patches of 1176 float32."""
    keys, *_ = roll_out(stock(), Client(), [messages(0), messages(1)])
    one_each = count_rows(keys, "train")
    clear(queue)
    keys, *_ = roll_out(ours(), Client(), [messages(0), messages(1)])
    one_a_prompt = count_rows(keys, "train")
    pixels, pictures = f"{FIELD}: pixels", "raw_prompt: pictures"
    assert one_each[pixels] == 2 * N * 64 * 1176 * 4 and one_a_prompt[pixels] == 2 * 64 * 1176 * 4
    assert one_each[pictures] == one_a_prompt[pictures] == 2 * N * 112 * 112 * 3
    name = len(HOLDER) + len("train") + len("u0_0_0")
    assert one_a_prompt.pop(FIELD) == one_each.pop(FIELD) + 2 * N * name - 2 * (N - 1) * len("pixel_values")
    rest = set(one_each) - {pixels, pictures, "metrics"}  # Of seconds.
    assert {name: one_each[name] for name in rest} == {name: one_a_prompt[name] for name in rest}
    assert (
        one_each["responses"]
        == sum(2 + number % 3 for prompt in range(2) for number in range(10 * prompt, 10 * prompt + N)) * 8
    )


def test_the_reader_of_other_rows_fetches_the_holders(roll_out):
    """Another data-parallel rank: none of its rows has the pixels."""
    keys, raw, read, _, meta = roll_out(ours(), Client(), [messages(0), messages(1)])
    without = [index for index, has in enumerate(pixels(raw)) if not has]
    meta.keys, meta.tags = [keys[index] for index in without], [{}] * len(without)
    assert len(without) == 2 * (N - 1)
    part, rows = plain_rows(transferqueue_utils._meta_to_realdata(meta)[FIELD]), plain_rows(read[FIELD])
    for row, index in zip(part, without, strict=True):
        check_equal(FIELD, row, rows[index])


def test_a_failing_rollout_is_not_the_holder(roll_out, queue):
    """The rollouts that remain have their pixels whichever fails; verl trains on them."""
    for failing in range(N):
        keys, raw, read, _, _ = roll_out(ours(), Client(fail=[failing]), [messages(0)], failed=["u0"])
        assert len(keys) == N - 1 and sum(pixels(raw)) == 1
        assert all("pixel_values" in row for row in plain_rows(read[FIELD]))
        clear(queue)


def test_a_rollout_that_could_not_be_stored_is_not_the_holder(roll_out, queue):
    """Nor one whose reward fails: both names would lead nowhere."""
    for name in ("_compute_teacher_logprobs", "_compute_score"):
        cls, failures = type("Worker", (ours(),), {}), []

        async def fail_once(self, *args, failures=failures, **kwargs):
            if not failures:
                failures.append(1)
                raise RuntimeError("once")

        setattr(cls, name, fail_once)
        keys, raw, read, _, _ = roll_out(cls, Client(), [messages(0)], failed=["u0"])
        assert failures and len(keys) == N - 1 and sum(pixels(raw)) == 1
        assert all("pixel_values" in row for row in plain_rows(read[FIELD]))
        clear(queue)


def test_scores_are_computed_once_and_side_by_side(roll_out):
    running, most, done = [], [], []

    async def score(self, outputs, kwargs):
        if outputs[-1].reward_score is not None:  # As verl's.
            return
        running.append(1)
        most.append(len(running))
        await asyncio.sleep(0.05)
        running.pop()
        outputs[-1].reward_score = float(kwargs["session_id"])
        done.append(kwargs["session_id"])

    cls = type("Worker", (ours(),), {"_compute_score": score})
    keys, _, read, _, _ = roll_out(cls, Client(), [messages(0)])
    assert sorted(done) == list(range(N)) and max(most) == N
    assert [float(scores.sum()) for scores in read["rm_scores"].unbind()] == [0.0, 1.0, 2.0, 3.0]


def test_swapped_images_are_found(roll_out, queue):
    """The trainer compares pixels of every prompt, the engine fetches those of the partner."""
    keys, raw, read, _, meta = roll_out(ours(), Client(), [messages(0), messages(1)])
    batch = KVBatchMeta(keys=keys[::-1], tags=[{}] * len(keys), partition_id="train", extra_info={})
    choose_partners(batch)
    chosen = queue.kv_batch_get(keys=keys, partition_id="train", select_fields=[PARTNER])
    assert [partner[:2] for partner in chosen[PARTNER]] == ["u1"] * N + ["u0"] * N
    data = tu.get_tensordict({PARTNER: list(chosen[PARTNER])}, dict(batch.extra_info))
    found = partner_features(data)
    own = dict(zip(keys, sample_features(read), strict=True))
    for key in set(chosen[PARTNER]):
        assert torch.equal(found[key]["pixel_values"], own[key]["pixel_values"])


def test_rows_without_their_holder_are_an_error():
    row = {"image_grid_thw": torch.ones(1, 3), HOLDER: ["train", "u0_0_0"]}
    held = {**row, "pixel_values": torch.ones(4, 2)}
    assert missing([row, row]) == {"train": ["u0_0_0"]} and missing([row, held]) == {} and missing([{}]) == {}
    assert all("pixel_values" in done and HOLDER not in done for done in complete([row, row], [held]))
    assert HOLDER in row and complete([{}, {"image_grid_thw": 1}], []) == [{}, {"image_grid_thw": 1}]
    with pytest.raises(ValueError, match="the rollout that holds the pixels of a prompt must have them; got none in"):
        complete([row], [])


def test_what_a_prompt_shares_and_for_how_long():
    raw = messages(0)

    async def work():
        shared, calls = SharedPrompt(raw, "train"), []

        async def once():
            calls.append(1)
            await asyncio.sleep(0)
            return "pictures"

        assert await asyncio.gather(*(shared.once("media", once) for _ in range(3))) == ["pictures"] * 3
        assert len(calls) == 1 and await shared.once("other", once) == "pictures" and len(calls) == 2
        assert shared.is_of(raw) and shared.is_of(list(raw))
        assert not shared.is_of([dict(raw[0])]) and not shared.is_of([*raw, *raw]) and not shared.is_of([])

        async def failing():
            raise ValueError("no picture")

        results = await asyncio.gather(*(shared.once("bad", failing) for _ in range(2)), return_exceptions=True)
        assert [str(error) for error in results] == ["no picture"] * 2
        shared.features = {"pixel_values": 1}
        shared.drop()
        assert shared.features is None and not shared.is_of(raw)

    asyncio.run(work())
    assert CURRENT.get() is None
