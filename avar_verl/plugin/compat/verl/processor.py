# SPDX-License-Identifier: Apache-2.0
"""Processors of the families that verl does not list.

`verl.utils.tokenizer.tokenizer.hf_processor` (tokenizer.py:185-263) knows seven processor classes. For any other, and
after any error, it warns and returns None, and verl goes on to train on text alone. Here a model of a known family
(`avar_verl.model.families`) gets its processor or an error.
"""

import functools
import warnings
from typing import Any

from avar_verl.model.checkpoint import load_processor
from avar_verl.model.families import known_families, load_outside
from avar_verl.plugin.compat.replace import replace


def apply(tokenizer_module) -> None:
    """Wrap `hf_processor` of `verl.utils.tokenizer.tokenizer`."""
    original = tokenizer_module.hf_processor

    @functools.wraps(original)
    def hf_processor(name_or_path, **kwargs) -> Any:
        from transformers import AutoConfig

        load_outside()  # They may register the model.
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            processor = original(name_or_path, **kwargs)
        if processor is not None:
            return processor
        config = AutoConfig.from_pretrained(name_or_path, **kwargs)
        if config.model_type not in known_families():
            for warning in caught:
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
            return None
        processor = load_processor(name_or_path, **kwargs)
        processor.config = config  # As verl does, for whatever reads it.
        return processor

    replace(tokenizer_module, "hf_processor", hf_processor)
