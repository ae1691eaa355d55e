# SPDX-License-Identifier: Apache-2.0
"""`avar generate` and `avar intervene sweep`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import UseAppendAction

from avar_verl.tools.options import Command, Count, Numbers, Size


@dataclass(frozen=True, kw_only=True)
class ModelCommand(Command):
    """A command in which a model answers."""

    model: str  # Hugging Face folder or name.
    backend: Literal["transformers", "vllm"] = "transformers"  # Library that runs the model.
    max_new_tokens: Size = 512  # Maximum number of answer tokens.
    batch_size: Size = 8  # Prompts per batch.
    max_model_len: Size | None = None  # Tokens of prompt and answer in vLLM. If omitted: the model's limit.
    device: str | None = None  # torch device. If omitted: cuda if this process sees a GPU, else cpu.
    dtype: str | None = None  # dtype of the model. If omitted: float32 on the CPU, else the checkpoint's.

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_model_len is not None and self.backend != "vllm":
            raise ValueError(f"max_model_len is vLLM's; got {self.max_model_len} for {self.backend}. Leave it out.")


@dataclass(frozen=True, kw_only=True)
class Generate(ModelCommand):
    """Generate answers, with or without a training-free intervention (docs/intervention.md)."""

    data: str | None = None  # Rows: a file, a folder of files, or a data set on the hub. Or give --prompt.
    split: str | None = None  # Split of a data set on the hub.
    prompt: str | None = None  # A question, with <image> for each image. Give this or --data.
    image: UseAppendAction[tuple[str, ...]] = ()  # Image file for --prompt; repeat for each image, in order.
    system: str | None = None  # System turn for conversations without one.
    intervene: str | None = None  # Intervention, such as alpha_img=0.15,alpha_sys=0.4,layers=0-13.
    n: Count = 0  # Answer only the first N rows; 0: all.
    out: Path | None = None  # Write one line per answer to this jsonl file. If omitted: print the answers.

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.data is None) == (self.prompt is None):
            both = "both" if self.data else "neither"
            raise ValueError(f"avar generate needs --data or --prompt; got {both}. Give one.")
        if self.image and self.prompt is None:
            raise ValueError(f"--image belongs to --prompt; got {list(self.image)} with --data. Leave it out.")

    def run(self) -> None:
        from avar_verl.tools.generate.run import generate

        generate(self)


@dataclass(frozen=True, kw_only=True)
class Sweep(ModelCommand):
    """Measure accuracy over a grid of interventions, with significance and a plot (docs/intervention.md)."""

    data: Path  # Questions with answers, in verl's RL layout.
    alpha_img: Numbers  # Values of alpha_img, such as 0,0.15,0.3; 0 must be among them.
    alpha_sys: Numbers  # Values of alpha_sys, such as 0,0.4; 0 must be among them.
    layers: str | None = None  # Layers, such as 0-13 or 0,2. If omitted: all.
    heads: str | None = None  # Query heads. If omitted: all.
    n: Count = 0  # Ask only the first N questions; 0: all.
    out: Path = Path("outputs/sweep")  # Folder of the answers, the table and the plot. A killed sweep continues in it.

    def run(self) -> None:
        from avar_verl.tools.generate.run import sweep

        sweep(self)
