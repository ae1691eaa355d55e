# SPDX-License-Identifier: Apache-2.0
"""The mass of a role: numbers by hand, the full matrix, what it must not allocate."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from avar_verl.attention import attention_mass, mass
from avar_verl.roles import TokenRole
from tests.attention.reference import eager_mass


def random_inputs(B=2, H=4, K=2, S=37, D=8, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(B, H, S, D, generator=generator).to(dtype).requires_grad_()
    key = torch.randn(B, K, S, D, generator=generator).to(dtype).requires_grad_()
    return query, key, torch.randint(0, len(TokenRole), (B, S), generator=generator)


def masks(kind: str, B: int, S: int):
    """(attention_mask, segment_ids) of a layout."""
    mask = torch.ones(B, S, dtype=torch.bool)
    if kind == "left":
        mask[0, :5] = False
    if kind == "right":
        mask[-1, -7:] = False
    segments = (torch.arange(S) >= S // 3).long().expand(B, S) if kind == "packed" else None
    return (None if kind in ("none", "packed") else mask), segments


def test_by_hand():
    """Two keys with scores log 1 and log 3 share 1/4 and 3/4; the first query sees itself alone."""
    query = torch.ones(1, 1, 2, 1)
    key = torch.tensor([0.0, torch.log(torch.tensor(3.0))]).reshape(1, 1, 2, 1)
    out = attention_mass(query, key, torch.tensor([[1, 2]]), scale=1.0)
    expected = torch.tensor([[0, 1, 0, 0, 0], [0, 0.25, 0.75, 0, 0]])
    torch.testing.assert_close(out[0, 0], expected)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("layout", ["none", "left", "right", "packed"])
@pytest.mark.parametrize("chunk", [2**24, 400])
def test_value_and_gradient_equal_the_full_matrix(monkeypatch, heads, layout, chunk):
    monkeypatch.setattr(mass, "CHUNK_ELEMENTS", chunk)  # 400: a few queries a chunk, the last one shorter
    query, key, roles = random_inputs(H=heads[0], K=heads[1])
    attention_mask, segments = masks(layout, *roles.shape)
    for positions in (None, torch.tensor([0, 3, 17, 36])):
        fast = attention_mass(query, key, roles, attention_mask, segments, positions)
        slow = eager_mass(query, key, roles, attention_mask, segments, positions)
        torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-6)
        weight = torch.randn(fast.shape, generator=torch.Generator().manual_seed(1))
        for a, b in zip(
            torch.autograd.grad((fast * weight).sum(), (query, key)),
            torch.autograd.grad((slow * weight).sum(), (query, key)),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_logarithm_of_a_mass_has_the_closed_form_gradient():
    """d log mass_r / d score_k = p_k [role_k = r] / mass_r - p_k, through the key of a head of size 1."""
    query = torch.ones(1, 1, 3, 1)
    key = torch.tensor([0.2, -0.4, 0.9]).reshape(1, 1, 3, 1).requires_grad_()
    roles = torch.tensor([[1, 2, 2]])
    attention_mass(query, key, roles, query_positions=torch.tensor([2]), scale=1.0)[..., 2].log().sum().backward()
    p = key.detach().flatten().softmax(0)
    expected = torch.stack([-p[0], p[1] / (p[1] + p[2]) - p[1], p[2] / (p[1] + p[2]) - p[2]])
    torch.testing.assert_close(key.grad.flatten(), expected)


def test_real_queries_sum_to_one_and_padding_queries_to_zero():
    query, key, roles = random_inputs()
    attention_mask, _ = masks("left", *roles.shape)
    attention_mask[1, -4:] = False
    total = attention_mass(query, key, roles, attention_mask).sum(-1)
    torch.testing.assert_close(total, attention_mask[:, None].expand_as(total).float())


def test_a_role_without_keys_has_no_mass():
    query, key, roles = random_inputs()
    roles[roles == TokenRole.IMAGE] = TokenRole.USER
    assert not attention_mass(query, key, roles)[..., TokenRole.IMAGE].any()


def test_bfloat16_is_no_worse_than_twice_bfloat16_eager():
    query, key, roles = random_inputs(S=65, D=64, dtype=torch.bfloat16)
    exact = eager_mass(query.float(), key.float(), roles)
    fast_error = (attention_mass(query, key, roles) - exact).abs().max()
    eager_error = (eager_mass(query, key, roles).float() - exact).abs().max()
    assert fast_error <= 2 * eager_error


def test_packed_equals_alone():
    query, key, roles = random_inputs(B=1)
    segments = (torch.arange(37) >= 12).long()[None]
    packed = attention_mass(query, key, roles, segment_ids=segments)
    for part in (slice(0, 12), slice(12, 37)):
        alone = attention_mass(query[:, :, part], key[:, :, part], roles[:, part])
        torch.testing.assert_close(packed[:, :, part], alone, rtol=1e-5, atol=1e-6)


class LargestTensor(TorchDispatchMode):
    """Records the most elements of any tensor that an operation returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


@pytest.mark.parametrize("positions", [None, torch.arange(0, 512, 32)])
def test_no_tensor_of_all_queries_and_all_keys(monkeypatch, positions):
    monkeypatch.setattr(mass, "CHUNK_ELEMENTS", 2**16)
    query, key, roles = random_inputs(B=1, H=4, K=2, S=512, D=16)
    with LargestTensor() as recorded:
        attention_mass(query, key, roles, query_positions=positions).square().sum().backward()
    assert recorded.largest <= 2**16 < 4 * 512 * 512
    with LargestTensor() as recorded:  # The recorder does see a full matrix.
        eager_mass(query, key, roles)
    assert recorded.largest == 4 * 512 * 512


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(key=torch.zeros(2, 2, 36, 8)), "over the same samples and positions"),
        (dict(key=torch.zeros(2, 3, 37, 8)), "must divide the number of query heads"),
        (dict(key_roles=torch.zeros(2, 36, dtype=torch.long)), "key_roles must be"),
        (dict(attention_mask=torch.ones(1, 37)), "attention_mask must be"),
        (dict(segment_ids=torch.ones(2, 3)), "segment_ids must be"),
        (dict(key_roles=torch.full((2, 37), 5)), "must hold TokenRole values"),
        (dict(query_positions=torch.tensor([37])), r"in \[0, 37\)"),
        (dict(query_positions=torch.zeros(2, 2)), "must be one-dimensional"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    query, key, roles = random_inputs()
    with pytest.raises(ValueError, match=message):
        attention_mass(**{"query": query, "key": key, "key_roles": roles, **change})
