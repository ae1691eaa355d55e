# SPDX-License-Identifier: Apache-2.0
"""Bytes of a rollout in the TransferQueue and peak memory of every process: verl's GRPO beside this plugin's.

    python benchmarks/memory.py                        # every variant, a launch of a few minutes each
    python benchmarks/memory.py --variants verl,avar --image 640x480 --n 4
    python benchmarks/memory.py --small                # toy sizes, to see that it runs

A tiny Qwen2.5-VL on the CPU, through verl's launcher with vLLM, on prompts with a photograph each. Variants, one after
the other on the same prompts:

    verl          verl's trainer, data set and agent loop, plugin off
    avar          the recipe: images as they are stored, pixels of a prompt once
    avar_paths    the same with data.image_folder
    avar_alone    the recipe with verl's data set and workers: every rollout stores its own

Bytes are those of the rows that the trainer takes from its replay buffer: elements of tensors, pixels of pictures,
lengths of bytes and texts, pickles of the rest. Memory is the resident set, looked at every 0.2 s; pages that processes
share count in each. Writes OUT/memory.json and OUT/memory.md, and prints the latter; variants that are in the first are
not measured again.
"""

import argparse
import contextlib
import io
import json
import os
import pickle
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path

import psutil
import wrapt

REPOSITORY = Path(__file__).resolve().parents[1]
# Set in the launched processes, which import this module with verl: where rows are counted.
COUNTS = "MEMORY_COUNTS"
MIB = 2**20
LOOK_S = 0.2
VARIANTS = ("verl", "avar", "avar_paths", "avar_alone")
ROLLOUT = "actor_rollout_ref.rollout"
REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    right = float(len(solution_str) % 2)
    return {"score": right, "acc": right}
"""
PHOTOS = ("coffee.png", "rocket.jpg", "astronaut.png", "chelsea.png", "motorcycle_left.png", "hubble_deep_field.jpg")


# ---- bytes of rows ------------------------------------------------------------------------------------------------


def num_bytes(value) -> int:
    """Bytes of a value of a row: of what it holds, without the containers."""
    import torch
    from PIL import Image
    from tensordict import NonTensorData

    if isinstance(value, NonTensorData):
        return num_bytes(value.data)
    if isinstance(value, torch.Tensor):
        held = value.values() if value.is_nested else value
        return held.numel() * held.element_size()
    if isinstance(value, Image.Image):
        return len(value.tobytes())
    if isinstance(value, bytes | str):
        return len(value)
    if isinstance(value, dict):
        return sum(len(str(key)) + num_bytes(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return sum(map(num_bytes, value))
    return len(pickle.dumps(value))


def count_rows(keys: list[str], partition: str) -> dict[str, int]:
    """Bytes by field of these rows of the TransferQueue, which are fetched one at a time.

    Pictures and bytes of images in prompts are counted beside their field, and so are pixels.
    """
    import transfer_queue as tq
    from PIL import Image

    counts: dict[str, int] = defaultdict(int)
    for key in keys:
        row = tq.kv_batch_get(keys=[key], partition_id=partition)
        for field, column in row.items():
            value = column if hasattr(column, "element_size") else next(iter(column))
            value = getattr(value, "data", value) if not hasattr(value, "element_size") else value
            counts[field] += num_bytes(value)
            inside: dict[str, int] = defaultdict(int)
            if field == "multi_modal_inputs":
                inside["pixels"] = sum(num_bytes(item) for name, item in value.items() if name.startswith("pixel"))
            if field in ("raw_prompt", "prompt"):  # The second is a column of verl's data set, the same list.
                contents = [message["content"] for message in value if isinstance(message["content"], list)]
                parts = [part for content in contents for block in content for part in block.values()]
                inside["pictures"] = sum(num_bytes(part) for part in parts if isinstance(part, Image.Image))
                inside["image bytes"] = sum(num_bytes(part) for part in parts if isinstance(part, bytes))
            for name, number in inside.items():
                counts[field] -= number
                counts[f"{field}: {name}"] += number
    return dict(counts)


def _count_samples(replay_buffer) -> None:
    """Append the counts of every training batch to the file COUNTS, in the trainer's process."""
    original = replay_buffer.ReplayBuffer.sample

    def sample(self, *args, **kwargs):
        batch, metrics = original(self, *args, **kwargs)
        if batch.partition_id == "train":
            with open(os.environ[COUNTS], "a") as file:
                print(json.dumps({"rows": len(batch), "bytes": count_rows(batch.keys, "train")}), file=file)
        return batch, metrics

    replay_buffer.ReplayBuffer.sample = sample


