# SPDX-License-Identifier: Apache-2.0
"""Cleaning of answers: one way to write what may be written in many.

Characters become NFKC with LaTeX for superscripts, vulgar fractions and mathematical signs. Dressing is dropped: math
delimiters, boxes, `\\text{}` and its relatives, LaTeX spacing, Markdown, HTML tags, quotes around the whole, surplus
white space, a lead-in such as "the answer is" or "故选", and closing punctuation.
"""

import re
import unicodedata

# An escaped character (such as \{) is consumed as a pair, so that it never counts as a brace.
_BOXED_TOKEN = re.compile(r"\\(?:boxed|fbox|framebox)\s*\{|\\.|[{}]", re.DOTALL)


def last_boxed(text: str) -> str | None:
    """Content of the `\\boxed{}` (or `\\fbox{}`) that starts last among those with balanced braces. Linear time."""
    open_braces = []  # where the content starts for \boxed{, None for any other brace
    last = None
    for token in _BOXED_TOKEN.finditer(text):
        if token.group() == "{":
            open_braces.append(None)
        elif len(token.group()) > 2:
            open_braces.append(token.end())
        elif token.group() == "}" and open_braces:
            start = open_braces.pop()
            if start is not None and (last is None or start > last[0]):
                last = (start, token.start())
    return None if last is None else text[last[0] : last[1]].strip()


# Without this, NFKC turns 5 with a superscript 2 into 52, 3 with a vulgar half into 31/2, and circled digits into a
# number.
_SUPERSCRIPTS = re.compile("[\u00b2\u00b3\u00b9\u2070\u2071\u2074-\u207f]+")
_VULGAR_FRACTION = re.compile("[\u00bc-\u00be\u2150-\u215e\u2189]")
_CIRCLED = re.compile("[\u2460-\u2468]")
_DASH = re.compile("[\u2010-\u2015]")
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
    "\u2018": "'",
    "\u2019": "'",
    "\u201c": '"',
    "\u201d": '"',
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
_ROOT = re.compile("\u221a\\s*(?:\\(([^()]*)\\)|\\{([^{}]*)\\}|(\\d+|[a-zA-Z]))")
_FONTS = (
    "text(?:bf|it|rm|sf|tt|sc|sl|up|md|normal)?|math(?:rm|bf|it|sf|tt|cal|normal)|mbox|operatorname|underline|emph|bm"
    "|boldsymbol"
)
# Fonts that hold from there to the end of a group, as in {\bf B}.
_SWITCHES = (
    "bf|rm|it|sf|tt|sl|sc|em|(?:bf|md)series|(?:rm|sf|tt)family|(?:it|sl|sc|up)shape|(?:display|text|script)style"
    "|tiny|small|normalsize|(?:large|huge)|(?:Large|LARGE|Huge)"
)
_TEXT_COMMAND = re.compile(rf"\\(?:{_FONTS}|{_SWITCHES}|(?:text)?color\{{\w+\}})\s*\{{([^{{}}]*)\}}")
_SWITCH = rf"\\(?:{_SWITCHES})(?![a-zA-Z])"
_SWITCHED = re.compile(rf"\{{\s*(?:{_SWITCH}\s*)+([^{{}}]*)\}}|{_SWITCH}|\\(?:{_FONTS})(?=\s+[A-Za-z0-9]\b)")
_DOLLARS = re.compile(r"([-+]?)(?:US)?\\?\$ ?(?=[\d.])")  # money, where it is the only dollar sign
_DELIMITER = re.compile(r"\\?\$|(?<!\\)\\[()\[\]]|\\(?:left|right)(?![a-zA-Z])|\\!")
_SPACE = re.compile(r"(?<!\\)\\[,;:> ]|~|\\(?:q?quad|enspace|thinspace|space|hfill)(?![a-zA-Z])|\\hspace\*?\{[^{}]*\}")
_MARKUP = re.compile(
    r"</?(?:b|i|u|p|em|strong|span|code)>|<br ?/?>"
    r"|(?<![A-Za-z0-9)}])(?:\*\*|__)(?=\S)|(?<=[^\s(])(?:\*\*|__)(?![A-Za-z0-9({\\])"
)
_WRAPPED = re.compile(r"(?:\"(.*)\"|'(.*)'|`+(.*?)`+|\*(.*)\*|_(.*)_|「(.*)」|『(.*)』|《(.*)》)")
_EXCLAMATION = re.compile(r"(?<=[^\W\d_][^\W\d_])!$")  # after a word; after anything else it is a factorial

