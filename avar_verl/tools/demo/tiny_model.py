# SPDX-License-Identifier: Apache-2.0
"""A randomly initialised Qwen2.5-VL of under a million parameters, as a complete Hugging Face folder.

The architecture, the processor and the chat template are those of Qwen2.5-VL, so everything that works with the real
model (transformers, verl, vLLM, token roles, attention capture) works with this one, in seconds on a CPU. The tokenizer
is the model's own: bytes, and one token for each word of `avar_verl.tools.demo.photo_grid`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from avar_verl.tools.demo import lazy_task, photo_grid

# Qwen2.5-VL's own special tokens, in its own order.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# Single tokens, but not special ones: rewards read them after decoding with skip_special_tokens=True.
TAG_TOKENS = ("<think>", "</think>", "<answer>", "</answer>")

# Qwen2.5-VL's chat template.
CHAT_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}"
    "{% endif %}{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The words of the template, in addition to the demo's own sentences.
TEMPLATE_SENTENCES = ("system", "user", "assistant", "You are a helpful assistant.")

# A piece is a coordinate with its bracket or comma (" [0," and " 56,": four pieces per box), a word with the space
# before it, a run of punctuation or a run of spaces. A piece outside the vocabulary is spelled in bytes.
PIECE = r" ?\[?\p{N}{1,3}[,\]]?| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+"


# Fields of Qwen2_5_VLTextConfig; the rest follows from the tokenizer.
TEXT_CONFIG = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.1,
    # Time has a few hundred values, rows and columns have four: most rotations go to rows and columns, so that one head
    # can distinguish the places of a small grid.
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [1, 2, 13]},
}
# Fields of Qwen2_5_VLVisionConfig. The window is the whole image: 32 images need 32 attention calls per layer, not 128.
VISION_CONFIG = {
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 2,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": [1],
    "initializer_range": 0.1,
}


def build_tokenizer(
    sentences: Iterable[str],
    special_tokens: Sequence[str] = SPECIAL_TOKENS,
    added_tokens: Sequence[str] = TAG_TOKENS,
    **kwargs: Any,
) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with one token for every piece of ``sentences`` (see `PIECE`).

    Any text round-trips: a piece outside the vocabulary is spelled in bytes. The ids are the 256 bytes, the pieces in
    alphabetical order, ``special_tokens``, ``added_tokens``; the same arguments give the same tokenizer. It is
    Qwen2.5-VL's unless ``kwargs``, arguments of `PreTrainedTokenizerFast`, say otherwise.
    """
    pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECE), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tags = re.compile("|".join(map(re.escape, added_tokens)))
    words = {
        piece
        for sentence in (*TEMPLATE_SENTENCES, *sentences)
        for text in tags.split(sentence)
        for piece, _ in pre_tokenizer.pre_tokenize_str(text)
    }
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *sorted(words.difference(alphabet))]
    # No merges: with ignore_merges a piece is looked up as a whole, and an unknown piece becomes bytes.
    tokenizer = Tokenizer(
        models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[], ignore_merges=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special_tokens))
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in added_tokens])
    defaults = {
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": list(special_tokens),
        "model_max_length": TEXT_CONFIG["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{**defaults, **kwargs})


def build_tiny_model(path: str | Path, seed: int = 0, **overrides: Any) -> Path:
    """Write a randomly initialised tiny Qwen2.5-VL with its processor and tokenizer into the folder ``path``.

    An image of 112 x 112 pixels becomes 16 image tokens. The weights are float32 and depend only on ``seed``; torch's
    global random state does not change. vLLM's CPU attention supports a head size (``hidden_size`` divided by
    ``num_attention_heads``) of 32, 64, 80, 96, 112, 128 or larger ones, so 32 is the smallest that runs there, and
    ``mrope_section`` must sum to half of it.

    Args:
        path: the folder, created if necessary.
        seed: of the initial weights.
        **overrides: fields of `TEXT_CONFIG` with other values; ``vision_config`` is a dict of fields of
            `VISION_CONFIG`.

    Returns:
        ``path``.

    Raises:
        ValueError: a field is in neither table, or ``mrope_section`` does not match the head size.
    """
    path = Path(path)
    unknown = sorted(overrides.keys() - TEXT_CONFIG.keys() - {"vision_config"})
    unknown += sorted(overrides.get("vision_config", {}).keys() - VISION_CONFIG.keys())
    if unknown:
        raise ValueError(
            f"overrides must be fields of TEXT_CONFIG, or of VISION_CONFIG under vision_config; got {unknown}. "
            "Take the names from the two tables."
        )
    tokenizer = build_tokenizer([*photo_grid.sentences(), *lazy_task.sentences()])
    text = dict(TEXT_CONFIG)
    vision = {**VISION_CONFIG, **overrides.pop("vision_config", {})}
    text.update(overrides)
    head_size, section = text["hidden_size"] // text["num_attention_heads"], text["rope_parameters"]["mrope_section"]
    if 2 * sum(section) != head_size:
        raise ValueError(
            f"mrope_section must sum to half of the head size {head_size}; got {section}. Change rope_parameters too."
        )
    vision["out_hidden_size"] = text["hidden_size"]
    ids = {t: tokenizer.convert_tokens_to_ids(t) for t in SPECIAL_TOKENS}
    config = Qwen2_5_VLConfig(
        text_config={
            **text,
            "vocab_size": len(tokenizer),
            "bos_token_id": None,
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
            "tie_word_embeddings": True,
        },
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        eos_token_id=ids["<|im_end|>"], pad_token_id=ids["<|endoftext|>"], do_sample=False
    )
    pixels = photo_grid.IMAGE_SIZE**2
    # Both limits are fixed, so that transformers, verl and vLLM all see 16 tokens. They are given as `size`:
    # transformers 5.9 would write min_pixels and max_pixels into the class's own default, and so into every later
    # processor.
    size = {"shortest_edge": pixels, "longest_edge": pixels}
    kw = dict(patch_size=14, merge_size=2, temporal_patch_size=2, size=size)
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**kw),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**kw),
        chat_template=CHAT_TEMPLATE,
    )
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path
