# SPDX-License-Identifier: Apache-2.0
"""`avar synth run`, `estimate`, `inspect` and `hashes`."""

import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal

from rich.console import Console
from tyro.conf import Positional, arg

from avar_verl.tools.options import Command, Count, Files
from avar_verl.tools.synth.config import GATES, STAGES, InputConfig, SynthConfig, load_config


@dataclass(frozen=True, kw_only=True)
class ConfigCommand(Command):
    """A command on a config."""

    config: Path  # YAML file like recipes/avar/synth/*.yaml.
    limit: Count = 0  # Use only the first N inputs; 0: all.
    # Fields of the config to override, such as gates.min_anchors=3.
    overrides: Annotated[Positional[tuple[str, ...]], arg(metavar="KEY=VALUE ...")] = ()


@dataclass(frozen=True, kw_only=True)
class Run(ConfigCommand):
    """Make visual-anchored reflection data from images and questions (docs/synth.md).

    Answers that an earlier run in the folder has paid for are reused.
    """

    dry_run: bool = False  # Check everything and print a prompt, without any call.

    def run(self) -> None:
        config = load_config(self.config, self.overrides)
        if self.dry_run:
            _dry_run(config, self.limit)
            return
        from avar_verl.tools.synth import pipeline
        from avar_verl.tools.synth.card import write_card

        console = Console()
        summary = pipeline.Run(config, self.limit, console).run()
        write_card(config, summary)
        print_gates(summary, console)
        print_calls(summary, console)
        console.print(f"wrote {config.out}: sft.parquet, rl.parquet, records.parquet, card.md, card.html, summary.json")


@dataclass(frozen=True, kw_only=True)
class Estimate(ConfigCommand):
    """Estimate calls, tokens and dollars of a run before anything is spent (docs/synth.md)."""

    def run(self) -> None:
        _count(load_config(self.config, self.overrides), self.limit, Console())


@dataclass(frozen=True, kw_only=True)
class Inspect(Command):
    """Show numbers and samples of a run, in the terminal or as an HTML page (docs/synth.md)."""

    out: Positional[Path]  # Folder of the run.
    n: Count = 3  # Number of samples to show; 0: only the tables.
    gate: Literal[("accepted", *GATES)] | None = None  # Only samples that this gate rejects, or accepted ones.
    html: Path | None = None  # Write --n samples to this HTML file.

    def run(self) -> None:
        from avar_verl.tools.synth.card import read_records, write_browser
        from avar_verl.tools.text import highlighted

        console, folder = Console(), self.out
        path = folder / "summary.json"
        if not path.is_file():
            raise ValueError(
                f"inspect needs the folder of a run that has ended; got no {path}. Run avar synth run first."
            )
        summary = json.loads(path.read_text(encoding="utf-8"))
        print_gates(summary, console)
        print_calls(summary, console)
        gate = {None: None, "accepted": ""}.get(self.gate, self.gate)
        if self.html:
            number = write_browser(folder, summary, self.html, self.n, gate)
            console.print(f"wrote {self.html} with {number} samples")
            return
        coordinates = summary["config"]["output"]["coordinates"]
        for record in islice(read_records(folder, gate), self.n):
            verdict = f"rejected: {record['gate']}" if record["gate"] else "accepted"
            console.rule(verdict)  # A rule is cut off at the width of the terminal, so the path is on the next line.
            console.print(f"{record['source']} row {record['row']}", markup=False, highlight=False)
            for name, why in record["failed"].items():
                console.print(f"{name}: {why}", markup=False, highlight=False, style="red")
            console.print(f"question: {record['question']}", markup=False, highlight=False)
            console.print(f"answer: {' or '.join(record['answers'])}", markup=False, highlight=False)
            size = record["sizes"][0] if len(record["sizes"]) == 1 else None
            console.print(highlighted(record["response"], size, coordinates))


