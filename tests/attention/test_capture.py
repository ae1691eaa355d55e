# SPDX-License-Identifier: Apache-2.0
"""Masses of a real model against its own attention weights, on real images."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from avar_verl.attention import capture, capture_mass
from avar_verl.attention.capture import _Forward, find_decoder, packed_segments, select_queries
from avar_verl.attention.lse_mass import KeysByRole
from avar_verl.attention.visibility import Visibility
from avar_verl.objectives.agto import mean_over_queries
from avar_verl.objectives.vars import VisualReduction
from avar_verl.roles import TokenRole
from tests.attention.reference import eager_mass

CLOSE = dict(rtol=1e-5, atol=1e-5)


def eager_masses(model, inputs, roles):
    """(B, L, H, S, R) from output_attentions, with padding queries at 0."""
    attentions = model(**inputs, use_cache=False, output_attentions=True).attentions
    onehot = torch.nn.functional.one_hot(roles, len(TokenRole)).float()
    mass = torch.stack([weights @ onehot[:, None] for weights in attentions], dim=1)
    return mass * inputs["attention_mask"][:, None, None, :, None] if "attention_mask" in inputs else mass


def packed_row(model, inputs) -> dict:
    """The samples of a right-padded batch in one row, distinguished only by their position ids, as verl packs them."""
    mask = inputs["attention_mask"].bool()
    positions, _ = model.model.get_rope_index(
        inputs["input_ids"],
        mm_token_type_ids=inputs["mm_token_type_ids"],
        image_grid_thw=inputs["image_grid_thw"],
        attention_mask=inputs["attention_mask"],
    )
    text = torch.arange(mask.shape[1]).expand(1, mask.shape[0], -1)
    return {
        "input_ids": inputs["input_ids"][mask][None],
        "position_ids": torch.cat([text, positions])[:, mask][:, None],
        "pixel_values": inputs["pixel_values"],
        "image_grid_thw": inputs["image_grid_thw"],
    }


def reference_flash_attention(module, query, key, value, attention_mask, scaling=None, position_ids=None, **rest):
    """What flash attention computes: causal, 2-D padding mask, or segments that begin at position 0; 0 on padding."""
    assert capture.KWARG not in rest  # no kernel sees the capture
    S = query.shape[2]
    visible = torch.ones(S, S, dtype=torch.bool).tril()[None]
    if attention_mask is not None:
        visible = visible & attention_mask.bool()[:, None]
    elif query.shape[0] == 1 and position_ids is not None:
        segments = (position_ids == 0).cumsum(-1)
        visible = visible & (segments[:, :, None] == segments[:, None])
    groups = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(groups, 1).mT * scaling
    weights = scores.masked_fill(~visible[:, None], float("-inf")).softmax(-1).nan_to_num(0.0)
    out = weights @ value.repeat_interleave(groups, 1)
    if attention_mask is not None:
        out = out * attention_mask[:, None, :, None]
    return out.transpose(1, 2), None


@pytest.fixture
def flash_model(tiny_model, monkeypatch):
    """A model that gets flash attention's masks and arguments, on the CPU; the vision tower keeps sdpa."""
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", reference_flash_attention)
    find_decoder(tiny_model).config._attn_implementation = "flash_attention_2"
    return tiny_model


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_equals_the_models_own_attention(load_tiny, encode, role_map, attention, side):
    inputs = encode(3, side)
    roles = role_map(inputs["input_ids"], inputs["attention_mask"])
    assert not inputs["attention_mask"].all()
    model = load_tiny(attention)
    with torch.no_grad():
        expected = eager_masses(load_tiny("eager"), inputs, roles)
        with capture_mass(model, roles) as captured:
            model(**inputs, use_cache=False)
        with capture_mass(model, roles) as with_cache:
            model(**inputs)  # a first forward may fill a cache
    assert captured.mass.shape == (3, 4, 4, roles.shape[1], 5)
    torch.testing.assert_close(captured.mass, expected, **CLOSE)
    torch.testing.assert_close(with_cache.mass, expected, **CLOSE)


