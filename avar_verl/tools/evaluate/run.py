# SPDX-License-Identifier: Apache-2.0
"""`avar eval`: ask, grade, record, resume a killed run, and summarise."""

import asyncio
import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import openai

from avar_verl.tools.evaluate.benchmarks import Benchmark, benchmark_items, expand, load_benchmark, resolve_revision
from avar_verl.tools.evaluate.client import ask, ask_all, make_client, served_name
from avar_verl.tools.evaluate.command import Eval
from avar_verl.tools.evaluate.intervene import Intervention, check_server, make_intervention
from avar_verl.tools.evaluate.server import NAME, cpu_environment, free_port, running_server, server_command
from avar_verl.tools.progress import progress
from avar_verl.tools.questions import Question, file_questions
from avar_verl.tools.records import Record, Records, graded, read
from avar_verl.tools.runs import fingerprint, write_json
from avar_verl.tools.stats import group_accuracy, standard_error

RESULTS = "results.json"
# Changes whenever a response would be graded differently.
GRADER_VERSION = 2
# Changes whenever an image would be sent differently.
PICTURES_VERSION = 1
DEFAULT_PATCH_SIZE = 14  # Of Qwen2.5-VL, and of verl's data sets for processors without one.


@dataclass(frozen=True)
class Task:
    """Source of the items of one task."""

    name: str
    source: dict[str, Any]
    """Part of the settings: everything that the items depend on."""

    items: Callable[[], Iterator[Question]]


def _benchmark_task(benchmark: Benchmark) -> Task:
    revision = resolve_revision(benchmark)
    source = {
        "dataset": benchmark.dataset,
        "config": benchmark.config,
        "split": benchmark.split,
        "revision": revision,
        "prompt": benchmark.prompt_id(),
    }
    return Task(benchmark.name, source, lambda: benchmark_items(benchmark, revision))


def _file_task(path: Path) -> Task:
    # The content of rows is in the prompt hashes of the records: a longer file with the same rows can continue.
    return Task(path.stem, {"file": path.name}, lambda: file_questions(path))


def make_tasks(settings: Eval) -> list[Task]:
    """The tasks of a run.

    Raises:
        ValueError: no task, a repeated name, an unknown benchmark, or a data file with an invalid row.
    """
    benchmarks = [load_benchmark(name) for name in (expand(settings.tasks) if settings.tasks else [])]
    names = [benchmark.name for benchmark in benchmarks] + [path.stem for path in settings.data]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"avar eval needs --tasks or --data, every task once; got {names}. Name one.")
    return [_benchmark_task(one) for one in benchmarks] + [_file_task(path) for path in settings.data]


def local_model(settings: Eval) -> Path | None:
    """The model's folder, downloaded from the hub if `model` is a name there; None for the model of a remote server."""
    path = Path(settings.model)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"--model must be a Hugging Face folder; got no config.json in {path}. Check the path.")
        return path.resolve()
    if settings.server_url:
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(settings.model))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise ValueError(
            f"--model must be a Hugging Face folder or a name on the hub; got {settings.model!r}: {error}. Check the "
            "path."
        ) from error


def record_settings(settings: Eval, task: Task, model: Path | None, intervention: Intervention) -> dict[str, Any]:
    """Everything that a record depends on; records with different values are never mixed."""
    return {
        "model": str(model or settings.model),
        "model_files": fingerprint(model) if model else None,
        "task": task.name,
        "source": task.source,
        "pictures": PICTURES_VERSION,
        "patch_size": settings.patch_size,
        "sampling": asdict(settings.sampling),
        "intervene": intervention.text,
        "answer_rule": settings.answers,
        "decimals": settings.decimals,
        "grader": GRADER_VERSION,
    }


