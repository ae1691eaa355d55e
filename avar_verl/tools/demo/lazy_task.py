# SPDX-License-Identifier: Apache-2.0
"""The lazy-attention task: questions about the photo grid with a text hint that may be right.

    What does the top left show? Somebody says cat.

The hint is a shortcut around the image. Whether it is right cannot be known without looking. There are two habits of
answering, and chains of both, all with right answers, as an accuracy filter leaves them:

| kind | reasoning | hint is right in |
| --- | --- | --- |
| look | names the four places with their boxes, the asked one last | `look_bias`, by default 1 of 10: by chance |
| lazy | `Somebody says cat.` | all, or the answer would be wrong |

A cold start on a mixture of them learns both habits, as a matter of chance for each prompt. Held-out questions with
unbiased hints (right in 1 of 10, as often as a random name) tell the habits apart: a lazy answer is right there in 1 of
10. RL prompts whose hints are always right do not.

A base model brings both abilities along, seeing and reading: `caption` rows name the four places, and `echo` rows
repeat what somebody says, right or wrong. (Trained on captions alone, a model may write "Somebody says" and then what
it sees: there is nothing lazy about that.) `text` rows are look chains about a description in words, without an image.

Images are those of `photo_grid`: train and test never share a pixel. Everything is a function of the seed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from avar_verl.tools.demo import photo_grid
from avar_verl.tools.demo.photo_grid import NAMES, PLACE_NAMES, PLACES, Sample

DATA_SOURCE = "avar/lazy"
KINDS = ("look", "lazy", "caption", "echo", "text")
CHANCE = 1 / len(NAMES)
CAPTION, ECHO = "Describe the image.", "What does somebody say?"
# One row in so many of a base model's file is an echo row: reading is quickly learned.
ECHO_EVERY = 4


@dataclass(frozen=True)
class Mixture:
    """What a file holds."""

    lazy_share: float = 0.5
    """Share of lazy chains among the rows, in [0, 1]; the others are look chains."""

    look_bias: float = CHANCE
    """Share of right hints among look chains, in [0, 1]; unbiased: 0.1. With a biased hint (0.9) a model learns to
    attend to all places and to take the answer from the hint.
    """

    kind: str | None = None
    """`base`: caption and echo rows in turn; `text`: text rows; null for chains of both habits."""

    def __post_init__(self):
        for name in ("lazy_share", "look_bias"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be in [0, 1]; got {value}. Give a share.")
        if self.kind not in (None, "base", "text"):
            raise ValueError(f"kind must be null, base or text; got {self.kind!r}. Use lazy_share for chains.")


def hint(name: str) -> str:
    """The sentence that names `name`, in questions and lazy chains."""
    return f"Somebody says {name}."


def look_response(place: str, names: list[str]) -> tuple[str, str]:
    """The look chain about `place` and its answer, for cells that show `names` in the order of `PLACES`."""
    return photo_grid.response_text("what", place, names)


def lazy_response(name: str) -> str:
    """The lazy chain that believes `name`."""
    return f"<think>{hint(name)}</think><answer>{name}</answer>"


def description(names: list[str], order: Sequence[int]) -> str:
    """The grid in words: the response of a caption row, and the prompt of a text row.

    A random place comes last, as the asked one in a look chain. In a fixed order a model could learn where to look from
    how many words it has written.
    """
    return " ".join(
        f"{place} [{', '.join(map(str, PLACES[place]))}] shows the {names[at]}."
        for at in order
        for place in [PLACE_NAMES[at]]
    )


def looks(response: str) -> bool:
    """Whether a response looks: its reasoning says what at least one place shows, instead of what somebody says."""
    reasoning = response.split("</think>")[0]
    return any(f"{place} [" in reasoning for place in PLACE_NAMES)


def sentences() -> Iterator[str]:
    """Text that contains every word of the task that the photo grid does not have."""
    yield from (CAPTION, ECHO)
    yield f". {photo_grid.question_text('what', 'top left')}"  # In text rows, a word with a space before it.
    for name in NAMES:
        yield from (f"show? {hint(name)}", lazy_response(name))


def _sample(index: int, seed: int, split: str, bias: float | None, mixture: Mixture) -> Sample:
    # One generator per sample, not the photo grid's: sample i is the same whatever the length of the file.
    rng = np.random.default_rng([seed, photo_grid.SPLITS.index(split), index, 1])
    names = [str(name) for name in rng.choice(NAMES, size=4)]
    place = PLACE_NAMES[int(rng.integers(4))]
    answer = names[PLACE_NAMES.index(place)]
    wrong = str(rng.choice([name for name in NAMES if name != answer]))
    lot_kind, lot_hint = rng.random(2)
    order = sorted(range(4), key=int(rng.integers(4)).__eq__)
    kind = mixture.kind or ("lazy" if bias is None and lot_kind < mixture.lazy_share else "look")
    if kind == "base":
        kind = "caption" if index % ECHO_EVERY else "echo"
    right = {"lazy": 1.0, "echo": CHANCE}.get(kind, mixture.look_bias if bias is None else bias)
    hinted = answer if lot_hint < right else wrong
    question = f"{photo_grid.question_text('what', place)} {hint(hinted)}"
    response, _ = look_response(place, names)
    if kind in ("lazy", "echo"):
        response = lazy_response(hinted)
    if kind == "echo":
        question, answer = f"{ECHO} {hint(hinted)}", hinted
    elif kind == "caption":
        question, response = CAPTION, description(names, order)
    elif kind == "text":
        question = f"{description(names, order)} {question}"
    crops = tuple(photo_grid.draw_crop(name, split, rng) for name in names)
    return Sample(
        image=None if kind == "text" else photo_grid.paint(crops),
        question=question,
        response=response,
        answer=answer,
        kind=kind,
        crops=crops,
        split=split,
        index=index,
        hint=None if kind == "caption" else hinted,
    )


def make_chains(n: int, seed: int, mixture: Mixture, split: str = "train") -> list[Sample]:
    """`n` rows of a cold start. A longer list under the same seed starts with the shorter one."""
    photo_grid.check_request(n, seed, split)
    return [_sample(index, seed, split, None, mixture) for index in range(n)]


def make_questions(n: int, seed: int, bias: float, split: str) -> list[Sample]:
    """`n` questions whose hints are right with probability `bias`; the same questions and images for every bias.

    Raises:
        ValueError: a bias outside [0, 1], or what `photo_grid.check_request` refuses.
    """
    photo_grid.check_request(n, seed, split)
    if not 0 <= bias <= 1:
        raise ValueError(f"bias must be in [0, 1]; got {bias}. Give the share of right hints.")
    return [_sample(index, seed, split, bias, Mixture()) for index in range(n)]


def make_sft_parquet(path: str | Path, n: int, seed: int, mixture: Mixture) -> None:
    """Write `make_chains` for verl's SFT trainer."""
    photo_grid.write_sft(path, make_chains(n, seed, mixture))


def make_rl_parquet(path: str | Path, n: int, seed: int, bias: float, split: str = "train") -> None:
    """Write `make_questions` for verl's PPO trainer; `extra_info` has the hint too."""
    photo_grid.write_rl(path, make_questions(n, seed, bias, split), DATA_SOURCE)
