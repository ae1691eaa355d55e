# SPDX-License-Identifier: Apache-2.0
"""Data card (card.md, summary.json) and the HTML browser of samples (card.html), a self-contained file."""

from __future__ import annotations

import io
import json
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from markupsafe import Markup, escape
from PIL import Image

from avar_verl.data.messages import IMAGE
from avar_verl.tools.marks import anchor_spans, pieces
from avar_verl.tools.report import page, thumbnail_uri
from avar_verl.tools.synth.config import GATES, SynthConfig, as_dict
from avar_verl.tools.synth.gates import LEAK_ANSWER, LEAK_DESCRIPTION, reflections
from avar_verl.tools.synth.prompts import versions
from avar_verl.tools.text import histogram

PACKAGES = ("avar-verl", "verl", "ray", "math-verify", "datasketch", "py3langid")
# Longest side of an image in the browser, in pixels.
SHOWN_SIDE = 448
TITLES = {
    "words": "words of the reasoning",
    "anchors": "distinct references to the image",
    "anchors_coordinates": "of them boxes and points",
    "anchor_parts": "quarters of the reasoning with a new one",
    "reflections": "sentences that check something again",
    "describe_tokens": "tokens of the description",
    "reason_tokens": "tokens of stage 2",
    "integrate_tokens": "tokens of stage 3",
}


def read_records(folder: Path, gate: str | None = None) -> Iterator[dict[str, Any]]:
    """Rows of records.parquet, one at a time; `gate`: only those rejected by it ("": accepted ones)."""
    with pq.ParquetFile(folder / "records.parquet", pre_buffer=False) as file:
        for batch in file.iter_batches(batch_size=8):
            for row in batch.to_pylist():
                if gate is not None and row["gate"] != gate:
                    continue
                images = [image["bytes"] for image in row["images"]]
                sizes = []
                for data in images:
                    with Image.open(io.BytesIO(data)) as image:
                        sizes.append(image.size)
                loaded = {name: json.loads(row[name]) for name in ("failed", "numbers")}
                yield {**row, **loaded, "images": images, "sizes": sizes}


