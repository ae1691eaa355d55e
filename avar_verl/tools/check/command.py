# SPDX-License-Identifier: Apache-2.0
"""`avar data check`."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from avar_verl.data.check import Settings
from avar_verl.tools.options import Command, Count, Files, Size


@dataclass(frozen=True, kw_only=True)
class Check(Settings, Command):
    """Find rows that would break or falsify training; exit code 1 if there are any (docs/data.md)."""

    files: Files  # Parquet, jsonl or json files, or folders of them.
    n: Count = 0  # Check only the first N rows of all files together; 0: all.
    processes: Size = 1  # Number of parallel processes.
    out: Path | None = None  # Write every finding to this JSON file.

    def __post_init__(self) -> None:
        Settings.__post_init__(self)
        Command.__post_init__(self)

    def run(self) -> None:
        from rich.console import Console

        from avar_verl.data.check import check_files
        from avar_verl.tools.progress import progress

        load_rendering = None
        if self.model is not None:
            from avar_verl.plugin.datasets.check_rendered import Rendering as load_rendering  # Imports torch and verl.

        report = check_files(self.files, self, load_rendering, n=self.n, processes=self.processes, progress=progress)
        report.print(Console())
        if self.out:
            self.out.write_text(json.dumps(report.as_dict(), indent=1))
        if report.count("error"):
            sys.exit(1)
