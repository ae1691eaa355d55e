# SPDX-License-Identifier: Apache-2.0
"""Time of a whole GRPO step of verl's trainer, without and with VARS, by phase.

    python benchmarks/grpo_step.py [--rounds 8] [--threads 2] [--out outputs/grpo_step]

One run of verl's own launcher (Ray, vLLM, FSDP2) on the CPU, with a random Qwen2.5-VL of six layers, 256 wide. Each
round is a step of every variant on the same prompts, in random order; responses have one length. So the variants share
the start, the data and the noise of the machine. The first round is a warm-up.

- `verl`: verl's own log-prob pass and advantage; nothing is measured
- `ratio`, `image_share`: VARS with this statistic
- `dependency`: the statistic that takes another forward pass, without masses
- `verl, polling 2 s`: `verl` with verl's own interval between two looks at the rollouts; the others look every 0.1 s

Ratios are medians over the rounds of a variant's step to the step of `verl` in the same round: of seconds, and of CPU
seconds of all processes of the run, which other load on the machine affects least. Writes OUT/grpo_step.json and
OUT/grpo_step.md, and prints the latter.
"""

import argparse
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import wrapt

REPOSITORY = Path(__file__).resolve().parents[1]
VARIANTS = {
    "verl": dict(lambda_v=0.0),
    "ratio": dict(statistic="ratio"),
    "image_share": dict(statistic="image_share"),
    "dependency": dict(statistic="dependency"),
    "verl, polling 2 s": dict(lambda_v=0.0),
}
BASELINE, SLOW_POLLING = "verl", "verl, polling 2 s"
# Of verl's timing_s, and what the table calls them. `gen` includes the reward function and the polling.
PHASES = {
    "gen": "rollouts",
    "old_log_prob": "log-probs",
    "adv": "advantage",
    "update_actor": "update",
    "update_weights": "weights",
    "step": "step",
}
NUM_PROMPTS, NUM_ROLLOUTS, NUM_IMAGES, NEW_TOKENS = 4, 4, 8, 96
MODEL = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [8, 12, 12]},
}
# Half of the responses are right, by their length: a model that has learned nothing answers nothing right.
REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    right = float(len(solution_str) % 2)
    return {"score": right, "acc": right}
"""


def order(number: int) -> list[str]:
    """The variants of a round."""
    return random.Random(number).sample(list(VARIANTS), len(VARIANTS))


def variant_of(step: int) -> str:
    """The variant of a step, counted from 1."""
    return order((step - 1) // len(VARIANTS))[(step - 1) % len(VARIANTS)]


# ---- inside verl's processes, which import this file as an external module -------------------------------------------

FLAG = "grpo_step_variant"


class CpuTime:
    """CPU seconds of this run's Ray workers since then: they are children of the process that started this one."""

    def __init__(self):
        self.begin = self.seconds()

    @staticmethod
    def seconds() -> dict[int, float]:
        """By process."""
        out = {}
        for part in psutil.Process(os.getppid()).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # It has just ended.
                out[part.pid] = sum(part.cpu_times()[:2])
        return out

    def passed(self) -> float:
        return sum(seconds - self.begin.get(pid, 0.0) for pid, seconds in self.seconds().items())


