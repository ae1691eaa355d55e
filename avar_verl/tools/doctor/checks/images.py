# SPDX-License-Identifier: Apache-2.0
"""Whether images reach the language model, at any size.

Shape suffixes: B = samples, S = positions, V = vocabulary.
"""

import inspect

import torch
from PIL import Image

from avar_verl.data.messages import images_of
from avar_verl.model.render import Rendered
from avar_verl.model.roles import TokenRole
from avar_verl.tools.doctor.check import FOREIGN_ERRORS, Finding, check
from avar_verl.tools.doctor.samples import conversations, picture, user
from avar_verl.tools.doctor.subject import Subject

# Largest difference between logits of a single sample and of the same sample in a padded batch, relative to the
# largest.
BATCH_TOLERANCE = 1e-3
ODD_SIZES = ((1, 1), (8, 200), (3000, 20))


def count_features(model: torch.nn.Module, features: dict[str, torch.Tensor]) -> int:
    """Number of image features that the model makes from a processor's output."""
    owner = next(part for part in model.modules() if hasattr(part, "get_image_features"))
    parameters = inspect.signature(owner.get_image_features).parameters.values()
    accepted = {one.name for one in parameters if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)}
    device = next(model.parameters()).device
    output = owner.get_image_features(
        **{key: value.to(device) for key, value in features.items() if key in accepted or not accepted}
    )
    parts = output.pooler_output
    return sum(part.numel() // part.shape[-1] for part in (parts if isinstance(parts, list | tuple) else [parts]))


def count_tokens(subject: Subject, sample: Rendered, where: str) -> int:
    """Image placeholders of a sample.

    Raises:
        ValueError: it has more or fewer features.
    """
    placeholders = int((subject.role_map(sample.ids_S[None]) == TokenRole.IMAGE).sum())
    features = count_features(subject.model, sample.features)
    if placeholders != features:
        raise ValueError(
            f"every image feature needs one placeholder; got {placeholders} placeholders and {features} features "
            f"{where}."
        )
    return placeholders


def with_other_images(messages: list[dict]) -> list[dict]:
    """The conversation with inverted images of the same sizes."""

    def other(block: dict) -> dict:
        if block["type"] != "image":
            return block
        return {**block, "image": Image.eval(block["image"], lambda value: 255 - value)}

    return [{**message, "content": [other(block) for block in message["content"]]} for message in messages]


def _logits(subject: Subject, samples: list[Rendered]) -> torch.Tensor:
    """(B, S, V) of a batch padded on the right."""
    return subject.model(**subject.inputs(samples), use_cache=False).logits.float()


@check(
    "images",
    prevents="Features that do not match their placeholders end a run; if features do not arrive, the run continues "
    "on text only.",
    fix="Use the processor and config of the same checkpoint (patch and merge size, tokens per image); a new family "
    "may need token_inputs.",
    needs=["vocabulary", "weights"],
)
@torch.no_grad()
def images(subject: Subject) -> str:
    samples = subject.samples
    counts = []
    for name, sample in samples.items():
        if not sample.features or subject.family.cross_attention:
            continue
        counts.append(count_tokens(subject, sample, f"in sample {name!r}"))
    batch_BSV = _logits(subject, list(samples.values()))
    apart, last_V = 0.0, {}
    for row, (name, sample) in enumerate(samples.items()):
        alone_SV = _logits(subject, [sample])[0]
        if not bool(alone_SV.isfinite().all()):
            raise ValueError(f"logits must be finite; got others in sample {name!r}.")
        difference = (batch_BSV[row, : len(alone_SV)] - alone_SV).abs().max() / alone_SV.abs().max()
        apart, last_V[name] = max(apart, float(difference)), alone_SV[-1]
        if not apart <= BATCH_TOLERANCE:
            raise ValueError(
                f"a sample must have the same logits by itself and in a batch; got a relative difference of "
                f"{apart:.1e} in sample {name!r}."
            )
    changes = []
    for name, messages in conversations().items():
        if not images_of(messages):
            continue
        other_V = _logits(subject, [subject.render(with_other_images(messages))])[0, -1]
        changes.append(float((last_V[name] - other_V).abs().max() / last_V[name].abs().max()))
        if not changes[-1] > 1e-6:
            raise ValueError(
                f"logits must depend on the image; got a relative change of {changes[-1]:.1e} with other images "
                f"in sample {name!r}."
            )
    fit = f"{', '.join(map(str, counts))} image tokens = features; " if counts else "no feature replaces a token; "
    return f"{fit}batch and single logits differ by {apart:.0e}, other images change them by {min(changes):.0e}"


@check(
    "image sizes",
    prevents="Tiny or very long images make some processors fail in the middle of an epoch, or produce more "
    "placeholders than features.",
    fix="Leave out rows with such images (avar data check lists them), or set a minimum size in the processor.",
    needs=["images"],
)
@torch.no_grad()
def image_sizes(subject: Subject) -> Finding | str:
    told, refused = [], []
    for width, height in ODD_SIZES:
        size = f"{width}x{height}"
        try:
            sample = subject.render([user("What is this?", [picture(width, height)])])
        except FOREIGN_ERRORS as error:  # The check is about what the processor's own code refuses.
            refused.append(f"{size} ({type(error).__name__}: {str(error).splitlines()[0][:100]})")
            continue
        if subject.family.cross_attention:
            told.append(size)
            continue
        tokens = count_tokens(subject, sample, f"for an image of {size} pixels")
        told.append(f"{size}: {tokens} tokens")
    detail = "; ".join(told)
    if refused:
        return Finding(
            f"{detail + '; ' if detail else ''}refused: {', '.join(refused)}",
            "The processor raises on such images. Leave these rows out before training; avar data check finds them.",
        )
    return detail
