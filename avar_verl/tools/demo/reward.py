# SPDX-License-Identifier: Apache-2.0
"""The recipe's reward, which also reports whether a response looks; the demo's `reward.custom_reward_function`."""

from avar_verl.tools.demo.lazy_task import looks
from reward_fns import avar


def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs) -> dict[str, float]:
    """`reward_fns.avar.compute_score`, and `looks`, which is logged and not paid."""
    score = avar.compute_score(data_source, solution_str, ground_truth, extra_info, **kwargs)
    return {**score, "looks": float(looks(solution_str))}
