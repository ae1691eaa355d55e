# SPDX-License-Identifier: Apache-2.0
"""Masses from the log-sum-exp of the model's own attention: by hand, against the full matrix, what the tap finds."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from avar_verl.attention import lse_mass as module
from avar_verl.attention.capture import select_queries
from avar_verl.attention.lse_mass import KeysByRole, LseTap, lse_mass
from avar_verl.attention.mass import choose_implementation, selected_mass, takes_lse
from avar_verl.attention.visibility import Visibility
from avar_verl.roles import TokenRole
from tests.attention.reference import eager_mass

SYSTEM, IMAGE = int(TokenRole.SYSTEM), int(TokenRole.IMAGE)
CLOSE = dict(rtol=1e-5, atol=2e-6)


def sdpa_with_lse(query, key, mask=None):
    """Output and log-sum-exp of torch's own call."""
    groups = query.shape[1] // key.shape[1]
    keys = key.repeat_interleave(groups, 1)
    with torch.no_grad(), LseTap() as tap:
        out = torch.nn.functional.scaled_dot_product_attention(query, keys, keys, mask, is_causal=mask is None)
    return out, tap.lse(*query.shape[:3])


def test_by_hand():
    """Scores log 1, log 2 and log 5 of a system key and two image keys: 1/8 and 7/8."""
    query = torch.ones(1, 1, 1, 1)
    key = torch.tensor([1.0, 2.0, 5.0]).log().reshape(1, 1, 3, 1)
    keys = KeysByRole(torch.tensor([[SYSTEM, IMAGE, IMAGE]]), (SYSTEM, IMAGE))
    mass = lse_mass(query, key, torch.full((1, 1, 1), math.log(8)), keys, Visibility(torch.tensor([[2]])), 1.0, 5)
    torch.testing.assert_close(mass[0, 0, 0, [SYSTEM, IMAGE]], torch.tensor([1 / 8, 7 / 8]))
    assert mass[0, 0, 0, [0, 3, 4]].isnan().all()  # What nobody asked for is no number.


def test_tap_picks_up_the_log_sum_exp_and_leaves_the_output_alone():
    """Watches torch: the second output of its fused attention on the CPU is the natural log-sum-exp, (B, H, S)."""
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 33, 16), torch.randn(2, 4, 33, 16)
    out, lse = sdpa_with_lse(query, key)
    scores = query @ key.mT / 4
    expected = scores.masked_fill(torch.ones(33, 33).triu(1).bool(), float("-inf")).logsumexp(-1)
    torch.testing.assert_close(lse, expected, **CLOSE)
    plain = torch.nn.functional.scaled_dot_product_attention(query, key, key, is_causal=True)
    torch.testing.assert_close(out, plain, rtol=0, atol=0)


