# SPDX-License-Identifier: Apache-2.0
"""Comparison of mathematical values: decimals exactly, everything else by math-verify.

Two values are equal if math-verify finds them so and their numbers agree; numbers agree if they differ by at most

    |p - g| <= 1e-6 * max(|p|, |g|)                 where one of the two is a decimal and the other an exact value (1/3)
    |p - g| <= 1e-6 * min(1, max(|p|, |g|))         between two decimals
"""

from __future__ import annotations

import functools
import inspect
import logging
import math
import re
import sys
import threading
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

logger = logging.getLogger(__name__)

MAX_MATH_CHARS = 200
"""Longest cleaned answer, in characters, that math-verify gets."""

MAX_POWER_DIGITS = 300
"""Most digits of a power. Huge integers take long in few calls, so the limit on calls would not stop them in time."""

MAX_MATH_CALLS = 10_000_000
"""Most function calls and returns in one comparison, 3 to 6 s of work. Ordinary answers take less than a tenth of it,
the first ones in a process, which load parts of sympy, up to half."""


_THOUSANDS = re.compile(r"(?:^|(?<=[\s=+\-]))[1-9]\d{0,2}(?:(?:,\d{3})+|(?: \d{3})+)(?![\d,]| \d)")
_MIXED = re.compile(r"(?<![\d.,])(\d+) (\d+) ?/ ?(\d+)(?![\d.,])")
_SCIENTIFIC = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)[eE]([+-]?\d+)(?![\w.])")
_TIMES_TEN = re.compile(r"(?<=\d) ?[xX*] ?(?=10 ?\^)")
_SIGNED_EXPONENT = re.compile(r"\^ ?([+-]\d+)")
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


def join_thousands(text: str) -> str:
    """Drop thousands separators: a comma, or a space, before exactly three digits."""
    return _THOUSANDS.sub(lambda match: match.group().replace(",", "").replace(" ", ""), text)


def to_latex(text: str) -> str | None:
    """Turn a cleaned value into the LaTeX that math-verify gets; `None` if it is text only."""
    text = join_thousands(text.replace("**", "^"))
    text = _MIXED.sub(r"\1\\frac{\2}{\3}", text)
    text = _SCIENTIFIC.sub(r"\1\\times 10^{\2}", text)
    text = _SIGNED_EXPONENT.sub(r"^{\1}", _TIMES_TEN.sub(r"\\times ", text))
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
def load_math_verify() -> tuple[Callable, Callable, type[BaseException]]:
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


# --- Numbers ---

TOLERANCE = Fraction(1_000_001, 10**12)  # 0.333333 is just within: floats have 15 digits
_DECIMAL = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+))(?: ?\\(?:times|cdot) ?10 ?\^ ?(?:\{ ?([+-]?\d+) ?\}|(\d+)))?")


def _decimal(latex: str) -> Decimal | None:
    """The decimal that is all of a text, with the digits that it is written with."""
    match = _DECIMAL.fullmatch(latex)
    return Decimal(f"{match[1]}e{match[2] or match[3] or 0}") if match else None


def _half_a_unit(decimal: Decimal) -> Fraction:
    """Half a unit of the last digit: 3.14 -> 0.005."""
    return Fraction(10) ** int(decimal.as_tuple().exponent) / 2


def _elements(value: Any) -> tuple:
    """What a parsed value consists of: scalars, () if it is not known."""
    import sympy

    if isinstance(value, (sympy.FiniteSet, sympy.Tuple)):
        return value.args
    if isinstance(value, sympy.Interval):
        return value.start, value.end
    if isinstance(value, sympy.MatrixBase):
        return tuple(value.flat())
    if isinstance(value, sympy.Eq):
        return (value.rhs,) if value.lhs.is_Symbol else ()
    return (value,) if isinstance(value, sympy.Expr) else ()


