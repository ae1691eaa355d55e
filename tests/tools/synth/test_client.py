# SPDX-License-Identifier: Apache-2.0
import asyncio
import json
import time

import pytest
from aiohttp import web

from avar_verl.tools.questions import Reply
from avar_verl.tools.synth.client import CallFailedError, Endpoint, EndpointDownError, parse_reply, retry_after
from avar_verl.tools.synth.config import EndpointConfig
from tests.tools.synth.conftest import serve

OK = {"choices": [{"message": {"content": "hi"}, "finish_reason": "stop"}], "usage": {"prompt_tokens": 3}}


def run(script, calls=1, share=1, body=None, **settings):
    """Call an endpoint whose server answers by `script`, a list of responses (the last one for ever): (results or
    exceptions, times of arrival, bodies)."""
    arrivals, bodies, inside = [], [], [0, 0]

    async def handler(request):
        arrivals.append(time.monotonic())
        bodies.append((dict(request.headers), await request.json()))
        inside[0] += 1
        inside[1] = max(inside)
        try:
            step = script[min(len(arrivals), len(script)) - 1]
            if callable(step):
                step = await step()
            status, headers, content = step
            text = content if isinstance(content, str) else json.dumps(content)
            return web.Response(status=status, headers=headers, text=text)
        finally:
            inside[0] -= 1

    async def go():
        app = web.Application()
        app.router.add_post("/v1/chat/completions", handler)
        runner, url = await serve(app)
        config = EndpointConfig(url=url, **{"backoff_s": 0.01, "timeout_s": 5.0, **settings})
        endpoint = Endpoint("e", config, share)
        results = await asyncio.gather(
            *(endpoint.chat(body or {"n": i}, 10) for i in range(calls)), return_exceptions=True
        )
        await endpoint.close()
        await runner.cleanup()
        return results

    return asyncio.run(go()), arrivals, bodies, inside[1]


def test_an_answer():
    (reply,), _, bodies, _ = run([(200, {}, OK)], body={"model": "m"})
    assert reply == Reply("hi", "stop", 3, None, attempts=1) and reply.seconds > 0
    assert bodies[0][1] == {"model": "m"} and "Authorization" not in bodies[0][0]


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 529])
def test_errors_are_tried_again(status):
    (reply,), arrivals, *_ = run([(status, {}, "no"), (200, {}, OK)])
    assert reply.text == "hi" and reply.attempts == 2 and len(arrivals) == 2


def test_unreadable_answers_are_tried_again():
    (reply,), arrivals, *_ = run([(200, {}, "not json"), (200, {}, {"choices": []}), (200, {}, OK)])
    assert reply.attempts == 3


def test_a_timeout_is_tried_again():
    async def hang():
        await asyncio.sleep(60)

    (reply,), *_ = run([hang, (200, {}, OK)], timeout_s=0.2)
    assert reply.attempts == 2


def test_back_off_doubles(monkeypatch):
    monkeypatch.setattr("random.uniform", lambda a, b: b)
    (error,), arrivals, *_ = run([(500, {}, "no")], backoff_s=0.1, max_backoff_s=0.2, max_attempts=4)
    assert isinstance(error, CallFailedError) and (error.reason, error.attempts) == ("HTTP 500: no", 4)
    assert not error.final
    waits = [b - a for a, b in zip(arrivals, arrivals[1:], strict=False)]
    for wait, expected in zip(waits, (0.1, 0.2, 0.2), strict=True):
        assert expected <= wait < expected + 0.09


def test_retry_after_holds_for_all_calls():
    results, arrivals, *_ = run(
        [(429, {"Retry-After": "0.4"}, "slow"), (200, {}, OK)], calls=3, in_flight=1, backoff_s=0.0
    )
    assert all(reply.text == "hi" for reply in results)
    assert min(arrivals[1:]) - arrivals[0] >= 0.4


def test_retry_after_is_bounded():
    (reply,), arrivals, *_ = run([(429, {"Retry-After": "900"}, ""), (200, {}, OK)], max_backoff_s=0.2)
    assert reply.text == "hi" and arrivals[1] - arrivals[0] < 1.0


