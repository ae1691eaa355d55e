# SPDX-License-Identifier: Apache-2.0
"""Coordinate formats of vision-language models: one table row per format, one small scanner per syntax.

Number groups in brackets are found once, by a character class between two brackets. Each is then classified by the text
*before* it: a JSON key, a tag, a call, or prose. JSON is never parsed, because models write stray braces, duplicate
keys, Python quotes and leading zeros around valid numbers.

The context read around each group is bounded, so the time is linear in the length of the text.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class Format:
    """One way of writing coordinates."""

    name: str
    kind: str
    """`bbox` or `point`."""
    scale: str | None
    """Key of `SCALES`, `absolute` or `patches`; `None` if models write the same text in several systems."""
    source: str
    """Repository file or page that defines or shows the format."""
    order: str = "xy"
    """`xy`, or `yx` where y is written first."""
    fixed: bool = False
    """Whether the syntax defines the scale, so that a `coordinates` argument does not change it."""


SCALES = {"normalized": 1.0, "percent": 100.0, "relative_999": 999.0, "relative_1000": 1000.0, "bins_1024": 1024.0}
"""Number that means the full width or height."""

_QWEN3 = "QwenLM/Qwen3-VL:cookbooks/"
_SWIFT = "modelscope/ms-swift:docs/source_en/Customization/Custom-dataset.md"
_ROWS = (
    Format("bbox_2d_json", "bbox", None, _QWEN3 + "2d_grounding.ipynb"),  # pixels in Qwen2.5-VL, 0-1000 in Qwen3-VL
    Format("point_2d_json", "point", None, "QwenLM/Qwen2.5-VL:cookbooks/spatial_understanding.ipynb"),
    Format("grit_dupkey_json", "bbox", None, "eric-ai-lab/GRIT:grpo-gr/GRPO_GR.py"),
    Format("visual_rft_json", "bbox", "relative_1000", "Liuziyu77/Visual-RFT"),
    Format(
        "gemini_box_2d",
        "bbox",
        "relative_1000",
        "common description, not checked against Google's pages",
        order="yx",
        fixed=True,
    ),
    Format("gemini_point", "point", "relative_1000", "as gemini_box_2d", order="yx", fixed=True),
    Format("qwen2vl_special", "bbox", "relative_1000", "QwenLM/Qwen3-VL:qwen-vl-finetune/tools/process_bbox.ipynb"),
    Format("qwenvl_ref_box", "bbox", "relative_1000", "QwenLM/Qwen-VL:README.md"),
    Format("qwenvl_quad", "bbox", "relative_1000", "QwenLM/Qwen-VL:README.md"),
    Format("qwen_stripped_pair", "bbox", "relative_1000", "raja-kumar/Visual-RFT:demo/lisa_demo.ipynb"),
    Format("qwenvl_html", "bbox", None, _QWEN3 + "document_parsing.ipynb"),
    Format("gui_coordinate", "point", None, _QWEN3 + "mobile_agent.ipynb"),
    Format("uitars_box", "point", None, _SWIFT),  # 0-1000 in 1.0, pixels in 1.5
    Format("uitars_region", "bbox", None, _SWIFT),
    Format("deepeyes_tool_call", "bbox", None, "Visual-Agent/DeepEyes:visual_toolbox_v2.py"),
    Format("qwen_tool_call", "bbox", None, _QWEN3 + "think_with_images.ipynb"),
    Format("pixel_reasoner_tool_call", "bbox", None, "TIGER-AI-Lab/Pixel-Reasoner:experience_maker.py"),
    Format("treevgr_box", "bbox", None, "Haochen-Wang409/TreeVGR:inference_treebench.py"),
    Format("internvl_ref_box", "bbox", "relative_1000", "OpenGVLab/InternVL:streamlit_demo/app.py", fixed=True),
    Format("internvl_stripped", "bbox", "relative_1000", "OpenGVLab/InternVL:evaluate_grounding.py", fixed=True),
    Format("molmo_point", "point", "percent", "allenai/molmo:olmo/data/data_formatter.py"),
    Format("molmo_points_xml", "point", "percent", "allenai/molmo:olmo/eval/evaluators.py"),
    Format("qwen_points_xml", "point", "relative_1000", _QWEN3 + "2d_grounding.ipynb"),
    Format(
        "molmo2_coords", "point", "relative_1000", "public parsers of Molmo2 output, no official file found", fixed=True
    ),
    Format(
        "paligemma_loc",
        "bbox",
        "bins_1024",
        "huggingface.co/spaces/Nymbo/paligemma:paligemma_parse.py",
        order="yx",
        fixed=True,
    ),
    Format("florence_loc", "bbox", "relative_1000", "microsoft/Florence-2-large:processing_florence2.py", fixed=True),
    Format("named_corners", "bbox", None, "JSON objects with a field per number, no definition"),
    Format("named_point", "point", None, "JSON objects with a field per number, no definition"),
    Format("kosmos_patches", "bbox", "patches", "Kosmos-2 page of the transformers documentation", fixed=True),
    Format("cogvlm_box", "bbox", "relative_1000", "THUDM/CogVLM:README.md", fixed=True),
    Format("llava_shikra_norm", "bbox", "normalized", "shikras/shikra:box_process_function.py", fixed=True),
    Format("shikra_norm_point", "point", "normalized", "shikras/shikra:box_process_function.py", fixed=True),
    Format("deepseek_det", "bbox", "relative_999", "deepseek-ai/DeepSeek-VL2", fixed=True),
    Format("glm_begin_of_box", "bbox", "relative_1000", "skills.sh glmv-grounding", fixed=True),
    Format("vlm_r1_answer", "bbox", None, "om-ai-lab/VLM-R1:src/eval/test_rec_r1.py"),
    Format("seed_bbox", "bbox", "relative_1000", "no file found; read as 0-1000 from model reports"),
    Format("seed_point", "point", "relative_1000", "no file found; read as 0-1000 from model reports"),
    Format("bare_untagged", "bbox", None, "boxes in prose, no definition"),
    Format("bare_point", "point", None, "points in prose, as in ViGoRL"),
    Format("code_crop", "bbox", "absolute", "Visual-ARFT in raja-kumar/Visual-RFT"),
)
FORMATS: dict[str, Format] = {row.name: row for row in _ROWS}
"""Coordinate formats by name."""


class Reference(NamedTuple):
    """Coordinates as found, before their geometry is checked."""

    format: str
    start: int
    end: int
    coords: tuple[float, ...]
    label: str | None = None


_NUMBER = re.compile(r"-?[0-9]{1,7}(?:\.[0-9]{1,12})?")
_SPACES = " \t\r\n"
_QUOTES = ("'", '"')


def _numbers(body: str, separator: str | None = ",") -> tuple[float, ...] | None:
    """Numbers of a list without brackets, `None` if anything else stands between the separators.

    As in JSON that models write: numbers may be quoted, and a comma may follow the last one.
    """
    numbers = []
    parts = body.split(separator, 64)
    if len(parts) > 1 and not parts[-1].strip():
        parts.pop()
    for part in parts:
        part = part.strip()
        if part[:1] in _QUOTES and part[-1:] == part[:1] and len(part) > 2:
            part = part[1:-1].strip()
        if not _NUMBER.fullmatch(part):
            return None
        numbers.append(float(part))
    return tuple(numbers)


# --- Labels ---

_LABEL_KEY = re.compile(
    r"""["'](?:[a-z]+_)?(?:label|names?|desc|description|object|category|text)(?:_[a-z]+)?["']\s*:\s*"""
)
_REF_TAG = re.compile(
    r"<ref>([^<>]*)</ref>|<\|object_ref_start\|>([^<>]*)<\|object_ref_end\|>|<\|ref\|>([^<>]*)<\|/ref\|>"
    r"|<(?:phrase|p|pred)>([^<>]*)</(?:phrase|p|pred)>"
)
_TAG = re.compile(r"<[^<>]*>")
_BRACKET = re.compile(r"[\[{}]")
_LABEL_REACH = 240
_WORDS_BEFORE = re.compile(r"[^\W\d][^\n.,;:!?()\[\]{}<>`\"|。，；：！？]*$")


