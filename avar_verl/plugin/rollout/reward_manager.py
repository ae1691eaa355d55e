# SPDX-License-Identifier: Apache-2.0
"""verl's reward manager for reward functions that need images, special tokens or the prompt, and that may fail.

    reward.reward_manager.name=avar        (avar_grpo.yaml)

It replaces `NaiveRewardManager` (verl/experimental/reward_loop/reward_manager/naive.py), which decodes without special
tokens, waits forever, and ends the run at the first exception of the reward function.
"""

import asyncio
import contextlib
import inspect
import logging
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from omegaconf import DictConfig
from verl import DataProto
from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase
from verl.utils.config import omega_conf_to_dataclass

from avar_verl.plugin.config import OWN_TOKENS, PROMPT_ROWS, TOOL_FILES, RewardManagerConfig
from avar_verl.plugin.switch import switch_on
from avar_verl.rewards.compose import PROMPT

logger = logging.getLogger(__name__)

# Set to 1 in the parts of a sample whose reward function failed, and logged as avar/reward/reward_failed.
FAILED = "reward_failed"


def prompt_text(messages) -> str:
    """The text of a conversation's user turns, for rewards that must not pay for copying it."""
    out = []
    for message in messages:
        if message["role"] != "user":
            continue
        content = message["content"]
        out += [content] if isinstance(content, str) else [part["text"] for part in content if part.get("text")]
    return "\n".join(out)


def own_tokens(response_T: torch.Tensor, own: Sequence[int] | None) -> torch.Tensor:
    """The ids of a response that the policy wrote: those where `own` is 1; None, if no tool was called, means all.

    A reward of the text of tools would pay for calling them.

    Raises:
        ValueError: another number of tokens.
    """
    if own is None:
        return response_T
    if len(own) != len(response_T):
        raise ValueError(
            f"every token of a response is the policy's or not; got {len(own)} marks for {len(response_T)} tokens. "
            "Give one for every token."
        )
    return response_T[torch.tensor(own, dtype=torch.bool)]


async def call_with_timeout(function: Callable, timeout_s: float | None, **arguments: Any) -> Any:
    """`function(**arguments)` in its own thread, or awaited; TimeoutError after `timeout_s` seconds.

    A thread cannot be stopped: one that hangs continues as a daemon, until its process ends.
    """
    if inspect.iscoroutinefunction(function):
        return await asyncio.wait_for(function(**arguments), timeout_s)
    loop = asyncio.get_running_loop()
    future = loop.create_future()

    def resolve(setter, value) -> None:
        if not future.done():  # Cancelled by the timeout.
            setter(value)

    def hand_over(setter, value) -> None:
        with contextlib.suppress(RuntimeError):  # The loop was closed after the timeout: nothing waits for the result.
            loop.call_soon_threadsafe(resolve, setter, value)

    def work() -> None:
        try:
            result = function(**arguments)
        except Exception as error:  # Broad on purpose: it is passed on to the caller.
            hand_over(future.set_exception, error)
        else:
            hand_over(future.set_result, result)

    threading.Thread(target=work, daemon=True).start()
    return await asyncio.wait_for(future, timeout_s)


class AvarRewardManager(RewardManagerBase):
    """Scores one rollout.

    - `avar.reward.skip_special_tokens=false` lets `<|box_start|>` and its relatives reach the reward function;
    - `extra_info` also gets `image_sizes` and `image_grids` of the prompt's images, `tool_image_sizes` and
      `tool_image_grids` of those that tools returned (from the agent loop), and `prompt_text`;
    - the response is what the policy wrote (`own_tokens`), without the turns of tools;
    - if the reward function raises, returns no finite score or takes longer than `avar.reward.timeout_s`, the sample
      gets no reward (all parts are 0, `reward_failed` is 1), and the failure is reported with the sample's index. After
      `avar.reward.max_failures` failures in a row the run ends, because the cause is then not a bad sample.
    """

    def __init__(self, config: DictConfig, tokenizer, compute_score, reward_router_address=None, **kwargs):
        switch_on()
        super().__init__(config, tokenizer, compute_score)
        self.settings: RewardManagerConfig = omega_conf_to_dataclass(config.avar.reward)
        self.gate_key: str = config.avar.vars.gate_key
        self.router = {}
        if reward_router_address is not None:
            self.router["reward_router_address"] = reward_router_address
            self.router["reward_model_tokenizer"] = kwargs.get("reward_model_tokenizer")
        self._keys: tuple[str, ...] = ()
        self._failures = 0

    async def run_single(self, data: DataProto) -> dict:
        item = data[-1:][0]  # If there are several sequences, the last one has the answer.
        length = item.batch["responses"].shape[-1]
        valid = int(item.batch["attention_mask"][-length:].sum())
        response = item.batch["responses"][:valid]
        sample = item.non_tensor_batch
        # A copy: rollouts of one prompt share the dict.
        extra_info = {**(sample.get("extra_info") or {}), **(sample.get("tool_extra_fields") or {})}
        own = extra_info.pop(OWN_TOKENS, None)
        for name in (PROMPT_ROWS, TOOL_FILES):  # For the trainer.
            extra_info.pop(name, None)
        extra_info["num_turns"] = sample.get("__num_turns__")
        extra_info["rollout_reward_scores"] = sample.get("reward_scores", {})
        if "raw_prompt" in sample:
            extra_info[PROMPT] = prompt_text(sample["raw_prompt"])
        text = await asyncio.get_running_loop().run_in_executor(
            None,
            lambda: self.tokenizer.decode(
                own_tokens(response, own), skip_special_tokens=self.settings.skip_special_tokens
            ),
        )
        try:
            result = await call_with_timeout(
                self.compute_score,
                self.settings.timeout_s,
                data_source=sample["data_source"],
                solution_str=text,
                ground_truth=sample["reward_model"]["ground_truth"],
                extra_info=extra_info,
                **self.router,
            )
            parts = self._parts(result)
        except Exception as error:  # Broad on purpose: any exception of the reward function is reported and counted.
            parts = self._failed(error, sample["data_source"], extra_info.get("index"))
        return {"reward_score": parts["score"], "reward_extra_info": parts}

    def _parts(self, result: Any) -> dict[str, Any]:
        parts = dict(result) if isinstance(result, Mapping) else {"score": result, "acc": result}
        if "score" not in parts or not math.isfinite(parts["score"]):
            raise ValueError(
                f"compute_score must return a finite number, or a dict with one as 'score'; got {result!r}. "
                "Correct the reward function."
            )
        self._failures, self._keys = 0, tuple(parts)
        return {**parts, FAILED: 0.0}

    def _failed(self, error: Exception, data_source: str, index: Any) -> dict[str, Any]:
        self._failures += 1
        kind = "timed out" if isinstance(error, (asyncio.TimeoutError, TimeoutError)) else "failed"
        sample = f"data_source {data_source!r}, index {index}"
        logger.error("reward function %s for %s: %s: %s", kind, sample, type(error).__name__, error)
        if self._failures >= self.settings.max_failures:
            raise RuntimeError(
                f"the reward function must work for some sample; got {self._failures} failures in a row, the last for "
                f"{sample}: {type(error).__name__}: {error}. Correct it, or raise avar.reward.max_failures."
            ) from error
        # All samples must have the same keys, because verl's validation needs them.
        return {**dict.fromkeys((*self._keys, "score", self.gate_key), 0.0), FAILED: 1.0}
