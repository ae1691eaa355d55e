# SPDX-License-Identifier: Apache-2.0
"""Corrupted images of every family, against what its processor makes of a picture of the mean colour."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from avar_verl.model.corrupt import (
    NEARLY_ZERO,
    PIXELS,
    blank,
    check_blank,
    first_rows,
    partners,
    shape_of,
    swap,
    with_first_rows,
)
from avar_verl.model.families import FAMILIES, get_family
from avar_verl.model.render import collate, render
from tests.model.families.tiny import sample_messages

every_family = pytest.mark.parametrize("model_type", FAMILIES)
# Colours have 256 levels, and the normalised scale is at most 1 / 0.26 as wide: half a level is less than this.
HALF_A_LEVEL = 0.5 / 255 / 0.26


def features_of(processor, image) -> dict:
    content = [{"type": "image", "image": image}, {"type": "text", "text": "What?"}]
    return render(processor, [{"role": "user", "content": content}]).features


def photographs(shape: tuple[int, int]):
    return [sample_messages(1, seed=seed, shapes=[shape])[0]["content"][0]["image"] for seed in (0, 1)]


@every_family
@pytest.mark.parametrize("shape", [(112, 112), (224, 70)])
def test_blank_is_a_picture_of_the_mean_colour(model_type, family_processor, shape):
    processor = family_processor(model_type)
    check_blank(processor)
    first, second = (features_of(processor, image) for image in photographs(shape))
    means = [0.5] * 3 if model_type == "gemma4" else processor.image_processor.image_mean
    colour = tuple(round(255 * mean) for mean in means)
    mean_coloured = features_of(processor, Image.new("RGB", shape, colour))
    blanked = blank(first)
    assert blanked.keys() == mean_coloured.keys()
    for key, value in blanked.items():
        if key not in PIXELS:
            assert torch.equal(value, mean_coloured[key]) and torch.equal(value, first[key]), key
            continue
        assert value.shape == first[key].shape and value.dtype == first[key].dtype
        drops_zeros = model_type in ("idefics3", "smolvlm")
        assert value.abs().max() == (NEARLY_ZERO if drops_zeros else 0.5 if model_type == "gemma4" else 0)
        differs = (value - mean_coloured[key]).abs() > HALF_A_LEVEL
        # Padding, the same for every picture of this shape.
        for other in (first, second):
            assert torch.equal(other[key][differs], mean_coloured[key][differs])
        pads = model_type in ("llava_next", "llava_onevision", "mllama") and shape != (112, 112)
        assert bool(differs.any()) == pads and differs.float().mean() < 0.5
        assert (first[key] - value).abs().max() > 0.1


@every_family
def test_blank_images_keep_their_tokens(model_type, family_model, family_processor):
    """The model finds an image for every placeholder, in half precision too; tiles of padding stay padding."""
    processor, model = family_processor(model_type), family_model(model_type)
    family = get_family(model_type)
    messages = sample_messages(1)
    one, other = render(processor, messages), render(processor, sample_messages(1, seed=1, shapes=[(224, 112)]))
    pad_id = processor.tokenizer.pad_token_id
    samples = [replace(sample, features=blank(sample.features)) for sample in (one, other)]
    inputs = collate(family, model.config, samples, pad_id)
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits
        alone = model(**collate(family, model.config, samples[:1], pad_id), use_cache=False).logits
    assert torch.allclose(logits[0, : alone.shape[1]], alone[0], atol=1e-4)
    for key in PIXELS:
        if key in samples[0].features:
            half = samples[0].features[key].half()
            assert torch.equal(half != 0, samples[0].features[key] != 0)


@every_family
def test_swap_takes_the_pixels_of_a_partner_of_the_same_shape(model_type, family_processor):
    processor = family_processor(model_type)
    first, second = (features_of(processor, image) for image in photographs((112, 112)))
    swapped = swap(first, second)
    assert swapped.keys() == first.keys()
    assert all(torch.equal(value, second[key]) for key, value in swapped.items())
    assert not torch.equal(swapped["pixel_values"], first["pixel_values"])
    assert shape_of(first) == shape_of(second) and hash(shape_of(first))
    if model_type != "gemma3":  # Every picture becomes a square.
        wide = features_of(processor, photographs((224, 112))[0])
        assert shape_of(wide) != shape_of(first)
        with pytest.raises(ValueError, match="must have the same shapes and grids; got .*corruption=blank"):
            swap(first, wide)


def test_a_grid_is_part_of_the_shape():
    """2 x 8 and 4 x 4 patches are 16 each, but not at the same places."""
    wide, square = (
        {"pixel_values": torch.ones(16, 3), "image_grid_thw": torch.tensor([grid])} for grid in ([1, 2, 8], [1, 4, 4])
    )
    with pytest.raises(ValueError, match="same shapes and grids"):
        swap(wide, square)


def test_a_sample_without_an_image_has_nothing_to_corrupt():
    assert blank({}) == swap({}, {}) == {} and shape_of({}) == ()
    nothing = {"pixel_values": None}
    assert blank(nothing) == swap(nothing, {}) == nothing and shape_of(nothing) == ()
    with pytest.raises(ValueError, match="same shapes and grids"):
        swap({"pixel_values": torch.ones(1, 2)}, {})


@pytest.mark.parametrize("corrupt", [blank, shape_of, lambda features: swap(features, features)])
def test_unknown_features_are_refused(corrupt):
    with pytest.raises(ValueError, match="known to be pixels or not; got 'depth_values'. Add it to PIXELS"):
        corrupt({"depth_values": torch.ones(1)})


def test_a_processor_that_does_not_normalise_has_no_blank_image():
    with pytest.raises(ValueError, match="do_normalize=False. Corrupt images by swapping them"):
        check_blank(SimpleNamespace(image_processor=SimpleNamespace(do_normalize=False)))


def test_partners_are_other_images_of_the_same_shape():
    """Cycles within a shape, equal images share a partner, whatever the order; nothing for a sample without one."""

    def of(value: float, shape=(2, 3)) -> dict:
        return {"pixel_values": torch.full(shape, value)}

    samples = [of(1), of(2), {}, of(1), of(5, (4, 3)), of(3), of(6, (4, 3))]
    chosen = partners(samples)
    assert chosen[2] is None and chosen[4] == 6 and chosen[6] == 4 and chosen[0] == chosen[3]
    images = {name: samples[chosen[name]]["pixel_values"][0, 0].item() for name in (0, 1, 5)}
    assert sorted(images.values()) == [1, 2, 3] and images[0] != 1 and images[1] != 2 and images[5] != 3
    again = partners(samples[::-1])[::-1]
    for before, after in zip(chosen, again, strict=True):
        assert before is after is None or torch.equal(
            samples[before]["pixel_values"], samples[::-1][after]["pixel_values"]
        )
    assert partners([]) == [] and partners([{}, {}]) == [None, None]


@pytest.mark.parametrize("others", [[], [{"pixel_values": torch.ones(2, 3)}], [{"pixel_values": torch.zeros(4, 3)}]])
def test_an_image_without_a_partner_is_refused(others):
    with pytest.raises(ValueError, match="got only one of the shapes .*corruption=blank, or use images of one size"):
        partners([{"pixel_values": torch.ones(2, 3)}, {}, *others])


def test_features_of_the_first_images():
    features = {"pixel_values": torch.arange(6.0)[:, None], "image_grid_thw": torch.tensor([[1, 2, 2], [1, 1, 2]])}
    rows = {"pixel_values": 4, "image_grid_thw": 1}
    first = first_rows(features, rows)
    assert first["pixel_values"].flatten().tolist() == [0, 1, 2, 3] and first["image_grid_thw"].tolist() == [[1, 2, 2]]
    back = with_first_rows(features, first)
    assert all(torch.equal(back[key], value) for key, value in features.items())
    changed = with_first_rows(features, blank(first))
    assert changed["pixel_values"].flatten().tolist() == [0, 0, 0, 0, 4, 5]
    assert torch.equal(changed["image_grid_thw"], features["image_grid_thw"])
    # Without images from tools, and for a prompt without any.
    assert all(torch.equal(value, features[key]) for key, value in first_rows(features, None).items())
    assert first_rows(features, {}) == {}
    assert all(torch.equal(value, features[key]) for key, value in with_first_rows(features, {}).items())
