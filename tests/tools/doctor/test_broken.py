# SPDX-License-Identifier: Apache-2.0
"""Every check catches what it is for: a folder, or a family, broken in one place, and what the check says about it."""

import dataclasses
import json
import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import pandas
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl

from avar_verl.model.families import qwen2_5_vl
from avar_verl.model.turns import Turns
from avar_verl.plugin import processor
from avar_verl.tools.demo import photo_grid
from avar_verl.tools.doctor import subject
from avar_verl.tools.doctor.check import CHECKS
from avar_verl.tools.doctor.checks import images, rewards, rollout
from avar_verl.tools.doctor.command import Doctor
from avar_verl.tools.doctor.run import run_checks

# ---- ways to break a model -------------------------------------------------------------------------------------


def edit_json(path: Path, **values) -> None:
    """Set top-level fields; None deletes one."""
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def edit_template(folder: Path, old: str, new: str) -> None:
    path = folder / "chat_template.jinja"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def edit_weights(folder: Path, edit) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def zero(folder: Path, pattern: str) -> None:
    def edit(weights):
        names = [name for name in weights if re.search(pattern, name)]
        assert names
        for name in names:
            weights[name] = torch.zeros_like(weights[name])

    edit_weights(folder, edit)


def replace_family(monkeypatch, **fields) -> None:
    monkeypatch.setattr(qwen2_5_vl, "FAMILY", dataclasses.replace(qwen2_5_vl.FAMILY, **fields))


def unknown_family(folder, monkeypatch):
    edit_json(folder / "config.json", model_type="llava")


def no_config(folder, monkeypatch):
    (folder / "config.json").unlink()


def no_image_processor(folder, monkeypatch):
    (folder / "processor_config.json").unlink()


def dropped_processor(folder, monkeypatch):
    def stock(path):
        warnings.warn("Failed to create processor: Unsupported processor type", stacklevel=1)

    monkeypatch.setattr(processor, "hf_processor", stock)


def no_chat_template(folder, monkeypatch):
    (folder / "chat_template.jinja").unlink()


def wrong_image_token_id(folder, monkeypatch):
    edit_json(folder / "config.json", image_token_id=1)


def wrong_video_token_id(folder, monkeypatch):
    edit_json(folder / "config.json", video_token_id=1)


