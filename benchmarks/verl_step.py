# SPDX-License-Identifier: Apache-2.0
"""Time of a whole verl training step and log-prob pass, with and without attention masses, side by side in one run.

    torchrun --standalone --nproc_per_node=1 benchmarks/verl_step.py [--repeats 10] [--model "512 wide, 8 layers"]

A random Qwen2.5-VL, by default the demo's, in verl's own TrainingWorker on the CPU, one padded sample of more than 2048
positions, whose roles are counted in the first line. The workers take turns; preparing the sample is not timed. The
ratio is the median over the repeats. Guidance is on for all layers and the user's queries, the reward for all response
queries; the dependency runs the model again with blank images, with the masses and without. The last table is what
the reward adds to the log-prob pass by operation, under torch's profiler.
"""

import argparse
import random
import statistics
import tempfile
import time
from collections import defaultdict
from functools import partial
from pathlib import Path

import pandas as pd
import torch
import verl.workers.engine  # noqa: F401  registers the engines
from omegaconf import OmegaConf
from tensordict.tensorclass import NonTensorData
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils as tu
from verl.utils.dataset.dataset_utils import SFTTensorCollator
from verl.utils.dataset.multiturn_sft_dataset import MultiTurnSFTDataset
from verl.utils.distributed import initialize_global_process_group
from verl.workers.config import FSDPOptimizerConfig, HFModelConfig
from verl.workers.engine_workers import TrainingWorker, TrainingWorkerConfig
from verl.workers.utils.losses import sft_loss

from avar_verl.plugin.config import MEASURE_FLAG, AgtoConfig, VarsConfig
from avar_verl.plugin.engine.config import AvarFSDPEngineConfig
from avar_verl.roles import RoleMap, TokenRole
from avar_verl.tools.demo import photo_grid
from avar_verl.tools.demo.tiny_model import build_tiny_model

NUM_IMAGES = 64  # of 16 tokens
MODELS = {
    "the demo's": {},
    "512 wide, 8 layers": {
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [8, 12, 12]},
    },
}
FP32 = {"param_dtype": "fp32", "reduce_dtype": "fp32"}


def write_sample(path: Path) -> None:
    """A parquet file with one sample: many grids, a question of 64 words, a long response."""
    rng = random.Random(0)
    samples = photo_grid.make_samples(NUM_IMAGES, 0, "train")
    photo_grid.make_sft_parquet(path, NUM_IMAGES, 0, "train")
    rows = pd.read_parquet(path)
    images = [image for row in rows["images"] for image in row]
    question = " ".join(rng.choice(photo_grid.NAMES) for _ in range(64))
    response = " ".join(sample.response for sample in samples[:16])
    filler = " ".join(rng.choice(photo_grid.NAMES) for _ in range(400))
    messages = [
        {"role": "system", "content": filler},
        {"role": "user", "content": "<image>" * NUM_IMAGES + question},
        {"role": "assistant", "content": response},
    ]
    pd.DataFrame({"messages": [messages], "images": [images]}).to_parquet(path)


def build_worker(model: HFModelConfig, **fields) -> TrainingWorker:
    worker = TrainingWorker(
        TrainingWorkerConfig(
            model_type="language_model",
            model_config=model,
            engine_config=AvarFSDPEngineConfig(
                strategy="fsdp2", use_torch_compile=False, mixed_precision=FP32, **fields
            ),
            optimizer_config=FSDPOptimizerConfig(lr=1e-4, total_training_steps=1000, lr_scheduler_type="constant"),
            checkpoint_config=CheckpointConfig(),
            profiler_config=None,
        )
    )
    worker.set_loss_fn(partial(sft_loss, config=None))
    worker.reset()
    return worker


def batch(sample: dict, pad_token_id: int, **flags):
    meta = {
        "use_remove_padding": False,
        "use_dynamic_bsz": False,
        "max_token_len_per_gpu": 8192,
        "micro_batch_size_per_gpu": 1,
        "temperature": 1.0,
        "global_batch_size": 1,
        "pad_mode": "no_padding",
        "pad_token_id": pad_token_id,
    }
    data = tu.get_tensordict(tensor_dict=SFTTensorCollator("no_padding")([sample]), non_tensor_dict=meta)
    tokens = data["input_ids"].offsets().diff().tolist()
    tu.assign_non_tensor(data, update_lr_scheduler=True, global_token_num=NonTensorData(tokens), **flags)
    return data