if os.environ.get(COUNTS):
    wrapt.register_post_import_hook(_count_samples, "verl.trainer.ppo.v1.replay_buffer")


# ---- memory of processes ------------------------------------------------------------------------------------------


def role_of(command: list[str]) -> str:
    """What a process of a run is, from its command line; "" for a process that has no role of its own yet."""
    text = " ".join(command)
    actor = re.match(r"ray::(\w+)", text)
    if actor:
        names = {"IDLE": "", "AgentLoopWorkerTQ": "AgentLoopWorker", "AvarAgentLoopWorker": "AgentLoopWorker"}
        return names.get(actor[1], actor[1])
    if "main_ppo" in text:
        return "launcher"
    for name in ("raylet", "gcs_server", "dashboard", "log_monitor", "runtime_env"):
        if name in text:
            return f"ray: {name}"
    return Path(command[0]).name if command else ""


class Watch:
    """Peak resident set of every process below one, by role, until `stop`."""

    def __init__(self, pid: int):
        self.peaks: dict[int, int] = defaultdict(int)
        self.roles: dict[int, str] = {}
        self.peak_of_all = 0
        self._root, self._stopped = psutil.Process(pid), threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._stopped.wait(LOOK_S):
            total = 0
            with contextlib.suppress(psutil.NoSuchProcess):
                for process in (self._root, *self._root.children(recursive=True)):
                    with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                        rss = process.memory_info().rss
                        self.roles[process.pid] = role_of(process.cmdline()) or self.roles.get(process.pid, "")
                        self.peaks[process.pid] = max(self.peaks[process.pid], rss)
                        total += rss
            self.peak_of_all = max(self.peak_of_all, total)

    def stop(self) -> dict[str, int]:
        """Sum of the peaks by role, and `all at once`."""
        self._stopped.set()
        self._thread.join()
        sums: dict[str, int] = defaultdict(int)
        for pid, peak in self.peaks.items():
            sums[self.roles[pid] or "ray: idle"] += peak
        return {**sums, "all at once": self.peak_of_all}


# ---- a run --------------------------------------------------------------------------------------------------------


