# SPDX-License-Identifier: Apache-2.0
"""Every family's tiny model: its folder, and `render`, `collate` and roles against its processor and model."""

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForImageTextToText

from avar_verl.model.checkpoint import load_processor
from avar_verl.model.families import FAMILIES, get_family
from avar_verl.model.render import collate, images_of, render
from avar_verl.roles import RoleMap, TokenRole
from tests.model.families.tiny import SPECS, SYSTEM, build_tiny, sample_messages

PROCESSORS = {
    "qwen2_vl": "Qwen2VLProcessor",
    "qwen2_5_vl": "Qwen2_5_VLProcessor",
    "qwen3_vl": "Qwen3VLProcessor",
    "qwen3_vl_moe": "Qwen3VLProcessor",
    "qwen3_5": "Qwen3VLProcessor",
    "qwen3_5_moe": "Qwen3VLProcessor",
    "internvl": "InternVLProcessor",
    "llava_onevision": "LlavaOnevisionProcessor",
    "llava_next": "LlavaNextProcessor",
    "gemma3": "Gemma3Processor",
    "gemma4": "Gemma4Processor",
    "idefics3": "Idefics3Processor",
    "smolvlm": "SmolVLMProcessor",
    "glm4v": "Glm4vProcessor",
    "mllama": "MllamaProcessor",
    "glm4v_moe": "Glm4vProcessor",
    "mistral3": "PixtralProcessor",
    "lfm2_vl": "Lfm2VlProcessor",
    "minicpmv4_6": "MiniCPMV4_6Processor",
}
# A prompt with a system turn, an image and an answer, and how the next prompt begins, as the checkpoints write them.
QUESTION, ANSWER = "What does it show?", "cat"
CHATML = (
    f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{{image}}{QUESTION}<|im_end|>\n"
    f"<|im_start|>assistant\n{ANSWER}<|im_end|>\n<|im_start|>assistant\n"
)
QWEN = CHATML.format(image="<|vision_start|><|image_pad|><|vision_end|>")
IDEFICS = f"System: {SYSTEM}<end_of_utterance>\nUser:<image>{QUESTION}<end_of_utterance>\nAssistant: {ANSWER}"
TEXTS = {
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"), QWEN),
    **dict.fromkeys(("qwen3_5", "qwen3_5_moe"), QWEN.replace(ANSWER, f"<think>\n\n</think>\n\n{ANSWER}") + "<think>\n"),
    "internvl": CHATML.format(image="<IMG_CONTEXT>\n"),
    "llava_onevision": f"<|im_start|>system \n{SYSTEM}<|im_end|><|im_start|>user <image>\n{QUESTION}<|im_end|>"
    f"<|im_start|>assistant \n{ANSWER}<|im_end|><|im_start|>assistant\n",
    "llava_next": f"<s><<SYS>>\n{SYSTEM}\n<</SYS>>\n\n[INST] <image>\n{QUESTION} [/INST] {ANSWER}</s> ",
    "gemma3": f"<bos><start_of_turn>user\n{SYSTEM}\n\n<start_of_image>{QUESTION}<end_of_turn>\n"
    f"<start_of_turn>model\n{ANSWER}<end_of_turn>\n<start_of_turn>model\n",
    "idefics3": f"<|begin_of_text|>{IDEFICS}<end_of_utterance>\nAssistant:",
    "smolvlm": f"<|im_start|>{IDEFICS}<end_of_utterance>\nAssistant:",
    "glm4v": f"[gMASK]<sop><|system|>\n{SYSTEM}<|user|>\n<|begin_of_image|><|image|><|end_of_image|>{QUESTION}"
    f"<|assistant|>\n{ANSWER}<|assistant|>\n",
    "mllama": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
    f"Today Date: 26 Jul 2024\n\n{SYSTEM}<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n<|image|>{QUESTION}"
    f"<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n{ANSWER}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
}
TEXTS["glm4v_moe"] = TEXTS["glm4v"]
TEXTS["gemma4"] = (
    f"<bos><|turn>system\n{SYSTEM}<turn|>\n<|turn>user\n<|image|>{QUESTION}<turn|>\n"
    f"<|turn>model\n{ANSWER}<turn|>\n<|turn>model\n"
)
TEXTS["mistral3"] = f"<s>[SYSTEM_PROMPT]{SYSTEM}[/SYSTEM_PROMPT][INST][IMG]{QUESTION}[/INST]{ANSWER}</s>"
TEXTS["lfm2_vl"] = "<|startoftext|>" + CHATML.format(image="<image>")
TEXTS["minicpmv4_6"] = TEXTS["qwen3_5"].replace("<|vision_start|><|image_pad|><|vision_end|>", "<|image_pad|>\n")
TEXTS["minicpmv4_6"] += "\n</think>\n\n"
every_family = pytest.mark.parametrize("model_type", FAMILIES)