def patch_size_for(settings: Eval, model: Path | None) -> int:
    """The patch size by which images are resized.

    Raises:
        ValueError: a folder without a processor.
    """
    if settings.patch_size is not None:
        return settings.patch_size
    if model is None:
        return DEFAULT_PATCH_SIZE
    from avar_verl.model.checkpoint import load_processor  # They import transformers and verl, which takes seconds.
    from avar_verl.plugin.datasets.images import patch_size_of

    return patch_size_of(load_processor(model))


@dataclass(frozen=True)
class Index:
    """The items of a task, without their content."""

    ids: tuple[str, ...]
    """In the order of the task."""

    open: frozenset[str]
    """Items without a record."""

    num_images: int
    """Largest number of images of an item."""


def index_items(items: Iterable[Question], records: Records) -> Index:
    """Read every item once before asking anything, so that an invalid row is an error now, not hours later.

    Raises:
        ValueError: two items with the same id, or a record whose question differs from its item.
    """
    ids: dict[str, None] = {}
    num_images = 0
    for item in items:
        if item.id in ids:
            raise ValueError(f"items must have different ids; got {item.id!r} twice in {item.task}. Correct the data.")
        records.check_question(item)
        ids[item.id] = None
        num_images = max(num_images, len(item.sources))
    return Index(tuple(ids), frozenset(ids.keys() - records.records.keys()), num_images)


async def _run_task(
    settings: Eval,
    task: Task,
    index: Index,
    file: Records,
    client: openai.AsyncOpenAI,
    model: str,
    patch_size: int,
    intervention: Intervention,
    check: Callable[[], None],
) -> dict[str, str]:
    """Ask every open item of a task; returns the reasons of items without an answer, by id."""
    # Items may have gigabytes of images, so they are read again, one by one, as requests finish.
    todo = (item for item in islice(task.items(), len(index.ids)) if item.id in index.open)
    num_done = len(index.ids) - len(index.open)
    with progress(total=len(index.ids), initial=num_done, desc=task.name, unit="item") as bar:

        async def answer(item: Question) -> None:
            item = replace(item, patch_size=patch_size)
            reply = await ask(client, model, item, settings.sampling, intervention.extra_body)
            # math-verify may take seconds; requests continue in the meantime.
            file.add(await asyncio.to_thread(graded, item, reply, settings.answers, settings.decimals))
            bar.update()

        return await ask_all(todo, answer, concurrency=settings.concurrency, check=check)


@contextlib.contextmanager
def _server(
    settings: Eval, model: Path | None, num_images: int, intervention: Intervention
) -> Iterator[tuple[str, str, Callable[[], None]]]:
    """(address, wanted name, check) of the given server, or of a vLLM that runs during the block."""
    if settings.server_url:
        yield settings.server_url, settings.model, lambda: None
        return
    assert model is not None
    from avar_verl.plugin.compat.cpu import detect  # Imports torch.

    cpu, port = detect.is_active(), free_port()
    command = server_command(
        model,
        port,
        num_images=num_images,
        cpu=cpu,
        max_model_len=settings.max_model_len,
        extra=(*intervention.server_arguments, *settings.server_arguments),
    )
    environment = cpu_environment() if cpu else {}
    log = settings.folder / "server.log"
    with running_server(command, port, log, timeout_s=settings.server_timeout, environment=environment) as server:
        yield server.url, NAME, server.check