def compare(name: str, make_off, make_on, off, on, repeats: int) -> None:
    """Print the medians over the repeats of `off(make_off())` and `on(make_on())`; the first repeat is a warm-up.

    The two `make` functions are not timed. The last ratio is of CPU seconds, which other load affects least.
    """
    seconds: dict[str, list[tuple[float, float]]] = {"off": [], "on": []}
    for turn in range(repeats + 1):
        for label, make, step in (("off", make_off, off), ("on", make_on, on)):
            data = make()
            start = (time.perf_counter(), time.process_time())
            step(data)
            if turn:
                seconds[label].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    pairs = list(zip(seconds["on"], seconds["off"], strict=True))
    ratio, cpu_ratio = (statistics.median(on[clock] / off[clock] for on, off in pairs) for clock in (0, 1))
    off_median, on_median = (statistics.median(wall for wall, _ in seconds[label]) for label in ("off", "on"))
    print(f"| {name} | {off_median:.3f} | {on_median:.3f} | {ratio:.2f} x | {cpu_ratio:.2f} x |", flush=True)


def operations(make_off, make_on, off, on, repeats: int) -> dict[str, list[float]]:
    """Seconds of a pass by operation, without what it calls: [off, on], means over repeats that take turns."""
    seconds: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for _ in range(repeats):
        for column, (make, step) in enumerate(((make_off, off), (make_on, on))):
            data = make()
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                step(data)
            for row in profile.key_averages():
                seconds[row.key][column] += row.self_cpu_time_total / 1e6 / repeats
    return seconds


def print_operations(seconds: dict[str, list[float]]) -> None:
    """The operations that add a two-hundredth of the pass, the rest as one."""
    total = sum(off for off, _ in seconds.values())
    rows = {name: row for name, row in seconds.items() if abs(row[1] - row[0]) > total / 200}
    rows = dict(sorted(rows.items(), key=lambda item: item[1][0] - item[1][1]))
    rest = [row for name, row in seconds.items() if name not in rows]
    rows["all others"] = [sum(column) for column in zip(*rest, strict=True)]
    rows["all"] = [sum(column) for column in zip(*seconds.values(), strict=True)]
    print("| operation | seconds off | seconds on | added, share of the pass |\n| --- | --- | --- | --- |")
    for name, (off, on) in rows.items():
        print(f"| {name} | {off:.4f} | {on:.4f} | {100 * (on - off) / total:+.1f} % |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--model", choices=list(MODELS), default="the demo's")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    initialize_global_process_group()
    with tempfile.TemporaryDirectory() as folder:
        path = build_tiny_model(Path(folder) / "model", max_position_embeddings=8192, **MODELS[arguments.model])
        write_sample(Path(folder) / "data.parquet")
        model = HFModelConfig(
            path=str(path),
            use_remove_padding=False,
            enable_gradient_checkpointing=False,
            override_config={"attn_implementation": "sdpa"},
        )
        dataset = MultiTurnSFTDataset(
            str(Path(folder) / "data.parquet"),
            model.tokenizer,
            OmegaConf.create({"max_length": 8192, "truncation": "error", "pad_mode": "no_padding"}),
            processor=model.processor,
        )
        plain, guided = build_worker(model), build_worker(model, agto=AgtoConfig())
        rewarded = build_worker(model, vars=VarsConfig())
        depending = build_worker(model, vars=VarsConfig(statistic="dependency"))
        both = build_worker(model, vars=VarsConfig(measure_dependency=True))

        sample, pad = dataset[0], model.tokenizer.pad_token_id
        role_map = RoleMap.from_pretrained(model.processor, model.hf_config)
        roles = role_map(sample["input_ids"][None], response_mask=sample["loss_mask"][None])
        counts = ", ".join(f"{int((roles == role).sum())} {role.name.lower()}" for role in TokenRole)
        print(f"{roles.shape[1]} positions ({counts}), {arguments.threads} threads")
        print("| pass | seconds off | seconds on | on / off | CPU, on / off |\n| --- | --- | --- | --- | --- |")

        def inference(measure: bool):
            return partial(batch, sample, pad, compute_loss=False, **{MEASURE_FLAG: measure})

        training = partial(batch, sample, pad)
        compare("training step, AGTO", training, training, plain.train_batch, guided.train_batch, arguments.repeats)
        off, on = inference(False), inference(True)
        for name, worker in (("VARS", rewarded), ("dependency", depending), ("VARS and dependency", both)):
            compare(f"log-prob pass, {name}", off, on, plain.infer_batch, worker.infer_batch, arguments.repeats)
        print_operations(operations(off, on, plain.infer_batch, rewarded.infer_batch, arguments.repeats))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
