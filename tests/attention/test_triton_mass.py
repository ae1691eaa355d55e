# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels against the full matrix: compiled on a GPU, else in Triton's interpreter."""

import importlib.util

import pytest
import torch

from avar_verl.attention.lse_mass import KeysByRole
from avar_verl.attention.visibility import Visibility
from avar_verl.roles import TokenRole
from tests.attention.reference import eager_mass
from tests.attention.test_mass import LargestTensor

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

# In the interpreter.
pytestmark = pytest.mark.e2e
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLOSE = dict(rtol=1e-5, atol=1e-5)
LAYOUTS = ["causal", "left", "right", "packed", "id returns", "window", "window, packed, left", "rows", "strided rows"]


@pytest.fixture(scope="module")
def kernels():
    """The module under test. Its interpreted form is a private copy, so no other test module meets it."""
    if torch.cuda.is_available():
        yield importlib.import_module("avar_verl.attention.triton_mass")
        return
    import triton.experimental.gluon  # noqa: F401  Insists, when first imported, that what is patched below is not.
    from triton.runtime.interpreter import InterpretedFunction

    with pytest.MonkeyPatch.context() as patch:
        # tl.sum and its like are kernels themselves, decorated when some other module imported triton.
        for name, function in list(vars(tl.standard).items()):
            if isinstance(function, triton.JITFunction):
                interpreted = InterpretedFunction(function.fn)
                patch.setattr(tl.standard, name, interpreted)
                if getattr(tl, name, None) is function:
                    patch.setattr(tl, name, interpreted)
        # The interpreter prepares tl again at every call of a helper, which takes a third of the time; tl.core in the
        # globals makes it prepare all of tl once a launch.
        patch.setattr(InterpretedFunction, "__call__", lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs))
        spec = importlib.util.spec_from_file_location(
            "interpreted_triton_mass", importlib.util.find_spec("avar_verl.attention.triton_mass").origin
        )
        module = importlib.util.module_from_spec(spec)
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("TRITON_INTERPRET", "1")
            spec.loader.exec_module(module)
        module.core = tl.core
        assert module.INTERPRETED
        yield module


@pytest.fixture(autouse=True)
def splits(request, kernels, monkeypatch):
    """Blocks so small that a short sequence has several, and as many splits as an indirect parametrization says."""
    number = getattr(request, "param", 1)
    monkeypatch.setattr(kernels, "_block_sizes", lambda *_: kernels.Blocks(16, 32, 4, 3))
    monkeypatch.setattr(kernels, "_num_splits", lambda num_programs, num_keys, block_s: number)


def random_inputs(B=2, H=2, K=1, Q=19, S=45, D=16, R=5, dtype=torch.float32, seed=0):
    """(query, key, groups, positions): unsorted positions, others for every sample."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(B, H, Q, D, generator=generator).to(DEVICE, dtype).requires_grad_()
    key = torch.randn(B, K, S, D, generator=generator).to(DEVICE, dtype).requires_grad_()
    groups = torch.randint(0, R, (B, S), generator=generator).to(DEVICE)
    return query, key, groups, torch.randint(0, S, (B, Q), generator=generator).to(DEVICE)


def make_visibility(layout, positions, S):
    B, Q = positions.shape
    mask = segments = window = None
    if layout == "rows" or layout == "strided rows":
        # Neither causal nor contiguous; the other fields must not be read.
        generator = torch.Generator().manual_seed(7)
        rows = (torch.rand(B, S, Q, generator=generator) < 0.4).to(DEVICE).mT
        rows[0, 3] = False
        rows = rows if layout == "strided rows" else rows.contiguous()
        assert rows.is_contiguous() == (layout == "rows")
        return Visibility(positions, key_mask_BS=torch.zeros(B, S, dtype=torch.bool, device=DEVICE), rows_BQS=rows)
    if "left" in layout or layout == "right":
        mask = torch.ones(B, S, dtype=torch.bool, device=DEVICE)
        mask[0, slice(0, 21) if "left" in layout else slice(24, S)] = False
        mask[1, 5] = False
    if "packed" in layout:
        segments = torch.stack([torch.arange(S) >= S // 3 + i for i in range(B)]).long().to(DEVICE)
    if layout == "id returns":
        segments = (torch.arange(S) // 9 * 2 % 3 - 1).to(DEVICE).expand(B, S)
    if "window" in layout:
        window = 11
    return Visibility(positions, mask, segments, window)


def visible_rows(visibility, S):
    """(B, Q, S), query by query and key by key from the words of `Visibility`."""
    if visibility.rows_BQS is not None:
        return visibility.rows_BQS
    positions, mask, segments = visibility.positions_BQ, visibility.key_mask_BS, visibility.segment_ids_BS
    rows = torch.zeros(*positions.shape, S, dtype=torch.bool)
    for b, sample in enumerate(positions.tolist()):
        for q, position in enumerate(sample):
            for k in range(position + 1):
                rows[b, q, k] = (
                    (mask is None or bool(mask[b, k]))
                    and (segments is None or bool(segments[b, k] == segments[b, position]))
                    and (visibility.window is None or k > position - visibility.window)
                )
    return rows.to(DEVICE)


def eager(query, key, groups, visibility, scale, num_groups):
    """The full matrix, in the dtype of the inputs."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    hidden = ~visible_rows(visibility, key.shape[2])[:, None]
    weights = (query @ key.mT * scale).masked_fill(hidden, float("-inf")).softmax(-1).nan_to_num(0.0)
    return weights @ torch.nn.functional.one_hot(groups, num_groups).to(weights.dtype)[:, None]


