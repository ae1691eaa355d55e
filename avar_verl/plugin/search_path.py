# SPDX-License-Identifier: Apache-2.0
"""Hydra finds the recipe's configs by name, without `--config-dir`, wherever `recipes` is installed.

`register` belongs in `avar_verl.plugin.register`, as a post-import hook of `hydra`:

    wrapt.register_post_import_hook("avar_verl.plugin.search_path:register", "hydra")

verl's launchers import verl, and with it the plugin, before hydra reads its command line. Registering here needs no
`hydra_plugins` package, and a hydra program that does not import verl never sees the path.
"""

from types import ModuleType

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin

CONFIGS = "pkg://recipes.avar.config"


class AvarSearchPath(SearchPathPlugin):
    """Appends `CONFIGS` to the search path. Hydra takes the first match, so no config of verl or of a user changes."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("avar_verl", CONFIGS)


def register(_hydra: ModuleType) -> None:
    """Add the search path to hydra's plugins."""
    Plugins.instance().register(AvarSearchPath)