def _clean_label(label: str | None) -> str | None:
    return (label or "").strip() or None


_STRING = {quote: re.compile(rf"{quote}((?:[^{quote}\\]|\\.)*){quote}") for quote in _QUOTES}


def _quoted(text: str, start: int) -> str | None:
    """The string literal that begins at `start`."""
    quote = text[start : start + 1]
    if quote not in ("'", '"'):
        return None
    match = _STRING[quote].match(text, start, start + _LABEL_REACH)
    return _clean_label(re.sub(r"\\(.)", r"\1", match[1])) if match else None


def _json_label(text: str, start: int, end: int) -> str | None:
    """Label in the object around text[start:end]: up to the next bracket after it, else back to the last one."""
    stop = _BRACKET.search(text, end, end + _LABEL_REACH)
    match = _LABEL_KEY.search(text, end, stop.start() if stop else end + _LABEL_REACH)
    if match:
        return _quoted(text, match.end())
    low = max(0, start - _LABEL_REACH)
    low = max(low, text.rfind("{", low, start), text.rfind("}", low, start), text.rfind("]", low, start))
    match = _LABEL_KEY.search(text, low, start)
    return _quoted(text, match.end()) if match else None


class _RefLabels:
    """Labels in tags such as `<ref>`, and the one that a box belongs to."""

    def __init__(self, text: str):
        self.text = text
        self.labels = [(m.end(), m[m.lastindex]) for m in _REF_TAG.finditer(text) if m.lastindex] if "<" in text else []
        self.ends = [end for end, _ in self.labels]

    def before(self, start: int) -> str | None:
        """Label of the box whose tag begins at `start`: the last label, if only tags and numbers follow it."""
        index = bisect.bisect_right(self.ends, start) - 1
        if index < 0 or start - self.ends[index] > 1000:
            return None
        between = _TAG.sub("", self.text[self.ends[index] : start])
        return None if any(c.isalpha() for c in between) else _clean_label(self.labels[index][1])


def _words_before(text: str, start: int) -> str | None:
    """The few words right before a box in prose."""
    match = _WORDS_BEFORE.search(text[max(0, start - 60) : start].rstrip(_SPACES + ":*\"'"))
    return _clean_label(" ".join(match[0].split()[-4:])) if match else None


# --- Syntaxes without brackets ---

_LOC_RUN = re.compile(r"(?:<loc[0-9]{4}>)+")
_LOC_LABEL = re.compile(r"(?:<seg[0-9]{3}>)*[ \t]*([^<>;\n]*)")


def _scan_paligemma(text: str) -> Iterator[Reference]:
    """`<locY1><locX1><locY2><locX2> label`, exactly four."""
    for run in _LOC_RUN.finditer(text):
        if len(run[0]) != 4 * len("<loc0000>"):
            continue
        coords = tuple(float(run[0][i : i + 4]) for i in range(4, 36, 9))
        if max(coords) < SCALES["bins_1024"]:
            label = _LOC_LABEL.match(text, run.end())  # Matches the empty string too.
            yield Reference("paligemma_loc", *run.span(), coords, _clean_label(label[1] if label else ""))


