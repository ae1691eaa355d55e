# SPDX-License-Identifier: Apache-2.0
"""AVAR-ColdStart-30K (arXiv 2603.03825) as parquet files for the cold start.

    python -m recipes.avar.data.avar_coldstart --data coldstart/data.json --images coldstart --out data/avar_coldstart

Reads the ShareGPT layouts of LLaMA-Factory, which the authors used for training, from json, jsonl or parquet:

    {"messages": [{"role": "user", "content": "<image>..."}, {"role": "assistant", "content": "..."}],
     "images": ["a/1.png"]}
    {"conversations": [{"from": "human", "value": "<image>..."}, {"from": "gpt", "value": "..."}], "image": "a/1.png"}

with `system` as a turn or as a column. It has not been run on AVAR-ColdStart-30K itself: the released code does not
name its data set and columns. So this reads LLaMA-Factory's format (data/README.md there), and was run on files in that
format.

Writes train.parquet, and val.parquet with --val-fraction: messages, images, source. A row that training could not use
(`avar data check` without a model) goes to rejects.jsonl with its number and the reason. Rows are written as they are
read, so memory does not grow with the data.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import tyro

from avar_verl.data.check import RowChecker, Settings
from avar_verl.data.images import as_verl_image
from avar_verl.data.messages import IMAGE, marked
from avar_verl.data.rows import Row, count_rows, data_files, read_rows
from avar_verl.rewards.format import format_score

# LLaMA-Factory's tags (data/README.md there); `role` and `content` may have either.
ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
SOURCE_COLUMNS = ("source", "data_source", "dataset")
# A row group is written when it has this many rows or bytes of images.
GROUP_ROWS, GROUP_BYTES = 1024, 32 << 20


def _turn(turn: Any) -> dict[str, str]:
    if not isinstance(turn, dict):
        raise ValueError(f"a turn must be an object; got {turn!r:.80}.")
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if role not in ROLES or not isinstance(content, str):
        raise ValueError(f"a turn must have a role of {list(ROLES)} and text; got {turn!r:.80}.")
    return {"role": ROLES[role], "content": content}


def convert(
    values: dict[str, Any],
    images_root: Path | None = None,
    *,
    source: str = "avar_coldstart",
    keep_paths: bool = False,
    prepend_markers: bool = False,
) -> dict[str, Any]:
    """One row of either ShareGPT layout as `messages`, `images` and `source`.

    Args:
        images_root: folder for relative image paths.
        source: default for rows without one of `SOURCE_COLUMNS`.
        keep_paths: absolute paths instead of the content of the files.
        prepend_markers: in a row with images but no `<image>`, put one for each before its first user turn.

    Raises:
        ValueError: no conversation, an unknown role, or an image file that cannot be read.

    >>> turns = [{"from": "human", "value": "One and one?"}, {"from": "gpt", "value": "Two."}]
    >>> convert({"conversations": turns})["messages"][0]
    {'role': 'user', 'content': 'One and one?'}
    """
    turns = values.get("messages") or values.get("conversations")
    if not isinstance(turns, list):
        raise ValueError(f"a row must have a list `messages` or `conversations`; got the columns {sorted(values)}.")
    messages = [_turn(turn) for turn in turns]
    if values.get("system") and messages[0]["role"] != "system":
        messages.insert(0, _turn({"role": "system", "content": values["system"]}))
    stored = values.get("images") or values.get("image") or []
    stored = stored if isinstance(stored, list) else [stored]
    if prepend_markers and not any(IMAGE in message["content"] for message in messages):
        first = next((message for message in messages if message["role"] == "user"), None)
        if first is not None:
            first["content"] = marked(first["content"], len(stored))
    key = "image" if keep_paths else "bytes"
    images = [as_verl_image(image, embed=not keep_paths, root=images_root) for image in stored]
    for number, image in enumerate(images):
        if not isinstance(image.get(key), str | bytes):
            raise ValueError(
                f"an image must be a file{'' if keep_paths else ' or bytes'}; got {image!r:.80} as image {number}. "
                f"Write a file{', or leave keep_paths out' if keep_paths else ''}."
            )
    named = (values[name] for name in SOURCE_COLUMNS if isinstance(values.get(name), str))
    return {"messages": messages, "images": [{key: image[key]} for image in images], "source": next(named, source)}


def is_val(row: dict[str, Any], fraction: float, seed: int) -> bool:
    """Whether a converted row is held out; the same for all rows with the same images, and in every run."""
    key = [image.get("bytes", image.get("image")) for image in row["images"]] or [json.dumps(row["messages"])]
    out = hashlib.blake2b(str(seed).encode(), digest_size=8)
    for part in key:
        out.update(part if isinstance(part, bytes) else part.encode())
    return int.from_bytes(out.digest(), "big") < fraction * 2**64


class _Writer:
    """A parquet file that is written one row group at a time, and gets its name when it is complete."""

    def __init__(self, path: Path, keep_paths: bool):
        import pyarrow
        import pyarrow.parquet

        turn = pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())])
        image = pyarrow.struct([("image", pyarrow.string()) if keep_paths else ("bytes", pyarrow.binary())])
        columns = {"messages": pyarrow.list_(turn), "images": pyarrow.list_(image), "source": pyarrow.string()}
        self.path, self.part = path, path.with_suffix(".part")
        self.num_rows = self._bytes = 0
        self._rows: list[dict] = []
        self._file = pyarrow.parquet.ParquetWriter(self.part, pyarrow.schema(columns))

    def add(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        self.num_rows += 1
        self._bytes += sum(len(image.get("bytes", b"")) for image in row["images"])
        if len(self._rows) >= GROUP_ROWS or self._bytes >= GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        import pyarrow

        if self._rows:
            self._file.write_table(pyarrow.Table.from_pylist(self._rows, self._file.schema))
        self._rows, self._bytes = [], 0

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, failed, *_) -> None:
        if not failed:
            self._flush()
        self._file.close()
        if failed:
            self.part.unlink()
        elif self.num_rows:
            self.part.replace(self.path)
        else:  # Do not leave a file of an earlier run either.
            self.part.unlink()
            self.path.unlink(missing_ok=True)


def _without_bytes(value: Any) -> str:
    """Text for values that JSON does not support, such as an image of a parquet row, in rejects.jsonl."""
    return f"{len(value)} bytes" if isinstance(value, bytes) else repr(value)


def _converted(rows: Iterator[Row], rejects: TextIO, counts: dict, **settings: Any) -> Iterator[dict[str, Any]]:
    """The rows that training can use; the others are counted and written to `rejects`."""
    check = RowChecker(Settings(kind="sft"))
    for row in rows:
        try:
            converted = convert(row.values, **settings)
            reasons = [message for _, message in check(converted, "sft").errors]
        except ValueError as error:
            reasons = [str(error)]
        if not reasons:
            yield converted
            continue
        counts["rejects"] += 1
        line = {"file": str(row.file), "row": row.number, "reasons": reasons, "values": row.values}
        rejects.write(json.dumps(line, default=_without_bytes) + "\n")


def convert_files(
    data: list[Path],
    out: Path,
    images: Path | None = None,
    *,
    val_fraction: float = 0.0,
    seed: int = 0,
    keep_paths: bool = False,
    prepend_markers: bool = False,
) -> dict[str, int]:
    """AVAR-ColdStart-30K as parquet files for the cold start.

    The image of a row decides which file it goes to, so all questions about one image are in the same file, and the
    fraction of val.parquet holds on average.

    Args:
        data: json, jsonl or parquet files, or folders of them.
        out: Folder of the parquet files and rejects.jsonl.
        images: Folder for image paths (default: the working folder).
        val_fraction: Fraction of the images held out, in [0, 1).
        seed: Of the split.
        keep_paths: Write absolute image paths instead of the images.
        prepend_markers: In rows with images but no <image>, put markers at the start.

    Returns:
        The number of rows of each file and of `unformatted` responses.

    Raises:
        ValueError: `val_fraction` outside [0, 1), files that cannot be read, or no row that can be used.
    """
    from avar_verl.tools.progress import progress

    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction must be in [0, 1); got {val_fraction}. Use 0.02, or 0 for no file.")
    files = data_files(data)
    out.mkdir(parents=True, exist_ok=True)
    rows = iter(progress(read_rows(files), "convert", total=count_rows(files), unit="row"))
    counts = dict.fromkeys(("train", "val", "rejects", "unformatted"), 0)
    with contextlib.ExitStack() as stack:
        rejects = stack.enter_context((out / "rejects.jsonl").open("w"))
        train = stack.enter_context(_Writer(out / "train.parquet", keep_paths))
        val = stack.enter_context(_Writer(out / "val.parquet", keep_paths))
        settings = {"images_root": images, "keep_paths": keep_paths, "prepend_markers": prepend_markers}
        for row in _converted(rows, rejects, counts, **settings):
            (val if is_val(row, val_fraction, seed) else train).add(row)
            counts["unformatted"] += not format_score(row["messages"][-1]["content"])
    counts["train"], counts["val"] = train.num_rows, val.num_rows
    if not train.num_rows:
        raise ValueError(
            f"a training needs at least one row; got {counts}. Read the reasons in {out / 'rejects.jsonl'}."
        )
    print(f"{out / 'train.parquet'}: {counts['train']} rows, val.parquet: {counts['val']} rows")
    print(f"{out / 'rejects.jsonl'}: {counts['rejects']} rows")
    print(f"{counts['unformatted']} responses are not <think>...</think><answer>...</answer>")
    return counts


def main() -> None:
    """The command line: the parameters of `convert_files`."""
    config = (tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone)
    try:
        tyro.cli(convert_files, prog="avar_coldstart", config=config)
    except ValueError as error:
        raise SystemExit(f"avar_coldstart: {error}") from error


if __name__ == "__main__":
    main()