@pytest.mark.parametrize("n, side", [(1, "right"), (3, "left"), (3, "right")])
@pytest.mark.parametrize("query_role", [None, TokenRole.RESPONSE])
def test_log_sum_exp_of_sdpa_is_used_and_equals_eager(load_tiny, encode, role_map, n, side, query_role):
    """implementation='lse' refuses a layer that leaves none, so it was used."""
    inputs = encode(n, side)
    roles = role_map(inputs["input_ids"], inputs["attention_mask"])
    columns = [TokenRole.SYSTEM, TokenRole.IMAGE]
    with torch.no_grad():
        expected = eager_masses(load_tiny("eager"), inputs, roles)
        model = load_tiny("sdpa")
        with capture_mass(model, roles, query_role=query_role, columns=columns, implementation="lse") as captured:
            logits = model(**inputs, use_cache=False).logits
        torch.testing.assert_close(logits, model(**inputs, use_cache=False).logits, rtol=0, atol=0)
    if query_role is not None:
        expected = expected * (roles == query_role)[:, None, None, :, None]
    torch.testing.assert_close(captured.mass[..., columns], expected[..., columns], **CLOSE)


@pytest.mark.parametrize("n", [1, 3])
def test_a_mask_is_read_once_for_all_layers(load_tiny, encode, role_map, monkeypatch, n):
    inputs = encode(n)
    roles, model = role_map(inputs["input_ids"], inputs["attention_mask"]), load_tiny("sdpa")
    described, looked = [], []
    describe, look = _Forward._visibility, KeysByRole._look
    monkeypatch.setattr(_Forward, "_visibility", lambda *a: described.append(1) or describe(*a))
    monkeypatch.setattr(KeysByRole, "_look", lambda *a: looked.append(1) or look(*a))
    with torch.no_grad(), capture_mass(model, roles, query_role=TokenRole.RESPONSE, columns=[1, 2]) as captured:
        model(**inputs, use_cache=False)
    assert len(captured.per_layer()) > 1 and described == looked == [1]


def test_implementations_that_cannot_be_are_refused(load_tiny, encode, role_map):
    inputs = encode(2)
    roles = role_map(inputs["input_ids"], inputs["attention_mask"])
    model = load_tiny("eager")
    with torch.no_grad(), pytest.raises(ValueError, match="needs an attention that computes a log-sum-exp.*'eager'"):
        with capture_mass(model, roles, columns=[1, 2], implementation="lse"):
            model(**inputs, use_cache=False)
    with pytest.raises(ValueError, match="implementation must be one of .*; got 'fast'"):
        with capture_mass(model, roles, implementation="fast"):
            pass


@pytest.mark.parametrize("n, side", [(1, "right"), (3, "left"), (3, "right")])
def test_flash_attention_equals_eager(flash_model, load_tiny, encode, role_map, n, side):
    """Its mask is the 2-D one of the padding, or none at all."""
    inputs = encode(n, side)
    roles = role_map(inputs["input_ids"], inputs["attention_mask"])
    with torch.no_grad():
        expected = eager_masses(load_tiny("eager"), inputs, roles)
        with capture_mass(flash_model, roles) as captured:
            flash_model(**inputs, use_cache=False)
        with capture_mass(flash_model, roles, query_role=TokenRole.RESPONSE) as responses:
            flash_model(**inputs, use_cache=False)
    torch.testing.assert_close(captured.mass, expected, **CLOSE)
    rows = (roles == TokenRole.RESPONSE)[:, None, None, :, None]
    torch.testing.assert_close(responses.mass, expected * rows, **CLOSE)


def test_bfloat16_model(load_tiny, encode, role_map):
    """Masses of a bfloat16 model err no more against float32 than twice its own attention weights do."""
    inputs = encode(2)
    roles = role_map(inputs["input_ids"], inputs["attention_mask"])
    low = {**inputs, "pixel_values": inputs["pixel_values"].bfloat16()}
    model = load_tiny("eager", torch.bfloat16)
    with torch.no_grad():
        exact = eager_masses(load_tiny("eager"), inputs, roles)
        attentions = model(**low, use_cache=False, output_attentions=True).attentions
        with capture_mass(model, roles) as captured:
            model(**low, use_cache=False)
    onehot = torch.nn.functional.one_hot(roles, 5).bfloat16()
    own = torch.stack([weights @ onehot[:, None] for weights in attentions], dim=1).float()
    own = own * inputs["attention_mask"][:, None, None, :, None]
    assert captured.mass.dtype == torch.float32
    assert (captured.mass - exact).abs().max() <= 2 * (own - exact).abs().max()


