# SPDX-License-Identifier: Apache-2.0
"""Format reward: one `<think>` block, then one `<answer>` block. Pure function, no verl import."""

from __future__ import annotations

_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def format_score(text: str, think_in_prompt: bool = False) -> float:
    """Score the layout of a response.

    `format = 1` if the response is `<think>A</think><answer>B</answer>` with nothing but white space before, between
    and after the two blocks, each of the four tags exactly once, and neither A nor B blank; else `format = 0`. A and B
    may span lines. The tags are case-sensitive. String searches only, so the time is linear in the length for every
    input.

    Args:
        text (`str`):
            Decoded response, without the prompt.
        think_in_prompt (`bool`, *optional*, defaults to `False`):
            Set it if the chat template ends the prompt with `<think>`: the response then starts inside the think block,
            and a `<think>` of its own is a repeated tag, which scores 0.

    Returns:
        `float`: `1.0` or `0.0`.

    Raises:
        TypeError: If `text` is not a string.

    Source: r_format of AVAR, arXiv 2603.03825 (visual-anchored reward).

    Example:
        >>> format_score("<think>two and two</think>\\n<answer>4</answer>\\n")
        1.0
        >>> format_score("<think>two and two</think> It is <answer>4</answer>")
        0.0
        >>> format_score("two and two</think><answer>4</answer>", think_in_prompt=True)
        1.0
    """
    if not isinstance(text, str):
        raise TypeError(f"text must be a str; got {type(text).__name__}. Pass the decoded response.")
    if think_in_prompt:
        text = "<think>" + text
    if any(text.count(tag) != 1 for tag in _TAGS):
        return 0.0
    before, _, rest = text.partition("<think>")
    thought, _, rest = rest.partition("</think>")
    between, _, rest = rest.partition("<answer>")
    answer, closed, after = rest.partition("</answer>")
    # A tag out of order ends up in the wrong part: it leaves `closed` empty, or text where only white space may be.
    well_formed = closed and not (before.strip() or between.strip() or after.strip())
    return float(bool(well_formed and thought.strip() and answer.strip()))
