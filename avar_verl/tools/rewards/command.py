# SPDX-License-Identifier: Apache-2.0
"""`avar rewards score`."""

from dataclasses import dataclass, field
from pathlib import Path

from tyro.conf import Positional

from avar_verl.tools.options import Command, Count, Json


@dataclass(frozen=True)
class Score(Command):
    """Score recorded rollouts with a reward: table, histogram, anchors highlighted in the text."""

    data: Positional[Path]  # Rollouts: jsonl as written to verl's trainer.rollout_data_dir, or parquet.
    reward: str = "visual_anchor"  # Name of a shipped reward, a file, or pkg://module.
    settings: Json = field(default_factory=dict)  # Keyword arguments of compute_score.
    n: Count = 0  # Score only the first N rows; 0: all.
    show: Count = 3  # Number of responses to print.
    out: Path | None = None  # Write every rollout's parts to this jsonl file.

    def run(self) -> None:
        from rich.console import Console

        from avar_verl.tools.rewards.offline import score_file

        score_file(self, Console())