_PATCHES = re.compile(r"<patch_index_([0-9]{4})><patch_index_([0-9]{4})>")


_FLORENCE_RUN = re.compile(r"(?:<loc_[0-9]{1,3}>){4,}")
_FLORENCE_TOKEN = re.compile(r"<loc_([0-9]{1,3})>")


def _scan_florence(text: str) -> Iterator[Reference]:
    """`label<loc_x1><loc_y1><loc_x2><loc_y2>`: boxes of one label follow one another, or one quad of eight numbers."""
    for run in _FLORENCE_RUN.finditer(text):
        tokens = list(_FLORENCE_TOKEN.finditer(text, *run.span()))
        rows = [tokens[i : i + 4] for i in range(0, len(tokens), 4)]
        values = [tuple(float(token[1]) for token in row) for row in rows]
        if len(tokens) % 4:
            continue  # a polygon
        if len(rows) == 2 and not all(x1 < x2 and y1 < y2 for x1, y1, x2, y2 in values):
            rows, values = [tokens], [values[0] + values[1]]
        label = _words_before(text, run.start())
        for row, coords in zip(rows, values, strict=True):
            yield Reference("florence_loc", row[0].start(), row[-1].end(), coords, label)


def _scan_kosmos(text: str) -> Iterator[Reference]:
    """`<patch_index_0044><patch_index_0863>`: upper left and lower right patch."""
    labels = _RefLabels(text)
    for match in _PATCHES.finditer(text):
        coords = (float(match[1]), float(match[2]))
        yield Reference("kosmos_patches", *match.span(), coords, labels.before(match.start()))


_POINT_TAG = re.compile(r"<points?\s([^<>]*)>?([^<\n]*)")
_POINT_XY = re.compile(
    r"""\bx([0-9]{0,4})\s*=\s*["']?\s*([0-9.]{1,16})\s*["']?[\s,]*y\1\s*=\s*["']?\s*([0-9.]{1,16})(?:\s*["'])?"""
)
_POINT_COORDS = re.compile(r"""\bcoords\s*=\s*["']([0-9\s:;.]*)["']""")
_POINT_ALT = re.compile(r"""\balt\s*=\s*(?=["'])""")


def _scan_points(text: str) -> Iterator[Reference]:
    """`<point x= y=>`, `<points x1= y1= ..>` (Molmo, and Qwen3-VL in 0-1000) and `<points coords=>` (Molmo2)."""
    tags = []
    for tag in _POINT_TAG.finditer(text):
        offset = tag.start(1)
        alt = _POINT_ALT.search(tag[1])
        label = (_quoted(tag[1], alt.end()) if alt else None) or _clean_label(tag[2][:_LABEL_REACH])
        found = []
        for match in _POINT_XY.finditer(tag[1]):
            coords = _numbers(f"{match[2]},{match[3]}")
            if coords:
                found.append((offset + match.start(), offset + match.end(), coords))
        tags.append((tag, label, found))
    # Molmo writes a decimal and never exceeds 100; whole numbers beyond that are Qwen3-VL's 0-1000. A response has one
    # of the two.
    numbers = [value for *_, found in tags for *_, coords in found for value in coords]
    qwen = all(value.is_integer() for value in numbers) and max(numbers, default=0) > 100
    for tag, label, found in tags:
        name = "molmo_point" if tag[0][6].isspace() else "molmo_points_xml"
        for start, end, coords in found:
            yield Reference("qwen_points_xml" if qwen else name, start, end, coords, label)
        listed = _POINT_COORDS.search(tag[1])
        if listed:
            yield from _molmo2_points(listed[1], tag.start(1) + listed.start(1), label)


_CHUNK = re.compile(r"[^;\t]+")
_TOKEN = re.compile(r"[0-9.]+")


def _molmo2_points(body: str, offset: int, label: str | None) -> Iterator[Reference]:
    """`image id x y id x y ..`, several images after `;` or a tab."""
    for chunk in _CHUNK.finditer(body):
        tokens = list(_TOKEN.finditer(body, *chunk.span()))
        if len(tokens) % 3 != 1:
            continue
        for i in range(1, len(tokens), 3):
            coords = _numbers(f"{tokens[i + 1][0]},{tokens[i + 2][0]}")
            if coords:
                span = (offset + tokens[i + 1].start(), offset + tokens[i + 2].end())
                yield Reference("molmo2_coords", *span, coords, label)


_HTML_BOX = re.compile(r"""data-bbox\s*=\s*["']?([0-9\s.,-]*)(?:["'][^<>]*)?>?([^<>]*)""")


def _scan_html(text: str) -> Iterator[Reference]:
    """`data-bbox="x1 y1 x2 y2"`."""
    for match in _HTML_BOX.finditer(text):
        coords = _numbers(" ".join(match[1].replace(",", " ").split()), " ")
        if coords and len(coords) == 4:
            yield Reference("qwenvl_html", *match.span(1), coords, _clean_label(match[2][:_LABEL_REACH]))


_TAG_NUMBERS = re.compile(r"<(bbox|box|point|click|bbox_2d|\|box_start\||\|det\|)>\s*([0-9][0-9\s.,-]*)<[/|]")
_TAG_FORMATS = {
    ("bbox", 4): "seed_bbox",
    ("box", 4): "treevgr_box",
    ("bbox_2d", 4): "treevgr_box",
    ("point", 2): "seed_point",
    ("click", 2): "gui_coordinate",
    ("|box_start|", 4): "qwen2vl_special",
    ("|box_start|", 2): "uitars_box",
    ("|det|", 4): "deepseek_det",
}


