# SPDX-License-Identifier: Apache-2.0
"""Visual dependency by hand: the difference, the clip, the mean, the weights; a response that uses the image."""

import math
from dataclasses import replace

import pytest
import torch

from avar_verl.model.corrupt import blank
from avar_verl.model.families import get_family
from avar_verl.model.render import Rendered, collate, render
from avar_verl.objectives.dependency import CLAMP, dependency_weights, mean_dependency, token_dependency
from tests.model.families.tiny import sample_messages

INF, NAN = math.inf, math.nan


def test_a_token_is_worth_what_the_image_adds_to_its_log_probability():
    with_image = torch.tensor([[-0.25, -1.0, -3.0], [-0.5, -7.0, -0.1]])
    without = torch.tensor([[-1.25, -1.0, -2.5], [-6.5, -0.5, -INF]])
    expected = [[1.0, 0.0, -0.5], [CLAMP, -CLAMP, CLAMP]]
    assert token_dependency(with_image, without).tolist() == expected
    assert CLAMP == 5.0


def test_the_mean_is_over_the_tokens_of_the_response():
    dependency = torch.tensor([[9.0, 1.0, 0.5, -3.0], [NAN, 2.0, NAN, NAN], [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    mask = torch.tensor([[0, 1, 1, 1], [0, 1, 0, 0], [0, 1, 1, 1], [0, 0, 0, 0]])
    first, second, third, fourth = mean_dependency(dependency, mask).tolist()
    assert (first, second, third) == (-0.5, 2.0, 0.0) and math.isnan(fourth)


def test_weights_have_mean_one_and_do_not_punish():
    """2, 0, 1, 1 over their mean of 1; 5 and 0 over 2.5; no token above 0, so all alike; no response."""
    dependency = torch.tensor(
        [[2.0, -1.0, 1.0, 1.0], [5.0, -5.0, NAN, 9.0], [0.0, -2.0, 0.0, 9.0], [3.0, 3.0, 3.0, 3.0]]
    )
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]])
    weights = dependency_weights(dependency, mask)
    assert weights.tolist() == [[2, 0, 1, 1], [2, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]]
    generator = torch.Generator().manual_seed(0)
    dependency = torch.randn(5, 40, generator=generator)
    mask = torch.rand(5, 40, generator=generator) < 0.7
    weights = dependency_weights(dependency, mask)
    torch.testing.assert_close((weights * mask).sum(1), mask.sum(1).float())
    assert bool((weights >= 0).all()) and bool((weights[~mask] == 0).all())


def test_weights_of_what_is_not_a_number_are_refused():
    with pytest.raises(ValueError, match=r"log-probability of every response token; got nan at .* \[\[0, 1\]\]"):
        dependency_weights(torch.tensor([[1.0, NAN]]), torch.tensor([[1, 1]]))


def outputs(model, rendered: Rendered):
    """Final hidden states (S, D) and log-probabilities (S, V)."""
    inputs = collate(get_family(model.config.model_type), model.config, [rendered], pad_id=0)
    with torch.no_grad():
        output = model(**inputs, output_hidden_states=True)
    return output.hidden_states[-1][0], output.logits[0].log_softmax(-1)


def test_naming_what_the_image_shows_depends_on_it(load_tiny, tiny_processor):
    """A model to which images add little is given one more thing: where it sees this photograph, it says `cat`.

    With a projector of zeros no response depends on the image, to the bit.
    """
    model = load_tiny()
    projector = model.model.visual.merger.mlp[-1]
    with torch.no_grad():
        projector.weight *= 0.02
    photograph = sample_messages(1)[0]["content"][0]
    question = [photograph, {"type": "text", "text": "What does it show? Somebody says dog."}]
    rendered = render(tiny_processor, [{"role": "user", "content": question}], add_generation_prompt=True)
    blanked = replace(rendered, features=blank(rendered.features))
    (seen_SD, _), (unseen_SD, _) = outputs(model, rendered), outputs(model, blanked)
    seen_D, unseen_D = seen_SD[-1], unseen_SD[-1]
    # Orthogonal to what the model has in mind without the photograph: its logit rises by 6 with it, and by 0 without.
    difference_D = seen_D - unseen_D
    direction_D = difference_D - unseen_D * (difference_D @ unseen_D) / (unseen_D @ unseen_D)
    cat, dog = (tiny_processor.tokenizer(word)["input_ids"][0] for word in ("cat", "dog"))
    with torch.no_grad():
        model.lm_head.weight[cat] += 6 * direction_D / (difference_D @ direction_D)

    def dependencies() -> list[float]:
        (_, seen_SV), (_, unseen_SV) = outputs(model, rendered), outputs(model, blanked)
        tokens = token_dependency(seen_SV[-1], unseen_SV[-1])
        return [mean_dependency(tokens[None, [token]], torch.tensor([[1]])).item() for token in (cat, dog)]

    names, repeats = dependencies()
    assert names > 2 > 0.5 > repeats
    with torch.no_grad():
        projector.weight.zero_()
    assert dependencies() == [0.0, 0.0]
