# SPDX-License-Identifier: Apache-2.0
"""geometry3k from the hub as parquet files for verl's PPO trainer, with the AVAR response format in the prompt.

    python -m recipes.avar.data.geo3k --out data/geo3k

Writes train.parquet and test.parquet: data_source, prompt, images, ability, reward_model, extra_info. Needs access to
the Hugging Face hub.
"""

import io
from pathlib import Path

import tyro

from avar_verl.data.messages import place_images, read_messages
from avar_verl.data.rows import naming

DATASET = "hiyouga/geometry3k"
INSTRUCTION = (
    " First reason step by step inside <think> </think> tags, looking back at the image where you use it. "
    "Then give the final answer inside <answer> </answer> tags."
)


def convert(example: dict, index: int, split: str) -> dict:
    """One row of the hub's layout (`problem` with `<image>`, `answer`, `images` of PIL) in verl's layout.

    Raises:
        ValueError: the number of `<image>` placeholders is not the number of images.
    """
    images = []
    for image in example["images"]:
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "PNG")
        images.append({"bytes": buffer.getvalue()})
    problem = example["problem"]
    prompt = [{"role": "user", "content": problem + INSTRUCTION}]
    with naming(f"row {index} of {split}"):
        place_images(read_messages(prompt), images)
    return {
        "data_source": DATASET,
        "prompt": prompt,
        "images": images,
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": example["answer"]},
        "extra_info": {"split": split, "index": index, "question": problem},
    }


def convert_all(out: Path) -> None:
    """geometry3k from the hub as parquet files for verl's PPO trainer.

    Args:
        out: Folder of train.parquet and test.parquet.
    """
    import datasets
    import pyarrow
    import pyarrow.parquet

    from avar_verl.tools.progress import progress

    out.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        rows = datasets.load_dataset(DATASET, split=split)
        converted = [convert(example, index, split) for index, example in enumerate(progress(rows, split, unit="row"))]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(converted), out / f"{split}.parquet")
        print(f"{out / split}.parquet: {len(converted)} rows")


if __name__ == "__main__":
    tyro.cli(convert_all, prog="geo3k")