def add_trainer(_module) -> None:
    """A trainer that is another variant in every step, under the name `grpo_step`."""
    from verl.trainer.ppo.v1.trainer_base import register_trainer
    from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

    from avar_verl.plugin.config import VarsConfig
    from avar_verl.plugin.trainer.ppo import AvarPPOTrainer

    @register_trainer("grpo_step")
    class StepTrainer(AvarPPOTrainer):
        def _build_replay_buffer(self):
            buffer = super()._build_replay_buffer()
            self._interval, look = buffer.poll_interval, buffer._sync_metadata_from_transfer_queue

            def timed_look():
                begin = time.perf_counter()
                look()
                self.timing_raw["look"] = self.timing_raw.get("look", 0.0) + time.perf_counter() - begin

            buffer._sync_metadata_from_transfer_queue = timed_look
            return buffer

        def on_step_begin(self):
            super().on_step_begin()
            self.variant = variant_of(self.global_steps)
            self.vars = VarsConfig(**VARIANTS[self.variant])
            self.replay_buffer.poll_interval = 2.0 if self.variant == SLOW_POLLING else self._interval

            self._cpu = CpuTime()

        def _compute_old_log_prob(self, batch, metrics):
            batch.extra_info[FLAG] = self.variant
            stock, cpu = not self.vars.measures, CpuTime()
            batch = (PPOTrainerSync if stock else AvarPPOTrainer)._compute_old_log_prob(self, batch, metrics)
            self.timing_raw["cpu_old_log_prob"] = cpu.passed()
            return batch

        def _compute_advantage(self, batch, metrics):
            stock, cpu = not self.vars.measures, CpuTime()
            batch = (PPOTrainerSync if stock else AvarPPOTrainer)._compute_advantage(self, batch, metrics)
            self.timing_raw["cpu_adv"] = cpu.passed()
            return batch

        def _compute_metrics(self, *arguments, **kwargs):
            self.timing_raw["cpu_step"] = self._cpu.passed()
            return super()._compute_metrics(*arguments, **kwargs)


def let_engine_switch(_module) -> None:
    """The engine measures what the variant of the batch needs."""
    from verl.utils import tensordict_utils as tu

    from avar_verl.plugin.config import VarsConfig
    from avar_verl.plugin.engine.fsdp import AvarFSDPEngine

    run = AvarFSDPEngine.forward_backward_batch

    def forward_backward_batch(self, data, loss_function, forward_only=False):
        variant = tu.get_non_tensor_data(data=data, key=FLAG, default=None)
        if variant is not None:
            self._vars = VarsConfig(**VARIANTS[variant])
        return run(self, data, loss_function, forward_only=forward_only)

    AvarFSDPEngine.forward_backward_batch = forward_backward_batch


if __name__ == Path(__file__).stem:
    import avar_verl.plugin.register  # noqa: F401  verl loads external modules before its plugins

    wrapt.register_post_import_hook(add_trainer, "verl.trainer.ppo.v1")
    wrapt.register_post_import_hook(let_engine_switch, "verl.workers.engine")


# ---- the launch ------------------------------------------------------------------------------------------------------


def write_prompts(path: Path, rounds: int) -> None:
    """Prompts of NUM_IMAGES photographs; those of a round once for every variant."""
    import pandas as pd

    from avar_verl.tools.demo import photo_grid

    number = rounds * NUM_PROMPTS
    photo_grid.make_rl_parquet(path, number * NUM_IMAGES, 0, "train")
    rows = pd.read_parquet(path)
    prompts = []
    for first in range(0, len(rows), NUM_IMAGES):
        row = rows.iloc[first].to_dict()
        row["images"] = [image for images in rows["images"][first : first + NUM_IMAGES] for image in images]
        turns = [dict(turn) for turn in row["prompt"]]
        turns[-1]["content"] = "<image>" * (NUM_IMAGES - 1) + turns[-1]["content"]
        prompts.append({**row, "prompt": turns})
    blocks = [prompts[first : first + NUM_PROMPTS] for first in range(0, number, NUM_PROMPTS)]
    pd.DataFrame([row for block in blocks for _ in VARIANTS for row in block]).to_parquet(path)


