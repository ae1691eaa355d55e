# SPDX-License-Identifier: Apache-2.0
"""Reward functions for verl's `reward.custom_reward_function`: one `compute_score` in each file.

Each takes what verl passes: `data_source` (used in error messages only), `solution_str` (the decoded response, without
the prompt), `ground_truth` (`str`, number, or a `list` of these: the accepted answers), `extra_info` (further columns
of the sample, or `None`), then its own options (`reward_kwargs`), and ignores further keywords such as
`reward_router_address`. Each returns a `dict` of floats with the same keys for every sample: `score`, and the parts,
unweighted, among them `acc` and `pred_found`, whether the response has an answer at all (`compose`: if it has `acc`).

A path to a file works as well as `pkg://`. `reward_kwargs` needs a `+`, since verl's yaml does not declare it.

All raise `ValueError` for an option out of range and for a `ground_truth` that is `None`, empty or not finite (the
message names the sample), `TypeError` if `solution_str` or `ground_truth` is of a wrong type.

Called by https://github.com/verl-project/verl/blob/v0.9.1/verl/experimental/reward_loop/reward_manager/naive.py
"""
