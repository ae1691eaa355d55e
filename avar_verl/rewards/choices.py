# SPDX-License-Identifier: Apache-2.0
"""Answers that name something given: letters of options, and yes or no. All texts are cleaned (`rewards.cleaning`)."""

import re
import string
from typing import NamedTuple

LETTERS = string.ascii_uppercase

_CJK = "\u3400-\u9fff"
# A letter in brackets or quotes of any kind becomes "(A)". Not the argument of a function, nor an exponent.
_BRACKETED = re.compile("(?<![A-Za-z0-9^_}])[(\\[{<\"'`*【「『《〈]+ ?([A-Za-z]) ?[)\\]}>\"'`*】」』》〉]+")
_OPTION = re.compile(
    "(?:(?:both|options?|choices?|letters?|answers?) (?=\\W?[A-Za-z]\\b)|(?:选项|答案) ?(?=\\W?[A-Za-z](?![A-Za-z])))",
    re.IGNORECASE,
)
# What may follow letters without changing what they say.
_VERDICT = re.compile(
    " ?(?:(?:is|are)(?: both| all)?(?: the)?(?: correct| right| true)(?: answers?| options?| choices?)?|both"
    "|(?:这?个?选?项)?(?:[都均全]?(?:是|为)?(?:正确|对|成立)的?)?)$",
    re.IGNORECASE,
)
_ITEM = r"(?:\([A-Ja-j]\)|[A-Ja-j][.):]?)"
_UPPER_ITEM = r"(?:\([A-Ja-j1-9]\)|[A-J])"
_AND = " ?(?:(?:[,;]|\\band\\b|[和与及跟]|以及) ?)+"
_SET = re.compile(f"{_ITEM}(?:{_AND}{_ITEM})*", re.IGNORECASE)
_GLUED_SET = re.compile(f"[(\\[{{]?{_UPPER_ITEM}(?:(?:{_AND}| ?[/&+|]? ?){_UPPER_ITEM})+[)\\]}}]?")
_WITH_TEXT = re.compile(
    r"(?:\(([A-Ja-j])\)(?: ?[.:,]| -(?= )|(?!-))"  # "(A) cat", "(A)cat", "(A): cat"; "(a)-b" is a difference
    r"|([A-Ja-j])(?: ?[.):,](?![A-Za-z]?$)| -(?= ))"  # "A. cat", "A) cat", "A - cat"; not "a.m"
    f"|([A-J])(?=-?[{_CJK}]| [{_CJK}]| ?\\((?:[{_CJK}]|[a-z]{{3}}))-?) ?(.+)"  # "A猫", "A-猫", "A 猫"
)
_BECAUSE = re.compile(r"([A-J]),? (?:because|since|as) ")
# A text that goes on like this takes back what the letter says, or names a further one.
_NOT_ITS_TEXT = re.compile(
    "(?:or|and|nor|not)\\b|is (?:not|in|wrong|false)|[=^+*/<>]|[或和与不非错]|除外|以外|是错|是不"
    "|.*(?:^|[ ,;(])[A-J](?:[.):]|$)"
)


class Choice(NamedTuple):
    """Letters that an answer names, and the text of the option if it repeats it."""

    letters: frozenset[str]
    text: str = ""


def read_choice(text: str) -> Choice | None:
    """Read "B", "(b)", "[B]", "option B", "B. 12 cm", "B猫", or a set such as "AC", "A, C", "A and C", "(A)(C)".

    "B 12 cm", without a delimiter, is no choice, and neither is "A or B".

    Example:
        >>> sorted(read_choice("A and C").letters), read_choice("B: 12 cm").text, read_choice("A cat")
        (['A', 'C'], '12 cm', None)
    """
    # In LaTeX, only the first brackets can be those of an option.
    text = _BRACKETED.sub(r"(\1)", text) if "\\" not in text else _BRACKETED.sub(r"(\1)", text[:5]) + text[5:]
    if option := _OPTION.match(text):
        text = text[option.end() :]
    bare = _VERDICT.split(text, maxsplit=1)[0].rstrip(" ,") or text
    if _SET.fullmatch(bare) or _GLUED_SET.fullmatch(bare):
        names = re.findall(r"(?<![a-z])[a-j1-9](?![a-z])", re.sub("[A-J]", lambda name: f" {name[0].lower()} ", bare))
        if len(set(names)) == len(names):
            return Choice(frozenset(name.upper() for name in names))
    if match := _BECAUSE.match(text):
        return Choice(frozenset(match[1]))
    match = _WITH_TEXT.fullmatch(text)
    if match is None or _NOT_ITS_TEXT.match(match[4]):
        return None
    return Choice(frozenset((match[1] or match[2] or match[3]).upper()), match[4])


def is_sequence(text: str) -> bool:
    """Whether glued letters are an order or a name, since nobody would write a set so: "CAB"."""
    return len(text) > 2 and re.fullmatch("[A-J]+", text) is not None and text != "".join(sorted(text))


# --- Yes and no ---

_VERDICTS = {
    True: "yes yeah yep true correct 是的 是 对的 对 正确 有 存在",
    False: "no nope false incorrect 不是的 不是 不对 不正确 没有 不存在 否 不 错误 错 无",
}
_VERDICT_OF = {word: verdict for verdict, words in _VERDICTS.items() for word in words.split()}
_LEADING = re.compile(
    r"(?!no\. ?\d)"  # a number
    f"({'|'.join(sorted(_VERDICT_OF, key=len, reverse=True))})(?:$"
    r"|\s*[,.;:!-]+\s*(?!(?:yes|no|or|and|but)\b)"  # "Yes, no"
    r"|(?<=[a-z]) (?=(?:there|it|this|that|these|those|they|he|she|the|we|i|you|based|because|since|as|is|are)\b)"
    "|(?<=没有)|(?<=不是)|(?<=不存在))(.*)",
    re.DOTALL,
)
_OPPOSITE = {True: re.compile(r"\b(?:no|false)\s*(?:[.,;!]|$)"), False: re.compile(r"\b(?:yes|true)\b")}


def read_verdict(text: str) -> tuple[bool, str] | None:
    """Read a yes or no (true, false; in Chinese too) that leads an answer, and what follows it.

    Example:
        >>> read_verdict("Yes, there is a dog"), read_verdict("no dog or cat"), read_verdict("yes and no")
        ((True, 'there is a dog'), None, None)
    """
    match = _LEADING.match(text.casefold())
    if match is None or _OPPOSITE[_VERDICT_OF[match[1]]].search(match[2]):
        return None
    return _VERDICT_OF[match[1]], match[2]


_ABSENT = re.compile(
    r"no ((?!(?:idea|doubt|way|answer|information|info|one|body|clue|need|matter|longer|problem|opinion|comment|change|"
    r"more|less|fewer|other|yes|no)\b)[a-z]+(?: (?!(?:or|and|but|yes|no|not|than)\b)[a-z]+){0,5})"
)


def read_absence(text: str) -> tuple[bool, str] | None:
    """Read "no" with the things that are not there.

    Example:
        >>> read_absence("No dogs in the image"), read_absence("no idea"), read_absence("no dog or cat")
        ((False, 'dogs in the image'), None, None)
    """
    match = _ABSENT.fullmatch(text.casefold())
    return match and (False, match[1])
