# SPDX-License-Identifier: Apache-2.0
"""Engine config of verl's FSDP engine with the attention fields; `_target_` of `engine` and `actor.fsdp_config`."""

from dataclasses import dataclass
from typing import Optional

from verl.workers.config import FSDPEngineConfig

from avar_verl.config import AgtoConfig, VarsConfig


@dataclass
class AvarFSDPEngineConfig(FSDPEngineConfig):
    """verl's `FSDPEngineConfig` plus:

    Args:
        agto: guidance of the training loss; None trains with verl's loss.
        vars: masses to return from the log-prob pass; None returns none.
    """

    agto: Optional[AgtoConfig] = None
    vars: Optional[VarsConfig] = None
