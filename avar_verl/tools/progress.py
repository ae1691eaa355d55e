# SPDX-License-Identifier: Apache-2.0
"""The progress bar of all tools: a bar on a terminal; in a log, a line every few seconds and one at the end."""

import sys
import time
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

LOG_SECONDS = 10.0


class _Lines(tqdm):
    """A bar as whole lines, at most one per LOG_SECONDS. tqdm would overwrite the previous refresh, which is impossible
    in a log.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        self._next_line, self._shown = time.monotonic() + LOG_SECONDS, None
        super().__init__(*args, mininterval=LOG_SECONDS, miniters=0, **kwargs)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if time.monotonic() >= self._next_line:
            self._next_line, self._shown = time.monotonic() + LOG_SECONDS, self.n
            self.fp.write(f"{self}\n")
            self.fp.flush()

    def clear(self, *_args: Any, **_settings: Any) -> None:
        """Nothing is wiped away, for `write` either."""

    def close(self) -> None:
        if not self.disable:
            if not self._shown == self.n == self.total:  # The line of the last step may have been due.
                self._next_line = 0.0
                self.display()
            self.sp = None  # Tells tqdm that there is nothing to erase.
        super().close()


def progress(
    items: Iterable | None = None, desc: str = "", *, total: int | None = None, unit: str = "it", **settings: Any
) -> tqdm:
    """A tqdm on stderr, over `items` or to `update`. In a loop that waits, `update(0)` writes a line if it is due.

    Args:
        total: number of steps; None for the length of `items`, if it has one.
        settings: further arguments of tqdm, such as `initial` and `leave`.
    """
    kind = tqdm if sys.stderr.isatty() else _Lines
    return kind(items, desc, total, unit=unit, file=sys.stderr, **settings)


def say(text: str) -> None:
    """Print a line, above the bars that are on the terminal."""
    tqdm.write(text)
    sys.stdout.flush()
