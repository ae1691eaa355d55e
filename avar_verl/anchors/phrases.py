# SPDX-License-Identifier: Apache-2.0
"""Phrases that refer to the image, in English and Chinese.

A phrase is found from its word for the image (`image`, `figure`, ...). In English the words before it are walked
backwards: modifiers, a determiner, then what governs the noun. It is a reference if that is a verb of looking ("look
closely at the image") or a preposition of place or source ("in the figure", "at the top of the image", "based on the
chart"), or if the noun is the subject of a verb such as "shows" or "contains". In Chinese the neighbouring characters
decide. Other senses of these words, drawings the model makes itself and images it cannot see are left out.

The context read around each word is bounded, so the time is linear in the length of the text.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterator

# --- English: vocabulary ---

_NOUNS = (
    "image picture photo photograph figure diagram chart graph plot map screenshot illustration snapshot infographic "
    "flowchart subfigure fig frame screen panel"
).split()


def _forms(verbs: str) -> frozenset[str]:
    """Verbs with their -s, -ing and -ed forms, each also with re-."""
    forms = set()
    for verb in verbs.split():
        stem = verb[:-1] if verb.endswith("e") and not verb.endswith("ee") else verb
        third = verb + ("es" if verb.endswith(("s", "sh", "ch", "x")) else "s")
        past = stem + "ed"
        if verb.endswith("y") and verb[-2] not in "aeiou":
            third, past = verb[:-1] + "ies", verb[:-1] + "ied"
        forms.update((verb, third, stem + "ing", past))
    return frozenset(forms | {"re" + form for form in forms} | {"re-" + form for form in forms})


# Verbs that take the image as their object, directly or with a particle.
_LOOK = _forms(
    "look glance gaze peer stare peek examine inspect observe study check review revisit view analyze analyse scan "
    "scrutinize scrutinise survey explore consult watch consider verify confirm read interpret zoom enlarge magnify "
    "refer "
    "turn return focus concentrate use perceive notice see reference peruse search double-check cross-check assess "
    "cross-reference compare evaluate investigate crop"
) | frozenset("saw seen zoomed zooming cropped cropping referred referring went going go goes".split())
_PARTICLES = frozenset(
    "at on in into to through over back again closely carefully closer more once further out up upon only just then "
    "very "
    "around across directly now here still better together thoroughly first with against this it everything".split()
)
_LOOK_NOUNS = frozenset(
    "look looks view views glance examination inspection analysis observation observations review scan reading study "
    "interpretation check exam reexamination re-examination attention".split()
)
_PREPOSITIONS = frozenset("in on from within inside across throughout per via upon into".split())
_SHOWN = frozenset(
    "shown seen visible depicted displayed presented given provided pictured illustrated described indicated marked "
    "labeled labelled observed found present drawn as based suggested circled highlighted judging".split()
)
_SPATIAL = frozenset(
    "corner corners side sides part parts region regions center centre middle top bottom left right edge edges area "
    "areas background foreground half halves portion portions section sections end ends quadrant rest periphery border "
    "margin upper lower zone patch segment panel row column front back quarter third".split()
)
_CONTENT = frozenset(
    "content contents detail details element elements object objects feature features caption subject focus people "
    "item items component components context information".split()
)
_DETERMINERS = frozenset(
    "the this that these those both each every all given provided your our said any either another one".split()
)
_FOREIGN = frozenset("his her their its someone my whose a an no some".split())
"""Before the noun: somebody's figure, or some image other than the one in the prompt."""
_COUNTS = frozenset("two three four five six seven eight several many".split())
_STOP = frozenset(
    "of to at for with by and or but as is are was were be been being that which who if when while than then so "
    "because about like under over between i we you it he she they there not about until without versus vs".split()
)
_DRAW = _forms(
    "draw sketch imagine visualize visualise construct create make generate form produce design paint plot graph"
) | frozenset("drew drawn plotted plotting".split())

