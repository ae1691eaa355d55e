# SPDX-License-Identifier: Apache-2.0
"""Model families by `config.model_type`: each is `f(tokenizer, config) -> RoleMap`, in a file of its own."""

from avar_verl.families import qwen2_5_vl

FAMILIES = {
    "qwen2_5_vl": qwen2_5_vl.role_map,
}