def command(work: Path, steps: int) -> list[str]:
    rollout, actor = "actor_rollout_ref.rollout", "actor_rollout_ref.actor"
    return [
        *(sys.executable, "-m", "verl.trainer.main_ppo"),
        *("--config-dir", str(REPOSITORY / "recipes" / "avar" / "config"), "--config-name", "avar_grpo"),
        "machine=cpu_grpo",
        "trainer.v1.trainer_mode=grpo_step",
        f"actor_rollout_ref.model.path={work / 'model'}",
        f"data.train_files={work / 'rl.parquet'}",
        f"data.val_files={work / 'rl.parquet'}",
        "data.shuffle=false",
        f"data.train_batch_size={NUM_PROMPTS}",
        "data.max_prompt_length=320",
        f"data.max_response_length={NEW_TOKENS}",
        f"{rollout}.n={NUM_ROLLOUTS}",
        f"{rollout}.ignore_eos=true",
        f"{rollout}.enable_prefix_caching=false",
        f"{rollout}.log_prob_micro_batch_size_per_gpu=8",
        f"{actor}.ppo_mini_batch_size={NUM_PROMPTS}",
        f"{actor}.ppo_micro_batch_size_per_gpu=8",
        f"reward.custom_reward_function.path={work / 'reward.py'}",
        "trainer.val_before_train=false",
        "trainer.test_freq=-1",
        "trainer.save_freq=-1",
        f"trainer.total_training_steps={steps}",
        "trainer.total_epochs=1",
        f"trainer.default_local_dir={work / 'checkpoints'}",
        f"hydra.run.dir={work / 'hydra'}",
    ]


def launch(work: Path, rounds: int, threads: int, limit_s: float) -> dict[int, dict[str, float]]:
    """Metrics by step."""
    from avar_verl.tools.demo.tiny_model import build_tiny_model

    build_tiny_model(work / "model", **MODEL)
    write_prompts(work / "rl.parquet", rounds)
    (work / "reward.py").write_text(REWARD)
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
        "PYTHONUNBUFFERED": "1",
        "RAY_ADDRESS": "local",  # Not a cluster that happens to run on this machine.
        "RAY_worker_niceness": "0",  # Ray would give its workers less of the CPU than anything else on the machine.
        "TORCHDYNAMO_DISABLE": "1",
        "VERL_FILE_LOGGER_PATH": str(work / "metrics.jsonl"),
        "VERL_USE_EXTERNAL_MODULES": Path(__file__).stem,
    }
    with (work / "log").open("w") as log:
        arguments = command(work, rounds * len(VARIANTS))
        process = subprocess.Popen(arguments, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            process.wait(limit_s)
        except subprocess.TimeoutExpired:
            print(f"verl's launcher was stopped after {limit_s:.0f} s.", file=sys.stderr)
        finally:
            # Ray's processes are in sessions of their own and would stay.
            if process.returncode is None:
                launcher = psutil.Process(process.pid)
                for part in (launcher, *launcher.children(recursive=True)):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        part.kill()
                process.wait()
    if process.returncode:
        raise SystemExit(f"verl's launcher failed:\n{(work / 'log').read_text(errors='replace')[-6000:]}")
    records = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["data"] for record in records}


# ---- the tables ------------------------------------------------------------------------------------------------------


def by_variant(steps: dict[int, dict[str, float]], key: str) -> dict[str, list[float]]:
    """Values of every variant in the order of the rounds, without the warm-up."""
    out: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for step in sorted(steps):
        if step > len(VARIANTS):
            out[variant_of(step)].append(steps[step][key])
    return out


def interval(ratios: list[float]) -> tuple[float, float]:
    """The middle 80 % of the rounds."""
    ordered, cut = sorted(ratios), len(ratios) // 10
    return ordered[cut], ordered[-1 - cut]


