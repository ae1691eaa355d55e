# SPDX-License-Identifier: Apache-2.0
"""The cells of the study: which runs there are, what each starts from, and the settings that they share."""

from dataclasses import dataclass
from typing import Any

from avar_verl.tools.demo.lazy_task import Mixture
from avar_verl.tools.study.loops import VISUAL

GUIDANCE = ("plain", "agto")
CHAINS = {
    "mixture": Mixture(lazy_share=0.6),
    "lazy": Mixture(lazy_share=1.0),
    "look": Mixture(lazy_share=0.0),
    "text": Mixture(kind="text"),
}
# Text-only chains have no image to guide attention to.
COLD_STARTS = [
    (guidance, chains) for guidance in GUIDANCE for chains in CHAINS if (guidance, chains) != ("agto", "text")
]
REWARDS = ("accuracy", *VISUAL)
SUMMED = "sum_then_normalize"
OTHERS = ("normalize_then_sum", "no_std")
# Interventions on every cold start; the first two are the paper's.
INTERVENTIONS = ("alpha_img=0.15", "alpha_img=0.15,alpha_sys=0.4", "alpha_img=0.5,alpha_sys=0.4")


@dataclass(frozen=True, kw_only=True)
class StudySettings:
    """Sizes of the study, shared by all of its runs."""

    seeds: int = 5
    """Seeds of model and data, from 0."""

    num_train: int = 1024
    """Rows of a cold start, and of the base model's file."""

    base_steps: int = 300
    """Steps on captions and echoes, which make the base model of a seed; lr 4e-3."""

    cold_steps: int = 200
    """Steps of a cold start, batches of 28; lr 3e-3."""

    alpha: float = 0.02
    """Weight of L_enhance in AGTO cells, which stops at an image mass of 0.4 per head; response queries."""

    grpo_steps: int = 20
    """Steps of 16 prompts x 8 rollouts, lr 1e-4."""

    num_rl: int = 160
    """Prompts of GRPO, whose hints are all right."""

    num_eval: int = 280
    """Held-out questions with unbiased hints (right in 1 of 10), and as many with hints that are right in 9 of 10."""


@dataclass(frozen=True)
class Cell:
    """One run. `stage` is `base`, `cold` or `grpo`; the other fields are None where they do not apply."""

    seed: int
    stage: str
    guidance: str | None = None
    chains: str | None = None
    reward: str | None = None
    normalization: str | None = None

    @property
    def name(self) -> str:
        parts = (self.stage, self.guidance, self.chains, self.reward, self.normalization)
        return "-".join([*(part for part in parts if part), f"seed{self.seed}"])

    @property
    def start(self) -> "Cell | None":
        """The run whose checkpoint this one trains on; None for random weights."""
        if self.stage == "base":
            return None
        if self.stage == "cold":
            return Cell(self.seed, "base")
        return Cell(self.seed, "cold", self.guidance, self.chains)


def main_cells(settings: StudySettings) -> list[Cell]:
    """Base models, cold starts and GRPO with every reward from both mixtures, seed by seed."""
    out = []
    for seed in range(settings.seeds):
        out.append(Cell(seed, "base"))
        out += [Cell(seed, "cold", guidance, chains) for guidance, chains in COLD_STARTS]
        out += [Cell(seed, "grpo", guidance, "mixture", reward, SUMMED) for guidance in GUIDANCE for reward in REWARDS]
    return out


def best_rewards(records: dict[str, dict[str, Any]], number: int = 2) -> list[str]:
    """The visual rewards with the highest mean accuracy on unbiased questions over the main cells."""
    means = {}
    for reward in VISUAL:
        values = [
            record["accuracy"]
            for record in records.values()
            if record["reward"] == reward and record["normalization"] == SUMMED
        ]
        means[reward] = sum(values) / len(values)
    return sorted(means, key=lambda reward: -means[reward])[:number]


def further_cells(settings: StudySettings, records: dict[str, dict[str, Any]]) -> list[Cell]:
    """The other normalisations of the two best visual rewards, once all main cells are in `records`."""
    return [
        Cell(seed, "grpo", guidance, "mixture", reward, normalization)
        for seed in range(settings.seeds)
        for guidance in GUIDANCE
        for reward in best_rewards(records)
        for normalization in OTHERS
    ]
