# SPDX-License-Identifier: Apache-2.0
"""Where the model looks as it writes a word: attention to every image token, as rasters over the images.

The query before a token predicts it. So the queries of a word are those before each of its tokens, as in the demo's
report. (The queries at the word's own tokens predict what comes next.)

Shape suffixes: S = positions, T = response tokens, I = image tokens, N = tokens of one image, Y = rows, X = columns,
    B = samples, H = query heads, Q = queries, G = key groups
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from avar_verl.attention import capture_mass
from avar_verl.model.checkpoint import Checkpoint
from avar_verl.model.render import Rendered
from avar_verl.model.roles import TokenRole
from avar_verl.tools.report import encode_image
from avar_verl.tools.rows import Conversation
from avar_verl.tools.vas.score import LabelledSample

NUM_WORDS = 4
MIN_LETTERS = 3
# Longest side of an image in the report, in pixels.
SIDE = 320
# Most response tokens per pass: the masses of all image tokens for each are in memory at once.
MAX_TOKENS = 512


def words_of(tokenizer, ids_T: Sequence[int]) -> list[tuple[str, list[int]]]:
    """(word, indices of its tokens) of a response, in order; special tokens and tags such as <think> are not words.

    A token belongs to the word to which it adds a character, because tokenizers differ in where they put spaces.
    """
    return [part for part in parts_of(tokenizer, ids_T) if re.fullmatch(r"\w+", part[0])]


def parts_of(tokenizer, ids_T: Sequence[int]) -> list[tuple[str, list[int]]]:
    """The text of a response, without special tokens, as words, tags and what is between them, each with the indices of
    its tokens."""
    text, owners = "", []
    for index in range(len(ids_T)):
        longer = tokenizer.decode(ids_T[: index + 1], skip_special_tokens=True)
        owners += [index] * (len(longer) - len(text))
        text = longer
    out = []
    for match in re.finditer(r"</?\w+>|\w+|(?:(?!</?\w+>)\W)+", text):
        tokens = sorted({owners[at] for at in range(*match.span()) if at < len(owners)})
        out.append((match.group(), tokens))
    return out


def dependency_by_word(
    tokenizer, ids_T: Sequence[int], dependency_T: Sequence[float]
) -> list[tuple[str, float | None]]:
    """The parts of a response (`parts_of`), each with the mean dependency of its tokens."""
    return [
        (text, sum(dependency_T[at] for at in tokens) / len(tokens) if tokens else None)
        for text, tokens in parts_of(tokenizer, ids_T)
    ]


def choose_words(
    words: Sequence[tuple[str, list[int]]], mass_T: torch.Tensor, wanted: Sequence[str] | None
) -> list[tuple[str, list[int]]]:
    """The words in `wanted` (first occurrence, ignoring case), or the NUM_WORDS distinct words of at least MIN_LETTERS
    letters that were written with the most mass on the image; in text order.

    mass_T: mass on the image of the query that predicts each token.
    """
    first: dict[str, tuple[str, list[int]]] = {}
    for word, tokens in words:
        first.setdefault(word.lower(), (word, tokens))
    if wanted is not None:
        chosen = {word.lower() for word in wanted} & set(first)
    else:
        letters = {key for key in first if sum(letter.isalpha() for letter in key) >= MIN_LETTERS}
        ranked = sorted(letters, key=lambda key: -float(mass_T[first[key][1]].mean()))
        chosen = set(ranked[:NUM_WORDS])
    return [first[key] for key in first if key in chosen]


def raster(places_N4: torch.Tensor, values_N: torch.Tensor, size: tuple[int, int]) -> np.ndarray:
    """(Y, X) density of `values_N` on an image of `size` (width, height): every token's value is spread evenly over the
    pixels of its place. Tiles and a thumbnail add up. The sum equals the sum of the values.

    >>> raster(torch.tensor([[0.0, 0.0, 0.5, 1.0]]), torch.tensor([8.0]), (4, 2)).tolist()
    [[2.0, 2.0, 0.0, 0.0], [2.0, 2.0, 0.0, 0.0]]
    """
    width, height = size
    out_YX = np.zeros((height, width))
    scale = torch.tensor([width, height, width, height], dtype=torch.float64)
    for (x1, y1, x2, y2), value in zip((places_N4 * scale).round().long().tolist(), values_N.tolist(), strict=True):
        # A place smaller than a pixel gets the pixel in which it starts.
        x1, y1 = min(x1, width - 1), min(y1, height - 1)
        x2, y2 = max(x2, x1 + 1), max(y2, y1 + 1)
        out_YX[y1:y2, x1:x2] += value / ((x2 - x1) * (y2 - y1))
    return out_YX


def shrunk(image: Image.Image) -> Image.Image:
    """Shrink to at most SIDE pixels per side."""
    factor = min(1.0, SIDE / max(image.size))
    return image.resize([max(1, round(side * factor)) for side in image.size]) if factor < 1 else image


@torch.no_grad()
def attention_to_image_tokens(
    checkpoint: Checkpoint,
    rendered: Rendered,
    roles_S: torch.Tensor,
    chosen_S: torch.Tensor,
    layers: Sequence[int] | None = None,
) -> torch.Tensor:
    """Attention of every selected query to every image token of one sample, (Q, I) float32, mean over layers and heads.

    Args:
        chosen_S: bool, the queries.
        layers: default those of `capture_mass`.

    Raises:
        ValueError: no selected query, or no image.
    """
    image_S = roles_S == TokenRole.IMAGE
    num_image = int(image_S.sum())
    if not num_image or not bool(chosen_S.any()):
        raise ValueError(
            f"image attention needs image tokens and selected queries; got {num_image} and {int(chosen_S.sum())}. "
            "Check the sample and the queries that were chosen."
        )
    # One key group per image token, group 0 for all other keys.
    groups_S = image_S.long().cumsum(0) * image_S
    query_roles_S = torch.where(chosen_S, TokenRole.RESPONSE, TokenRole.OTHER)
    device = checkpoint.model.device
    with capture_mass(
        checkpoint.model,
        query_roles_S[None].to(device),
        layers=layers,
        query_role=TokenRole.RESPONSE,
        reduction=lambda mass_BHQG, _: mass_BHQG[0, :, :, 1:].mean(0),
        key_groups=groups_S[None].to(device),
        num_groups=num_image + 1,
    ) as captured:
        checkpoint.model(**checkpoint.collate([rendered]), use_cache=False)
    return torch.stack(captured.per_layer()).mean(0).cpu()


def where_words_look(
    checkpoint: Checkpoint,
    conversation: Conversation,
    sample: LabelledSample,
    layers: Sequence[int],
    wanted: Sequence[str] | None = None,
    dependency: Sequence[float] | None = None,
) -> dict[str, Any]:
    """Content of the report for one sample.

    Args:
        layers: whose attention is drawn; () draws none.
        dependency: of every response token, if measured.

    Returns:
        `question`, `response` (of the measured tokens); `images`, base64 PNG of each; `note`, why there are no words;
        `words`: for each `word`, means over its queries: `mass` on all images, the `image` that gets most of it, and
        `tokens_mass`, the attention to each token of this image, whose rectangles are `places`; `dependency`, the
        parts of the response with the mean dependency of each (`dependency_by_word`), or None.
    """
    tokenizer = checkpoint.processor.tokenizer
    is_response_S = sample.roles_S == TokenRole.RESPONSE
    positions_T = is_response_S.nonzero()[:MAX_TOKENS, 0]
    ids_T = sample.rendered.ids_S[positions_T].tolist()
    question = next(
        (
            "".join(block["text"] for block in message["content"] if block["type"] == "text")
            for message in reversed(conversation.prompt)
            if message["role"] == "user"
        ),
        "",
    )
    out: dict[str, Any] = {
        "question": question.strip(),
        "response": tokenizer.decode(ids_T, skip_special_tokens=True).strip(),
        "images": [encode_image(shrunk(image)) for image in conversation.images],
        "places": [],
        "words": [],
        "note": "",
        "dependency": None if dependency is None else dependency_by_word(tokenizer, ids_T, dependency),
    }
    if not layers:
        return out
    family = checkpoint.family
    if family.places is None:
        out["note"] = "The image tokens of this family do not represent known rectangles, so there is nothing to draw."
        return out
    sizes = [image.size for image in conversation.images]
    places = family.image_places(checkpoint.processor, sample.rendered.features, sizes)
    chosen_S = torch.zeros_like(is_response_S)
    chosen_S[positions_T - 1] = True  # A response is never first.
    attention_TI = attention_to_image_tokens(checkpoint, sample.rendered, sample.roles_S, chosen_S, layers)
    chosen = choose_words(words_of(tokenizer, ids_T), attention_TI.sum(1), wanted)
    if not chosen:
        out["note"] = "The response has none of the words to show."
    out["places"] = [places_N4.tolist() for places_N4 in places]
    for word, tokens in chosen:
        by_image = attention_TI[tokens].mean(0).split([len(places_N4) for places_N4 in places])
        best = max(range(len(by_image)), key=lambda index: float(by_image[index].sum()))
        out["words"].append(
            {
                "word": word,
                "mass": float(sum(values_N.sum() for values_N in by_image)),
                "image": best,
                "tokens_mass": by_image[best].tolist(),
            }
        )
    return out
