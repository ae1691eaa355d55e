# SPDX-License-Identifier: Apache-2.0
"""The work of one cell: training, its checkpoint, and its measurements.

Shape suffixes: B = samples, F = VISUAL_FIELDS
"""

from pathlib import Path
from typing import Any

import torch

from avar_verl.model.checkpoint import Checkpoint
from avar_verl.model.roles import TokenRole
from avar_verl.objectives.vars import VISUAL_FIELDS
from avar_verl.tools.demo import lazy_task
from avar_verl.tools.demo.lazy_task import Mixture
from avar_verl.tools.demo.tiny_model import build_tiny_model
from avar_verl.tools.study import loops
from avar_verl.tools.study.cells import CHAINS, INTERVENTIONS, Cell, StudySettings

# Offsets of the seeds of files that must not share images.
BASE_ROWS, CHAIN_ROWS, RL_PROMPTS = 1000, 2000, 3000
BATCH = 140
MEASURED = ("vas", "ratio", "image_share", "image_mass", "system_mass")


def folder_of(cell: Cell, out: Path) -> Path:
    """The checkpoint of a cell."""
    return out / "checkpoints" / cell.name


def _train(cell: Cell, out: Path, settings: StudySettings) -> tuple[Checkpoint, dict[str, Any]]:
    """The trained model of a cell and what its training logged."""
    seed = cell.seed
    if cell.stage == "base":
        random = build_tiny_model(out / "checkpoints" / f"random-seed{seed}.tmp", seed=seed)
        checkpoint, mixture = Checkpoint.load(random), Mixture(kind="base")
        start = loops.ColdStart(steps=settings.base_steps, lr=4e-3)
        rows_seed = BASE_ROWS + seed
    else:
        assert cell.start is not None
        checkpoint = Checkpoint.load(folder_of(cell.start, out))
    if cell.stage == "cold":
        mixture, rows_seed = CHAINS[str(cell.chains)], CHAIN_ROWS + seed
        alpha = settings.alpha if cell.guidance == "agto" else 0.0
        start = loops.ColdStart(steps=settings.cold_steps, lr=3e-3, alpha=alpha)
    if cell.stage != "grpo":
        rows = lazy_task.make_chains(settings.num_train, rows_seed, mixture)
        chains = [loops.chain_of(checkpoint, row) for row in rows]
        losses = list(loops.cold_start(checkpoint, chains, start, seed))
        return checkpoint, {"loss": sum(losses[-10:]) / len(losses[-10:])}
    prompts = lazy_task.make_questions(settings.num_rl, RL_PROMPTS + seed, 1.0, "train")
    recipe = loops.Grpo(
        steps=settings.grpo_steps,
        visual=None if cell.reward == "accuracy" else cell.reward,
        normalization=str(cell.normalization),
    )
    return checkpoint, {"curve": list(loops.grpo(checkpoint, prompts, recipe, seed))}


def _save(checkpoint: Checkpoint, folder: Path) -> None:
    temporary = folder.with_suffix(".tmp")
    checkpoint.model.save_pretrained(temporary)
    checkpoint.processor.save_pretrained(temporary)
    temporary.rename(folder)


def _responses(
    checkpoint: Checkpoint, seed: int, num: int, bias: float, spec: str | None = None
) -> list[loops.Answered]:
    samples = lazy_task.make_questions(num, seed, bias, "test")
    prompts = [loops.prompt_of(checkpoint, sample) for sample in samples]
    return [
        loops.answer(checkpoint, samples[at : at + BATCH], prompts[at : at + BATCH], loops.MAX_NEW_TOKENS, spec=spec)
        for at in range(0, num, BATCH)
    ]


def _share(batches: list[loops.Answered], field: str) -> float:
    values_B = torch.cat([getattr(batch, field) for batch in batches])
    return float(values_B.float().mean())


def measure(checkpoint: Checkpoint, seed: int, num: int) -> dict[str, Any]:
    """Greedy answers to held-out questions with unbiased and biased hints; masses and dependency of the unbiased ones.

    `accuracy` and `looks` are of the unbiased ones; `by_habit` splits means by whether a response looks.
    """
    unbiased, biased = (_responses(checkpoint, seed, num, bias) for bias in (lazy_task.CHANCE, 0.9))
    out: dict[str, Any] = {
        "accuracy": _share(unbiased, "correct_B"),
        "accuracy_biased": _share(biased, "correct_B"),
        "looks": _share(unbiased, "looks_B"),
        "n_eval": num,
    }
    looks_B = torch.cat([batch.looks_B for batch in unbiased])
    correct_B = torch.cat([batch.correct_B for batch in unbiased]).float()
    columns: dict[str, torch.Tensor] = {"accuracy": correct_B}
    for query in (TokenRole.USER, TokenRole.RESPONSE):
        passes = [loops.measured(checkpoint, batch.batch, query) for batch in unbiased]
        fields_BF = torch.cat([fields for fields, _ in passes])
        names = {name: f"{name}_{query.name.lower()}" for name in MEASURED}
        columns |= {key: fields_BF[:, VISUAL_FIELDS.index(name)] for name, key in names.items()}
    columns["dependency"] = torch.cat(
        [
            loops.dependency(checkpoint, batch.batch, logs_BS)
            for batch, (_, logs_BS) in zip(unbiased, passes, strict=True)
        ]
    )
    out |= {name: float(values_B.mean()) for name, values_B in columns.items() if name != "accuracy"}
    habits = {"look": looks_B, "lazy": ~looks_B}
    out["by_habit"] = {
        habit: {"n": int(chosen_B.sum())}
        | {name: float(values_B[chosen_B].mean()) for name, values_B in columns.items()}
        for habit, chosen_B in habits.items()
        if bool(chosen_B.any())
    }
    return out


def train_and_measure(cell: Cell, out: Path, settings: StudySettings) -> dict[str, Any]:
    """Train a cell, keep the checkpoint if others start from it, and measure it."""
    checkpoint, log = _train(cell, out, settings)
    checkpoint.model.eval()
    result = {**measure(checkpoint, cell.seed, settings.num_eval), **log}
    if cell.stage == "cold":
        result["interventions"] = {
            spec: _share(_responses(checkpoint, cell.seed, settings.num_eval, lazy_task.CHANCE, spec), "correct_B")
            for spec in INTERVENTIONS
        }
    if cell.stage != "grpo" and not folder_of(cell, out).exists():
        _save(checkpoint, folder_of(cell, out))
    return result