@pytest.mark.parametrize(
    "layers, expected_layers",
    [([-1, 1], (1, 3)), ([0], (0,)), ((3, 2, 0), (0, 2, 3)), ([-4], (0,)), (None, (0, 1, 2, 3))],
)
@pytest.mark.parametrize("query_role", [TokenRole.USER, [TokenRole.USER, TokenRole.RESPONSE], TokenRole.OTHER, None])
def test_subsets_of_layers_and_queries(tiny_model, encode, role_map, layers, expected_layers, query_role):
    inputs = encode(3)
    roles = role_map(inputs["input_ids"], inputs["attention_mask"])
    with torch.no_grad():
        with capture_mass(tiny_model, roles) as everything:
            tiny_model(**inputs, use_cache=False)
        with capture_mass(tiny_model, roles, layers=layers, query_role=query_role) as part:
            tiny_model(**inputs, use_cache=False)
    assert part.layers == expected_layers
    rows = torch.isin(roles, torch.tensor(query_role if query_role is not None else list(TokenRole)).reshape(-1))
    expected = everything.mass[:, list(expected_layers)] * rows[:, None, None, :, None]
    torch.testing.assert_close(part.mass, expected, **CLOSE)
    real = (rows & inputs["attention_mask"].bool())[:, None, None].expand_as(part.mass[..., 0])
    torch.testing.assert_close(part.mass.sum(-1), real.float())  # padding is OTHER, and has no mass either


def test_a_role_that_nobody_has(tiny_model, tiny_processor, role_map):
    """The rows with which verl fills up a batch have no response, and may be the only ones in a micro-batch."""
    ids = torch.full((2, 9), tiny_processor.tokenizer.eos_token_id)
    roles = role_map(ids, torch.ones_like(ids), torch.zeros_like(ids))
    for reduction, shape in [(None, (2, 4, 0, 5)), (mean_over_queries, (2, 4, 7)), (VisualReduction(1e-6), (2, 5))]:
        with capture_mass(tiny_model, roles, query_role=TokenRole.RESPONSE, reduction=reduction) as captured:
            tiny_model(input_ids=ids, use_cache=False)
        assert captured.per_layer()[0].shape == shape and captured.valid.shape == (2, 0)
        if reduction is None:
            assert captured.mass.shape == (2, 4, 4, 9, 5) and not captured.mass.any()


def test_ragged_queries_made_rectangular():
    roles = torch.tensor([[3, 4, 0, 4], [4, 3, 3, 3]])
    positions, valid = select_queries(roles, TokenRole.RESPONSE)
    assert valid.tolist() == [[True, True], [True, False]]
    assert positions[valid].tolist() == [1, 3, 0] and positions[1, 1] != 0


def test_a_reduction_sees_masses_and_filling(tiny_model, encode, role_map):
    inputs = encode(3)
    roles = role_map(inputs["input_ids"], inputs["attention_mask"])
    with torch.no_grad():
        with capture_mass(tiny_model, roles, query_role=TokenRole.RESPONSE) as plain:
            tiny_model(**inputs, use_cache=False)
        reduction = lambda mass, valid: (mass * valid[:, None, :, None]).sum((1, 2))  # noqa: E731
        with capture_mass(tiny_model, roles, query_role=TokenRole.RESPONSE, reduction=reduction) as reduced:
            tiny_model(**inputs, use_cache=False)
    assert not plain.valid.all()
    torch.testing.assert_close(torch.stack(reduced.per_layer(), 1), plain.mass.sum((2, 3)), **CLOSE)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flash"])
def test_packed_row_equals_padded_rows(request, load_tiny, encode, role_map, attention):
    """In flash attention no mask reaches the layers: the segments are read off the position ids, as it does."""
    inputs = encode(2)
    model = request.getfixturevalue("flash_model") if attention == "flash" else load_tiny(attention)
    roles = role_map(inputs["input_ids"], inputs["attention_mask"])
    packed = packed_row(model, inputs)
    with torch.no_grad():
        with capture_mass(model, roles) as padded:
            model(**inputs, use_cache=False)
        with capture_mass(model, role_map(packed["input_ids"])) as row:
            model(**packed, use_cache=False)
    expected = padded.mass.movedim(3, 1)[inputs["attention_mask"].bool()].movedim(0, 2)
    torch.testing.assert_close(row.mass[0], expected, **CLOSE)


@pytest.mark.parametrize("query_role", [None, TokenRole.RESPONSE])
def test_samples_are_taken_out_of_a_packed_row(tiny_model, encode, role_map, query_role):
    """With the offsets of the samples a packed row has the masses and gradients of padded samples, in their layout."""
    inputs = encode(3, "right")
    roles = role_map(inputs["input_ids"], inputs["attention_mask"])
    offsets = torch.nn.functional.pad(inputs["attention_mask"].sum(1).cumsum(0), (1, 0))
    gradients, masses = [], []
    for kwargs, model_inputs in (({}, inputs), ({"packed_offsets": offsets}, packed_row(tiny_model, inputs))):
        with capture_mass(tiny_model, roles, query_role=query_role, **kwargs) as captured:
            tiny_model(**model_inputs, use_cache=False)
        real = captured.mass * inputs["attention_mask"][:, None, None, :, None]
        tiny_model.zero_grad()
        real[..., TokenRole.IMAGE].sum().backward()
        masses.append(real.detach())
        gradients.append(find_decoder(tiny_model).layers[0].self_attn.k_proj.weight.grad.clone())
    torch.testing.assert_close(masses[1], masses[0], **CLOSE)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-4)