def pick(folder: Path, n: int, gate: str | None = None) -> list[dict[str, Any]]:
    """At most n records in file order, spread over the file: accepted ones, and rejected ones of each gate in turn."""
    with pq.ParquetFile(folder / "records.parquet") as file:
        gates = [g for batch in file.iter_batches(columns=["gate"]) for g in batch.column(0).to_pylist()]
    groups = defaultdict(list)
    for number, name in enumerate(gates):
        if gate is None or name == gate:
            groups[name].append(number)
    # Half of them accepted, the rest from each gate in turn.
    order = ["", *(name for name in GATES if name in groups)]
    share = {name: (n + 1) // 2 if name == "" and len(groups) > 1 else n for name in order}
    queues = {name: _spread(groups[name], share[name]) for name in order if name in groups}
    wanted: list[int] = queues.pop("", [])
    while len(wanted) < n and any(queues.values()):
        for queue in queues.values():
            if queue and len(wanted) < n:
                wanted.append(queue.pop(0))
    chosen = set(wanted)
    return [record for number, record in enumerate(read_records(folder)) if number in chosen]


def _spread(numbers: Sequence[int], n: int) -> list[int]:
    if len(numbers) <= n:
        return list(numbers)
    return [numbers[i * len(numbers) // n] for i in range(n)]


# ---- one sample ------------------------------------------------------------------------------------------------


def mark(text: str, size: tuple[int, int] | None, coordinates: str) -> tuple[Markup, list[dict[str, Any]]]:
    """A response as HTML with its anchors, checks and leaks marked, and the boxes and points to be drawn."""
    spans, places = anchor_spans(text, size, coordinates)
    for sentence in reflections(text):
        at = text.find(sentence)
        spans.append((at, at + len(sentence), "check", None))
    for pattern in (LEAK_DESCRIPTION, LEAK_ANSWER):
        spans += [(match.start(), match.end(), "leak", None) for match in pattern.finditer(text)]
    out = []
    for piece, classes, number in pieces(text, spans):
        data = "" if number is None else f' data-place="{number}"'
        out.append(Markup(f'<span class="{classes}"{data}>{escape(piece)}</span>') if classes else escape(piece))
    return Markup("").join(out), [{"number": number, "coords": coords} for number, coords in enumerate(places)]


def _shown(record: dict[str, Any], coordinates: str) -> dict[str, Any]:
    pictures = []
    for number, (data, size) in enumerate(zip(record["images"], record["sizes"], strict=True)):
        with Image.open(io.BytesIO(data)) as image:
            src = thumbnail_uri(image.convert("RGB"), SHOWN_SIDE, lossless=len(data) < 60_000)
        boxes = record["boxes"][number] if record["boxes"] else []
        pictures.append(
            {
                "src": src,
                "width": size[0],
                "height": size[1],
                "boxes": boxes,
                "stroke": max(size) / 160,
            }
        )
    size = tuple(record["sizes"][0]) if len(record["sizes"]) == 1 else None
    html, places = mark(record["response"], size, coordinates)
    return {
        "gate": record["gate"],
        "failed": record["failed"],
        "where": f"{Path(record['source']).name} row {record['row']}",
        "question": record["question"].replace(IMAGE, " ").strip(),
        "answer": " or ".join(record["answers"]),
        "response": html,
        "places": places,
        "pictures": pictures,
        "numbers": record["numbers"],
        "description": record["description"],
        "first_reasoning": record["first_reasoning"],
    }


def bars(values: list[float]) -> list[tuple[str, int, float]]:
    """(label, count, fraction of the largest count) of the bins of a histogram; few integers get one bin each."""
    if all(value == int(value) for value in values) and max(values) - min(values) <= 12:
        bins = [(str(int(v)), values.count(v)) for v in range(int(min(values)), int(max(values)) + 1)]
    else:
        bins = [(f"{low:.0f}-{high:.0f}", count) for low, high, count in histogram(values)]
    most = max(count for _, count in bins)
    return [(label, count, count / most) for label, count in bins]


def write_browser(folder: Path, summary: dict, path: Path, n: int, gate: str | None = None) -> int:
    """Write the HTML browser; returns its number of samples."""
    samples = [_shown(record, summary["config"]["output"]["coordinates"]) for record in pick(folder, n, gate)]
    text = page(
        "synth/browser.html.j2",
        summary=summary,
        samples=samples,
        gates=[name for name in GATES if any(sample["gate"] == name for sample in samples)],
        charts=[(TITLES[name], bars(values)) for name, values in summary["numbers"].items() if name in TITLES],
    )
    path.write_text(text, encoding="utf-8")
    return len(samples)


# ---- the card --------------------------------------------------------------------------------------------------


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [" | ".join(head), " | ".join("---" for _ in head), *(" | ".join(map(str, row)) for row in rows)]
    return "\n".join(f"| {line} |" for line in lines)


def card_text(summary: dict) -> str:
    """The data card as Markdown."""
    config = summary["config"]
    gates = [(name, part["first"], part["any"]) for name, part in summary["gates"].items() if part["any"]]
    numbers = []
    for name, values in summary["numbers"].items():
        if name in TITLES:
            low, middle, high = min(values), statistics.median(values), max(values)
            numbers.append((TITLES[name], f"{low:g}", f"{middle:g}", f"{high:g}"))
    histograms = [
        f"{TITLES[name]}\n\n```\n"
        + "\n".join(f"{label:>12s}  {'#' * round(40 * share)} {count}" for label, count, share in bars(values))
        + "\n```"
        for name, values in summary["numbers"].items()
        if name in TITLES
    ]
    settings = {name: value for name, value in config["gates"].items()}
    parts = [
        "# Data card",
        f"{summary['accepted']} samples accepted of {summary['inputs']} inputs, {summary['rejected']} rejected; "
        f"{summary['rl_rows']} rows for RL. Made by `avar synth run` in three stages: a description of the image, "
        "reasoning with self-checks over the description to the known answer, and a rewriting that refers to the image "
        "and looks back at it. The reasoning and answers were written by the models below; questions, images and "
        "ground truth are those of the sources.",
        "## Sources",
        _table(
            ("file", "accepted", "rejected"),
            [(Path(s["file"]).name, s["accepted"], s["rejected"]) for s in summary["sources"]],
        ),
        "## Models and prompts",
        _table(
            ("stage", "model", "prompt", "sampling"),
            [
                (
                    stage,
                    config["models"][part["model"]]["model"],
                    summary["prompts"][stage],
                    f"temperature {part['temperature']:g}, top_p {part['top_p']:g}, max_tokens {part['max_tokens']}, "
                    f"seed {part['seed']}",
                )
                for stage, part in config["stages"].items()
            ],
        ),
        "Calls of all runs of this folder:",
        _table(
            ("stage", "model", "prompt", "answers", "attempts", "tokens in", "tokens out", "USD"),
            [
                (stage, model, prompt, calls, tried, tokens_in, tokens_out, f"{usd:.4f}")
                for stage, model, prompt, calls, tokens_in, tokens_out, usd, tried in summary["calls"]
            ],
        ),
        "## Gates",
        "An item is rejected under the first gate that it fails; the last column counts all that fail it.",
        _table(("gate", "rejected", "fail it"), gates) if gates else "No input was rejected.",
        "Settings: " + ", ".join(f"{name} {value}" for name, value in settings.items()) + ".",
        "## Accepted samples",
        _table(("", "least", "median", "most"), numbers) if numbers else "None.",
        *histograms,
        "## Files",
        _table(
            ("file", "rows", "for"),
            [
                ("sft.parquet", summary["accepted"], "cold start: messages, images, boxes"),
                ("rl.parquet", summary["rl_rows"], "GRPO: prompt, images, ground truth, boxes where known"),
                ("records.parquet", summary["inputs"], "every input: what each stage wrote, gates with reasons"),
            ],
        ),
        "Versions: " + ", ".join(f"{name} {number}" for name, number in summary["versions"].items()) + ".",
    ]
    return "\n\n".join(parts) + "\n"


def write_card(config: SynthConfig, summary: dict[str, Any]) -> None:
    """Add config, prompts and versions to the summary, and write summary.json, card.md and card.html."""
    folder = Path(config.out)
    summary["config"] = as_dict(config)
    summary["prompts"] = versions(config)
    summary["versions"] = {name: version(name) for name in PACKAGES}
    (folder / "summary.json").write_text(json.dumps(summary, indent=1, ensure_ascii=False), encoding="utf-8")
    (folder / "card.md").write_text(card_text(summary), encoding="utf-8")
    if config.output.browser_samples:
        write_browser(folder, summary, folder / "card.html", config.output.browser_samples)
