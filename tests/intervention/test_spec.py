# SPDX-License-Identifier: Apache-2.0
"""How an intervention is written, and what it multiplies keys by."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from avar_verl.intervention.spec import InterventionSpec, scale_keys
from avar_verl.roles import TokenRole


@pytest.mark.parametrize(
    "text, expected",
    [
        ("alpha_img=0.15", InterventionSpec(alpha_img=0.15)),
        ("alpha_sys=0.4,alpha_img=0.15", InterventionSpec(0.15, 0.4)),
        ("alpha_img=1e-1, alpha_sys = -2 ,layers=0-2,7", InterventionSpec(0.1, -2.0, (0, 1, 2, 7))),
        ("heads=3,0-1,layers=4,alpha_img=0", None),
        ("layers=4,heads=0-1,3,alpha_img=0", InterventionSpec(0.0, 0.0, (4,), (0, 1, 3))),
    ],
)
def test_parsing(text, expected):
    if expected is None:
        with pytest.raises(ValueError, match=r"heads must be ascending, distinct indices from 0 on; got \[3, 0, 1\]"):
            InterventionSpec.parse(text)
    else:
        assert InterventionSpec.parse(text) == expected


def test_the_text_of_a_spec():
    assert str(InterventionSpec()) == "alpha_img=0.0,alpha_sys=0.0"
    spec = InterventionSpec(0.15, 0.4, (0, 1, 2, 5, 7, 8), (3,))
    assert str(spec) == "alpha_img=0.15,alpha_sys=0.4,layers=0-2,5,7-8,heads=3"
    assert str(InterventionSpec(1, -0.0)) == str(InterventionSpec.parse("alpha_img=1")) == "alpha_img=1.0,alpha_sys=0.0"


indices = st.none() | st.sets(st.integers(0, 40), min_size=1).map(lambda chosen: tuple(sorted(chosen)))


@given(st.floats(-1, 1e6), st.floats(-1e6, 1), indices, indices)
def test_every_spec_is_read_back_from_its_text(alpha_img, alpha_sys, layers, heads):
    spec = InterventionSpec(alpha_img, alpha_sys, layers, heads)
    assert InterventionSpec.parse(str(spec)) == spec == InterventionSpec.of(str(spec)) == InterventionSpec.of(spec)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "an intervention is written alpha_img=.*; got ''"),
        ("0.15", "got '0.15'"),
        ("alpha_img=0.15,0.4", "got '0.4' in 'alpha_img=0.15,0.4'"),
        ("alpha=0.15", "each name at most once; got 'alpha'"),
        ("alpha_img=1,alpha_img=2", "each name at most once; got 'alpha_img'"),
        ("alpha_img=", "alpha_img must be a number; got ''"),
        ("alpha_img=a", "alpha_img must be a number; got 'a'"),
        ("alpha_img=nan", "alpha_img must be a number, at least -1, .*; got nan"),
        ("alpha_img=inf", "alpha_img must be a number, at least -1, .*; got inf"),
        ("alpha_img=-1.01", "alpha_img must be a number, at least -1, .*; got -1.01"),
        ("alpha_sys=1.01", "alpha_sys must be a number, at most 1, .*; got 1.01"),
        ("alpha_img=1,layers=", "layers are indices and ranges .*; got ''"),
        ("alpha_img=1,layers=-1", "layers are indices and ranges .*; got '-1'"),
        ("alpha_img=1,layers=3-1", "layers are indices and ranges .*; got '3-1'"),
        ("alpha_img=1,heads=0-99999", "heads are indices and ranges up to 4095, .*; got '0-99999'"),
        ("alpha_img=1,layers=2,2", r"layers must be ascending, distinct .*; got \[2, 2\]"),
    ],
)
def test_what_is_no_intervention_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        InterventionSpec.parse(text)


def test_indices_given_directly_are_checked_too():
    for layers in ((), (-1, 0), (1, 0)):
        with pytest.raises(ValueError, match="layers must be ascending"):
            InterventionSpec(layers=layers)


def test_identity():
    assert InterventionSpec.of(None).is_identity and InterventionSpec.parse("layers=3").is_identity
    assert not InterventionSpec.parse("alpha_sys=0.1").is_identity


def test_factors_by_hand():
    factors_KR = InterventionSpec(0.25, 0.5, heads=(2, 3, 4, 5)).key_factors(num_heads=6, num_kv_heads=3)
    changed = [1.0, 0.5, 1.25, 1.0, 1.0]  # OTHER, SYSTEM, IMAGE, USER, RESPONSE
    assert factors_KR.tolist() == [[1.0] * 5, changed, changed]
    assert [role.name for role in TokenRole] == ["OTHER", "SYSTEM", "IMAGE", "USER", "RESPONSE"]
    assert InterventionSpec(0.25, 0.5).key_factors(6, 3).tolist() == [changed] * 3


def test_heads_that_share_keys_are_chosen_together():
    with pytest.raises(ValueError, match=r"must be chosen together: 2 to 3 do; got \[2\].*groups of 2"):
        InterventionSpec(0.1, heads=(0, 1, 2)).key_factors(6, 3)
    InterventionSpec(0.1, heads=(2,)).key_factors(6, 6)  # Without sharing any head will do.


def test_layers_and_heads_of_a_model():
    model = SimpleNamespace(num_hidden_layers=4)
    assert InterventionSpec(layers=(1, 3)).chosen_layers(model) == (1, 3)
    assert InterventionSpec().chosen_layers(model) == (0, 1, 2, 3)
    model.num_hidden_layers = 3
    with pytest.raises(ValueError, match="layers must be among the 3 of the model; got 1,3. Count from 0 to 2"):
        InterventionSpec(layers=(1, 3)).chosen_layers(model)
    with pytest.raises(ValueError, match="heads must be among the 6 of the model; got 5-6"):
        InterventionSpec(0.1, heads=(5, 6)).key_factors(6, 3)


def test_scaled_keys_are_rounded_once():
    """In bfloat16 1.15 is 1.1484375: rounding the factor first would give another product."""
    key = torch.tensor([3.0], dtype=torch.bfloat16)
    scaled = scale_keys(key, torch.tensor([1.15]))
    assert scaled.dtype == torch.bfloat16
    assert scaled.item() == torch.tensor(3 * 1.15).bfloat16().item() != (key * torch.tensor(1.15).bfloat16()).item()
