# SPDX-License-Identifier: Apache-2.0
"""The three stages by the example server, in this process."""

import asyncio
import dataclasses

import pytest
from aiohttp import web

from avar_verl.tools.synth.chain import Worker, advance, groups, make_request, outcome
from avar_verl.tools.synth.gates import judge
from avar_verl.tools.synth.store import Call, Failure, Store
from tests.tools.synth.conftest import LocalStore, serve


def verdicts(config, store, items):
    async def go():
        local = LocalStore(store)
        return [judge(config, item, await advance(config, item, local.get)) for item in items]

    return asyncio.run(go())


def test_all_right_is_all_accepted(process_all, example_server, items):
    config, store, said = process_all(example_server(wrong=0.0), items)
    assert set(said) == {""} and store.totals()["new_calls"] == 3 * len(items)
    found = verdicts(config, store, items)
    assert [verdict.failed for verdict in found] == [{}] * len(items)
    for verdict, item in zip(found, items, strict=True):
        assert verdict.answer == item.answers[0] and "[0, 0, 56, 56]" in verdict.response


def test_a_second_run_calls_nobody(process_all, example_server, items):
    _, store, _ = process_all(example_server(wrong=0.2), items)
    store.close()
    server = example_server(wrong=0.2)
    _, again, _ = process_all(server, items)
    assert server.answered == 0 and again.totals()["new_calls"] == 0


def test_wrong_answers_are_found_and_stop_before_stage_3(process_all, example_server, items):
    config, store, _ = process_all(example_server(wrong=0.5), items)
    found = verdicts(config, store, items)
    wrong = [verdict for verdict in found if verdict.gate == "answer"]
    assert 4 <= len(wrong) <= 20 and all(verdict.gate in ("", "answer") for verdict in found)
    stages = store.means()
    early = sum("reason:" in verdict.failed["answer"] for verdict in wrong)
    assert 0 < early < len(wrong)
    assert stages["integrate", "photo-grid-language"][0] == len(items) - early


def test_flaws_are_found_under_their_gates(process_all, example_server, items):
    config, store, _ = process_all(example_server(wrong=0.0, flawed=1.0), items)
    gates = {verdict.gate for verdict in verdicts(config, store, items)}
    assert gates == {"leak_description", "reflection", "anchors", "format"}


def test_the_same_request_at_the_same_time_is_made_once(process_all, example_server, items):
    server = example_server(wrong=0.0)
    twins = [items[0], dataclasses.replace(items[0], row=99)]
    process_all(server, twins)
    assert server.answered == 3


def test_an_item_that_fails_keeps_its_reason_and_is_tried_again(process_all, example_server, items):
    down = example_server(errors=1.0, retry_after=0.0)
    overrides = ("endpoints.vision.backoff_s=0.01", "endpoints.vision.timeout_s=0.3", "endpoints.vision.max_attempts=2")
    config, store, said = process_all(down, items[:3], *overrides)
    assert said == ["", "", ""]
    found = verdicts(config, store, items[:3])
    assert [verdict.gate for verdict in found] == ["call"] * 3
    assert all(
        "describe: " in verdict.failed["call"] and "after 2 attempts" in verdict.failed["call"] for verdict in found
    )
    store.begin()
    config, store, _ = process_all(example_server(wrong=0.0), items[:3], store=store)
    assert [verdict.gate for verdict in verdicts(config, store, items[:3])] == [""] * 3


def test_a_dead_endpoint_stops_the_run(process_all, example_server, items):
    overrides = ["endpoints.vision.backoff_s=0.01", "endpoints.vision.timeout_s=0.3", "endpoints.vision.max_attempts=1"]
    overrides.append("endpoints.vision.max_failed_in_row=2")
    _, store, said = process_all(example_server(errors=1.0, retry_after=0.0), items, *overrides)
    assert any("endpoint vision" in why and "2 calls in a row have failed" in why for why in said)
    assert store.totals()["new_calls"] == 0


