# SPDX-License-Identifier: Apache-2.0
"""verl agent loops and reward managers. verl's own must be imported first: see `avar_verl.plugin.engine`."""

import verl.experimental.agent_loop  # noqa: F401
import verl.experimental.reward_loop.reward_manager  # noqa: F401
