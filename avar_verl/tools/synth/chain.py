# SPDX-License-Identifier: Apache-2.0
"""The three stages of one item; every call is looked up in the cache first. asyncio, no Ray.

The cache is the only state of the pipeline: a stage takes the results of earlier stages from there. So another process
can run a stage (a local engine), and a second run makes only the missing calls.
"""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from avar_verl.rewards.accuracy import grade_answer
from avar_verl.tools.questions import Reply
from avar_verl.tools.synth.client import CallFailedError, Endpoint, EndpointDownError
from avar_verl.tools.synth.config import STAGES, ModelConfig, SynthConfig
from avar_verl.tools.synth.items import Item
from avar_verl.tools.synth.prompts import load_prompt, parse_chain, parse_description, render
from avar_verl.tools.synth.store import Call, Failure, call_key

RESERVE_POLL_S = 0.05


class AsyncStore(Protocol):
    """The part of `store.Store` that the chain needs."""

    async def get(self, key: str) -> Call | Failure | None: ...

    async def put(self, record: Call | Failure, released: float) -> None: ...

    async def reserve(self, usd: float) -> str: ...


class BudgetSpentError(Exception):
    """The next call might exceed the budget."""


@dataclass
class Request:
    """One call that may have to be made."""

    item: Item
    stage: str
    model: ModelConfig
    key: str
    messages: list[dict[str, str]]
    sampling: dict[str, Any]
    sees_images: bool
    input_tokens: int

    @property
    def worst_usd(self) -> float:
        """Cost in dollars if the answer has the maximum length."""
        return self.model.cost(self.input_tokens, self.sampling["max_tokens"])

    def body(self) -> dict[str, Any]:
        """The body of a chat completion; the item's images come before the user's text."""
        messages: list[dict[str, Any]] = [dict(message) for message in self.messages]
        if self.sees_images:
            images = [
                {"type": "image_url", "image_url": {"url": f"data:{p.mime};base64,{base64.b64encode(p.data).decode()}"}}
                for p in self.item.pictures
            ]
            messages[-1]["content"] = [*images, {"type": "text", "text": messages[-1]["content"]}]
        return {"model": self.model.model, "messages": messages, **self.sampling}


@dataclass
class Progress:
    """State of an item in the cache: answers by stage, then a failure, an early end, or an open request."""

    calls: dict[str, Call] = field(default_factory=dict)
    failure: Failure | None = None
    ended: str = ""
    request: Request | None = None


def make_request(config: SynthConfig, stage: str, item: Item, earlier: dict[str, str]) -> Request:
    """The request of a stage, with its cache key."""
    settings, model = config.stage(stage), config.model(stage)
    prompt = load_prompt(settings.prompt)
    messages = render(settings, item, config.output.coordinates, earlier)
    pictures = [picture.pixels for picture in item.pictures] if settings.sees_images else []
    sampling = settings.sampling()
    key = call_key(model.model, f"{prompt.name}:{prompt.digest}", messages, pictures, sampling)
    pixels = sum(picture.width * picture.height for picture in item.pictures) if settings.sees_images else 0
    chars = sum(len(message["content"]) for message in messages)
    tokens = round(chars / model.chars_per_token) + pixels // model.pixels_per_token
    return Request(item, stage, model, key, messages, sampling, settings.sees_images, tokens)


def outcome(stage: str, call: Call, item: Item, earlier: dict[str, str]) -> str:
    """Add the output of a stage to `earlier`; returns the name of a gate if no later stage could fix a fault, else "".

    This only saves money: the gates check everything again.
    """
    if call.finish == "content_filter":
        return "refused"
    if call.finish == "length":
        return "truncated"
    if stage == "describe":
        earlier["description"] = parse_description(call.text)
        return "" if earlier["description"] else "format"
    chain = parse_chain(call.text)
    if chain is None:
        return "format"
    earlier["reasoning"], earlier["final_answer"] = chain
    return "" if grade_answer(chain[1], list(item.answers)) else "answer"


