# SPDX-License-Identifier: Apache-2.0
"""A config on photo grids, and the example server in this process."""

import argparse
import asyncio
import io

import pytest
from aiohttp import web

from avar_verl.tools.demo import photo_grid
from avar_verl.tools.synth.chain import Worker
from avar_verl.tools.synth.config import load_config
from avar_verl.tools.synth.items import Item, make_picture, read_items
from avar_verl.tools.synth.store import Store
from examples.synth.inputs import write_inputs
from examples.synth.kill_and_resume import CONFIG
from examples.synth.server import Server, parser


class LocalStore:
    """`Store` as `chain.AsyncStore`."""

    def __init__(self, store: Store):
        self.store = store

    async def get(self, key):
        return self.store.get([key]).get(key)

    async def put(self, record, released):
        self.store.put([record], released)

    async def reserve(self, usd):
        return self.store.reserve(usd)


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """24 photo grids as inputs."""
    path = tmp_path_factory.mktemp("inputs") / "inputs.parquet"
    write_inputs(path, 24)
    return path


@pytest.fixture
def make_config(tmp_path, inputs):
    """`make_config(*overrides)` -> the config of the photo grids, writing into this test's folder."""

    def make(*overrides: str):
        return load_config(CONFIG, [f"out={tmp_path / 'out'}", f"input.files=[{inputs}]", *overrides])

    return make


@pytest.fixture
def items(make_config):
    return list(read_items(make_config().input))


@pytest.fixture(scope="session")
def grid_item():
    """`grid_item(index)` -> item of a photo grid."""

    def make(index: int = 0, **changes) -> Item:
        sample = photo_grid.make_samples(index + 1, 0, "train")[index]
        png = io.BytesIO()
        sample.image.save(png, "PNG")
        fields = {
            "source": "grid.parquet",
            "row": index,
            "question": f"<image>{sample.question}",
            "answers": (sample.answer,),
            "pictures": (make_picture(png.getvalue()),),
            "boxes": (tuple(tuple(map(float, box)) for box in sample.boxes),),
        }
        return Item(**{**fields, **changes})

    return make


def server_settings(**settings) -> argparse.Namespace:
    """Arguments of the example server: no latency, no errors, no faults unless set."""
    args = parser().parse_args([])
    return argparse.Namespace(**{**vars(args), "n": 24, "latency": 0.0, "errors": 0.0, "flawed": 0.0, **settings})


@pytest.fixture(scope="session")
def example_server():
    """`example_server(**settings)` -> the server's logic, without a socket."""
    return lambda **settings: Server(server_settings(**settings), None)


async def serve(application: web.Application) -> tuple[web.AppRunner, str]:
    """Start an application on a free port: (runner, base URL)."""
    runner = web.AppRunner(application, handler_cancellation=True, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    return runner, f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}/v1"


@pytest.fixture
def process_all(make_config):
    """`process_all(server, items, *overrides)` -> (config, store, what each item's processing said): the stages of all
    items by the example server, in this process."""
    stores = []

    def run(server: Server, items, *overrides: str, store: Store | None = None):
        async def go():
            runner, url = await serve(server.application())
            config = make_config(*(f"endpoints.{name}.url={url}" for name in ("vision", "language")), *overrides)
            opened = store or Store(f"{config.out}/cache.sqlite", config.budget_usd)
            stores.append(opened)
            worker = Worker(config, LocalStore(opened))
            said = await asyncio.gather(*(worker.process(item) for item in items))
            await worker.close()
            await runner.cleanup()
            return config, opened, said

        return asyncio.run(go())

    yield run
    for store in stores:
        store.close()
