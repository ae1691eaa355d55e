# SPDX-License-Identifier: Apache-2.0
"""Accuracy reward: find the answer in a response and compare it with the ground truth. Pure functions, no verl import.

The grading rules:

1. **Cleaning**, of both sides: Unicode NFKC (full-width forms) with superscripts, vulgar fractions and mathematical
   signs turned into LaTeX; math delimiters, `\\boxed{}`, `\\text{}` and its relatives, LaTeX spacing, surplus white
   space, a leading "the answer is" and trailing full stops are dropped.
2. **Text match**: equal without regard to case and to one leading article (a, an, the).
3. **Choice match**: "B", "b.", "(B)", "B)", "option B" are the same letter (A to J). A letter with its text, such as
   "B. 12 cm", equals the bare letter; two letters with texts must agree in both. "B 12 cm", without a delimiter, is no
   choice.
4. **Math match** by math-verify, of the *whole* answer, never of a number found somewhere in a sentence:
   - the last side of an equation or approximation counts for it (`x = 5` for `5`), unless the answer is a list;
   - units are never converted: a unit on one side only is ignored, two different units are unequal;
   - a percentage on one side only equals both the number (50% = 50) and the fraction (50% = 0.5);
   - a comma, or a space, before exactly three digits is a thousands separator (1,234 = 1234); every other comma
     separates elements, so "1, 234" is a list, and there is no decimal comma;
   - `2 1/2` is a mixed number, `1e-3` scientific notation, `12:30` a clock time (text only);
   - a decimal equals an exact value if they agree to 6 decimal places: 0.333333 = 1/3, 0.33 != 1/3;
   - sets and bare lists have no order, `(1, 2)` has one.
5. **Text only**, never math: an answer of letters only, or with a word of three letters or more (a product commutes, so
   `left` would equal `felt`); with a LaTeX command or a character outside a closed list; longer than `MAX_MATH_CHARS`;
   with a factorial, a tower of powers, or powers beyond `MAX_POWER_DIGITS`. A comparison that needs more than
   `MAX_MATH_CALLS` function calls counts as unequal.

An answer is right if rule 2, 3 or 4 matches.
"""

from __future__ import annotations

import functools
import inspect
import logging
import math
import numbers
import re
import sys
import threading
import unicodedata
from collections.abc import Callable
from typing import Any

import numpy as np

logger = logging.getLogger(__name__)

MAX_MATH_CHARS = 200
"""Longest cleaned answer, in characters, that math-verify gets."""

MAX_POWER_DIGITS = 300
"""Most digits of a power. Huge integers take long in few calls, so the limit on calls would not stop them in time."""

MAX_MATH_CALLS = 10_000_000
"""Most function calls and returns in one comparison, 3 to 6 s of work. Ordinary answers take less than a tenth of it,
the first ones in a process, which load parts of sympy, up to half."""


# --- Finding the answer ---

# An escaped character (such as \{) is consumed as a pair, so that it never counts as a brace.
_BOXED_TOKEN = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)


def _last_boxed(text: str) -> str | None:
    """Content of the `\\boxed{}` that starts last among those with balanced braces. One pass, so linear time."""
    open_braces = []  # where the content starts for \boxed{, None for any other brace
    last = None
    for token in _BOXED_TOKEN.finditer(text):
        if token.group() == "{":
            open_braces.append(None)
        elif token.group().startswith("\\boxed"):
            open_braces.append(token.end())
        elif token.group() == "}" and open_braces:
            start = open_braces.pop()
            if start is not None and (last is None or start > last[0]):
                last = (start, token.start())
    return None if last is None else text[last[0] : last[1]].strip()


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
        return _last_boxed(visible) or None
    last_close = visible.rfind("</answer>")
    start = visible.rfind("<answer>", 0, max(last_close, 0))
    if start < 0:
        return None
    start += len("<answer>")
    answer = visible[start : visible.find("</answer>", start)].strip()
    boxed = _last_boxed(answer)
    return (answer if boxed is None else boxed) or None


# --- Cleaning (rule 1) ---