@pytest.fixture
def tiny(model_type, family_model, family_processor):
    """The family's model and processor."""
    return family_model(model_type), family_processor(model_type)


def reply(spec, answer: str, last: bool) -> str:
    """How the template writes an answer; one that is about thoughts drops those of earlier turns."""
    if "{think}" not in spec.reply:
        return spec.reply.format(answer)
    thought, _, rest = answer.removeprefix("<think>").rpartition("</think>")
    written = spec.reply.format(rest, think=thought)
    return written if last else written.rpartition("</think>\n\n")[2]


def dates(model_type: str) -> dict[str, str]:
    """Llama 3.2's template writes today's date otherwise."""
    return {"date_string": "26 Jul 2024"} if model_type == "mllama" else {}


def logits_of(model, *samples, padding_side: str = "right") -> torch.Tensor:
    """(B, S, V) of rendered samples as one batch."""
    pad_id = model.config.get_text_config().pad_token_id
    inputs = collate(get_family(model.config.model_type), model.config, samples, pad_id, padding_side)
    with torch.no_grad():
        return model(**inputs).logits


def test_every_family_has_a_spec():
    assert set(SPECS) == set(FAMILIES) == set(PROCESSORS) == set(TEXTS)


@every_family
def test_the_folder_is_complete_and_its_ids_agree(model_type, tiny, family_path):
    model, processor = tiny
    spec, tokenizer, config = (
        SPECS[model_type],
        processor.tokenizer,
        AutoConfig.from_pretrained(family_path(model_type)),
    )
    assert type(processor).__name__ == PROCESSORS[model_type]
    assert model.dtype == torch.float32 and model.config._attn_implementation == "sdpa"
    assert config.model_type == model_type
    assert config.get_text_config().vocab_size == len(tokenizer) == model.get_output_embeddings().weight.shape[0]
    for name, token in spec.ids.items():
        assert getattr(config, name) == tokenizer.convert_tokens_to_ids(token)
    for name, token in (("bos", spec.bos), ("eos", spec.eos), ("pad", spec.pad)):
        assert getattr(tokenizer, f"{name}_token") == token
    assert config.get_text_config().pad_token_id == tokenizer.pad_token_id
    stops = model.generation_config.eos_token_id
    assert tokenizer.eos_token_id in (stops if isinstance(stops, list) else [stops])
    assert (tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id) == spec.add_bos
    tags = "<think>a</think><answer>b</answer>"
    assert tokenizer.decode(tokenizer(tags)["input_ids"], skip_special_tokens=True) == tags
    # Tied or not as the config says, in memory too.
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == bool(config.tie_word_embeddings)


