# SPDX-License-Identifier: Apache-2.0
"""Find errors in a data file before a training run does.

    avar data check train.parquet --model Qwen/Qwen2.5-VL-7B-Instruct --max-length 8192

A row is checked as the trainers read it: `kind` "sft" is `AvarSFTDataset`, "rl" is verl's `RLHFDataset`, which skips
rows that it cannot read and continues. Without a model no torch is imported; with one every row is rendered by its
processor (`plugin.datasets.check_rendered`). `CHECKS` lists the kinds of finding and how to fix them.
"""

import hashlib
import itertools
import json
import math
import multiprocessing
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

from PIL import Image
from rich.console import Console
from rich.table import Table

from avar_verl.data.images import layout_problem, load_image, pixel_notes, to_rgb
from avar_verl.data.messages import MEDIA, blocks_of, is_trained, other_keys, shown, turns_of
from avar_verl.data.rows import Paths, count_rows, data_files, read_rows
from avar_verl.rewards.accuracy import accepted_answers, answer_options, extract_answer, grade_answer
from avar_verl.rewards.expressions import MAX_MATH_CHARS

Kind = Literal["sft", "rl"]
COLUMN: dict[Kind, str] = {"sft": "messages", "rl": "prompt"}
LAST_ROLE = {"sft": "assistant", "rl": "user"}
# Roles that may follow a role; None is the start.
FOLLOWS = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}
MAX_RATIO = 200  # qwen_vl_utils.vision_process.MAX_RATIO, which both data sets ask for whatever the family.
DEFAULT_FACTOR = 28  # Patch size times merge size of Qwen2.5-VL, used without a model.
# Delimiters and placeholders of the known families, used without a tokenizer.
SPECIAL = re.compile(
    r"<\|(?:im_start|im_end|endoftext|image_pad|video_pad|vision_start|vision_end|vision_pad|begin_of_text|eot_id|"
    r"start_header_id|end_header_id|image|video|system|user|assistant|observation|startoftext)\|>|"
    r"<\|(?:turn|channel|image|audio)>|<(?:turn|channel|image|audio)\|>|"  # Gemma 4
    r"<(?:start_of_turn|end_of_turn|image_soft_token|IMG_CONTEXT|end_of_utterance)>"
)
CHUNK_ROWS = 16
SHOWN_ROWS = 5
QUANTILES = (0.5, 0.9, 0.99, 1.0)


@dataclass(frozen=True)
class Check:
    """A kind of finding. An error breaks training or changes what it trains on; warnings are for you to judge."""

    level: Literal["error", "warning"]
    fix: str


def _error(fix: str) -> Check:
    return Check("error", fix)


def _warning(fix: str) -> Check:
    return Check("warning", fix)


