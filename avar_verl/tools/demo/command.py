# SPDX-License-Identifier: Apache-2.0
"""`avar demo`."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from avar_verl.tools.options import Command, Json


@dataclass(frozen=True, kw_only=True)
class Demo(Command):
    """Run the whole recipe on a tiny model on this machine, and write a report."""

    out: Path = Path("outputs/demo")  # Folder of the run. A killed run continues in it.
    fresh: bool = False  # Delete the folder and start over.
    # Fields of `tools.demo.run.DemoSettings` to replace, such as {"grpo_steps": 6}.
    settings: Json = field(default_factory=dict)

    def run(self) -> None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        from avar_verl.tools.demo.run import run_demo

        run_demo(self.out, fresh=self.fresh, **self.settings)