# Without this, NFKC turns 5 with a superscript 2 into 52, and 3 with a vulgar half into 31/2.
_SUPERSCRIPTS = re.compile("[\u00b2\u00b3\u00b9\u2070\u2071\u2074-\u207f]+")
_VULGAR_FRACTION = re.compile("[\u00bc-\u00be\u2150-\u215e\u2189]")
_SIGNS = {
    "\u00b0": "^\\circ ",
    "\u00b1": "\\pm ",
    "\u00b7": "\\cdot ",
    "\u00d7": "\\times ",
    "\u00f7": "/",
    "\u03b1": "\\alpha ",
    "\u03b2": "\\beta ",
    "\u03b8": "\\theta ",
    "\u03c0": "\\pi ",
    "\u2044": "/",
    "\u2205": "\\emptyset ",
    "\u2208": "\\in ",
    "\u2212": "-",
    "\u221e": "\\infty ",
    "\u2229": "\\cap ",
    "\u222a": "\\cup ",
    "\u2248": "\\approx ",
    "\u2260": "\\ne ",
    "\u2264": "\\le ",
    "\u2265": "\\ge ",
    "\u22c5": "\\cdot ",
    "\u3001": ",",  # ideographic comma and full stop; NFKC maps the other full-width punctuation
    "\u3002": ".",
}
_SIGN_TABLE = str.maketrans(_SIGNS)
_ORDINAL_TO_DEGREE = {0xBA: 0xB0}  # often typed for a degree; NFKC would make it the letter o
_ROOT = re.compile("\u221a\\s*(?:\\(([^()]*)\\)|(\\d+|[a-zA-Z]))")
_TEXT_COMMAND = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox|operatorname)\s*\{([^{}]*)\}")
_DELIMITER = re.compile(r"\\?\$|(?<!\\)\\[()\[\]]|\\(?:left|right)(?![a-zA-Z])|\\!|^\*\*|\*\*$")
_SPACE = re.compile(r"(?<!\\)\\[,;:> ]|~|\\q?quad(?![a-zA-Z])")
_LEAD_IN = re.compile(r"(?:the )?(?:(?:final|correct) )?answer(?: is\b| ?:)[ :]*(?=\S)", re.IGNORECASE)


def _clean(text: str) -> str:
    boxed = _last_boxed(text)
    text = (text if boxed is None else boxed).translate(_ORDINAL_TO_DEGREE)
    text = _SUPERSCRIPTS.sub(lambda match: f"^{{{unicodedata.normalize('NFKC', match.group())}}}", text)
    text = _VULGAR_FRACTION.sub(lambda match: " " + unicodedata.normalize("NFKC", match.group()), text)
    text = unicodedata.normalize("NFKC", text)
    text = _ROOT.sub(lambda match: f"\\sqrt{{{match.group(1) or match.group(2)}}}", text).translate(_SIGN_TABLE)
    text = _TEXT_COMMAND.sub(r" \1 ", text)
    text = _DELIMITER.sub("", text.strip()).replace("{,}", ",")
    text = " ".join(_SPACE.sub(" ", text).split())
    if lead_in := _LEAD_IN.match(text):
        text = text[lead_in.end() :]
    return text.rstrip(". ")


# --- Text and choice match (rules 2 and 3) ---

_CHOICE = re.compile(r"(?:(?:option|choice) )?(?:\(([a-j])\)|([a-j])(?:[.):]|$))(?:$| (.*))")
_ARTICLE = re.compile(r"(?:a|an|the) (?=\S)")


def _without_article(text: str) -> str:
    article = _ARTICLE.match(text)
    return text[article.end() :] if article else text


def _text_equal(prediction: str, gold: str) -> bool:
    prediction, gold = prediction.casefold(), gold.casefold()
    choice_p, choice_g = _CHOICE.fullmatch(prediction), _CHOICE.fullmatch(gold)
    if choice_p and choice_g:
        text_p, text_g = choice_p.group(3), choice_g.group(3)
        same_letter = (choice_p.group(1) or choice_p.group(2)) == (choice_g.group(1) or choice_g.group(2))
        return same_letter and (not text_p or not text_g or text_p == text_g)
    return _without_article(prediction) == _without_article(gold)


# --- Math match (rules 4 and 5) ---

