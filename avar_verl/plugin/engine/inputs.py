# SPDX-License-Identifier: Apache-2.0
"""Model inputs that verl's engine cannot make: features of images of different sizes, and batches without images."""

import torch
import transfer_queue as tq
from PIL import Image
from tensordict import TensorDict
from tensordict.tensorclass import NonTensorData
from verl.utils import tensordict_utils as tu

from avar_verl.attention.capture import find_decoder
from avar_verl.model.corrupt import first_rows
from avar_verl.model.families import Family
from avar_verl.model.render import merge_features, render
from avar_verl.plugin.compat.verl.shared_features import plain_rows, read_features
from avar_verl.plugin.config import PARTITION, PARTNER, PROMPT_ROWS


def sample_features(micro_batch: TensorDict) -> list[dict[str, torch.Tensor]]:
    """The image features of every sample, {} without an image."""
    if "multi_modal_inputs" not in micro_batch.keys():
        return [{}] * len(micro_batch)
    return plain_rows(micro_batch["multi_modal_inputs"])


def prompt_rows(data: TensorDict) -> list[dict[str, int] | None]:
    """PROMPT_ROWS of every sample; None where no tool has returned an image, so that all features are the prompt's."""
    if "extra_fields" not in data.keys():
        return [None] * len(data)
    return [(extra or {}).get(PROMPT_ROWS) for extra in tu.get(data, "extra_fields")]


def with_features(micro_batch: TensorDict, samples: list[dict[str, torch.Tensor]]) -> TensorDict:
    """The micro-batch with other image features."""
    changed = micro_batch.copy()
    changed["multi_modal_inputs"] = torch.stack([NonTensorData(features) for features in samples], dim=0)
    return changed


def partner_features(data: TensorDict) -> dict[str, dict[str, torch.Tensor]]:
    """The features of the prompts' images of the rollouts that PARTNER names, by their key; {} for ""."""
    keys = sorted(set(tu.get(data, PARTNER)) - {""})
    found = {"": {}}
    if keys:
        partition = tu.get_non_tensor_data(data=data, key=PARTITION, default=None)
        fields = ["multi_modal_inputs", "extra_fields"]
        got = tq.kv_batch_get(keys=keys, partition_id=partition, select_fields=fields)
        own = read_features(sample_features(got))
        found.update(zip(keys, map(first_rows, own, prompt_rows(got)), strict=True))
    return found


def merged_features(
    family: Family, micro_batch: TensorDict, like: dict[str, torch.Tensor] | None = None
) -> tuple[dict[str, torch.Tensor], TensorDict]:
    """Features of a micro-batch, and the micro-batch with these features instead of per-sample ones.

    verl concatenates the samples' features (verl/utils/model.py:759-809), which fails if one image has more tiles than
    another. `like`: features of any image, for families in which every sample needs features.
    """
    features = merge_features(family, sample_features(micro_batch), like)
    # A batch needs one entry per sample; all but the first are empty.
    return features, with_features(micro_batch, [features, *([{}] * (len(micro_batch) - 1))])


class DummyImage:
    """Runs the vision tower on a black image, times zero, in a forward pass without an image.

    Under FSDP every rank must take part in the collectives of every module. A rank whose micro-batch has no image would
    skip those of the vision tower, and all other ranks would wait forever. `wanted` is set before each forward pass.
    """

    def __init__(self, module: torch.nn.Module, processor, family: Family):
        image = Image.new("RGB", (64, 64))
        messages = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "."}]}]
        self.wanted = False
        self.features = render(processor, messages).features
        if family.fill_text_only is None:  # Else every sample gets an image that no token sees.
            self._model = next(part for part in module.modules() if hasattr(part, "get_image_features"))
            find_decoder(module).register_forward_pre_hook(self._add, with_kwargs=True)

    def _add(self, _decoder, args, kwargs):
        if not self.wanted:
            return args, kwargs
        embeds = kwargs["inputs_embeds"]
        features = {key: value.to(embeds.device) for key, value in self.features.items()}
        output = self._model.get_image_features(**features).pooler_output
        parts = output if isinstance(output, list | tuple) else [output]
        zero = sum(0.0 * part.float().mean() for part in parts).to(embeds.dtype)
        return args, {**kwargs, "inputs_embeds": embeds + zero}
