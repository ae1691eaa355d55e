# SPDX-License-Identifier: Apache-2.0
"""Values with units: units of measure, counted things, number words. All texts are cleaned (`rewards.cleaning`)."""

import itertools
import re
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction
from typing import NamedTuple

# --- Units of measure ---

# Canonical name: symbols and English and Chinese names. These take prefixes ...
_BASES = {
    "m": "m meter metre 米",
    "g": "g gram gramme 克",
    "s": "s second 秒",
    "L": "L l liter litre 升",
    "N": "N newton 牛顿 牛",
    "J": "J joule 焦耳 焦",
    "W": "W watt 瓦特 瓦",
    "V": "V volt 伏特 伏",
    "A": "A amp ampere 安培 安",
    "ohm": "\u03a9 \u2126 \\Omega ohm 欧姆 欧",
    "Hz": "Hz hertz 赫兹 赫",
    "Pa": "Pa pascal 帕斯卡 帕",
    "F": "F farad 法拉",
    "C": "C coulomb 库仑",
    "T": "T tesla 特斯拉",
    "K": "K kelvin 开尔文",
    "eV": "eV electronvolt 电子伏特",
    "cal": "cal calorie 卡路里 卡",
    "mol": "mol mole 摩尔",
    "B": "B byte 字节",
    "bit": "bit 比特",
    "Wh": "Wh",
}
_PREFIXES = {
    "k": "k K kilo 千",
    "M": "M mega 兆",
    "G": "G giga 吉",
    "d": "d deci 分",
    "c": "c C centi 厘",
    "m": "m milli 毫",
    "\u03bc": "\u03bc u \\mu micro 微",
    "n": "n nano 纳",
}
# ... and these do not.
_OTHERS = {
    "kg": "公斤 Kg KG",
    "km": "公里 Km KM",
    "in": "in inch inches 英寸",
    "ft": "ft foot feet 英尺",
    "yd": "yd yard yards 码",
    "mi": "mi mile miles 英里",
    "min": "min mins minute minutes 分钟",
    "h": "h hr hrs hour hours 小时 个小时 时",
    "s": "sec secs",
    "day": "day days 天 日",
    "week": "week weeks 周 星期 个星期",
    "month": "month months 月 个月",
    "year": "yr yrs year years year-old 年 岁",
    "lb": "lb lbs pound pounds GBP 磅 英镑",
    "oz": "oz ounce ounces 盎司",
    "gal": "gal gallon gallons 加仑",
    "t": "t ton tons tonne tonnes 吨",
    "mL": "cc",
    "ha": "ha hectare hectares 公顷",
    "acre": "acre acres 英亩",
    "mu": "亩",
    "degree": "deg degree degrees 度 ^\\circ ^{\\circ} ^\\degree \\degree",
    "degree C": "celsius 摄氏度",
    "degree F": "fahrenheit 华氏度",
    "rad": "rad radian radians 弧度",
    "mi/h": "mph",
    "km/h": "kph kmph",
    "dollar": "dollar dollars USD 美元 美金",
    "cent": "cent cents 美分",
    "euro": "euro euros EUR 欧元",
    "yuan": "yuan RMB CNY 元 块 块钱 人民币",
    "yen": "yen JPY 日元",
    "rupee": "rupee rupees INR Rs",
    "unit": "unit units 单位 个单位",
    "%": "% \\% percent percentage pct 个百分点",
}


_LOOSE = {"degree": ("degree C", "degree F"), "C": ("degree C",), "F": ("degree F",)}
"""Units that stand for more precise ones."""


def _kind(name: str) -> str:
    """Of a name of a unit or prefix: a Chinese or English word, or a symbol."""
    if re.search("[\u3400-\u9fff]", name):
        return "chinese"
    return "word" if len(name) > 3 and name.isalpha() else "symbol"


