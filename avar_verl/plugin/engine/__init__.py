# SPDX-License-Identifier: Apache-2.0
"""verl training engines with attention capture.

verl's engines must be imported first: this runs the hook of `avar_verl.plugin.register`, which imports `engine.fsdp`.
In the opposite order, the hook would find that module only partly initialised.
"""

import verl.workers.engine  # noqa: F401