class Calls(TorchDispatchMode):
    """Every call below it, with its arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["flash", "efficient", "cudnn"])
def test_tap_asks_the_attentions_of_a_gpu_for_their_log_sum_exp(kind):
    """Watches torch: which output it is, and its shape. Tensors without data: the operations run on a GPU only."""
    query = torch.empty(2, 4, 33, 16, device="meta", dtype=torch.bfloat16)
    attention = getattr(torch.ops.aten, f"_scaled_dot_product_{kind}_attention")
    arguments = (0.0, True) if kind == "flash" else (None, False, 0.0, True)
    with Calls() as below, LseTap() as tap:
        attention(query, query, query, *arguments, scale=0.25)
    assert tap.lse(2, 4, 33).shape == (2, 4, 33) and tap.lse(2, 4, 33).dtype == torch.float32
    ((_, got),) = [call for call in below.calls if call[0] is attention.default]
    assert got[3:] == (arguments if kind == "flash" else (None, True, 0.0, True))


@pytest.mark.parametrize(
    "implementation, device, groups, takes",
    [
        ("auto", "cpu", 40, True),
        ("auto", "cuda", 5, True),
        ("auto", "cuda", 17, False),
        ("lse", "cuda", 5, True),
        ("lse", "cuda", 17, False),
    ]
    + [("chunked", "cpu", 5, False), ("triton", "cuda", 5, False), ("lse", "mps", 5, False)],
)
def test_where_the_log_sum_exp_is_taken(implementation, device, groups, takes):
    assert takes_lse(implementation, device, groups, 128) == takes
    if implementation != "triton" or device == "cuda":
        assert (choose_implementation(implementation, device, groups, 128, has_lse=True) == "lse") == takes


def test_tap_joins_segments_of_a_row_and_knows_no_other_shapes():
    query = torch.randn(1, 2, 9, 8)
    with torch.no_grad(), LseTap() as tap:
        for start, stop in ((0, 4), (4, 9)):
            part = query[:, :, start:stop]
            torch.nn.functional.scaled_dot_product_attention(part, part, part, is_causal=True)
    assert tap.lse(1, 2, 9).shape == (1, 2, 9)
    assert tap.lse(1, 2, 8) is None and tap.lse(1, 4, 9) is None
    with LseTap() as nothing:
        torch.softmax(query, -1)
    assert nothing.lse(1, 2, 9) is None


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("layout", ["causal", "left", "right", "segments", "window"])
@pytest.mark.parametrize("chunk", [2**20, 1500, 1])
def test_equals_the_full_matrix(monkeypatch, heads, layout, chunk):
    """Ragged roles, and a sample without image keys."""
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", chunk)
    torch.manual_seed(1)
    B, (H, K), S, D = 3, heads, 41, 16
    query, key = torch.randn(B, H, S, D), torch.randn(B, K, S, D)
    roles = torch.randint(0, 5, (B, S))
    roles[1][roles[1] == IMAGE] = SYSTEM
    mask = torch.ones(B, S, dtype=torch.bool)
    segments, window = None, None
    if layout == "left":
        mask[0, :6] = False
    if layout == "right":
        mask[2, -9:] = False
    if layout == "segments":
        segments = (torch.arange(S) // 15).expand(B, S)
    if layout == "window":
        window = 7
    visible = torch.ones(S, S, dtype=torch.bool).tril() & mask[:, None]
    if segments is not None:
        visible = visible & (segments[:, :, None] == segments[:, None])
    if window is not None:
        visible = visible & torch.ones(S, S, dtype=torch.bool).triu(1 - window)
    _, lse = sdpa_with_lse(query, key, visible[:, None])
    positions = torch.tensor([3, 17, 18, 30, 40])
    valid = mask[:, positions]
    weights = (query @ key.repeat_interleave(H // K, 1).mT * D**-0.5).masked_fill(~visible[:, None], float("-inf"))
    onehot = torch.nn.functional.one_hot(roles, 5).float()
    expected = (weights.softmax(-1) @ onehot[:, None])[:, :, positions].where(valid[:, None, :, None], 0.0)
    keys = KeysByRole(roles, (SYSTEM, IMAGE))
    described = Visibility(positions.expand(B, -1), None if bool(mask.all()) else mask, segments, window)
    for visibility in (described, Visibility(positions.expand(B, -1), rows_BQS=visible[:, positions])):
        mass = selected_mass(
            query[:, :, positions], key, roles, visibility, valid, lse_BHQ=lse[:, :, positions], keys=keys
        )
        torch.testing.assert_close(mass[..., [SYSTEM, IMAGE]], expected[..., [SYSTEM, IMAGE]], **CLOSE)
        assert not mass[1, ..., IMAGE].any()


def test_no_mask_where_every_response_token_sees_every_key(monkeypatch):
    """Fewer keys or queries are padded with positions that see nothing; these must not bring the mask back."""
    torch.manual_seed(4)
    B, H, S, D = 3, 2, 20, 8
    query, key = torch.randn(B, H, S, D), torch.randn(B, 1, S, D)
    roles = torch.full((B, S), int(TokenRole.USER))
    roles[:, :2], roles[0, 2:9], roles[1, 2:5] = SYSTEM, IMAGE, IMAGE  # The third sample has no image.
    roles[0, 12:], roles[1, 17:], roles[2, 10:] = (int(TokenRole.RESPONSE),) * 3
    positions, valid = select_queries(roles, TokenRole.RESPONSE)
    assert not valid.all() and int(positions.min()) == 0
    lse = sdpa_with_lse(query, key)[1].gather(2, positions[:, None].expand(-1, H, -1))
    chosen = query.gather(2, positions[:, None, :, None].expand(-1, H, -1, D))
    expected = eager_mass(query, key, roles).gather(2, positions[:, None, :, None].expand(-1, H, -1, 5))
    expected = expected.where(valid[:, None, :, None], 0.0)[..., [SYSTEM, IMAGE]]
    rows = torch.ones(S, S, dtype=torch.bool).tril()[positions]
    for visibility in (Visibility(positions), Visibility(positions, rows_BQS=rows)):
        keys = KeysByRole(roles, (SYSTEM, IMAGE))
        assert keys.all_seen(visibility, valid) and not KeysByRole(roles, (SYSTEM, IMAGE)).all_seen(visibility, None)
        with monkeypatch.context() as patch:
            patch.setattr(Visibility, "of_keys", None)
            mass = selected_mass(chosen, key, roles, visibility, valid, lse_BHQ=lse, keys=keys)
        torch.testing.assert_close(mass[..., [SYSTEM, IMAGE]], expected, **CLOSE)


@pytest.mark.parametrize("present", [(), (SYSTEM,), (IMAGE,)])
def test_roles_that_nobody_has_have_no_mass(present):
    torch.manual_seed(2)
    query, key = torch.randn(1, 2, 12, 8), torch.randn(1, 2, 12, 8)
    roles = torch.full((1, 12), int(TokenRole.USER))
    for index, role in enumerate(present):
        roles[0, index * 3 : index * 3 + 3] = role
    _, lse = sdpa_with_lse(query, key)
    visibility = Visibility(torch.arange(12)[None])
    mass = selected_mass(query, key, roles, visibility, lse_BHQ=lse, keys=KeysByRole(roles, (SYSTEM, IMAGE)))
    expected = eager_mass(query, key, roles)
    torch.testing.assert_close(mass[..., [SYSTEM, IMAGE]], expected[..., [SYSTEM, IMAGE]], **CLOSE)


@pytest.mark.parametrize("samples, queries", [(0, 3), (2, 0)])
def test_nothing_to_measure(samples, queries):
    roles = torch.full((samples, 5), IMAGE)
    keys, visibility = KeysByRole(roles, (SYSTEM, IMAGE)), Visibility(torch.zeros(samples, queries, dtype=torch.long))
    query, key = torch.zeros(samples, 4, queries, 8), torch.zeros(samples, 2, 5, 8)
    mass = lse_mass(query, key, torch.zeros(samples, 4, queries), keys, visibility, 1.0, 5)
    assert mass.shape == (samples, 4, queries, 5)


def test_bfloat16_errs_no_more_than_twice_what_the_full_matrix_does():
    torch.manual_seed(3)
    query, key = torch.randn(1, 4, 64, 32), torch.randn(1, 2, 64, 32)
    roles = torch.randint(0, 5, (1, 64))
    low_query, low_key = query.bfloat16(), key.bfloat16()
    exact = eager_mass(query, key, roles)
    eager_error = (eager_mass(low_query, low_key, roles).float() - exact).abs()[..., [SYSTEM, IMAGE]].max()
    _, lse = sdpa_with_lse(low_query, low_key)
    keys = KeysByRole(roles, (SYSTEM, IMAGE))
    mass = selected_mass(low_query, low_key, roles, Visibility(torch.arange(64)[None]), lse_BHQ=lse, keys=keys)
    assert (mass - exact).abs()[..., [SYSTEM, IMAGE]].max() <= 2 * eager_error
