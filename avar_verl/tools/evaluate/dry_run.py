# SPDX-License-Identifier: Apache-2.0
"""`avar eval --dry-run`: shows what would be asked, without a model, a server or the hub.

The prompt of a benchmark is shown for one made-up row with the data set's documented columns (`tasks/examples.json`).
"""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.markup import escape

from avar_verl.tools.evaluate.benchmarks import COMMIT, TASK_DIR, Benchmark, expand, load_benchmark, make_item
from avar_verl.tools.questions import Question, file_questions


def example_docs(name: str) -> list[dict[str, Any]]:
    """Made-up rows of a benchmark, images as `{"bytes": ...}`: "IMAGE" in the file stands for one."""
    buffer = io.BytesIO()
    Image.new("RGB", (28, 28), (200, 30, 30)).save(buffer, "PNG")
    docs = json.loads((TASK_DIR / "examples.json").read_text())[name]
    return [
        {key: {"bytes": buffer.getvalue()} if value == "IMAGE" else value for key, value in doc.items()} for doc in docs
    ]


def _show_item(item: Question, console: Console) -> None:
    for message in item.messages:
        console.print(f"  [bold]{message['role']}[/]")
        for line in message["content"].splitlines():
            console.print(f"    {escape(line)}", soft_wrap=True, highlight=False)
    options = f", options {list(item.options)}" if item.options else ""
    console.print(f"  [bold]right[/] {escape(str(list(item.ground_truth)) + options)}", soft_wrap=True, highlight=False)


def _show_benchmark(benchmark: Benchmark, console: Console) -> None:
    config = f", config {benchmark.config!r}" if benchmark.config else ""
    pinned = COMMIT.fullmatch(benchmark.revision)
    console.print(f"[bold]{benchmark.name}[/]: {benchmark.title}", highlight=False)
    lines = (
        f"data set   {benchmark.dataset}{config}, split {benchmark.split}",
        f"revision   {benchmark.revision}{'' if pinned else ' (its commit is looked up on the hub and recorded)'}",
        f"items      {benchmark.num_items}",
        f"prompt     {benchmark.prompt_id()}, after {benchmark.upstream} of lmms-eval 0.7.3",
        f"needs hub  {'' if pinned else 'for the commit, and '}for the data set, unless it is in the cache",
    )
    for line in lines:
        console.print(f"  {escape(line)}", soft_wrap=True, highlight=False)
    _show_item(make_item(benchmark, example_docs(benchmark.name)[0]), console)


def show_tasks(tasks: str, files: Sequence[Path], console: Console) -> None:
    """Print every task: source, revision, number of items, one prompt as sent, and the accepted answers.

    Raises:
        ValueError: no task, an unknown task, or a data file with an invalid row.
    """
    benchmarks = [load_benchmark(name) for name in (expand(tasks) if tasks else [])]
    if not benchmarks and not files:
        raise ValueError("avar eval --dry-run needs --tasks or --data; got neither. Name one.")
    for benchmark in benchmarks:
        _show_benchmark(benchmark, console)
    for path in files:
        items = list(file_questions(path))
        console.print(f"[bold]{path.stem}[/]: {escape(str(path))}", highlight=False)
        console.print(f"  items      {len(items)}\n  needs hub  no", highlight=False)
        _show_item(items[0], console)
