# SPDX-License-Identifier: Apache-2.0
"""A small OpenAI-compatible server that stands for a remote endpoint and records what it is asked.

As a program, `python -m tests.tools.evaluate.fake_server PORT LOG SECONDS`: one line of LOG a request, each answered
after SECONDS with the digest of its image as the answer.
"""

import asyncio
import base64
import contextlib
import hashlib
import json
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

Behaviour = Callable[[int, dict[str, Any]], Awaitable[tuple[int, str]]]


def image_digest(request: dict[str, Any]) -> str:
    """The first digits of the SHA-256 of the bytes of the request's images: which item it is about."""
    parts = [
        part for message in request["messages"] if isinstance(message["content"], list) for part in message["content"]
    ]
    uris = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    content = b"".join(base64.b64decode(uri.partition(",")[2]) for uri in uris)
    return hashlib.sha256(content).hexdigest()[:12]


@dataclass
class FakeServer:
    """What was asked; `behaviour(number, request)` -> (status, text), numbers from 0 in the order of arrival."""

    behaviour: Behaviour
    requests: list[dict[str, Any]] = field(default_factory=list)
    running: int = 0
    most_running: int = 0
    url: str = ""

    async def chat(self, request: web.Request) -> web.Response:
        body = await request.json()
        number = len(self.requests)
        self.requests.append(body)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            status, text = await self.behaviour(number, body)
        finally:
            self.running -= 1
        if status != 200:
            # The client waits as long as it is told to, so that a test of retries takes no time.
            return web.json_response({"error": {"message": text}}, status=status, headers={"retry-after-ms": "1"})
        return web.json_response(
            {
                "id": str(number),
                "object": "chat.completion",
                "created": 0,
                "model": body["model"],
                "choices": [
                    {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}},
                ],
                "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
            }
        )

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "fake", "object": "model"}]})

    def app(self) -> web.Application:
        app = web.Application(client_max_size=1 << 26)
        app.add_routes([web.post("/v1/chat/completions", self.chat), web.get("/v1/models", self.models)])
        return app


@contextlib.contextmanager
def serving(behaviour: Behaviour, port: int = 0) -> Iterator[FakeServer]:
    """The server in a thread of its own, for the time of the block."""
    server, started, loop = FakeServer(behaviour), threading.Event(), asyncio.new_event_loop()

    async def start() -> None:
        runner = web.AppRunner(server.app())
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", port)
        await site.start()
        server.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}/v1"
        started.set()

    def run() -> None:
        loop.run_until_complete(start())
        loop.run_forever()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert started.wait(10)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)


def main(port: int, log: str, seconds: float) -> None:
    async def answer(number: int, request: dict[str, Any]) -> tuple[int, str]:
        with open(log, "a") as file:
            file.write(json.dumps({"image": image_digest(request)}) + "\n")
        await asyncio.sleep(seconds)
        return 200, f"<answer>{image_digest(request)}</answer>"

    web.run_app(FakeServer(answer).app(), host="127.0.0.1", port=port, print=None)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], float(sys.argv[3]))