class Reads(TorchFunctionMode):
    """Counts what makes the host wait for a GPU: reads of tensors, and results whose shape is data."""

    WAITS = {
        *(torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.__bool__),
        *(torch.Tensor.__int__, torch.Tensor.__float__, torch.Tensor.__index__, torch.Tensor.nonzero, torch.nonzero),
        *(torch.Tensor.masked_select, torch.masked_select, torch.Tensor.unique, torch.unique, torch.equal),
    }

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        by_mask = func is torch.Tensor.__getitem__ and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool
            for index in (args[1] if isinstance(args[1], tuple) else (args[1],))
        )
        self.count += func in self.WAITS or by_mask
        return func(*args, **(kwargs or {}))


def test_the_counter_of_reads_counts():
    x = torch.arange(4)
    with Reads() as reads:
        assert (bool(x[1]), int(x[2]), x[3].item(), x.tolist()) == (True, 2, 3, [0, 1, 2, 3])
        assert len(x[x > 1]) == len(x.nonzero()) - 1 == 2
    assert reads.count == 6


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("with_gradients", [True, False])
def test_the_host_waits_at_most_once_in_a_forward_pass(
    monkeypatch, tiny_model, encode, role_map, layout, with_gradients
):
    """However many layers are measured: padded rows never, packed rows once, for the check of their segments."""

    def chunks(self, size, num_keys):  # as on a GPU, where positions are not read to skip keys
        return ((start, start + size, 0, num_keys) for start in range(0, self.positions_BQ.shape[1], size))

    monkeypatch.setattr(Visibility, "chunks", chunks)
    inputs = encode(3, "right")
    roles = role_map(inputs["input_ids"], inputs["attention_mask"])
    kwargs = {}
    if layout == "packed":
        kwargs = {"packed_offsets": torch.nn.functional.pad(inputs["attention_mask"].sum(1).cumsum(0), (1, 0))}
        inputs = packed_row(tiny_model, inputs)
    counts = []
    with torch.set_grad_enabled(with_gradients):
        with Reads() as plain:
            tiny_model(**inputs, use_cache=False)
        for layers in ([0], None):
            with capture_mass(
                tiny_model, roles, query_role=TokenRole.RESPONSE, layers=layers, **kwargs, implementation="chunked"
            ):
                with Reads() as reads:
                    tiny_model(**inputs, use_cache=False)
            counts.append(reads.count - plain.count)
    assert counts == [int(layout == "packed")] * 2


def test_packed_rows_that_do_not_match_the_offsets_are_refused(tiny_model, encode, role_map):
    inputs = encode(3, "right")
    roles = role_map(inputs["input_ids"], inputs["attention_mask"])
    offsets = torch.nn.functional.pad(inputs["attention_mask"].sum(1).cumsum(0), (1, 0))
    row = packed_row(tiny_model, inputs)
    wrong = offsets.clone()
    wrong[1] += 1
    with pytest.raises(ValueError, match="every segment of packed attention must be one sample; got segments"):
        with capture_mass(tiny_model, roles, packed_offsets=wrong):
            tiny_model(**row, use_cache=False)
    T = int(offsets[-1])
    empty, beyond = torch.cat([offsets[:2], offsets[1:]]), torch.cat([offsets[:-1], offsets[-1:] + 1])
    for samples, segments in ((offsets, None), (empty, offsets), (beyond, offsets), (offsets[[0, 1, 3]], offsets)):
        forward = capture._Forward(capture._Request(roles, [0], None, "sdpa", offsets=samples))
        with pytest.raises(ValueError, match="must be one sample; got segments .* for samples"):
            forward._check_segments(T, segments)
    for samples, segments, length in ((offsets, offsets, T), (offsets, torch.cat([offsets, offsets[-1:] + 3]), T + 3)):
        capture._Forward(capture._Request(roles, [0], None, "sdpa", offsets=samples))._check_segments(length, segments)
    capture._Forward(capture._Request(roles[:1], [0], None, "sdpa", offsets=offsets[:2]))._check_segments(T, None)
    with pytest.raises(ValueError, match="packed samples are one row with position ids .*; got 3 rows"):
        with capture_mass(tiny_model, roles, packed_offsets=offsets):
            tiny_model(**inputs, use_cache=False)
    forward = capture._Forward(capture._Request(torch.zeros(1, 3, dtype=torch.long), [0], None, "sdpa"))
    with pytest.raises(ValueError, match="needs to know where samples start; got a packed row of 3 positions"):
        forward.observe_packed(SimpleNamespace(layer_idx=0), torch.zeros(3, 2, 4), torch.zeros(3, 2, 4), None, {})


