# SPDX-License-Identifier: Apache-2.0
"""Calls per second of `avar synth run`, compared with a bare asyncio client, on a server that answers in 200 ms.

    python benchmarks/synth.py [--items 4000] [--in-flight 64] [--repeats 2]

One endpoint serves all three stages, so the maximum is in_flight / 0.2 s: 320 calls per second with 64. The client
sends the requests of the same inputs, encoded in advance, and does nothing else. The pipeline renders, hashes, looks
up, sends, and writes each answer to disk. The server has its own process. Seconds are from the first answer to the
last; "whole run" includes the start of Ray, reading the inputs, and the gates.
"""

import argparse
import asyncio
import contextlib
import io
import json
import os
import resource
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import aiohttp
import pyarrow as pa
import pyarrow.parquet as pq
from aiohttp import web

from avar_verl.tools.demo import photo_grid
from avar_verl.tools.synth.chain import make_request
from avar_verl.tools.synth.config import STAGES, load_config
from avar_verl.tools.synth.items import read_items

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "recipes" / "avar" / "synth" / "photo_grid.yaml"
CHAIN = (
    "<reasoning>In the image, the top left [0, 0, 56, 56] shows the cat. The top right [56, 0, 112, 56] shows a moon. "
    "Wait, let me look back at the image: the top left shows the cat again. So it is the cat.</reasoning>"
    "<answer>cat</answer>"
)


async def serve(latency: float) -> None:
    """The server: every request is answered after `latency` seconds."""

    def reply(text: str) -> bytes:
        message = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        return json.dumps({"choices": [message], "usage": {"prompt_tokens": 500, "completion_tokens": 100}}).encode()

    chain, description = reply(CHAIN), reply("The top left [0, 0, 56, 56] shows the cat. " * 8)

    async def chat(request: web.Request) -> web.Response:
        body = await request.read()
        await asyncio.sleep(latency)
        return web.Response(body=description if b"image_url" in body else chain, content_type="application/json")

    app = web.Application(client_max_size=64 << 20)
    app.router.add_post("/v1/chat/completions", chat)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    print(site._server.sockets[0].getsockname()[1], flush=True)
    await asyncio.Event().wait()


def write_inputs(path: Path, n: int) -> None:
    """n questions, each about its own picture."""
    rows = []
    for sample in photo_grid.iter_samples(n, 0, "train"):
        png = io.BytesIO()
        sample.image.save(png, "PNG")
        question = f"Question {sample.index}: what is it?"
        rows.append(
            {"question": question, "answer": "cat", "images": [{"bytes": png.getvalue()}], "boxes": [[[0, 0, 56, 56]]]}
        )
    pq.write_table(pa.Table.from_pylist(rows), path)


async def bare(url: str, bodies: list[bytes], in_flight: int) -> float:
    """Calls per second of a client that only sends."""
    slots, times = asyncio.Semaphore(in_flight), []
    headers = {"Content-Type": "application/json"}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def call(body: bytes) -> None:
            async with slots, session.post(url, data=body, headers=headers) as response:
                json.loads(await response.read())
                times.append(time.monotonic())

        await asyncio.gather(*(call(body) for body in bodies))
    return len(times) / (times[-1] - times[0])


def encoded(config, n: int) -> list[bytes]:
    """The requests of all stages, as a run sends them."""
    earlier = {"description": "The top left shows the cat. " * 8, "reasoning": CHAIN[11:200], "final_answer": "cat"}
    items = read_items(config.input)
    return [
        json.dumps(make_request(config, stage, item, earlier).body()).encode() for item in items for stage in STAGES
    ]


def pipeline(overrides: list[str], out: Path) -> tuple[float, float]:
    """(calls per second between the first and the last answer, seconds of the whole run)."""
    begin = time.monotonic()
    command = [sys.executable, "-m", "avar_verl", "synth", "run", "--config", str(CONFIG), *overrides]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    seconds = time.monotonic() - begin
    with contextlib.closing(sqlite3.connect(out / "cache.sqlite")) as database:
        n, first, last = database.execute("SELECT COUNT(*), MIN(created), MAX(created) FROM calls").fetchone()
    return n / (last - first), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=4000)
    parser.add_argument("--in-flight", type=int, default=64)
    parser.add_argument("--latency", type=float, default=0.2)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        asyncio.run(serve(args.latency))
        return
    command = [sys.executable, __file__, "--serve", "--latency", str(args.latency)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        port = int(server.stdout.readline())
        url = f"http://127.0.0.1:{port}/v1"
        ideal = args.in_flight / args.latency
        print(f"{args.items} items, {3 * args.items} calls, {args.in_flight} in flight, ideal {ideal:.0f} calls/s")
        print("| repeat | load | client, calls/s | avar synth, calls/s | of the ideal | of the client | whole run, s |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder)
            write_inputs(work / "inputs.parquet", args.items)
            settings = [f"input.files=[{work / 'inputs.parquet'}]", f"endpoints.vision.in_flight={args.in_flight}"]
            settings += [
                f"endpoints.vision.url={url}",
                "models.thinker.endpoint=vision",
                "endpoints.vision.timeout_s=60",
            ]
            settings += ["gates.disabled=[near_duplicate]", "output.browser_samples=0"]
            bodies = encoded(load_config(CONFIG, ["out=x", *settings]), args.items)
            for repeat in range(args.repeats):
                load = os.getloadavg()[0]
                client = asyncio.run(bare(f"{url}/chat/completions", bodies, args.in_flight))
                out = work / f"out{repeat}"
                synth, seconds = pipeline([f"out={out}", *settings], out)
                row = (
                    repeat,
                    f"{load:.1f}",
                    f"{client:.0f}",
                    f"{synth:.0f}",
                    f"{synth / ideal:.0%}",
                    f"{synth / client:.0%}",
                )
                print("| " + " | ".join(map(str, (*row, f"{seconds:.0f}"))) + " |", flush=True)
    finally:
        server.kill()
        server.wait()
    print(
        f"cores {os.cpu_count()}; CPU of the run and Ray {resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime:.0f} s"
    )


if __name__ == "__main__":
    main()