def _unit_names() -> dict[str, str]:
    names = {"per cent": "%", "years old": "year", "year old": "year"}
    for unit, words in _BASES.items():
        for name in words.split():
            written = [(prefix, sign) for prefix, signs in _PREFIXES.items() for sign in signs.split()]
            for prefix, sign in [("", ""), *written]:
                if not sign or _kind(sign) == _kind(name):
                    names[sign + name] = prefix + unit
                    if _kind(name) == "word" or name in ("amp", "ohm", "cal", "bit"):
                        names[sign + name + "s"] = prefix + unit
    names |= {name: unit for unit, words in _OTHERS.items() for name in words.split()}
    for degree, (unit, scales) in itertools.product(
        _OTHERS["degree"].split(), (("degree C", "C celsius Celsius"), ("degree F", "F fahrenheit Fahrenheit"))
    ):
        names |= {degree + space + scale: unit for scale in scales.split() for space in (" ", "")}
    return names


_UNITS = _unit_names()
_FOLDED_UNITS = {name.casefold(): unit for name, unit in reversed(_UNITS.items()) if len(name) > 1}
_NAME = "|".join(map(re.escape, sorted(_UNITS, key=len, reverse=True)))
_FACTOR = (
    rf"(?:(square|sq|cubic|cu|平方|立方)\.? ?)?({_NAME})(?![A-Za-z])"
    r"(?: (squared|cubed)(?![a-z])| ?\^ ?\{? ?([+-]?\d) ?\}?|([23]))?"
)
_PER = r" ?(?:/ ?\(?|\bper\b|每|\\cdot|\*) ?| "
_UNIT = re.compile(
    rf"(?: |(?<=[\d)}}\]十百千万亿])|(?=\^)|(?=\\)){_FACTOR}(?:(?:{_PER}){_FACTOR})*\)?$",
    re.IGNORECASE,
)
_FACTORS = re.compile(rf"({_PER})?{_FACTOR}", re.IGNORECASE)
_CURRENCY = {
    "USD": "dollar",
    "US$": "dollar",
    "\u20ac": "euro",
    "\u00a3": "lb",
    "\u00a5": "yuan",
    "RMB": "yuan",
    "\u20b9": "rupee",
    "Rs.": "rupee",
    "Rs": "rupee",
}
_MONEY = re.compile(rf"([-+]?)({'|'.join(map(re.escape, _CURRENCY))}) ?(?=[\d.])")


def _unit_of(written: str) -> str | None:
    """Canonical name of a unit with its factors, such as "m s-2"; None if a factor is none."""
    powers: Counter[str] = Counter()
    sign = 1
    for per, shape, name, word, power, bare_power in _FACTORS.findall(written.strip()):
        if "/" in per or "per" in per.lower() or "每" in per:
            sign = -1
        unit = _UNITS.get(name) or _FOLDED_UNITS.get(name.casefold())
        if unit is None:
            return None
        exponent = {"sq": 2, "cu": 3, "平方": 2, "立方": 3}.get(
            shape[:2].lower() or word[:2].lower(), int(power or bare_power or 1)
        )
        numerator, _, denominator = unit.partition("/")
        powers[numerator] += sign * exponent
        if denominator:
            powers[denominator] -= sign * exponent
    return " ".join(f"{unit}{power if power != 1 else ''}" for unit, power in sorted(powers.items()) if power)


def _split_unit(text: str, attached: bool) -> tuple[str, str]:
    if money := _MONEY.match(text):
        return money[1] + text[money.end() :], _CURRENCY[money[2]]
    match = _UNIT.search(text)
    if match is None or not text[: match.start()].strip():
        return text, ""
    # The m of `2m` may be a variable.
    if re.fullmatch("[a-z]", match.group()) and not attached:
        return text, ""
    unit = _unit_of(match.group())
    return (text, "") if unit is None else (text[: match.start()], unit)


# --- Numbers in words ---

