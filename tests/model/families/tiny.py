# SPDX-License-Identifier: Apache-2.0
"""Tiny, randomly initialised models of every family, each a complete Hugging Face folder.

The architecture, processor, special tokens and chat template are those of the family's checkpoints (the templates
without their parts for tools); sizes and vocabulary are the demo's. So everything that runs on the real models runs on
these, in seconds and on a CPU. A photograph of 112 x 112 pixels becomes 16 to 46 image tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from avar_verl.tools.demo import photo_grid, tiny_model

TEMPLATES = Path(__file__).parent / "templates"
TILE = 56  # Side of a tile, or of the whole image for a vision tower of one size.
PATCH = 14


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What a family's folder is made of.

    model_type: of the config, if it is not the name of the Spec.
    special_tokens: of the tokenizer, in this order.
    names: special tokens by the attribute that the processor reads them from, such as `image_token`.
    words: text of the chat template, so that its words are tokens.
    bos, eos, pad: the tokenizer's; eos ends an answer. add_bos: the tokenizer writes bos in front of a text.
    stops: what else ends an answer, for the generation config.
    template: of `TEMPLATES`, or the text.
    template_kwargs: with which it writes prompts that answers with a thought follow.
    reply: how the template writes an answer; all of it is RESPONSE.
    text, vision, top: fields of the config; top ones may depend on the ids, as ("token", text).
    processor, image_processor: arguments; the image processor under its class name.
    feature_extractor: class name of the one for audio.
    """

    model_type: str = ""
    special_tokens: tuple[str, ...]
    names: dict[str, str] = field(default_factory=dict)
    added_tokens: tuple[str, ...] = ()
    words: tuple[str, ...]
    bos: str | None = None
    add_bos: bool = False
    eos: str
    stops: tuple[str, ...] = ()
    pad: str
    template: str
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    reply: str
    text: dict[str, Any] = field(default_factory=dict)
    vision: dict[str, Any] = field(default_factory=dict)
    top: dict[str, Any] = field(default_factory=dict)
    ids: dict[str, str] = field(default_factory=dict)
    image_processor: str
    image: dict[str, Any] = field(default_factory=dict)
    video_processor: str | None = None
    video: dict[str, Any] = field(default_factory=dict)
    feature_extractor: str | None = None
    processor: dict[str, Any] = field(default_factory=dict)


# Four query heads of 32, the smallest head of vLLM's CPU attention; two of keys and values.
TEXT = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.1,
}
# For towers whose config has these names (SigLIP, CLIP and their like).
TOWER = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": TILE,
    "patch_size": PATCH,
}
# For Qwen's and GLM's towers, which take images of any shape.
NATIVE_TOWER = {
    "depth": 2,
    "hidden_size": 64,
    "num_heads": 2,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "initializer_range": 0.1,
}


def _pixels(tokens: tuple[int, int], side: int, frames: int = 1) -> dict[str, int]:
    """Limits of an image in pixels, for the least and the largest number of image tokens of `side` pixels."""
    least, largest = (count * side**2 * frames for count in tokens)
    return {"shortest_edge": least, "longest_edge": largest}


