# SPDX-License-Identifier: Apache-2.0
"""Files of a run: records.parquet (every input with its verdict), sft.parquet, rl.parquet, summary.json. No Ray.

Rows are written as they arrive, under temporary names; `close` renames the files, so a run that stops keeps the files
of the previous run.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from avar_verl.tools.synth.config import GATES, SynthConfig
from avar_verl.tools.synth.duplicates import NearDuplicates
from avar_verl.tools.synth.gates import Verdict
from avar_verl.tools.synth.items import Item

ROW_GROUP = 64
_BOXES = pa.list_(pa.list_(pa.float64()))
_IMAGES = pa.list_(pa.struct([("bytes", pa.binary())]))
_TURNS = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
SCHEMAS = {
    "records": pa.schema(
        [
            *((name, pa.string()) for name in ("id", "source")),
            ("row", pa.int64()),
            ("question", pa.string()),
            ("answers", pa.list_(pa.string())),
            ("images", _IMAGES),
            ("boxes", pa.list_(_BOXES)),
            # "" for accepted; then every gate that it fails with the reason, as JSON.
            ("gate", pa.string()),
            ("failed", pa.string()),
            *((name, pa.string()) for name in ("description", "first_reasoning", "response", "numbers")),
        ]
    ),
    "sft": pa.schema([("messages", _TURNS), ("images", _IMAGES), ("boxes", pa.list_(_BOXES)), ("id", pa.string())]),
    "rl": pa.schema(
        [
            ("data_source", pa.string()),
            ("prompt", _TURNS),
            ("images", _IMAGES),
            ("ability", pa.string()),
            ("reward_model", pa.struct([("style", pa.string()), ("ground_truth", pa.list_(pa.string()))])),
            (
                "extra_info",
                pa.struct(
                    [
                        ("index", pa.int64()),
                        ("id", pa.string()),
                        ("question", pa.string()),
                        ("boxes", _BOXES),
                        ("boxes_size", pa.list_(pa.int64())),
                    ]
                ),
            ),
        ]
    ),
}
# Inputs that no model has seen.
INPUT_GATES = ("input", "overlap")


class _Table:
    """A parquet file that grows by row groups."""

    def __init__(self, path: Path, schema: pa.Schema):
        self.path, self.schema, self.rows, self.count = path, schema, [], 0
        self.temporary = path.with_name(f"new-{path.name}")
        self.writer = pq.ParquetWriter(self.temporary, schema)

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self.count += 1
        if len(self.rows) >= ROW_GROUP:
            self._flush()

    def _flush(self) -> None:
        if self.rows:
            self.writer.write_table(pa.Table.from_pylist(self.rows, self.schema))
            self.rows = []

    def close(self, keep: bool) -> None:
        if keep:
            self._flush()
        self.writer.close()
        if keep:
            os.replace(self.temporary, self.path)
        else:
            self.temporary.unlink()


class Writer:
    """Takes items with their verdicts, in input order, and writes the files of a run into `folder`."""

    def __init__(self, folder: Path, config: SynthConfig):
        folder.mkdir(parents=True, exist_ok=True)
        self.config, self.folder = config, folder
        self.tables = {name: _Table(folder / f"{name}.parquet", schema) for name, schema in SCHEMAS.items()}
        gates = config.gates
        self.near = NearDuplicates(gates.duplicate_jaccard, gates.duplicate_distance)
        self.first, self.any, self.sources = Counter(), Counter(), Counter()
        self.numbers: dict[str, list[float]] = {}
        self.total = 0

    def add(self, item: Item, verdict: Verdict) -> None:
        """Add one item. Near-duplicates are found here, among items that pass all other gates."""
        if not verdict.failed and "near_duplicate" not in self.config.gates.disabled:
            other = self.near.find(item, verdict.reasoning)
            if other:
                verdict.failed["near_duplicate"] = f"it nearly repeats {other}"
        self.total += 1
        self.first[verdict.gate] += 1
        self.any.update(verdict.failed.keys())
        self.sources[(item.source, "accepted" if not verdict.failed else "rejected")] += 1
        images = [{"bytes": picture.data} for picture in item.pictures]
        boxes = [[list(map(float, box)) for box in boxes] for boxes in item.boxes]
        self.tables["records"].add(
            {
                "id": item.id,
                "source": item.source,
                "row": item.row,
                "question": item.question,
                "answers": list(item.answers),
                "images": images,
                "boxes": boxes,
                "gate": verdict.gate,
                "failed": json.dumps(verdict.failed, ensure_ascii=False),
                "description": verdict.description,
                "first_reasoning": verdict.first_reasoning,
                "response": verdict.response if verdict.reasoning else "",
                "numbers": json.dumps(verdict.numbers),
            }
        )
        system = self.config.output.system
        prompt = [{"role": "system", "content": system}] if system else []
        prompt.append({"role": "user", "content": item.question})
        if not verdict.failed:
            for name, value in verdict.numbers.items():
                self.numbers.setdefault(name, []).append(value)
            answer = {"role": "assistant", "content": verdict.response}
            # For RegionSFTDataset, no boxes means the whole image.
            shown = boxes or [[] for _ in item.pictures]
            self.tables["sft"].add({"messages": [*prompt, answer], "images": images, "boxes": shown, "id": item.id})
        usable = not any(gate in verdict.failed for gate in INPUT_GATES)
        if usable if self.config.output.rl_from == "inputs" else not verdict.failed:
            self._add_rl(item, prompt, images, boxes)

    def _add_rl(self, item: Item, prompt: list[dict], images: list[dict], boxes: list) -> None:
        one = len(item.pictures) == 1 and bool(boxes) and bool(boxes[0])
        picture = item.pictures[0]
        self.tables["rl"].add(
            {
                "data_source": self.config.input.data_source,
                "prompt": prompt,
                "images": images,
                "ability": "vision",
                "reward_model": {"style": "rule", "ground_truth": list(item.answers)},
                "extra_info": {
                    "index": self.tables["rl"].count,
                    "id": item.id,
                    "question": item.words,
                    "boxes": boxes[0] if one else None,
                    "boxes_size": [picture.width, picture.height] if one else None,
                },
            }
        )

    def close(self, keep: bool) -> dict[str, Any]:
        """Close the files; without `keep` they are deleted. Returns the content of summary.json."""
        for table in self.tables.values():
            table.close(keep)
        return {
            "inputs": self.total,
            "accepted": self.first[""],
            "rejected": self.total - self.first[""],
            "rl_rows": self.tables["rl"].count,
            # The first gate that an item fails, and all gates that it fails.
            "gates": {gate: {"first": self.first[gate], "any": self.any[gate]} for gate in GATES},
            "sources": [
                {"file": file, "accepted": self.sources[file, "accepted"], "rejected": self.sources[file, "rejected"]}
                for file in sorted({file for file, _ in self.sources})
            ],
            "numbers": self.numbers,
        }
