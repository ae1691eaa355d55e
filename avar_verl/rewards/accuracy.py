# SPDX-License-Identifier: Apache-2.0
"""The grader of rewards, `avar eval` and `avar data check`: find the answer in a response, compare it with the ground
truth. Pure functions, no verl import.

The grading rules:

1. **Cleaning**, of both sides (`rewards.cleaning`): Unicode NFKC, LaTeX and Markdown dressing, quotes, lead-ins ("the
   answer is", "故选") and closing punctuation are dropped.
2. **Text match**: equal without regard to case and to one leading article (a, an, the).
3. **Choice match** (`rewards.choices`): "B", "b.", "(B)", "[B]", "option B", "B选项" are the same letter (A to J). A
   letter with its text, such as "B. 12 cm" or "B.猫", equals the bare letter; two letters with texts must agree in
   both. "B 12 cm", without a delimiter, is no choice. "AC", "A, C", "C and A", "(A)(C)" are the same set.
   With the texts of the options, the text of the right option counts too, unless it fits another option as well; a unit
   that all options share may be left out; a letter with the text of another option is wrong.
4. **Yes and no**: a yes or no (true, false; in Chinese too) that leads the answer counts for it: "Yes, there is a dog."
   Not "not yes", "yes or no". "No dogs" is an answer no, but not a ground truth no.
5. **Quantities** (`rewards.quantities`): numbers in words, English and Chinese, are numbers ("ten", "1.5万", "none");
   "5 (five)" is 5, and "1M" may be a million. Units,
   also attached, spelled or Chinese, are never converted: a unit on one side only is ignored, two different units are
   unequal. So are counted things: "10 objects", "10个" and "10" are equal, "10 dogs" and "10 cats" are not. Two
   ranges are equal if both ends are.
   A percentage on one side only equals both the number (50% = 50) and the fraction (50% = 0.5).
6. **Math match** by math-verify (`rewards.expressions`), of the *whole* answer, never of a number found in a sentence:
   - the last side of an equation or approximation counts for it (`x = 5` for `5`), unless the answer is a list;
   - a comma, or a space, before exactly three digits is a thousands separator (1,234 = 1234); every other comma
     separates elements, so "1, 234" is a list, and there is no decimal comma;
   - `2 1/2` is a mixed number, `1e-3` scientific notation, `12:30` a clock time (text only);
   - numbers are equal up to a millionth of their size: 0.333333 = 1/3, 0.33 != 1/3, 1.6e-19 != 9.1e-31. With
     `decimals="ground_truth"`, an answer is rounded to the decimals of the ground truth: 3.1416 = 3.14;
   - sets and bare lists have no order, `(1, 2)` has one.
7. **Text only**, never math: an answer of letters only, or with a word of three letters or more (a product commutes, so
   `left` would equal `felt`); with a LaTeX command or a character outside a closed list; longer than `MAX_MATH_CHARS`;
   with a factorial, a tower of powers, or powers beyond `MAX_POWER_DIGITS`. A comparison that needs more than
   `MAX_MATH_CALLS` function calls counts as unequal.

An answer is right if one of the rules 2 to 6 matches.
"""

from __future__ import annotations

import itertools
import logging
import math
import numbers
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any, Literal, get_args

import numpy as np

from avar_verl.rewards.choices import LETTERS, is_sequence, read_absence, read_choice, read_verdict
from avar_verl.rewards.cleaning import clean, last_boxed
from avar_verl.rewards.expressions import MAX_MATH_CHARS, equal_values, join_thousands, load_math_verify
from avar_verl.rewards.quantities import RANGE, read_quantity, share_unit, units_agree, with_suffix

logger = logging.getLogger(__name__)

Decimals = Literal["exact", "ground_truth"]
OPTIONS = "options"
"""Key of `extra_info` with the texts of the options, in the order of their letters."""

MAX_OPTIONS = 10


# --- Finding the answer ---