_SMALL = {word: number for number, word in enumerate(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen".split()
)}  # fmt: skip
_SMALL |= {word: 10 * number for number, word in enumerate(
    "twenty thirty forty fifty sixty seventy eighty ninety".split(), 2
)}  # fmt: skip
_SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
_PARTS = {"half": 2, "halves": 2, "quarter": 4, "quarters": 4} | {
    word + plural: number
    for number, word in enumerate("third fourth fifth sixth seventh eighth ninth tenth".split(), 3)
    for plural in ("", "s")
}
_ORDINALS = {word: number for number, word in enumerate(
    "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth".split(), 1
)}  # fmt: skip
_WORD = "|".join(sorted({*_SMALL, *_SCALES, *_PARTS, "a", "an"}, key=len, reverse=True))
_WORDS = re.compile(rf"(?:(negative|minus) )?((?:{_WORD})(?:[ -](?:and )?(?:{_WORD}))*)(?![\w-])", re.IGNORECASE)
_DIGIT = {digit: number for number, digit in enumerate("零一二三四五六七八九")} | {"两": 2, "\u3007": 0}
_TENS = {"十": 10, "百": 100, "千": 1000}
_MYRIADS = {"万": 10**4, "亿": 10**8}
_CHINESE = f"(?:[{''.join(_DIGIT)}十百万亿]|千(?![克米瓦卡赫焦帕伏安牛字]))+"
_CHINESE_NUMBER = re.compile(f"(负?)({_CHINESE})(?:点([{''.join(_DIGIT)}]+))?")
_CHINESE_PARTS = re.compile(f"({_CHINESE}|\\d+)分之({_CHINESE}|[\\d.]+)")
# As a count. "None of the above" is an option.
_NONE = re.compile(
    r"(?:none|nil)(?=$| [(\[]| (?:is|are|in|on|at)\b| of (?:them|these|those|the (?!above|below|other|option|choice)))"
    "|(?:没有|无|一个[也都]没有)$",
    re.IGNORECASE,
)
_NUMBER = r"[-+]?(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)(?:/\d+)?"
_SCALED = re.compile(
    rf"({_NUMBER}) ?({'|'.join(_SCALES)}|[百万亿]+|千(?![克米瓦卡赫焦帕伏安牛字]))(?![a-z])",
    re.IGNORECASE,
)


def _whole(words: list[str]) -> int | None:
    """Value of English number words, None if they are no number."""
    total, current, last = 0, 0, None
    for word in words:
        if word in _SMALL:
            if last in _SMALL and not (_SMALL[last] >= 20 and 0 < _SMALL[word] < 10):
                return None
            current += _SMALL[word]
        elif word in ("a", "an"):
            if last is not None:
                return None
            current = 1
        elif word in ("hundred", "dozen"):
            current = (current or 1) * _SCALES[word]
        else:
            total, current = total + (current or 1) * _SCALES[word], 0
        last = word
    return None if words in (["a"], ["an"]) else total + current


def _english(words: list[str]) -> Fraction | None:
    if words[-1] not in _PARTS:
        words = [word for word in words if word != "and"]
        value = _whole(words) if not _PARTS.keys() & set(words) else None
        return None if value is None else Fraction(value)
    # "two and a half": a whole number, and a number of parts.
    *number, part = words
    where = len(number) - number[::-1].index("and") - 1 if "and" in number else 0
    whole, parts = number[:where], [word for word in number[where:] if word != "and"]
    if _PARTS.keys() & {*whole, *parts} or "and" in whole or not (parts or _PARTS[part] in (2, 4)):
        return None
    count = 1 if parts in ([], ["a"], ["an"]) else _whole(parts)
    ones = _whole(whole)
    return None if count is None or ones is None else ones + Fraction(count, _PARTS[part])


def _chinese(text: str) -> int:
    if not set(text) - _DIGIT.keys():
        return int("".join(str(_DIGIT[digit]) for digit in text))
    total = section = digit = 0
    for character in text:
        if character in _DIGIT:
            digit = _DIGIT[character]
        elif character in _TENS:
            section, digit = section + (digit or 1) * _TENS[character], 0
        else:
            total, section, digit = (total + section + digit or 1) * _MYRIADS[character], 0, 0
    return total + section + digit


