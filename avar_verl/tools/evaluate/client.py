# SPDX-License-Identifier: Apache-2.0
"""Requests to an OpenAI-compatible server, with bounded concurrency."""

import asyncio
import ipaddress
import time
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import urlsplit

import openai

from avar_verl.tools.evaluate.command import Sampling
from avar_verl.tools.questions import Question, Reply

MAX_FAILURES_IN_A_ROW = 10
"""Consecutive items without an answer that end a run: the cause is then not a bad item."""


def make_client(url: str, *, timeout_s: float, max_retries: int, api_key: str = "none") -> openai.AsyncOpenAI:
    """A client that retries after 408, 409, 429, 5xx, a lost connection or a timeout, with exponential back-off and the
    server's Retry-After. For a server on this machine, it ignores proxies set in the environment.
    """
    host = urlsplit(url).hostname or ""
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    http_client = openai.DefaultAsyncHttpxClient(trust_env=not local)
    return openai.AsyncOpenAI(
        base_url=url, api_key=api_key, timeout=timeout_s, max_retries=max_retries, http_client=http_client
    )


async def served_name(client: openai.AsyncOpenAI, wanted: str) -> str:
    """The model's name on the server: `wanted` if the server has it, else the only one it has.

    Raises:
        ValueError: the server has several models, and none is `wanted`.
    """
    names = [model.id async for model in client.models.list()]
    if wanted in names:
        return wanted
    if len(names) != 1:
        raise ValueError(f"the server must serve --model {wanted!r} or only one model; got {names}. Name one of them.")
    return names[0]


def response_text(message: Any) -> str:
    """What the model wrote, also where a reasoning parser of the server has taken it apart.

    The parser moves the reasoning to `reasoning` (vLLM; `reasoning_content` elsewhere) and drops its tags. They are put
    back, so that the answer is found where the reasoning ends. Without any content, the reasoning did not end.

    Raises:
        ValueError: a reply that was parsed into something else, such as tool calls.
    """
    extra = message.model_extra or {}
    content = message.content or ""
    reasoning = extra.get("reasoning") or extra.get("reasoning_content") or ""
    if other := [name for name in ("tool_calls", "function_call", "refusal", "audio") if getattr(message, name, None)]:
        raise ValueError(
            f"a reply must be text; got {', '.join(other)}. Start the server without --enable-auto-tool-choice, or use "
            "another one."
        )
    return f"<think>{reasoning}</think>{content}" if reasoning and content else reasoning + content


async def ask(
    client: openai.AsyncOpenAI, model: str, item: Question, sampling: Sampling, extra_body: dict[str, Any] | None = None
) -> Reply:
    """One item's response.

    Raises:
        openai.APIError: the server refused, or did not answer after all retries.
        ValueError: a reply without text or counts.
    """
    begin = time.monotonic()
    messages = await asyncio.to_thread(item.chat)  # Makes pictures, while other requests go on.
    reply = await client.chat.completions.create(
        model=model,
        messages=messages,
        temperature=sampling.temperature,
        max_tokens=sampling.max_tokens,
        seed=sampling.seed,
        top_p=sampling.top_p,
        extra_body=extra_body or None,
    )
    if not reply.choices or reply.usage is None:
        raise ValueError(f"a reply must have a choice and its usage; got {reply.model_dump_json()[:200]}. Use vLLM.")
    choice = reply.choices[0]
    return Reply(
        text=response_text(choice.message),
        finish_reason=choice.finish_reason,
        prompt_tokens=reply.usage.prompt_tokens,
        response_tokens=reply.usage.completion_tokens,
        seconds=time.monotonic() - begin,
    )


async def ask_all(
    items: Iterable[Question],
    answer: Callable[[Question], Any],
    *,
    concurrency: int,
    check: Callable[[], None] = lambda: None,
    check_s: float = 1.0,
) -> dict[str, str]:
    """Await `answer(item)` for every item, `concurrency` at a time; the reasons of those that failed, by id.

    Args:
        items: taken one by one, whenever a running one finishes.
        answer: asks, grades and records.
        check: called every `check_s` seconds; an exception ends the run.

    Raises:
        ValueError: `concurrency` < 1.
        RuntimeError: `MAX_FAILURES_IN_A_ROW` failures in a row.
    """
    if concurrency < 1:
        raise ValueError(f"concurrency must be at least 1; got {concurrency}. 64 suits one GPU.")
    queue = iter(items)
    failures: dict[str, str] = {}
    in_a_row = 0

    async def work() -> None:
        nonlocal in_a_row
        for item in queue:
            try:
                await answer(item)
                in_a_row = 0
            except openai.APIError as error:
                check()  # A dead server is the better error message.
                failures[item.id] = f"{type(error).__name__}: {error}"
                in_a_row += 1
                if in_a_row >= MAX_FAILURES_IN_A_ROW:
                    raise RuntimeError(
                        f"{in_a_row} items in a row have no answer, the last one because of {failures[item.id]}. Fix "
                        "the server and run the command again to continue."
                    ) from error

    async def watch() -> None:
        while True:
            check()
            await asyncio.sleep(check_s)

    workers = [asyncio.create_task(work()) for _ in range(concurrency)]
    watcher = asyncio.create_task(watch())
    pending = set(workers)
    try:
        while pending:
            done, _ = await asyncio.wait([*pending, watcher], return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            pending -= done
    finally:
        for task in (*workers, watcher):
            task.cancel()
        await asyncio.gather(*workers, watcher, return_exceptions=True)
    return failures