COMPILED = pytest.param("left", "default", marks=[pytest.mark.e2e, pytest.mark.slow])


@pytest.mark.parametrize("side, stance", [("left", "force_eager"), ("right", "force_eager"), COMPILED])
def test_flex_attention_equals_eager(load_tiny, encode, role_map, side, stance):
    """The block mask is asked for the rows of the selected queries, padding and packing included."""
    inputs = encode(3, side)
    roles = role_map(inputs["input_ids"], inputs["attention_mask"])
    model = load_tiny("sdpa")
    find_decoder(model).config._attn_implementation = "flex_attention"
    with torch.no_grad():
        expected = eager_masses(load_tiny("eager"), inputs, roles)
        # Without a compiler flex attention is what it computes, and spares a minute.
        with torch.compiler.set_stance(stance), capture_mass(model, roles) as captured:
            model(**inputs, use_cache=False)
    torch.testing.assert_close(captured.mass, expected, **CLOSE)


@pytest.mark.parametrize(
    "groups, num_groups, message",
    [
        (torch.zeros(1, 2, dtype=torch.long), 2, "key_groups must be"),
        (None, None, "num_groups=None"),
        (None, 2, "key_groups must be integers in"),
    ],
)
def test_key_groups_that_do_not_fit_are_refused(tiny_model, encode, role_map, groups, num_groups, message):
    inputs = encode(1, "right")
    roles = role_map(inputs["input_ids"], inputs["attention_mask"])
    with pytest.raises(ValueError, match=message):
        with capture_mass(tiny_model, roles, key_groups=roles if groups is None else groups, num_groups=num_groups):
            pass


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("mask", [False, True])
def test_a_packed_row_that_the_model_does_not_separate(load_tiny, encode, role_map, attention, mask):
    """Beside a cache, or with a mask of ones, transformers lets samples of a row see each other: so does the mass."""
    inputs = encode(2)
    model = load_tiny(attention)
    packed = packed_row(model, inputs)
    roles = role_map(packed["input_ids"])
    if mask:
        packed["attention_mask"] = torch.ones_like(packed["input_ids"])
    with torch.no_grad(), capture_mass(model, roles) as row:
        model(**packed, use_cache=not mask)
    with torch.no_grad():
        attentions = load_tiny("eager")(**packed, use_cache=not mask, output_attentions=True).attentions
    onehot = torch.nn.functional.one_hot(roles, 5).float()
    expected = torch.stack([weights @ onehot[:, None] for weights in attentions], dim=1)
    torch.testing.assert_close(row.mass, expected, **CLOSE)


def test_segments_of_position_ids():
    assert packed_segments(None) is None and packed_segments(torch.arange(5)[None]) is None
    assert packed_segments(torch.tensor([[0, 1, 2, 0, 1, 0]])).tolist() == [[0, 0, 0, 1, 1, 2]]
    assert packed_segments(torch.tensor([[7, 8, 0]])).tolist() == [[0, 0, 1]]