_BE = frozenset("is are was were has have had appears appear seems seem consists consist isn't aren't".split())
_PREDICATES = (
    _BE
    | _forms(
        "show depict contain display feature illustrate present include indicate reveal suggest capture portray "
        "represent provide list describe label highlight convey demonstrate exhibit focus mention confirm lack give "
        "imply look "
        "compare cover mark place plot track make link read rank name outline"
    )
    | frozenset("shown gave made said says".split())
)
_AMBIGUOUS_PREDICATES = _forms("place cover mark plot track make link read rank name outline compare")
_OBJECT = re.compile(
    r" (?:the|a|an|this|that|these|those|it|its|each|every|all|both|no|only|how|what|where|which"
    r"|two|three|four|five|six|several|[0-9]+)\b"
)
"""Verbs that are nouns too, and what follows them if they are verbs."""
_PREDICATE_ADVERBS = frozenset(
    "can could may might would will it do does did doesn't don't didn't itself also clearly only just actually above "
    "below here you we i i've you've have provided given attached shown uploaded sent shared simply further not "
    "primarily mainly mostly prominently explicitly definitely likely again then however together both all on the left "
    "right in question".split()
)
"""Words that may occur between the image noun and its verb."""
_COMPOUNDS = frozenset(
    "description descriptions caption captions file files url quality format album frame book resolution size height "
    "data set sets search credit metadata analysis understanding content contents title legend input inputs".split()
)
"""A noun after the image noun: not the image itself, unless it is what is looked at."""
_OTHER_COMPOUNDS = frozenset(
    "processing sensor plane distance formation classification model encoder token tokens recognition generation "
    "function functions operator door time reader protector saver discussion discussions member members "
    "editing library skating skater paper theory twist armor armour out finish stream embedding embeddings".split()
)
_OTHER_BEFORE = {
    "image": "optical mirror self real virtual inverted public brand body inverse upright erect retinal corporate",
    "figure": "stick action public central key historical leading human religious political male female significant "
    "ballpark father mother authority geometric plane solid lone seated standing",
    "picture": "big bigger whole overall broader larger full motion mental better wider general",
    "map": "linear continuous bijective injective surjective mind inverse identity quotient projection",
    "graph": "connected directed undirected bipartite complete planar simple cyclic acyclic weighted knowledge",
    "chart": "flip",
    "screen": "tv television phone laptop computer movie silver big touch smoke wind cinema",
    "panel": "solar control expert jury review advisory side door wall wood wooden instrument glass",
    "plot": "story movie film novel",
}
_OTHER_BEFORE = {noun: frozenset(words.split()) for noun, words in _OTHER_BEFORE.items()}
_MATH_OF = r"s? (?:of|under) (?:[a-z]\b|[$\\]|[a-z0-9]+ ?(?:\(|=|under)|the (?:function|set|line|point|curve|transform"
_MATH_OF += r"|operator|equation|parabola|derivative|inverse|map\b))"
_OTHER_AFTER_TEXT = {
    "image": _MATH_OF
    + r"| (?:is|are|was|will be) (?:formed|real\b|virtual|inverted|upright|erect|magnified|diminished)",
    "figure": r"s? (?:out|skat|of speech|are in (?:thousand|million|billion)|of [$0-9]|is (?:wear|stand|sitt|walk|hold)"
    r"|(?:in|on|at) the (?:image|picture|photo|painting|background|foreground|middle|center|left|right))",
    "picture": r" (?:this\b|of health|yourself)",
    "photo": r" (?:album|finish|op\b)",
    "graph": _MATH_OF + r"| (?:(?:has|with) (?:[a-z0-9]+ )?(?:vertices|nodes|edges)|theor|opens|passes|intersects)",
    "plot": _MATH_OF + r"| (?:of (?:land|the (?:movie|film|story|novel|book))|twist)",
    "map": r"s? (?:\$|[a-z] ?:|sends|from [a-z]\b|to\b|onto\b|out\b)",
    "chart": r" a course|-topping",
    "screen": r"s? (?:of|for|out|against)\b",
    "panel": r"s? (?:of|for)\b",
}
_OTHER_AFTER = {noun: re.compile(pattern) for noun, pattern in _OTHER_AFTER_TEXT.items()}
_NO_CONTENT = re.compile(
    r"s? (?:(?:is|are|was|were|has been|have been|had been|being|be) (?:currently |actually |also )?)?"
    r"(?:unavailable|missing|needed|required|necessary|taken|attached|uploaded|blurry|blank|"
    r"(?:isn't|wasn't|aren't|hasn't|can't|cannot|didn't|not) (?:been |be |to be )?(?:here|there|provided|available|"
    r"accessible|attached|included|given|load|upload|display|visible|seen|viewed|accessed))"
)
"""After the noun: the image as a file, or one that can not be seen."""
_NEGATIONS = frozenset(
    "can't cannot couldn't unable without no lack lacks lacking not don't didn't doesn't can't haven't "
    "hasn't won't".split()
)
_ACCESS = frozenset(
    "see seeing view viewing access accessing have having look looking at to display open receive received load any "
    "actually directly really physically be able being currently ever into the process perceive visualize".split()
)
_ECHO_TRIGGERS = (
    "please human question problem prompt user task query instruction exercise statement asked asking asks".split()
)
_ECHO = re.compile(
    r"\b(?:question|problem|prompt|user|task|query|instruction|exercise|statement)s?\b[^.?!\n]{0,40}?\b(?:ask|say|said"
    r"|state|mention|want|request|read|tell|told|require|inquir|refer|specif|describ|seek|need|give|provide|about"
    r"|is (?:how"
    r"|what|which|to|whether|if|where|who|why))|\basked (?:about|to|for|whether|if|what|which|how|where)\b|\basking\b"
    r"|\basks\b|\b(?:question|user|human) ?:|^\W*please\b"
)
_ECHO_END = re.compile(
    r"[;:] |\b(?:let me|let's|i will|i'll|i should|we should|looking|so (?:i|we|the image))\b|, (?:so|but)\b"
)
_AIM = re.compile(
    r"to (?:first |accurately |correctly |just )?(?:determin|find|figure out|answer|count|calculat|know|solve|work out"
    r"|decide|identify|understand|comput|tell\b)"
)
"""The task said again: "To determine the colour of the car in the image, ..." """
_AIM_BEFORE = frozenset(
    "need needs needed have has want wants try tries trying going asked supposed required is me us order task".split()
)
_QUESTION = re.compile(
    r"(?:\W{0,8}|[^?]{0,160}?[:,\"] ?)(?:so |and |but |now |then )?"
    r"(?:what|which|who|whose|where|how|why|when|is|are|does|do|can)\b"
)
_MATH_TEXT = re.compile(r"[=$\\]|f\(|\bfunction|\bparabola|\bslope|\bequation")

