# SPDX-License-Identifier: Apache-2.0
"""Engine config of verl's FSDP engine with the attention fields; `_target_` of `engine` and `actor.fsdp_config`."""

from dataclasses import dataclass
from typing import Optional

from verl.workers.config import FSDPEngineConfig

from avar_verl.plugin.config import STRATEGIES, AgtoConfig, VarsConfig


@dataclass
class AvarFSDPEngineConfig(FSDPEngineConfig):
    """verl's `FSDPEngineConfig` plus:

    Args:
        agto: guidance of the training loss; None trains with verl's loss.
        vars: masses to return from the log-prob pass; None returns none.
        freeze_vision_tower: True freezes the vision tower. Paper: False.
        freeze_projector: True freezes the projector between tower and language model. Paper: False.
    """

    agto: Optional[AgtoConfig] = None
    vars: Optional[VarsConfig] = None
    freeze_vision_tower: bool = False
    freeze_projector: bool = False

    def __post_init__(self):
        super().__post_init__()
        # GRPO's actor config sets the strategy afterwards (`plugin.refusals` checks it there).
        asked = [name for name in ("agto", "vars", "freeze_vision_tower", "freeze_projector") if getattr(self, name)]
        if asked and self.strategy not in STRATEGIES:
            raise ValueError(
                f"{asked} are read by verl's FSDP engine, {STRATEGIES}; got strategy={self.strategy!r}, whose engine "
                "trains without. Set strategy=fsdp2."
            )

    @property
    def freezes(self) -> bool:
        """Whether anything is frozen."""
        return self.freeze_vision_tower or self.freeze_projector
