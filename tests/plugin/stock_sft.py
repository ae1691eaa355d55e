# SPDX-License-Identifier: Apache-2.0
"""verl's SFT trainer with verl's own config, and then a look at what of verl is not verl's own. Run by test_switch.py.

    torchrun ... stock_sft.py REPORT.json CONFIG_NAME OVERRIDES...

With PLAIN_CPU=1 the entry points are off (VERL_USE_EXTERNAL_PLUGINS=none), and the CPU platform alone is set up here.
"""

import json
import os
import sys
from pathlib import Path

report = Path(sys.argv.pop(1))
if os.environ.get("PLAIN_CPU"):
    from avar_verl.plugin.compat.cpu import platform, process_group  # noqa: F401  registers the platform

    process_group.apply()
    import verl.workers.engine  # noqa: F401  asks for the platform
    from verl.workers.engine.base import EngineRegistry
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

    EngineRegistry.register("language_model", ["fsdp2"], "cpu")(FSDPEngineWithLMHead)

from verl.trainer import sft_trainer  # noqa: E402
from verl.workers.engine.base import EngineRegistry  # noqa: E402

from tests.plugin.changes import changed  # noqa: E402

sys.argv[1:2] = ["--config-name", sys.argv[1]]
sft_trainer.main()
engine = EngineRegistry.get_engine_cls("language_model", "fsdp2")
report.write_text(json.dumps({"engine": f"{engine.__module__}.{engine.__qualname__}", "changed": changed()}))
