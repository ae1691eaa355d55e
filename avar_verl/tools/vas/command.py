# SPDX-License-Identifier: Apache-2.0
"""`avar vas` and `avar vas compare`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from avar_verl.tools.options import AtLeast, Command, Count, Files, Pairs, Size, Words


@dataclass(frozen=True)
class Vas(Command):
    """Visual Attention Score of a checkpoint, with a report (docs/vas.md)."""

    model: str  # Hugging Face folder or name.
    data: str  # Parquet or jsonl file as for SFT or RL, a folder of them, or a data set of the hub.
    split: str | None = None  # Split of a data set of the hub.
    columns: Pairs = field(default_factory=dict)  # Names that data with other columns use, such as question=query.
    n: Count = 0  # First rows to measure; 0: all.
    query: Literal["user", "response", "both"] = "both"  # Whose attention is measured.
    # Layers to measure, negative ones counted from the end; without it all.
    layers: Annotated[tuple[int, ...] | None, AtLeast(1), arg(metavar="INT ...")] = None
    generate: bool = False  # Measure responses that the model generates, greedily, and not those that the rows have.
    max_new_tokens: Size = 1024  # Most tokens of a generated response.
    system: str | None = None  # System turn of conversations that have none.
    batch_size: Size = 8  # Samples at a time; changes no number.
    device: str | None = None  # torch device; without it cuda where this process sees a GPU, else cpu.
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # Of the model.
    ray: Count = 0  # Workers on a Ray cluster; 0: this process.
    show: Count = 4  # Samples whose words are shown in the report.
    words: Words = None  # Words to show; without it those that look most at the image.
    resamples: Annotated[int, AtLeast(100)] = 1000  # Bootstrap draws of the intervals, at least 100.
    seed: Count = 0  # Of the bootstrap.
    out: Path | None = None  # Folder for vas.json, report.html and the records. A killed run goes on in it.

    def run(self) -> None:
        from rich.console import Console

        from avar_verl.tools.vas.run import run_vas
        from avar_verl.tools.vas.show import print_summary

        print_summary(run_vas(self), self.out, Console())

    @property
    def queries(self) -> tuple[str, ...]:
        """Query roles, keys of `measure.QUERIES`."""
        return ("user", "response") if self.query == "both" else (self.query,)

    @property
    def response_tokens(self) -> int | None:
        """Most tokens of a response to generate; None: responses are those of the rows."""
        return self.max_new_tokens if self.generate else None


@dataclass(frozen=True)
class Compare(Command):
    """Checkpoints beside each other, and VAS against benchmark scores (docs/vas.md)."""

    files: Annotated[Files, AtLeast(2)]  # [NAME=]vas.json of each checkpoint; differences are from the first one.
    scores: Path | None = None  # CSV with a column `name`, and one for every benchmark.
    out: Path | None = None  # Folder for compare.json and compare.html.

    def run(self) -> None:
        from rich.console import Console

        from avar_verl.tools.vas.compare import run_compare

        run_compare(self, Console())
