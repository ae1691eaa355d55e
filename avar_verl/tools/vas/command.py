# SPDX-License-Identifier: Apache-2.0
"""`avar vas` and `avar vas compare`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from avar_verl.tools.options import AtLeast, Command, Count, Files, Pairs, Size, Words

QUERY_ROLES = {"user": ("user",), "response": ("response",), "both": ("user", "response"), "none": ()}


@dataclass(frozen=True)
class Vas(Command):
    """Measure the Visual Attention Score of a checkpoint, and write a report (docs/vas.md)."""

    model: str  # Hugging Face folder or name.
    data: str  # Parquet or jsonl file as for SFT or RL, a folder of such files, or a data set on the hub.
    split: str | None = None  # Split of a data set on the hub.
    columns: Pairs = field(default_factory=dict)  # Column names of the data if they differ, such as question=query.
    n: Count = 0  # Measure only the first N rows; 0: all.
    query: Literal["user", "response", "both", "none"] = "both"  # Whose attention is measured; none: only --dependency.
    # Layers to measure; negative indices count from the end. If omitted: all.
    layers: Annotated[tuple[int, ...] | None, AtLeast(1), arg(metavar="INT ...")] = None
    # Also measure how much less likely responses are with a corrupted image: without content (blank), or with the image
    # of another row (swap). One more forward pass. If omitted: not measured.
    dependency: Literal["blank", "swap"] | None = None
    generate: bool = False  # Measure responses that the model generates greedily, instead of the rows' responses.
    max_new_tokens: Size = 1024  # Maximum number of tokens of a generated response.
    system: str | None = None  # System turn for conversations without one.
    batch_size: Size = 8  # Samples per batch; does not change the numbers.
    device: str | None = None  # torch device. If omitted: cuda if this process sees a GPU, else cpu.
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # dtype of the model.
    ray: Count = 0  # Number of workers on a Ray cluster; 0: this process.
    show: Count = 4  # Number of samples with words in the report.
    words: Words = None  # Words to show. If omitted: those with the most attention to the image.
    resamples: Annotated[int, AtLeast(100)] = 1000  # Number of bootstrap draws for the intervals, at least 100.
    seed: Count = 0  # Seed of the bootstrap.
    out: Path | None = None  # Folder for vas.json, report.html and the records. A killed run continues in it.

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.queries and self.dependency is None:
            raise ValueError("query=none leaves dependency to measure; got none. Pass --dependency blank.")
        if not self.queries and self.layers is not None:
            raise ValueError(
                f"layers are those whose attention is measured; got {self.layers} and query=none. Omit them."
            )

    def run(self) -> None:
        from rich.console import Console

        from avar_verl.tools.vas.run import run_vas
        from avar_verl.tools.vas.show import print_summary

        print_summary(run_vas(self), self.out, Console())

    @property
    def queries(self) -> tuple[str, ...]:
        """Query roles, keys of `measure.QUERIES`."""
        return QUERY_ROLES[self.query]

    @property
    def needs_response(self) -> bool:
        """Whether a response is measured."""
        return "response" in self.queries or self.dependency is not None

    @property
    def response_tokens(self) -> int | None:
        """Maximum number of response tokens to generate; None measures the rows' responses."""
        return self.max_new_tokens if self.generate else None


@dataclass(frozen=True)
class Compare(Command):
    """Compare checkpoints, and correlate VAS with benchmark scores (docs/vas.md)."""

    files: Annotated[Files, AtLeast(2)]  # [NAME=]vas.json of each checkpoint; differences are from the first one.
    scores: Path | None = None  # CSV file with a column `name` and one column per benchmark.
    out: Path | None = None  # Folder for compare.json and compare.html.

    def run(self) -> None:
        from rich.console import Console

        from avar_verl.tools.vas.compare import run_compare

        run_compare(self, Console())
