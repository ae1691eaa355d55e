# SPDX-License-Identifier: Apache-2.0
"""verl trainers with the visual attention reward.

verl's trainers must be imported first, for the reason given in `avar_verl.plugin.engine`.
"""

import verl.trainer.ppo.v1  # noqa: F401
