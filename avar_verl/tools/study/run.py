# SPDX-License-Identifier: Apache-2.0
"""`avar study run`: every cell of the study, in processes of one thread each, one record per finished run.

The folder: `settings.json`, `records.jsonl` (the table, one line per run), `checkpoints/` (captions and cold starts,
which later runs start from). A killed study goes on: finished runs are in the table, others begin again.
"""

import os
import shutil
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from avar_verl.tools.progress import progress, say
from avar_verl.tools.runs import RECORDS, RecordFile
from avar_verl.tools.study.cells import Cell, StudySettings, further_cells, main_cells


def _prepare_worker() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from transformers.utils import logging

    # One thread per process: the operations are tiny, and processes fill the cores.
    torch.set_num_threads(1)
    logging.disable_progress_bar()


def run_cell(cell: Cell, out: Path, settings: StudySettings) -> dict[str, Any]:
    """Train and measure one cell; its record."""
    from avar_verl.tools.study.work import train_and_measure

    begin = time.monotonic()
    result = train_and_measure(cell, out, settings)
    return {"name": cell.name, **asdict(cell), **result, "seconds": time.monotonic() - begin}


def _run(cells: list[Cell], file: RecordFile, out: Path, settings: StudySettings, workers: int) -> None:
    """Run the cells that are not in the table, each after the one it starts from.

    Raises:
        Exception: the first failure of a cell, after the running ones have been recorded.
    """
    waiting = [cell for cell in cells if cell.name not in file.records]
    bar = progress(total=len(cells), initial=len(cells) - len(waiting), desc="study", unit="run")
    running: dict[Future, Cell] = {}
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_prepare_worker) as pool:
        try:
            while waiting or running:
                ready = [cell for cell in waiting if cell.start is None or cell.start.name in file.records]
                for cell in ready[: workers - len(running)]:
                    running[pool.submit(run_cell, cell, out, settings)] = cell
                    waiting.remove(cell)
                done, _ = wait(running, timeout=5.0, return_when=FIRST_COMPLETED)
                bar.update(0)
                for future in done:
                    cell, record = running.pop(future), future.result()
                    file.append([record])
                    bar.update()
                    say(
                        f"{cell.name:52s} unbiased {100 * record['accuracy']:5.1f} %   "
                        f"looks {100 * record['looks']:5.1f} %   {record['seconds']:.0f} s"
                    )
        finally:
            bar.close()
            pool.shutdown(cancel_futures=True)


def run_study(out: Path, workers: int, settings: StudySettings) -> dict[str, dict[str, Any]]:
    """Run the study in `out`, or what is missing of it; the records by name.

    Raises:
        ValueError: a folder of other settings, or one in which another run is writing.
    """
    (out / "checkpoints").mkdir(parents=True, exist_ok=True)
    for unfinished in (out / "checkpoints").glob("*.tmp"):
        shutil.rmtree(unfinished)
    with RecordFile(out / RECORDS, "name", asdict(settings)) as file:
        _run(main_cells(settings), file, out, settings, workers)
        _run(further_cells(settings, file.records), file, out, settings, workers)
        return dict(file.records)