def _scan_tag_numbers(text: str) -> Iterator[Reference]:
    """`<bbox>x1 y1 x2 y2</bbox>` and `<point>x y</point>`, with spaces or commas."""
    labels = _RefLabels(text)
    for match in _TAG_NUMBERS.finditer(text):
        body = match[2].rstrip()
        coords = _numbers(" ".join(body.replace(",", " ").split()), " ")
        if coords and match[1] == "bbox" and len(coords) == 4 and coords[:2] == coords[2:]:
            # UI-TARS clicks at a box without an area.
            yield Reference("seed_point", match.start(2), match.start(2) + len(body), coords[:2])
            continue
        name = _TAG_FORMATS.get((match[1], len(coords or ())))
        if coords and name:
            yield Reference(name, match.start(2), match.start(2) + len(body), coords, labels.before(match.start()))


# --- A field per number ---

_NAMED = re.compile(
    r"""(["']?)(?<![A-Za-z0-9_])([A-Za-z][A-Za-z0-9_-]{0,15})\1\s*[:=]\s*["']?(-?[0-9]{1,7}(?:\.[0-9]{1,12})?)(?![0-9.]*[0-9%])["']?"""
)
_BETWEEN_NAMED = re.compile(r"[\s,;]{0,40}")
_CORNERS = (
    ("x1", "y1", "x2", "y2"),
    ("x0", "y0", "x1", "y1"),
    ("xmin", "ymin", "xmax", "ymax"),
    ("minx", "miny", "maxx", "maxy"),
    ("xleft", "ytop", "xright", "ybottom"),
    ("startx", "starty", "endx", "endy"),
    ("xstart", "ystart", "xend", "yend"),
    ("left", "top", "right", "bottom"),
)
_SIZES = (("x", "y", "width", "height"), ("x", "y", "w", "h"), ("left", "top", "width", "height"))
_CENTRES = (("cx", "cy", "w", "h"), ("cx", "cy", "width", "height"), ("xcenter", "ycenter", "width", "height"))
_PLAIN_NAMES = frozenset(("x1", "y1", "x2", "y2", "x0", "y0", "x", "y", "w", "h", "cx", "cy", "width", "height"))
"""Names that mathematics uses too: without quotes they need a bracket, a tag or a call."""
_NAMED_OPENING = re.compile(r"""[{\[]\s*$|\w\(\s*$|<(?:bbox|box|bbox_2d|rect|region|click|tap)\s+$""")
_CLICK_OPENING = re.compile(r"""<(?:click|tap)\s+$|["'](?:action|action_type)["']\s*:[^{}]*$""")


_N = r"(-?[0-9]{1,7}(?:\.[0-9]{1,12})?)"
_PAIR = rf"""["']?\s*[:=]\s*[\[({{]\s*(?:["']x["']\s*:\s*)?{_N}\s*,\s*(?:["']y["']\s*:\s*)?{_N}\s*,?\s*[\])}}]"""
_PAIR_CORNERS = re.compile(
    rf"""["']?\b(?:(?:top|upper)[_ -]?left|tl|min){_PAIR}\s*,?\s*["']?\b(?:(?:bottom|lower)[_ -]?right|br|max){_PAIR}"""
)


def _scan_named(text: str) -> Iterator[Reference]:
    """`{"x1": 10, "y1": 20, "x2": 110, "y2": 220}` and other names of corners, in any order, and `{"x": 10, "y": 20}`.

    A width and a height, or a centre, become corners.
    """
    for match in _PAIR_CORNERS.finditer(text):
        coords = _numbers(",".join(match.groups()))
        if coords:
            yield Reference("named_corners", *match.span(), coords, _json_label(text, *match.span()))
    run: list[re.Match] = []
    for match in _NAMED.finditer(text):
        if run and not _BETWEEN_NAMED.fullmatch(text, run[-1].end(), min(match.start(), run[-1].end() + 41)):
            yield from _named_run(text, run)
            run = []
        run.append(match)
    if run:
        yield from _named_run(text, run)


def _named_run(text: str, run: list[re.Match]) -> Iterator[Reference]:
    opening = text[max(0, run[0].start() - 24) : run[0].start()]
    if re.search(r"<points?\s[^<>]*$", opening):
        return  # Molmo
    named: dict[str, re.Match] = {}
    for match in run:
        named.setdefault(match[2].lower().replace("_", "").replace("-", ""), match)
    coords, names = _corners({name: float(match[3]) for name, match in named.items()})
    if coords is None:
        return
    used = [named[name] for name in names]
    if not all(match[1] for match in used) and _PLAIN_NAMES.issuperset(names) and not _NAMED_OPENING.search(opening):
        return
    if len(coords) == 2:
        before = text[: run[0].start()][-40:].rstrip(_SPACES)
        head = text.rfind("{", max(0, run[0].start() - 40), run[0].start())
        key = _field(text, head) if before.endswith("{") else None
        call = before.endswith("(") and _word_before(before, len(before) - 1).lower() in _CLICK_CALLS
        clicks = _CLICK_OPENING.search(text, max(0, run[0].start() - 100), run[0].start())
        if not (key and key[0] in _POINT_KEYS or call or clicks or _json_label(text, *_extent(used))):
            return  # a point of mathematics, unless a field or a label says what it is
    start, end = _extent(used)
    closing = _CLOSING.match(text, end)  # the label may be in the object around this one
    label = _json_label(text, start, closing.end() if closing else end)
    yield Reference("named_corners" if len(coords) == 4 else "named_point", start, end, coords, label)


