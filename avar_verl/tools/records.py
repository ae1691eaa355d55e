# SPDX-License-Identifier: Apache-2.0
"""The result of one question: the line that `avar eval` and `avar intervene sweep` write (`tools.runs`)."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from avar_verl.rewards.accuracy import Decimals
from avar_verl.tools.grade import find_answer, is_correct
from avar_verl.tools.questions import Question, Reply
from avar_verl.tools.runs import RECORDS, RecordFile, read_records


@dataclass(frozen=True)
class Record:
    """The result of one item."""

    id: str
    """Of the item."""

    task: str
    """Name of the task."""

    prompt_hash: str
    """`Question.prompt_hash`."""

    response: str
    """Text written by the model, without the prompt."""

    answer: str | None
    """Answer found in the response, or null."""

    ground_truth: list[str]
    """Accepted answers."""

    correct: bool
    """Whether the grader accepts the answer."""

    prompt_tokens: int
    """As counted by the server, including image tokens."""

    response_tokens: int
    """As counted by the server."""

    finish_reason: str
    """From the server: "stop", or "length" for a response that was cut off."""

    seconds: float
    """From the request to the response, including the server's queue and retries."""

    data_source: str = ""
    """As in verl's data."""

    groups: dict[str, str] = field(default_factory=dict)
    """As in `Question`."""


def graded(item: Question, reply: Reply, answer_rule: str = "reward", decimals: Decimals = "exact") -> Record:
    """The record of a reply to an item."""
    answer = find_answer(reply.text, answer_rule)
    return Record(
        id=item.id,
        task=item.task,
        prompt_hash=item.prompt_hash(),
        response=reply.text,
        answer=answer,
        ground_truth=list(item.ground_truth),
        correct=is_correct(answer, item.ground_truth, item.options, decimals),
        data_source=item.data_source,
        groups=item.groups,
        prompt_tokens=reply.prompt_tokens,
        response_tokens=reply.response_tokens,
        finish_reason=reply.finish_reason,
        seconds=round(reply.seconds, 3),
    )


def _load(fields: dict[str, Any]) -> Record:
    return Record(**fields)


class Records(RecordFile):
    """The open records of one task, in a folder with its settings."""

    records: dict[str, Record]

    def __init__(self, folder: Path, settings: dict[str, Any]):
        super().__init__(folder / RECORDS, "id", settings, _load)

    def add(self, record: Record) -> None:
        """Append a record."""
        self.append([asdict(record)])

    def check_question(self, item: Question) -> None:
        """Nothing, where the record of an item, if there is one, is about its question.

        Raises:
            ValueError: it is about another one.
        """
        if item.id in self.records and self.records[item.id].prompt_hash != item.prompt_hash():
            raise ValueError(
                f"a record must be about its item's question; got another one for item {item.id!r} of {item.task} in "
                f"{self.path.parent}: the data have changed. Choose another folder with --out."
            )


def read(folder: Path) -> dict[str, Record]:
    """The records of a task's folder by item id."""
    return read_records(folder / RECORDS, "id", _load)
