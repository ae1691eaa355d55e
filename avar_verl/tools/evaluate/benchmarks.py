# SPDX-License-Identifier: Apache-2.0
"""The seven benchmarks of the paper: their sources, prompts and accepted answers.

A benchmark is one file of `tasks/`: data set, revision, number of items and the prompt as a Jinja template. What a
template cannot express (image columns, the right answer) is one function of `READERS`. Prompts follow the task
definitions of lmms-eval 0.7.3, named in `upstream`; docs/eval.md lists the differences, and a test checks them.
"""

import ast
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment

from avar_verl.data.messages import IMAGE
from avar_verl.rewards.accuracy import accepted_answers
from avar_verl.rewards.choices import LETTERS
from avar_verl.tools.questions import Question
from avar_verl.tools.report import environment

TASK_DIR = Path(__file__).parent / "tasks"
INSTRUCTION = (
    "\nFirst reason step by step inside <think> </think> tags, looking back at the image where you use it. "
    "Then give the final answer inside <answer> </answer> tags."
)
"""Ends every prompt of a benchmark: the grader reads marked answers, and the models are trained with these words."""

PARTS = {"mmmu_pro": ("mmmu_pro_standard", "mmmu_pro_vision")}
"""Benchmarks that are the mean of several tasks."""

NAMES = ("mathvista", "mathvision", "mathverse_vo", "mmmu_val", "mmmu_pro", "mmstar", "hallusionbench")
"""The paper's benchmarks, in its order."""

COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Benchmark:
    """One file of `tasks/`."""

    name: str
    """Of the file."""

    title: str
    """Name and split, for display."""

    dataset: str
    """On the Hugging Face hub."""

    config: str | None
    """Configuration of the data set; null if it has only one."""

    split: str
    """Of the data set."""

    revision: str
    """Commit, or a branch whose commit is looked up on the hub and stored in the results."""

    num_items: int
    """Rows of the split; any other number is an error."""

    max_images: int
    """Largest number of images of an item."""

    upstream: str
    """Task of lmms-eval 0.7.3 that the prompt follows."""

    prompt_version: int
    """Changes with the prompt."""

    prompt: str
    """Jinja template over `doc` (the row), `options`, `lettered(list)` and `fail(reason)`; `INSTRUCTION` follows."""

    def prompt_id(self) -> str:
        """Version and SHA-256 (12 digits) of all prompt text that does not come from the row."""
        return f"v{self.prompt_version}-{hashlib.sha256((self.prompt + INSTRUCTION).encode()).hexdigest()[:12]}"


def load_benchmark(name: str) -> Benchmark:
    """Read a file of `tasks/`.

    Raises:
        ValueError: an unknown benchmark, or a file whose fields are not those of `Benchmark`.
    """
    path = TASK_DIR / f"{name}.yaml"
    known = sorted(file.stem for file in TASK_DIR.glob("*.yaml"))
    if name not in known:
        raise ValueError(f"--tasks must name benchmarks among {[*known, *PARTS]}; got {name!r}. For a file use --data.")
    values = {"name": name, **yaml.safe_load(path.read_text())}
    wanted = [field.name for field in fields(Benchmark)]
    if sorted(values) != sorted(wanted):
        raise ValueError(f"{path} must have the fields {wanted[1:]}; got {sorted(values)}. Correct the file.")
    return Benchmark(**values)


def expand(names: str) -> list[str]:
    """Tasks of a comma-separated list of benchmarks ("all": the paper's). Benchmarks with parts become their parts."""
    names = ",".join(NAMES) if names == "all" else names
    tasks = [task for name in names.split(",") if name for task in PARTS.get(name, (name,))]
    if not tasks or len(set(tasks)) < len(tasks):
        raise ValueError(f"--tasks must name benchmarks, each once; got {names!r}. The paper's: {','.join(NAMES)}.")
    return tasks


# ---- rows ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """Result of reading a row; `images` are columns, in the order of the prompt's placeholders."""

    id: str
    images: tuple[str, ...]
    ground_truth: tuple[str, ...]
    options: tuple[str, ...] = ()
    groups: Mapping[str, str] = ()


def _options(doc: Mapping[str, Any]) -> tuple[str, ...]:
    """Options that the data set stores as the text of a Python list."""
    options = ast.literal_eval(doc["options"]) if isinstance(doc["options"], str) else doc["options"]
    return tuple(str(option) for option in options)


def _mathvista(doc: Mapping[str, Any]) -> Reading:
    if doc["question_type"] != "multi_choice":
        return Reading(str(doc["pid"]), ("decoded_image",), (doc["answer"],))
    choices = tuple(doc["choices"])
    if choices.count(doc["answer"]) != 1:
        raise ValueError(f"the answer must be one of the choices; got {doc['answer']!r} for {choices}.")
    return Reading(str(doc["pid"]), ("decoded_image",), (LETTERS[choices.index(doc["answer"])],), choices)


def _mathvision(doc: Mapping[str, Any]) -> Reading:
    return Reading(str(doc["id"]), ("decoded_image",), (doc["answer"],), tuple(doc["options"]))


def _mathverse(doc: Mapping[str, Any]) -> Reading:
    return Reading(str(doc["sample_index"]), ("image",), (doc["answer"],))


def _numbered_images(text: str) -> tuple[str, ...]:
    """Image columns in the order of `<image 1>` ... in a prompt; an image that is named twice appears twice."""
    return tuple(f"image_{number}" for number in re.findall(r"<image (\d+)>", text))