IMAGE_WORDS = frozenset(_NOUNS) | {noun + "s" for noun in _NOUNS}
LOOKING_WORDS = _LOOK | _LOOK_NOUNS | _SHOWN
PLACE_WORDS = _SPATIAL | _CONTENT
"""Words that a reference to the image is made of."""

# --- English: scanner ---

_WORD = re.compile(r"[a-z0-9][a-z0-9'-]*|[^\sa-z0-9]")
_NEXT_WORD = re.compile(r"\s+([a-z]+)")
_REACH = 80
_NUMBERED = re.compile(
    r" ?(?:\(?[0-9]{1,3}(?:\.[0-9]{1,2})?[a-z]?\)?|\([a-z]\)|[b-h]"
    r"|a(?=[,.:;)]| (?:shows|has|is|contains|and b)))(?![0-9a-z'])"
)
_ORDINALS = frozenset(
    "first second third fourth fifth last final next previous current this that each every initial middle".split()
)
_FIG = re.compile(r"\.? ?[0-9]")


def _noun_hits(low: str) -> list[tuple[int, int, str]]:
    """(start, end, noun) of every word for the image, plural included."""
    hits = []
    for noun in _NOUNS:
        at = low.find(noun)
        while at >= 0:
            end = at + len(noun)
            if low[end : end + 1] == "s":
                end += 1
            before, after = low[max(0, at - 1) : at], low[end : end + 1]
            inside = before.isalpha() and before.isascii() or before.isdigit() or before and before in "_-/.\\"
            if not inside and not (after.isalnum() and after.isascii() or after and after in "_/\\"):
                hits.append((at, end, noun))
            at = low.find(noun, end)
    hits.sort()
    return hits


