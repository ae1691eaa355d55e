# SPDX-License-Identifier: Apache-2.0
"""`avar vas`: measure, summarize, report.

A folder holds one measurement: `settings.json`, `records.jsonl` (one line per sample, appended as it is measured), and,
written from these at the end, `vas.json`, `words.json` and `report.html`.
"""

import importlib.metadata
import importlib.util
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from avar_verl.data.rows import Row, batched
from avar_verl.model.checkpoint import load_config, load_processor
from avar_verl.model.families import get_family
from avar_verl.plugin.datasets.images import patch_size_of
from avar_verl.tools import rows as data_rows
from avar_verl.tools.options import default_device
from avar_verl.tools.progress import progress
from avar_verl.tools.runs import RECORDS, RecordFile, absolute, dumps, fingerprint, write_json
from avar_verl.tools.stats import LEVEL, Bootstrap
from avar_verl.tools.vas.command import Vas
from avar_verl.tools.vas.partners import jobs, looks_of, partners_of
from avar_verl.tools.vas.score import DEPENDENCY, measurable_layers
from avar_verl.tools.vas.statistics import by_sample, summarize_dependency, summarize_query
from avar_verl.tools.vas.work import LocalWorkers, RayWorkers

FORMAT = 1
VERSIONS = ("avar-verl", "torch", "transformers", "verl")


def identity(settings: Vas) -> dict[str, Any]:
    """Settings that all records of a folder share: everything that changes the numbers of a sample. `n` may grow."""
    return {
        "model": absolute(settings.model),
        "model_files": fingerprint(Path(settings.model)),
        "data": absolute(settings.data),
        "data_files": fingerprint(Path(settings.data)),
        "max_new_tokens": settings.response_tokens,
        "corruption": settings.dependency,
        **{name: getattr(settings, name) for name in ("split", "columns", "queries", "layers", "system", "dtype")},
    }


def _compact(value: Any) -> Any:
    """Nested lists of numbers as float64 arrays, which take a quarter of the memory; other values unchanged."""
    if isinstance(value, dict):
        return {key: _compact(item) for key, item in value.items()}
    is_matrix = isinstance(value, list) and value and isinstance(value[0], list)
    return np.array(value, dtype=np.float64) if is_matrix else value  # numpy reads "inf" and "nan".


def open_records(settings: Vas) -> RecordFile:
    """The records of a measurement by row, in its folder or in memory only. Matrices are arrays."""
    path = None if settings.out is None else settings.out / RECORDS
    return RecordFile(path, "row", identity(settings), _compact)


def model_name(model: str) -> str:
    """A model's name in a report: the end of its path, without the folders that all verl checkpoints have.

    >>> model_name("checkpoints/avar/global_step_18/actor/huggingface")
    'avar/global_step_18'
    """
    return "/".join([part for part in Path(model).parts if part not in ("huggingface", "actor", "/")][-2:])