CHECKS: dict[str, Check] = {
    "file": _error("Write or download the file again."),
    "columns": _error("Name the conversation `messages` (SFT) or `prompt` (RL), or pass --kind."),
    "messages": _error("Write a list of structs with role and content, not JSON text."),
    "roles": _error("Order the turns: a system turn only at the start, then user and assistant alternately."),
    "content": _error("Write text with <image> for each image, or a list of text and image blocks."),
    "null_block": _error("Write text with <image>: parquet gives every block the keys of all blocks of its column."),
    "empty_turn": _error("Leave the row out."),
    "tool_calls": _error("Write the call, or the reasoning, into the content: AvarSFTDataset renders nothing else."),
    "flags": _error("Write loss_mask 0 or trainable false on assistant turns not to be trained on, and on no other."),
    "markers": _error("Name every image once with <image>, in order; spell a marker that is only meant differently."),
    "video": _error("Leave the row out: samples hold text and images."),
    "marker_in_response": _error("Take it out: no model writes images, and their tokens would be trained on."),
    "image": _error("Replace the image, or leave the row out."),
    "image_layout": _error('Write {"bytes": ...} in every row, or {"image": path} in every row.'),
    "image_layout_verl": _warning(
        "Fine for AvarSFTDataset and AvarRLDataset; verl's own data sets need "
        '{"bytes": ...} or {"image": path} in every row, and [] for none.'
    ),
    "image_ratio": _error("Crop or pad the image, or leave the row out."),
    "image_small": _warning("It is enlarged to one token a side: leave the row out if the image is a mistake."),
    "image_pixels": _warning("Save the image as RGB, turned as it is to be seen."),
    "boxes": _error("Give a list of (x1, y1, x2, y2) for every image, in pixels as stored, [] for the whole image."),
    "special_token": _error("Take it out, or spell it differently: it would end a turn or stand for an image."),
    "special_token_like": _warning("Check with --model whether the tokenizer has it as a token."),
    "data_source": _error("Name the data set in the column `data_source`."),
    "ground_truth": _error(
        'Write {"style": "rule", "ground_truth": the final answer alone} into the column `reward_model`; another style '
        "if your reward does not use the grader."
    ),
    "ground_truth_long": _warning("Shorten it: an answer must repeat it word for word."),
    "extra_info": _error("Write a struct, or leave the column out."),
    "no_system": _warning(
        "If the template adds no system turn either, a sample has no VAS, no L_suppress and, with "
        "the paper's ratio, no r_visual: give every row a system turn if you need them."
    ),
    "duplicate": _warning("Leave one of them out; in a train and a test file it is a leak."),
    "render": _error("Correct what the processor or the chat template refuses, or leave the row out."),
    "length": _error("Raise the limit, make the images smaller, or leave the row out."),
    "image_tokens": _error("Take processor and tokenizer from one checkpoint."),
    "responses": _error("Use a chat template that writes responses as they are, or rows as the template writes them."),
    "turns": _error("Use the chat template of the model: the turns it writes must be those of its family."),
}


@dataclass(frozen=True)
class Settings:
    """Settings of a check.

    Raises:
        ValueError: an unknown kind, or a limit that would not be used.
    """

    # auto: a file with a column `messages` is for SFT, one with `prompt` for RL.
    kind: Literal["sft", "rl", "auto"] = "auto"
    model: str | None = None  # Hugging Face folder or name, whose processor renders every row.
    max_length: int | None = None  # Most tokens of an SFT row, as data.max_length; needs a model.
    max_prompt_length: int | None = None  # Most tokens of an RL prompt, as data.max_prompt_length; needs a model.
    allow_urls: bool = False  # Fetch images from http(s).

    def __post_init__(self):
        if self.kind not in (*COLUMN, "auto"):
            raise ValueError(f"kind must be one of {[*COLUMN, 'auto']}; got {self.kind!r}. Name one.")
        for name, kind in (("max_length", "sft"), ("max_prompt_length", "rl")):
            value = getattr(self, name)
            if value is not None and (self.model is None or self.kind not in (kind, "auto")):
                raise ValueError(
                    f"{name} counts a processor's tokens of {kind} rows; got {value} with model={self.model!r} and "
                    f"kind={self.kind!r}. Name the model and the kind, or leave it out."
                )


@dataclass(frozen=True)
class Finding:
    """One failed check. `row` counts from 0 in `file`; None means the whole file."""

    file: str
    row: int | None
    check: str
    message: str

    @property
    def level(self) -> str:
        return CHECKS[self.check].level

    def as_dict(self) -> dict[str, Any]:
        """Its fields with `level` and `fix`."""
        return {**asdict(self), "level": self.level, "fix": CHECKS[self.check].fix}


@dataclass
class RowResult:
    """Result of one row: (check, message) pairs, counts, and a digest of its turns and pixels if they are valid."""

    findings: list[tuple[str, str]] = field(default_factory=list)
    num_images: int = 0
    num_tokens: int | None = None
    digest: bytes | None = None

    def add(self, check: str, message: str) -> None:
        assert check in CHECKS
        self.findings.append((check, message))

    @property
    def errors(self) -> list[tuple[str, str]]:
        return [(check, message) for check, message in self.findings if CHECKS[check].level == "error"]