class _Words:
    """Words before a noun, with a cursor that walks backwards."""

    def __init__(self, low: str, start: int, end: int):
        self.low = low[start:end]
        self.offset = start
        self.words = _WORD.findall(self.low)
        self.at = len(self.words) - 1

    def peek(self, back: int = 0) -> str:
        index = self.at - back
        return self.words[index] if index >= 0 else ""

    def start(self, index: int) -> int:
        """Position of a word in the text."""
        position = len(self.low)
        for word in reversed(self.words[index:]):
            position = self.low.rindex(word, 0, position)
        return self.offset + position


def _skip_noun_phrase(words: _Words) -> str:
    """Walk over modifiers and a determiner. Returns the determiner, "" without one."""
    for _ in range(5):
        word = words.peek()
        if word in _DETERMINERS or word in _FOREIGN:
            words.at -= 1
            if words.peek() == "of" and words.peek(1) in ("all", "both", "each", "one", "either", "any"):
                words.at -= 2
            elif words.peek() in ("all", "both", "the", "this") and word not in _FOREIGN:
                words.at -= 1
            elif words.peek() in ("a", "an", "no"):
                return words.peek()
            return word
        if not word or not word[0].isalpha():
            break
        # "the zoomed image": a participle may be where a verb of looking could be.
        participle = word.endswith("ed") and words.peek(1) in _DETERMINERS
        other = word in _STOP or word in _PREPOSITIONS or word in _LOOK or word in _PARTICLES and word != "first"
        if other and not participle:
            break
        words.at -= 1
    return ""


def _verb_start(words: _Words, index: int) -> int | None:
    """Index of a verb of looking at or before `index`, with nothing but particles and adverbs between."""
    for _ in range(5):
        if index < 0:
            return None
        word = words.words[index]
        if word in _LOOK or word in _LOOK_NOUNS:
            return index
        if word not in _PARTICLES and not word.endswith("ly"):
            return None
        index -= 1
    return None


def _governor(words: _Words) -> int | None:
    """Index of the first word of the reference that governs the noun phrase before the cursor, `None` if none does."""
    for _ in range(4):
        if words.peek() != "of":
            break
        head = words.peek(1)
        if head in _LOOK_NOUNS:
            return words.at - 1
        spatial = head.rpartition("-")[2] in _SPATIAL
        if not spatial and head not in _CONTENT:
            return None
        words.at -= 1
        _skip_noun_phrase(words)
        if words.peek() != "of":
            index = _place(words)
            return words.at + 1 if index is None and spatial else index
    return _place(words)


def _place(words: _Words) -> int | None:
    """Index of the verb of looking or preposition right before the cursor."""
    word = words.peek()
    verb = _verb_start(words, words.at)
    if verb is not None:
        return verb
    index = words.at
    if word in _PREPOSITIONS:
        while index > 0 and words.words[index - 1] in _SHOWN:
            index -= 1
        return index
    before = words.peek(1)
    if (
        word == "to"
        and before in ("according", "back")
        or word == "by"
        and before in _SHOWN
        or word == "with"
        and before in ("consistent", "aligned", "aligns")
    ):
        return index - 1
    if word == "given" and index == 0:
        return index
    return None


def _predicate_end(low: str, end: int, noun: str) -> int | None:
    """End of the verb of which the noun that ends at `end` is the subject."""
    owner = low.startswith("'s ", end)  # "the image's left side shows"
    if not owner and low[end : end + 1] not in (" ", "\n"):
        return None
    for count, match in enumerate(_WORD.finditer(low, end + 2 * owner, end + 60)):
        word = match[0]
        adverb = word in _PREDICATE_ADVERBS or owner and count < 3 and word not in _PREDICATES and word.isalpha()
        if word in _PREDICATES and not adverb:
            # "The picture reads the room" is no verb of the image without its object; a plural noun is no verb.
            if word in _AMBIGUOUS_PREDICATES and not _OBJECT.match(low, match.end()):
                return None
            # "The figure is a square", "the graph is linear": more often the thing drawn than the drawing.
            if word in _BE and (
                noun == "figure" or noun in ("graph", "plot") and _MATH_TEXT.search(low, end, end + 60)
            ):
                return None
            return match.end()
        if count > 5 or not adverb:
            return None
    return None


