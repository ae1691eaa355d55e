# SPDX-License-Identifier: Apache-2.0
"""The command line of `avar eval`."""

import argparse
import json
import shlex
import sys
from pathlib import Path


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `avar eval` with `compare` and `ablation`."""
    parser = commands.add_parser(
        "eval",
        help="accuracy of a checkpoint on benchmarks and local files, item by item; compare runs (docs/eval.md)",
        description="Ask every question over a vLLM server that this command starts and stops. A killed run goes on.",
    )
    parser.add_argument("--model", help="Hugging Face folder, or a name on the hub")
    parser.add_argument(
        "--tasks", default="", metavar="NAMES", help="benchmarks, separated by commas; 'all' is the paper's"
    )
    parser.add_argument("--data", nargs="+", default=[], metavar="FILE", help="data files in verl's RL layout")
    parser.add_argument("--out", help="folder of the records (default: outputs/eval/<name of the model>)")
    parser.add_argument("--n", type=int, default=0, help="first N items of each task (default: all)")
    parser.add_argument("--intervene", metavar="SPEC", help="such as alpha_img=0.15,alpha_sys=0.4,layers=8-20")
    parser.add_argument("--dry-run", action="store_true", help="show data sets, revisions and prompts; ask nothing")
    parser.add_argument(
        "--answers",
        dest="answer_rule",
        choices=("reward", "whole"),
        default="reward",
        help="whole: a response without any mark is an answer as a whole (default: %(default)s)",
    )
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--max-tokens", type=int, default=2048, help="of a response (default: %(default)s)")
    sampling.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: %(default)s)")
    sampling.add_argument("--top-p", type=float, default=1.0, help="(default: %(default)s)")
    sampling.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    server = parser.add_argument_group("server")
    server.add_argument("--server-url", metavar="URL", help="a running OpenAI-compatible server, with /v1")
    server.add_argument("--server-args", default="", metavar="TEXT", help="further arguments of vLLM, as one text")
    server.add_argument("--server-timeout", type=float, default=900, help="seconds to start (default: %(default)s)")
    server.add_argument("--max-model-len", type=int, help="tokens of prompt and response (default: the model's)")
    server.add_argument("--concurrency", type=int, default=64, help="requests at a time (default: %(default)s)")
    server.add_argument("--request-timeout", type=float, default=1800, help="seconds (default: %(default)s)")
    server.add_argument("--max-retries", type=int, default=6, help="of a request (default: %(default)s)")
    parser.set_defaults(run=_eval)

    more = parser.add_subparsers(dest="eval_command", metavar="{compare,ablation}")
    compare = more.add_parser("compare", help="runs on the same items: paired bootstrap and McNemar's test")
    compare.add_argument("runs", nargs="+", metavar="FOLDER", help="the first one is what the others are compared with")
    compare.add_argument("--resamples", type=int, default=10_000, help="(default: %(default)s)")
    compare.add_argument("--seed", type=int, default=0, help="of the resampling (default: %(default)s)")
    compare.add_argument("--json", metavar="FILE", help="write the numbers to this file too")
    compare.set_defaults(run=_compare)

    ablation = more.add_parser("ablation", help="the paper's ablation table, measured and published")
    ablation.add_argument("runs", nargs=4, metavar=("BASE", "VARD", "AGTO", "VARS"), help="folders of four runs")
    ablation.add_argument("--vas", nargs=4, metavar="FILE", help="avar vas --out of each (default: FOLDER/vas.json)")
    ablation.add_argument("--query", choices=("user", "response"), default="user", help="of VAS (default: %(default)s)")
    ablation.add_argument("--json", metavar="FILE", help="write the numbers to this file too")
    ablation.set_defaults(run=_ablation)


def _eval(args: argparse.Namespace) -> None:
    from rich.console import Console

    from avar_verl.tools.evaluate.benchmarks import NAMES

    tasks = ",".join(NAMES) if args.tasks == "all" else args.tasks
    console = Console(width=None if sys.stdout.isatty() else 160)
    if args.dry_run:
        from avar_verl.tools.evaluate.dry_run import show_tasks

        show_tasks(tasks, [Path(file) for file in args.data], console)
        return
    if not args.model:
        raise ValueError("avar eval needs --model; got none. For the prompts alone use --dry-run.")

    from avar_verl.tools.evaluate.client import Sampling
    from avar_verl.tools.evaluate.run import EvalSettings, run_eval
    from avar_verl.tools.evaluate.tables import results_table

    settings = EvalSettings(
        model=args.model,
        out=Path(args.out or Path("outputs") / "eval" / (Path(args.model).resolve().name if args.model else "")),
        tasks=tasks,
        data=tuple(Path(file) for file in args.data),
        n=args.n,
        intervene=args.intervene,
        server_url=args.server_url,
        server_args=tuple(shlex.split(args.server_args)),
        server_timeout=args.server_timeout,
        max_model_len=args.max_model_len,
        concurrency=args.concurrency,
        request_timeout=args.request_timeout,
        max_retries=args.max_retries,
        answer_rule=args.answer_rule,
        sampling=Sampling(args.temperature, args.max_tokens, args.seed, args.top_p),
    )
    try:
        results = run_eval(settings)
    except KeyboardInterrupt:
        print(f"\nstopped; what is answered is in {settings.out}, and the same command goes on", file=sys.stderr)
        sys.exit(130)
    console.print(results_table(results))
    print(f"records: {settings.out}")


def _compare(args: argparse.Namespace) -> None:
    from dataclasses import asdict

    from rich.console import Console

    from avar_verl.tools.evaluate.run import read_run
    from avar_verl.tools.evaluate.tables import check_same_questions, comparison_table
    from avar_verl.tools.stats import compare

    if len(args.runs) < 2:
        raise ValueError(f"avar eval compare needs two folders or more; got {args.runs}. Name them.")
    runs = {folder: read_run(Path(folder)) for folder in args.runs}
    if len(runs) < len(args.runs):
        raise ValueError(f"folders must be different; got {args.runs}. Name each once.")
    first = args.runs[0]
    right = {
        folder: {task: {i: record.correct for i, record in records.items()} for task, records in run.items()}
        for folder, run in runs.items()
    }
    console, out = Console(width=None if sys.stdout.isatty() else 160), {}
    for folder in args.runs[1:]:
        check_same_questions(runs[first], runs[folder])
        rows = compare(right[first], right[folder], args.resamples, args.seed)
        console.print(comparison_table(first, folder, rows))
        out[folder] = {task: asdict(row) for task, row in rows.items()}
    if args.json:
        Path(args.json).write_text(json.dumps({"against": first, "runs": out}, indent=1))


def _ablation(args: argparse.Namespace) -> None:
    from rich.console import Console

    from avar_verl.tools.evaluate.run import read_run
    from avar_verl.tools.evaluate.tables import ablation_rows, ablation_table, check_same_questions, read_vas

    runs = [read_run(Path(folder)) for folder in args.runs]
    for run in runs[1:]:
        check_same_questions(runs[0], run)
    files = [Path(file) for file in args.vas or ()] or [Path(folder) / "vas.json" for folder in args.runs]
    vas = [read_vas(file, args.query) if args.vas or file.is_file() else None for file in files]
    rows = ablation_rows(runs, vas)
    Console(width=None if sys.stdout.isatty() else 160).print(ablation_table(rows))
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1))