def test_the_budget_is_never_exceeded(process_all, example_server, items):
    # A description may cost 2048 output tokens: 0.0205 USD at 10 USD a million; it costs about 0.003.
    config, store, said = process_all(example_server(wrong=0.0, latency=0.01), items, "budget_usd=0.05")
    assert any("the budget of 0.05 dollars does not cover another call of stage describe" in why for why in said)
    assert 0.0 < store.spent <= 0.05
    # It used what can be used: what is left is less than a call may cost.
    worst = make_request(config, "describe", items[0], {}).worst_usd
    assert 0.05 - store.spent < worst


def test_a_bad_item_is_not_sent(process_all, example_server, items):
    server = example_server()
    process_all(server, [dataclasses.replace(items[0], problem="broken")])
    assert server.answered == 0


def test_images_stand_in_front_of_the_text(make_config, items):
    body = make_request(make_config("stages.describe.extra={top_k: 3}"), "describe", items[0], {}).body()
    kinds = [block["type"] for block in body["messages"][-1]["content"]]
    assert kinds == ["image_url", "text"] and body["top_k"] == 3 and body["max_tokens"] == 2048
    assert body["messages"][-1]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")
    text = make_request(make_config(), "reason", items[0], {"description": "d"}).body()["messages"][-1]["content"]
    assert isinstance(text, str)


def test_tokens_are_estimated_by_characters_and_pixels(make_config, items):
    request = make_request(make_config("models.describer.chars_per_token=1"), "describe", items[0], {})
    assert request.input_tokens == sum(len(m["content"]) for m in request.messages) + 112 * 112 // 784


def call(stage: str, text: str, finish: str = "stop") -> Call:
    return Call("k", "i", stage, "m", "p", text, finish, 1, 1, 0.0, 1, 0.0, 0.0)


@pytest.mark.parametrize(
    ("stage", "text", "finish", "gate"),
    [
        ("describe", "a cat", "stop", ""),
        ("describe", "<think>hm</think>", "stop", "format"),
        ("describe", "a cat", "length", "truncated"),
        ("describe", "", "content_filter", "refused"),
        ("reason", "no tags", "stop", "format"),
        ("reason", "<reasoning>a</reasoning><answer>RIGHT</answer>", "stop", ""),
        ("reason", "<reasoning>a</reasoning><answer>moon</answer>", "stop", "answer"),
    ],
)
def test_outcome(grid_item, stage, text, finish, gate):
    assert outcome(stage, call(stage, text, finish), grid_item(0, answers=("right",)), {}) == gate


def test_stages_go_together_by_where_they_run(make_config):
    config = make_config()
    assert groups(config) == [("describe", "reason", "integrate")]
    config.models["thinker"].endpoint = None
    assert groups(config) == [("describe",), ("reason",), ("integrate",)]
    config = make_config()
    config.models["describer"].endpoint = None
    assert groups(config) == [("describe",), ("reason", "integrate")]


def test_a_refused_request_is_not_made_again(make_config, items, tmp_path):
    seen = []

    async def refuse(request):
        seen.append(1)
        return web.Response(status=400, text="too many tokens")

    async def go(store):
        app = web.Application()
        app.router.add_post("/v1/chat/completions", refuse)
        runner, url = await serve(app)
        worker = Worker(make_config(f"endpoints.vision.url={url}"), LocalStore(store))
        await worker.process(items[0])
        await worker.close()
        await runner.cleanup()

    store = Store(tmp_path / "cache.sqlite")
    for _ in range(2):
        store.begin()
        asyncio.run(go(store))
    assert len(seen) == 1
    found = verdicts(make_config(), store, items[:1])
    assert found[0].failed == {"call": "describe: HTTP 400: too many tokens (after 1 attempts)"}
    assert isinstance(
        next(iter(store.get([make_request(make_config(), "describe", items[0], {}).key]).values())), Failure
    )
