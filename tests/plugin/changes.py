# SPDX-License-Identifier: Apache-2.0
"""What of verl, in this process, is avar's and not verl's own.

As a program: import what the patches are about, then do what the arguments say, and print the report as JSON.

    python -m tests.plugin.changes [switch_on]
"""

import importlib
import inspect
import json
import sys
import types
from pathlib import Path

import avar_verl

PACKAGE = f"{Path(avar_verl.__file__).parent}/"

# Every module that `plugin.register` or a patch names, and modules that import functions from these.
IMPORTED = [
    "verl.utils.tensordict_utils",
    "verl.utils.tokenizer",
    "verl.utils.fsdp_utils",
    "verl.utils.model",
    "verl.utils.flops_counter",
    "verl.models.transformers.qwen2_vl",
    "verl.models.transformers.glm4v",
    "verl.models.transformers.monkey_patch",
    "verl.workers.engine",
    "verl.workers.engine_workers",
    "verl.utils.transferqueue_utils",
    "verl.experimental.agent_loop.agent_loop",
    "verl.experimental.reward_loop.reward_manager",
    "verl.trainer.ppo.v1",
    "verl.trainer.main_ppo",
    "verl.trainer.sft_trainer",
]


def is_defined_here(value: object) -> bool:
    """Whether a function or class was written in this package. functools.wraps copies `__module__`: the file tells."""
    code = getattr(value, "__code__", None)
    if isinstance(code, types.CodeType):
        return code.co_filename.startswith(PACKAGE)
    return inspect.isclass(value) and value.__module__.startswith("avar_verl")


def changed() -> list[str]:
    """Names in verl's modules and classes, and in torch.distributed, that are avar's."""
    found = []
    for name, module in sorted(sys.modules.items()):
        if name != "torch.distributed" and name.split(".")[0] != "verl":
            continue
        for attribute, value in list(vars(module).items()):
            if is_defined_here(value):
                found.append(f"{name}.{attribute}")
            elif inspect.isclass(value) and value.__module__ == name:
                found += [f"{name}.{attribute}.{inner}" for inner, x in vars(value).items() if is_defined_here(x)]
    return found


def main() -> None:
    import verl  # noqa: F401

    for module in IMPORTED:
        importlib.import_module(module)
    if "switch_on" in sys.argv[1:]:
        from avar_verl.plugin.switch import switch_on

        switch_on()
    from verl.utils import flops_counter
    from verl.workers.engine.base import EngineRegistry

    engines = {
        f"{strategy} {device}": engine.__name__
        for strategy in ("fsdp", "fsdp2")
        for device, engine in EngineRegistry._engines["language_model"][strategy].items()
    }
    flops = is_defined_here(flops_counter.ESTIMATE_FUNC["glm4v"])
    print(json.dumps({"changed": changed(), "engines": engines, "flops": flops}))


if __name__ == "__main__":
    main()