_UNIT_NAMES = {
    "mm": "mm millimeter millimeters millimetre millimetres",
    "cm": "cm centimeter centimeters centimetre centimetres",
    "m": "m meter meters metre metres",
    "km": "km kilometer kilometers kilometre kilometres",
    "in": "in inch inches",
    "ft": "ft foot feet",
    "yd": "yd yard yards",
    "mi": "mi mile miles",
    "s": "s sec secs second seconds",
    "min": "min mins minute minutes",
    "h": "h hr hrs hour hours",
    "day": "day days",
    "year": "yr yrs year years",
    "mg": "mg milligram milligrams",
    "g": "g gram grams",
    "kg": "kg kilogram kilograms",
    "lb": "lb lbs pound pounds",
    "ml": "ml mL milliliter milliliters millilitre millilitres",
    "l": "l L liter liters litre litres",
    "N": "N newton newtons",
    "J": "J joule joules",
    "W": "W watt watts",
    "V": "V volt volts",
    "A": "A amp amps ampere amperes",
    "ohm": "ohm ohms",
    "Hz": "Hz hertz",
    "mph": "mph",
    "unit": "unit units",
    "degree": "deg degree degrees",
    "dollar": "dollar dollars",
    "cent": "cent cents",
}
_UNITS = {name: unit for unit, names in _UNIT_NAMES.items() for name in names.split()}
_UNIT_WORD = "|".join(sorted(_UNITS, key=len, reverse=True))
_POWER = r"(?: ?\^ ?\{?([23])\}?)?"
_UNIT = re.compile(
    rf"(?: |(?<=[\d)}}\]]))(?:(square|sq|cubic|cu)\.? )?({_UNIT_WORD}){_POWER}(?: ?/ ?({_UNIT_WORD}){_POWER})?$"
)
_DEGREES = re.compile(r" ?\^ ?\{? ?\\(?:circ|degree) ?\}? ?([CF]?)$")
_PERCENT = re.compile(r" ?(?:\\?%|\bper ?cent|\bpercentage)$")
_EQUALS = re.compile(r"(?<![\\<>!])=|\\approx(?![a-zA-Z])")
_LIST = re.compile(r"[,;]|\b(?:or|and)\b")


def _split_unit(text: str) -> tuple[str, str]:
    """Split a cleaned answer into its value and canonical unit, `""` if it has none."""
    if match := _PERCENT.search(text):
        return text[: match.start()], "%"
    if match := _DEGREES.search(text):
        return text[: match.start()], "degree" + match.group(1)
    match = _UNIT.search(text)
    # The m of `2m` may be a variable: a unit of one letter must stand apart.
    if match and (len(match.group(2)) > 1 or match.group().startswith(" ")):
        shape, word, power, per, per_power = match.groups()
        if shape:
            power = "2" if shape.startswith("sq") else "3"
        unit = _UNITS[word] + (power or "") + (f"/{_UNITS[per]}{per_power or ''}" if per else "")
        return text[: match.start()], unit
    return text, ""


_THOUSANDS = re.compile(r"(?:^|(?<=[\s=+\-]))[1-9]\d{0,2}(?:(?:,\d{3})+|(?: \d{3})+)(?![\d,]| \d)")
_MIXED = re.compile(r"(?<![\d.,])(\d+) (\d+) ?/ ?(\d+)(?![\d.,])")
_SCIENTIFIC = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)[eE]([+-]?\d+)(?![\w.])")
_BARE_FUNCTION = re.compile(r"(?<![\\a-zA-Z])(sqrt|pi|sin|cos|tan|log|ln)(?![a-zA-Z])")
_ROUND_ROOT = re.compile(r"\\sqrt ?\(([^()]*)\)")
_ROUND_EXPONENT = re.compile(r"\^ ?\(([^()]*)\)")
_ENVIRONMENT = re.compile(r"\\(?:begin|end)\{[bpv]?matrix\}")
_COMMAND = re.compile(r"\\([a-zA-Z]+)")
# Commands that only build a value. Others (sums, products, integrals, binomials) can hide any amount of work.
_COMMANDS = frozenset(
    "frac dfrac tfrac cfrac sqrt pi infty cdot times div pm mp le leq leqslant ge geq geqslant lt gt ne neq approx in "
    "cup cap emptyset varnothing setminus sin cos tan cot sec csc arcsin arccos arctan log lg ln circ degree mathbb "
    "alpha beta gamma delta epsilon theta lambda mu rho sigma tau phi varphi omega Delta Omega".split()
)
_WORD = re.compile(r"(?!and\b)[a-zA-Z]{3,}")
# Adjacent numbers would be multiplied; "!" and ")_" (permutations) become factorials; "%" a modulo; 12:30 a quotient.
_NOT_A_VALUE = re.compile(r"\d \d|[!%]|\)_|(?<!\d)\d{1,2}:\d{2}(?!\d)")
# One exponent: a number, a letter, a command, or a group (two levels deep) without a further power.
_EXPONENT = re.compile(r"\^ ?(?:\{(?:[^{}^]|\{[^{}^]*\})*\}|[+-]?[\d.]+|\\[a-zA-Z]+|[a-zA-Z*'])(?! ?\^)")


def _power_digits(latex: str) -> int:
    """Bound on the digits of a power: (sum of the atoms' exponents) * (product of the groups') * (longest number)."""
    atoms, groups = 0, 1
    for exponent in _EXPONENT.finditer(latex):
        size = math.prod(max(1, int(number)) for number in re.findall(r"\d+", exponent.group()))
        if latex[: exponent.start()].rstrip().endswith((")", "}", "]", "|")):  # may hold further powers, which multiply
            groups *= size
        else:
            atoms += size
    return max(1, atoms) * groups * max(map(len, re.findall(r"\d+", latex)), default=1)