def added_token(folder, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<look>"])
    tokenizer.save_pretrained(folder)


def template_without_reasoning(folder, monkeypatch):
    edit_template(folder, "{{ content['text'] }}", "{{ content['text'].split('</think>')[-1] }}")


def template_without_earlier_reasoning(folder, monkeypatch):
    last = "{{ content['text'] if message == messages[-1] else content['text'].split('</think>')[-1] }}"
    edit_template(folder, "{{ content['text'] }}", last)


def no_stop(folder, monkeypatch):
    edit_json(folder / "generation_config.json", eos_token_id=1)
    edit_json(folder / "tokenizer_config.json", eos_token="<|endoftext|>")


def padding_that_ends_a_turn(folder, monkeypatch):
    edit_json(folder / "tokenizer_config.json", pad_token="<|im_end|>")
    edit_template(folder, "{% endif %}{% endfor %}<|im_end|>\n", "{% endif %}{% endfor %}")


def missing_weight(folder, monkeypatch):
    edit_weights(folder, lambda weights: weights.pop("model.layers.1.self_attn.k_proj.weight"))


def unused_weight(folder, monkeypatch):
    edit_weights(folder, lambda weights: weights.update({"value_head.weight": torch.zeros(2)}))


def truncated_file(folder, monkeypatch):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def index_of(folder, *names, total_size=0) -> None:
    index = {
        "metadata": {"total_size": total_size},
        "weight_map": {f"{i}.weight": name for i, name in enumerate(names)},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def lora_names(folder, monkeypatch):
    def rename(weights):
        for name in list(weights):
            weights[f"base_model.model.{name}"] = weights.pop(name)

    edit_weights(folder, rename)


def missing_file(folder, monkeypatch):
    index_of(folder, "model.safetensors", "model-00002.safetensors")


def short_file(folder, monkeypatch):
    index_of(folder, "model.safetensors", total_size=10**9)


def broken_tokenizer(folder, monkeypatch):
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"BPE"', '"BPE of another version"'))


def generation_prompt_elsewhere(folder, monkeypatch):
    edit_template(folder, "<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\nSure: {% endif %}")


def generation_prompt_with_spaces(folder, monkeypatch):
    edit_template(folder, "<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant \n{% endif %}")


def two_bos(folder, monkeypatch):
    edit_json(folder / "tokenizer_config.json", bos_token="<|vision_pad|>")
    edit_template(folder, "{% set image_count", "<|vision_pad|> <|vision_pad|>{% set image_count")


def no_default_system(folder, monkeypatch):
    edit_template(folder, "loop.first and", "false and")


def broken_template(folder, monkeypatch):
    edit_template(folder, "{% for message in messages %}", "{% for message in messages %}{{ raise_exception('No.') }}")


def other_assistant(folder, monkeypatch):
    edit_template(folder, "<|im_start|>{{ message['role'] }}", "<|im_start|>{{ message['role'] | replace('ant', '') }}")


def response_in_user_turn(folder, monkeypatch):
    edit_template(
        folder, "<|im_start|>{{ message['role'] }}", "<|im_start|>{{ message['role'] | replace('assistant', 'user') }}"
    )


def end_of_a_response_outside(folder, monkeypatch):
    original = Turns.__call__

    def call(self, ids_BS, mask_BS=None):
        roles_BS = original(self, ids_BS, mask_BS)
        return roles_BS.masked_fill((roles_BS == 4) & torch.isin(ids_BS, torch.tensor(self.end_ids)), 0)

    monkeypatch.setattr(Turns, "__call__", call)


def text_that_the_template_adds(folder, monkeypatch):
    edit_template(folder, "{{ content['text'] }}", "{{ content['text'] }} Over.")


def roles_by_padding(folder, monkeypatch):
    original = Turns.__call__

    def call(self, ids_BS, mask_BS=None):
        roles_BS = original(self, ids_BS, mask_BS)
        return roles_BS if mask_BS is None or mask_BS.all() else roles_BS.roll(1, 1)

    monkeypatch.setattr(Turns, "__call__", call)


def truncating_tokenizer(folder, monkeypatch):
    edit_json(folder / "processor_config.json", text_kwargs=None)
    edit_json(folder / "tokenizer_config.json", truncation=True, max_length=512)


def short_model_max_length(folder, monkeypatch):
    edit_json(folder / "tokenizer_config.json", model_max_length=64)


def other_merge_size(folder, monkeypatch):
    path = folder / "processor_config.json"
    image_processor = json.loads(path.read_text())["image_processor"] | {"merge_size": 1}
    edit_json(path, image_processor=image_processor)


def blind_model(folder, monkeypatch):
    zero(folder, r"visual\.merger")


def wrong_batch(folder, monkeypatch):
    original = subject.collate

    def collate(*args):
        inputs = original(*args)
        return {**inputs, "input_ids": inputs["input_ids"].roll(1, 0)}

    monkeypatch.setattr(subject, "collate", collate)


def refusing_processor(folder, monkeypatch):
    monkeypatch.setattr(images, "ODD_SIZES", ((2, 500), (8, 200)))


def fewer_features_of_long_images(folder, monkeypatch):
    original = images.count_features

    def count_features(model, features):
        grids = features["image_grid_thw"]
        return original(model, features) - int(len(grids) == 1 and int(grids.prod()) == 4 * 48)

    monkeypatch.setattr(images, "count_features", count_features)


def attention_outside_the_interface(folder, monkeypatch):
    def forward(self, hidden_states, **kwargs):
        return self.o_proj(self.v_proj(hidden_states).cumsum(1).repeat(1, 1, 2)), None

    monkeypatch.setattr(modeling_qwen2_5_vl.Qwen2_5_VLAttention, "forward", forward)


def attention_of_its_own(folder, monkeypatch):
    original = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def sdpa(module, query, key, value, attention_mask, scaling=None, **kwargs):
        return original(module, query, key, value, attention_mask, scaling=2 * scaling, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", sdpa)


def masks_of_its_own(folder, monkeypatch):
    """Every second layer looks only at the last eight positions, without saying so."""
    original = modeling_qwen2_5_vl.Qwen2_5_VLAttention.forward

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        if self.layer_idx % 2 and self.config._attn_implementation == "eager":
            far = torch.ones(hidden_states.shape[1], hidden_states.shape[1], dtype=torch.bool).tril(-8)
            attention_mask = attention_mask.masked_fill(far, torch.finfo(torch.float32).min)
        return original(self, hidden_states, attention_mask=attention_mask, **kwargs)

    monkeypatch.setattr(modeling_qwen2_5_vl.Qwen2_5_VLAttention, "forward", forward)


def keys_of_zero(folder, monkeypatch):
    zero(folder, r"layers\.2\.self_attn\.k_proj")


def tower_of_another_name(folder, monkeypatch):
    replace_family(monkeypatch, vision_tower="model.vision_tower")


def half_a_tower(folder, monkeypatch):
    replace_family(monkeypatch, vision_tower="model.visual.blocks")


def language_model_as_tower(folder, monkeypatch):
    replace_family(monkeypatch, vision_tower="model.language_model.layers")


def unknown_coordinates(folder, monkeypatch):
    replace_family(monkeypatch, coordinates="pixels")


def unreadable_box(folder, monkeypatch):
    monkeypatch.setitem(rewards.SYNTAX, "qwen2_5_vl", "from {0} and {1} to {2} and {3}")


def special_tag(folder, monkeypatch):
    path = folder / "tokenizer.json"
    tokens = json.loads(path.read_text())["added_tokens"]
    edit_json(
        path, added_tokens=[{**token, "special": token["special"] or "answer" in token["content"]} for token in tokens]
    )


def special_brackets(folder, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["120,"], special_tokens=True)
    tokenizer.save_pretrained(folder)


def special_label(folder, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["cup"], special_tokens=True)
    tokenizer.save_pretrained(folder)


def unknown_architecture(folder, monkeypatch):
    edit_json(folder / "config.json", architectures=["Qwen9VLForConditionalGeneration"])


def fake_vllm(monkeypatch, answer) -> None:
    """A worker that answers every prompt with `answer(number)`."""

    def run(command, **kwargs):
        Path(command[-1]).write_text(json.dumps([answer(number) for number in range(len(rollout.prompts()))]))
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(rollout.subprocess, "run", run)


def vllm_that_dies(folder, monkeypatch):
    result = SimpleNamespace(returncode=1, stderr="ValueError: no kernel")
    monkeypatch.setattr(rollout.subprocess, "run", lambda *args, **kwargs: result)


def vllm_with_other_ids(folder, monkeypatch):
    fake_vllm(monkeypatch, lambda number: {"prompt_ids": [1, 2], "token_ids": [3], "logprobs": [-1.0]})


def vllm_with_other_logprobs(folder, monkeypatch):
    examined = subject.Subject(Doctor(model=str(folder)))
    ids = [examined.render(messages, add_generation_prompt=True).ids_S.tolist() for messages in rollout.prompts()]
    fake_vllm(monkeypatch, lambda number: {"prompt_ids": ids[number], "token_ids": [3], "logprobs": [-99.0]})


def nothing(folder, monkeypatch):
    pass


# ---- what each check says about them ---------------------------------------------------------------------------

# Check -> (what is broken, status, what the check says, options of run_checks).
BROKEN = {
    "family": [
        (
            unknown_family,
            "fail",
            "must be a known family; got 'llava'. Known families: gemma3, .*docs/new-model.md",
        ),
        (no_config, "fail", "Should have a `model_type` key in its config.json"),
    ],
    "processor": [
        (no_image_processor, "fail", "^a checkpoint must have a processor for images; got .*preprocessor_config.json"),
        (dropped_processor, "fail", r"must return a processor; got None \(Failed to create processor: Unsupported"),
        (broken_tokenizer, "fail", r"tokenizer.json must be readable by tokenizers [\d.]+; got data did not match any"),
        (no_chat_template, "fail", "must have a chat template; got None"),
    ],
    "vocabulary": [
        (wrong_image_token_id, "fail", r"hold the id of the processor's image_token '<\|image_pad\|>'; got \[1, "),
        (wrong_video_token_id, "fail", r"must be the image or video token of the processor; got \[1\]"),
        (added_token, "fail", "not know more ids than the embedding has rows; got 342 and 341"),
        (no_stop, "warn", r"Nothing stops a rollout at the end of its turn: .*a turn ends with \['<\|im_end\|>'\]"),
        (padding_that_ends_a_turn, "warn", r"padding token '<\|im_end\|>' after a response counts as its end"),
    ],
    "weights": [
        (
            missing_weight,
            "fail",
            "every weight must come from the checkpoint, .*: 1 missing: .*1.self_attn.k_proj",
        ),
        (missing_file, "fail", "every file of model.safetensors.index.json .*; got none of model-00002.safetensors"),
        (short_file, "fail", r"must have its 1000000000 bytes; got 3\d+\. Download them again"),
        (truncated_file, "fail", "^SafetensorError: "),
        (unused_weight, "fail", "every weight of it must be used; .*: 1 unexpected: value_head.weight"),
        (
            lora_names,
            "fail",
            r"\d+ missing: lm_head.weight.*\d+ unexpected: base_model.*names of a LoRA run. An adapter is merged",
        ),
    ],
    "chat template": [
        (
            generation_prompt_elsewhere,
            "fail",
            "must be the beginning of the whole conversation; got '.*Sure: ' at token",
        ),
        (generation_prompt_with_spaces, "warn", "differ in white space"),
        (two_bos, "fail", r"must have exactly one BOS; got \[4\] times '<\|vision_pad\|>'"),
        (no_default_system, "warn", "has no VAS and no L_suppress, and r_visual refuses it .*Give every row a system"),
        (broken_template, "fail", "^TemplateError: No."),
    ],
    "roles": [
        (
            other_assistant,
            "fail",
            "of a text of the assistant must have the role RESPONSE; got OTHER for 'Most of the left",
        ),
        (response_in_user_turn, "fail", "assistant must have the role RESPONSE; got USER for 'Most of the left"),
        (
            end_of_a_response_outside,
            "fail",
            "the end of a response must be RESPONSE, .*; got '<.im_end.>' outside of it",
        ),
        (
            text_that_the_template_adds,
            "fail",
            r"RESPONSE must be the responses and nothing else; got \['Most of the .*Over",
        ),
        (
            template_without_reasoning,
            "fail",
            "a rendered response must be the row's text; got '<answer>a cup</answer>' for '<think>I look at",
        ),
        (
            template_without_earlier_reasoning,
            "warn",
            "Rows with several turns of reasoning are refused: a rendered response must be .* in turn 1",
        ),
        (
            roles_by_padding,
            "fail",
            r"roles must not depend on padding and packing; got OTHER for SYSTEM at '<\|im_start",
        ),
    ],
    "long prompts": [
        (
            truncating_tokenizer,
            "fail",
            "a prompt must be rendered whole; got 512 tokens of one longer than max_position",
        ),
        (short_model_max_length, "warn", "cuts at model_max_length=64"),
    ],
    "images": [
        (other_merge_size, "fail", "every image feature needs one placeholder; got 60 placeholders and 15 features"),
        (blind_model, "fail", r"logits must depend on the image; got a relative change of 0\.0e\+00"),
        (wrong_batch, "fail", "must have the same logits by itself and in a batch; got "),
    ],
    "image sizes": [
        (refusing_processor, "warn", "The processor raises on such images"),
        (fewer_features_of_long_images, "fail", "got 48 placeholders and 47 features for an image of 3000x20 pixels"),
    ],
    "masses": [
        (
            attention_outside_the_interface,
            "fail",
            r"must call transformers' attention interface; layers \[0, 1, 2, 3\]",
        ),
        (
            masks_of_its_own,
            "fail",
            "must equal the sums of eager attention; got a difference of .* in layer 1 under sdpa",
        ),
        (
            attention_of_its_own,
            "fail",
            "sdpa must compute the softmax that eager attention does; got outputs .* in layer 0",
        ),
    ],
    "guidance": [
        (
            keys_of_zero,
            "fail",
            "must have a finite, nonzero gradient in every layer; got norm 0.0 in q_proj",
        ),
    ],
    "freezing": [
        (tower_of_another_name, "fail", "needs parameters under 'model.vision_tower'; got none"),
        (
            half_a_tower,
            "fail",
            "must freeze all of the vision part; got 1 parameters that train on: model.visual.patch",
        ),
        (language_model_as_tower, "fail", "must not freeze the language model; got .'model.language_model.layers.0"),
    ],
    "boxes": [
        (unknown_coordinates, "fail", "Family.coordinates must be one of .*; got 'pixels'"),
        (
            unreadable_box,
            "fail",
            r"must be read as \(64.0, 120.0, 320.0, 360.0\) in an image of \(640, 480\); got None",
        ),
    ],
    "special tags": [
        (special_tag, "fail", "must survive decoding without special tokens; got .* without <answer>, </answer>"),
        (special_brackets, "fail", "a box must survive decoding without special tokens"),
        (special_label, "warn", "The box is still read, by its numbers"),
    ],
    "data": [],  # test_data
    "architecture": [
        (unknown_architecture, "fail", r"the \d+ that vLLM .* knows; got \['Qwen9VLForConditionalGeneration'\]"),
    ],
    "rollout": [
        (vllm_that_dies, "fail", "^RuntimeError: vLLM must start and answer; got exit code 1: ValueError: no kernel"),
        (vllm_with_other_ids, "fail", "must expand a prompt to the ids of training; got 2 ids for"),
        (vllm_with_other_logprobs, "fail", "must be those of transformers; got a difference of"),
    ],
    "memory": [(nothing, "warn", "take .* MiB of 0.001 GiB, without activations")],
}
OPTIONS = {"rollout": {"rollout": True}, "memory": {"gpu_memory": 0.001}}
CASES = [(name, *case) for name, cases in BROKEN.items() for case in cases]


@pytest.mark.e2e
@pytest.mark.parametrize(("name", "edit", "status", "message"), CASES, ids=[f"{c[0]}-{c[1].__name__}" for c in CASES])
def test_a_broken_model_is_caught(folder, monkeypatch, name, edit, status, message):
    if name in ("architecture", "rollout"):
        pytest.importorskip("vllm")
    edit(folder, monkeypatch)
    *before, result = run_checks(folder, only=[name], **OPTIONS.get(name, {}))
    assert [(other.name, other.detail) for other in before if other.status == "fail"] == []
    assert (result.name, result.status) == (name, status), result
    text = result.detail if status == "fail" else result.fix
    assert re.search(message, text, re.DOTALL), text


def test_every_check_has_a_broken_model():
    assert list(BROKEN) == [check.name for check in CHECKS]


def test_data(tiny_model_path, tmp_path):
    file = tmp_path / "train.parquet"
    photo_grid.make_sft_parquet(file, n=3, seed=0)
    *_, result = run_checks(tiny_model_path, only=["data"], data=file)
    assert result.status in ("pass", "warn") and result.detail.startswith("3 rows without an error"), result
    rows = pandas.read_parquet(file)
    rows.at[1, "messages"] = [
        {"role": "user", "content": "<image><image>Two?"},
        {"role": "assistant", "content": "No."},
    ]
    rows.to_parquet(file)
    *_, result = run_checks(tiny_model_path, only=["data"], data=file)
    assert result.status == "fail"
    assert re.search("every row must be readable and trainable; got 1 errors: 1 markers .row 1: ", result.detail)
