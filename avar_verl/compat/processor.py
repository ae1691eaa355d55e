# SPDX-License-Identifier: Apache-2.0
"""Processors of the families that verl does not list.

`verl.utils.tokenizer.tokenizer.hf_processor` (tokenizer.py:185-263) knows seven processor classes. For any other, and
after any error, it warns and returns None, and verl goes on to train on text alone. Here a model of a known family
(`avar_verl.families`) gets its processor or an error.
"""

import functools
import sys
from typing import Any

from avar_verl.families import FAMILIES


def apply(tokenizer_module) -> None:
    """Wrap `hf_processor` of the freshly imported module `verl.utils.tokenizer.tokenizer`."""
    original = tokenizer_module.hf_processor

    @functools.wraps(original)
    def hf_processor(name_or_path, **kwargs) -> Any:
        from transformers import AutoConfig, AutoProcessor, PreTrainedTokenizerBase

        processor = original(name_or_path, **kwargs)
        if processor is not None:
            return processor
        config = AutoConfig.from_pretrained(name_or_path, **kwargs)
        if config.model_type not in FAMILIES:
            return None
        processor = AutoProcessor.from_pretrained(name_or_path, **kwargs)
        if isinstance(processor, PreTrainedTokenizerBase):
            raise ValueError(
                f"a {config.model_type} model needs its processor, without which verl trains on text alone; got "
                f"{type(processor).__name__} from {name_or_path!r}. Copy processor_config.json or "
                "preprocessor_config.json of the checkpoint into the folder."
            )
        processor.config = config  # As verl does, for whatever reads it.
        return processor

    # `import verl` has imported the name into verl.utils by the time its plugins are loaded.
    for name, module in list(sys.modules.items()):
        if name.startswith("verl.") and vars(module).get("hf_processor") is original:
            module.hf_processor = hf_processor
    tokenizer_module.hf_processor = hf_processor