def _to_latex(text: str) -> str | None:
    """Turn a cleaned value into the LaTeX that math-verify gets; `None` if rule 5 makes it text only."""
    text = _THOUSANDS.sub(lambda match: match.group().replace(",", "").replace(" ", ""), text.replace("**", "^"))
    text = _MIXED.sub(r"\1\\frac{\2}{\3}", text)
    text = _SCIENTIFIC.sub(r"\1\\times 10^{\2}", text)
    text = _ROUND_ROOT.sub(r"\\sqrt{\1}", _BARE_FUNCTION.sub(r"\\\1", text))
    text = _ROUND_EXPONENT.sub(r"^{\1}", text)
    bare = _ENVIRONMENT.sub("", text)
    is_text = (
        not text.isascii()
        or re.fullmatch(r"[a-zA-Z ]*", text)
        or _WORD.search(_COMMAND.sub(" ", bare))
        or _NOT_A_VALUE.search(bare)
        or not _COMMANDS.issuperset(_COMMAND.findall(bare))
        or len(_EXPONENT.findall(bare)) != bare.count("^")
        or _power_digits(bare) > MAX_POWER_DIGITS
    )
    return None if is_text else text


@functools.cache
def _load_math_verify() -> tuple[Callable, Callable, type[BaseException]]:
    """Import math-verify on first use; return `(parse, verify, TimeoutException)` with the settings bound."""
    try:
        from latex2sympy2_extended import NormalizationConfig
        from math_verify import LatexExtractionConfig, parse, verify
        from math_verify.errors import TimeoutException
    except ImportError as error:
        raise ImportError(
            f"grade_answer needs the package math-verify; got {error}. Run `pip install math-verify==0.9.0`."
        ) from error
    # math-verify warns once per process if its timeouts are off. `_limit_calls` is the limit it asks for.
    for name in ("math_verify.parser", "math_verify.grader"):
        logging.getLogger(name).addFilter(lambda record: not record.getMessage().startswith("Timeout is disabled"))
    # units=False: math-verify's own list has single letters and words such as "c", "t", "ab" and "monkey", so 3c is 3.
    # Only LaTeX, in one pair of $: the plain-text search takes the last number it finds, so "1, 2, 3, 4" is 4.
    config = LatexExtractionConfig(
        boxed_match_priority=-1,
        normalization_config=NormalizationConfig(units=False, malformed_operators=True, nits=True, boxed="none"),
    )
    # None turns the timeouts off: they use SIGALRM and so need the main thread, but verl scores in a thread pool.
    options: dict[str, Any] = {"fallback_mode": "no_fallback", "parsing_timeout": None}
    parse = functools.partial(parse, extraction_config=[config], **options)
    verify = functools.partial(verify, allow_set_relation_comp=True, timeout_seconds=None)
    return parse, verify, TimeoutException


def _limit_calls(function: Callable[[], bool], limit: int, exception: type[BaseException]) -> bool:
    """Return `function()`, but raise `exception` inside it after `limit` function calls and returns.

    It uses a profile hook, which works in any thread and counts work instead of seconds, so the reward does not depend
    on the load of the machine.
    """
    left = limit

    def count(frame, event, arg):
        nonlocal left
        left -= 1
        # Not in a generator: an exception raised while one is being closed is dropped, together with the hook.
        if left < 0 and event in ("call", "c_call") and not frame.f_code.co_flags & inspect.CO_GENERATOR:
            raise exception

    previous = sys.getprofile()
    sys.setprofile(count)
    try:
        return function()
    finally:
        sys.setprofile(previous)


# sympy's caches and mpmath's working precision are global to the process, and because of the GIL there is nothing to
# gain from parallel calls.
_MATH_LOCK = threading.Lock()


def _verify(prediction: str, gold: str) -> bool:
    """Compare two LaTeX strings with math-verify.

    math-verify turns every exception of its LaTeX parser (plain `Exception` on bad input) and of sympy into "nothing
    parsed" or "unequal" and logs it at debug level, so there is none to catch here. Only its `TimeoutException`, a
    `BaseException`, can get out; the limit on calls raises it.
    """
    parse, verify, timeout_exception = _load_math_verify()

    def compare() -> bool:
        parsed_gold = parse(f"${gold}$")
        parsed_prediction = parse(f"${prediction}$")
        if not parsed_gold or not parsed_prediction:
            logger.debug("math-verify cannot parse %r", prediction if parsed_gold else gold)
            return False
        return verify(parsed_gold, parsed_prediction)

    with _MATH_LOCK:
        try:
            return _limit_calls(compare, MAX_MATH_CALLS, timeout_exception)
        except timeout_exception:
            logger.debug("%r and %r need more than %d calls: unequal", prediction, gold, MAX_MATH_CALLS)
            return False


