# SPDX-License-Identifier: Apache-2.0
"""verl training engines with attention capture.

verl's engines must be imported first: this runs the hook of `avar_verl.plugin.register`, which imports `engine.fsdp`.
In the opposite order, the hook would find that module only partly initialised.
"""

import verl.workers.engine  # noqa: F401

from avar_verl.plugin.switch import switch_on

# verl's registry must hold `AvarFSDPEngine` before it looks for the engine of an `AvarFSDPEngineConfig`, also in a
# process that has received the config from another. Here, so that `engine.fsdp` can be imported first, too.
switch_on()
