# SPDX-License-Identifier: Apache-2.0
"""verl agent loops. verl's come first, for the reason given in `avar_verl.plugin.engine`."""

import verl.experimental.agent_loop  # noqa: F401