_CLOSING = re.compile(r"\s{0,20},?\s{0,20}\}\s{0,20}(?=,)")


def _extent(matches: list[re.Match]) -> tuple[int, int]:
    return min(match.start() for match in matches), max(match.end() for match in matches)


def _corners(values: dict[str, float]) -> tuple[tuple[float, ...] | None, tuple[str, ...]]:
    """(numbers, names used): (x1, y1, x2, y2), or (x, y), or `None`."""
    for names in _CORNERS:
        if values.keys() >= set(names):
            return tuple(values[name] for name in names), names
    for names in _SIZES:
        if values.keys() >= set(names):
            x, y, width, height = (values[name] for name in names)
            return (x, y, x + width, y + height), names
    for names in _CENTRES:
        if values.keys() >= set(names):
            x, y, width, height = (values[name] for name in names)
            return (x - width / 2, y - height / 2, x + width / 2, y + height / 2), names
    if values.keys() == {"x", "y"}:
        return (values["x"], values["y"]), ("x", "y")
    return None, ()


# --- A field with numbers in one string, or separated by spaces ---

_FIELD_NUMBERS = re.compile(
    r"""([A-Za-z][A-Za-z0-9_-]{1,20})["']?\s*[:=]\s*(["'\[(])\s*([0-9][0-9.]*(?:(?:\s+|\s*,\s*)-?[0-9][0-9.]*){1,4})\s*["'\])]"""
)


def _scan_field_numbers(text: str) -> Iterator[Reference]:
    """`"bbox_2d": "10, 20, 110, 220"` and `"bbox_2d": [10 20 110 220]`."""
    for match in _FIELD_NUMBERS.finditer(text):
        if match[2] in "[(" and "," in match[3]:
            continue  # a number group
        key = match[1].lower().replace("_", "").replace("-", "")
        coords = _numbers(" ".join(match[3].replace(",", " ").split()), " ") or ()
        if len(coords) == 5 and coords[4] <= 100:
            coords = coords[:4]
        span = match.span(3)
        if len(coords) == 4 and key in _BOX_KEYS:
            yield Reference(_json_name(text, key, span[0]), *span, coords, _json_label(text, *span))
        elif len(coords) == 2 and key in _POINT_KEYS:
            yield Reference(_point_name(key), *span, coords, _json_label(text, *span))


# --- Calls ---

_CLICK = re.compile(r"([A-Za-z_]{3,20})\(\s*(-?[0-9][0-9.]{0,8})\s*,\s*(-?[0-9][0-9.]{0,8})\s*,\s*[A-Za-z]")


def _scan_clicks(text: str) -> Iterator[Reference]:
    """`click(540, 1180, button="left")`: a call whose further arguments are no numbers."""
    for match in _CLICK.finditer(text):
        coords = _numbers(f"{match[2]},{match[3]}")
        if coords and match[1].lower() in _CLICK_CALLS:
            yield Reference("gui_coordinate", match.start(2), match.end(3), coords)


# --- Number groups in brackets ---

_BODY = re.compile(r"""[0-9\s.,;"'-]+""")


class _Group(NamedTuple):
    """Numbers between two brackets."""

    start: int
    end: int
    bracket: str
    rows: list[tuple[int, int, tuple[float, ...]]]
    """(start, end, numbers) of each `;` part; the span has the brackets if there is one part only."""
    body: str
    size: int
    """Numbers per part, 0 if the parts differ."""


def _groups(text: str) -> Iterator[_Group]:
    opened = []
    for bracket in "[(":
        at = text.find(bracket)
        while at >= 0:
            opened.append(at)
            at = text.find(bracket, at + 1)
    opened.sort()
    for start in opened:
        match = _BODY.match(text, start + 1)
        if not match:
            continue
        body = match[0]
        end = match.end() + 1
        # [0, 1) is an interval; a group without a comma, such as (12), is never a reference.
        if "," not in body or len(body) > 4000 or text[start] + text[end - 1 : end] not in ("[]", "()"):
            continue
        if ";" not in body:
            numbers = _numbers(body)
            if numbers:
                yield _Group(start, end, text[start], [(start, end, numbers)], body, len(numbers))
            continue
        rows = []
        position = start + 1
        for part in body.split(";"):
            numbers = _numbers(part)
            if numbers:
                rows.append((position, position + len(part), numbers))
            position += len(part) + 1
        if len(rows) == body.count(";") + 1:
            sizes = {len(numbers) for *_, numbers in rows}
            yield _Group(start, end, text[start], rows, body, sizes.pop() if len(sizes) == 1 else 0)


def _runs(text: str) -> Iterator[list[_Group]]:
    """Adjacent groups, with only commas, semicolons and white space between them."""
    run: list[_Group] = []
    for group in _groups(text):
        if run:
            between = text[run[-1].end : min(group.start, run[-1].end + 41)]
            apart = len(between) > 40 or between.strip(" \t\r\n,;") or between.count(",") > 1
            if apart or group.bracket != run[-1].bracket:
                yield run
                run = []
        run.append(group)
    if run:
        yield run


def _word_before(text: str, end: int) -> str:
    """Letters, digits, `_` and `-` that end at `end`, at most 32 of them."""
    start = end
    while start > 0 and end - start < 32 and (text[start - 1].isalnum() or text[start - 1] in "_-"):
        start -= 1
    return text[start:end]


