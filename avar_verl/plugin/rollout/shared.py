# SPDX-License-Identifier: Apache-2.0
"""What the rollouts of a prompt share in their agent-loop worker: its pictures, its rendering, its stored pixels.

All rollouts of a prompt run in one call of one worker (verl/trainer/ppo/v1/agent_loop_tq.py, `_run_prompt`). The tasks
of that call see the prompt's `SharedPrompt` as CURRENT.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextvars import ContextVar
from typing import Any

from avar_verl.model.corrupt import PIXELS
from avar_verl.plugin.compat.verl.shared_features import HOLDER, Features


class SharedPrompt:
    """`messages`: the prompt's `raw_prompt`. `partition`: of its rollouts in the TransferQueue."""

    def __init__(self, messages: Sequence[dict], partition: str):
        self._messages, self._partition = list(messages), partition
        self._tasks: dict[Any, asyncio.Future] = {}
        self.lock = asyncio.Lock()
        """Held while the first rollout is stored."""
        self.holder: str | None = None
        """Key of the first stored rollout with the shared features."""
        self.features: Features | None = None
        """What the prompt was rendered to."""

    def is_of(self, messages: Sequence[dict]) -> bool:
        """Whether these are the prompt's own messages, and not what a loop has made of them."""
        same = (mine is other for mine, other in zip(self._messages, messages, strict=False))
        return len(messages) == len(self._messages) and all(same)

    async def once(self, name: Any, work: Callable[[], Awaitable[Any]]) -> Any:
        """The result of the first `work` of this name, for every rollout; or its error."""
        if name not in self._tasks:
            self._tasks[name] = asyncio.ensure_future(work())
        return await asyncio.shield(self._tasks[name])  # One cancelled rollout must not end it for the others.

    def named(self, key: str) -> Features:
        """The shared features as the row `key` stores them: with HOLDER, without pixels unless it is the holder.

        Before a rollout is stored, the one that is being stored is the holder.
        """
        holder = self.holder or key
        own = {name: value for name, value in self.features.items() if key == holder or name not in PIXELS}
        return {**own, HOLDER: [self._partition, holder]}

    def drop(self) -> None:
        """Let pictures and features go: a task that the rollouts have started and not ended keeps its context."""
        self._messages, self._tasks, self.features = [], {}, None


CURRENT: ContextVar[SharedPrompt | None] = ContextVar("avar_shared_prompt", default=None)
