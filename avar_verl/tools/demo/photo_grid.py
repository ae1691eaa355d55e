# SPDX-License-Identifier: Apache-2.0
"""Questions about a 2 x 2 grid of photographs, for a model small enough to learn the task on a laptop.

A sample is an image of 112 x 112 pixels: four cells of 56 x 56, each a random crop of one of ten photographs in
scikit-image's wheel. Each sample has one question, which cannot be answered without the image:

| kind | question | answer | best constant guess |
| --- | --- | --- | --- |
| what | What does the top left show? | cat | 1 in 10 |
| where | Which place shows the cat? | top left | 1 in 4 |
| count | How many places show the cat? | 2 (0 to 3) | 1 in 4 |
| same | Which place shows the same as the top left? | bottom right | 1 in 3 |

The reference response names places one by one, each with its box, until it has what it needs:

    <think>top left [0, 0, 56, 56] shows the moon. top right [56, 0, 112, 56] shows the cat.</think>
    <answer>top right</answer>

(on one line). `what` names the place in question last, `where` and `same` stop when they have found it, `count` names
every place and keeps a tally. Boxes are written as Qwen2.5-VL writes them: ``[x1, y1, x2, y2]`` in pixels of the image
that the model sees. That image is the stored one: 112 is a multiple of 28 (patch 14, merge 2) and 112 * 112 lies
between the pixel limits of both qwen_vl_utils (4 to 16384 tokens of 28 x 28) and the demo's processor, so nothing
resizes it.

Train and test never share a pixel: every photograph is cut once into a train and a test region, and a crop stays
inside the region of its split.

No image is ever downloaded. Needs: numpy, pillow, pyarrow, and the files of scikit-image (which is not imported).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

DATA_SOURCE = "avar/photo_grid"
IMAGE_SIZE = 112
CELL_SIZE = 56
KINDS = ("what", "where", "count", "same")
# The cycle of kinds: four of seven questions are about one place.
CYCLE = ("what", "where", "what", "count", "what", "same", "what")
SPLITS = ("train", "test")
MAX_COUNT = 3

Box = tuple[int, int, int, int]


@dataclasses.dataclass(frozen=True)
class Photo:
    """One photograph of scikit-image and its two regions, as (left, top, right, bottom) in pixels of the file."""

    name: str
    file: str
    train: Box
    test: Box

    def region(self, split: str) -> Box:
        """The region that crops of ``split`` may touch."""
        return {"train": self.train, "test": self.test}[split]


# The cuts follow the content, so that both sides show the named object; empty borders are left out.
PHOTOS = (
    Photo("bricks", "brick.png", train=(0, 0, 330, 512), test=(330, 0, 512, 512)),
    Photo("cat", "chelsea.png", train=(200, 0, 451, 300), test=(0, 0, 200, 300)),
    Photo("coffee", "coffee.png", train=(0, 0, 310, 400), test=(310, 30, 530, 400)),
    Photo("coins", "coins.png", train=(0, 0, 384, 190), test=(0, 190, 384, 303)),
    Photo("galaxies", "hubble_deep_field.jpg", train=(0, 0, 650, 872), test=(650, 0, 1000, 872)),
    Photo("moon", "moon.png", train=(0, 0, 330, 512), test=(330, 0, 512, 512)),
    Photo("motorcycle", "motorcycle_left.png", train=(40, 60, 440, 470), test=(440, 60, 680, 470)),
    Photo("retina", "retina.jpg", train=(180, 230, 860, 1180), test=(860, 230, 1230, 1180)),
    Photo("rocket", "rocket.jpg", train=(0, 190, 640, 427), test=(230, 40, 430, 190)),
    Photo("tissue", "ihc.png", train=(0, 0, 512, 330), test=(0, 330, 512, 512)),
)
NAMES = tuple(photo.name for photo in PHOTOS)
_PHOTO_OF = {photo.name: photo for photo in PHOTOS}

PLACES: dict[str, Box] = {
    "top left": (0, 0, CELL_SIZE, CELL_SIZE),
    "top right": (CELL_SIZE, 0, IMAGE_SIZE, CELL_SIZE),
    "bottom left": (0, CELL_SIZE, CELL_SIZE, IMAGE_SIZE),
    "bottom right": (CELL_SIZE, CELL_SIZE, IMAGE_SIZE, IMAGE_SIZE),
}
PLACE_NAMES = tuple(PLACES)


@dataclasses.dataclass(frozen=True)
class Crop:
    """Origin of a cell: ``box`` is (left, top, right, bottom) in pixels of the file of photograph ``name``."""

    name: str
    box: Box


@dataclasses.dataclass(frozen=True)
class Sample:
    """One image with its question.

    ``boxes`` (of the cells, in pixels of ``image``) and ``crops`` follow the order of `PLACES`. ``index`` is the
    sample's number under its seed and split. ``hint`` is the name that a question of `lazy_task` suggests, whose text
    rows have no image.
    """

    image: Image.Image | None
    question: str
    response: str
    answer: str
    kind: str
    crops: tuple[Crop, ...]
    split: str
    index: int
    hint: str | None = None
    boxes: tuple[Box, ...] = tuple(PLACES.values())

    @property
    def row(self) -> dict:
        """What `avar_verl.tools.rows.conversation` reads."""
        image = {} if self.image is None else {"image": self.image}
        return {"question": self.question, **image, "response": self.response}


def answers_of(kind: str) -> tuple[str, ...]:
    """Every possible answer to a question of ``kind``.

    Raises:
        ValueError: ``kind`` is not one of `KINDS`.
    """
    if kind == "what":
        return NAMES
    if kind in ("where", "same"):
        return PLACE_NAMES
    if kind == "count":
        return tuple(str(count) for count in range(MAX_COUNT + 1))
    raise ValueError(f"kind must be one of {KINDS}; got {kind!r}. See the table at the top of this module.")


def chance_level() -> float:
    """Expected accuracy of the best guess from the question only: the mean over `CYCLE` of the table's last column.

    >>> round(chance_level(), 4)
    0.1762
    """
    guess = {"what": 1 / len(NAMES), "where": 1 / 4, "count": 1 / (MAX_COUNT + 1), "same": 1 / 3}
    return sum(guess[kind] for kind in CYCLE) / len(CYCLE)


def question_text(kind: str, subject: str) -> str:
    """The question of ``kind`` about ``subject``, a place (`what`, `same`) or the name of a photograph."""
    return {
        "what": f"What does the {subject} show?",
        "where": f"Which place shows the {subject}?",
        "count": f"How many places show the {subject}?",
        "same": f"Which place shows the same as the {subject}?",
    }[kind]


def response_text(kind: str, subject: str, names: Sequence[str]) -> tuple[str, str]:
    """The reference response and its answer, for cells that show ``names`` (four, in the order of `PLACES`)."""
    shown = dict(zip(PLACE_NAMES, names, strict=True))
    order = list(PLACE_NAMES)
    if kind == "what":
        order.sort(key=lambda place: place == subject)
    if kind == "same":
        order.sort(key=lambda place: place != subject)
    looks, tally = [], 0
    for place in order:
        look = f"{place} [{', '.join(map(str, PLACES[place]))}] shows the {shown[place]}"
        if kind == "count":
            tally += shown[place] == subject
            look += f", {tally} so far"
        looks.append(f"{look}.")
        if kind == "where" and shown[place] == subject:
            break
        if kind == "same" and place != subject and shown[place] == shown[subject]:
            break
    answer = {"what": shown[place], "where": place, "count": str(tally), "same": place}[kind]
    return f"<think>{' '.join(looks)}</think><answer>{answer}</answer>", answer


def sentences() -> Iterator[str]:
    """Questions and responses that contain every word of every sample: the vocabulary of the demo."""
    for kind in KINDS:
        for subject in PLACE_NAMES if kind in ("what", "same") else NAMES:
            yield question_text(kind, subject)
            for name in NAMES:
                for names in ([name] * 4, [subject, name, name, name], [name, subject, subject, subject]):
                    yield response_text(kind, subject, names)[0]


@functools.cache
def load_photo(file: str) -> Image.Image:
    """A photograph of scikit-image as RGB, read from the installed wheel.

    Raises:
        FileNotFoundError: scikit-image is not installed, or this version does not have the file.
    """
    # The files are opened by path: skimage.data's own functions would try to download one that is missing.
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            "the photo grid needs the photographs of scikit-image; got no installed scikit-image. "
            "Install the demo extra: pip install 'avar-verl[demo]'."
        )
    path = Path(spec.origin).parent / "data" / file
    if not path.is_file():
        raise FileNotFoundError(
            f"scikit-image must carry {file}; got no such file at {path}. Install scikit-image==0.26.0."
        )
    with Image.open(path) as image:
        return image.convert("RGB")


def _draw_names(kind: str, rng: np.random.Generator) -> tuple[list[str], str]:
    """Four names and the subject of the question. Every answer of a kind is equally likely."""
    if kind == "what":
        return [str(name) for name in rng.choice(NAMES, size=4)], PLACE_NAMES[int(rng.integers(4))]
    if kind == "same":
        first, second = (int(place) for place in rng.permutation(4)[:2])
        names = [str(name) for name in rng.choice(NAMES, size=4, replace=False)]
        names[second] = names[first]
        return names, PLACE_NAMES[first]
    subject = str(rng.choice(NAMES))
    names = [str(name) for name in rng.choice([name for name in NAMES if name != subject], size=4)]
    count = 1 if kind == "where" else int(rng.integers(MAX_COUNT + 1))
    for place in rng.permutation(4)[:count]:
        names[int(place)] = subject
    return names, subject


def draw_crop(name: str, split: str, rng: np.random.Generator) -> Crop:
    """A square crop of random size and place: its side is 50 to 100 % of the region's shorter side."""
    photo = _PHOTO_OF[name]
    left, top, right, bottom = photo.region(split)
    shorter = min(right - left, bottom - top)
    side = int(rng.integers(shorter // 2, shorter + 1))
    x = int(rng.integers(left, right - side + 1))
    y = int(rng.integers(top, bottom - side + 1))
    return Crop(photo.name, (x, y, x + side, y + side))


def paint(crops: Iterable[Crop]) -> Image.Image:
    """The image of four crops, in the order of `PLACES`."""
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE))
    for crop, box in zip(crops, PLACES.values(), strict=True):
        cell = load_photo(_PHOTO_OF[crop.name].file).resize((CELL_SIZE, CELL_SIZE), Image.BILINEAR, box=crop.box)
        image.paste(cell, box[:2])
    return image


