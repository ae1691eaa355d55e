# SPDX-License-Identifier: Apache-2.0
"""Token roles under their public name; defined in `avar_verl.model.roles`."""

from avar_verl.model.roles import RoleMap, TokenRole

__all__ = ["RoleMap", "TokenRole"]