CHATML = ("system", "user", "assistant", "You are a helpful assistant.", "\n", " \n")
QWEN_IDS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
QWEN2_VL = Spec(
    special_tokens=tiny_model.SPECIAL_TOKENS,
    words=CHATML,
    eos="<|im_end|>",
    pad="<|endoftext|>",
    stops=("<|endoftext|>",),
    template=tiny_model.CHAT_TEMPLATE,
    reply="{}<|im_end|>\n",
    text={"rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [4, 6, 6]}},
    # Here the tower's own width is called embed_dim, and hidden_size is the text model's.
    vision={"depth": 2, "embed_dim": 64, "hidden_size": 128, "num_heads": 2, "mlp_ratio": 2, "initializer_range": 0.1},
    ids=QWEN_IDS,
    image_processor="Qwen2VLImageProcessor",
    image={"patch_size": 14, "merge_size": 2, "size": _pixels((4, 64), 28)},
    video_processor="Qwen2VLVideoProcessor",
    video={"patch_size": 14, "merge_size": 2, "size": _pixels((4, 64), 28)},
)
QWEN3_ROPE = {
    "rope_type": "default",
    "rope_theta": 1000.0,
    "mrope_section": [6, 5, 5],
    "mrope_interleaved": True,
}
QWEN3_VL = Spec(
    special_tokens=tiny_model.SPECIAL_TOKENS,
    words=CHATML,
    eos="<|im_end|>",
    pad="<|endoftext|>",
    stops=("<|endoftext|>",),
    template="qwen3_vl",
    reply="{}<|im_end|>\n",
    text={"head_dim": 32, "rope_parameters": QWEN3_ROPE, "tie_word_embeddings": True},
    vision={
        **NATIVE_TOWER,
        "intermediate_size": 128,
        "patch_size": 16,
        "out_hidden_size": 128,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
    },
    ids=QWEN_IDS,
    image_processor="Qwen2VLImageProcessor",
    image={"patch_size": 16, "merge_size": 2, "size": _pixels((4, 64), 32)},
    video_processor="Qwen3VLVideoProcessor",
    video={"patch_size": 16, "merge_size": 2, "size": _pixels((4, 64), 32)},
)
QWEN3_VL_MOE = Spec(
    **{
        **QWEN3_VL.__dict__,
        "text": {
            "head_dim": 32,
            "rope_parameters": QWEN3_ROPE,
            "tie_word_embeddings": False,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 96,
            "norm_topk_prob": True,  # As the checkpoint's config; vLLM reads it, transformers takes it for granted.
        },
    }
)
# One layer of each kind. Half of a head is rotated.
QWEN3_5_TEXT = {
    "head_dim": 32,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    # As in the checkpoints: vLLM knows no other share of rotated dimensions, and takes the type of the state from here.
    "rope_parameters": {**QWEN3_ROPE, "partial_rotary_factor": 0.25, "mrope_section": [2, 1, 1]},
    "mamba_ssm_dtype": "float32",
}
QWEN3_5 = Spec(
    **{
        **QWEN3_VL.__dict__,
        "words": (*CHATML, "\n\n"),
        "template": "qwen3_5",
        "reply": "<think>\n{think}\n</think>\n\n{}<|im_end|>\n",
        "text": {**QWEN3_5_TEXT, "tie_word_embeddings": True},
        "vision": {name: value for name, value in QWEN3_VL.vision.items() if name != "deepstack_visual_indexes"},
    }
)
QWEN3_5_MOE = Spec(
    **{
        **QWEN3_5.__dict__,
        "text": {
            **QWEN3_5_TEXT,
            "tie_word_embeddings": False,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 96,
            "shared_expert_intermediate_size": 96,
        },
    }
)
MINICPMV4_6 = Spec(
    special_tokens=(
        *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|video_pad|>", "<image>", "</image>"),
        *("<slice>", "</slice>", "<image_id>", "</image_id>"),
    ),
    names={
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "image_start_token": "<image>",
        "image_end_token": "</image>",
        "slice_start_token": "<slice>",
        "slice_end_token": "</slice>",
        "image_id_start_token": "<image_id>",
        "image_id_end_token": "</image_id>",
    },
    words=(*CHATML, "\n\n", "0 1"),
    eos="<|im_end|>",
    pad="<|endoftext|>",
    stops=("<|endoftext|>",),
    template="minicpmv4_6",
    template_kwargs={"enable_thinking": True},
    reply=QWEN3_5.reply,
    text={"model_type": "qwen3_5_text", **QWEN3_5_TEXT, "tie_word_embeddings": True},
    vision={
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 112,
        "patch_size": 7,
    },
    top={"insert_layer_id": 0, "image_size": 112},
    ids={"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"},
    image_processor="MiniCPMV4_6ImageProcessor",
    image={"scale_resolution": 112, "max_slice_nums": 4, "patch_size": 7},
    video_processor="MiniCPMV4_6VideoProcessor",
    video={"scale_resolution": 112, "patch_size": 7},
)
INTERNVL = Spec(
    special_tokens=(
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<img>",
        "</img>",
        "<IMG_CONTEXT>",
        "<quad>",
        "</quad>",
        "<ref>",
        "</ref>",
        "<box>",
        "</box>",
        "<video>",
    ),
    names={
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    },
    words=CHATML,
    eos="<|im_end|>",
    pad="<|endoftext|>",
    stops=("<|endoftext|>",),
    template="internvl",
    reply="{}<|im_end|>\n",
    text={"model_type": "qwen3", "head_dim": 32},
    vision={**TOWER, "image_size": [TILE, TILE], "patch_size": [PATCH, PATCH], "initializer_range": 0.1},
    # 4 x 4 patches of a tile become 2 x 2 tokens.
    top={"image_seq_length": 4, "downsample_ratio": 0.5},
    ids={"image_token_id": "<IMG_CONTEXT>"},
    image_processor="GotOcr2ImageProcessor",
    image={"size": {"height": TILE, "width": TILE}, "crop_to_patches": True, "min_patches": 1, "max_patches": 6},
    video_processor="InternVLVideoProcessor",
    video={"size": {"height": TILE, "width": TILE}},
    processor={"image_seq_length": 4},
)
LLAVA_PINPOINTS = [[28, 28], [28, 56], [56, 28], [56, 56], [28, 84], [84, 28], [56, 84], [84, 56]]
LLAVA_ONEVISION = Spec(
    special_tokens=("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"),
    words=CHATML,
    eos="<|im_end|>",
    pad="<|endoftext|>",
    stops=("<|endoftext|>",),
    template="llava_onevision",
    reply="{}<|im_end|>",
    text={"model_type": "qwen2"},
    vision={"model_type": "siglip_vision_model", **TOWER, "image_size": 28, "vision_use_head": False},
    top={"image_grid_pinpoints": LLAVA_PINPOINTS},
    ids={"image_token_index": "<image>", "video_token_index": "<video>"},
    image_processor="LlavaOnevisionImageProcessor",
    image={"size": {"height": 28, "width": 28}, "image_grid_pinpoints": LLAVA_PINPOINTS},
    video_processor="LlavaOnevisionVideoProcessor",
    video={"size": {"height": 28, "width": 28}},
    processor={"num_image_tokens": 4, "vision_feature_select_strategy": "full"},
)
LLAVA_NEXT = Spec(
    special_tokens=("<unk>", "<s>", "</s>", "<image>", "<pad>"),
    words=("[INST] <<SYS>>\n\n<</SYS>>\n\n [INST]", "What [/INST]", "You are a helpful assistant."),
    bos="<s>",
    add_bos=True,
    eos="</s>",
    pad="<pad>",
    template="llava_next",
    reply=" {}</s>",
    text={"model_type": "mistral", "head_dim": 32, "sliding_window": None},
    vision={"model_type": "clip_vision_model", **TOWER, "image_size": 28, "projection_dim": 64},
    top={"image_grid_pinpoints": LLAVA_PINPOINTS, "image_seq_length": 4},
    ids={"image_token_index": "<image>"},
    image_processor="LlavaNextImageProcessor",
    image={
        "size": {"shortest_edge": 28},
        "crop_size": {"height": 28, "width": 28},
        "image_grid_pinpoints": LLAVA_PINPOINTS,
    },
    # The tower's class token is dropped again.
    processor={"patch_size": PATCH, "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"},
)
GEMMA3 = Spec(
    special_tokens=(
        "<pad>",
        "<eos>",
        "<bos>",
        "<unk>",
        "<start_of_turn>",
        "<end_of_turn>",
        "<start_of_image>",
        "<end_of_image>",
        "<image_soft_token>",
    ),
    names={"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"},
    # Runs of newlines are tokens by these names in Gemma's vocabulary, and vLLM looks them up.
    added_tokens=("\n", "\n\n", "\n\n\n", "\n\n\n\n"),
    words=("user", "model", "You are a helpful assistant."),
    bos="<bos>",
    add_bos=True,
    eos="<end_of_turn>",
    pad="<pad>",
    stops=("<eos>",),
    template="gemma3",
    reply="{}<end_of_turn>\n",
    text={
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": 64,
        "layer_types": ["sliding_attention", "full_attention"],
        "tie_word_embeddings": True,
    },
    vision={**TOWER, "image_size": 112, "vision_use_head": False},
    top={"mm_tokens_per_image": 16},
    ids={
        "image_token_index": "<image_soft_token>",
        "boi_token_index": "<start_of_image>",
        "eoi_token_index": "<end_of_image>",
    },
    image_processor="Gemma3ImageProcessor",
    image={"size": {"height": 112, "width": 112}},
    processor={"image_seq_length": 16},
)
GEMMA4 = Spec(
    special_tokens=(
        *("<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|think|>"),
        *("<|image>", "<|image|>", "<image|>", "<|audio>", "<|audio|>", "<audio|>", "<|video|>"),
    ),
    names={
        "boi_token": "<|image>",
        "image_token": "<|image|>",
        "eoi_token": "<image|>",
        "boa_token": "<|audio>",
        "audio_token": "<|audio|>",
        "eoa_token": "<audio|>",
    },
    words=("system", "user", "model", "\n", "You are a helpful assistant."),
    bos="<bos>",
    add_bos=True,
    eos="<turn|>",
    pad="<pad>",
    stops=("<eos>",),
    template="gemma4",
    reply="{}<turn|>\n",
    # As E2B and E4B: the last layer reads the keys of the one before, and every layer has embeddings of its own.
    text={
        "num_hidden_layers": 3,
        "head_dim": 32,
        "global_head_dim": 64,
        "sliding_window": 64,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "num_kv_shared_layers": 1,
        "hidden_size_per_layer_input": 16,
        "final_logit_softcapping": 30.0,
        "tie_word_embeddings": True,
    },
    vision={
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "patch_size": 8,
        "pooling_kernel_size": 2,
        "default_output_length": 70,  # As the checkpoint's config; vLLM reads it, transformers asks the processor.
        "position_embedding_size": 288,  # A strip of an image has as many patches in one direction as there may be.
        "use_clipped_linears": True,
        "initializer_range": 0.1,
    },
    top={
        "audio_config": {
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "subsampling_conv_channels": [8, 4],
            "output_proj_dims": 32,
        }
    },
    ids={
        "boi_token_id": "<|image>",
        "image_token_id": "<|image|>",
        "eoi_token_id": "<image|>",
        "boa_token_id": "<|audio>",
        "audio_token_id": "<|audio|>",
        "eoa_token_index": "<audio|>",
        "video_token_id": "<|video|>",
    },
    image_processor="Gemma4ImageProcessor",
    image={"patch_size": 8, "pooling_kernel_size": 2, "max_soft_tokens": 70},
    video_processor="Gemma4VideoProcessor",
    video={"patch_size": 8, "pooling_kernel_size": 2, "max_soft_tokens": 70},
    feature_extractor="Gemma4AudioFeatureExtractor",
    processor={"image_seq_length": 70},
)
# As 26B, and but for the experts 31B: K = V and fewer heads of keys in layers without a window, tokens of an image see
# each other, prompts end in an empty thought.
GEMMA4_LARGE = Spec(
    **{
        **GEMMA4.__dict__,
        "model_type": "gemma4",
        "words": (*GEMMA4.words, "thought"),
        "template": (TEMPLATES / "gemma4.jinja")
        .read_text()
        .replace("model\\n' -}}\n", "model\\n' + ('' if thinks else '<|channel>thought\\n<channel|>') -}}\n"),
        "text": {
            "head_dim": 32,
            "global_head_dim": 64,
            "sliding_window": 64,
            "layer_types": ["sliding_attention", "full_attention"],
            "attention_k_eq_v": True,
            "num_key_value_heads": 4,
            "num_global_key_value_heads": 2,
            "hidden_size_per_layer_input": 0,
            "use_bidirectional_attention": "vision",
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 96,
            "tie_word_embeddings": True,
        },
        "vision": {**GEMMA4.vision, "use_clipped_linears": False, "standardize": True},
        "top": {},
    }
)
SPLIT = {"size": {"longest_edge": 2 * TILE}, "max_image_size": {"longest_edge": TILE}}
ROWS_AND_COLUMNS = tuple(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))
IDEFICS3 = Spec(
    special_tokens=(
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|reserved_special_token_0|>",
        "<fake_token_around_image>",
        "<image>",
        "<end_of_utterance>",
    ),
    # <row_1_col_1> and <global-img> are ordinary text here.
    words=("User: Assistant: System: You are a helpful assistant.", "\n", "\n\n", "row", "col", "_", "global", "img"),
    bos="<|begin_of_text|>",
    add_bos=True,
    eos="<end_of_utterance>",
    pad="<|reserved_special_token_0|>",
    stops=("<|end_of_text|>",),
    template="idefics3",
    reply=" {}<end_of_utterance>\n",
    text={"model_type": "llama"},
    vision={**TOWER, "initializer_range": 0.1},
    top={"scale_factor": 2},
    ids={"image_token_id": "<image>", "pad_token_id": "<|reserved_special_token_0|>"},
    image_processor="Idefics3ImageProcessor",
    image=SPLIT,
    processor={"image_seq_len": 4},
)
SMOLVLM = Spec(
    **{
        **IDEFICS3.__dict__,
        "special_tokens": (
            "<|endoftext|>",
            "<|im_start|>",
            "<|im_end|>",
            *ROWS_AND_COLUMNS,
            "<global-img>",
            "<fake_token_around_image>",
            "<image>",
            "<end_of_utterance>",
        ),
        "names": {
            "fake_image_token": "<fake_token_around_image>",
            "image_token": "<image>",
            "end_of_utterance_token": "<end_of_utterance>",
            "global_image_token": "<global-img>",
        },
        "bos": "<|im_start|>",
        "add_bos": False,
        "pad": "<|im_end|>",
        "stops": (),
        "ids": {"image_token_id": "<image>", "pad_token_id": "<|im_end|>"},
        "template": "smolvlm",
        "image_processor": "SmolVLMImageProcessor",
        "video_processor": "SmolVLMVideoProcessor",
        "video": SPLIT,
    }
)
GLM4V = Spec(
    special_tokens=(
        "<|endoftext|>",
        "[MASK]",
        "[gMASK]",
        "[sMASK]",
        "<sop>",
        "<eop>",
        "<|system|>",
        "<|user|>",
        "<|assistant|>",
        "<|observation|>",
        "<|begin_of_image|>",
        "<|end_of_image|>",
        "<|begin_of_video|>",
        "<|end_of_video|>",
        "<|image|>",
        "<|video|>",
    ),
    words=("\n", "You are a helpful assistant."),
    eos="<|endoftext|>",
    pad="<|endoftext|>",
    stops=("<|user|>", "<|observation|>"),
    template="glm4v",
    reply="{}",
    text={
        # Half of a head is rotated.
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [2, 3, 3],
        },
        "attention_bias": True,  # As the checkpoint's config; vLLM reads it, transformers takes it for granted.
    },
    vision={
        **NATIVE_TOWER,
        "patch_size": PATCH,
        "image_size": 112,
        "intermediate_size": 128,
        "out_hidden_size": 128,
    },
    ids={
        "image_token_id": "<|image|>",
        "video_token_id": "<|video|>",
        "image_start_token_id": "<|begin_of_image|>",
        "image_end_token_id": "<|end_of_image|>",
        "video_start_token_id": "<|begin_of_video|>",
        "video_end_token_id": "<|end_of_video|>",
    },
    image_processor="Glm4vImageProcessor",
    # This processor counts the pixels of two frames, of which an image has one twice.
    image={"patch_size": PATCH, "merge_size": 2, "size": _pixels((4, 64), 28, frames=2)},
    video_processor="Glm4vVideoProcessor",
    video={"patch_size": PATCH, "merge_size": 2, "size": _pixels((4, 64), 28, frames=2)},
)
MLLAMA = Spec(
    special_tokens=(
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|finetune_right_pad_id|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eom_id|>",
        "<|eot_id|>",
        "<|python_tag|>",
        "<|image|>",
    ),
    words=(
        *("system", "user", "assistant", "\n\n", "You are a helpful assistant."),
        "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024",
    ),
    bos="<|begin_of_text|>",
    add_bos=True,
    eos="<|eot_id|>",
    pad="<|finetune_right_pad_id|>",
    stops=("<|end_of_text|>", "<|eom_id|>"),
    template="mllama",
    reply="{}<|eot_id|>",
    text={"num_hidden_layers": 4, "cross_attention_layers": [1, 3]},
    vision={
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "attention_heads": 2,
        "intermediate_layers_indices": [0],
        "vision_output_dim": 128,  # The last layer beside one intermediate layer.
        "image_size": TILE,
        "patch_size": PATCH,
        "initializer_range": 0.1,
    },
    ids={"image_token_index": "<|image|>"},
    image_processor="MllamaImageProcessor",
    image={"size": {"height": TILE, "width": TILE}, "max_image_tiles": 4},
)
GLM4V_MOE = Spec(
    **{
        **GLM4V.__dict__,
        "text": {
            **GLM4V.text,
            # As the checkpoint's config; vLLM reads them.
            "head_dim": 32,
            "use_qk_norm": False,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "moe_intermediate_size": 96,
            "first_k_dense_replace": 1,
        },
    }
)
MISTRAL3 = Spec(
    special_tokens=(
        *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
        *("[IMG]", "[IMG_BREAK]", "[IMG_END]", "<pad>"),
    ),
    words=("You are a helpful assistant.",),
    bos="<s>",
    add_bos=True,
    eos="</s>",
    pad="<pad>",
    template="mistral3",
    reply="{}</s>",
    # Queries are scaled by their position, here from 32 on.
    text={
        "model_type": "ministral3",
        "head_dim": 32,
        "sliding_window": None,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1000.0,
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 32,
        },
    },
    vision={**TOWER, "model_type": "pixtral", "image_size": 168, "initializer_range": 0.1},
    top={"spatial_merge_size": 2},
    ids={"image_token_index": "[IMG]"},
    image_processor="PixtralImageProcessor",
    image={"size": {"longest_edge": 168}, "patch_size": PATCH},
    processor={"patch_size": PATCH, "spatial_merge_size": 2},
)
LFM2_VL = Spec(
    special_tokens=(
        *("<|pad|>", "<|startoftext|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"),
        *("<|image_start|>", "<|image_end|>", "<|img_thumbnail|>"),
        *(f"<|img_row_{row}_col_{column}|>" for row in range(1, 5) for column in range(1, 5)),
    ),
    names={
        "image_token": "<image>",
        "image_start_token": "<|image_start|>",
        "image_end_token": "<|image_end|>",
        "image_thumbnail_token": "<|img_thumbnail|>",
    },
    words=CHATML,
    bos="<|startoftext|>",
    add_bos=True,
    eos="<|im_end|>",
    pad="<|pad|>",
    template="lfm2_vl",
    reply="{}<|im_end|>\n",
    text={
        "model_type": "lfm2",
        "layer_types": ["conv", "full_attention"],
        "block_auto_adjust_ff_dim": False,
        # As the checkpoint's config; vLLM reads them, transformers has no use for them.
        "block_dim": 128,
        "conv_dim": 128,
        "conv_dim_out": 128,
        "tie_word_embeddings": True,
    },
    vision={
        "model_type": "siglip2_vision_model",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "patch_size": 16,
        "num_patches": 16,
        "vision_use_head": False,
    },
    top={"projector_hidden_size": 128},
    ids={"image_token_id": "<image>"},
    image_processor="Lfm2VlImageProcessor",
    image={
        "tile_size": 64,
        "min_image_tokens": 1,
        "max_image_tokens": 10,
        "max_tiles": 4,
        "max_pixels_tolerance": 1.0,
        "size": {"height": 64, "width": 64},
    },
)
LLAVA = Spec(
    special_tokens=("<unk>", "<s>", "</s>", "<image>", "<pad>"),
    words=("USER: <image>\nWhat ASSISTANT: What ", "USER:", " ASSISTANT:"),
    bos="<s>",
    add_bos=True,
    eos="</s>",
    pad="<pad>",
    template=(
        "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
        "{% for content in message['content'] if content['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
        "{% for content in message['content'] if content['type'] == 'text' %}{{ content['text'] + ' ' }}{% endfor %}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    ),
    reply=" {} ",
    text={"model_type": "llama"},
    vision={"model_type": "clip_vision_model", **TOWER, "projection_dim": 64},
    top={"image_seq_length": 16},
    ids={"image_token_index": "<image>"},
    image_processor="CLIPImageProcessor",
    image={"size": {"shortest_edge": TILE}, "crop_size": {"height": TILE, "width": TILE}},
    processor={"patch_size": PATCH, "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"},
)
# `qwen2_5_vl` is the demo's model.
SPECS: dict[str, Spec] = {
    "qwen2_vl": QWEN2_VL,
    "qwen2_5_vl": QWEN2_VL,
    "qwen3_vl": QWEN3_VL,
    "qwen3_vl_moe": QWEN3_VL_MOE,
    "qwen3_5": QWEN3_5,
    "qwen3_5_moe": QWEN3_5_MOE,
    "minicpmv4_6": MINICPMV4_6,
    "internvl": INTERNVL,
    "llava_onevision": LLAVA_ONEVISION,
    "llava_next": LLAVA_NEXT,
    "gemma3": GEMMA3,
    "gemma4": GEMMA4,
    "idefics3": IDEFICS3,
    "smolvlm": SMOLVLM,
    "glm4v": GLM4V,
    "mllama": MLLAMA,
    "glm4v_moe": GLM4V_MOE,
    "mistral3": MISTRAL3,
    "lfm2_vl": LFM2_VL,
}
# Of families that are not shipped: the package of docs/new-model.md. And another model of one that is.
OUTSIDE: dict[str, Spec] = {"llava": LLAVA, "gemma4_large": GEMMA4_LARGE}


def _template(spec: Spec) -> str:
    path = TEMPLATES / f"{spec.template}.jinja"
    return path.read_text() if "\n" not in spec.template and path.is_file() else spec.template


def _tokenizer(spec: Spec):
    special = {"bos_token": spec.bos, "add_bos_token": True} if spec.add_bos else {"bos_token": spec.bos}
    if "<unk>" in spec.special_tokens:
        special["unk_token"] = "<unk>"
    return tiny_model.build_tokenizer(
        [*spec.words, *photo_grid.sentences()],
        special_tokens=spec.special_tokens,
        added_tokens=(*tiny_model.TAG_TOKENS, *spec.added_tokens),
        eos_token=spec.eos,
        pad_token=spec.pad,
        chat_template=_template(spec),
        **special,
        **spec.names,
    )


def _config(model_type: str, spec: Spec, token_id: Callable[[str], int]):
    common = {
        "bos_token_id": token_id(spec.bos) if spec.bos else None,
        "eos_token_id": token_id(spec.eos),
        "pad_token_id": token_id(spec.pad),
    }
    text = {**TEXT, "tie_word_embeddings": False, **spec.text, **common}
    top = {**spec.top, **{name: token_id(token) for name, token in spec.ids.items()}}
    return AutoConfig.for_model(
        model_type,
        text_config=text,
        vision_config=dict(spec.vision),
        tie_word_embeddings=text["tie_word_embeddings"],
        dtype="float32",
        **top,
    )


def _fill_zeros(model: torch.nn.Module) -> None:
    """Random values for parameters that start at zero: the gates of cross-attention, position embeddings, biases.

    Without them an image would not matter to Llama 3.2 Vision, nor the place of a patch to InternVL and Gemma 4, whose
    table of positions and factors of layers start at one.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                if parameter.numel() == 1:
                    parameter.fill_(0.5)
                else:
                    parameter.normal_(std=0.1)
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("position_embedding_table"):
                tensor.normal_(std=0.5)
            elif name.endswith("embed_tokens_per_layer.weight"):
                # That of an image token is that of padding, which is token 0 in the checkpoints, and so in vLLM.
                tensor[0] = tensor[model.config.text_config.pad_token_id]
            elif name.endswith("layer_scalar"):
                tensor.fill_(0.75)
            elif model.config.model_type == "gemma4" and name.endswith("q_norm.weight"):
                tensor.fill_(tensor.numel() ** -0.5)  # Attention does not scale: logits would have the size of a head.


def _hub_weights(model) -> dict[str, torch.Tensor]:
    """The weights as the hub's checkpoints have them, which is what vLLM reads.

    Transformers 5 saves a model that it has not loaded from there under names without a level of SigLIP's and CLIP's,
    and never transposes the experts of Qwen3-VL back.
    """
    model._weight_conversions = get_model_conversion_mapping(model, add_legacy=False)
    weights = revert_weight_conversion(model, model.state_dict())
    # Gemma's checkpoints have keys and values of every layer, whether it reads them or not, and vLLM asks for them.
    layers = range(model.config.text_config.num_hidden_layers)
    shared = getattr(model.config.text_config, "num_kv_shared_layers", 0) or 0
    for layer in layers[len(layers) - shared :]:
        for part in ("k_proj", "v_proj", "k_norm"):
            name = f"model.language_model.layers.{{}}.self_attn.{part}.weight"
            weights[name.format(layer)] = torch.zeros_like(weights[name.format(layer - 1)])
    transposed = ".mlp.experts."  # Not those of Gemma 4.
    return {
        name: value.transpose(1, 2).contiguous() if transposed in name and value.dim() == 3 else value
        for name, value in weights.items()
    }


def build_tiny(model_type: str, path: Path, seed: int = 0) -> Path:
    """Write a randomly initialised tiny model of a family with its processor and tokenizer into the folder `path`.

    The weights are float32 and depend only on `seed`; torch's global random state does not change.

    Raises:
        ValueError: a model type that is not in `SPECS`.
    """
    specs = SPECS | OUTSIDE
    if model_type not in specs:
        raise ValueError(f"model_type must be one of {list(specs)}; got {model_type!r}. Add a Spec for another one.")
    if model_type == "qwen2_5_vl":
        return tiny_model.build_tiny_model(path, seed)
    spec = specs[model_type]
    tokenizer = _tokenizer(spec)
    token_id = tokenizer.convert_tokens_to_ids
    config = _config(spec.model_type or model_type, spec, token_id)
    config.text_config.vocab_size = len(tokenizer)
    if hasattr(config.text_config, "vocab_size_per_layer_input"):
        config.text_config.vocab_size_per_layer_input = len(tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config)
        _fill_zeros(model)
    model.generation_config = GenerationConfig(
        bos_token_id=config.text_config.bos_token_id,
        eos_token_id=[token_id(token) for token in (spec.eos, *spec.stops)],
        pad_token_id=token_id(spec.pad),
        do_sample=False,
    )
    parts = {"image_processor": getattr(transformers, spec.image_processor)(**spec.image)}
    if spec.video_processor:
        parts["video_processor"] = getattr(transformers, spec.video_processor)(**spec.video)
    if spec.feature_extractor:
        parts["feature_extractor"] = getattr(transformers, spec.feature_extractor)()
    processor = PROCESSOR_MAPPING[type(config)](
        **parts, tokenizer=tokenizer, chat_template=_template(spec), **spec.processor
    )
    model.save_pretrained(path, state_dict=_hub_weights(model), save_original_format=False)
    processor.save_pretrained(path)
    return path


# Width and height: a square, one twice as wide, an upright one.
SHAPES = ((112, 112), (224, 112), (112, 160))
SYSTEM = "You are a helpful assistant."


def sample_images(n: int, seed: int = 0, shapes: Sequence[tuple[int, int]] = SHAPES) -> list:
    """`n` crops of photographs; `shapes`, in turn, are their (width, height)."""
    photos = [photo_grid.PHOTOS[(seed + index) % len(photo_grid.PHOTOS)] for index in range(n)]
    return [
        photo_grid.load_photo(photo.file).resize(shapes[index % len(shapes)], box=photo.region("train"))
        for index, photo in enumerate(photos)
    ]


def sample_messages(
    n_images: int,
    *,
    system: bool = False,
    turns: int = 1,
    answered: bool = True,
    seed: int = 0,
    shapes: Sequence[tuple[int, int]] = SHAPES,
) -> list[dict[str, Any]]:
    """A conversation about photographs, for `avar_verl.model.render.render`.

    Args:
        n_images: images, spread over the user turns from the first one on.
        system: it starts with a system turn.
        turns: questions.
        answered: the last question has its answer; else it is a prompt.
    """
    images = sample_images(n_images, seed, shapes)
    samples = photo_grid.make_samples(turns, seed, "train")
    messages: list[dict[str, Any]] = [{"role": "system", "content": SYSTEM}] if system else []
    for turn, sample in enumerate(samples):
        blocks = [{"type": "image", "image": image} for image in images[turn::turns]]
        messages.append({"role": "user", "content": [*blocks, {"type": "text", "text": sample.question}]})
        messages.append({"role": "assistant", "content": sample.response})
    return messages if answered else messages[:-1]
