# SPDX-License-Identifier: Apache-2.0
"""The model folder under examination. Each part is loaded when a check first uses it."""

import copy
import gc
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
import torch
from transformers import AutoModelForImageTextToText, GenerationConfig

from avar_verl.model.checkpoint import load_config, load_model, ready
from avar_verl.model.families import Family, get_family
from avar_verl.model.render import Rendered, collate, render
from avar_verl.model.responses import opening_of
from avar_verl.model.roles import RoleMap
from avar_verl.tools.doctor.command import Doctor
from avar_verl.tools.doctor.samples import conversations, user

# From this many parameters on, checks that run the model use one with random weights and few layers.
LARGE = 2_000_000_000
FEW_LAYERS, FEW_EXPERTS = 2, 8


def count(number: int) -> str:
    """A number of parameters in billions or millions."""
    return f"{number / 1e9:.3g} billion" if number >= 1e9 else f"{number / 1e6:.3g} million"


def build_meta(config) -> torch.nn.Module:
    """The model of a config, without allocating its weights."""
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


def reduced(config) -> Any:
    """A copy of a config with few text layers (one of each kind) and few experts."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    kinds = list(dict.fromkeys(getattr(text, "layer_types", None) or []))
    if getattr(text, "num_kv_shared_layers", None):  # One more of each kind, which reads the keys of the first.
        text.num_kv_shared_layers = len(kinds)
        kinds = 2 * kinds
    text.num_hidden_layers = max(FEW_LAYERS, len(kinds))
    if kinds:
        text.layer_types = kinds + kinds[-1:] * (text.num_hidden_layers - len(kinds))
    if getattr(text, "cross_attention_layers", None):
        text.cross_attention_layers = [text.num_hidden_layers - 1]
    if getattr(text, "num_experts", None):
        text.num_experts = min(text.num_experts, FEW_EXPERTS)
    return config


def build_random(config, seed: int = 0) -> torch.nn.Module:
    """A float32 model with random weights, also for weights that are initialised with zeros (gates, projectors) and
    would hide images.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if not parameter.any():
                    parameter.normal_(std=0.1)
    return model


def check_tokenizer_file(file: Path) -> None:
    """Whether the installed tokenizers can read the file, if there is one.

    Raises:
        ValueError: they cannot, for example because a newer version wrote the file.
    """
    if not file.is_file():
        return
    try:
        tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # Broad: this library raises only plain Exception.
        raise ValueError(
            f"tokenizer.json must be readable by tokenizers {tokenizers.__version__}; got {error}. Take the file of "
            "the original checkpoint, or install the version that wrote it."
        ) from error


@dataclass
class Subject:
    """The model folder that `options` name and how to examine it.

    large: number of parameters from which the checks run on a reduced model.
    """

    options: Doctor
    large: int = LARGE

    @cached_property
    def config(self) -> Any:
        return load_config(self.options.model)

    @cached_property
    def family(self) -> Family:
        return get_family(self.config.model_type)

    @cached_property
    def processor(self) -> Any:
        """The processor as verl loads it in training.

        Raises:
            ValueError: verl drops the processor, as it does after any error, with a warning that is easily missed.
        """
        check_tokenizer_file(Path(self.options.model) / "tokenizer.json")
        from avar_verl.plugin.processor import hf_processor  # Imports verl, which takes seconds.

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            processor = hf_processor(self.options.model)
        if processor is None:
            said = [str(warning.message) for warning in caught if "processor" in str(warning.message)]
            raise ValueError(
                f"verl's hf_processor must return a processor; got None ({'; '.join(said) or 'no warning'}). "
                "Training would continue on text only."
            )
        return processor

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    @cached_property
    def role_map(self) -> RoleMap:
        return RoleMap.from_pretrained(self.processor, self.config)

    @cached_property
    def generation_config(self) -> GenerationConfig | None:
        """None for a folder without one."""
        try:
            return GenerationConfig.from_pretrained(self.options.model)
        except OSError:
            return None

    @cached_property
    def meta_model(self) -> torch.nn.Module:
        return build_meta(self.config)

    @cached_property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.meta_model.parameters())

    @property
    def is_reduced(self) -> bool:
        return self.num_parameters > self.large

    @cached_property
    def model(self) -> torch.nn.Module:
        """The model in float32 and in evaluation mode, with the attention that the config chooses."""
        if self.is_reduced:
            return ready(build_random(reduced(self.config)), self.options.device)
        return load_model(self.options.model, self.options.device)

    def forget_model(self) -> None:
        """Drop the model, so that it is loaded again on next use: for a check that changes it, or needs its memory."""
        self.__dict__.pop("model", None)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def opening(self, template_kwargs: dict | None = None) -> str:
        """What the generation prompt writes after the assistant's header, such as `<think>`; "" for white space."""
        ids = opening_of(self.processor, self.role_map, [user("Why?")], template_kwargs or {})
        return self.tokenizer.decode(ids)

    @cached_property
    def plain(self) -> dict[str, Any]:
        """Settings of the chat template for responses without a thought."""
        return {"enable_thinking": False} if "<think>" in self.opening() else {}

    @cached_property
    def thinking(self) -> dict[str, Any]:
        """Settings of the chat template for responses that begin with a thought."""
        return {"enable_thinking": True} if "</think>" in self.opening() else {}

    def render(self, messages: list[dict], add_generation_prompt: bool = False) -> Rendered:
        """A conversation as ids and features."""
        return render(self.processor, messages, add_generation_prompt=add_generation_prompt)

    @cached_property
    def samples(self) -> dict[str, Rendered]:
        """`conversations` rendered, by name; their responses have no thought."""
        return {
            name: render(self.processor, messages, template_kwargs=self.plain)
            for name, messages in conversations().items()
        }

    def inputs(self, samples: list[Rendered], padding_side: str = "right") -> dict[str, torch.Tensor]:
        """A batch of rendered samples on the model's device."""
        inputs = collate(self.family, self.config, samples, self.tokenizer.pad_token_id, padding_side)
        return {key: value.to(self.options.device) for key, value in inputs.items()}
