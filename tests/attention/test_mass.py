# SPDX-License-Identifier: Apache-2.0
"""The mass of a role: numbers by hand, the full matrix, what it must not allocate."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from avar_verl.attention import attention_mass, mass
from avar_verl.attention.mass import selected_mass
from avar_verl.attention.visibility import Visibility
from avar_verl.roles import TokenRole
from tests.attention.reference import eager_mass

CLOSE = dict(rtol=1e-5, atol=1e-6)


def random_inputs(B=2, H=4, K=2, S=37, D=8, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(B, H, S, D, generator=generator).to(dtype).requires_grad_()
    key = torch.randn(B, K, S, D, generator=generator).to(dtype).requires_grad_()
    return query, key, torch.randint(0, len(TokenRole), (B, S), generator=generator)


def masks(kind: str, B: int, S: int):
    """(attention_mask, segment_ids) of a layout."""
    mask = torch.ones(B, S, dtype=torch.bool)
    if kind in ("left", "both", "packed and padded"):
        mask[0, :5] = False
    if kind in ("right", "both"):
        mask[-1, -7:] = False
    segments = (torch.arange(S) >= S // 3).long().expand(B, S) if kind.startswith("packed") else None
    return (None if kind in ("none", "packed") else mask), segments


def test_by_hand():
    """Two keys with scores log 1 and log 3 share 1/4 and 3/4; the first query sees only itself."""
    query = torch.ones(1, 1, 2, 1)
    key = torch.tensor([0.0, math.log(3)]).reshape(1, 1, 2, 1)
    out = attention_mass(query, key, torch.tensor([[1, 2]]), scale=1.0)
    expected = torch.tensor([[0, 1, 0, 0, 0], [0, 0.25, 0.75, 0, 0]])
    torch.testing.assert_close(out[0, 0], expected)


def test_two_heads_on_one_key_head_with_the_default_scale_by_hand():
    """D = 4, scale 1/2. Scores of the last query: head 0 (0, 0, log 2), head 1, its negative, (0, 0, -log 2).

    Weights 1/4, 1/4, 2/4 and 2/5, 2/5, 1/5; the roles are system, image, system.
    """
    query = torch.stack([torch.ones(3, 4), -torch.ones(3, 4)])[None]
    key = torch.tensor([0.0, 0.0, math.log(2) / 2]).reshape(1, 1, 3, 1).expand(1, 1, 3, 4)
    out = attention_mass(query, key, torch.tensor([[1, 2, 1]]), query_positions=[2])
    torch.testing.assert_close(out[0, :, 0, 1:3], torch.tensor([[3 / 4, 1 / 4], [3 / 5, 2 / 5]]))


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("layout", ["none", "left", "right", "both", "packed", "packed and padded"])
@pytest.mark.parametrize("chunk", [2**24, 900, 1])
def test_value_and_gradient_equal_the_full_matrix(monkeypatch, heads, layout, chunk):
    monkeypatch.setitem(mass.CHUNK_ELEMENTS, "cpu", chunk)  # 900: 3 of 37 queries a chunk, the last one shorter; 1: one
    query, key, roles = random_inputs(H=heads[0], K=heads[1])
    attention_mask, segments = masks(layout, *roles.shape)
    for positions in (None, torch.tensor([0, 3, 17, 36])):
        fast = attention_mass(query, key, roles, attention_mask, segments, positions)
        slow = eager_mass(query, key, roles, attention_mask, segments, positions)
        torch.testing.assert_close(fast, slow, **CLOSE)
        weight = torch.randn(fast.shape, generator=torch.Generator().manual_seed(1))
        for a, b in zip(
            torch.autograd.grad((fast * weight).sum(), (query, key)),
            torch.autograd.grad((slow * weight).sum(), (query, key)),
            strict=True,
        ):
            torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("S", [1, 2, 63, 64, 65])
@pytest.mark.parametrize("scale", [None, 0.0, 0.37, 5.0])
def test_lengths_and_scales(S, scale):
    query, key, roles = random_inputs(S=S)
    fast, slow = attention_mass(query, key, roles, scale=scale), eager_mass(query, key, roles, scale=scale)
    torch.testing.assert_close(fast, slow, **CLOSE)
    gradients = [torch.autograd.grad(out[..., TokenRole.IMAGE].sum(), (query, key)) for out in (fast, slow)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # gradients grow with the scale


@pytest.mark.parametrize("positions", [[5, 0, 5], torch.tensor([30, 2], dtype=torch.int32), range(3)])
def test_positions_in_any_order_and_form(positions):
    query, key, roles = random_inputs()
    out = attention_mass(query, key, roles, query_positions=positions)
    torch.testing.assert_close(out, attention_mass(query, key, roles)[:, :, list(positions)], rtol=0, atol=1e-6)


@pytest.mark.parametrize("positions", [[], torch.zeros(0, dtype=torch.long)])
def test_no_query_is_an_empty_mass(positions):
    query, key, roles = random_inputs()
    out = attention_mass(query, key, roles, torch.ones(2, 37), query_positions=positions)
    assert out.shape == (2, 4, 0, 5)
    out.sum().backward()
    assert not query.grad.any() and not key.grad.any()


def test_every_sample_has_queries_of_its_own():
    query, key, roles = random_inputs()
    positions = torch.tensor([[1, 30], [8, 20]])
    chosen = query.gather(2, positions[:, None, :, None].expand(-1, 4, -1, 8))
    out = selected_mass(chosen, key, roles, Visibility(positions), valid_BQ=torch.tensor([[True, False], [True, True]]))
    expected = eager_mass(query, key, roles)
    torch.testing.assert_close(out[0, :, 0], expected[0, :, 1], **CLOSE)
    torch.testing.assert_close(out[1], expected[1][:, [8, 20]], **CLOSE)
    assert not out[0, :, 1].any()


def test_a_window_hides_what_lies_before_it():
    """All scores equal: the last of five queries sees three keys under a window of 3, a third each."""
    visibility = Visibility(torch.tensor([[4, 0]]), window=3)
    roles = torch.tensor([[1, 1, 2, 2, 3]])
    out = selected_mass(torch.zeros(1, 1, 2, 1), torch.zeros(1, 1, 5, 1), roles, visibility)
    torch.testing.assert_close(out[0, 0], torch.tensor([[0, 0, 2 / 3, 1 / 3, 0], [0, 1, 0, 0, 0]]))


def test_logarithm_of_a_mass_has_the_closed_form_gradient():
    """d log mass_r / d score_k = p_k [role_k = r] / mass_r - p_k, through the key of a head of size 1."""
    query = torch.ones(1, 1, 3, 1)
    key = torch.tensor([0.2, -0.4, 0.9]).reshape(1, 1, 3, 1).requires_grad_()
    roles = torch.tensor([[1, 2, 2]])
    attention_mass(query, key, roles, query_positions=torch.tensor([2]), scale=1.0)[..., 2].log().sum().backward()
    p = key.detach().flatten().softmax(0)
    expected = torch.stack([-p[0], p[1] / (p[1] + p[2]) - p[1], p[2] / (p[1] + p[2]) - p[2]])
    torch.testing.assert_close(key.grad.flatten(), expected)


def test_gradient_equals_finite_differences():
    """Central differences in float32: error about 1e-7 / step from rounding and step^2 from curvature."""
    query, key, roles = random_inputs(B=1, H=2, K=1, S=5, D=2)
    weight = torch.randn(1, 2, 5, 5, generator=torch.Generator().manual_seed(1))
    attention_mask, step = torch.tensor([[0, 1, 1, 1, 1]]), 1e-2

    def value(q, k):
        return (attention_mass(q, k, roles, attention_mask) * weight).sum()

    for tensor, gradient in zip((query, key), torch.autograd.grad(value(query, key), (query, key)), strict=True):
        for index in range(tensor.numel()):
            with torch.no_grad():
                flat = tensor.view(-1)
                flat[index] += step
                up = value(query, key)
                flat[index] -= 2 * step
                down = value(query, key)
                flat[index] += step
            assert float(gradient.view(-1)[index]) == pytest.approx(float((up - down) / (2 * step)), abs=5e-4)


def test_real_queries_sum_to_one_and_padding_queries_to_zero():
    query, key, roles = random_inputs()
    attention_mask, _ = masks("left", *roles.shape)
    attention_mask[1, -4:] = False
    out = attention_mass(query, key, roles, attention_mask)
    assert bool((out >= 0).all()) and bool((out <= 1 + 1e-6).all())
    total = out.sum(-1)
    torch.testing.assert_close(total, attention_mask[:, None].expand_as(total).float())
    torch.testing.assert_close(attention_mass(query, key, roles, attention_mask.long()), out, rtol=0, atol=0)


def test_a_role_without_keys_has_no_mass():
    query, key, roles = random_inputs()
    roles[roles == TokenRole.IMAGE] = TokenRole.USER
    assert not attention_mass(query, key, roles)[..., TokenRole.IMAGE].any()


def test_what_is_hidden_does_not_matter():
    """Neither the contents of padding keys nor the future reach a mass or a gradient."""
    query, key, roles = random_inputs()
    attention_mask, _ = masks("right", *roles.shape)
    before = attention_mass(query, key, roles, attention_mask)[:, :, :10]
    gradient = torch.autograd.grad(before[..., TokenRole.IMAGE].sum(), key)[0]
    assert not gradient[:, :, 10:].any() and bool(gradient[:, :, :10].any())
    changed = key.detach().clone()
    changed[:, :, 10:] = 1e4
    assert torch.equal(attention_mass(query, changed, roles, attention_mask)[:, :, :10], before)


def test_huge_scores_stay_finite():
    query, key, roles = random_inputs()
    out = attention_mass(query * 1e4, key * 1e4, roles)
    gradients = torch.autograd.grad(out[..., TokenRole.IMAGE].sum(), (query, key))
    assert all(torch.isfinite(tensor).all() for tensor in (out, *gradients))


@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (7, 1)])
@pytest.mark.parametrize("layout", ["none", "left", "right", "packed and padded"])
@pytest.mark.parametrize("S", [63, 130])
def test_bfloat16_is_no_worse_than_twice_bfloat16_eager(heads, layout, S):
    """Values and gradients of the image mass against float32 on the same rounded inputs."""
    query, key, roles = random_inputs(H=heads[0], K=heads[1], S=S, D=64, dtype=torch.bfloat16)
    attention_mask, segments = masks(layout, *roles.shape)
    exact_query, exact_key = query.detach().float().requires_grad_(), key.detach().float().requires_grad_()
    outs = [
        attention_mass(query, key, roles, attention_mask, segments),
        eager_mass(query, key, roles, attention_mask, segments),
        eager_mass(exact_query, exact_key, roles, attention_mask, segments),
    ]
    fast_error, eager_error = ((out.float() - outs[2]).abs().max() for out in outs[:2])
    assert outs[0].dtype == torch.float32 and fast_error <= 2 * eager_error
    fast, eager = (torch.autograd.grad(out[..., TokenRole.IMAGE].sum(), (query, key)) for out in outs[:2])
    exact = torch.autograd.grad(outs[2][..., TokenRole.IMAGE].sum(), (exact_query, exact_key))
    for a, b, reference in zip(fast, eager, exact, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.float() - reference).abs().max() <= 2 * (b.float() - reference).abs().max()


def test_autocast_does_not_lower_the_precision():
    query, key, roles = random_inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = attention_mass(query, key, roles)
    assert inside.dtype == torch.float32 and torch.equal(inside, attention_mass(query, key, roles))


def test_strided_inputs():
    """Attention layers hand over transposed views."""
    query, key, roles = random_inputs()
    views = [tensor.detach().transpose(1, 2).contiguous().transpose(1, 2) for tensor in (query, key)]
    assert not views[0].is_contiguous()
    torch.testing.assert_close(attention_mass(*views, roles), attention_mass(query, key, roles), **CLOSE)


def test_packed_equals_alone():
    query, key, roles = random_inputs(B=1)
    segments = (torch.arange(37) >= 12).long()[None]
    packed = attention_mass(query, key, roles, segment_ids=segments)
    for part in (slice(0, 12), slice(12, 37)):
        alone = attention_mass(query[:, :, part], key[:, :, part], roles[:, part])
        torch.testing.assert_close(packed[:, :, part], alone, **CLOSE)


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
    monkeypatch.setitem(mass.CHUNK_ELEMENTS, "cpu", 2**16)
    query, key, roles = random_inputs(B=1, H=4, K=2, S=512, D=16)
    with LargestTensor() as forward:
        out = attention_mass(query, key, roles, query_positions=positions).square().sum()
    with LargestTensor() as backward:
        out.backward()
    # Chunks of both passes are seen, and none is larger than a chunk.
    num_queries, num_keys = (32, 512) if positions is None else (len(positions), int(positions[-1]) + 1)
    chunk = 4 * num_queries * num_keys
    assert forward.largest == chunk <= 2**16 < 4 * 512 * 512
    assert backward.largest == max(chunk, query.numel())
    with LargestTensor() as recorded:
        eager_mass(query, key, roles).square().sum().backward()
    assert recorded.largest == 4 * 512 * 512


def test_only_queries_keys_and_masses_are_kept_between_the_passes():
    query, key, roles = random_inputs(B=1, H=4, K=2, S=128, D=16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda t: t):
        attention_mass(query, key, roles)
    assert kept and max(kept) == query.numel() < 4 * 128 * 128


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(query=torch.zeros(4, 37, 8)), r"query must be \(B, H, S, D\)"),
        (dict(key=torch.zeros(2, 37, 8)), r"key \(B, K, S, D\)"),
        (dict(key=torch.zeros(1, 2, 37, 8)), "over the same samples and positions"),
        (dict(key=torch.zeros(2, 2, 36, 8)), "over the same samples and positions"),
        (dict(key=torch.zeros(2, 2, 37, 4)), "over the same samples and positions"),
        (dict(key=torch.zeros(2, 3, 37, 8)), "must divide the number of query heads; got 3 and 4"),
        (dict(key_roles=torch.zeros(2, 36, dtype=torch.long)), "key_roles must be"),
        (dict(attention_mask=torch.ones(1, 37)), "attention_mask must be"),
        (dict(attention_mask=torch.ones(2, 1, 37, 37)), "attention_mask must be"),
        (dict(segment_ids=torch.ones(2, 3)), "segment_ids must be"),
        (dict(key_roles=torch.full((2, 37), 5)), "must hold TokenRole values, 0 to 4; got 5 to 5"),
        (dict(key_roles=torch.full((2, 37), -1)), "must hold TokenRole values"),
        (dict(query_positions=torch.tensor([37])), r"in \[0, 37\)"),
        (dict(query_positions=torch.tensor([-1])), r"in \[0, 37\)"),
        (dict(query_positions=torch.zeros(2, 2, dtype=torch.long)), "must be one-dimensional integers"),
        (dict(query_positions=torch.ones(37, dtype=torch.bool)), "must be one-dimensional integers"),
        (dict(query_positions=torch.tensor([1.5])), "must be one-dimensional integers"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    query, key, roles = random_inputs()
    with pytest.raises(ValueError, match=message):
        attention_mass(**{"query": query, "key": key, "key_roles": roles, **change})


@pytest.mark.parametrize(
    "implementation, device, groups, head_size, chosen",
    [
        ("auto", "cpu", 5, 128, "chunked"),
        ("auto", "cuda", 5, 128, "triton"),
        ("auto", "cuda", 17, 128, "chunked"),
        ("auto", "cuda", 5, 513, "chunked"),
        ("chunked", "cuda", 5, 128, "chunked"),
        ("triton", "cuda", 16, 512, "triton"),
    ],
)
def test_the_implementation_is_chosen_by_a_rule(implementation, device, groups, head_size, chosen):
    assert mass.choose_implementation(implementation, device, groups, head_size) == chosen


@pytest.mark.parametrize(
    "implementation, device, chosen",
    [("auto", "cpu", "lse"), ("lse", "cpu", "lse"), ("chunked", "cpu", "chunked"), ("triton", "cuda", "triton")],
)
def test_a_log_sum_exp_at_hand_is_used(implementation, device, chosen):
    assert mass.choose_implementation(implementation, device, 5, 128, has_lse=True) == chosen
    assert mass.choose_implementation("lse", device, 5, 128) == ("triton" if device == "cuda" else "chunked")


@pytest.mark.parametrize("device, groups, head_size", [("cpu", 5, 64), ("cuda", 17, 64), ("cuda", 5, 513)])
def test_triton_where_it_cannot_run_is_refused(device, groups, head_size):
    with pytest.raises(
        ValueError, match=f"the Triton kernel needs .* got a {device} device, {groups} groups and heads"
    ):
        mass.choose_implementation("triton", device, groups, head_size)
    with pytest.raises(ValueError, match="implementation must be one of .*; got 'eager'"):
        mass.choose_implementation("eager", device, groups, head_size)