class Sentences:
    """Sentence bounds of a text, found once."""

    def __init__(self, text: str):
        text = text.replace("\u3002", "\n")  # the Chinese full stop
        self.ends = []
        for mark in ".?!\n":  # str.find is faster than a regular expression for such rare characters
            at = text.find(mark)
            while at >= 0:
                at += 1
                # A full stop within a number or a name ends nothing.
                if mark == "\n" or text[at : at + 1] in ' \n<"':
                    self.ends.append(at)
                at = text.find(mark, at)
        self.ends.sort()
        self.length = len(text)

    def at(self, position: int) -> tuple[int, int]:
        """(start, end) of the sentence around `position`."""
        index = bisect.bisect_right(self.ends, position)
        return self.ends[index - 1] if index else 0, self.ends[index] if index < len(self.ends) else self.length


def scan_english(low: str, sentences: Sentences) -> Iterator[tuple[int, int]]:
    """Spans of English references in a text in lower case, in text order, without overlap."""
    last_end = 0
    for start, end, noun in _noun_hits(low):
        span = _english_reference(low, start, end, noun, *sentences.at(start))
        if span and span[1] > last_end:
            first = max(span[0], last_end)
            while first < start and low[first].isspace():
                first += 1
            yield first, span[1]
            last_end = span[1]


def _english_reference(low: str, start: int, end: int, noun: str, left: int, right: int) -> tuple[int, int] | None:
    """Span of the reference around one noun, or `None`. `left` and `right` bound its sentence."""
    following = low[start + len(noun) : end + 60]
    if noun in _OTHER_AFTER and _OTHER_AFTER[noun].match(following) or _NO_CONTENT.match(following):
        return None
    words = _Words(low, max(left, start - _REACH), start)
    if (
        words.peek() in _OTHER_BEFORE.get(noun, ())
        or low[end - 1] == "s"
        and noun == "figure"
        and words.peek() in _COUNTS
    ):
        return None
    next_word = _NEXT_WORD.match(low, end, end + 24)
    compound = bool(next_word) and next_word[1] in _COMPOUNDS
    if next_word and next_word[1] in _OTHER_COMPOUNDS:
        return None
    plural = low[end - 1] == "s"
    end += noun == "fig" and low[end] == "."
    numbered = _NUMBERED.match(low, end, end + 44)
    end = numbered.end() if numbered else end

    if noun == "frame" and not numbered and words.peek() not in _ORDINALS:
        return None  # of a window, or of time
    if noun == "panel" and not numbered and words.peek() not in _ORDINALS | _SPATIAL:
        return None  # of a wall, or of experts
    if noun == "screen" and words.peek() not in _DETERMINERS and words.peek(1) not in _DETERMINERS:
        return None  # a verb, or some other screen
    adjacent = words.at
    determiner = _skip_noun_phrase(words)
    adjacent = words.at == adjacent
    if determiner in _FOREIGN or words.peek() in _DRAW or words.peek() in ("without", "no"):
        return None
    if words.peek() == "of" and (words.peek(1) in _DRAW or words.peek(2) in _DRAW):
        return None
    if _unseen(words) or _restated(low, start, left, right):
        return None

    phrase = words.at + 1
    if determiner or numbered or plural or adjacent:
        index = _governor(words)
        looks = index is not None and (words.words[index] in _LOOK or words.words[index] in _LOOK_NOUNS)
        if not looks and (compound or _aimed(low, start, left)):
            return None
        if index is not None:
            return words.start(index), end
    if not compound and (determiner or numbered or phrase == 0):
        verb_end = _predicate_end(low, end, noun)
        if verb_end is not None and not _aimed(low, start, left):
            return words.start(phrase) if phrase < len(words.words) else start, verb_end
    return None