def photograph(index: int, size: tuple[int, int]):
    """Four photographs of scikit-image side by side and below each other, of the given (width, height)."""
    from PIL import Image

    from avar_verl.tools.demo.photo_grid import load_photo

    whole = Image.new("RGB", size)
    width, height = size[0] // 2, size[1] // 2
    for place in range(4):
        photo = load_photo(PHOTOS[(index + place) % len(PHOTOS)])
        whole.paste(photo.resize((width, height)), (width * (place % 2), height * (place // 2)))
    return whole


def write_inputs(folder: Path, size: tuple[int, int], prompts: int) -> None:
    """A model whose processor keeps such images as they are, rows with the bytes of JPEG files, a reward."""
    import pandas
    from transformers import AutoProcessor

    from avar_verl.tools.demo.tiny_model import build_tiny_model

    model = build_tiny_model(folder / "model", max_position_embeddings=4096)
    processor = AutoProcessor.from_pretrained(model)
    processor.image_processor.size = {"shortest_edge": 56 * 56, "longest_edge": 1280 * 28 * 28}
    processor.save_pretrained(model)
    rows = []
    for index in range(prompts):
        file = io.BytesIO()
        photograph(index, size).save(file, "JPEG", quality=92)
        question = "What is in this picture? " + "Look at it. " * index  # Prompts of different lengths, as real ones.
        rows.append(
            {
                "data_source": "photographs",
                "prompt": [{"role": "user", "content": "<image>" + question}],
                "images": [{"bytes": file.getvalue()}],
                "reward_model": {"style": "rule", "ground_truth": "coffee"},
                "extra_info": {"index": index},
            }
        )
    pandas.DataFrame(rows).to_parquet(folder / "rl.parquet")
    (folder / "reward.py").write_text(REWARD)


def command(variant: str, folder: Path, settings: argparse.Namespace) -> list[str]:
    """Of verl's launcher."""
    common = [
        f"actor_rollout_ref.model.path={folder / 'model'}",
        f"data.train_files={folder / 'rl.parquet'}",
        f"data.val_files={folder / 'rl.parquet'}",
        f"reward.custom_reward_function.path={folder / 'reward.py'}",
        "reward.custom_reward_function.name=compute_score",
        f"data.train_batch_size={settings.prompts}",
        "data.max_prompt_length=1536",
        "data.max_response_length=32",
        f"{ROLLOUT}.n={settings.n}",
        f"actor_rollout_ref.actor.ppo_mini_batch_size={settings.prompts}",
        f"actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu={settings.n}",
        f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu={settings.n}",
        "actor_rollout_ref.actor.optim.lr=1e-5",
        "trainer.val_before_train=false",
        "trainer.test_freq=-1",
        "trainer.save_freq=-1",
        f"trainer.total_training_steps={settings.steps}",
        f"trainer.total_epochs={settings.steps}",
        f"trainer.default_local_dir={folder / 'checkpoints'}",
        f"hydra.run.dir={folder / 'hydra'}",
    ]
    verl = [
        *("--config-name", "ppo_trainer", "+machine=cpu_grpo", "algorithm.adv_estimator=grpo"),
        *("trainer.use_v1=true", "trainer.v1.trainer_mode=sync", "actor_rollout_ref.actor.strategy=fsdp2"),
        *("actor_rollout_ref.model.use_remove_padding=true", "actor_rollout_ref.actor.use_kl_loss=false"),
        *(f"{ROLLOUT}.name=vllm", "data.filter_overlong_prompts=true", "data.image_key=images"),
    ]
    avar = ["--config-name", "avar_grpo", "machine=cpu_grpo"]
    chosen = {
        "verl": verl,
        "avar": avar,
        "avar_paths": [*avar, f"data.image_folder={folder / 'images'}"],
        "avar_alone": [*avar, f"{ROLLOUT}.agent.agent_loop_manager_class=null", "data.custom_cls.path=null"],
    }[variant]
    return [sys.executable, "-m", "verl.trainer.main_ppo", *chosen, *common]


def measure(variant: str, folder: Path, settings: argparse.Namespace) -> dict:
    """Launch a variant; bytes of a rollout by field, and peaks by role."""
    counts, log = folder / f"{variant}.counts", folder / f"{variant}.log"
    path = f"{REPOSITORY / 'benchmarks'}:{REPOSITORY}:{os.environ.get('PYTHONPATH', '')}"
    environment = {**os.environ, "PYTHONPATH": path, "VERL_USE_EXTERNAL_MODULES": "memory", COUNTS: str(counts)}
    environment |= {"HF_HUB_OFFLINE": "1", "TORCHDYNAMO_DISABLE": "1", "RAY_ADDRESS": "local"}
    environment["VERL_FILE_LOGGER_PATH"] = str(folder / f"{variant}.jsonl")
    environment.pop("AVAR_VERL", None)
    start = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            command(variant, folder, settings), env=environment, stdout=file, stderr=subprocess.STDOUT
        )
        watch = Watch(process.pid)
        try:
            code = process.wait()
        finally:
            processes = watch.stop()
    if code:
        sys.exit(f"{variant} ended with exit code {code}:\n{log.read_text(errors='replace')[-6000:]}")
    batches = [json.loads(line) for line in counts.read_text().splitlines()]
    rows = sum(batch["rows"] for batch in batches)
    fields = {name: sum(batch["bytes"].get(name, 0) for batch in batches) / rows for name in batches[0]["bytes"]}
    return {"rows": rows, "bytes": fields, "rss": processes, "seconds": round(time.monotonic() - start)}


# ---- tables -------------------------------------------------------------------------------------------------------


def table(title: str, values: dict[str, dict[str, float]], unit: float, least: float) -> list[str]:
    """Rows of a Markdown table: names by variant, those of less than `least` in all variants as `other`."""
    names = sorted(
        {name for own in values.values() for name in own},
        key=lambda name: -max(v.get(name, 0) for v in values.values()),
    )
    shown = [name for name in names if any(own.get(name, 0) >= least for own in values.values())]
    lines = [f"| {title} | {' | '.join(values)} |", f"| --- |{' --- |' * len(values)}"]
    columns = [{**{name: own.get(name, 0) for name in shown}} for own in values.values()]
    for column, own in zip(columns, values.values(), strict=True):
        if len(shown) < len(names):
            column["other"] = sum(value for name, value in own.items() if name not in shown)
    return lines + [
        f"| {name} | {' | '.join(f'{column[name] / unit:.2f}' for column in columns)} |" for name in columns[0]
    ]


def report(results: dict) -> str:
    settings, variants = results["settings"], results["variants"]
    by_field = {name: dict(own["bytes"]) for name, own in variants.items()}
    totals = {name: sum(own.values()) for name, own in by_field.items()}
    first = totals.get("verl", next(iter(totals.values())))
    lines = [
        f"{settings['prompts']} prompts x {settings['n']} rollouts a step, images of {settings['image']}, "
        f"{settings['steps']} steps.",
        "",
        *table("KiB of a rollout", by_field, 1024, 0.005 * first),
        f"| all | {' | '.join(f'{total / 1024:.2f}' for total in totals.values())} |",
        f"| {next(iter(totals))} / this | {' | '.join(f'{first / total:.2f} x' for total in totals.values())} |",
        "",
        *table("peak MiB of process", {name: own["rss"] for name, own in variants.items()}, MIB, 150 * MIB),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", default=",".join(VARIANTS), help="comma-separated")
    parser.add_argument("--image", default="1024x768", help="width x height of the images in pixels")
    parser.add_argument("--prompts", type=int, default=4, help="of a step")
    parser.add_argument("--n", type=int, default=8, help="rollouts of a prompt")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--small", action="store_true", help="images of 112x112, 2 prompts x 2 rollouts, 1 step")
    parser.add_argument("--out", type=Path, default=Path("outputs/memory"))
    settings = parser.parse_args()
    if settings.small:
        settings.image, settings.prompts, settings.n, settings.steps = "112x112", 2, 2, 1
    chosen = settings.variants.split(",")
    unknown = sorted(set(chosen) - set(VARIANTS))
    if unknown:
        sys.exit(f"variants must be of {list(VARIANTS)}; got {unknown}. Leave them out.")
    sys.path.insert(0, str(REPOSITORY))
    size = tuple(int(part) for part in settings.image.split("x"))
    sizes = {name: getattr(settings, name) for name in ("image", "prompts", "n", "steps")}
    settings.out.mkdir(parents=True, exist_ok=True)
    path = settings.out / "memory.json"
    results = json.loads(path.read_text()) if path.exists() else {"settings": sizes, "variants": {}}
    if results["settings"] != sizes:
        sys.exit(f"{path} is of other sizes; got {sizes} and {results['settings']}. Choose another --out.")
    for variant in chosen:
        if variant in results["variants"]:
            continue
        with tempfile.TemporaryDirectory() as folder:
            write_inputs(Path(folder), size, settings.prompts)
            results["variants"][variant] = measure(variant, Path(folder), settings)
        ordered = {name: results["variants"][name] for name in VARIANTS if name in results["variants"]}
        results["variants"] = ordered
        path.write_text(json.dumps(results, indent=1) + "\n")
    (settings.out / "memory.md").write_text(report(results))
    print(report(results))


if __name__ == "__main__":
    main()
