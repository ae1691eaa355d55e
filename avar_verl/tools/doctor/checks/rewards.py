# SPDX-License-Identifier: Apache-2.0
"""Whether a reward can read what the model writes: boxes and tags."""

from avar_verl.anchors import parse_anchors, to_pixels
from avar_verl.tools.doctor.check import Finding, Skip, check
from avar_verl.tools.doctor.subject import Subject

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
SIZE, BOX = (640, 480), (64.0, 120.0, 320.0, 360.0)
# Full width and height in each coordinate system, and the number format.
SCALES = {
    "absolute": (SIZE, "{:.0f}"),
    "relative_1000": ((1000, 1000), "{:.0f}"),
    "percent": ((100, 100), "{:.1f}"),
    "normalized": ((1, 1), "{:.3f}"),
}
# How a family writes a box, with its markers, if not as Qwen's JSON.
SYNTAX = {
    "glm4v": "<|begin_of_box|>[[{0}, {1}, {2}, {3}]]<|end_of_box|>",
    "internvl": "<ref>cup</ref><box>[[{0}, {1}, {2}, {3}]]</box>",
    "llava_next": "[{0}, {1}, {2}, {3}]",
    "llava_onevision": "[{0}, {1}, {2}, {3}]",
    "qwen2_vl": "<|object_ref_start|>cup<|object_ref_end|><|box_start|>({0},{1}),({2},{3})<|box_end|>",
}
JSON = '{{"bbox_2d": [{0}, {1}, {2}, {3}], "label": "cup"}}'


def example_box(model_type: str, coordinates: str) -> str:
    """BOX in an image of SIZE, as a model of this family writes it."""
    (width, height), number = SCALES[coordinates]
    scales = (width / SIZE[0], height / SIZE[1]) * 2
    numbers = [number.format(value * scale) for value, scale in zip(BOX, scales, strict=True)]
    return SYNTAX.get(model_type, JSON).format(*numbers)


def read_box(text: str, coordinates: str) -> tuple[float, ...] | None:
    """The only box of a text in pixels; None if there is no box or more than one."""
    boxes = [anchor for anchor in parse_anchors(text, SIZE, coordinates) if anchor.kind == "bbox"]
    return to_pixels(boxes[0], SIZE, coordinates) if len(boxes) == 1 else None


def is_box(found: tuple[float, ...] | None) -> bool:
    return found is not None and all(abs(one - other) <= 1 for one, other in zip(found, BOX, strict=True))


@check(
    "boxes",
    prevents="If boxes are read in the wrong coordinate system, the reward pays for the wrong places.",
    fix="Set Family.coordinates to how the model writes boxes, and pass the same coordinates to the reward.",
    needs=["family"],
)
def boxes(subject: Subject) -> str:
    coordinates = subject.family.coordinates
    if coordinates is None:
        raise Skip(f"{subject.config.model_type} was trained on no box format")
    if coordinates not in SCALES:
        raise ValueError(f"Family.coordinates must be one of {list(SCALES)}; got {coordinates!r}.")
    text = example_box(subject.config.model_type, coordinates)
    found = read_box(f"<think>The cup is at {text}.</think>", coordinates)
    if not is_box(found):
        raise ValueError(f"{text!r} must be read as {BOX} in an image of {SIZE}; got {found} as {coordinates}.")
    return f"{coordinates}: {text} is read as the right pixels"


@check(
    "special tags",
    prevents="Rewards read the decoded response, which has no special tokens; if a tag is one, no answer is right.",
    fix="Register the tags as ordinary added tokens (special: false in tokenizer.json), or keep special tokens: "
    "reward.reward_manager.name=avar with avar.reward.skip_special_tokens=false.",
    needs=["processor"],
)
def special_tags(subject: Subject) -> Finding | str:
    tokenizer, coordinates = subject.tokenizer, subject.family.coordinates

    def decoded(text: str) -> str:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    box = "" if coordinates is None else example_box(subject.config.model_type, coordinates)
    text = f"<think>It is at {box}.</think><answer>cup</answer>"
    got = decoded(text)
    lost = [tag for tag in TAGS if tag not in got]
    if lost:
        raise ValueError(f"tags must survive decoding without special tokens; got {got!r} without {', '.join(lost)}.")
    if not box or box in got:
        return f"{', '.join(TAGS)}{' and the box' if box else ''} survive decoding"
    if is_box(read_box(got, coordinates)):
        return Finding(
            f"{', '.join(TAGS)} survive decoding; {box} becomes {got[got.index('at ') :].partition('.<')[0]!r}",
            "The box is still read, by its numbers; to keep its markers and label set "
            "reward.reward_manager.name=avar and avar.reward.skip_special_tokens=false.",
        )
    raise ValueError(f"a box must survive decoding without special tokens; got {got!r} of {text!r}.")
