# SPDX-License-Identifier: Apache-2.0
"""verl's own launchers as subprocesses, with the configs of recipes/avar on the CPU."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

# A model that has not learned anything answers nothing right, and a reward that is zero everywhere moves nothing: the
# reward below calls half of the responses right by their length, so that the gate opens and advantages differ.
REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    right = float(len(solution_str) % 2)
    return {"score": right, "acc": right, "length": float(len(solution_str))}
"""
# A start of Ray, vLLM and the trainer takes two minutes of two idle cores, and many times that beside other work.
TIMEOUT_S = 1500
RECIPE = Path(__file__).parents[2] / "recipes" / "avar"
CONFIG = ["--config-dir", str(RECIPE / "config")]


# Four steps of eight samples, a checkpoint after every second one.
GUIDED = [
    "data.max_length=512",
    "data.train_batch_size=8",
    "data.micro_batch_size_per_gpu=4",
    "trainer.total_training_steps=4",
    "trainer.total_epochs=2",
    "trainer.save_freq=2",
]


def sft_overrides(work: Path, model: Path, data: Path) -> list[str]:
    """Of the config `avar_sft`, for the CPU."""
    return [
        "machine=cpu_sft",
        f"model.path={model}",
        f"data.train_files={data}",
        "optim.lr=1e-3",
        "avar.agto.query_role=response",
        "trainer.test_freq=-1",
        f"trainer.default_local_dir={work / 'checkpoints'}",
    ]


def sft(work: Path, overrides: list[str]) -> list[str]:
    """Command of verl's SFT trainer."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    trainer = ["-m", "verl.trainer.sft_trainer", *CONFIG, "--config-name", "avar_sft"]
    return [*launcher, *trainer, *overrides, f"hydra.run.dir={work / 'hydra'}"]


def grpo(work: Path, model: Path, data: Path, overrides: list[str]) -> list[str]:
    """Command of verl's PPO trainer."""
    trainer = [sys.executable, "-m", "verl.trainer.main_ppo", *CONFIG, "--config-name", "avar_grpo"]
    return [*trainer, *grpo_overrides(work, model, data), *overrides]


def grpo_overrides(work: Path, model: Path, data: Path) -> list[str]:
    """Of the config `avar_grpo`, for the CPU."""
    return [
        "machine=cpu_grpo",
        f"actor_rollout_ref.model.path={model}",
        f"data.train_files={data}",
        f"data.val_files={data}",
        "data.train_batch_size=4",
        "data.max_prompt_length=64",
        "data.max_response_length=80",
        "actor_rollout_ref.rollout.n=4",
        "actor_rollout_ref.actor.ppo_mini_batch_size=4",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=8",
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=8",
        "actor_rollout_ref.actor.optim.lr=1e-4",
        "trainer.val_before_train=false",
        "trainer.test_freq=-1",
        f"trainer.default_local_dir={work / 'checkpoints'}",
        f"hydra.run.dir={work / 'hydra'}",
    ]


def environment(metrics: Path) -> dict[str, str]:
    """Of a run that compiles nothing: to find out what a compiler could do takes vLLM seconds."""
    own = {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "TORCHDYNAMO_DISABLE": "1"}
    return {**os.environ, **own, "VERL_FILE_LOGGER_PATH": str(metrics)}


def steps(metrics: Path) -> dict[int, dict]:
    """Metrics by step, from verl's file logger; several records of a step are merged."""
    out: dict[int, dict] = {}
    for line in metrics.read_text().splitlines() if metrics.exists() else []:
        record = json.loads(line)
        out.setdefault(record["step"], {}).update(record["data"])
    return out


def run(command: list[str], work: Path, name: str) -> dict[int, dict]:
    """Run to the end; the metrics by step."""
    metrics = work / f"{name}.jsonl"
    with (work / f"{name}.log").open("w") as log:
        process = subprocess.run(
            command, env=environment(metrics), stdout=log, stderr=subprocess.STDOUT, timeout=TIMEOUT_S
        )
    assert process.returncode == 0, (work / f"{name}.log").read_text(errors="replace")[-6000:]
    return steps(metrics)


class Nodes:
    """A script of recipes/avar on each of two nodes of one training process, both of them this machine.

    Leaving the context ends whatever of it still runs.
    """

    def __init__(self, script: str, overrides: list[str], work: Path, name: str, variables: dict[str, str]):
        self.metrics = work / f"{name}.jsonl"
        self.logs = [work / f"{name}_{rank}.log" for rank in (0, 1)]
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        own = {"PATH": path, "NNODES": "2", "GPUS": "1", **variables}
        self.processes = []
        for rank, log in enumerate(self.logs):
            with log.open("w") as file:
                process = psutil.Popen(
                    ["bash", str(RECIPE / script), *overrides],
                    env=environment(self.metrics) | own | {"NODE_RANK": str(rank)},
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
            self.processes.append(process)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            kill(process)

    def text(self) -> str:
        return "\n".join(log.read_text(errors="replace")[-4000:] for log in self.logs)

    def wait(self) -> list[int]:
        """Until both have ended; their exit codes."""
        return [process.wait(TIMEOUT_S) for process in self.processes]

    def kill_training_process(self, tracker: Path, after_step: int) -> None:
        """Of the second node, without warning, once `after_step` is checkpointed and logged."""
        deadline = time.monotonic() + TIMEOUT_S
        while not is_done(after_step, tracker, self.metrics):
            assert all(process.poll() is None for process in self.processes), f"ended too early\n{self.text()}"
            assert time.monotonic() < deadline, f"no checkpoint of step {after_step}\n{self.text()}"
            time.sleep(0.1)
        # torchrun and verl tell a training process its rank; what it starts inherits that.
        ranked = [one for one in self.processes[1].children(recursive=True) if has_rank(one)]
        victims = [one for one in ranked if one.parent() not in ranked]
        assert len(victims) == 1, [one.cmdline() for one in victims]
        victims[0].kill()


def has_rank(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):  # It has ended since.
        return "RANK" in process.environ()
    return False


def is_done(step: int, tracker: Path, metrics: Path) -> bool:
    """A step is checkpointed and logged."""
    return tracker.exists() and tracker.read_text().strip() == str(step) and step in steps(metrics)


def kill(process: psutil.Popen) -> None:
    """And all that it has started. Workers have sessions of their own, which a signal to the group misses."""
    if process.poll() is None:
        for victim in (*process.children(recursive=True), process):
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.kill()
    process.wait()


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def run_and_kill(command: list[str], work: Path, name: str, after_step: int) -> dict[int, dict]:
    """Start, and kill every process of the run without warning once `after_step` is checkpointed and logged."""
    metrics, tracker = work / f"{name}.jsonl", work / "checkpoints" / "latest_checkpointed_iteration.txt"
    with (work / f"{name}.log").open("w") as log:
        process = psutil.Popen(command, env=environment(metrics), stdout=log, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + TIMEOUT_S
        while not is_done(after_step, tracker, metrics):
            text = (work / f"{name}.log").read_text(errors="replace")
            assert process.poll() is None, f"ended before it could be killed\n{text[-6000:]}"
            assert time.monotonic() < deadline, f"no checkpoint of step {after_step}\n{text[-6000:]}"
            time.sleep(0.1)
        kill(process)
    return steps(metrics)
