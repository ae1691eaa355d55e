# SPDX-License-Identifier: Apache-2.0
"""One OpenAI-compatible endpoint: limits, retries with back-off, and detection of a dead endpoint. asyncio, no Ray."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import time
from collections.abc import AsyncIterator
from email.utils import parsedate_to_datetime
from typing import Any

import aiohttp
from aiolimiter import AsyncLimiter

from avar_verl.tools.questions import Reply
from avar_verl.tools.synth.config import EndpointConfig

# The same request would get the same response, so its item has failed.
FINAL_STATUS = {400, 413, 422}
# No request will be answered, so the run must stop.
FATAL_STATUS = {401, 402, 403, 404, 405}


class CallFailedError(Exception):
    """A call that got no answer. `final`: the same request would fail again."""

    def __init__(self, reason: str, attempts: int, final: bool):
        super().__init__(reason)
        self.reason, self.attempts, self.final = reason, attempts, final


class EndpointDownError(Exception):
    """The endpoint is dead; the run must stop."""


class _RetryError(Exception):
    """An attempt that may be repeated; `wait_s` is the server's Retry-After."""

    def __init__(self, reason: str, wait_s: float | None = None):
        super().__init__(reason)
        self.wait_s = wait_s


def retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header (a number or a date); None if missing or unreadable.

    >>> retry_after("1.5"), retry_after("soon"), retry_after(None)
    (1.5, None, None)
    """
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


def parse_reply(body: Any) -> tuple[str, str, int | None, int | None]:
    """(text, finish_reason, prompt tokens, generated tokens) of a chat completion.

    Raises:
        ValueError: something else.
    """
    try:
        choice = body["choices"][0]
        text = choice["message"].get("content") or ""
        usage = body.get("usage") or {}
        if not isinstance(text, str):
            raise TypeError(f"content is {type(text).__name__}")
        return text, choice.get("finish_reason") or "", usage.get("prompt_tokens"), usage.get("completion_tokens")
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"no chat completion: {type(error).__name__}: {error}") from error


class Endpoint:
    """Calls to one server. Create and use it in a single event loop.

    `share` is the number of processes that share the server's limits in equal parts.
    """

    def __init__(self, name: str, config: EndpointConfig, share: int = 1):
        self.name, self.config = name, config
        self.url = config.url.rstrip("/") + "/chat/completions"
        self.headers = {"Content-Type": "application/json"}
        if config.api_key_env is not None:
            if not os.environ.get(config.api_key_env):
                raise EndpointDownError(
                    f"endpoint {name} needs its key in ${config.api_key_env}; got none. Export it, on every node."
                )
            self.headers["Authorization"] = f"Bearer {os.environ[config.api_key_env]}"
        self.slots = asyncio.Semaphore(config.in_flight // share)
        # A limit per minute is applied per second, if a second has room for a request, to avoid bursts.
        self.requests = _limiter(config.requests_per_minute, share, smooth=True)
        self.tokens = _limiter(config.tokens_per_minute, share, smooth=False)
        self.session: aiohttp.ClientSession | None = None
        self.down: str | None = None
        self.failed_in_row = 0
        self.resume_at = 0.0

    async def chat(self, body: dict[str, Any], num_tokens: int = 0) -> Reply:
        """The answer to a request; `num_tokens` counts against tokens_per_minute.

        Raises:
            CallFailedError: no attempt got an answer, or the request was refused.
            EndpointDownError: too many calls in a row have failed, or the server refuses every request.
        """
        data = json.dumps(body).encode()
        reason, wait_s = "", None
        for attempt in range(1, self.config.max_attempts + 1):
            if attempt > 1:
                await asyncio.sleep(self._wait(attempt, wait_s))
            async with self._turn(num_tokens):
                start = time.monotonic()
                try:
                    parts = await self._post(data)
                except _RetryError as error:
                    reason, wait_s = str(error), error.wait_s
                    if wait_s is not None:
                        self.resume_at = time.monotonic() + min(wait_s, self.config.max_backoff_s)
                    continue
                except CallFailedError as error:
                    raise CallFailedError(error.reason, attempt, True) from error
                self.failed_in_row = 0
                return Reply(*parts, attempt, time.monotonic() - start)
        self.failed_in_row += 1
        if self.failed_in_row >= self.config.max_failed_in_row:
            self._stop(f"{self.failed_in_row} calls in a row have failed, the last one with: {reason}")
        raise CallFailedError(reason, self.config.max_attempts, False)

    def _wait(self, attempt: int, asked: float | None) -> float:
        if asked is not None:
            return min(asked, self.config.max_backoff_s) * random.uniform(1.0, 1.1)
        return min(self.config.backoff_s * 2 ** (attempt - 2), self.config.max_backoff_s) * random.uniform(0.5, 1.0)

    @contextlib.asynccontextmanager
    async def _turn(self, num_tokens: int) -> AsyncIterator[None]:
        """Wait for the rate limits and a free slot."""
        if self.requests is not None:
            await self.requests.acquire()
        if self.tokens is not None:
            await self.tokens.acquire(min(num_tokens, self.tokens.max_rate))
        async with self.slots:
            while (pause := self.resume_at - time.monotonic()) > 0:
                await asyncio.sleep(pause)
            if self.down is not None:
                raise EndpointDownError(self.down)
            yield

    async def _post(self, data: bytes) -> tuple[str, str, int | None, int | None]:
        if self.session is None:
            self.session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=self.config.timeout_s)
            )
        try:
            async with self.session.post(self.url, data=data, headers=self.headers) as response:
                if response.status == 200:
                    return parse_reply(json.loads(await response.read()))
                said = (await response.text(errors="replace"))[:200]
                reason = f"HTTP {response.status}: {said}"
                if response.status in FATAL_STATUS:
                    self._stop(f"it refuses every request: {reason}")
                if response.status in FINAL_STATUS:
                    raise CallFailedError(reason, 0, True)
                raise _RetryError(reason, retry_after(response.headers.get("Retry-After")))
        except TimeoutError as error:
            raise _RetryError(f"no answer within {self.config.timeout_s:g} s") from error
        except aiohttp.ClientError as error:
            raise _RetryError(f"{type(error).__name__}: {error}") from error
        except ValueError as error:
            raise _RetryError(f"an answer that cannot be read: {error}") from error

    def _stop(self, why: str) -> None:
        self.down = f"endpoint {self.name} ({self.url}) is down: {why}"
        raise EndpointDownError(self.down)

    async def close(self) -> None:
        """Close the connections."""
        if self.session is not None:
            await self.session.close()


def _limiter(per_minute: int | None, share: int, *, smooth: bool) -> AsyncLimiter | None:
    if per_minute is None:
        return None
    rate = per_minute / share
    if not smooth:
        return AsyncLimiter(max(1.0, rate), 60)
    return AsyncLimiter(rate / 60, 1) if rate >= 60 else AsyncLimiter(1, 60 / rate)