def check_messages(messages: Any, kind: Kind, result: RowResult) -> list[dict[str, Any]] | None:
    """Form, roles, content and empty turns. Returns the turns with blocks as content, None if unreadable."""
    check, turns = "messages", []
    try:
        for turn in turns_of(messages, COLUMN[kind]):
            check = "content"
            # verl's data set for RL hands every key to the template.
            kept = {key: value for key, value in turn.items() if value is not None or kind == "rl"}
            turns.append({**kept, "content": blocks_of(turn["content"], markers=True)})
    except ValueError as error:
        result.add(check, f"turn {len(turns)}: {error}" if check == "content" else str(error))
        return None
    roles = [turn["role"] for turn in turns]
    for before, role in itertools.pairwise([None, *roles]):
        if role not in FOLLOWS[before]:
            where = "first" if before is None else f"after {before}"
            result.add("roles", f"{' or '.join(FOLLOWS[before])} must come {where}; got {shown(roles)}.")
            break
    else:
        if roles[-1] != LAST_ROLE[kind]:
            result.add("roles", f"the last turn of {kind} must be the {LAST_ROLE[kind]}'s; got {shown(roles)}.")
    for number, turn in enumerate(turns):
        silent = not any(block["type"] != "text" or block["text"].strip() for block in turn["content"])
        if kind == "sft" and (others := other_keys(turn)):
            result.add("tool_calls", f"a turn must have a role and content and nothing else; got {others}.")
        # An empty system turn stops a template from adding its own; a tool, or a turn that calls one, may be empty.
        if silent and turn["role"] in ("user", "assistant") and not turn.get("tool_calls"):
            what = "response" if turn["role"] == "assistant" else f"{turn['role']} turn"
            text = messages[number]["content"]
            result.add("empty_turn", f"a {what} must say something; got {text!r} as turn {number}.")
    if kind == "sft":
        try:
            if not any([is_trained(turn) for turn in turns]):
                result.add("flags", f"a row must have a turn that is trained on; got none of {shown(roles)}.")
        except ValueError as error:
            result.add("flags", str(error))
    return turns


def check_media(values: dict, turns: list[dict], kind: Kind, result: RowResult) -> list[Any]:
    """Markers and blocks against the columns `images` and `videos`. Returns the stored images of the row."""
    stored = {}
    for name, column in MEDIA.items():
        if not isinstance(values.get(column) or [], list):
            result.add("image_layout", f"`{column}` must be a list; got {shown(values[column])}.")
        stored[name] = values[column] if isinstance(values.get(column), list) else []
    if kind == "sft" and "images" in values and values["images"] is None:
        result.add("image_layout_verl", "`images` is null.")
    markers, own = Counter(), {"image": [], "video": []}
    for written, turn in zip(values[COLUMN[kind]], turns, strict=True):
        holds_own = kind == "rl" and not isinstance(written["content"], str)  # verl does not change such content.
        for block in turn["content"]:
            medium = block["type"]
            if medium == "text":
                continue
            if turn["role"] == "assistant":
                result.add("marker_in_response", f"a response must be text; got <{medium}> in it.")
            if not holds_own:
                markers[medium] += 1
            elif isinstance(block.get(medium), str | list):
                own[medium].append(block[medium])
            else:
                result.add("image_layout", f"in RL a block must hold its {medium} as a path; got {shown(block)}.")
        if holds_own:
            texts = [block for block in written["content"] if block["type"] == "text"]
            if keys := {key for block in texts for key in block.keys() & MEDIA.keys()}:
                result.add("null_block", f"a text block with a key of images counts as an image; got {sorted(keys)}.")
    if num_videos := len(stored["video"] + own["video"]):
        result.add("video", f"got {num_videos} videos.")
    for name, column in MEDIA.items():
        if markers[name] != len(stored[name]):
            result.add(
                "markers",
                f"<{name}> must occur once for each of `{column}`; got {markers[name]} for {len(stored[name])}.",
            )
    return stored["image"] + own["image"]