def _digits(text: str) -> str:
    """Write a number in words at the start of a text in digits."""
    if match := _CHINESE_PARTS.match(text):
        below, above = (
            part if part[0].isdigit() and part.isascii() else str(_chinese(part)) for part in match.groups()
        )
        return (f"{above}%" if below == "100" else f"{above}/{below}") + text[match.end() :]
    if text in ("半", "一半"):
        return "1/2"
    if match := _NONE.match(text):
        return "0" + text[match.end() :]
    if match := _CHINESE_NUMBER.match(text):
        decimals = "".join(str(_DIGIT[digit]) for digit in match[3] or "")
        number = str(_chinese(match[2])) + ("." + decimals if decimals else "")
        text = ("-" if match[1] else "") + number + text[match.end() :]
    elif match := _WORDS.match(text):
        value = _english(re.split("[ -]", match[2].lower()))
        if value is not None:
            text = ("-" if match[1] else "") + str(value) + text[match.end() :]
    else:
        text = re.sub("^(?:(?:negative|minus) |负)(?=[\\d.])", "-", text)
    if (match := _SCALED.match(text)) and "/" not in match[1]:
        word = match[2].lower()
        scale = _SCALES.get(word) or _chinese("一" + word)
        number = format(Decimal(match[1].replace(",", "")) * scale, "f")
        text = (number.rstrip("0").rstrip(".") if "." in number else number) + text[match.end() :]
    return text


_REPEATED = re.compile(rf"({_NUMBER}) ?[(\[]([^()\[\]]+)[)\]]")


def _without_repetition(text: str) -> str:
    """Drop a number that is written again in brackets: "5 (five)" -> "5"."""
    match = _REPEATED.match(text)
    if match is None:
        return text
    number, again = (written.replace(",", "") for written in (match[1], _digits(match[2].strip())))
    if not re.fullmatch(_NUMBER, again) or Fraction(number) != Fraction(again):
        return text
    return match[1] + text[match.end() :]


_SUFFIXES = {"k": 10**3, "m": 10**6, "mn": 10**6, "b": 10**9, "bn": 10**9, "t": 10**12, "tn": 10**12}
_SUFFIXES |= {"mil": 10**6, "mln": 10**6, "mio": 10**6, "bln": 10**9, "mrd": 10**9}
_SUFFIXED = re.compile(
    rf"([-+]?)((?:{'|'.join(map(re.escape, _CURRENCY))}) ?)?(\d+(?:,\d{{3}})*(?:\.\d+)?|\.\d+)"
    r"([kKMBTm]| [kM]| ?(?i:[bmt]n|mil|mln|mio|bln|mrd))(?=$| )"
)


def with_suffix(text: str) -> str | None:
    """A number with a letter for its thousands, millions, billions or trillions written out; None if there is none.

    It is a second reading: 5K may be kelvin, 3k a product and 2B bytes. A small m is a million in sums of money only.

    Example:
        >>> with_suffix("1.5M people"), with_suffix("USD 2bn"), with_suffix("5m")
        ('1500000 people', 'USD 2000000000', None)
    """
    match = _SUFFIXED.match(text)
    if match is None or match[4] == "m" and not match[2]:
        return None
    number = Decimal(match[3].replace(",", "")) * _SUFFIXES[match[4].strip().lower()]
    return f"{match[1]}{match[2] or ''}{number.normalize():f}{text[match.end() :]}"


_ORDINAL = re.compile(rf"({'|'.join(_ORDINALS)})|(\d+)(?:st|nd|rd|th)|第(\d+|{_CHINESE})[个名]?", re.IGNORECASE)

# --- Counted things ---

