# SPDX-License-Identifier: Apache-2.0
"""verl training engines with attention capture.

verl's engines come first: importing them runs the hook of `avar_verl.plugin.register`, which imports `engine.fsdp`. The
other way round, the hook would find that module half made.
"""

import verl.workers.engine  # noqa: F401