def _math_equal(prediction: str, gold: str) -> bool:
    if max(len(prediction), len(gold)) > MAX_MATH_CHARS:
        logger.debug("an answer of more than %d characters is compared as text only", MAX_MATH_CHARS)
        return False
    if not _EQUALS.search(gold) and not _LIST.search(_THOUSANDS.sub("", prediction)):
        prediction = _EQUALS.split(prediction)[-1].strip()
    value_p, unit_p = _split_unit(prediction)
    value_g, unit_g = _split_unit(gold)
    if unit_p and unit_g and unit_p != unit_g:
        logger.debug("%r and %r have different units", prediction, gold)
        return False
    pairs = [(value_p, value_g)]
    if unit_p == "%" and not unit_g:
        pairs.append((f"\\frac{{{value_p}}}{{100}}", value_g))
    elif unit_g == "%" and not unit_p:
        pairs.append((value_p, f"\\frac{{{value_g}}}{{100}}"))
    elif unit_p or unit_g:
        pairs.append((prediction, gold))  # `2 m` can also be a number times a variable
    for pair in pairs:
        latex_p, latex_g = map(_to_latex, pair)
        if latex_p is None or latex_g is None:
            logger.debug("%r and %r are compared as text only", *pair)
        elif _verify(latex_p, latex_g):
            return True
    return False


# --- Public graders ---


def sample_name(data_source: Any, extra_info: dict | None) -> str:
    """Name a sample, for error messages, by its data source and `extra_info["index"]`.

    Example:
        >>> sample_name("geo3k", {"index": 3})
        "data_source 'geo3k', index 3"
    """
    return f"data_source {data_source!r}, index {(extra_info or {}).get('index')!r}"


def accepted_answers(ground_truth: Any, sample: str = "this sample") -> list[str]:
    """Validate a ground truth and return it as a list of accepted answers.

    Args:
        ground_truth (`str`, number, or `list`, `tuple` or `numpy.ndarray` of these):
            One answer, or several each of which is right.
        sample (`str`, *optional*, defaults to `"this sample"`):
            Name of the sample in error messages, see `sample_name`.

    Returns:
        `list[str]`: At least one answer, numbers as Python writes them.

    Raises:
        ValueError: If `ground_truth` is `None`, empty, or a number that is not finite.
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
        accepted.append(answer)
    return accepted


def grade_answer(prediction: str, ground_truth: Any) -> bool:
    """Decide whether a predicted answer is right.

    `grade = any(text match or choice match or math match, over the accepted answers)`, by the rules at the top of this
    module. It works in any thread and does not depend on the clock.

    Args:
        prediction (`str`):
            Answer as `extract_answer` returns it.
        ground_truth (`str`, number, or `list` of these):
            Accepted answer or answers, see `accepted_answers`.

    Returns:
        `bool`: `True` if the prediction equals one of the accepted answers.

    Raises:
        TypeError: If `prediction` is not a string, or `ground_truth` is of a type that `accepted_answers` refuses.
        ValueError: If `ground_truth` is `None`, empty or not finite.
        ImportError: If math-verify is not installed.

    Source: r_accuracy of AVAR, arXiv 2603.03825 (visual-anchored reward). Math comparison by math-verify; its timeouts:
    https://github.com/huggingface/Math-Verify/blob/5d148cfaaf99214c2e4ffb4bc497ab042c592a7a/src/math_verify/utils.py

    Example:
        >>> grade_answer("0.5", r"\\frac{1}{2}"), grade_answer("(B)", "B"), grade_answer("1, 2, 3, 4", "4")
        (True, True, False)
        >>> grade_answer("30 cm", "30"), grade_answer("30 cm", "30 m")
        (True, False)
    """
    if not isinstance(prediction, str):
        raise TypeError(
            f"prediction must be a str; got {type(prediction).__name__}. Grade what extract_answer has found."
        )
    accepted = [_clean(answer) for answer in accepted_answers(ground_truth)]
    _load_math_verify()  # a missing package is reported by the first call, whatever it grades
    cleaned = _clean(prediction)
    if not cleaned:
        return False
    return any(_text_equal(cleaned, gold) or _math_equal(cleaned, gold) for gold in accepted)
