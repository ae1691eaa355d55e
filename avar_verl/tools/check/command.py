# SPDX-License-Identifier: Apache-2.0
"""`avar data check`."""

import argparse
import json
import sys
from pathlib import Path


def _run(args: argparse.Namespace) -> None:
    from rich.console import Console

    from avar_verl.data.check import Settings, check_files

    settings = Settings(args.kind, args.model, args.max_length, args.max_prompt_length, args.allow_urls)
    load_rendering = None
    if args.model is not None:
        from avar_verl.plugin.datasets.check_rendered import Rendering as load_rendering  # Imports torch and verl.

    report = check_files(args.files, settings, load_rendering, n=args.n, processes=args.processes)
    report.print(Console())
    if args.out:
        Path(args.out).write_text(json.dumps(report.as_dict(), indent=1))
    if report.count("error"):
        sys.exit(1)


def add_parser(commands) -> None:
    """The command `data` of `avar`."""
    data = commands.add_parser("data", help="data files for the cold start and for RL")
    check = data.add_subparsers(dest="data_command", required=True).add_parser(
        "check", help="find every row that would break a training or falsify it; exit code 1 if there is one"
    )
    check.add_argument("files", nargs="+", metavar="FILE", help="parquet, jsonl or json files, or folders of them")
    check.add_argument("--kind", choices=("sft", "rl", "auto"), default="auto", help="(default: %(default)s)")
    check.add_argument("--model", help="Hugging Face folder or name: render every row with its processor")
    check.add_argument("--max-length", type=int, help="tokens of an SFT row, as data.max_length; needs --model")
    check.add_argument("--max-prompt-length", type=int, help="tokens of an RL prompt, as data.max_prompt_length")
    check.add_argument("--allow-urls", action="store_true", help="fetch images from http(s)")
    check.add_argument("--n", type=int, default=0, help="only the first N rows (default: all)")
    check.add_argument("--processes", type=int, default=1, help="(default: %(default)s)")
    check.add_argument("--out", help="write every finding to this JSON file")
    check.set_defaults(run=_run)
