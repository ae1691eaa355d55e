# SPDX-License-Identifier: Apache-2.0
"""`avar synth run` on Ray Data: passes over the items that fill the cache, then one that applies the gates and writes.

    files --read--> items --(map_batches: CallStages, one event loop a worker)--> cache       endpoints
    files --read--> items --open requests--> build_processor(vLLM) --> cache                   a local engine
    files --read--> items --(map_batches: Judge)--> driver, in order --> records, sft, rl

The cache is one actor on the driver's node with the folder's database. Our own actor calls the endpoints instead of
`HttpRequestProcessorConfig`: docs/synth.md says why.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import os
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, Datasource, ReadTask
from ray.data.block import BlockMetadata
from rich.console import Console

from avar_verl.data.rows import count_rows
from avar_verl.tools.progress import progress
from avar_verl.tools.synth.chain import Request, Worker, advance, groups, served
from avar_verl.tools.synth.config import STAGES, EngineConfig, SynthConfig
from avar_verl.tools.synth.duplicates import Overlap
from avar_verl.tools.synth.gates import Verdict, judge
from avar_verl.tools.synth.items import input_files, pack, read_items, unpack
from avar_verl.tools.synth.output import Writer
from avar_verl.tools.synth.prompts import load_prompt
from avar_verl.tools.synth.store import JOURNAL, Call, Failure, Journal, Store

BLOCK_ROWS = 32
# Batches of BLOCK_ROWS items in progress per worker; the endpoints limit the calls, this only feeds them.
BATCHES = 32
JUDGE_ROWS = 64
POLL_S = 1.0
# Attempts of a local engine in a run: no retries, because the same request fails the same way.
ENGINE_ATTEMPTS = 1
# Logical CPUs that Ray Data needs in addition to an engine: reading, images, chat template, tokenizer, post-processing.
ENGINE_CPUS = 5


class StoppedError(RuntimeError):
    """The run cannot continue; everything paid for is in the cache."""


# ---- reading ---------------------------------------------------------------------------------------------------

_SCHEMA = pa.schema([("id", pa.string()), ("item", pa.string()), ("blobs", pa.list_(pa.binary()))])


class ItemSource(Datasource):
    """Items of a config as a Ray data source, one read task per file."""

    def __init__(self, config: SynthConfig, limit: int = 0):
        super().__init__()
        self.config, self.limit = config, limit

    def estimate_inmemory_data_size(self) -> int | None:
        """Bytes of the files."""
        return sum(os.path.getsize(file) for file in input_files(self.config.input))

    def get_read_tasks(self, parallelism: int, *args: Any, **kwargs: Any) -> list[ReadTask]:
        """One task per file; with a limit, one for all files."""
        files = input_files(self.config.input)
        parts = [files] if self.limit else [[file] for file in files]
        config, limit = self.config, self.limit

        def task(part: list[str]) -> ReadTask:
            metadata = BlockMetadata(num_rows=None, size_bytes=None, exec_stats=None, input_files=part)
            return ReadTask(lambda: _blocks(config, part, limit), metadata, schema=_SCHEMA)

        return [task(part) for part in parts]


def _blocks(config: SynthConfig, files: list[str], limit: int) -> Iterator[pa.Table]:
    rows = []
    for item in read_items(config.input, files, limit):
        rows.append(pack(item))
        if len(rows) == BLOCK_ROWS:
            yield pa.Table.from_pylist(rows, _SCHEMA)
            rows = []
    if rows:
        yield pa.Table.from_pylist(rows, _SCHEMA)


def _rows(batch: pa.Table) -> list[dict[str, Any]]:
    return batch.to_pylist()


# ---- the cache across processes --------------------------------------------------------------------------------


class _Together:
    """Gathers what comes up while a request to the actor is on its way, for the next one.

    request: awaitable of the entries of a request; gives their results.
    """

    def __init__(self, request: Callable[[list], Awaitable[list]]):
        self.request, self.entries, self.running = request, [], False

    async def add(self, entry: Any) -> Any:
        """The result of an entry."""
        future = asyncio.get_running_loop().create_future()
        self.entries.append((entry, future))
        if not self.running:
            self.running = True
            asyncio.ensure_future(self._run())
        return await future

    async def _run(self) -> None:
        await asyncio.sleep(0)
        while self.entries:
            batch, self.entries = self.entries, []
            try:
                values = await self.request([entry for entry, _ in batch])
            except ray.exceptions.RayError as error:
                for _, future in batch:
                    future.set_exception(error)
                continue
            for (_, future), value in zip(batch, values, strict=True):
                if not future.cancelled():
                    future.set_result(value)
        self.running = False


class RemoteStore:
    """The cache actor as `chain.AsyncStore`. Answers are committed in groups, each before it is used."""

    def __init__(self, actor: Any, journal: Journal | None = None):
        self.actor, self.journal = actor, journal
        self.gets, self.puts = _Together(self._found), _Together(self._written)

    async def get(self, key: str) -> Call | Failure | None:
        """The record under a key."""
        return await self.gets.add(key)

    async def _found(self, keys: list[str]) -> list:
        found = await self.actor.get.remote(list(set(keys)))
        return [found.get(key) for key in keys]

    async def put(self, record: Call | Failure, released: float) -> None:
        """Write a record; it is on disk when this returns."""
        if self.journal is not None and isinstance(record, Call):
            self.journal.add(record)
        await self.puts.add((record, released))

    async def _written(self, entries: list[tuple]) -> list:
        await self.actor.put.remote([record for record, _ in entries], sum(released for _, released in entries))
        return [None] * len(entries)

    async def reserve(self, usd: float) -> str:
        """As `Store.reserve`."""
        return await self.actor.reserve.remote(usd)


# ---- what runs in Ray's workers ----------------------------------------------------------------------------------


class CallStages:
    """Async actor of a pass over endpoints: each item of a batch goes through its stages independently."""

    def __init__(self, config: SynthConfig, store: Any, overlap: Overlap | None):
        self.config, self.actor, self.overlap = config, store, overlap
        self.worker: Worker | None = None

    async def __call__(self, batch: pa.Table) -> dict[str, list]:
        if self.worker is None:
            journal = Journal(Path(self.config.out) / JOURNAL)
            self.worker = Worker(self.config, RemoteStore(self.actor, journal))
        items = [unpack(row) for row in _rows(batch)]
        wanted = [item for item in items if not (self.overlap and not item.problem and self.overlap.find(item))]
        stopped = await asyncio.gather(*(self.worker.process(item) for item in wanted))
        return {"items": [len(items)], "stopped": [next((why for why in stopped if why), "")]}


class Judge:
    """Actor of the last pass: verdicts from the cache."""

    def __init__(self, config: SynthConfig, store: Any, overlap: Overlap | None):
        self.config, self.actor, self.overlap = config, store, overlap

    def __call__(self, batch: pa.Table) -> dict[str, list]:
        rows = _rows(batch)
        found = asyncio.run(self._judge(rows))
        return {**{name: [row[name] for row in rows] for name in ("item", "blobs")}, "verdict": found}

    async def _judge(self, rows: list[dict]) -> list[str]:
        store = RemoteStore(self.actor)
        return await asyncio.gather(*(self._one(row, store) for row in rows))

    async def _one(self, row: dict, store: RemoteStore) -> str:
        item = unpack(row)
        why = self.overlap.find(item) if self.overlap and not item.problem else ""
        if why:
            return json.dumps(vars(Verdict(failed={"overlap": why})))
        if item.problem:
            return json.dumps(vars(Verdict(failed={"input": item.problem})))
        return json.dumps(vars(judge(self.config, item, await advance(self.config, item, store.get))))


# ---- the driver --------------------------------------------------------------------------------------------------


class Run:
    """A run of `avar synth run` in its folder."""

    def __init__(self, config: SynthConfig, limit: int, console: Console):
        # Workers may start in a different folder.
        self.config = dataclasses.replace(config, out=str(Path(config.out).absolute()))
        self.limit, self.console = limit, console
        self.folder = Path(config.out)
        for stage in ("describe", "reason", "integrate"):
            load_prompt(config.stage(stage).prompt)
        for name, endpoint in config.endpoints.items():
            if endpoint.api_key_env is not None and not os.environ.get(endpoint.api_key_env):
                raise ValueError(
                    f"endpoint {name} needs its key in ${endpoint.api_key_env}; got none. Export it, on every node."
                )
        self.files = input_files(config.input)
        total = count_rows([Path(file) for file in self.files])
        self.total = min(total, limit) if total is not None and limit else total
        self.folder.mkdir(parents=True, exist_ok=True)
        lists = config.gates.overlap_lists if "overlap" not in config.gates.disabled else []
        self.overlap = Overlap(lists, config.gates.duplicate_distance) if lists else None

    def run(self) -> dict[str, Any]:
        """Run all passes; returns the summary.

        Raises:
            StoppedError: a dead endpoint, or a budget that is spent.
        """
        begin = time.monotonic()
        start_ray(self.config)
        try:
            self._check_resources()
            node = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
                ray.get_runtime_context().get_node_id(), soft=False
            )
            actor = ray.remote(num_cpus=0, max_concurrency=1, scheduling_strategy=node)(Store)
            self.store = actor.remote(str(self.folder / "cache.sqlite"), self.config.budget_usd)
            try:
                ray.get(self.store.begin.remote())
            except ray.exceptions.RayActorError as error:
                raise ValueError(_cause(error).removeprefix("ValueError: ")) from error
            for stages in groups(self.config):
                if served(self.config, stages):
                    self._call(stages)
                else:
                    self._engine(stages[0])
            summary = self._judge()
            totals = self._totals()
            ray.get(self.store.adopt.remote())
            summary["calls"] = ray.get(self.store.by_stage.remote())
            summary["run"] = {**totals, "seconds": time.monotonic() - begin}
            return summary
        finally:
            if self.config.ray.address == "local":
                ray.shutdown()

    def _check_resources(self) -> None:
        """Check that engines fit before anything is paid for: Ray would silently wait forever for one that does not."""
        there = ray.cluster_resources()
        for stage, engine in local_engines(self.config).items():
            needs = engine.resources()
            if all(number <= there.get(name, 0) for name, number in needs.items()):
                continue
            has = {name: there.get(name, 0) for name in needs}
            if self.config.ray.address == "local":
                raise ValueError(
                    f"the engine of stage {stage} must fit this machine and takes {needs}; got {has}. Lower "
                    "tensor_parallel_size, set placement_group_config, or set ray.address to a cluster."
                )
            # A cluster may grow.
            self.console.print(f"{stage}: waits until the cluster, with {has} now, has {needs}", highlight=False)

    def _items(self) -> ray.data.Dataset:
        return ray.data.read_datasource(ItemSource(self.config, self.limit))

    def _call(self, stages: tuple[str, ...]) -> None:
        """A pass over endpoints."""
        dataset = self._items().map_batches(
            CallStages,
            fn_constructor_args=(self.config, self.store, self.overlap),
            batch_size=BLOCK_ROWS,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(
                size=self.config.ray.workers,
                max_tasks_in_flight_per_actor=2 * BATCHES,
                max_concurrent_calls_per_actor=BATCHES,
            ),
            num_cpus=0,
        )
        begin, before = time.monotonic(), self._totals()
        with self._bar(f"call {', '.join(stages)}") as advance_bar:
            for row in dataset.iter_rows():
                if row["stopped"]:
                    raise StoppedError(f"{row['stopped']} What is paid for is in {self.folder}; run again to continue.")
                advance_bar(row["items"])
        self._line(", ".join(stages), begin, before)

    def _engine(self, stage: str) -> None:
        """A pass of a local engine over the open requests."""
        from ray.data.llm import build_processor, vLLMEngineProcessorConfig

        engine = self.config.model(stage).engine
        begin = time.monotonic()
        open_rows = self._items().map_batches(
            OpenRequests,
            fn_constructor_args=(self.config, self.store, self.overlap, stage),
            batch_size=BLOCK_ROWS,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=1),
            num_cpus=0,
        )
        if not open_rows.take(1):
            self.console.print(f"{stage}: no open requests, no engine started", highlight=False)
            return
        processor = build_processor(
            vLLMEngineProcessorConfig(
                model_source=engine.model_source,
                engine_kwargs=dict(engine.engine_kwargs),
                batch_size=engine.batch_size,
                concurrency=engine.concurrency,
                accelerator_type=engine.accelerator_type,
                placement_group_config=engine.placement_group_config,
                should_continue_on_error=True,
                # They need ray[serve]; without it the engine's actor dies.
                log_engine_metrics=False,
                prepare_multimodal_stage={
                    "enabled": self.config.stage(stage).sees_images,
                    "chat_template_content_format": engine.chat_template_content_format,
                },
                # vLLM detokenizes, because stop strings need it.
                detokenize_stage=False,
            ),
            preprocess=_engine_request,
            postprocess=_engine_answer,
        )
        # Ray Data would restart a dead engine forever.
        processor.get_stage_by_name("vLLMEngineStage").map_batches_kwargs["max_restarts"] = engine.max_restarts
        done = processor(open_rows).map_batches(
            StoreAnswers,
            fn_constructor_args=(self.config, self.store, stage),
            batch_size=engine.batch_size,
            compute=ActorPoolStrategy(size=1),
            num_cpus=0,
        )
        before = self._totals()
        try:
            with self._bar(f"engine {stage}", None) as advance_bar:
                for row in done.iter_rows():
                    advance_bar(row["items"])
        except ray.exceptions.RayError as error:
            session = ray.get_runtime_context().get_session_name()
            raise StoppedError(
                f"the engine of stage {stage} has failed: {_cause(error)} What vLLM said is in Ray's logs "
                f"of {session}, worker-*.err and .out. What is paid for is in {self.folder}; run again to continue."
            ) from error
        self._line(stage, begin, before)

    def _judge(self) -> dict[str, Any]:
        """The last pass: write verdicts in input order."""
        dataset = self._items().map_batches(
            Judge,
            fn_constructor_args=(self.config, self.store, self.overlap),
            batch_size=JUDGE_ROWS,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(min_size=1, max_size=max(1, int(ray.cluster_resources().get("CPU", 1)))),
        )
        context = ray.data.DataContext.get_current()
        context.execution_options.preserve_order = True
        writer, done, begin = Writer(self.folder, self.config), False, time.monotonic()
        try:
            with self._bar("judge and write") as advance_bar:
                for row in dataset.iter_rows():
                    writer.add(unpack(row), Verdict(**json.loads(row["verdict"])))
                    advance_bar(1)
            done = True
        finally:
            context.execution_options.preserve_order = False
            summary = writer.close(keep=done)
        self.console.print(
            f"judge: {summary['inputs']} inputs, {summary['accepted']} accepted, {summary['rejected']} rejected, "
            f"{time.monotonic() - begin:.0f} s",
            highlight=False,
        )
        return summary

    def _totals(self) -> dict[str, Any]:
        return ray.get(self.store.totals.remote())

    def _line(self, name: str, begin: float, before: dict[str, Any]) -> None:
        """One line about a pass; `before` are the totals at its start."""
        after = self._totals()
        new, hits, failed = (after[key] - before[key] for key in ("new_calls", "hits", "failures"))
        self.console.print(
            f"{name}: {new} new answers, {hits} from the cache, {failed} failed, {after['usd']:.4g} USD so far, "
            f"{time.monotonic() - begin:.0f} s",
            highlight=False,
        )

    @contextlib.contextmanager
    def _bar(self, name: str, total: int | None = 0) -> Iterator[Callable[[int], None]]:
        """A progress bar over items, with the counters of the cache."""
        next_poll = 0.0
        with progress(total=self.total if total == 0 else total, desc=name, unit="item") as bar:

            def advance(items: int) -> None:
                nonlocal next_poll
                bar.update(items)
                if time.monotonic() > next_poll:
                    next_poll = time.monotonic() + POLL_S
                    totals = self._totals()
                    counters = f"{totals['new_calls']} calls, {totals['failures']} failed, {totals['usd']:.3g} USD"
                    bar.set_postfix_str(counters, refresh=False)

            yield advance


def _cause(error: ray.exceptions.RayError) -> str:
    """The message of a Ray error, without the stack frames of its process."""
    lines = re.sub("\x1b\\[[0-9;]*m", "", str(error)).splitlines()
    frames = [number for number, line in enumerate(lines) if line.startswith('  File "')]
    if frames:
        # Stack frames are followed by their source, indented further.
        lines = [line for line in lines[frames[-1] + 1 :] if not line.startswith("    ")]
    return " ".join(line.strip() for line in lines)[:500]


def local_engines(config: SynthConfig) -> dict[str, EngineConfig]:
    """Engines by the stage that they answer."""
    return {stage: engine for stage in STAGES if (engine := config.model(stage).engine) is not None}


def start_ray(config: SynthConfig) -> None:
    """Start Ray on this machine, or join a cluster."""
    local = config.ray.address == "local"
    if local:
        # Ray's core prints an error for every actor of Ray Data (ray-project/ray#53727); errors that stop anything come
        # as exceptions.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    # These are logical CPUs, not cores. Two are enough for a read task and a judge. An engine has more processes, each
    # of which is counted; with too few CPUs the pass would wait forever.
    engines = [ENGINE_CPUS + engine.resources().get("CPU", 0) for engine in local_engines(config).values()]
    cpus = {"num_cpus": max(2, config.ray.num_cpus or os.cpu_count() or 1, *engines)} if local else {}
    ray.init(
        address=config.ray.address,
        include_dashboard=False if local else None,
        log_to_driver=False,
        logging_level="ERROR",
        **cpus,
    )
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    # Ray Data also logs the stack frames of errors that it raises.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)


# ---- a local engine ----------------------------------------------------------------------------------------------


class OpenRequests:
    """Actor that returns the open requests of a stage, each key once."""

    def __init__(self, config: SynthConfig, store: Any, overlap: Overlap | None, stage: str):
        self.config, self.actor, self.overlap, self.stage = config, store, overlap, stage
        self.seen: set[str] = set()

    def __call__(self, batch: pa.Table) -> pa.Table:
        items = [unpack(row) for row in _rows(batch)]
        items = [item for item in items if not item.problem and not (self.overlap and self.overlap.find(item))]
        requests = [request for request in asyncio.run(self._open(items)) if self._is_new(request)]
        rows = [
            {
                "key": request.key,
                "id": request.item.id,
                # As JSON: Arrow would give every block of a message the keys of all others.
                "body": json.dumps(request.body()),
                "input_tokens": request.input_tokens,
            }
            for request in requests
        ]
        schema = pa.schema(
            [("key", pa.string()), ("id", pa.string()), ("body", pa.string()), ("input_tokens", pa.int64())]
        )
        return pa.Table.from_pylist(rows, schema)

    def _is_new(self, request: Request | None) -> bool:
        if request is None or request.stage != self.stage or request.key in self.seen:
            return False
        self.seen.add(request.key)
        return True

    async def _open(self, items: Iterable) -> list[Request | None]:
        store = RemoteStore(self.actor)
        found = await asyncio.gather(*(advance(self.config, item, store.get) for item in items))
        return [progress.request for progress in found]


def _engine_request(row: dict[str, Any]) -> dict[str, Any]:
    body = json.loads(row["body"])
    sampling = {key: value for key, value in body.items() if key not in ("model", "messages")}
    return {"messages": body["messages"], "sampling_params": sampling}


def _engine_answer(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "key": row["key"],
        "text": row["generated_text"],
        "input_tokens": row["num_input_tokens"],
        "output_tokens": row["num_generated_tokens"],
        "id": row["id"],
    }


class StoreAnswers:
    """Actor that writes the answers of an engine into the cache."""

    def __init__(self, config: SynthConfig, store: Any, stage: str):
        self.config, self.actor, self.stage = config, store, stage

    def __call__(self, batch: dict[str, Any]) -> dict[str, list]:
        keys = list(batch["key"])
        rows = [{name: values[number] for name, values in batch.items()} for number in range(len(keys))]
        ray.get(self.actor.put.remote([self._record(row) for row in rows], 0.0))
        return {"items": [len(rows)]}

    def _record(self, row: dict[str, Any]) -> Call | Failure:
        error = row.get("__inference_error__", "")
        if error:
            return Failure(row["key"], row["id"], self.stage, str(error)[:500], ENGINE_ATTEMPTS, False)
        settings, model = self.config.stage(self.stage), self.config.model(self.stage)
        # Ray does not pass on the finish reason; these are the lengths at which vLLM cuts off.
        tokens = int(row["output_tokens"])
        whole = int(row["input_tokens"]) + tokens
        cut = tokens >= settings.max_tokens or whole >= model.engine.engine_kwargs["max_model_len"]
        prompt = load_prompt(settings.prompt)
        return Call(
            key=row["key"],
            item=row["id"],
            stage=self.stage,
            model=model.model,
            prompt=f"{prompt.name} ({prompt.digest})",
            text=str(row["text"]),
            finish="length" if cut else "stop",
            input_tokens=int(row["input_tokens"]),
            output_tokens=tokens,
            usd=model.cost(int(row["input_tokens"]), tokens),
            attempts=ENGINE_ATTEMPTS,
            seconds=0.0,
            created=time.time(),
        )