@dataclass(frozen=True, kw_only=True)
class Hashes(Command):
    """Write the hash list of a test set, for gates.overlap_lists (docs/synth.md)."""

    files: Files  # Parquet, jsonl or json files, or folders of them.
    out: Path  # jsonl file to write.
    question: str = "question"  # Column of the question.
    images: str = "images"  # Column of the images.
    root: str | None = None  # Folder for relative image paths.

    def run(self) -> None:
        from avar_verl.data.rows import count_rows, data_files
        from avar_verl.tools.progress import progress
        from avar_verl.tools.synth.duplicates import write_hashes
        from avar_verl.tools.synth.items import read_items

        # Any column will do as the answer, which is not stored.
        config = InputConfig(
            files=list(self.files), question=self.question, answer=self.question, images=self.images, root=self.root
        )
        console = Console()
        total = count_rows(data_files(config.files))
        items = progress(read_items(config), "hash", total=total, unit="row", leave=False)
        written, left_out = write_hashes(items, self.out)
        console.print(f"{self.out}: {written} questions, {left_out} rows left out", highlight=False)
        if not written:
            raise ValueError(
                f"a hash list must have questions; got none in {config.files}. Check --question and --images."
            )


def _dry_run(config: SynthConfig, limit: int) -> None:
    from avar_verl.tools.synth.chain import make_request
    from avar_verl.tools.synth.items import read_items

    console = Console()
    _count(config, limit, console)
    item = next((item for item in read_items(config.input, limit=limit) if not item.problem), None)
    if item is None:
        raise ValueError("a run must have an input that can be used; got none. See avar data check.")
    # In place of what is written later, its name.
    blank = {"description": "(description)", "reasoning": "(reasoning)", "final_answer": "(answer)"}
    for stage in STAGES:
        request = make_request(config, stage, item, blank)
        console.rule(f"{stage}: {request.model.model}, {len(item.pictures) if request.sees_images else 0} images")
        for message in request.messages:
            console.print(f"[{message['role']}]", style="bold", markup=False)
            console.print(message["content"], markup=False, highlight=False)


def _count(config: SynthConfig, limit: int, console: Console) -> None:
    from avar_verl.data.rows import count_rows
    from avar_verl.tools.progress import progress
    from avar_verl.tools.synth.duplicates import Overlap
    from avar_verl.tools.synth.estimate import estimate, print_estimate
    from avar_verl.tools.synth.items import input_files, read_items
    from avar_verl.tools.synth.store import Store

    cache = Path(config.out) / "cache.sqlite"
    # Without a folder there is nothing to look up, and an estimate makes none.
    store = Store(cache if cache.exists() else ":memory:")
    lists = config.gates.overlap_lists if "overlap" not in config.gates.disabled else []
    overlap = Overlap(lists, config.gates.duplicate_distance) if lists else None
    total = count_rows([Path(file) for file in input_files(config.input)])
    total = min(total, limit) if total is not None and limit else total
    items = progress(read_items(config.input, limit=limit), "count", total=total, unit="row", leave=False)
    try:
        found = estimate(config, items, store, overlap)
        print_estimate(config, found, store.spent, console)
    finally:
        store.close()


def print_gates(summary: dict, console: Console) -> None:
    """Table of the gates."""
    from avar_verl.tools.text import numbers_table

    title = f"{summary['inputs']} inputs: {summary['accepted']} accepted, {summary['rejected']} rejected"
    table = numbers_table(title, ("gate", "rejected", "fail it"))
    for gate, counts in summary["gates"].items():
        if counts["any"]:
            table.add_row(gate, str(counts["first"]), str(counts["any"]))
    console.print(table)


def print_calls(summary: dict, console: Console) -> None:
    """Table of the calls of all runs."""
    from avar_verl.tools.text import numbers_table

    title = f"{summary['run']['new_calls']} new answers in {summary['run']['seconds']:.0f} s; of all runs:"
    table = numbers_table(title, ("stage", "answers", "attempts", "tokens in", "tokens out", "USD"))
    for stage, _, _, calls, tokens_in, tokens_out, usd, attempts in summary["calls"]:
        table.add_row(stage, *(f"{n:,}" for n in (calls, attempts, tokens_in, tokens_out)), f"{usd:.4f}")
    console.print(table)
    for stage, model, prompt, *_ in summary["calls"]:
        console.print(f"{stage}: {model}, {prompt}", highlight=False)