def test_weights_depend_on_the_seed_alone_and_leave_the_global_one(tmp_path):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    folders = [build_tiny("internvl", tmp_path / name, seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    assert torch.equal(torch.get_rng_state(), state)
    first, same, other = ((folder / "model.safetensors").read_bytes() for folder in folders)
    assert first == same != other


def test_an_unknown_family_is_refused(tmp_path):
    with pytest.raises(ValueError, match="model_type must be one of .*; got 'gpt'"):
        build_tiny("gpt", tmp_path)


@every_family
def test_the_chat_template_writes_what_the_checkpoints_write(model_type, family_processor):
    processor = family_processor(model_type)
    messages = sample_messages(1, system=True)
    messages[1]["content"][1]["text"] = QUESTION
    messages[2]["content"] = ANSWER
    rendered = render(processor, messages, add_generation_prompt=True, template_kwargs=dates(model_type))
    assert processor.tokenizer.decode(rendered.prompt_ids) == TEXTS[model_type]


@every_family
@pytest.mark.parametrize("arguments", [{"n_images": 1}, {"n_images": 2}, {"n_images": 2, "turns": 2, "seed": 4}])
def test_every_image_feature_has_a_placeholder(model_type, tiny, arguments):
    model, processor = tiny
    messages = sample_messages(**arguments)
    rendered = render(processor, messages)
    token = processor.boi_token if model_type == "gemma3" else processor.image_token
    in_prompt = processor.tokenizer.convert_tokens_to_ids(token)
    assert rendered.prompt_ids.count(in_prompt) == len(images_of(messages))
    placeholders = rendered.ids_S.new_tensor(get_family(model_type).placeholder_ids(model.config))
    count = int(torch.isin(rendered.ids_S, placeholders).sum())
    if get_family(model_type).cross_attention:
        assert count == 0
        return
    with torch.no_grad():
        output = model.get_image_features(**rendered.features).pooler_output
    parts = output if isinstance(output, list | tuple) else [output]
    assert count == sum(part.numel() // model.config.get_text_config().hidden_size for part in parts)
    assert 16 <= count <= 64 * len(images_of(messages))


@every_family
def test_tiles_follow_the_shape(model_type, tiny):
    """A square photograph and one twice as wide have other numbers of tiles, or of patches."""
    _, processor = tiny

    def tiles(shape):
        features = render(processor, sample_messages(1, shapes=[shape])).features
        if "aspect_ratio_mask" in features:
            return int(features["aspect_ratio_mask"].sum())
        if model_type == "mistral3":  # One view of the shape of the image.
            return int(features["image_sizes"].prod())
        if model_type == "minicpmv4_6":  # The whole, and slices.
            return int(features["target_sizes"].prod(1).sum())
        if model_type == "gemma4":  # The same.
            return int((features["image_position_ids"][0, :, 0] >= 0).sum())
        pixels = features["pixel_values"]
        return pixels.shape[0] if pixels.dim() <= 4 else pixels.shape[1]

    square, wide = tiles((112, 112)), tiles((224, 112))
    if model_type == "gemma3":  # One view, whatever the shape.
        assert square == wide == 1
    else:
        assert square != wide and min(square, wide) > 1


def test_glm_4_6v_flash_is_glm4v_with_another_processor(family_processor, family_path, tmp_path):
    """Its ids and features are those of GLM-4.1V's, and verl knows its class."""
    first = family_processor("glm4v")
    spec = SPECS["glm4v"]
    processor = transformers.Glm46VProcessor(
        transformers.Glm46VImageProcessor(**spec.image),
        first.tokenizer,
        transformers.Glm46VVideoProcessor(**spec.video),
        chat_template=first.chat_template,
    )
    messages = sample_messages(2, turns=2, system=True)
    one, other = render(first, messages), render(processor, messages)
    assert torch.equal(one.ids_S, other.ids_S) and one.features.keys() == other.features.keys()
    assert all(torch.equal(value, other.features[name]) for name, value in one.features.items())
    processor.save_pretrained(tmp_path)
    AutoConfig.from_pretrained(family_path("glm4v")).save_pretrained(tmp_path)
    loaded = load_processor(tmp_path)
    assert type(loaded).__name__ == "Glm46VProcessor"
    assert get_family("glm4v").image_places(loaded, other.features)[0].shape[1] == 4


@every_family
def test_an_image_matters(model_type, tiny):
    model, processor = tiny
    one, other = sample_messages(1, system=True), sample_messages(1, system=True)
    other[1]["content"][0] = sample_messages(1, seed=1)[0]["content"][0]
    one, other = (render(processor, messages, template_kwargs=dates(model_type)) for messages in (one, other))
    assert torch.equal(one.ids_S, other.ids_S)
    assert (logits_of(model, one) - logits_of(model, other))[0, -1].abs().max() > 0.01


class FixedTokenizer:
    """A tokenizer of the package tokenizers that refuses to be changed."""

    def __init__(self, tokenizer):
        self._own = tokenizer

    def __getattr__(self, name):
        assert name not in ("enable_padding", "no_padding", "enable_truncation", "no_truncation"), name
        return getattr(self._own, name)


@every_family
def test_rendering_does_not_change_the_tokenizer(model_type, tiny, monkeypatch):
    """Rollouts are rendered in threads that share it, and one that is in use cannot be changed ("Already borrowed")."""
    _, processor = tiny
    messages = sample_messages(2, turns=2, system=True)
    first = render(processor, messages, template_kwargs=dates(model_type))
    monkeypatch.setattr(processor.tokenizer, "_tokenizer", FixedTokenizer(processor.tokenizer._tokenizer))
    again = render(processor, messages, template_kwargs=dates(model_type))
    assert torch.equal(first.ids_S, again.ids_S) and first.prompt_ids == again.prompt_ids


@every_family
def test_one_sample_is_what_the_processor_makes_of_it(model_type, tiny):
    model, processor = tiny
    messages = sample_messages(2, turns=2, system=True)
    rendered = render(processor, messages, template_kwargs=dates(model_type))
    inputs = collate(get_family(model_type), model.config, [rendered], pad_id=0)
    text = processor.tokenizer.decode(rendered.prompt_ids)
    expected = processor(
        text=[text], images=images_of(messages), add_special_tokens=False, return_tensors="pt", padding=False
    )
    assert inputs.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(inputs[name], value), name
    bos = processor.tokenizer.bos_token_id
    assert bos is None or rendered.ids_S.tolist().count(bos) == 1


@every_family
@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_a_batch_is_its_samples(model_type, tiny, family_path, padding_side):
    model, processor = tiny
    if get_family(model_type).prepare is not None:
        model = AutoModelForImageTextToText.from_pretrained(family_path(model_type)).eval()
        get_family(model_type).prepare(model)
    conversations = [
        sample_messages(1, system=True),
        sample_messages(2, seed=1, system=True, turns=2),
        sample_messages(0, seed=2, system=True),
    ]
    samples = [render(processor, messages, template_kwargs=dates(model_type)) for messages in conversations]
    batch_BSV = logits_of(model, *samples, padding_side=padding_side)
    for row_SV, sample in zip(batch_BSV, samples, strict=True):
        count = len(sample.ids_S)
        row_SV = row_SV[-count:] if padding_side == "left" else row_SV[:count]
        torch.testing.assert_close(row_SV, logits_of(model, sample)[0], atol=1e-4, rtol=0)


def test_llama_3_2_vision_as_transformers_has_it_mixes_samples(family_path, family_processor):
    """If this fails, transformers has fixed it and `prepare` can go."""
    model = AutoModelForImageTextToText.from_pretrained(family_path("mllama")).eval()
    messages = [sample_messages(1), sample_messages(0, seed=2)]
    with_image, without = (render(family_processor("mllama"), turns) for turns in messages)
    alone_SV = logits_of(model, without)[0]
    assert (logits_of(model, with_image, without)[1, : len(alone_SV)] - alone_SV).abs().max() > 0.1


@every_family
def test_a_batch_without_images(model_type, tiny):
    model, processor = tiny
    samples = [render(processor, sample_messages(0, seed=seed, turns=1 + seed, system=True)) for seed in range(2)]
    batch_BSV = logits_of(model, *samples)
    for row_SV, sample in zip(batch_BSV, samples, strict=True):
        expected = logits_of(model, sample)[0]
        torch.testing.assert_close(row_SV[: len(expected)], expected, atol=1e-4, rtol=0)


@every_family
@pytest.mark.parametrize("arguments", [{"n_images": 1}, {"n_images": 2}, {"n_images": 2, "turns": 2}, {"n_images": 0}])
def test_roles(model_type, tiny, arguments):
    model, processor = tiny
    messages = sample_messages(system=True, **arguments)
    rendered = render(processor, messages, template_kwargs=dates(model_type))
    ids_S = rendered.ids_S
    roles_S = RoleMap.from_pretrained(processor, model.config)(ids_S[None])[0]
    placeholders = ids_S.new_tensor(get_family(model_type).placeholder_ids(model.config))
    assert torch.equal(roles_S == TokenRole.IMAGE, torch.isin(ids_S, placeholders))
    decode = processor.tokenizer.decode
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    replies = "".join(reply(SPECS[model_type], answer, last=answer is answers[-1]) for answer in answers)
    assert decode(ids_S[roles_S == TokenRole.RESPONSE]) == replies
    system = decode(ids_S[roles_S == TokenRole.SYSTEM])
    assert system and (model_type == "gemma3" or SYSTEM in system)
    user = decode(ids_S[roles_S == TokenRole.USER])
    questions = [
        block["text"] for message in messages if message["role"] == "user" for block in message["content"][-1:]
    ]
    assert all(question in user for question in questions)
    assert not any(answer in user or answer in system for answer in answers)
