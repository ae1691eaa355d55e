# SPDX-License-Identifier: Apache-2.0
"""Photo grids as inputs of `avar synth`: question, answer, image and boxes of the cells, without responses.

python -m examples.synth.inputs --n 500 --out outputs/synth/inputs.parquet
"""

import argparse
import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from avar_verl.tools.demo import photo_grid


def write_inputs(path: str | Path, n: int, seed: int = 0, split: str = "train") -> None:
    """Write `n` photo grids, the same ones that `examples.synth.server` knows for this seed and split."""
    rows = []
    for sample in photo_grid.iter_samples(n, seed, split):
        png = io.BytesIO()
        sample.image.save(png, "PNG")
        boxes = [list(map(float, box)) for box in sample.boxes]
        image = {"bytes": png.getvalue()}
        rows.append({"question": sample.question, "answer": sample.answer, "images": [image], "boxes": [boxes]})
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--n", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", choices=photo_grid.SPLITS, default="train")
    args = parser.parse_args()
    write_inputs(args.out, args.n, args.seed, args.split)
