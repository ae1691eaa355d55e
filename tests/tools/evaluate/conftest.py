# SPDX-License-Identifier: Apache-2.0
"""Data files of small images, whose right answer is what `fake_server` says about them."""

import hashlib
import io
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from avar_verl.tools.questions import Question


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (number % 256, number // 256, 99)).save(buffer, "PNG")
    return buffer.getvalue()


def sent(number: int) -> bytes:
    """The picture that is sent for `png(number)`."""
    message = {"role": "user", "content": "<image>?"}
    (picture,) = Question("t", "0", (message,), (png(number),), ("x",)).images
    return picture


def write_rows(path: Path, n: int, first: int = 0) -> Path:
    """`n` questions; the answer is the digest of the picture."""
    rows = []
    for number in range(first, first + n):
        digest = hashlib.sha256(sent(number)).hexdigest()[:12]
        rows.append(
            {
                "data_source": "digests",
                "prompt": [{"role": "user", "content": f"<image>Question {number}?"}],
                "images": [{"bytes": png(number)}],
                "reward_model": {"style": "rule", "ground_truth": digest},
            }
        )
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.fixture
def digests(tmp_path):
    """`digests(n)` -> a data file of n questions."""
    return lambda n, first=0: write_rows(tmp_path / "digests.parquet", n, first)