def guided_gradients(model, inputs, roles, from_eager=False):
    model.zero_grad()
    if from_eager:
        mass = eager_masses(model, inputs, roles)
    else:
        with capture_mass(model, roles, query_role=TokenRole.RESPONSE) as captured:
            model(**inputs, use_cache=False)
        mass = captured.mass
    rows = roles == TokenRole.RESPONSE
    image = mass[..., TokenRole.IMAGE].movedim(3, 1)[rows].mean(0)  # (L, H)
    loss = -image.log().mean()
    loss.backward()  # after the block has ended
    return float(loss.detach()), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(a, b):
    assert a[0] == pytest.approx(b[0], rel=1e-5)
    assert a[1].keys() == b[1].keys() and any("q_proj" in name for name in a[1])
    assert max(float(gradient.abs().max()) for gradient in a[1].values()) > 1e-3
    for name, gradient in a[1].items():
        torch.testing.assert_close(b[1][name], gradient, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_gradients_equal_those_of_the_full_matrix(load_tiny, encode, role_map, attention, side):
    inputs = encode(2, side)
    roles = role_map(inputs["input_ids"], inputs["attention_mask"])
    expected = guided_gradients(load_tiny("eager"), inputs, roles, from_eager=True)
    assert_same_gradients(guided_gradients(load_tiny(attention), inputs, roles), expected)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kwargs", [None, {"use_reentrant": False}], ids=["default", "non-reentrant"])
def test_gradient_checkpointing_changes_nothing(load_tiny, encode, role_map, attention, kwargs):
    inputs = encode(2)
    roles = role_map(inputs["input_ids"], inputs["attention_mask"])
    plain = guided_gradients(load_tiny(attention).train(), inputs, roles)
    model = load_tiny(attention).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    assert find_decoder(model).layers[0].gradient_checkpointing
    assert_same_gradients(guided_gradients(model, inputs, roles), plain)


def test_recomputation_leaves_the_captured_tensors_alone(tiny_model, encode, role_map):
    """The first result is the one in the loss, also when it is read again after the backward pass."""
    inputs = encode(1)
    roles = role_map(inputs["input_ids"], inputs["attention_mask"])
    tiny_model.train().gradient_checkpointing_enable()
    calls = []
    reduction = lambda mass, valid: calls.append(1) or mass.sum((1, 2))  # noqa: E731
    with capture_mass(tiny_model, roles, query_role=TokenRole.RESPONSE, reduction=reduction) as captured:
        tiny_model(**inputs, use_cache=False)
    before = captured.per_layer()
    sum(layer[:, TokenRole.IMAGE].sum() for layer in before).backward()
    assert len(calls) == 8  # four layers, twice
    assert all(a is b for a, b in zip(captured.per_layer(), before, strict=True))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpointing_is_refused_where_it_would_lose_the_gradient(tiny_model, encode, role_map):
    inputs = encode(1)
    roles = role_map(inputs["input_ids"], inputs["attention_mask"])
    tiny_model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ValueError, match="under reentrant gradient checkpointing"), capture_mass(tiny_model, roles):
        tiny_model(**inputs, use_cache=False)
    with torch.no_grad(), capture_mass(tiny_model, roles) as captured:
        tiny_model(**inputs, use_cache=False)
    assert not captured.mass.requires_grad


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_model_computes_the_same_to_the_bit(load_tiny, encode, role_map, attention):
    inputs = encode(2)
    roles = role_map(inputs["input_ids"], inputs["attention_mask"])
    model = load_tiny(attention)
    with torch.no_grad():
        before = model(**inputs).logits
        with capture_mass(model, roles):
            during = model(**inputs, use_cache=False).logits
        after = model(**inputs).logits
    assert torch.equal(before, during) and torch.equal(before, after)


def test_nothing_stays_behind_on_the_model(tiny_model, encode, role_map):
    inputs = encode(1)
    roles = role_map(inputs["input_ids"], inputs["attention_mask"])
    decoder = find_decoder(tiny_model)
    with pytest.raises(RuntimeError, match="on purpose"), capture_mass(tiny_model, roles):
        raise RuntimeError("on purpose")
    assert not decoder._forward_pre_hooks
    with torch.no_grad():
        with capture_mass(tiny_model, roles) as first:
            tiny_model(**inputs)
        tiny_model(**inputs)  # outside: not captured, not counted
        wrapped = ALL_ATTENTION_FUNCTIONS["sdpa"]
        with capture_mass(tiny_model, roles) as second:
            tiny_model(**inputs)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is wrapped  # wrapped once
    assert torch.equal(first.mass, second.mass) and not decoder._forward_pre_hooks


def test_key_groups_show_every_image_token(load_tiny, encode, role_map):
    inputs = encode(1)
    roles = role_map(inputs["input_ids"], inputs["attention_mask"])
    image = roles == TokenRole.IMAGE
    model = load_tiny("eager")
    with torch.no_grad():
        attentions = model(**inputs, use_cache=False, output_attentions=True).attentions
        groups = image.long().cumsum(1) * image
        with capture_mass(model, roles, key_groups=groups, num_groups=17) as captured:
            model(**inputs, use_cache=False)
    expected = torch.stack(attentions, dim=1)[..., image[0]]
    torch.testing.assert_close(captured.mass[..., 1:], expected, **CLOSE)
    torch.testing.assert_close(captured.mass.sum(-1), torch.ones(captured.mass.shape[:-1]))


def test_a_step_is_freed_without_the_garbage_collector(tiny_model, encode, role_map):
    inputs = encode(1)
    roles = role_map(inputs["input_ids"], inputs["attention_mask"])
    gc.disable()
    try:
        with capture_mass(tiny_model, roles) as captured:
            tiny_model(**inputs, use_cache=False)
        alive = weakref.ref(captured.per_layer()[0])
        assert alive() is not None
        del captured
        assert alive() is None
    finally:
        gc.enable()