def extract_answer(text: str) -> str | None:
    """Find the final answer of a response.

    The rules, in order:

    1. Only the text after the last `</think>` counts, up to a `<think>` that may follow; without any `</think>`, the
       text before the first `<think>`. So an answer inside the reasoning never counts, and a response that was cut off
       while reasoning has none.
    2. If that text has an answer tag, the answer is the content of the last complete `<answer>...</answer>`, over any
       number of lines, stripped. If it holds a `\\boxed{...}` with balanced braces, the last one's content is the
       answer.
    3. If it has no answer tag, the answer is the content of the last `\\boxed{...}` with balanced braces.
    4. Everything else has no answer: neither tag nor box, an unclosed tag, an empty answer.

    The tags must be in the decoded text. verl decodes with `skip_special_tokens=True`, which drops tags that were added
    to the tokenizer as *special* tokens: add them as ordinary tokens, or do not change the vocabulary.

    Args:
        text (`str`):
            Decoded response, without the prompt.

    Returns:
        `str` or `None`: The answer, stripped and never empty; `None` without one.

    Raises:
        TypeError: If `text` is not a string.

    Source: response layout of AVAR, arXiv 2603.03825 (cold-start data and accuracy reward). Decoding:
    https://github.com/verl-project/verl/blob/v0.9.1/verl/experimental/reward_loop/reward_manager/naive.py

    Example:
        >>> extract_answer("<think>2 + 2</think><answer>\\n4\\n</answer>")
        '4'
        >>> extract_answer("<think>half of it</think>So \\\\boxed{x_{1}}.")
        'x_{1}'
        >>> extract_answer("<think><answer>4</answer>") is None
        True
    """
    if not isinstance(text, str):
        raise TypeError(f"text must be a str; got {type(text).__name__}. Pass the decoded response.")
    visible = text.rpartition("</think>")[2].partition("<think>")[0]
    if "<answer>" not in visible and "</answer>" not in visible:
        return last_boxed(visible) or None
    last_close = visible.rfind("</answer>")
    start = visible.rfind("<answer>", 0, max(last_close, 0))
    if start < 0:
        return None
    start += len("<answer>")
    answer = visible[start : visible.find("</answer>", start)].strip()
    boxed = last_boxed(answer)
    return (answer if boxed is None else boxed) or None


# --- Comparing two cleaned answers ---

_ARTICLE = re.compile(r"(?:a|an|the) (?=\S)")
_EQUALS = re.compile(r"(?<![\\<>!])=|\\approx(?![a-zA-Z])")
_LIST = re.compile(r"[,;]|\b(?:or|and)\b")


def _plain(text: str) -> str:
    text = text.casefold()
    article = _ARTICLE.match(text)
    return text[article.end() :] if article else text


def _quantities_equal(prediction: str, gold: str, rounding: bool) -> bool:
    if max(len(prediction), len(gold)) > MAX_MATH_CHARS:
        logger.debug("an answer of more than %d characters is compared as text only", MAX_MATH_CHARS)
        return False
    if not _EQUALS.search(gold) and not _LIST.search(join_thousands(prediction)):
        prediction = _EQUALS.split(prediction)[-1].strip()
    readings = [[text, longer] if (longer := with_suffix(text)) else [text] for text in (prediction, gold)]
    return any(_readings_equal(left, right, rounding) for left, right in itertools.product(readings[0], readings[1]))


def _readings_equal(prediction: str, gold: str, rounding: bool) -> bool:
    of_prediction, of_gold = read_quantity(prediction), read_quantity(gold, attached=False)
    if not units_agree(of_prediction, of_gold):
        logger.debug("%r and %r have different units", prediction, gold)
        return False
    range_p, range_g = RANGE.fullmatch(of_prediction.value), RANGE.fullmatch(of_gold.value)
    if range_p and range_g:
        return all(map(equal_values, range_p.groups(), range_g.groups()))
    if range_p or range_g:
        return False
    pairs = [(of_prediction.value, of_gold.value)]
    if of_prediction.unit == "%" and not of_gold.unit:
        pairs.append((_per_cent(of_prediction.value, -2), of_gold.value))
    elif of_gold.unit == "%" and not of_prediction.unit:
        pairs.append((_per_cent(of_prediction.value, 2), of_gold.value))
    elif of_prediction.unit or of_gold.unit:
        pairs.append((prediction, gold))  # `2 m` can also be a number times a variable
    return any(equal_values(*pair, rounding) for pair in pairs)


