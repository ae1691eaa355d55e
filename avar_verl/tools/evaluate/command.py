# SPDX-License-Identifier: Apache-2.0
"""`avar eval`, `avar eval compare` and `avar eval ablation`."""

import json
import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import OmitArgPrefixes, Positional, arg

from avar_verl.tools.options import AtLeast, Command, Count, Size

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Sampling(Command):
    """Sampling parameters of a request."""

    temperature: Annotated[float, AtLeast(0)] = 0.0  # 0 is greedy.
    max_tokens: Size = 2048  # Maximum number of response tokens.
    seed: int = 0  # Seed of the sampling; no effect at temperature 0.
    top_p: float = 1.0  # Above 0 and at most 1, which keeps every token; no effect at temperature 0.

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1; got {self.top_p}. 1 keeps every token.")


@dataclass(frozen=True, kw_only=True)
class Eval(Command):
    """Measure the accuracy of a checkpoint on benchmarks and local files (docs/eval.md).

    Asks every question over a vLLM server that this command starts and stops. A killed run can be continued.
    """

    model: str | None = None  # Hugging Face folder or name; with --server-url, the name on the server.
    tasks: str = ""  # Benchmarks, separated by commas; all: the paper's benchmarks.
    # Data files in verl's RL layout; a task is named after its file.
    data: Annotated[tuple[Path, ...], arg(metavar="FILE ...")] = ()
    out: Path | None = None  # Folder of the records. If omitted: outputs/eval/<name of the model>.
    n: Count = 0  # Ask only the first N items of each task; 0: all.
    intervene: str | None = None  # Such as alpha_img=0.15,alpha_sys=0.4,layers=8-20 (docs/intervention.md).
    dry_run: bool = False  # Show data sets, revisions and prompts, without asking anything.
    # reward: the answer that the reward finds. whole: a response without any mark is the answer as a whole.
    answers: Literal["reward", "whole"] = "reward"
    decimals: Literal["exact", "ground_truth"] = (
        "exact"  # ground_truth: round an answer to the decimals of the right one.
    )
    sampling: OmitArgPrefixes[Sampling] = Sampling()  # Parameters of every request.
    server_url: str | None = None  # A running OpenAI-compatible server, with /v1. If omitted: start vLLM.
    server_args: str = ""  # Additional arguments of vLLM as one text, such as --server-args='--dtype half'.
    server_timeout: float = 900.0  # Seconds within which vLLM must answer.
    max_model_len: Size | None = None  # Tokens of prompt and response in vLLM. If omitted: the model's limit.
    # Side of a patch of the image processor in pixels, by which images are resized as in training. If omitted: that of
    # --model; 14 for a model that is not on this machine.
    patch_size: Size | None = None
    concurrency: Size = 64  # Number of concurrent requests.
    request_timeout: float = 1800.0  # Seconds before a request is retried.
    max_retries: Count = 6  # Number of retries of a request, with exponential back-off.

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.model and not self.dry_run:
            raise ValueError("avar eval needs --model; got none. To see only the prompts, use --dry-run.")

    @property
    def folder(self) -> Path:
        """Folder of the records."""
        return self.out or Path("outputs") / "eval" / Path(self.model).resolve().name

    @property
    def server_arguments(self) -> list[str]:
        return shlex.split(self.server_args)

    def run(self) -> None:
        if self.dry_run:
            from avar_verl.tools.evaluate.dry_run import show_tasks

            show_tasks(self.tasks, self.data, _console())
            return
        from avar_verl.tools.evaluate.run import run_eval
        from avar_verl.tools.evaluate.tables import results_table

        try:
            results = run_eval(self)
        except KeyboardInterrupt:
            print(f"\nstopped; all answers are in {self.folder}; run the same command to continue", file=sys.stderr)
            sys.exit(130)
        _console().print(results_table(results))
        print(f"records: {self.folder}")


def _console() -> "Console":
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160)


@dataclass(frozen=True, kw_only=True)
class Compare(Command):
    """Compare runs on the same items: paired bootstrap and McNemar's test (docs/eval.md)."""

    # Folders of runs; the others are compared with the first one.
    runs: Annotated[Positional[tuple[str, ...]], AtLeast(2), arg(metavar="FOLDER ...")]
    resamples: Size = 10_000  # Number of bootstrap draws for the intervals.
    seed: Count = 0  # Seed of the bootstrap.
    json: Path | None = None  # Also write the numbers to this file.

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.runs)) < len(self.runs):
            raise ValueError(f"folders must be different; got {list(self.runs)}. Name each once.")

    def run(self) -> None:
        from avar_verl.tools.evaluate.run import read_run
        from avar_verl.tools.evaluate.tables import check_same_questions, comparison_table
        from avar_verl.tools.stats import compare

        runs = {folder: read_run(Path(folder)) for folder in self.runs}
        right = {
            folder: {task: {i: record.correct for i, record in records.items()} for task, records in run.items()}
            for folder, run in runs.items()
        }
        first, *others = self.runs
        console, out = _console(), {}
        for folder in others:
            check_same_questions(runs[first], runs[folder])
            rows = compare(right[first], right[folder], self.resamples, self.seed)
            console.print(comparison_table(first, folder, rows))
            out[folder] = {task: asdict(row) for task, row in rows.items()}
        if self.json:
            self.json.write_text(json.dumps({"against": first, "runs": out}, indent=1))


@dataclass(frozen=True, kw_only=True)
class Ablation(Command):
    """Print the paper's ablation table, measured and published (docs/eval.md)."""

    # Folders of four runs.
    runs: Annotated[Positional[tuple[Path, Path, Path, Path]], arg(metavar="BASE VARD AGTO VARS")]
    # vas.json of each run, written by `avar vas --out`. If omitted: FOLDER/vas.json if it exists.
    vas: Annotated[tuple[Path, Path, Path, Path] | None, arg(metavar="BASE VARD AGTO VARS")] = None
    query: Literal["user", "response"] = "user"  # Whose attention to use for VAS.
    json: Path | None = None  # Also write the numbers to this file.

    def run(self) -> None:
        from avar_verl.tools.evaluate.run import read_run
        from avar_verl.tools.evaluate.tables import ablation_rows, ablation_table, check_same_questions, read_vas

        runs = [read_run(folder) for folder in self.runs]
        for run in runs[1:]:
            check_same_questions(runs[0], run)
        files = self.vas or [folder / "vas.json" for folder in self.runs]
        vas = [read_vas(file, self.query) if self.vas or file.is_file() else None for file in files]
        rows = ablation_rows(runs, vas)
        _console().print(ablation_table(rows))
        if self.json:
            self.json.write_text(json.dumps(rows, indent=1))