_MEASURES = (
    "个只条张本辆人名位棵朵块件支枝片头匹座栋间层种类组对双排行列次道题根"
    "把杯瓶碗盘盒箱袋颗粒串幅页封台架艘节家所倍口款项处份"
)
_NOT_COUNTED = {*_SMALL, *_SCALES, *_PARTS} | set(
    "or and to than minus plus more less fewer most least not no per over squared cubed except but past after".split()
)
_THINGS = re.compile(
    rf"({_NUMBER}) ?\(?(?:(?<=[ (])([A-Za-z][A-Za-z' -]+)|([{_MEASURES}][\u4e00-\u9fff]{{0,7}}|[点分角]))\)?"
)
_PLACE = re.compile(r" (?:in|on|at|of|from|with|inside|there|here|total|altogether|are|is)\b.*| shown.*| visible.*")
_NO_THING = re.compile("[多余几或和到至不万亿千百半上下]")


def _things(text: str) -> tuple[str, str] | None:
    """Split "10 red cats in the image" into ("10", "red cat"), "10只猫" into ("10", "猫")."""
    match = _THINGS.fullmatch(text)
    if match is None:
        return None
    if match[3]:
        return None if _NO_THING.search(match[3]) else (match[1], match[3][1:])
    words = _PLACE.sub("", " " + match[2].lower()).split()
    if len(words) > 4 or _NOT_COUNTED & set(words) or (words and len(words[-1]) < 3):
        return None
    return match[1], " ".join(word.rstrip("s") for word in words)


class Quantity(NamedTuple):
    """A value as written, numbers in digits; its unit, or the things that it counts."""

    value: str
    unit: str = ""
    things: str = ""


def read_quantity(text: str, attached: bool = True) -> Quantity:
    """Split a cleaned answer into its value and its unit.

    Args:
        attached: whether one small letter at a number is a unit: 2m is two metres, and not twice a variable.

    Example:
        >>> read_quantity("24 square centimeters"), read_quantity("ten red cats")
        (Quantity(value='24', unit='cm2', things=''), Quantity(value='10', unit='', things='red cat'))
    """
    if match := _ORDINAL.fullmatch(text):
        word, digits, chinese = match.groups()
        number = _ORDINALS[word.lower()] if word else digits or (chinese if chinese.isdecimal() else _chinese(chinese))
        return Quantity(str(number), "ordinal")
    text = _without_repetition(_digits(text))
    text = re.sub(rf"^({_NUMBER}) ?\(([^()]*[^()\d\s][^()]+|[%\u3400-\u9fff])\)$", r"\1 \2", text)
    value, unit = _split_unit(text, attached)
    if unit:
        return Quantity(_digits(value), unit)
    things = _things(text)
    return Quantity(text) if things is None else Quantity(things[0], things=things[1])


def units_agree(one: Quantity, other: Quantity) -> bool:
    """Whether two values may be compared: units are never converted, and a unit on one side only does not count."""
    if (one.unit or one.things) and (other.unit or other.things):
        if one.unit != other.unit and one.unit not in _LOOSE.get(other.unit, ()):
            return other.unit in _LOOSE.get(one.unit, ())
        return one.things.endswith(other.things) or other.things.endswith(one.things)
    return True


# --- Texts of options ---

RANGE = re.compile(rf"({_NUMBER}) ?(?:-|\bto\b|[至到]) ?({_NUMBER})")
_END = re.compile(r"(?<=[\d)}])( ?)([^\d\s()\[\]{}.,;:+\-*/=!?][^\d\s()\[\]{},;:=!?]*)$")


def share_unit(texts: Sequence[str]) -> tuple[list[str], str]:
    """Split texts that all end with the same word after a number, whatever it is, into values and the word; "" if not.

    Example:
        >>> share_unit(["10m", "15m"]), share_unit(["10m", "20cm"])
        ((['10', '15'], 'm'), (['10m', '20cm'], ''))
    """
    ends = [end for text in texts if (end := _END.search(text))]
    if len(texts) > 1 and len(ends) == len(texts) and len({end[2] for end in ends}) == 1:
        return [text[: end.start()] for text, end in zip(texts, ends, strict=True)], ends[0][2]
    return list(texts), ""