def check_special_tokens(turns: list[dict], special_tokens: Sequence[str], result: RowResult) -> None:
    """Delimiters and placeholders of a tokenizer in the text of turns."""
    for turn in turns:
        for block in turn["content"]:
            for token in special_tokens:
                if token in block.get("text", ""):
                    result.add("special_token", f"text must not spell {token!r}; got it in a {turn['role']} turn.")


def _numbers(value: Any, count: int) -> bool:
    return isinstance(value, list) and len(value) == count and all(isinstance(x, int | float) for x in value)


def _box_problem(box: Any, size: Sequence[float]) -> str | None:
    if not _numbers(box, 4):
        return f"a box must be four numbers (x1, y1, x2, y2); got {shown(box)}."
    x1, y1, x2, y2 = box
    # Also false where one is not a number.
    if not (0 <= x1 < x2 <= size[0] and 0 <= y1 < y2 <= size[1]):
        return f"a box must have positive area inside the image; got {box} in {size[0]} x {size[1]}."
    return None


def check_boxes(boxes: Any, sizes: Sequence[Sequence[float]], result: RowResult) -> None:
    """`boxes` must have one list of boxes per image; `sizes` has the (width, height) of each."""
    if not isinstance(boxes, list) or not all(isinstance(of_image, list) for of_image in boxes):
        result.add("boxes", f"boxes must be one list for every image; got {shown(boxes)}.")
    elif len(boxes) != len(sizes):
        result.add("boxes", f"boxes must be one list for every image; got {len(boxes)} for {len(sizes)} images.")
    else:
        pairs = ((box, size) for of_image, size in zip(boxes, sizes, strict=True) for box in of_image)
        for problem in filter(None, itertools.starmap(_box_problem, pairs)):
            result.add("boxes", problem)


def check_rl(values: dict, num_images: int, result: RowResult) -> None:
    """Columns that rewards and verl's data set read in addition to the prompt."""
    source = values.get("data_source")
    if not isinstance(source, str) or not source:
        result.add("data_source", f"`data_source` must be text; got {source!r}.")
    info = values.get("extra_info")
    model = values.get("reward_model")
    truth = model.get("ground_truth") if isinstance(model, dict) else None
    missing = math.isnan(truth) if isinstance(truth, float) else truth is None or truth in ([], {})
    if missing or (isinstance(truth, str) and not truth.strip()):
        result.add("ground_truth", f"`reward_model` must have a ground_truth; got {shown(model)}.")
    elif (
        isinstance(model, dict) and model.get("style", "rule") == "rule"
    ):  # verl's name for what the grader of the rewards grades.
        try:
            options = answer_options(info if isinstance(info, dict) else None, "this row")
            for answer in accepted_answers(truth, "this row", options):
                found = extract_answer(f"<answer>{answer}</answer>")
                if found is None or not grade_answer(found, [answer], options):
                    result.add("ground_truth", f"the reward must accept the ground_truth itself; got {answer!r}.")
                if len(answer) > MAX_MATH_CHARS:
                    result.add("ground_truth_long", f"more than {MAX_MATH_CHARS} characters are compared as text only.")
        except (TypeError, ValueError) as error:
            result.add("ground_truth", str(error))
    if info is not None and not isinstance(info, dict):
        result.add("extra_info", f"`extra_info` must be a struct; got {shown(info)}.")
    elif info and info.get("boxes") is not None and (num_images or info["boxes"]):
        size: Any = info.get("boxes_size")
        if _numbers(size, 2) and num_images == 1:
            check_boxes([info["boxes"]], [size], result)
        else:
            result.add(
                "boxes",
                "extra_info['boxes'] must be of the one image of a row, and extra_info['boxes_size'] its (width, "
                f"height); got {num_images} images and {size!r}.",
            )