def _field(text: str, head: int) -> tuple[str, bool] | None:
    """Name before a colon or equals sign at `head`, and whether it is a field (quoted, or assigned to) for sure."""
    before = text[max(0, head - 8) : head].rstrip("\"'" + _SPACES)
    if not before or before[-1] not in ":=":
        return None
    position = head - (min(head, 8) - len(before))
    name = text[max(0, position - 48) : position - 1].rstrip(_SPACES)
    quoted = name[-1:] in ("'", '"')
    name = name.rstrip("\"'")
    return _word_before(name, len(name)).lower().replace("_", "").replace("-", ""), quoted or before[-1] == "="


_BOX_KEYS = frozenset(
    "bbox2d bbox bboxes box boxes boundingbox boundingboxes box2d boxes2d xyxy bboxxyxy position positions coordinates "
    "coordinate region crop cropbox startbox endbox targetbbox objectbbox rect rectangle roi".split()
)
_POINT_KEYS = frozenset(
    "point2d point points position coordinate coordinates click startbox endbox startpoint endpoint location xy "
    "coordinate2 pixel clickpoint targetpoint center centroid".split()
)
_POINT_LISTS = frozenset(("positions", "coordinates"))
"""Box keys in the plural: a list of pairs after them is a list of points."""
_CROP_CALLS = frozenset(("crop", "zoom", "crop_image", "zoom_in", "image_zoom_in_tool", "rectangle"))
_CLICK_CALLS = frozenset(
    "click tap press touch doubleclick rightclick middleclick tripleclick leftclick moveto dragto move_to drag_to "
    "mouse_move hover left_double right_single left_single left_click right_click middle_click double_click "
    "triple_click long_press longpress".split()
)
_BOX_TAGS = {
    "<box>": "qwenvl_ref_box",
    "<|box_start|>": "qwen2vl_special",
    "<quad>": "qwenvl_quad",
    "<|quad_start|>": "qwenvl_quad",
    "<|det|>": "deepseek_det",
    "<|begin_of_box|>": "glm_begin_of_box",
    "<bbox>": "seed_bbox",
    "<bbox_2d>": "treevgr_box",
    "<point>": "seed_point",
}


def _scan_groups(text: str) -> Iterator[Reference]:
    labels = _RefLabels(text)
    for run in _runs(text):
        yield from _classify(text, run, labels)


def _classify(text: str, run: list[_Group], labels: _RefLabels) -> Iterator[Reference]:
    """Classify a run of groups by the text before it."""
    first = run[0]
    if len(run) == 1 and first.size not in (2, 4, 5):
        return
    head = first.start
    outer = ""
    while head > 0 and len(outer) < 32 and text[head - 1] in " \t\r\n[(":
        head -= 1
        outer += text[head].strip()
    if text[head] == "(":
        call = _word_before(text, head).lower()
        name = "code_crop" if call in _CROP_CALLS and first.size == 4 else ""
        name = "gui_coordinate" if call in _CLICK_CALLS and first.size == 2 else name
        if name:
            yield from _boxes(name, run[:1])
            return

    if text[max(0, head - 1) : head] == ">":
        tag = text[max(text.rfind("<", max(0, head - 24), head), 0) : head].lower()
        if tag in _BOX_TAGS:
            yield from _tagged(text, tag, _without_scores(run), "[" in outer, labels.before(head))
            return

    field = _field(text, head)
    if field:
        name, certain = field
        if "3d" in name:
            return
        if name in _BOX_KEYS or name in _POINT_KEYS:
            yield from _keyed(text, name, _without_scores(run))
            return
        if certain:
            return  # some other field, or a variable
    yield from _bare(text, run, head, outer)


def _without_scores(run: list[_Group]) -> list[_Group]:
    """Without the confidence that follows the four numbers of a box, in 0-1 or in percent."""
    if all(group.size == 5 and 0 <= row[4] <= 100 for group in run for *_, row in group.rows):
        return [group._replace(rows=[(*span, row[:4]) for *span, row in group.rows], size=4) for group in run]
    return run


def _boxes(name: str, groups: list[_Group], label: str | None = None) -> Iterator[Reference]:
    for group in groups:
        for start, end, numbers in group.rows:
            yield Reference(name, start, end, numbers, label)


def _pairs(groups: list[_Group], size: int) -> Iterator[tuple[int, int, tuple[float, ...]]]:
    """`size` parenthesised points at a time, as one reference."""
    for i in range(0, len(groups) - size + 1, size):
        part = groups[i : i + size]
        yield part[0].start, part[-1].end, tuple(n for group in part for n in group.rows[0][2])


def _is_points(groups: list[_Group], brackets: str = "(") -> bool:
    return all(group.bracket in brackets and len(group.rows) == 1 and group.size == 2 for group in groups)


def _tagged(text: str, tag: str, run: list[_Group], nested: bool, label: str | None) -> Iterator[Reference]:
    name = _BOX_TAGS[tag]
    if name == "seed_point":
        if run[0].size == 2:
            yield from _boxes(name, run[:1], label)
        return
    if _is_points(run) or len(run) > 1 and _is_points(run, "(["):
        if name == "glm_begin_of_box":
            return  # a final answer, such as the point (3, 4)
        size = 4 if name == "qwenvl_quad" else 2
        if len(run) == 1 and text.startswith("<|box_end|>", run[0].end):
            yield from _boxes("uitars_box", run)
        elif len(run) % size == 0:
            for start, end, coords in _pairs(run, size):
                yield Reference(name, start, end, coords, label)
        return
    boxes = [group for group in run if group.size == 4]
    if tag == "<box>":
        name = "internvl_ref_box" if nested else "treevgr_box"
    elif name == "glm_begin_of_box" and not nested and max(boxes[0].rows[0][2] if boxes else (0,)) <= 20:
        return  # a final answer that is a short list
    elif name == "qwenvl_quad":
        return
    yield from _boxes(name, boxes, label)