def _per_cent(value: str, exponent: int) -> str:
    """A value times 10^exponent."""
    if re.fullmatch(r"[-+]?(?:\d+\.?\d*|\.\d+)", value):
        return format(Decimal(value).scaleb(exponent), "f")
    return f"({value})\\times 10^{{{exponent}}}"


def _equal(prediction: str, gold: str, rounding: bool) -> bool:
    if _plain(prediction) == _plain(gold):
        return True
    choice = None if is_sequence(gold) else read_choice(gold)
    if choice is not None:
        named = read_choice(prediction)
        if named is not None:
            same_text = not named.text or not choice.text or _equal(named.text, choice.text, rounding)
            return named.letters == choice.letters and same_text
        if choice.text:
            return _equal(prediction, choice.text, rounding)
    of_gold = read_verdict(gold)
    of_prediction = read_verdict(prediction) or (of_gold and read_absence(prediction))
    if of_prediction and of_gold:
        (verdict_p, rest_p), (verdict_g, rest_g) = of_prediction, of_gold
        return verdict_p == verdict_g and not (rest_p and rest_g)
    return _quantities_equal(prediction, gold, rounding)


# --- Options ---


def answer_options(extra_info: Mapping | None, sample: str = "this sample") -> tuple[str, ...]:
    """Texts of the options of a question, () for an open one.

    Args:
        extra_info (`Mapping`):
            Its key `options` has the texts, in the order of the letters A, B, ..., with or without these before them;
            or maps letters to texts.

    Raises:
        ValueError: no list of at most ten texts.

    Example:
        >>> answer_options({"options": ["dog", "cat"]}), answer_options({"options": {"A": "dog", "B": "cat"}})
        (('dog', 'cat'), ('dog', 'cat'))
    """
    options = (extra_info or {}).get(OPTIONS)
    if isinstance(options, np.ndarray):
        options = options.tolist()
    if isinstance(options, Mapping):  # Parquet gives every row the keys of all, with None for those that it lacks.
        texts = [text for text in options.values() if text is not None]
        if [key for key, text in options.items() if text is not None] == list(LETTERS[: len(texts)]):
            options = texts
    if options is None:
        return ()
    valid = isinstance(options, Sequence) and not isinstance(options, str) and len(options) <= MAX_OPTIONS
    if not valid or not all(isinstance(text, (str, numbers.Real)) for text in options):
        raise ValueError(
            f"extra_info[{OPTIONS!r}] must be a list of at most {MAX_OPTIONS} texts, or map letters from A on to them; "
            f"got {options!r} for {sample}. Correct the column or leave it out."
        )
    return tuple(map(str, options))