def test_retry_after_as_a_date():
    assert 0 <= retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    assert retry_after("-3") == 0.0


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_bad_request_is_final(status):
    (error,), arrivals, *_ = run([(status, {}, "too long")])
    assert isinstance(error, CallFailedError) and error.final and len(arrivals) == 1
    assert error.reason == f"HTTP {status}: too long"


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_server_that_refuses_all_stops_the_run(status):
    (error,), arrivals, *_ = run([(status, {}, "no key")])
    assert isinstance(error, EndpointDownError) and len(arrivals) == 1
    assert "it refuses every request" in str(error)


def test_failures_in_a_row_stop_the_run():
    results, arrivals, *_ = run(
        [(500, {}, "no")], calls=5, in_flight=1, max_attempts=2, max_failed_in_row=3, backoff_s=0
    )
    kinds = [type(result) for result in results]
    assert kinds.count(CallFailedError) == 2 and kinds.count(EndpointDownError) == 3
    assert any("3 calls in a row have failed, the last one with: HTTP 500: no" in str(result) for result in results)
    assert len(arrivals) < 10  # those that waited were not sent


def test_an_answer_in_between_starts_the_count_anew():
    bad, good = (500, {}, "no"), (200, {}, OK)
    results, *_ = run([bad, bad, good, bad, bad, good], calls=6, in_flight=1, max_attempts=1, max_failed_in_row=3)
    assert [type(result) for result in results].count(EndpointDownError) == 0


def test_a_dead_port_stops_the_run():
    async def go():
        config = EndpointConfig(url="http://127.0.0.1:9/v1", backoff_s=0.0, max_attempts=2, max_failed_in_row=1)
        endpoint = Endpoint("gone", config)
        with pytest.raises(EndpointDownError, match="endpoint gone .* is down: 1 calls in a row .*Connect"):
            await endpoint.chat({})
        await endpoint.close()

    asyncio.run(go())


@pytest.mark.parametrize(("in_flight", "share", "most"), [(3, 1, 3), (4, 2, 2)])
def test_requests_in_flight(in_flight, share, most):
    async def slow():
        await asyncio.sleep(0.05)
        return 200, {}, OK

    results, _, _, seen = run([slow], calls=12, share=share, in_flight=in_flight)
    assert seen == most and all(result.text == "hi" for result in results)


def test_requests_a_minute():
    _, arrivals, *_ = run([(200, {}, OK)], calls=8, requests_per_minute=1200)
    # 20 a second: a bucket of 20 lets 8 through at once; 240 a minute is 4 a second.
    assert arrivals[-1] - arrivals[0] < 0.5
    _, arrivals, *_ = run([(200, {}, OK)], calls=8, requests_per_minute=240)
    assert arrivals[-1] - arrivals[0] >= 0.9


def test_tokens_a_minute():
    # Ten tokens a call, a bucket of 40 that fills by 40 a minute: the fifth call must wait 15 s.
    start = time.monotonic()

    async def go():
        config = EndpointConfig(url="http://127.0.0.1:9/v1", tokens_per_minute=40, max_attempts=1, max_failed_in_row=99)
        endpoint = Endpoint("e", config)
        waiting = [asyncio.ensure_future(endpoint.chat({}, 10)) for _ in range(5)]
        await asyncio.wait(waiting, timeout=1.0)
        done = sum(task.done() for task in waiting)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        await endpoint.close()
        return done

    assert asyncio.run(go()) == 4 and time.monotonic() - start < 5


def test_the_key_is_sent(monkeypatch):
    monkeypatch.setenv("SYNTH_TEST_KEY", "secret")
    _, _, bodies, _ = run([(200, {}, OK)], api_key_env="SYNTH_TEST_KEY")
    assert bodies[0][0]["Authorization"] == "Bearer secret"
    monkeypatch.delenv("SYNTH_TEST_KEY")

    async def make():
        Endpoint("e", EndpointConfig(url="http://x/v1", api_key_env="SYNTH_TEST_KEY"))

    with pytest.raises(EndpointDownError, match="endpoint e needs its key in \\$SYNTH_TEST_KEY"):
        asyncio.run(make())


@pytest.mark.parametrize("body", [{}, {"choices": []}, {"choices": [{"message": {"content": 3}}]}, [], None])
def test_something_else_than_a_completion(body):
    with pytest.raises(ValueError, match="no chat completion"):
        parse_reply(body)


def test_an_empty_answer_is_an_answer():
    assert parse_reply({"choices": [{"message": {"content": None}, "finish_reason": "length"}]}) == (
        "",
        "length",
        None,
        None,
    )