def _keyed(text: str, key: str, run: list[_Group]) -> Iterator[Reference]:
    boxes = [group for group in run if group.size == 4]
    if _is_points(run, "([") and len(run) in (2, 4) and key in _BOX_KEYS - _POINT_LISTS:  # two corners, or all four
        (start, end, coords) = next(_pairs(run, len(run)))
        yield Reference(_json_name(text, key, start), start, end, coords, _json_label(text, start, end))
    elif boxes and key in _BOX_KEYS:
        for group in boxes:
            name = _json_name(text, key, group.start)
            yield from _boxes(name, [group], _json_label(text, group.start, group.end))
    elif key in _POINT_KEYS:
        for group in run:
            if group.size == 2:
                yield from _boxes(_point_name(key), [group], _json_label(text, group.start, group.end))


def _point_name(key: str) -> str:
    if key in ("startbox", "endbox", "startpoint", "endpoint"):
        return "uitars_box"
    return "gui_coordinate" if key == "coordinate" else "point_2d_json"


def _json_name(text: str, key: str, start: int) -> str:
    if key in ("box2d", "boxes2d"):
        return "gemini_box_2d"
    if key in ("startbox", "endbox"):
        return "uitars_region"
    if key == "position":
        return "visual_rft_json"
    low = max(0, start - 300)
    tool = text.rfind("tool_call>", low, start)
    if tool > 0 and text[tool - 1] == "<":
        return "pixel_reasoner_tool_call" if text.find("crop_image", tool, start) >= 0 else "deepeyes_tool_call"
    if text.rfind("[TOOL_CALL]", low, start) >= 0:
        return "qwen_tool_call"
    if text.rfind("<|begin_of_box|>", low, start) > text.rfind("<|end_of_box|>", low, start):
        return "glm_begin_of_box"
    return "bbox_2d_json"


# --- Boxes and points in prose ---

# Words that announce a place in the image, and words that announce some other list of numbers. A strong word decides;
# between two weak words, the later one decides. Words are matched by their first five letters, or whole if shorter.
_STRONG = frozenset(
    "bbox bboxe bound box boxes regio crop cropp zoom zoome zooms pixel click tap taps tappi detec".split()
)
_WEAK = frozenset("locat posit coord area areas corne objec marke spot spots situa place groun".split())
_OTHER = frozenset(
    "inter domai range funct equat matri vecto verte verti slope parab line axis plane trian circl origi polyn root "
    "roots "
    "solut softm proba logit distr score weigh array list lists seque set sets data datas value mean media avera sum "
    "year "
    "years tenso shape outpu ratio numbe tuple dimen integ size graph pair pairs forma examp ".split()
)
_WORD = re.compile(r"[a-z]+")
_ZH_STRONG = re.compile("边界框|检测|区域|像素|点击|裁剪|框")
_ZH_WEAK = re.compile("坐标|位置|位于|目标|处")
_ZH_OTHER = re.compile("区间|函数|矩阵|概率|数列|数据|列表|向量|直线|方程|抛物线|集合|格式|例如|年份|点[A-Z]?$")
_MATH_BEFORE = re.compile(r"[=$\\^+*/∈∪∩<≤]\s*$|\b[A-Z]'?\s?$")
_MATH_AFTER = re.compile(r"\s*(?:[$\\^+*/∈∪∩=]|-\s*[0-9(\[])")


def _wanted(text: str, head: int, end: int, size: int) -> bool | None:
    """Whether the words around a group announce a place in the image (True), something else (False), or neither."""
    if _MATH_AFTER.match(text, end, end + 8) or _MATH_BEFORE.search(text[max(0, head - 8) : head]):
        return False
    before = text[max(text.rfind("\n\n", max(0, head - 140), head), head - 140, 0) : head]
    lower = before.lower()
    if "format" in lower[-40:] or "e.g" in lower[-12:] or "example" in lower[-30:] or "格式" in lower[-12:]:
        return False
    weak = -1
    other = len(lower) if lower.rstrip().endswith(" in") else -1  # "x in [2, 5]"
    for i, word in enumerate(_WORD.findall(lower)):
        stem = word[:5]
        if stem in _STRONG:
            return True
        if stem in _WEAK:
            weak = i
        elif stem in _OTHER:
            other = i
    if not before.isascii():
        if _ZH_STRONG.search(before):
            return True
        if _ZH_OTHER.search(before):
            return False
        weak = 0 if _ZH_WEAK.search(before) else weak
    if weak < 0 and other < 0:
        # "a cup at [40, 60, 90, 120]"; for a pair of numbers "at" is not enough, functions have values at points.
        return True if size == 4 and lower.rstrip().endswith((" at", "(at")) else None
    return weak > other


def _is_data(label: str, numbers: list[float]) -> bool:
    """Whether numbers after a name are sorted data: increasing throughout, and small or with several names.

    The numbers of a box can increase too, if its size exceeds its distance from the corner.
    """
    rises = all(a < b for a, b in zip(numbers, numbers[1:], strict=False))
    return rises and (numbers[-1] < 100 or label.endswith("s"))


