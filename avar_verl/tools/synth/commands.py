# SPDX-License-Identifier: Apache-2.0
"""`avar synth run | estimate | inspect | hashes`."""

from __future__ import annotations

import argparse
import json
from itertools import islice
from pathlib import Path

from rich.console import Console
from rich.table import Table

from avar_verl.tools.synth.config import GATES, STAGES, InputConfig, SynthConfig, load_config


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add `synth` to the command line."""
    top = commands.add_parser("synth", help="visual-anchored reflection data from images and questions (docs/synth.md)")
    which = top.add_subparsers(dest="synth_command", required=True)
    for name, words in (
        ("run", "make the data; what an earlier run of the folder has paid for is not paid for again"),
        ("estimate", "calls, tokens and dollars of a run, before anything is spent"),
    ):
        command = which.add_parser(name, help=words)
        command.add_argument("--config", required=True, metavar="FILE", help="YAML, as recipes/avar/synth/*.yaml")
        command.add_argument("--limit", type=int, default=0, help="only the first N inputs (default: all)")
        if name == "run":
            command.add_argument("--dry-run", action="store_true", help="check everything, print a prompt, call nobody")
        command.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="fields of the config to replace")
        command.set_defaults(run=_run if name == "run" else _estimate)

    inspect = which.add_parser("inspect", help="numbers and samples of a run, in the terminal or as an HTML browser")
    inspect.add_argument("out", help="folder of the run")
    inspect.add_argument("--n", type=int, default=3, help="samples to show (default: %(default)s)")
    inspect.add_argument("--gate", choices=("accepted", *GATES), help="samples rejected by this gate, or accepted ones")
    inspect.add_argument("--html", metavar="FILE", help="write the samples, N of them, to an HTML browser")
    inspect.set_defaults(run=_inspect)

    hashes = which.add_parser("hashes", help="hash list of a test set, for gates.overlap_lists")
    hashes.add_argument("files", nargs="+", metavar="FILE", help="parquet, jsonl or json files, or folders of them")
    hashes.add_argument("--out", required=True, metavar="FILE", help="jsonl file to write")
    hashes.add_argument("--question", default="question", help="column of the question (default: %(default)s)")
    hashes.add_argument("--images", default="images", help="column of the images (default: %(default)s)")
    hashes.add_argument("--root", help="folder that relative image paths start from")
    hashes.set_defaults(run=_hashes)


def _load(args: argparse.Namespace) -> SynthConfig:
    if args.limit < 0:
        raise ValueError(f"--limit must be >= 0; got {args.limit}. Use 0 for all inputs.")
    return load_config(args.config, args.overrides)


def _run(args: argparse.Namespace) -> None:
    config = _load(args)
    if args.dry_run:
        _dry_run(config, args.limit)
        return
    from avar_verl.tools.synth.card import write_card
    from avar_verl.tools.synth.pipeline import Run

    console = Console()
    summary = Run(config, args.limit, console).run()
    write_card(config, summary)
    print_gates(summary, console)
    print_calls(summary, console)
    console.print(f"wrote {config.out}: sft.parquet, rl.parquet, records.parquet, card.md, card.html, summary.json")


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
    from rich.progress import track

    from avar_verl.data.rows import count_rows
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
    items = track(read_items(config.input, limit=limit), "count", total=total, console=console, transient=True)
    try:
        found = estimate(config, items, store, overlap)
        print_estimate(config, found, store.spent, console)
    finally:
        store.close()


def _estimate(args: argparse.Namespace) -> None:
    _count(_load(args), args.limit, Console())


def print_gates(summary: dict, console: Console) -> None:
    """Table of the gates."""
    table = Table(title=f"{summary['inputs']} inputs: {summary['accepted']} accepted, {summary['rejected']} rejected")
    for name in ("gate", "rejected", "fail it"):
        table.add_column(name, justify="left" if name == "gate" else "right")
    for gate, counts in summary["gates"].items():
        if counts["any"]:
            table.add_row(gate, str(counts["first"]), str(counts["any"]))
    console.print(table)


def print_calls(summary: dict, console: Console) -> None:
    """Table of the calls of all runs."""
    table = Table(title=f"{summary['run']['new_calls']} new answers in {summary['run']['seconds']:.0f} s; of all runs:")
    for name in ("stage", "answers", "attempts", "tokens in", "tokens out", "USD"):
        table.add_column(name, justify="left" if name == "stage" else "right", no_wrap=True)
    for stage, _, _, calls, tokens_in, tokens_out, usd, attempts in summary["calls"]:
        table.add_row(stage, *(f"{n:,}" for n in (calls, attempts, tokens_in, tokens_out)), f"{usd:.4f}")
    console.print(table)
    for stage, model, prompt, *_ in summary["calls"]:
        console.print(f"{stage}: {model}, {prompt}", highlight=False)


def _inspect(args: argparse.Namespace) -> None:
    from avar_verl.tools.synth.card import read_records, write_browser
    from avar_verl.tools.text import highlighted

    console, folder = Console(), Path(args.out)
    if args.n < 0:
        raise ValueError(f"--n must be >= 0; got {args.n}. Use 0 for the tables alone.")
    path = folder / "summary.json"
    if not path.is_file():
        raise ValueError(f"inspect needs the folder of a run that has ended; got no {path}. Run avar synth run first.")
    summary = json.loads(path.read_text(encoding="utf-8"))
    print_gates(summary, console)
    print_calls(summary, console)
    gate = {None: None, "accepted": ""}.get(args.gate, args.gate)
    if args.html:
        number = write_browser(folder, summary, Path(args.html), args.n, gate)
        console.print(f"wrote {args.html} with {number} samples")
        return
    coordinates = summary["config"]["output"]["coordinates"]
    for record in islice(read_records(folder, gate), args.n):
        verdict = f"rejected: {record['gate']}" if record["gate"] else "accepted"
        console.rule(verdict)  # A rule is cut at the width of the terminal, so the path is not in it.
        console.print(f"{record['source']} row {record['row']}", markup=False, highlight=False)
        for name, why in record["failed"].items():
            console.print(f"{name}: {why}", markup=False, highlight=False, style="red")
        console.print(f"question: {record['question']}", markup=False, highlight=False)
        console.print(f"answer: {' or '.join(record['answers'])}", markup=False, highlight=False)
        size = record["sizes"][0] if len(record["sizes"]) == 1 else None
        console.print(highlighted(record["response"], size, coordinates))


def _hashes(args: argparse.Namespace) -> None:
    from rich.progress import track

    from avar_verl.data.rows import count_rows, data_files
    from avar_verl.tools.synth.duplicates import write_hashes
    from avar_verl.tools.synth.items import read_items

    # Any column will do for an answer: none is kept.
    config = InputConfig(
        files=args.files, question=args.question, answer=args.question, images=args.images, root=args.root
    )
    console = Console()
    items = track(read_items(config), "hash", total=count_rows(data_files(args.files)), console=console, transient=True)
    written, left_out = write_hashes(items, args.out)
    console.print(f"{args.out}: {written} questions, {left_out} rows left out", highlight=False)
    if not written:
        raise ValueError(f"a hash list must have questions; got none in {args.files}. Check --question and --images.")
