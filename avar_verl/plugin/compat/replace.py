# SPDX-License-Identifier: Apache-2.0
"""Replace a function of verl wherever verl has imported it."""

import sys
from types import ModuleType
from typing import Any


def replace(module: ModuleType, name: str, new: Any) -> None:
    """Set `module.name = new`, also where verl has done `from module import name`.

    The plugin may be switched on after most of verl has been imported.
    """
    original = getattr(module, name)
    for loaded_name, loaded in list(sys.modules.items()):
        if loaded_name.startswith("verl.") and vars(loaded).get(name) is original:
            setattr(loaded, name, new)
    setattr(module, name, new)
