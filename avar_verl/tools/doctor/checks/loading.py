# SPDX-License-Identifier: Apache-2.0
"""Whether the parts of the folder exist and belong together."""

import json
from pathlib import Path

import torch
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from avar_verl.model.checkpoint import check_model
from avar_verl.model.families import known_families
from avar_verl.tools.doctor.check import Finding, check
from avar_verl.tools.doctor.samples import assistant, user
from avar_verl.tools.doctor.subject import Subject, count


@check(
    "family",
    prevents="Roles, freezing and the engine's inputs depend on the family; a model of an unknown family is refused "
    "when training starts.",
    fix="Add the family (docs/new-model.md), or train one of the known families.",
)
def family(subject: Subject) -> str:
    model_type = subject.config.model_type
    if model_type not in known_families():
        raise ValueError(
            f"config.model_type must be a known family; got {model_type!r}. Known families: "
            f"{', '.join(known_families())}; docs/new-model.md says how to add one."
        )
    reason = subject.family.unpackable
    packing = f"; set model.use_remove_padding=false, samples cannot be packed: {reason}" if reason else ""
    return f"{model_type}; SYSTEM is {subject.family.system}{packing}"


@check(
    "processor",
    prevents="verl drops a processor it cannot load and trains on text only, with a warning that is easily missed.",
    fix="Copy processor_config.json (or preprocessor_config.json) and chat_template.jinja of the original checkpoint "
    "into the folder, and let verl load plugins (VERL_USE_EXTERNAL_PLUGINS).",
    needs=["family"],
)
def processor(subject: Subject) -> str:
    loaded, model_type = subject.processor, subject.config.model_type
    wanted, got = PROCESSOR_MAPPING_NAMES.get(model_type), type(loaded).__name__
    if wanted is not None and got != wanted:
        raise ValueError(f"a {model_type} model needs the processor class {wanted}; got {got}.")
    for part in ("image_processor", "tokenizer"):
        if getattr(loaded, part, None) is None:
            raise ValueError(f"the processor must have an {part}; got {got} without one.")
    if not loaded.chat_template:
        raise ValueError(f"the processor must have a chat template; got {loaded.chat_template!r}.")
    return f"{got} with {type(loaded.image_processor).__name__}, through verl's hf_processor"


def _ids(value) -> list[int]:
    """Token ids of a config field that may be None, one id or several."""
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


@check(
    "vocabulary",
    prevents="Image tokens with an id that the config does not know stay text, so features and placeholders do not "
    "match; ids beyond the embedding end the run on a GPU with an assertion.",
    fix="Use the tokenizer and config of the same checkpoint, and resize the embeddings after adding tokens.",
    needs=["processor"],
)
def vocabulary(subject: Subject) -> Finding:
    config, tokenizer = subject.config, subject.tokenizer
    configured = set(subject.family.placeholder_ids(config))
    written = {}
    for name in ("image_token", "video_token"):
        text = getattr(subject.processor, name, None)
        token_id = None if text is None else tokenizer.convert_tokens_to_ids(text)
        if token_id is not None and token_id != tokenizer.unk_token_id:
            written[text] = token_id
    image_token = getattr(subject.processor, "image_token", None)
    if subject.family.placeholders and written.get(image_token) not in configured:
        raise ValueError(
            f"the config's placeholders {list(subject.family.placeholders)} must hold the id of the processor's "
            f"image_token {image_token!r}; got {sorted(configured)}, where the tokenizer has "
            f"{written.get(image_token)}. Correct the id in config.json."
        )
    strange = configured - set(written.values())
    if written and strange and subject.family.placeholders:
        raise ValueError(
            f"every placeholder of the config must be the image or video token of the processor; got {sorted(strange)}"
            f", where the processor has {written}. Correct the id in config.json."
        )
    rows = subject.meta_model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ValueError(
            f"the tokenizer must not know more ids than the embedding has rows; got {len(tokenizer)} and {rows}. "
            "Resize the embedding, or take the checkpoint's own tokenizer."
        )
    for name in ("eos", "pad"):
        if getattr(tokenizer, f"{name}_token_id") is None:
            raise ValueError(f"the tokenizer must have an {name} token; got None. Set {name}_token in its config.")
    detail = f"{len(tokenizer)} tokens, {rows} rows; placeholders {written}"
    turns = subject.role_map.find_turns
    ends, pad_id = list(getattr(turns, "end_ids", ())), tokenizer.pad_token_id
    # vLLM stops at both.
    stops = [tokenizer.eos_token_id, *_ids(getattr(subject.generation_config, "eos_token_id", None))]
    if ends and not set(ends) & set(stops):
        return Finding(
            detail,
            f"Nothing stops a rollout at the end of its turn: it stops at {tokenizer.convert_ids_to_tokens(stops)}, a "
            f"turn ends with {tokenizer.convert_ids_to_tokens(ends)}. Add that id to eos_token_id of "
            "generation_config.json.",
        )
    if pad_id in ends:
        detail += f"; padding is {tokenizer.pad_token}, the end of a turn"
        ids_S = subject.render([user("Is this padded?"), assistant("Yes.")]).ids_S
        padded_S = torch.nn.functional.pad(ids_S, (0, 3), value=pad_id)
        if bool(subject.role_map(padded_S[None])[0, -3:].any()):
            return Finding(
                detail,
                f"Without an attention mask, the padding token {tokenizer.pad_token!r} after a response counts as its "
                "end. Pass the mask along with the ids, as the trainers here do, or set another pad_token.",
            )
    return Finding(detail)


def check_files(folder: Path) -> None:
    """Check that every file of the index exists and is complete.

    Raises:
        ValueError: a file is missing or truncated, for example after an interrupted download.
    """
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return
    content = json.loads(index.read_text())
    names = sorted(set(content["weight_map"].values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"every file of {index.name} must be there; got none of {', '.join(missing[:3])}.")
    wanted = content.get("metadata", {}).get("total_size", 0)
    have = sum((folder / name).stat().st_size for name in names)
    if have < wanted:
        raise ValueError(f"the files of {index.name} must have its {wanted} bytes; got {have}. Download them again.")


@check(
    "weights",
    prevents="transformers initialises missing weights of a checkpoint at random, with only a warning.",
    fix="Download the missing files again, or load the folder with the transformers version that wrote it.",
    needs=["family"],
)
def weights(subject: Subject) -> str:
    number = f"{count(subject.num_parameters)} parameters"
    check_files(Path(subject.options.model))
    if subject.is_reduced:
        check_model(subject.options.model)
        layers = subject.model.config.get_text_config().num_hidden_layers
        return (
            f"{number}, all from the checkpoint: checks run on a float32 model of this config with {layers} text "
            "layers and random weights"
        )
    subject.model  # noqa: B018  Loads it, or raises.
    return f"{number}, all from the checkpoint"
