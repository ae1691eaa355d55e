# SPDX-License-Identifier: Apache-2.0
"""What hydra gets from the plugin: the recipe's configs by name, and a callback that switches the plugin on.

verl's launchers import verl, and with it the plugin, before hydra reads its command line. Registering the search path
then needs no `hydra_plugins` package, and a hydra program that does not import verl never sees it.
"""

import inspect
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.experimental.callback import Callback
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig

from avar_verl.plugin.switch import switch_on

CONFIGS = "pkg://recipes.avar.config"


class AvarSearchPath(SearchPathPlugin):
    """Appends `CONFIGS` to the search path. Hydra takes the first match, so no config of verl or of a user changes."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("avar_verl", CONFIGS)


class SwitchOn(Callback):
    """Switches the plugin on before verl's launcher runs, and ends runs that `plugin.refusals` refuses.

    It comes with the node `avar`, whatever config it is part of.
    """

    def on_job_start(self, config: DictConfig, *, task_function: Callable, **kwargs: Any) -> None:
        # Here, because this module is imported as soon as anything imports hydra, as `refusals` does.
        from avar_verl.model.families import choose_family
        from avar_verl.plugin.refusals import check_run

        # Hydra turns exceptions of callbacks into warnings and starts the job (hydra/_internal/callbacks.py:27); only
        # SystemExit gets through.
        try:
            choose_family(config.avar.get("family") or "")
            switch_on()
            file = Path(inspect.getfile(inspect.unwrap(task_function)))
            check_run(config, file, config.hydra.overrides.task)
        except ValueError as error:
            sys.exit(f"avar_verl refuses this run: {error}")
        except Exception:  # Broad on purpose: whatever is raised here, hydra would start the job.
            traceback.print_exc()
            sys.exit("avar_verl could not check this run (see the error above).")


def register(_hydra: ModuleType) -> None:
    """Add the search path to hydra's plugins."""
    Plugins.instance().register(AvarSearchPath)
