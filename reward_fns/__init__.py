# SPDX-License-Identifier: Apache-2.0
"""Reward functions for verl's `reward.custom_reward_function`: one `compute_score` in each file."""