_NUMBER_AHEAD = r"(?=[-+]?[\d.零一二两三四五六七八九十半])"
_ARROW = "[-=]+>|\u2192|\u21d2|\\\\(?:Right|right|long)arrow"
# Words before an answer that say nothing about it. A lead-in alone is an answer, so something must follow.
_LEAD_INS = (
    r"(?:so|thus|hence|therefore|finally|in (?:conclusion|summary))\b[, ]+",
    r"(?:(?:the|my|our) )?(?:(?:final|correct|right|best|most likely) )*"
    r"(?:answer|ans|result|choice|option|solution|value)(?: (?:choice|option|letter|here))?"
    rf"(?: (?:is|would be|should be|must be)\b(?! not\b)| ?(?:{_ARROW}|[:=|])|\. | --? |(?=-[A-J]\b))"
    r"[: ]*(?:-+ ?(?=\(?[A-J]\b))?",
    r"(?:i (?:would |will )?)?(?:choose|select|pick)\b[: ]*|i (?:think|believe)\b(?: that\b)?[: ]*",
    r"(?:it|this|that|there|these|they)(?:'s| is|'re| are)\b(?! not\b) *",
    r"(?:about|approximately|approx\.?|roughly|around|\\approx|\\sim) ?(?=[-+]?[\d.\\])",
    "(?:综上(?:所述)?|所以|因此|故|因而|由此可知|即)[,: ]*",
    "(?:[本此该这]题)?的?(?:最终|正确|最后|标准)?的?(?:答案|结果|选项)(?:应该|应|就)?(?:是(?!否)|为|选(?!择))[: ]*",
    f"\\[?【?(?:最终|正确|标准)?的?(?:答案|结果)】?\\]?(?: ?(?:{_ARROW}|[:=|])| --? | )[: ]*",
    "【(?:答案|解答)】[: ]*",
    "我们?(?:认为|觉得)[, ]*",
    "(?:[本此该这]题)?我?们?(?:应该|应当|应|要)?(?:选择|选)(?!项)的?是?[: ]*",
    "答[: ]+",
    r"[*\u2022\u00b7#>]+ (?=\(?[A-J]\b)",
    "(?:正确的|这|它|这里)(?:是(?!否)|为)[: ]*",
    "(?:图(?:中|片中|里))?(?:一共|总共|共)?(?:大约|大概|约)?(?:有|是|为)? *" + _NUMBER_AHEAD,
)
_LEAD_IN = re.compile("(?:" + "|".join(_LEAD_INS) + r")(?=\S)", re.IGNORECASE)


def clean(text: str) -> str:
    """Clean an answer.

    Example:
        >>> clean(r"**The final answer is:** $\\text{12 cm}$."), clean("故选 \uff21\u3002")
        ('12 cm', 'A')
    """
    boxed = last_boxed(text)
    text = (text if boxed is None else boxed).translate(_ORDINAL_TO_DEGREE)
    text = _SUPERSCRIPTS.sub(lambda match: f"^{{{unicodedata.normalize('NFKC', match.group())}}}", text)
    text = _VULGAR_FRACTION.sub(lambda match: " " + unicodedata.normalize("NFKC", match.group()), text)
    text = _CIRCLED.sub(lambda match: f"({unicodedata.normalize('NFKC', match.group())})", text)
    text = unicodedata.normalize("NFKC", _DASH.sub("-", text))
    text = _ROOT.sub(lambda match: f"\\sqrt{{{match[1] or match[2] or match[3]}}}", text).translate(_SIGN_TABLE)
    for _ in range(3):  # one in another
        text = _TEXT_COMMAND.sub(r" \1 ", text)
    text = _SWITCHED.sub(lambda match: f" {match[1] or ''} ", text)
    if text.count("$") == 1 and (dollars := _DOLLARS.match(text.strip())):
        text = f"{dollars[1]}USD {text.strip()[dollars.end() :]}"
    text = _MARKUP.sub(" ", _DELIMITER.sub("", text.strip()).replace("{,}", ","))
    text = re.sub(r"(?<=\d) ?(?:~|--) ?(?=\d)", "-", text)
    text = " ".join(_SPACE.sub(" ", text).split())
    # Dressings stand inside one another, so they are taken off in turn; few, so that the work stays linear.
    for _ in range(6):
        before = text
        if wrapped := _WRAPPED.fullmatch(text):
            text = next(inner for inner in wrapped.groups() if inner is not None).strip()
        text = _EXCLAMATION.sub("", text.rstrip(".,;:? \\"))
        if lead_in := _LEAD_IN.match(text):
            text = text[lead_in.end() :]
        if text == before:
            break
    return text