def with_gradients(mass, query, key):
    """[mass, d query, d key] of a loss that weighs every mass at random."""
    weight = torch.randn(mass.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    return [mass, *torch.autograd.grad((mass * weight).sum(), (query, key))]


def compare(kernels, query, key, groups, visibility, scale=0.4, num_groups=5):
    fast = with_gradients(kernels.triton_mass(query, key, groups, visibility, scale, num_groups), query, key)
    slow = with_gradients(eager(query, key, groups, visibility, scale, num_groups), query, key)
    for a, b in zip(fast, slow, strict=True):
        assert torch.isfinite(a).all() and a.dtype == b.dtype
        torch.testing.assert_close(a, b, **CLOSE)
    return fast


@pytest.mark.parametrize("splits", [2], indirect=True)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_and_gradients_equal_the_full_matrix(kernels, layout):
    query, key, groups, positions = random_inputs()
    compare(kernels, query, key, groups, make_visibility(layout, positions, 45))


@pytest.mark.parametrize("splits", [1, 2], indirect=True)
@pytest.mark.parametrize("layout", ["causal", "left", "right", "window", "packed", "rows"])
def test_roles_in_runs(kernels, layout):
    """Blocks of one group, of which some are seen by every query and others are not."""
    query, key, groups, positions = random_inputs(Q=20, S=200)
    groups[:] = torch.tensor([1] * 33 + [2] * 90 + [3] * 40 + [4] * 37, device=DEVICE)
    compare(kernels, query, key, groups, make_visibility(layout, positions.sort(1).values, 200))


@pytest.mark.parametrize("splits, runs", [(1, True), (2, False)], indirect=["splits"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_masses_from_a_log_sum_exp(kernels, layout, runs):
    """The wanted columns are those of the full matrix, whatever the order of the roles; the others are no number."""
    query, key, groups, positions = random_inputs(H=4, K=2)
    if runs:  # A block and more of one role, and keys on either side of those that are wanted.
        groups = torch.repeat_interleave(torch.tensor([0, 1, 2, 2, 3]), 9).expand(2, -1).to(DEVICE)
    visibility = make_visibility(layout, positions, 45)
    scores = (query @ key.repeat_interleave(2, dim=1).mT * 0.4).masked_fill(
        ~visible_rows(visibility, 45)[:, None], float("-inf")
    )
    columns = [2, 1]
    span = KeysByRole(groups, columns).span_B1
    lse = scores.detach().logsumexp(-1)
    mass = kernels.triton_lse_mass(query, key, groups, visibility, 0.4, 5, lse, columns, span)
    expected = eager(query, key, groups, visibility, 0.4, 5)
    assert not mass.requires_grad and mass[..., [0, 3, 4]].isnan().all()
    torch.testing.assert_close(mass[..., columns], expected[..., columns].detach(), **CLOSE)


def test_keys_outside_the_wanted_groups_are_not_read_with_a_log_sum_exp(kernels):
    query, key, groups, positions = random_inputs(S=128)
    groups = torch.repeat_interleave(torch.tensor([0, 1, 2, 3]), 32).expand(2, -1).to(DEVICE)
    key = key.detach()
    key[:, :, :32] = key[:, :, 96:] = float("nan")  # Blocks of 32 keys.
    visibility, keys = Visibility(torch.full_like(positions, 127)), KeysByRole(groups, [1, 2])
    lse = torch.zeros(query.shape[:3], device=DEVICE)
    mass = kernels.triton_lse_mass(query, key, groups, visibility, 0.4, 5, lse, [1, 2], keys.span_B1)
    weights = (query.detach() @ key[:, :, 32:96].mT * 0.4).exp().unflatten(-1, (2, 32)).sum(-1)
    torch.testing.assert_close(mass[..., [1, 2]], weights, **CLOSE)
    absent = KeysByRole(groups, [4])
    mass = kernels.triton_lse_mass(query, key, groups, visibility, 0.4, 5, lse, [4], absent.span_B1)
    assert not mass[..., 4].any()
    with pytest.raises(ValueError, match=r"lse_BHQ must have the shape \(2, 2, 19\); got \(2, 2, 18\)"):
        kernels.triton_lse_mass(query, key, groups, visibility, 0.4, 5, lse[..., 1:], [1], keys.span_B1)


@pytest.mark.parametrize("H, K, D", [(2, 2, 24), (4, 2, 16), (7, 1, 32)])
def test_grouped_heads(kernels, H, K, D):
    query, key, groups, positions = random_inputs(H=H, K=K, D=D)
    compare(kernels, query, key, groups, make_visibility("window, packed, left", positions, 45))


@pytest.mark.parametrize(
    "Q, S, splits",
    [(1, 1, 1), (1, 1, 3), (1, 100, 3), (16, 32, 1), (17, 31, 1), (33, 64, 2), (3, 65, 7), (3, 65, 1)],
    indirect=["splits"],
)
def test_lengths_and_splits(kernels, Q, S):
    """Also more splits than key blocks: the last ones have nothing to read."""
    query, key, groups, positions = random_inputs(B=1, Q=Q, S=S)
    compare(kernels, query, key, groups, Visibility(positions))


@pytest.mark.parametrize("D", [1, 16, 33, 64, 512])
def test_head_sizes(kernels, D):
    query, key, groups, positions = random_inputs(B=1, S=33, D=D)
    compare(kernels, query, key, groups, Visibility(positions), scale=D**-0.5)


@pytest.mark.parametrize("scale", [-0.3, 0.0, 5.0])
def test_scales(kernels, scale):
    query, key, groups, positions = random_inputs(B=1)
    compare(kernels, query, key, groups, Visibility(positions), scale=scale)


@pytest.mark.parametrize("num_groups", [1, 2, 11, 16])
def test_numbers_of_groups(kernels, num_groups):
    query, key, groups, positions = random_inputs(B=1, R=num_groups)
    mass = compare(kernels, query, key, groups, Visibility(positions), num_groups=num_groups)[0]
    torch.testing.assert_close(mass.sum(-1), torch.ones_like(mass[..., 0]))


def test_all_positions_in_order_equal_the_reference_of_attention_mass(kernels):
    query, key, roles, _ = random_inputs(Q=45)
    mask = torch.ones(2, 45, dtype=torch.bool, device=DEVICE)
    mask[0, -7:] = False
    segments = (torch.arange(45, device=DEVICE) >= 15).long().expand(2, 45)
    visibility = Visibility(torch.arange(45, device=DEVICE).expand(2, 45), mask, segments)
    fast = kernels.triton_mass(query, key, roles, visibility, 0.25, len(TokenRole)) * mask[:, None, :, None]
    slow = eager_mass(query.cpu(), key.cpu(), roles.cpu(), mask.cpu(), segments.cpu()).to(DEVICE)
    for a, b in zip(with_gradients(fast, query, key), with_gradients(slow, query, key), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_and_splits_of_its_own(kernels, monkeypatch, dtype):
    """Nothing patched: the block sizes and the number of splits that real calls get."""
    monkeypatch.undo()
    monkeypatch.setattr(kernels, "MIN_BLOCKS_PER_SPLIT", 1)
    query, key, groups, positions = random_inputs(B=1, Q=70, S=130, D=16, dtype=dtype)
    for kernel in ("forward", "grad_query"):
        blocks = kernels._block_sizes(kernel, 16, dtype, kernels._architecture(query.device))
        assert kernels._query_grid(blocks, 2, 70, 130)[1] == 130 // blocks.block_s > 1
    arguments = (groups, Visibility(positions), 0.4, 5)
    fast = with_gradients(kernels.triton_mass(query, key, *arguments), query, key)
    exact = [tensor.detach().float().requires_grad_() for tensor in (query, key)]
    tolerance = CLOSE if dtype == torch.float32 else dict(rtol=2**-7, atol=2**-7)
    for a, b in zip(fast, with_gradients(eager(*exact, *arguments), *exact), strict=True):
        torch.testing.assert_close(a.float(), b, **tolerance)


@pytest.mark.parametrize("layout", ["rows", "packed"])
def test_blocks_of_each_kernel(kernels, monkeypatch, layout):
    """Also more than one word of rows a block."""
    for kernel, block_q, block_s in [("forward", 16, 64), ("grad_query", 32, 32), ("grad_key", 16, 128)]:
        monkeypatch.setitem(kernels.CHOICES, kernel, kernels.Blocks(block_q, block_s, 4, 3))
    query, key, groups, positions = random_inputs(Q=35, S=105)
    compare(kernels, query, key, groups, make_visibility(layout, positions, 105))


@pytest.mark.parametrize("S", [0, 1, 32, 70])
def test_rows_in_words(kernels, S):
    rows = torch.rand(2, 3, S, generator=torch.Generator().manual_seed(5)) < 0.5
    words = kernels._pack_rows(rows.to(DEVICE)).cpu()
    assert torch.equal(kernels._pack_rows(rows.to(DEVICE).mT.contiguous().mT).cpu(), words)
    assert words.shape == (2, 3, -(-S // 32)) and words.dtype == torch.int32
    bits = (words[..., None] >> torch.arange(32)) & 1
    assert torch.equal(bits.flatten(2)[..., :S].bool(), rows) and not bits.flatten(2)[..., S:].any()


def test_the_rule_for_splits(kernels, monkeypatch):
    monkeypatch.undo()
    assert kernels._num_splits(28, 8192, 64) == 19  # 64 queries of 28 heads: 532 programs
    assert kernels._num_splits(28 * 32, 8192, 64) == 1  # 2048 queries fill the device without any
    assert kernels._num_splits(1, 600, 64) == 2  # 9 key blocks, at least 4 a split
    assert kernels._num_splits(0, 0, 64) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("splits", [2], indirect=True)
def test_low_precision_is_no_worse_than_twice_eager(kernels, dtype):
    query, key, groups, positions = random_inputs(B=1, S=65, D=64, Q=33, dtype=dtype)
    exact = [tensor.detach().float().requires_grad_() for tensor in (query, key)]
    arguments = (groups, Visibility(positions), 0.125, 5)
    fast = with_gradients(kernels.triton_mass(query, key, *arguments), query, key)
    slow = with_gradients(eager(query, key, *arguments), query, key)
    true = with_gradients(eager(*exact, *arguments), *exact)
    assert [tensor.dtype for tensor in fast] == [torch.float32, dtype, dtype]
    for a, b, c in zip(fast, slow, true, strict=True):
        assert (a.float() - c).abs().max() <= 2 * (b.float() - c).abs().max()
    torch.testing.assert_close(fast[0], true[0], **CLOSE)  # The forward pass rounds nothing but the inputs.


def test_a_gradient_below_the_range_of_float16(kernels):
    """d loss / d score is about 2e-8 and would round to 0; times keys of about 1000 it is a number of float16."""
    query, key, groups, positions = random_inputs(B=1)
    query, key = (tensor.detach().half().requires_grad_() for tensor in (query * 1e-3, key * 1e3))
    exact = [tensor.detach().float().requires_grad_() for tensor in (query, key)]
    arguments = (groups, Visibility(positions), 0.25, 5)
    (fast,) = torch.autograd.grad(kernels.triton_mass(query, key, *arguments)[..., 2].sum() * 1e-6, query)
    (slow,) = torch.autograd.grad(eager(*exact, *arguments)[..., 2].sum() * 1e-6, exact[0])
    assert slow.abs().max() > 1e-5
    torch.testing.assert_close(fast.float(), slow, rtol=2e-3, atol=1e-7)


def test_inputs_of_two_types(kernels):
    query, key, groups, positions = random_inputs(B=1, dtype=torch.bfloat16)
    wide = key.detach().float().requires_grad_()
    fast = with_gradients(kernels.triton_mass(query, wide, groups, Visibility(positions), 0.4, 5), query, wide)
    exact = query.detach().float().requires_grad_()
    slow = with_gradients(eager(exact, wide, groups, Visibility(positions), 0.4, 5), exact, wide)
    assert [tensor.dtype for tensor in fast] == [torch.float32, torch.bfloat16, torch.float32]
    torch.testing.assert_close(fast[0], slow[0], **CLOSE)
    torch.testing.assert_close(fast[1].float(), slow[1], rtol=2**-8, atol=1e-5)
    torch.testing.assert_close(fast[2], slow[2], **CLOSE)


@pytest.mark.parametrize("splits", [1, 2], indirect=True)
def test_masses_sum_to_one_and_a_query_that_sees_nothing_has_none(kernels):
    query, key, groups, positions = random_inputs()
    mask = torch.ones(2, 45, dtype=torch.bool, device=DEVICE)
    mask[0, :20] = False
    mass, grad_query, _ = compare(kernels, query, key, groups, Visibility(positions, mask))
    sees = ~mask.all(1)[:, None] & (positions < 20)
    assert sees.any() and not sees.all()
    torch.testing.assert_close(mass.sum(-1), (~sees)[:, None].expand(2, 2, 19).float(), rtol=0, atol=1e-6)
    blind = sees[:, None].expand(2, 2, 19)
    assert not mass[blind].any() and not grad_query[blind].any()


def test_no_query_sees_anything(kernels):
    query, key, groups, positions = random_inputs(B=1)
    hidden = Visibility(positions, torch.zeros(1, 45, dtype=torch.bool, device=DEVICE))
    out = with_gradients(kernels.triton_mass(query, key, groups, hidden, 1.0, 5), query, key)
    assert not any(tensor.any() for tensor in out)


def test_an_infinite_gradient_stays_in_its_row(kernels):
    """log of the mass 0 of a query without keys, which a caller then drops with a mask, must not reach the others."""
    query, key, groups, positions = random_inputs(B=1)
    positions[0, :4] = torch.tensor([0, 1, 2, 3], device=DEVICE)
    mask = torch.ones(1, 45, dtype=torch.bool, device=DEVICE)
    mask[0, :5] = False
    mass = kernels.triton_mass(query, key, torch.zeros_like(groups), Visibility(positions, mask), 0.4, 1)
    grads = torch.autograd.grad(mass.log().sum(), (query, key))
    assert not mass[:, :, :4].any() and all(torch.isfinite(grad).all() for grad in grads)


def test_a_group_without_keys_has_no_mass(kernels):
    query, key, groups, positions = random_inputs(B=1)
    groups[groups == 3] = 1
    assert not compare(kernels, query, key, groups, Visibility(positions))[0][..., 3].any()


def test_a_key_of_no_group_is_hidden(kernels):
    query, key, groups, positions = random_inputs(B=1)
    positions = positions.clamp(min=3)
    mask = torch.ones(1, 45, dtype=torch.bool, device=DEVICE)
    mask[0, 7:12] = False
    expected = compare(kernels, query, key, groups, Visibility(positions, mask))
    groups[0, 7:9], groups[0, 9:12] = -1, 5
    mass = kernels.triton_mass(query, key, groups, Visibility(positions), 0.4, 5)
    for a, b in zip(with_gradients(mass, query, key), expected, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def test_nothing_to_do(kernels):
    for Q, S in [(0, 45), (3, 0), (0, 0)]:
        query, key = torch.ones(2, 4, Q, 16, device=DEVICE).requires_grad_(), torch.ones(2, 2, S, 16, device=DEVICE)
        key.requires_grad_()
        groups = torch.zeros(2, S, dtype=torch.long, device=DEVICE)
        positions = torch.zeros(2, Q, dtype=torch.long, device=DEVICE)
        mass = kernels.triton_mass(query, key, groups, Visibility(positions), 1.0, 5)
        assert mass.shape == (2, 4, Q, 5) and mass.dtype == torch.float32 and not mass.any()
        mass.sum().backward()
        assert not query.grad.any() and not key.grad.any()


def test_strided_inputs(kernels):
    """Attention layers hand over transposed views; a view of every second number has no unit stride at all."""
    query, key, groups, positions = random_inputs(B=1, H=4, K=2)
    expected = compare(kernels, query, key, groups, Visibility(positions))
    views = [
        tensor.detach().transpose(1, 2).repeat_interleave(2, -1).transpose(1, 2)[..., ::2].requires_grad_()
        for tensor in (query, key)
    ]
    assert all(2 in view.stride() and view.stride(1) < view.stride(2) for view in views)
    got = with_gradients(kernels.triton_mass(*views, groups, Visibility(positions), 0.4, 5), *views)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_one_gradient_alone(kernels):
    query, key, groups, positions = random_inputs(B=1)
    both = torch.autograd.grad(
        kernels.triton_mass(query, key, groups, Visibility(positions), 0.4, 5)[..., 2].sum(), (query, key)
    )
    for inputs, tensor, expected in [
        ((query, key.detach()), query, both[0]),
        ((query.detach(), key), key, both[1]),
    ]:
        mass = kernels.triton_mass(*inputs, groups, Visibility(positions), 0.4, 5)
        assert torch.equal(torch.autograd.grad(mass[..., 2].sum(), tensor)[0], expected)


def test_huge_scores_stay_finite(kernels):
    query, key, groups, positions = random_inputs(B=1)
    mass = kernels.triton_mass(query * 1e4, key * 1e4, groups, Visibility(positions), 1.0, 5)
    out = with_gradients(mass, query, key)
    assert all(torch.isfinite(tensor).all() for tensor in out)
    torch.testing.assert_close(mass.sum(-1), torch.ones_like(mass[..., 0]))


@pytest.mark.parametrize("reason", ["future", "window", "segments", "left"])
def test_key_blocks_that_nobody_sees_are_not_read(kernels, reason):
    """nan in hidden numbers is harmless only where no block is formed: in a product, even 0 * nan is nan.

    96 keys are three blocks, and the middle one is nan and hidden from the two blocks of queries.
    """
    query, key, groups, _ = random_inputs(B=1, Q=32, S=96)
    query, key = query.detach(), key.detach()
    early, late = torch.arange(31, 15, -1)[None], torch.arange(80, 96)[None]
    hidden, fields = slice(32, 64), {}
    if reason == "future":
        positions, hidden = torch.cat([early, early], 1), slice(32, 96)
    elif reason == "left":
        positions, hidden = torch.cat([late, late], 1), slice(0, 64)
        fields["key_mask_BS"] = torch.arange(96, device=DEVICE)[None] >= 64
    else:
        positions = torch.cat([early, late], 1)
        if reason == "window":
            fields["window"] = 17  # 80 - 16 = 64 is the first key of the late ones.
        else:
            fields["segment_ids_BS"] = torch.arange(96, device=DEVICE)[None] // 32
    key[:, :, hidden] = float("nan")
    query.requires_grad_()
    key.requires_grad_()
    mass = kernels.triton_mass(query, key, groups, Visibility(positions.to(DEVICE), **fields), 0.4, 5)
    mass, grad_query, grad_key = with_gradients(mass, query, key)
    assert all(torch.isfinite(tensor).all() and tensor.any() for tensor in (mass, grad_query, grad_key))
    assert not grad_key[:, :, hidden].any()


def test_query_blocks_that_cannot_see_a_key_block_are_not_read(kernels):
    """nan in one query block reaches the keys that it sees and no others."""
    query, key, groups, _ = random_inputs(B=1, Q=32, S=96)
    positions = torch.cat([torch.arange(16), 80 + torch.arange(16)])[None].to(DEVICE)
    segments = torch.arange(96, device=DEVICE)[None] // 64

    def grad_key(poisoned_queries, visibility):
        poisoned = query.detach().clone()
        poisoned[:, :, poisoned_queries] = float("nan")
        return torch.autograd.grad(kernels.triton_mass(poisoned, key, groups, visibility, 0.4, 5)[..., 2].sum(), key)[0]

    grad = grad_key(slice(0, 16), Visibility(positions))
    assert torch.isnan(grad[:, :, :16]).all() and torch.isfinite(grad[:, :, 32:]).all()
    grad = grad_key(slice(16, 32), Visibility(positions, segment_ids_BS=segments))
    assert torch.isnan(grad[:, :, 64:]).all() and torch.isfinite(grad[:, :, :64]).all()


def test_query_ranges_leave_nobody_out(kernels):
    """Blocks of 2 queries and 4 keys, bounds in any order: what a query of the block may see lies in the range."""
    generator = torch.Generator().manual_seed(3)
    first = torch.randint(0, 21, (200, 7), generator=generator, dtype=torch.int32)
    last = (first + torch.randint(-2, 9, first.shape, generator=generator, dtype=torch.int32)).clamp(max=20)
    begin, end = kernels._query_ranges(first, last, S=21, block_q=2, block_s=4)
    keys = torch.arange(24).view(6, 4)
    seen = ((keys[:, :, None] >= first[:, None, None]) & (keys[:, :, None] <= last[:, None, None])).any(2)  # (B, M, Q)
    block = torch.arange(7) // 2
    inside = (block >= begin[:, :, None]) & (block < end[:, :, None])
    assert seen.any() and inside[seen].all()
    # Ascending bounds, 0 to 3, 4 to 7 and so on for each block: the ranges are exact.
    ascending = torch.arange(0, 20, 4, dtype=torch.int32).repeat_interleave(2)[None]
    begin, end = kernels._query_ranges(ascending, ascending + 3, S=20, block_q=2, block_s=4)
    assert begin.tolist() == [[0, 1, 2, 3, 4]] and end.tolist() == [[1, 2, 3, 4, 5]]


def test_no_tensor_of_all_queries_and_all_keys(kernels, monkeypatch):
    """What PyTorch allocates around the kernels; the kernels themselves allocate nothing."""
    monkeypatch.setattr(kernels, "_block_sizes", lambda *_: kernels.Blocks(128, 128, 4, 3))
    query, key, groups, _ = random_inputs(B=1, Q=512, S=512)
    segments = torch.arange(512, device=DEVICE)[None] // 300
    visibility = Visibility(torch.arange(512, device=DEVICE)[None], segment_ids_BS=segments)
    kept = []
    with LargestTensor() as recorded:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            mass = kernels.triton_mass(query, key, groups, visibility, 0.4, 5)
        mass.sum().backward()
    # The interpreter copies each storage as bytes, so that 4 * query.numel() elements are its largest.
    assert max(kept) == query.numel() <= recorded.largest <= 4 * query.numel() < 512 * 512


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(num_groups=0), "num_groups must be 1 to 16; got 0"),
        (dict(num_groups=17), "num_groups must be 1 to 16; got 17"),
        (dict(query_BHQD=torch.zeros(2, 19, 16)), r"query must be \(B, H, Q, D\)"),
        (dict(key_BKSD=torch.zeros(2, 45, 16)), r"key \(B, K, S, D\)"),
        (dict(key_BKSD=torch.zeros(1, 1, 45, 16)), "over the same samples and head size"),
        (dict(key_BKSD=torch.zeros(2, 1, 45, 8)), "over the same samples and head size"),
        (dict(key_BKSD=torch.zeros(2, 3, 45, 16)), "must divide the number of query heads; got 3 and 2"),
        (dict(key_BKSD=torch.zeros(2, 0, 45, 16)), "must divide the number of query heads; got 0 and 2"),
        (
            dict(query_BHQD=torch.zeros(2, 2, 19, 513), key_BKSD=torch.zeros(2, 1, 45, 513)),
            "the head size must be at most 512; got 513",
        ),
        (dict(groups_BS=torch.zeros(2, 44)), r"groups_BS must have the shape \(2, 45\); got \(2, 44\)"),
        (dict(positions_BQ=torch.zeros(1, 19)), r"positions_BQ must have the shape \(2, 19\)"),
        (dict(key_mask_BS=torch.zeros(2, 19)), r"key_mask_BS must have the shape \(2, 45\)"),
        (dict(segment_ids_BS=torch.zeros(45)), r"segment_ids_BS must have the shape \(2, 45\)"),
        (dict(rows_BQS=torch.zeros(2, 45, 45)), r"rows_BQS must have the shape \(2, 19, 45\)"),
    ],
)
def test_what_does_not_fit_is_refused(kernels, change, message):
    query, key, groups, positions = random_inputs()
    arguments = dict(query_BHQD=query, key_BKSD=key, groups_BS=groups, scale=1.0, num_groups=5)
    fields = dict(positions_BQ=positions)
    for name, value in change.items():
        (arguments if name in arguments else fields)[name] = value
    with pytest.raises(ValueError, match=message):
        kernels.triton_mass(**arguments, visibility=Visibility(**fields))