def _digest(messages: list[dict], images: Iterable[Image.Image]) -> bytes:
    out = hashlib.blake2b(json.dumps(messages, sort_keys=True, default=repr).encode(), digest_size=16)
    for image in images:
        out.update(repr(image.size).encode() + image.tobytes())
    return out.digest()


class Rendering(Protocol):
    """Renders rows with the processor of a model: `plugin.datasets.check_rendered.Rendering`.

    special_tokens: tokens that text must not contain.
    factor: side of one token in pixels, if known.
    """

    special_tokens: tuple[str, ...]
    factor: int | None

    def __call__(
        self,
        values: dict[str, Any],
        turns: list[dict],
        stored: list[Any],
        images: list[Image.Image],
        kind: Kind,
        result: RowResult,
    ) -> None: ...


# Loads the model of the settings. A module-level function or class, because processes of a pool get it by name.
LoadRendering = Callable[[Settings], Rendering]


class RowChecker:
    """`RowChecker(settings, load_rendering)(values, kind)` -> what is wrong with one row, as `RowResult`.

    Raises:
        ValueError: a model without `load_rendering`, or anything that it raises.
    """

    def __init__(self, settings: Settings, load_rendering: LoadRendering | None = None):
        self.settings = settings
        self.rendering = None
        if settings.model is not None:
            if load_rendering is None:
                raise ValueError(
                    f"rows are rendered by load_rendering; got model={settings.model!r} without it. Pass "
                    "avar_verl.plugin.datasets.check_rendered.Rendering."
                )
            self.rendering = load_rendering(settings)

    def __call__(self, values: dict[str, Any], kind: Kind) -> RowResult:
        result = RowResult()
        messages: Any = values.get(COLUMN[kind])
        turns = check_messages(messages, kind, result)
        stored = [] if turns is None else check_media(values, turns, kind, result)
        result.num_images = len(stored)
        if kind == "rl":
            check_rl(values, len(stored), result)
        if turns is None:
            return result
        self._check_text(turns, result)
        images = self._open(stored, kind, result)
        if len(images) < len(stored):
            return result
        if kind == "sft" and "boxes" in values:
            check_boxes(values["boxes"] if images else values["boxes"] or [], [i.size for i in images], result)
        result.digest = _digest(messages, images)
        if self.rendering is None and messages[0]["role"] != "system":
            result.add("no_system", "there is no system turn.")
        if self.rendering is not None and not result.errors:
            self.rendering(values, turns, stored, images, kind, result)
        return result

    def _check_text(self, turns: list[dict], result: RowResult) -> None:
        if self.rendering is not None:
            return check_special_tokens(turns, self.rendering.special_tokens, result)
        for turn in turns:
            for block in turn["content"]:
                for token in sorted(set(SPECIAL.findall(block.get("text", "")))):
                    result.add("special_token_like", f"text spells {token!r} in a {turn['role']} turn.")

    def _open(self, stored: list[Any], kind: Kind, result: RowResult) -> list[Image.Image]:
        """The images that can be opened, in RGB."""
        factor = self.rendering.factor if self.rendering else DEFAULT_FACTOR
        images = []
        for number, value in enumerate(stored):
            try:
                loaded = load_image(value, allow_urls=self.settings.allow_urls)
                image = to_rgb(loaded, bare=isinstance(value, Image.Image))
            except ValueError as error:
                result.add("image", f"image {number}: {error}")
                continue
            images.append(image)
            problem = layout_problem(value, kind)
            if problem:
                result.add("image_layout_verl", f"image {number} is {problem}.")
            short, long = sorted(image.size)
            if long > MAX_RATIO * short:
                result.add(
                    "image_ratio", f"a side may be {MAX_RATIO} times the other; got {image.size} of image {number}."
                )
            elif factor is not None and short < factor:
                result.add(
                    "image_small",
                    f"a side has fewer than the {factor} pixels of a token; got {image.size} of image {number}.",
                )
            for note in pixel_notes(loaded):
                result.add("image_pixels", f"image {number} has {note}.")
        return images