class _Options:
    """Reads answers as sets of options, by their positions."""

    def __init__(self, options: Sequence[str], rounding: bool):
        self.rounding = rounding
        self.texts = []
        for letter, option in zip(LETTERS, options, strict=False):
            choice = read_choice(clean(option))
            own = choice.text if choice is not None and choice.letters == {letter} else ""
            self.texts.append(own or clean(option))
        self.values, self.unit = share_unit(self.texts)

    def _letters(self, letters: frozenset[str]) -> frozenset[int] | None:
        found = frozenset(map(LETTERS.find, letters))
        return found if found <= set(range(len(self.texts))) else None

    def _matches(self, text: str, position: int) -> bool:
        option = self.texts[position]
        if not option:
            return False
        if _equal(text, option, self.rounding):
            return True
        if not self.unit:
            return False
        value = text.removesuffix(self.unit).rstrip()
        spaced = f"{value} {self.unit}" if value != text else text
        if _equal(spaced, f"{self.values[position]} {self.unit}", self.rounding):
            return True
        quantity = read_quantity(value)
        return not (quantity.unit or quantity.things) and _equal(value, self.values[position], self.rounding)

    def by_text(self, text: str) -> frozenset[int]:
        """Options whose text an answer is."""
        same = [position for position, option in enumerate(self.texts) if option and _plain(option) == _plain(text)]
        if len(same) == 1 and not re.search(r"\d", text):
            return frozenset(same)  # of "0" and "None", "None" is the second
        return frozenset(position for position in range(len(self.texts)) if self._matches(text, position))

    def read(self, answer: str) -> frozenset[int]:
        """Options that an answer names; several also where it fits each of them."""
        choice = read_choice(answer)
        letters, own = (self._letters(choice.letters), choice.text) if choice else (None, "")
        if letters and own and any(_plain(text) == _plain(answer) for text in self.texts):
            letters = None  # "B型" may be the text of option A
        if letters and (not own or self._matches(own, min(letters))):
            return letters
        spaced = re.fullmatch("([A-J]) (.+)", answer)
        if spaced and spaced[1] in LETTERS[: len(self.texts)]:
            position = LETTERS.index(spaced[1])
            if self._matches(spaced[2], position):
                return frozenset({position})
        named = self.by_text(answer)
        if named or not letters:
            return named
        return letters if not self.by_text(own) else frozenset()

    def read_truth(self, truth: str) -> frozenset[int] | None:
        """Options that a ground truth names; None if it does not name them clearly."""
        choice = read_choice(truth)
        if choice is not None and (letters := self._letters(choice.letters)):
            return letters
        same = [position for position, text in enumerate(self.texts) if text and _plain(text) == _plain(truth)]
        named = same if len(same) == 1 else self.by_text(truth)
        return frozenset(named) if len(named) == 1 else None

    def right(self, answer: str, truth: frozenset[int]) -> bool:
        if self.read(answer) == truth:
            return True
        parts = re.split(r" ?[,;] ?| and |和", answer)
        read = [self.read(part) for part in parts if part]
        return len(truth) > 1 and all(len(part) == 1 for part in read) and frozenset().union(*read) == truth


# --- Public graders ---


def sample_name(data_source: Any, extra_info: dict | None) -> str:
    """Name a sample, for error messages, by its data source and `extra_info["index"]`.

    Example:
        >>> sample_name("geo3k", {"index": 3})
        "data_source 'geo3k', index 3"
    """
    return f"data_source {data_source!r}, index {(extra_info or {}).get('index')!r}"


# What stands in a solution, and not in an answer; searched for in a cleaned answer.
_SOLUTION = re.compile(
    r"####|</?(?:think|answer)>|\banswer(?: is\b| ?:)|\b(?:explanation|solution|reasoning|step \d+) ?:"
    "|答案(?:[:为]|是(?!否))|解析:",
    re.IGNORECASE,
)
_JSON = re.compile(r"\s*[\[{]\s*[\"']")


def accepted_answers(ground_truth: Any, sample: str = "this sample", options: Sequence[str] = ()) -> list[str]:
    """Validate a ground truth and return it as a list of accepted answers.

    Args:
        ground_truth (`str`, number, or `list`, `tuple` or `numpy.ndarray` of these):
            One answer, or several each of which is right.
        sample (`str`, *optional*, defaults to `"this sample"`):
            Name of the sample in error messages, see `sample_name`.
        options (`Sequence[str]`, *optional*, defaults to `()`):
            Texts of the options, one or more of which every answer must name.

    Returns:
        `list[str]`: At least one answer, numbers as Python writes them.

    Raises:
        ValueError: If `ground_truth` is `None`, empty, a number that is not finite, or one that no answer can meet: a
            solution instead of its answer, JSON text, nothing once it is cleaned, or none of the options.
        TypeError: If it, or an element of it, has another type, `bool` included (write "yes" or "no").

    Source: `reward_model.ground_truth` of verl's data format, a dataset column of any type:
    https://github.com/verl-project/verl/blob/v0.9.1/verl/experimental/reward_loop/reward_manager/naive.py

    Example:
        >>> accepted_answers(["12", 12.5])
        ['12', '12.5']
    """
    if ground_truth is None:
        raise ValueError(
            f"ground_truth must not be None; got None for {sample}. Set reward_model.ground_truth or drop the sample."
        )
    if isinstance(ground_truth, np.ndarray):
        ground_truth = ground_truth.ravel().tolist()
    answers = ground_truth if isinstance(ground_truth, (list, tuple)) else [ground_truth]
    if not answers:
        raise ValueError(
            f"ground_truth must hold at least one answer; got {ground_truth!r} for {sample}. Drop the sample."
        )
    accepted = []
    for answer in answers:
        if isinstance(answer, bool) or not isinstance(answer, (str, numbers.Real)):
            raise TypeError(
                f"ground_truth must be a str, a number or a list of these; got {type(answer).__name__} for {sample}. "
                "Convert it when the dataset is made."
            )
        if isinstance(answer, numbers.Real):
            if not math.isfinite(answer):
                raise ValueError(f"a ground_truth number must be finite; got {answer!r} for {sample}. Drop the sample.")
            answer = str(int(answer)) if isinstance(answer, numbers.Integral) else repr(float(answer))
        if not answer.strip():
            raise ValueError(f"ground_truth must not be empty; got {answer!r} for {sample}. Drop the sample.")
        cleaned = clean(answer)
        if not cleaned or _SOLUTION.search(cleaned) or _JSON.match(answer):
            raise ValueError(
                f"ground_truth must be the final answer alone, as text; got {answer[:100]!r} for {sample}. Take the "
                "answer out of its solution, marks or JSON."
            )
        accepted.append(answer)
    if options:
        known = _Options(options, rounding=False)
        for answer in accepted:
            if known.read_truth(clean(answer)) is None:
                raise ValueError(
                    f"ground_truth must be the letter of one of {len(options)} options; got {answer!r} for {sample}. "
                    "Write its letter, letters of several, or the text of one, or leave the row out."
                )
    return accepted