def _make_sample(index: int, seed: int, split: str) -> Sample:
    # One generator per sample: sample i is the same whatever n is, and the splits' streams are independent.
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    kind = CYCLE[index % len(CYCLE)]
    names, subject = _draw_names(kind, rng)
    response, answer = response_text(kind, subject, names)
    crops = tuple(draw_crop(name, split, rng) for name in names)
    return Sample(
        image=paint(crops),
        question=question_text(kind, subject),
        response=response,
        answer=answer,
        kind=kind,
        crops=crops,
        split=split,
        index=index,
    )


def check_request(n: int, seed: int, split: str) -> None:
    """Refuse what no list of samples can be made of.

    Raises:
        ValueError: ``n`` < 1, ``seed`` < 0 or ``split`` not in `SPLITS`.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1; got {n}. Ask for one sample or more.")
    if seed < 0:
        raise ValueError(f"seed must not be negative; got {seed}. Use 0 or a positive number.")
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}; got {split!r}. Held-out samples are split='test'.")


def iter_samples(n: int, seed: int, split: str) -> Iterator[Sample]:
    """`make_samples`, one at a time."""
    check_request(n, seed, split)
    for index in range(n):
        yield _make_sample(index, seed, split)


def make_samples(n: int, seed: int, split: str) -> list[Sample]:
    """``n`` samples, cycling through the kinds of question. The same arguments give the same samples, pixel for pixel.

    A longer list under the same seed starts with the shorter one, so two stages that must not see the same samples
    need two seeds.

    Raises:
        ValueError: what `check_request` refuses.
        FileNotFoundError: a photograph is missing, see `load_photo`.
    """
    return list(iter_samples(n, seed, split))


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _write(path: str | Path, rows: list[dict]) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def _user_turn(sample: Sample) -> dict:
    return {"role": "user", "content": f"{'' if sample.image is None else '<image>'}{sample.question}"}


def write_sft(path: str | Path, samples: Iterable[Sample]) -> None:
    """Write samples for verl's SFT trainer (`MultiTurnSFTDataset`): columns ``messages`` and ``images``."""
    _write(
        path,
        [
            {
                "messages": [_user_turn(sample), {"role": "assistant", "content": sample.response}],
                "images": [] if sample.image is None else [{"bytes": _png(sample.image)}],
            }
            for sample in samples
        ],
    )


def write_rl(path: str | Path, samples: Iterable[Sample], data_source: str = DATA_SOURCE) -> None:
    """Write samples for verl's PPO trainer (`RLHFDataset`); ``extra_info`` holds kind, split, crops and hint."""
    _write(
        path,
        [
            {
                "data_source": data_source,
                "prompt": [_user_turn(sample)],
                "images": [{"bytes": _png(sample.image)}],
                "ability": "vision",
                "reward_model": {"style": "rule", "ground_truth": sample.answer},
                "extra_info": {
                    "index": sample.index,
                    "split": sample.split,
                    "kind": sample.kind,
                    "question": sample.question,
                    "crops": [{"name": crop.name, "box": list(crop.box)} for crop in sample.crops],
                    **({} if sample.hint is None else {"hint": sample.hint}),
                },
            }
            for sample in samples
        ],
    )


def make_sft_parquet(path: str | Path, n: int, seed: int, split: str = "train") -> None:
    """`write_sft` of `make_samples`."""
    write_sft(path, iter_samples(n, seed, split))


def make_rl_parquet(path: str | Path, n: int, seed: int, split: str = "train") -> None:
    """`write_rl` of `make_samples`."""
    write_rl(path, iter_samples(n, seed, split))
