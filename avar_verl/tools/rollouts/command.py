# SPDX-License-Identifier: Apache-2.0
"""`avar rollouts show`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from avar_verl.tools.options import Command, Size


@dataclass(frozen=True)
class Show(Command):
    """Make a page of rollouts: images with the anchors drawn, text, rewards by part (docs/rollouts.md)."""

    data: Positional[Path]  # Folder of verl's trainer.rollout_data_dir, or one of its jsonl files.
    out: Path | None = None  # The page; without it, rollouts.html beside the data.
    steps: tuple[int, ...] | None = None  # Only rollouts of these steps.
    # Scale of the coordinates that the model writes, if the text does not say: pixels, 0-1000, 0-1 or 0-100.
    coordinates: Literal["auto", "absolute", "relative_1000", "normalized", "percent"] = "auto"
    side: Size = 384  # Longest side of an image in the page, in pixels.

    def run(self) -> None:
        from avar_verl.tools.rollouts.show import write_page

        print(write_page(self))