def llama():
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config).eval()


def test_models_of_other_files_keep_their_eager_attention(monkeypatch):
    """A capture registers "eager" for the whole process: every file still runs the function it has defined."""
    capture._wrap("eager")
    model, ids = llama(), torch.arange(8)[None]
    with torch.no_grad():
        with monkeypatch.context() as patch:
            patch.delitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "eager")
            expected = model(input_ids=ids).logits
        assert torch.equal(model(input_ids=ids).logits, expected)
        with capture_mass(model, torch.ones_like(ids)) as captured:  # and can be captured: it uses the interface
            model(input_ids=ids)
    assert torch.equal(captured.mass[..., TokenRole.SYSTEM] > 0.999, torch.ones(1, 2, 2, 8, dtype=torch.bool))


def text_eager_attention_forward():
    """Stands for a file with one eager function for text and another one for vision."""


def vision_eager_attention_forward(): ...


class TextAttention(torch.nn.Module):
    def forward(self):
        return text_eager_attention_forward


class VisionAttention(torch.nn.Module):
    def forward(self):
        return vision_eager_attention_forward


class VisionAttentionChild(VisionAttention):
    pass


def test_the_eager_function_is_the_one_that_the_class_names():
    assert capture._eager_of(TextAttention()) is text_eager_attention_forward
    assert capture._eager_of(VisionAttentionChild()) is vision_eager_attention_forward
    with pytest.raises(ValueError, match="must be defined in the file of the attention class; got Linear without one"):
        capture._eager_of(torch.nn.Linear(2, 2))


def test_misuse_is_refused(tiny_model, encode, role_map):
    inputs = encode(1)
    roles = role_map(inputs["input_ids"], inputs["attention_mask"])
    with torch.no_grad():
        with pytest.raises(ValueError, match="holds one forward pass; got a second"), capture_mass(tiny_model, roles):
            tiny_model(**inputs, use_cache=False)
            tiny_model(**inputs, use_cache=False)
        with capture_mass(tiny_model, roles) as captured:
            pass
        for name in ("mass", "per_layer"):
            with pytest.raises(ValueError, match="has seen no forward pass"):
                captured.per_layer() if name == "per_layer" else captured.mass  # noqa: B018
        for layers in ([], [4], [-5], [0, 0], [0, -4]):
            with pytest.raises(ValueError, match="layers must be distinct indices among the 4"):
                with capture_mass(tiny_model, roles, layers=layers):
                    pass


@pytest.mark.parametrize("change", [lambda r: r[:, :-1], lambda r: torch.cat([r, r]), lambda r: torch.cat([r, r], 1)])
def test_roles_of_another_shape_are_refused(tiny_model, encode, role_map, change):
    inputs = encode(1)
    roles = role_map(inputs["input_ids"], inputs["attention_mask"])
    with pytest.raises(ValueError, match="roles must cover every position"), torch.no_grad():
        with capture_mass(tiny_model, change(roles)):
            tiny_model(**inputs, use_cache=False)


@pytest.mark.parametrize("query_role", [None, TokenRole.RESPONSE])
@pytest.mark.parametrize("length", ["step", "whole"])
def test_a_filled_cache_is_refused(tiny_model, encode, role_map, query_role, length):
    inputs = encode(1)
    roles = role_map(inputs["input_ids"], inputs["attention_mask"])
    step = roles[:, -1:] if length == "step" else torch.cat([roles, roles[:, -1:]], 1)
    with torch.no_grad():
        cache = tiny_model(**inputs, use_cache=True).past_key_values
        mask = torch.cat([inputs["attention_mask"], torch.ones(1, 1, dtype=torch.long)], 1)
        with pytest.raises(ValueError, match="Run without a key/value cache"):
            with capture_mass(tiny_model, step, query_role=query_role):
                tiny_model(input_ids=inputs["input_ids"][:, -1:], attention_mask=mask, past_key_values=cache)