_NO_NAME = frozenset(
    "is are was were be to of get gets give gives have has with and or from by between equals equal answer answers "
    "result i we it they numbers these those following then than for as the a an that this".split()
)
"""Words that do not name an object even if they are directly before a box."""
_MALFORMED_NEXT = re.compile(r"\s*[,;]?\s*[\[(][0-9]")


def _bare(text: str, run: list[_Group], head: int, outer: str) -> Iterator[Reference]:
    """Groups in prose: a box or point needs an announcing word, a name right before it, or a line of its own."""
    first, last = run[0], run[-1]
    sizes = {group.size for group in run}
    if len(sizes) > 1 or not sizes <= {2, 4}:
        return
    numbers = [n for group in run for *_, row in group.rows for n in row]
    largest = max(numbers)
    whole = all(n.is_integer() and n >= 0 for n in numbers)
    unit = not whole and largest <= 1 and min(numbers) >= 0
    # Most bracketed pairs are small numbers in mathematics: return before reading the words.
    if sizes == {2} and not unit and (largest <= 20 or not whole):
        return
    # An unknown tag, or a neighbour that is not a number group, means a broken format rather than prose.
    if text[max(0, head - 1) : head] == ">" and not text[max(0, head - 12) : head].endswith(_REGION_ENDS):
        return
    if _MALFORMED_NEXT.match(text, last.end, last.end + 8):
        return
    wanted = _wanted(text, head, last.end, max(sizes))
    if wanted is False:
        return
    line_start = not text[max(0, head - 200) : head].rpartition("\n")[2].strip(" \t`-*•'\"{")
    line_start = line_start or text[max(0, head - 12) : head].endswith(_REGION_ENDS)
    ticked = text[max(0, head - 1) : head] == "`"
    label = _words_before(text, head)
    glued = text[first.start - outer.count("[") - 1 : first.start - outer.count("[")].isalpha()
    placed = wanted or line_start or ticked or label is not None

    if _is_points(run):
        if len(run) == 2:
            if whole and placed and (largest >= 30 or wanted):
                start, end, coords = next(_pairs(run, 2))
                yield Reference("qwen_stripped_pair", start, end, coords, label)
        elif len(run) == 1 and whole and (wanted or label and not glued and largest >= 100):
            yield from _boxes("bare_point", run, label)
        return
    # "The red car (120, 40, 380, 210)": in round brackets a box needs a name and the size of one.
    named = sizes == {4} and whole and label and len(label.split()[-1]) >= 3 and largest >= 100
    if any(group.bracket == "(" for group in run) and not (wanted or named):
        return
    if sizes == {2}:
        if wanted or unit and glued:
            yield from _boxes("shikra_norm_point" if unit else "bare_point", run, label)
        return

    if not placed:
        return
    if unit:
        rows = [row for group in run for *_, row in group.rows]
        if wanted or not any(abs(sum(row) - 1) < 0.02 for row in rows):  # else a row of probabilities
            yield from _boxes("llava_shikra_norm", run, label)
        return
    if not wanted:
        if largest <= 20 or all(1800 <= n <= 2100 for n in numbers):
            return  # a short list of small numbers, or years
        prose = not (glued or ticked or "[" in outer)
        if label and prose and (label.split()[-1].lower() in _NO_NAME or _is_data(label, numbers)):
            return  # "the answer is [..]", "ages [12, 15, 18, 20]"
    if "[" in outer:
        padded = any(_PADDED.search(group.body) or len(group.rows) > 1 for group in run)
        name = "cogvlm_box" if padded else "internvl_stripped"
    elif text.rfind("<answer>", max(0, head - 200), head) >= 0 and "{" in text[max(0, head - 60) : head]:
        name = "vlm_r1_answer"
    else:
        name = "bare_untagged"
    yield from _boxes(name, run, label)


_PADDED = re.compile(r"\b0[0-9]{2}\b")
_REGION_ENDS = ("<think>", "</think>", "<answer>", "<rethink>", "</rethink>")


# --- All of them ---

_SCANNERS = (
    (("<loc",), _scan_paligemma),
    (("<loc_",), _scan_florence),
    (("<patch_index_",), _scan_kosmos),
    (("<point",), _scan_points),
    (("data-bbox",), _scan_html),
    (("<bbox>", "<box>", "<point>", "<bbox_2d>", "<click>", "<|box_start|>", "<|det|>"), _scan_tag_numbers),
    (("y", "Y", "top"), _scan_named),
    ((":", "="), _scan_field_numbers),
    (("(",), _scan_clicks),
    (("]", ")"), _scan_groups),
)
"""(strings one of which a text must have, scanner)."""


def scan_coordinates(text: str) -> list[Reference]:
    """Every coordinate reference in text order, geometry unchecked. Full-width forms must already be ASCII."""
    found = []
    for triggers, scanner in _SCANNERS:
        if any(trigger in text for trigger in triggers):
            found.extend(scanner(text))
    found.sort(key=lambda reference: reference.start)
    # Who writes boxes y first writes points so too.
    if any(reference.format == "gemini_box_2d" for reference in found):
        found = [
            ref._replace(format="gemini_point") if ref.format in ("point_2d_json", "named_point") else ref
            for ref in found
        ]
    # GRIT puts several bbox_2d keys into one object: no brace between two boxes.
    for i in range(1, len(found)):
        first, second = found[i - 1], found[i]
        if second.format == "bbox_2d_json" and first.format in ("bbox_2d_json", "grit_dupkey_json"):
            between = text[first.end : second.start]
            if "bbox_2d" in between and "{" not in between and "}" not in between:
                found[i - 1 : i + 1] = [item._replace(format="grit_dupkey_json") for item in (first, second)]
    return found