def _number(scalar: Any) -> Any:
    """A scalar to 30 digits, with a number of its own for every symbol; None if it has none."""
    import sympy

    if not isinstance(scalar, sympy.Expr):
        return None
    symbols = [(symbol, sympy.Rational(10 * i + 3, 7)) for i, symbol in enumerate(sorted(scalar.free_symbols, key=str))]
    try:
        value = sympy.N(scalar.subs(symbols), 30)
    except (TypeError, ValueError, ArithmeticError, AttributeError, NotImplementedError):
        return None  # what sympy raises, function by function, where it cannot evaluate
    return value if value.is_number and value.is_finite else None


def _close(one: Any, other: Any) -> bool:
    return bool(abs(one - other) <= TOLERANCE * max(abs(one), abs(other)))


def _numbers_agree(one: Any, other: Any) -> bool:
    """Whether the numbers of two values agree, which math-verify finds equal: it rounds numbers to 6 decimal places, so
    that all tiny ones are equal to it.
    """
    ones, others = ([_number(scalar) for scalar in _elements(value)] for value in (one, other))
    if len(ones) != len(others) or None in ones + others:
        return True
    if len(ones) > 1 and all(number.is_real for number in ones + others):
        ones, others = sorted(ones), sorted(others)
    return all(map(_close, ones, others))


# sympy's caches and mpmath's working precision are global to the process, and because of the GIL there is nothing to
# gain from parallel calls.
_MATH_LOCK = threading.Lock()


def _verify(prediction: str, gold: str, rounding: Decimal | None) -> bool:
    """Compare two LaTeX strings with math-verify.

    math-verify turns every exception of its LaTeX parser (plain `Exception` on bad input) and of sympy into "nothing
    parsed" or "unequal" and logs it at debug level, so there is none to catch here. Only its `TimeoutException`, a
    `BaseException`, can get out; the limit on calls raises it.
    """
    parse, verify, timeout_exception = load_math_verify()

    from sympy import Expr, Float

    def compare() -> bool:
        parsed_gold = parse(f"${gold}$")
        parsed_prediction = parse(f"${prediction}$")
        if not parsed_gold or not parsed_prediction:
            logger.debug("math-verify cannot parse %r", prediction if parsed_gold else gold)
            return False
        one, other = parsed_prediction[0], parsed_gold[0]
        if all(isinstance(value, Expr) and value.is_number for value in (one, other)):
            numbers = _number(one), _number(other)
            if None in numbers:
                return False
            if rounding is not None and bool(abs(numbers[0] - numbers[1]) <= _half_a_unit(rounding)):
                return True
            if any(value.atoms(Float) for value in (one, other)):
                return _close(*numbers)
        return verify(parsed_gold, parsed_prediction) and _numbers_agree(one, other)

    with _MATH_LOCK:
        try:
            return _limit_calls(compare, MAX_MATH_CALLS, timeout_exception)
        except timeout_exception:
            logger.debug("%r and %r need more than %d calls: unequal", prediction, gold, MAX_MATH_CALLS)
            return False


def equal_values(prediction: str, gold: str, rounding: bool = False) -> bool:
    """Whether two cleaned values without units are equal.

    Args:
        rounding: whether the prediction is rounded to the decimals of the gold answer, if that is a decimal:
            `|p - g| <= half a unit of its last digit`.

    Example:
        >>> equal_values("0.5", r"\\frac{1}{2}"), equal_values("1.6e-19", "9.1e-31")
        (True, False)
        >>> equal_values("3.1416", "3.14", rounding=True)
        True
    """
    latex_p, latex_g = to_latex(prediction), to_latex(gold)
    if latex_p is None or latex_g is None:
        logger.debug("%r and %r are compared as text only", prediction, gold)
        return False
    decimal_p, decimal_g = _decimal(latex_p), _decimal(latex_g)
    if decimal_p is not None and decimal_g is not None:
        p, g = Fraction(decimal_p), Fraction(decimal_g)
        return abs(p - g) <= max(TOLERANCE * min(1, max(abs(p), abs(g))), _half_a_unit(decimal_g) if rounding else 0)
    return _verify(latex_p, latex_g, decimal_g if rounding else None)
