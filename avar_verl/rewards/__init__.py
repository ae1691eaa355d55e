# SPDX-License-Identifier: Apache-2.0
"""Rule-based rewards as pure functions; `reward_fns/` adapts them to verl's signature."""

from avar_verl.rewards.accuracy import (
    accepted_answers,
    answer_options,
    extract_answer,
    grade_answer,
    sample_name,
)
from avar_verl.rewards.format import format_score

__all__ = ["accepted_answers", "answer_options", "extract_answer", "format_score", "grade_answer", "sample_name"]