def summary(steps: dict[int, dict[str, float]]) -> list[dict]:
    """A row for every variant."""
    names = [*PHASES, "look", *(f"cpu_{phase}" for phase in ("old_log_prob", "adv", "step"))]
    seconds = {name: by_variant(steps, f"timing_s/{name}") for name in names}

    def ratios(name: str, variant: str) -> list[float]:
        return [own / base for own, base in zip(seconds[name][variant], seconds[name][BASELINE], strict=True)]

    def more(name: str, variant: str) -> list[float]:
        return [own - base for own, base in zip(seconds[name][variant], seconds[name][BASELINE], strict=True)]

    rows = []
    for variant in VARIANTS:
        step = ratios("step", variant)
        # What VARS changes are two phases; the others are the same work, whose noise this leaves out.
        added = [
            sum(pair)
            for pair in zip(*(more(f"cpu_{phase}", variant) for phase in ("old_log_prob", "adv")), strict=True)
        ]
        rows.append(
            {
                "variant": variant,
                **{name: statistics.median(seconds[name][variant]) for name in names},
                "ratios": step,
                "ratio": statistics.median(step),
                "ratio_80": interval(step),
                "cpu_ratio": statistics.median(ratios("cpu_step", variant)),
                "cpu_log_prob_ratio": statistics.median(ratios("cpu_old_log_prob", variant)),
                "cpu_added_ratio": 1 + statistics.median(added) / statistics.median(seconds["cpu_step"][BASELINE]),
            }
        )
    return rows


def markdown(report: dict) -> str:
    head = ["variant", *PHASES.values(), f"step / {BASELINE}", "80 % of the rounds"]
    cpu = [
        "variant",
        "CPU of log-probs",
        f"/ {BASELINE}",
        "CPU of a step",
        f"/ {BASELINE}",
        "of what VARS changes alone",
    ]
    lines = [
        f"{report['rounds']} rounds, {report['rollouts']} rollouts of {report['prompt_tokens']:.0f} + {NEW_TOKENS} "
        f"tokens a step, {report['threads']} threads of {report['cpus']} CPUs; load average before and after: "
        f"{report['load_before']:.1f}, {report['load_after']:.1f}. Seconds are medians:",
        "",
        f"| {' | '.join(head)} |",
        f"| {' | '.join('---' for _ in head)} |",
    ]
    for row in report["rows"]:
        low, high = row["ratio_80"]
        phases = " | ".join(f"{row[phase]:.3f}" for phase in PHASES)
        lines.append(f"| {row['variant']} | {phases} | {row['ratio']:.3f} x | {low:.2f} to {high:.2f} |")
    lines += ["", f"| {' | '.join(cpu)} |", f"| {' | '.join('---' for _ in cpu)} |"]
    for row in report["rows"]:
        lines.append(
            f"| {row['variant']} | {row['cpu_old_log_prob']:.2f} | {row['cpu_log_prob_ratio']:.3f} x "
            f"| {row['cpu_step']:.2f} | {row['cpu_ratio']:.3f} x | {row['cpu_added_ratio']:.3f} x |"
        )
    look = report["rows"][0]
    lines += ["", f"Looks at the rollouts, of `{BASELINE}`: {1e3 * look['look']:.0f} ms of {look['gen']:.3f} s."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8, help="beside the warm-up")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of each of verl's processes")
    parser.add_argument("--limit", type=float, default=900.0, help="seconds after which the run is stopped")
    parser.add_argument("--out", type=Path, default=Path("outputs/grpo_step"))
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        raise SystemExit(f"--rounds must be >= 1; got {arguments.rounds}. Leave it at 8.")
    before, begin = os.getloadavg()[0], time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        steps = launch(Path(folder), arguments.rounds + 1, arguments.threads, arguments.limit)
    report = {
        "rounds": arguments.rounds,
        "rollouts": NUM_PROMPTS * NUM_ROLLOUTS,
        "prompt_tokens": statistics.mean(data["prompt_length/mean"] for data in steps.values()),
        "threads": arguments.threads,
        "cpus": os.cpu_count(),
        "load_before": before,
        "load_after": os.getloadavg()[0],
        "seconds": time.perf_counter() - begin,
        "rows": summary(steps),
        "steps": [
            {"step": step, "variant": variant_of(step)}
            | {key: value for key, value in data.items() if key.startswith(("timing_s/", "avar/"))}
            for step, data in sorted(steps.items())
        ],
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "grpo_step.json").write_text(json.dumps(report, indent=1) + "\n")
    (arguments.out / "grpo_step.md").write_text(markdown(report) + "\n")
    print(markdown(report))


if __name__ == "__main__":
    main()