def _unseen(words: _Words) -> bool:
    """Whether the noun phrase is something that somebody cannot see or does not have."""
    index = words.at
    while index >= 0 and words.words[index] in _ACCESS:
        index -= 1
    return 0 <= index < words.at and words.words[index] in _NEGATIONS


def _restated(low: str, start: int, left: int, right: int) -> bool:
    """Whether the question is being said again, or one asked."""
    if low[right - 1 : right] in ("?", "？") and _QUESTION.match(low, left, left + 200):
        return True
    prefix = low[max(left, start - 240) : start]
    for trigger in _ECHO_TRIGGERS:
        if trigger in prefix:
            break
    else:
        return False
    echo = _ECHO.search(prefix)
    return bool(echo) and not _ECHO_END.search(prefix, echo.end())


def _aimed(low: str, start: int, left: int) -> bool:
    """Whether the noun is in the statement of an aim."""
    prefix = low[max(left, start - 160) : start]
    aim = _AIM.search(prefix)
    if not aim or "," in prefix[aim.end() :]:
        return False
    before = _WORD.findall(prefix[max(0, aim.start() - 24) : aim.start()])
    return not before or before[-1] in _AIM_BEFORE or not before[-1][0].isalnum() or len(before) == 1


# --- Chinese ---

_ZH_HIT = re.compile("[图圖]|照片|相片|画面|影像|截屏|界面|屏幕")
_ZH_KIND = (
    "(?:柱状|条形|柱形|折线|饼状|饼|扇形|散点|直方|统计|流程|示意|结构|曲线|"
    "雷达|地|几何|电路|截|俯视|平面|卫星|航拍|热力|树状|箱线|思维导|表格)?"
)
"""Kinds of charts and pictures, before the character that all of them end with."""
_ZH_BAD = re.compile(
    "(?:[试企妄力贪蓝版草宏画作绘制图]|(?<!示)意|(?<!结)构)图|"
    "图(?:书|案|纸|灵|标|谋|腾|论|形|库|解|鉴|层|文)|地图集|图[像象](?:处理|识别|生成|分类|编辑)"
)
_ZH_FUNCTION = re.compile(r"(?:函数|曲线|抛物线|直线|方程|导数|数列|[a-zA-Z)])的?\s*$")
_ZH_CHART = re.compile("曲线图(?![像象])")
_ZH_DRAW = re.compile("(?:画|作出|绘|想象|做出|描出|构造)[^看]{0,8}$")
_ZH_UNSEEN = re.compile(
    "(?:看不[到见清]|无法|没有|未|缺少|不能|没)(?:看到|看见|查看|访问|识别|打开|获取|直接|提供|给出|观察|任何|收到|加载|到|看|相关|的)*$"
)
_ZH_GONE = re.compile("(?:没有提供|未提供|无法|不可用|缺失|看不|没有给出|未给出|加载失败|没有显示)")
_ZH_ECHO_TRIGGERS = ("题", "问", "用户")
_ZH_ECHO = re.compile(
    "(?:题目|题干|问题|题意|题中|题里|用户|提问|原题|题设)[^。！？\n看观]{0,6}?(?:说|问|要求|提到|给出|询问|是|中|想|让|指|告诉|描述|为|：|:)"
    "|(?:要求|询问|问的是|问我们)"
)
_ZH_LOOK = re.compile(
    "观察|查看|审视|检查|分析|放大|回到|返回|参考|参照|对照|浏览|观看|细看|回看|查阅|识别|阅读|关注|聚焦|注意|扫视|核对|确认|验证|研究"
    "|回顾|看"
)
_ZH_ADVERBS = ("再次", "重新", "仔细", "回头", "进一步", "认真", "继续", "再", "先", "来", "去", "回")
_ZH_FROM = re.compile(
    "(?:如|由|从|据|按|见|依|在|对|根据|依据|按照|结合|通过|基于|利用|关于|于|参见|详见)"
    "(?:这|该|此|那|本|上|下|左|右|题|所给|给出|给定|提供|原|附|以|面|一|张|幅|个|的|和|已知|两|第|二|三|示|输入|整|中|些|目|各|你|您|我们|当前|目前|的)*"
    + _ZH_KIND
    + "$"
)
_ZH_THIS = re.compile(
    "(?:(?:这|该|此|那|本|上|下|左|右|原|整|所给|给定|提供的|给出的|第[一二三四]|每|两|当前|目前)[张幅个些副]*(?:的)?)?"
    + _ZH_KIND
    + "$"
)
_ZH_AFTER = re.compile(
    r"\s*[0-9a-z(（)）一二三四-]{0,5}\s*(?:的?(?:中央|中间|背景|前景|边缘|顶部|底部|[中里内上左右下顶底角])[部侧边下上方角]{0,2}"
    "|可知|可见|可得|可以|所示|看出|得知|得)"
)
_ZH_VERB = re.compile(
    r"\s*[0-9a-z()]{0,4}\s*(?:清楚地|清晰地|主要|还|也|并|只|仅|都|明确)?(?:显示|展示|展现|是|有|包含|描绘|呈现|表明|说明|可以|没有|不|含有|反映|"
    "提供|给出|标出|标明|列出|标注|拍摄|拍的|描述|表示|出现|来自|看起来|似乎|为)"
)
_ZH_CLAUSE_ENDS = frozenset("\uff0c\u3002\uff1b\uff1a\uff01\uff1f\u3001\n,;:!?.")
_ZH_REACH = 16
_ZH_GAP = 9
"""Most characters between a verb of looking and the noun."""