def grade_answer(prediction: str, ground_truth: Any, options: Sequence[str] = (), decimals: Decimals = "exact") -> bool:
    """Decide whether a predicted answer is right.

    `grade = any(one of the rules at the top of this module matches, over the accepted answers)`. It works in any thread
    and does not depend on the clock.

    Args:
        prediction (`str`):
            Answer as `extract_answer` returns it.
        ground_truth (`str`, number, or `list` of these):
            Accepted answer or answers, see `accepted_answers`.
        options (`Sequence[str]`, *optional*, defaults to `()`):
            Texts of the options of a multiple-choice question, see `answer_options`. The ground truth is then the
            letter or the text of one of them, or letters of several.
        decimals (`str`, *optional*, defaults to `"exact"`):
            `"ground_truth"` rounds the prediction to as many decimals as the ground truth has; 0 for an integer.

    Returns:
        `bool`: `True` if the prediction equals one of the accepted answers.

    Raises:
        TypeError: If `prediction` is not a string, or `ground_truth` is of a type that `accepted_answers` refuses.
        ValueError: If `ground_truth` is one that `accepted_answers` refuses, or `decimals` is unknown.
        ImportError: If math-verify is not installed.

    Source: r_accuracy of AVAR, arXiv 2603.03825 (visual-anchored reward). Math comparison by math-verify; its timeouts:
    https://github.com/huggingface/Math-Verify/blob/5d148cfaaf99214c2e4ffb4bc497ab042c592a7a/src/math_verify/utils.py

    Example:
        >>> grade_answer("0.5", r"\\frac{1}{2}"), grade_answer("(B)", "B"), grade_answer("1, 2, 3, 4", "4")
        (True, True, False)
        >>> grade_answer("30 cm", "30"), grade_answer("30 cm", "30 m")
        (True, False)
        >>> grade_answer("cat", "B", ["dog", "cat"]), grade_answer("3.1416", "3.14", decimals="ground_truth")
        (True, True)
    """
    if not isinstance(prediction, str):
        raise TypeError(
            f"prediction must be a str; got {type(prediction).__name__}. Grade what extract_answer has found."
        )
    if decimals not in get_args(Decimals):
        raise ValueError(
            f"decimals must be one of {list(get_args(Decimals))}; got {decimals!r}. ground_truth rounds the answer."
        )
    accepted = [clean(answer) for answer in accepted_answers(ground_truth, options=options)]
    load_math_verify()  # a missing package is reported by the first call, whatever it grades
    answer, rounding = clean(prediction), decimals == "ground_truth"
    if not answer:
        return False
    if options:
        known = _Options(options, rounding)
        truths = [known.read_truth(truth) for truth in accepted]
        return any(truth is not None and known.right(answer, truth) for truth in truths)
    return any(_equal(answer, gold, rounding) for gold in accepted)