def run_eval(settings: Eval) -> dict[str, Any]:
    """Run every task; returns the content of results.json.

    Raises:
        ValueError: an invalid setting, or a folder with different settings.
        RuntimeError: the server failed, or items have no answer. No totals are written; the same command continues.
    """
    intervention = make_intervention(settings.intervene)
    tasks, model = make_tasks(settings), local_model(settings)
    with contextlib.ExitStack() as stack:
        files = {
            task.name: stack.enter_context(
                Records(settings.folder / task.name, record_settings(settings, task, model, intervention))
            )
            for task in tasks
        }
        indices = {task.name: index_items(islice(task.items(), settings.n or None), files[task.name]) for task in tasks}
        num_items, num_open = (sum(len(getattr(index, x)) for index in indices.values()) for x in ("ids", "open"))
        if num_open < num_items:
            print(f"going on: {num_items - num_open} of {num_items} items are in {settings.folder}", flush=True)
        failures: dict[str, dict[str, str]] = {}
        if num_open:
            num_images = max(index.num_images for index in indices.values())
            patch_size = patch_size_for(settings, model) if num_images else DEFAULT_PATCH_SIZE
            with _server(settings, model, max(1, num_images), intervention) as (url, wanted, check):
                failures = asyncio.run(
                    _run_tasks(settings, tasks, indices, files, url, wanted, patch_size, intervention, check)
                )
        num_failed = sum(map(len, failures.values()))
        if num_failed:
            lines = [f"{task} {i}: {why}" for task, reasons in failures.items() for i, why in reasons.items()]
            raise RuntimeError(
                f"{num_failed} items have no answer; the others are recorded, and the same command asks only these.\n"
                + "\n".join(lines[:5])
            )
        results = {
            "model": str(model or settings.model),
            "intervene": intervention.text,
            "tasks": {name: summarize([files[name].records[i] for i in index.ids]) for name, index in indices.items()},
        }
    write_json(settings.folder / RESULTS, results)
    return results


async def _run_tasks(
    settings: Eval,
    tasks: Sequence[Task],
    indices: Mapping[str, Index],
    files: Mapping[str, Records],
    url: str,
    wanted: str,
    patch_size: int,
    intervention: Intervention,
    check: Callable[[], None],
) -> dict[str, dict[str, str]]:
    async with make_client(
        url,
        timeout_s=settings.request_timeout,
        max_retries=settings.max_retries,
        api_key=os.environ.get("OPENAI_API_KEY", "none"),
    ) as client:
        try:
            name = await served_name(client, wanted)
        except openai.APIError as error:
            raise RuntimeError(
                f"the server at {url} must list its models; got {type(error).__name__}: {error}."
            ) from error
        await check_server(client, name, intervention)
        return {
            task.name: await _run_task(
                settings, task, indices[task.name], files[task.name], client, name, patch_size, intervention, check
            )
            for task in tasks
            if indices[task.name].open
        }


def summarize(records: Sequence[Record]) -> dict[str, Any]:
    """Accuracy and the other values of the table, from the records of one task.

    `score` is compared with the paper: the accuracy, or, if the items have groups, the mean of the accuracy and the
    group accuracies (HallusionBench: aAcc, fAcc, qAcc).
    """
    if not records:
        raise ValueError("a summary needs records; got none. Ask for one item or more.")
    n, correct = len(records), [record.correct for record in records]
    accuracy = sum(correct) / n
    metrics = sorted({metric for record in records for metric in record.groups})
    groups = {metric: group_accuracy(correct, [record.groups[metric] for record in records]) for metric in metrics}
    return {
        "n": n,
        "correct": sum(correct),
        "accuracy": accuracy,
        "standard_error": standard_error(accuracy, n),
        "groups": groups,
        "score": (accuracy + sum(groups.values())) / (1 + len(groups)),
        "no_answer": sum(record.answer is None for record in records),
        "cut_off": sum(record.finish_reason == "length" for record in records),
        "response_tokens": sum(record.response_tokens for record in records) / n,
    }


def read_run(folder: Path) -> dict[str, dict[str, Record]]:
    """Records of every task of a run's folder, by task and item id.

    Raises:
        ValueError: no records.
    """
    tasks = {path.parent.name: read(path.parent) for path in sorted(folder.glob("*/records.jsonl"))}
    tasks = {name: records for name, records in tasks.items() if records}
    if not tasks:
        raise ValueError(
            f"a run's folder must hold records of tasks; got none in {folder}. Run avar eval --out {folder}."
        )
    return tasks
