# SPDX-License-Identifier: Apache-2.0
"""What ray.data.llm's HTTP processor does that docs/synth.md gives as the reason for an actor of our own.

A test that fails here says that upstream has changed: look again whether the actor is still needed.
"""

import asyncio
import time

import pytest
from aiohttp import web
from ray.llm._internal.batch.stages.http_request_stage import HttpRequestUDF

from tests.tools.synth.conftest import serve


def run(script, rows=1, **settings):
    """The processor's own UDF against a server that answers by `script`: (rows or the exception, requests, seconds)."""
    arrivals = []

    async def handler(request):
        arrivals.append(time.monotonic())
        await asyncio.sleep(0.1)
        status, text = script[min(len(arrivals), len(script)) - 1]
        return web.Response(status=status, text=text, content_type="application/json")

    async def go():
        app = web.Application()
        app.router.add_post("/v1/chat/completions", handler)
        runner, url = await serve(app)
        udf = HttpRequestUDF(
            "__data", ["payload"], f"{url}/chat/completions", base_retry_wait_time_in_s=0.01, **settings
        )
        batch = [{"payload": {"n": n}, udf.IDX_IN_BATCH_COLUMN: n} for n in range(rows)]
        start = time.monotonic()
        try:
            out = [row async for row in udf.udf(batch)]
        except RuntimeError as error:
            out = error
        seconds = time.monotonic() - start
        await runner.cleanup()
        return out, len(arrivals), seconds

    return asyncio.run(go())


def test_requests_of_a_batch_go_one_after_the_other():
    out, requests, seconds = run([(200, "{}"), (200, '{"a": 1}')][1:], rows=5)
    assert len(out) == requests == 5 and seconds > 0.5  # five times 0.1 s


def test_a_row_that_fails_ends_the_job():
    out, requests, _ = run([(429, "slow down")], max_retries=2)
    assert isinstance(out, RuntimeError) and requests == 3 and "Reached maximum retries of 2" in str(out)


@pytest.mark.parametrize("status", [500, 401, 400])
def test_an_error_with_a_body_is_taken_for_an_answer(status):
    out, requests, _ = run([(status, '{"error": {"message": "no"}}')], max_retries=2)
    assert requests == 1 and out[0]["http_response"] == {"error": {"message": "no"}}