async def advance(
    config: SynthConfig,
    item: Item,
    get: Callable[[str], Awaitable[Call | Failure | None]],
    answer: Callable[[Request], Awaitable[Call | Failure | None]] | None = None,
) -> Progress:
    """Take an item through the stages. `answer` makes the calls that are not in the cache; without it, or if it returns
    None, the progress ends with the open request.
    """
    progress, earlier = Progress(), {}
    for stage in STAGES:
        request = make_request(config, stage, item, earlier)
        record = await get(request.key)
        if record is None and answer is not None:
            record = await answer(request)
        if record is None:
            progress.request = request
            return progress
        if isinstance(record, Failure):
            progress.failure = record
            return progress
        progress.calls[stage] = record
        progress.ended = outcome(stage, record, item, earlier)
        if progress.ended:
            return progress
    return progress


class Worker:
    """Makes the calls of items to endpoints in one event loop, within the limits of the endpoints."""

    def __init__(self, config: SynthConfig, store: AsyncStore):
        self.config, self.store = config, store
        self.endpoints = {
            name: Endpoint(name, endpoint, config.ray.workers) for name, endpoint in config.endpoints.items()
        }
        self.running: dict[str, asyncio.Task] = {}
        self.stopped: str | None = None

    async def process(self, item: Item) -> str:
        """Take an item as far as endpoints can; returns "", or why the run must stop."""
        if self.stopped is None and not item.problem:
            try:
                await advance(self.config, item, self.store.get, self._answer)
            except (EndpointDownError, BudgetSpentError) as error:
                self.stopped = self.stopped or str(error)
        return self.stopped or ""

    async def _answer(self, request: Request) -> Call | Failure | None:
        if request.model.endpoint is None:
            return None  # a local engine's
        if request.key not in self.running:  # two items with the same request share its answer
            task = asyncio.ensure_future(self._call(request))
            self.running[request.key] = task
            task.add_done_callback(lambda _: self.running.pop(request.key, None))
        return await asyncio.shield(self.running[request.key])

    async def _call(self, request: Request) -> Call | Failure:
        reserved = await self._reserve(request)
        try:
            tokens = request.input_tokens + request.sampling["max_tokens"]
            reply = await self.endpoints[request.model.endpoint].chat(request.body(), tokens)
            record: Call | Failure = make_call(self.config, request, reply)
        except CallFailedError as error:
            record = Failure(request.key, request.item.id, request.stage, error.reason, error.attempts, error.final)
        await self.store.put(record, reserved)
        return record

    async def _reserve(self, request: Request) -> float:
        if self.config.budget_usd is None:
            return 0.0
        while self.stopped is None:
            said = await self.store.reserve(request.worst_usd)
            if said == "yes":
                return request.worst_usd
            if said == "no":
                break
            await asyncio.sleep(RESERVE_POLL_S)
        raise BudgetSpentError(
            f"the budget of {self.config.budget_usd:g} dollars does not cover another call of stage "
            f"{request.stage}, which may cost {request.worst_usd:.4g}. Raise budget_usd: what is paid for is kept."
        )

    async def close(self) -> None:
        """Close the connections."""
        for endpoint in self.endpoints.values():
            await endpoint.close()


def make_call(config: SynthConfig, request: Request, reply: Reply) -> Call:
    """The record of an answer; token counts that the server does not report are estimated."""
    model = request.model
    tokens_in = request.input_tokens if reply.prompt_tokens is None else reply.prompt_tokens
    tokens_out = len(reply.text) / model.chars_per_token if reply.response_tokens is None else reply.response_tokens
    prompt = load_prompt(config.stage(request.stage).prompt)
    return Call(
        key=request.key,
        item=request.item.id,
        stage=request.stage,
        model=model.model,
        prompt=f"{prompt.name} ({prompt.digest})",
        text=reply.text,
        finish=reply.finish_reason,
        input_tokens=tokens_in,
        output_tokens=round(tokens_out),
        usd=model.cost(tokens_in, tokens_out),
        attempts=reply.attempts,
        seconds=reply.seconds,
        created=time.time(),
    )


def groups(config: SynthConfig) -> list[tuple[str, ...]]:
    """Group the stages into passes over the items: consecutive stages with endpoints form one pass, each engine its
    own.
    """
    out: list[tuple[str, ...]] = []
    for stage in STAGES:
        remote = config.model(stage).endpoint is not None
        if out and remote and config.model(out[-1][-1]).endpoint is not None:
            out[-1] = (*out[-1], stage)
        else:
            out.append((stage,))
    return out


def served(config: SynthConfig, stages: Sequence[str]) -> bool:
    """Whether these stages have endpoints."""
    return all(config.model(stage).endpoint is not None for stage in stages)
