# SPDX-License-Identifier: Apache-2.0
"""Names of weights as checkpoints have them, for the rollout engine.

transformers 5 renames weights while it loads them (conversion_mapping.py: `language_model.model` becomes
`model.language_model`, the `vision_model` inside CLIP's and SigLIP's towers is dropped) and turns the names back when
it saves. verl sends the engine's parameters to the rollout under the names in memory: its own
`convert_weight_keys` (verl/utils/model.py) reads a table that transformers 5 no longer has. vLLM then does not know
them ("KeyError: 'embeddings.patch_embedding.weight'"). Of an adapter, vLLM ignores tensors whose module it does not
know, without a word.
"""

from collections.abc import Callable

import torch


def checkpoint_name(model: torch.nn.Module) -> Callable[[str], str]:
    """A function from the name of a parameter in memory to its name in a checkpoint.

    Renamings alone: what changes tensors (fused experts) is verl's `unfuse_moe_params`.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    transforms = getattr(model, "_weight_conversions", None)
    if transforms is None:
        transforms = get_model_conversion_mapping(model, add_legacy=False)
    renamings = [item.reverse_transform() for item in reversed(transforms) if not isinstance(item, WeightConverter)]
    return lambda name: rename_source_key(name, renamings, [])[0]


def peft_name(name_of: Callable[[str], str]) -> Callable[[str], str]:
    """`checkpoint_name` for what verl sends of a model with adapters.

    Weights under an adapter have `.base_layer` in their names (verl/utils/fsdp_utils.py:792); adapters have peft's
    prefix, and end with `.lora_A.weight` or `.lora_B.weight`.
    """

    def name(own: str) -> str:
        head = "base_model.model." if own.startswith("base_model.model.") else ""
        own = own.removeprefix(head)
        for inside in (".base_layer.", ".lora_"):
            module, found, leaf = own.partition(inside)
            if found:
                return head + name_of(f"{module}.weight").removesuffix("weight").removesuffix(".") + found + leaf
        return head + name_of(own)

    return name