def check_report_packages() -> None:
    """Check the packages of the report before the model runs.

    Raises:
        ValueError: matplotlib is missing.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("the report needs matplotlib; got none. pip install 'avar-verl[vas]', or leave --out away.")


def _check_model(settings: Vas) -> tuple[int, ...]:
    """The layers to measure, determined before loading weights."""
    unknown = sorted(set(settings.columns) - set(data_rows.COLUMNS))
    if unknown:
        raise ValueError(f"columns must name some of {data_rows.COLUMNS}; got {unknown}. Write NAME=COLUMN.")
    config = load_config(settings.model)
    family = get_family(config.model_type)
    return measurable_layers(family, config, settings.layers) if settings.queries else ()


def _rows(settings: Vas) -> Iterator[Row]:
    return data_rows.read(settings.data, settings.split, settings.columns)


def swap_partners(settings: Vas) -> dict[int, int]:
    """Row -> row whose images it is given (`partners_of`).

    Raises:
        ValueError: a row with images that no other row has in these shapes; the message names the first one.
    """
    processor = load_processor(settings.model)
    looks = looks_of(_rows(settings), processor, patch_size_of(processor))
    partners = partners_of(looks, settings.n)
    alone = [index for index, partner in partners.items() if partner is None]
    if alone:
        row = next(row for row in _rows(settings) if row.index == alone[0])
        raise ValueError(
            f"{row.where}: dependency=swap needs another row with other images of the same shapes; got none, for this "
            f"row and {len(alone) - 1} more. Leave such rows out, resize the images to one size, or use "
            "--dependency blank."
        )
    return partners


def measure(settings: Vas, records: RecordFile, workers) -> None:
    """Add records for all rows that have none."""
    partners: dict[int, int] = {}
    first = islice(_rows(settings), settings.n or None)
    if settings.dependency == "swap" and any(row.index not in records.records for row in first):
        partners = swap_partners(settings)
    # Partners may be behind the first n rows.
    last = max([settings.n, *(partner + 1 for partner in partners.values())]) if settings.n else None
    total = data_rows.count(settings.data)
    total = min(total, settings.n) if total and settings.n else total or settings.n or None
    with progress(total=total, desc="VAS", unit="sample") as bar:

        def is_pending(row: Row) -> bool:
            if settings.n and row.index >= settings.n:
                return False
            if row.index in records.records:
                bar.update()
                return False
            return True

        pending = jobs(islice(_rows(settings), last), partners, is_pending)
        for batch in workers.measure(batched(pending, settings.batch_size)):
            records.append(batch)
            bar.update(len(batch))


def look(settings: Vas, records: Sequence[dict[str, Any]], workers) -> list[dict[str, Any]]:
    """Where the model looks as it writes words, for the first `show` samples with a measured response."""
    measured = [record for record in records if "response" in record or DEPENDENCY in record]
    wanted = {record["row"]: record for record in measured[: settings.show]}
    if not wanted:
        return []
    shown = [
        (row, wanted[row.index].get("generated_ids"), settings.words, wanted[row.index].get(DEPENDENCY))
        for row in islice(_rows(settings), max(wanted) + 1)
        if row.index in wanted
    ]
    return workers.look(shown)


def summarize(
    settings: Vas, records: Sequence[dict[str, Any]], layers: Sequence[int], seconds: float
) -> dict[str, Any]:
    """What `vas.json` holds.

    Raises:
        ValueError: no sample has VAS for a query role, or a dependency.
    """
    bootstrap = Bootstrap(settings.resamples, settings.seed)
    return {
        "format": FORMAT,
        **identity(settings),
        "name": model_name(settings.model),
        "device": settings.device,
        "layers": list(layers),
        "num_rows": len(records),
        "bootstrap": {"draws": bootstrap.num_draws, "seed": bootstrap.seed, "level": LEVEL},
        "seconds": seconds,
        "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
        "queries": {name: summarize_query(name, records, layers, bootstrap) for name in settings.queries},
        "dependency": summarize_dependency(records, bootstrap) if settings.dependency else None,
        "samples": by_sample(records, settings.queries),
    }


def run_vas(settings: Vas) -> dict[str, Any]:
    """Measure and, with a folder `settings.out`, keep records and write the report; returns what `vas.json` holds.

    Raises:
        ValueError: names the row, file or setting that cannot be measured.
    """
    started, out = time.monotonic(), settings.out
    settings = replace(settings, device=settings.device or default_device())
    if out is not None:
        check_report_packages()
    layers = _check_model(settings)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    workers = RayWorkers(settings) if settings.ray else LocalWorkers(settings)
    with open_records(settings) as store, workers:
        measure(settings, store, workers)
        records = [store.records[row] for row in sorted(store.records) if not settings.n or row < settings.n]
        summary = json.loads(dumps(summarize(settings, records, layers, time.monotonic() - started)))
        if out is None:
            return summary
        shown = _words(settings, records, workers, out / "words.json")
    write_json(out / "vas.json", summary)
    from avar_verl.tools.vas.report import write_report

    write_report(out / "report.html", summary, shown)
    return summary


def _words(settings: Vas, records, workers, path: Path) -> list[dict[str, Any]]:
    """`words.json`, written once for each choice of samples and words."""
    choice = {"show": settings.show, "words": settings.words, "n": len(records)}
    choice = json.loads(dumps(choice))
    if path.exists():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["choice"] == choice:
            return kept["samples"]
    samples = look(settings, records, workers)
    write_json(path, {"choice": choice, "samples": samples})
    return samples