@dataclass
class Report:
    """Result of checking files: rows of each kind, images and tokens of every row, and the findings."""

    files: list[str]
    rows: Counter = field(default_factory=Counter)
    num_images: list[int] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    def count(self, level: str) -> int:
        """Findings of a level, "error" or "warning"."""
        return sum(finding.level == level for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        with_images = sum(number > 0 for number in self.num_images)
        return {
            "files": self.files,
            "rows": dict(self.rows),
            "rows_with_images": with_images,
            "rows_text_only": len(self.num_images) - with_images,
            "images_per_row": _quantiles(self.num_images, (0.0, 0.5, 1.0)),
            "tokens_per_row": _quantiles(self.num_tokens, QUANTILES),
            "errors": self.count("error"),
            "warnings": self.count("warning"),
            "findings": [finding.as_dict() for finding in self.findings],
        }

    def print(self, console: Console) -> None:
        """Print one line of numbers, and a table with one line per check that found something."""
        numbers = self.as_dict()
        rows = ", ".join(f"{count} {kind}" for kind, count in self.rows.items()) or "no"
        console.print(
            f"{rows} rows: {numbers['rows_with_images']} with images, {numbers['rows_text_only']} text only; images a "
            f"row {_line(numbers['images_per_row'])}"
        )
        if self.num_tokens:
            console.print(f"tokens a row {_line(numbers['tokens_per_row'])}")
        by_check: dict[str, list[Finding]] = {}
        for finding in sorted(self.findings, key=lambda finding: finding.level):
            by_check.setdefault(finding.check, []).append(finding)
        if by_check:
            table = Table("check", "level", "found", "rows", "first finding, and how to fix it")
            for check, findings in by_check.items():
                table.add_row(
                    check,
                    findings[0].level,
                    str(len(findings)),
                    self._where(findings),
                    f"{findings[0].message}\n-> {CHECKS[check].fix}",
                )
            console.print(table, markup=False)
        console.print(f"{self.count('error')} errors, {self.count('warning')} warnings")

    def _where(self, findings: list[Finding]) -> str:
        """The first rows, with their files if there are several."""
        places = dict.fromkeys((finding.file, finding.row) for finding in findings)
        shown = []
        for file, row in itertools.islice(places, SHOWN_ROWS):
            name = file.rsplit("/", 1)[-1] if len(self.files) > 1 or row is None else ""
            shown.append(":".join(filter(None, (name, "" if row is None else str(row)))))
        return "\n".join(shown) + ("\n..." if len(places) > SHOWN_ROWS else "")


def _quantiles(values: list[int], at: Sequence[float]) -> dict[str, int]:
    """Nearest-rank quantiles, {} if empty; 0 is the smallest value, 0.5 the median, 1 the largest."""
    names = {0.0: "min", 0.5: "median", 1.0: "max"}
    ordered = sorted(values)
    return {
        names.get(share, f"p{share * 100:.0f}"): ordered[max(0, math.ceil(share * len(ordered)) - 1)]
        for share in at
        if ordered
    }


def _line(quantiles: dict[str, int]) -> str:
    return ", ".join(f"{name} {value}" for name, value in quantiles.items()) or "none"


# A row to be checked: file, number, kind, values.
_Task = tuple[str, int, Kind, dict[str, Any]]


def _kind_of(values: dict[str, Any]) -> Kind:
    found: list[Kind] = [kind for kind, column in COLUMN.items() if column in values]
    if len(found) == 2:  # Some data sets have both; only RL needs a reference answer.
        return "rl" if "reward_model" in values else "sft"
    if not found:
        raise ValueError(f"a row must have one of the columns {list(COLUMN.values())}; got {sorted(values)}.")
    return found[0]


def _tasks(files: Sequence, settings: Settings, report: Report) -> Iterator[_Task]:
    """The rows of all files; a file that cannot be read becomes a finding."""
    for file in files:
        kind = None if settings.kind == "auto" else settings.kind
        try:
            for row in read_rows(file):
                if kind is None:
                    try:
                        kind = _kind_of(row.values)
                    except ValueError as error:
                        report.findings.append(Finding(str(file), None, "columns", str(error)))
                        break
                yield str(file), row.number, kind, row.values
        except ValueError as error:
            report.findings.append(Finding(str(file), None, "file", str(error)))


_checker: RowChecker  # Of a process of the pool.


def _start_worker(settings: Settings, load_rendering: LoadRendering | None) -> None:
    global _checker
    if settings.model is not None:
        import torch

        torch.set_num_threads(1)  # The processes share the cores.
    _checker = RowChecker(settings, load_rendering)


def _check_chunk(chunk: list[_Task]) -> list[RowResult]:
    return [_checker(values, kind) for _, _, kind, values in chunk]


def _results(
    tasks: Iterator[_Task], checker: RowChecker, load_rendering: LoadRendering | None, processes: int
) -> Iterator[tuple[_Task, RowResult]]:
    if processes == 1:
        for task in tasks:
            yield task, checker(task[3], task[2])
        return
    # Not forked, because torch may run threads here. Only a few chunks are in flight, so that files are not read ahead.
    context = multiprocessing.get_context("spawn")
    under_way: deque = deque()
    with ProcessPoolExecutor(processes, context, _start_worker, (checker.settings, load_rendering)) as pool:
        chunks = iter(lambda: list(itertools.islice(tasks, CHUNK_ROWS)), [])
        for chunk in itertools.chain(chunks, itertools.repeat(None, 2 * processes)):
            if chunk is not None:
                under_way.append((chunk, pool.submit(_check_chunk, chunk)))
            if under_way and (chunk is None or len(under_way) == 2 * processes):
                done, future = under_way.popleft()
                yield from zip(done, future.result(), strict=True)


def check_files(
    paths: Paths,
    settings: Settings,
    load_rendering: LoadRendering | None = None,
    *,
    n: int = 0,
    processes: int = 1,
    progress: Callable[..., Iterable] = lambda results, *_, **__: results,
) -> Report:
    """Check the rows of files or folders.

    Args:
        load_rendering: `plugin.datasets.check_rendered.Rendering`, for settings with a model.
        n: only the first n rows of all files together; 0 for all.
        processes: number of parallel processes.
        progress: a bar around the results, such as `tools.progress.progress`.

    Raises:
        ValueError: a missing file, a model that cannot be loaded, or less than one process.
    """
    if processes < 1:
        raise ValueError(f"processes must be at least 1; got {processes}. Use 1.")
    files = data_files(paths)
    checker = RowChecker(settings, load_rendering)  # With a pool too, so that an invalid model is reported once.
    report = Report([str(file) for file in files])
    tasks: Iterator[_Task] = _tasks(files, settings, report)
    total = count_rows(files)
    if n:
        tasks = itertools.islice(tasks, n)
        total = n if total is None else min(n, total)
    first: dict[bytes, tuple[str, int]] = {}
    results = _results(tasks, checker, load_rendering, processes)
    for (file, number, kind, _), result in progress(results, "check", total=total, unit="row"):
        report.rows[kind] += 1
        report.num_images.append(result.num_images)
        if result.num_tokens is not None:
            report.num_tokens.append(result.num_tokens)
        report.findings += [Finding(file, number, check, message) for check, message in result.findings]
        if result.digest is not None:
            seen = first.setdefault(result.digest, (file, number))
            if seen != (file, number):
                report.findings.append(
                    Finding(file, number, "duplicate", f"the same turns and images as row {seen[1]} of {seen[0]}.")
                )
    return report