def test_attention_that_bypasses_the_interface_is_refused(tiny_model, encode, role_map, monkeypatch):
    inputs = encode(1)
    roles = role_map(inputs["input_ids"], inputs["attention_mask"])
    attention = type(find_decoder(tiny_model).layers[2].self_attn)
    original = attention.forward

    def bypass(self, hidden_states, *args, **kwargs):
        if self.layer_idx == 2:
            return hidden_states, None
        return original(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(attention, "forward", bypass)
    with torch.no_grad(), capture_mass(tiny_model, roles) as captured:
        tiny_model(**inputs, use_cache=False)
    with pytest.raises(ValueError, match=r"layers \[2\] did not.*use_remove_padding=False"):
        captured.mass  # noqa: B018
    with torch.no_grad(), capture_mass(tiny_model, roles, layers=[0, 3]) as captured:  # it is not asked for
        tiny_model(**inputs, use_cache=False)
    assert captured.mass.shape[1] == 2


def test_models_without_one_decoder_are_refused(tiny_model):
    with pytest.raises(ValueError, match="the one text decoder of the model; got 0 in Linear"):
        find_decoder(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="got 2 in ModuleList"):
        find_decoder(torch.nn.ModuleList([llama(), llama()]))


def test_a_wrapped_model_has_the_same_decoder(tiny_model):
    wrapped = torch.nn.Sequential(torch.nn.Sequential(tiny_model))
    assert find_decoder(wrapped) is find_decoder(tiny_model) is tiny_model.model.language_model


def test_layers_with_other_numbers_of_heads_are_refused():
    forward = capture._Forward(capture._Request(torch.zeros(1, 3, dtype=torch.long), [0, 1], None, "sdpa"))
    two, four = torch.zeros(1, 2, 3, 4), torch.zeros(1, 4, 3, 4)
    forward.observe(SimpleNamespace(layer_idx=0), two, two, None, {})
    with pytest.raises(ValueError, match=r"the same number of query heads; got \{0: 2, 1: 4\} by layer"):
        forward.observe(SimpleNamespace(layer_idx=1), four, two, None, {})


@pytest.mark.parametrize("size", [32, 512])
def test_keys_that_are_the_values_and_heads_of_any_size(size):
    """Gemma 4's full layers: heads of 512, values that are the keys. By hand: the mass of the softmax."""
    torch.manual_seed(0)
    query, key = torch.randn(1, 2, 3, size), torch.randn(1, 1, 3, size)
    roles = torch.tensor([[1, 2, 3]])
    mass_BHSR = observe(roles, query, key, None, {"scaling": 1.0})
    weights_BHS = (query[:, :, 2] @ key[:, 0].mT).softmax(-1)
    torch.testing.assert_close(mass_BHSR[:, :, 2, 1:4], weights_BHS, atol=1e-5, rtol=0)


def observe(roles, query, key, mask, arguments):
    """What one attention layer returns."""
    forward = capture._Forward(capture._Request(roles, [0], None, "sdpa"))
    forward.observe(SimpleNamespace(layer_idx=0), query, key, mask, arguments)
    return forward.by_layer[0]


@pytest.mark.parametrize("argument", [{"softcap": 30.0}, {"s_aux": torch.zeros(4)}])
def test_another_softmax_is_refused(argument):
    forward = capture._Forward(capture._Request(torch.zeros(1, 3, dtype=torch.long), [0], None, "sdpa"))
    query = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match=rf"need a plain softmax over the keys; got {next(iter(argument))} \("):
        forward.observe(SimpleNamespace(layer_idx=0), query, query, None, argument)


@pytest.mark.parametrize(
    "mask, message",
    [
        (torch.zeros(1, 2, 3, 3), r"need one mask for all heads; got a mask of shape \(1, 2, 3, 3\)"),
        (torch.zeros(1, 3, 3), "read 4-D, 2-D and block masks or none; got Tensor"),
        ("block mask", "got str with attn_implementation='sdpa'"),
    ],
)
def test_masks_of_other_kinds_are_refused(mask, message):
    forward = capture._Forward(capture._Request(torch.zeros(1, 3, dtype=torch.long), [0], None, "sdpa"))
    query = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match=message):
        forward.observe(SimpleNamespace(layer_idx=0), query, query, mask, {})


# The least bfloat16 in a float32 mask is not the least float32.
@pytest.mark.parametrize("hidden", [torch.finfo(torch.float32).min, torch.finfo(torch.bfloat16).min, float("-inf")])
def test_additive_and_boolean_masks_say_the_same(hidden):
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 2, 5, 4, generator=generator) for _ in range(2))
    roles = torch.randint(0, 5, (2, 5), generator=generator)
    visible = torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
    additive = torch.zeros(1, 1, 5, 5).masked_fill(~visible, hidden)
    out = [observe(roles, query, key, mask, {"scaling": 0.3}) for mask in (visible, additive, None)]
    assert torch.equal(out[0], out[1]) and torch.equal(out[0], out[2])
    torch.testing.assert_close(out[0], eager_mass(query, key, roles, scale=0.3), **CLOSE)
