# SPDX-License-Identifier: Apache-2.0
"""`avar study run` and `avar study report`."""

from dataclasses import dataclass, field, fields
from pathlib import Path

from tyro.conf import Positional

from avar_verl.tools.options import Command, Json, Size


@dataclass(frozen=True, kw_only=True)
class Run(Command):
    """Run the study of the lazy-attention task on this machine's cores (docs/study.md)."""

    out: Path  # Folder of the study. A killed study continues in it.
    workers: Size = 2  # Processes of one thread each; as many as there are idle cores.
    # Fields of `tools.study.cells.StudySettings` to replace, such as {"seeds": 3}.
    settings: Json = field(default_factory=dict)

    def run(self) -> None:
        from avar_verl.tools.study.cells import StudySettings
        from avar_verl.tools.study.report import write_report
        from avar_verl.tools.study.run import run_study

        chosen, known = self.settings, [one.name for one in fields(StudySettings)]
        if not set(chosen) <= set(known):
            raise ValueError(f"settings must be some of {known}; got {sorted(set(chosen) - set(known))}. Name one.")
        run_study(self.out, self.workers, StudySettings(**chosen))
        write_report(self.out)


@dataclass(frozen=True)
class Report(Command):
    """Tables, plots and claims of a study, finished or not, from its records (docs/study.md)."""

    folder: Positional[Path]  # Folder of the study.

    def run(self) -> None:
        from avar_verl.tools.study.report import write_report

        write_report(self.folder)