def _mmmu(doc: Mapping[str, Any]) -> Reading:
    options = _options(doc)
    if doc.get("question_type", "multiple-choice") == "multiple-choice":
        return Reading(doc["id"], _numbered_images(doc["question"] + " ".join(options)), (doc["answer"],), options)
    answer = doc["answer"]
    several = ast.literal_eval(answer) if answer.startswith("[") else [answer]
    return Reading(doc["id"], _numbered_images(doc["question"]), tuple(several))


def _mmmu_pro_vision(doc: Mapping[str, Any]) -> Reading:
    return Reading(doc["id"], ("image",), (doc["answer"],), _options(doc))


def _mmstar(doc: Mapping[str, Any]) -> Reading:
    return Reading(str(doc["index"]), ("image",), (doc["answer"],))


def _hallusionbench(doc: Mapping[str, Any]) -> Reading:
    # lmms_eval/tasks/hallusion_bench/evaluate_hb.py, hb_aggregation_result_intern: a figure with all of its questions
    # (fAcc), a question with all of its figures (qAcc).
    part = f"{doc['category']}_{doc['subcategory']}_{doc['set_id']}"
    figure, question = f"{part}_{doc['figure_id']}", f"{part}_{doc['question_id']}"
    yes_or_no = {"0": "no", "1": "yes"}[str(doc["gt_answer"])]
    groups = {"fAcc": figure, "qAcc": question}
    return Reading(f"{figure}_{doc['question_id']}", ("image",), (yes_or_no,), groups=groups)


READERS: dict[str, Callable[[Mapping[str, Any]], Reading]] = {
    "mathvista": _mathvista,
    "mathvision": _mathvision,
    "mathverse_vo": _mathverse,
    "mmmu_val": _mmmu,
    "mmmu_pro_standard": _mmmu,
    "mmmu_pro_vision": _mmmu_pro_vision,
    "mmstar": _mmstar,
    "hallusionbench": _hallusionbench,
}


# ---- prompts ---------------------------------------------------------------------------------------------------------


def _fail(reason: str) -> None:
    raise ValueError(f"a prompt must fit its row; got a row for which {reason}. Leave it out.")


@cache
def _environment() -> Environment:
    prompts = environment(html=False)
    prompts.globals |= {"lettered": lambda options: list(zip(LETTERS, options, strict=False)), "fail": _fail}
    return prompts


def question_text(benchmark: Benchmark, doc: Mapping[str, Any]) -> str:
    """The prompt of a row, without `INSTRUCTION`, images as `<image>`."""
    options = _options(doc) if "options" in doc else ()
    text = _environment().from_string(benchmark.prompt).render(doc=doc, options=options).strip()
    return re.sub(r"<image \d+>", IMAGE, text)


def make_item(benchmark: Benchmark, doc: Mapping[str, Any]) -> Question:
    """The item of a row, whose images are `{"bytes": ...}`.

    Raises:
        ValueError: an answer that is not an option, or images that do not match the placeholders; the message names the
            item.
    """
    reading = READERS[benchmark.name](doc)
    where = f"item {reading.id} of {benchmark.name}"
    truth = tuple(accepted_answers(list(reading.ground_truth), where, reading.options))
    missing = [column for column in reading.images if not (doc.get(column) or {}).get("bytes")]
    if missing:
        raise ValueError(f"images must have bytes; got none in {missing} of {where}. Load the data set again.")
    return Question(
        task=benchmark.name,
        id=reading.id,
        messages=({"role": "user", "content": question_text(benchmark, doc) + INSTRUCTION},),
        sources=tuple(doc[column]["bytes"] for column in reading.images),
        ground_truth=truth,
        options=reading.options,
        groups=dict(reading.groups),
        data_source=benchmark.dataset,
    )


# ---- the hub ---------------------------------------------------------------------------------------------------------


def resolve_revision(benchmark: Benchmark) -> str:
    """The commit of the revision; a branch is looked up on the hub.

    Raises:
        ValueError: the hub does not answer.
    """
    if COMMIT.fullmatch(benchmark.revision):
        return benchmark.revision
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        return HfApi().dataset_info(benchmark.dataset, revision=benchmark.revision).sha
    except (HfHubHTTPError, OfflineModeIsEnabled, httpx.HTTPError, OSError) as error:
        raise ValueError(
            f"the commit of {benchmark.dataset}@{benchmark.revision} is looked up on the Hugging Face hub; got "
            f"{type(error).__name__}: {error}. Run where the hub can be reached, or write a commit into "
            f"{benchmark.name}.yaml."
        ) from error


def benchmark_items(benchmark: Benchmark, revision: str) -> Iterator[Question]:
    """The items of a benchmark at a commit, in the data set's order; needs the hub, or the data set in its cache.

    Raises:
        ValueError: the data set cannot be loaded, or has a different number of rows.
    """
    import datasets

    try:
        rows = datasets.load_dataset(benchmark.dataset, benchmark.config, split=benchmark.split, revision=revision)
    except (OSError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"{benchmark.dataset} is loaded from the Hugging Face hub; got {type(error).__name__}: {error}. Run once "
            "where the hub can be reached: its cache is enough afterwards."
        ) from error
    if len(rows) != benchmark.num_items:
        raise ValueError(
            f"{benchmark.dataset} {benchmark.split} must have {benchmark.num_items} rows; got {len(rows)} at "
            f"{revision}. Another revision is another benchmark: name the one of tasks/."
        )
    for column, feature in rows.features.items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(column, datasets.Image(decode=False))
    for row in rows:
        yield make_item(benchmark, row)