def scan_chinese(text: str) -> Iterator[tuple[int, int]]:
    """Spans of Chinese references, in text order, without overlap."""
    last_end = 0
    for hit in _ZH_HIT.finditer(text):
        if hit.start() < last_end:
            continue
        span = _chinese_reference(text, hit.start(), hit.end())
        if span:
            span = max(span[0], last_end), span[1]
            yield span
            last_end = span[1]


def _chinese_reference(text: str, start: int, end: int) -> tuple[int, int] | None:
    """Span of the reference around one noun, or `None`."""
    if text[start] in "图圖":
        if _ZH_BAD.search(text, max(0, start - 1), end + 3):
            return None
        if text[end : end + 1] in ("片", "像", "象", "表", "示"):
            end += 1
    first = start
    while first > 0 and start - first < _ZH_REACH and text[first - 1] not in _ZH_CLAUSE_ENDS:
        first -= 1
    before = text[first:start]
    if (
        _ZH_FUNCTION.search(before)
        and not _ZH_CHART.match(text, start - 2)
        or _ZH_DRAW.search(before)
        or _ZH_UNSEEN.search(before)
        or _ZH_GONE.match(text, end)
    ):
        return None
    echo = text[max(0, start - 40) : start].rpartition("\n")[2].rpartition("。")[2]
    if any(trigger in echo for trigger in _ZH_ECHO_TRIGGERS) and _ZH_ECHO.search(echo):
        return None

    after = _ZH_AFTER.match(text, end, end + 12)
    tail = after.end() if after else end
    looks = _ZH_LOOK.findall(before)
    if looks:
        look = before.rindex(looks[-1])
        if len(before) - look - len(looks[-1]) <= _ZH_GAP:
            return first + _with_adverbs(before, look), tail
    source = _ZH_FROM.search(before)
    if source:
        return first + source.start(), tail
    this = _ZH_THIS.search(before)
    first = first + this.start() if this else start
    if after:
        return first, tail
    verb = _ZH_VERB.match(text, end, end + 12)
    return (first, verb.end()) if verb else None


def _with_adverbs(before: str, index: int) -> int:
    """Start of the adverbs that end at `index`."""
    for _ in range(3):
        for adverb in _ZH_ADVERBS:
            if before.endswith(adverb, 0, index):
                index -= len(adverb)
                break
        else:
            break
    return index
