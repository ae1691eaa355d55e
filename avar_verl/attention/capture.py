# SPDX-License-Identifier: Apache-2.0
"""Capture attention masses of a transformers model while it runs, with any attention backend.

Every transformers attention layer calls one function of transformers' `AttentionInterface`, with q and k after the
rotary embedding. The function in use is registered again, under its own name, with a wrapper. If the forward pass has a
capture, the wrapper reduces q and k to role masses; in every case it calls the original with unchanged arguments. The
capture is passed as a keyword argument from the decoder to its attention layers. So it is part of the closure of a
checkpointed layer, and recomputation in the backward pass repeats exactly the operations of the forward pass, even
after the `with` block has ended.

Relies on: transformers 5.9.0, modeling_utils.py `AttentionInterface.get_interface`, and decoders that pass `**kwargs`
on to their attention function (models/qwen2_5_vl/modeling_qwen2_5_vl.py, `Qwen2_5_VLTextModel.forward`).

Shape suffixes:
    B = samples, S = positions, Q = selected queries (the most of any sample), L = captured layers, H = query heads,
    K = key/value heads, D = head size, R = token roles (or other key groups)
"""

import inspect
import sys
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface, PreTrainedModel

from avar_verl.attention.lse_mass import KeysByRole, LseTap
from avar_verl.attention.mass import IMPLEMENTATIONS, NUM_ROLES, selected_mass, takes_lse
from avar_verl.attention.visibility import Visibility
from avar_verl.model.layers import resolve_indices, select_layers
from avar_verl.model.roles import TokenRole

KWARG = "avar_capture"
# Attention arguments that change the softmax in ways that the mass does not reproduce (Gemma 2's cap, GPT-OSS's sinks).
UNSUPPORTED_ARGUMENTS = {"softcap": "a cap on the logits", "s_aux": "attention sinks"}
Reduction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def select_queries(roles_BS: torch.Tensor, query_role: int | Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of the queries of a role, padded to a rectangle.

    Returns:
        positions_BQ int64 in ascending order, and valid_BQ bool, False on the padding of samples that have fewer.
    """
    # Compare with numbers: a tensor of the requested roles would have to be copied to the device, which synchronises.
    wanted = (query_role,) if isinstance(query_role, int) else query_role
    chosen_BS = torch.zeros_like(roles_BS, dtype=torch.bool)
    for role in wanted:
        chosen_BS |= roles_BS == int(role)
    count_B = chosen_BS.sum(1)
    # A stable sort moves the selected positions to the front, in order.
    order_BS = torch.argsort(~chosen_BS, dim=1, stable=True)
    num_queries = int(count_B.max()) if count_B.numel() else 0
    valid_BQ = torch.arange(num_queries, device=roles_BS.device) < count_B[:, None]
    return order_BS[:, :num_queries], valid_BQ


def _take_positions(query_BHSD: torch.Tensor, positions_BQ: torch.Tensor) -> torch.Tensor:
    """(B, H, Q, D) of every sample's own positions.

    Whole rows of H * D numbers, which is how the projections leave them; a gather would move single numbers.
    """
    B, H, S, D = query_BHSD.shape
    start_B1 = S * torch.arange(B, device=positions_BQ.device)[:, None]
    rows = query_BHSD.transpose(1, 2).reshape(B * S, H * D).index_select(0, (start_B1 + positions_BQ).flatten())
    return rows.view(B, positions_BQ.shape[1], H, D).transpose(1, 2)


def packed_segments(position_ids_BS: torch.Tensor | None) -> torch.Tensor | None:
    """Segment ids of packed rows: a new segment starts wherever a position is not the previous one plus 1.

    The rule of transformers (masking_utils.py `find_packed_sequence_indices`). None when there is one segment.
    """
    if position_ids_BS is None:
        return None
    breaks_BS = torch.diff(position_ids_BS, prepend=position_ids_BS[:, :1] - 1, dim=-1) != 1
    return breaks_BS.long().cumsum(-1) if bool(breaks_BS.any()) else None


class _Request:
    """What to capture: shared by a `CapturedMass` and its forward pass, which must not reference each other.

    (A cycle would keep the graph of a step alive until the next garbage collection.)
    """

    def __init__(
        self,
        roles,
        layers,
        query_role,
        attention,
        reduction=None,
        key_groups=None,
        num_groups: Any = None,
        offsets: Any = None,
        columns: Any = None,
        implementation="auto",
    ):
        self.roles = roles
        self.layers = tuple(layers)
        self.reduction = reduction
        self.key_groups = roles if key_groups is None else key_groups
        self.num_groups = NUM_ROLES if key_groups is None else num_groups
        self.attention = attention
        self.offsets = offsets
        self.columns = columns
        self.implementation = implementation
        self.all_queries = query_role is None
        if query_role is None:
            self.positions = torch.arange(roles.shape[1], device=roles.device).expand(roles.shape[0], -1)
            self.valid = None
        else:
            self.positions, self.valid = select_queries(roles, query_role)

    @cached_property
    def keys(self) -> KeysByRole:
        return KeysByRole(self.key_groups, self.columns)

    def hide_padding(self, mask_BS: torch.Tensor) -> None:
        """Padding queries have no mass, on either side and whatever their role."""
        if mask_BS.shape != self.roles.shape:
            return  # A step with a cache, which `_Forward.observe` refuses with the reason.
        if self.all_queries or self.valid is None:
            self.valid = mask_BS
        else:
            self.valid = self.valid & mask_BS.gather(1, self.positions)


class _Forward:
    """The results of one forward pass of the decoder, layer by layer.

    A plain class: FSDP rebuilds dataclasses and tuples among the keyword arguments, and this must stay one object.
    """

    def __init__(self, request: _Request):
        self.request = request
        self.by_layer: dict[int, torch.Tensor] = {}
        self.heads: dict[int, int] = {}
        self.has_gradients = torch.is_grad_enabled()
        self._described: deque[tuple[tuple, Visibility]] = deque(maxlen=2)  # Layers have one kind of mask or two.

    def wants_lse(self, layer: int, query: torch.Tensor) -> bool:
        """Whether the log-sum-exp of this layer's attention would be used (`choose_implementation`)."""
        request = self.request
        return (
            layer in request.layers
            and request.columns is not None
            and takes_lse(request.implementation, query.device.type, request.num_groups, query.shape[-1])
            and not torch.is_grad_enabled()
        )

    # Under torch.compile, the masses are computed between the compiled parts of the model: the tracer cannot handle the
    # Triton kernels and the bookkeeping of layers.
    @torch.compiler.disable
    def observe(self, module, query_BHSD, key_BKSD, attention_mask, arguments: dict, tap: LseTap | None = None) -> None:
        """One layer through transformers' attention interface."""
        request = self.request
        layer = module.layer_idx
        if not self._wants(layer, arguments):
            return
        if request.offsets is not None:
            self._observe_packed_row(module, query_BHSD, key_BKSD, arguments, tap)
            return
        roles_BS = request.roles
        if tuple(roles_BS.shape) != (key_BKSD.shape[0], key_BKSD.shape[2]) or query_BHSD.shape[2] != key_BKSD.shape[2]:
            raise ValueError(
                f"roles must cover every position of the forward pass; got roles {tuple(roles_BS.shape)} for queries "
                f"{tuple(query_BHSD.shape)} and keys {tuple(key_BKSD.shape)}. Run without a key/value cache."
            )
        query_BHQD, lse_BHQ = query_BHSD, self._lse(tap, layer, query_BHSD)
        if not request.all_queries:
            query_BHQD = _take_positions(query_BHSD, request.positions)
            if lse_BHQ is not None:
                lse_BHQ = lse_BHQ.gather(2, request.positions[:, None].expand(-1, lse_BHQ.shape[1], -1))
        visibility = self._once(
            (attention_mask, arguments.get("position_ids"), arguments.get("sliding_window")),
            lambda: self._visibility(attention_mask, request.positions, arguments, layer),
        )
        self._reduce(layer, query_BHQD, key_BKSD, visibility, arguments.get("scaling"), lse_BHQ)

    def _lse(self, tap: LseTap | None, layer: int, query_BHSD: torch.Tensor) -> torch.Tensor | None:
        """(B, H, S) that the layer's attention left in the tap."""
        if tap is None:
            return None
        lse_BHS = tap.lse(*query_BHSD.shape[:3])
        if lse_BHS is None and self.request.implementation == "lse":
            raise ValueError(
                "implementation='lse' needs an attention that computes a log-sum-exp, sdpa; got none in "
                f"layer {layer} (attn_implementation={self.request.attention!r}). Use implementation='auto'."
            )
        return lse_BHS

    @torch.compiler.disable
    def observe_packed(
        self,
        module,
        query_THD,
        key_TKD,
        segments: torch.Tensor | None,
        arguments: dict,
        tap: LseTap | None = None,
    ) -> None:
        """One layer of packed attention. `segments`: their cumulative lengths (`cu_seqlens`), or a (T,) mask of the
        positions at which one starts; None is one segment.

        Samples are taken out of the packed row, so everything after this is the same as for padded samples.
        """
        request = self.request
        layer = module.layer_idx
        if not self._wants(layer, arguments):
            return
        T = query_THD.shape[0]
        if request.offsets is None:
            raise ValueError(
                f"packed attention needs to know where samples start; got a packed row of {T} positions without "
                "`packed_offsets`. Pass them to capture_mass."
            )
        offsets = request.offsets
        if not self.by_layer:  # Once per forward pass, because it waits for the device.
            self._check_segments(T, segments)
        start_B1 = offsets[:-1, None].to(query_THD.device)
        location_BQ = (start_B1 + request.positions).clamp(max=T - 1)
        location_BS = (start_B1 + torch.arange(request.roles.shape[1], device=query_THD.device)).clamp(max=T - 1)
        query_BHQD, key_BKSD = query_THD[location_BQ].transpose(1, 2), key_TKD[location_BS].transpose(1, 2)
        lse_1HT = self._lse(tap, layer, query_THD.transpose(0, 1)[None])
        lse_BHQ = None if lse_1HT is None else lse_1HT[0][:, location_BQ].transpose(0, 1)
        # The padding is after its sample, where no causal query sees it.
        window = arguments.get("sliding_window")
        visibility = self._once((window,), lambda: Visibility(request.positions, window=window))
        self._reduce(layer, query_BHQD, key_BKSD, visibility, arguments.get("scaling"), lse_BHQ)

    def _observe_packed_row(self, module, query_BHSD, key_BKSD, arguments, tap) -> None:
        position_ids_BS = arguments.get("position_ids")
        if query_BHSD.shape[0] != 1 or position_ids_BS is None:
            raise ValueError(
                f"packed samples are one row with position ids that start at 0 in each; got {query_BHSD.shape[0]} rows"
                f"{'' if position_ids_BS is not None else ' without position ids'}. Pass no `packed_offsets` for "
                "padded samples."
            )
        self.observe_packed(  # pyright: ignore[reportAttributeAccessIssue]  torch types the decorator as no method.
            module,
            query_BHSD[0].transpose(0, 1),
            key_BKSD[0].transpose(0, 1),
            position_ids_BS[0] == 0,
            arguments,
            tap,
        )

    def _check_segments(self, T: int, segments: torch.Tensor | None) -> None:
        """Refuse segments of the attention that are not the samples, with one read from the device."""
        offsets = self.request.offsets.long()
        is_bound = torch.zeros(T + 1, dtype=torch.bool, device=offsets.device)
        is_offset = is_bound.index_fill(0, offsets.clamp(max=T), True)
        if segments is None:
            is_bound[0] = True
            if len(offsets) == 2:  # One sample, which may be padded.
                is_bound |= is_offset
            else:
                is_bound[T] = True
        elif segments.dtype == torch.bool:
            is_bound = torch.cat([segments.to(offsets.device), is_bound.new_ones(1)])
        else:
            is_bound.index_fill_(0, segments.to(offsets.device).long(), True)
        # After the samples, the row may be padded to a multiple of the sequence-parallel size.
        of_samples = torch.arange(T + 1, device=offsets.device) <= offsets[-1]
        differs = ((is_bound != is_offset) & of_samples).any()
        if bool(differs | (offsets[-1] > T) | (is_offset.sum() != len(offsets))):
            bounds = is_bound.nonzero()[:, 0].tolist()
            raise ValueError(
                f"every segment of packed attention must be one sample; got segments {bounds} for samples "
                f"{offsets.tolist()}. Check the position ids: each sample starts at 0."
            )

    def _wants(self, layer: int, arguments: dict) -> bool:
        """Whether to capture this layer; raises if the masses would be wrong."""
        if layer not in self.request.layers:
            return False
        if self.has_gradients and not torch.is_grad_enabled():
            raise ValueError(
                f"attention masses under reentrant gradient checkpointing have no gradient; got layer {layer} without. "
                "Set gradient_checkpointing_kwargs={'use_reentrant': False}, or run the forward under no_grad."
            )
        for name in UNSUPPORTED_ARGUMENTS:
            if arguments.get(name) is not None:
                raise ValueError(
                    f"attention masses need a plain softmax over the keys; got {name} ({UNSUPPORTED_ARGUMENTS[name]}) "
                    f"in layer {layer}. Leave this layer out of `layers`."
                )
        return True

    def _reduce(self, layer, query_BHQD, key_BKSD, visibility: Visibility, scale: float | None, lse_BHQ) -> None:
        request = self.request
        valid_BQ = request.valid
        self.heads[layer] = query_BHQD.shape[1]
        if len(set(self.heads.values())) > 1:
            raise ValueError(
                f"captured layers must have the same number of query heads; got {self.heads} by layer. Select layers "
                "of one kind."
            )
        mass_BHQR = selected_mass(
            query_BHQD,
            key_BKSD,
            request.key_groups,
            visibility,
            valid_BQ,
            scale,
            request.num_groups,
            request.implementation,
            lse_BHQ,
            None if lse_BHQ is None else request.keys,
        )
        result = mass_BHQR if request.reduction is None else request.reduction(mass_BHQR, valid_BQ)
        # A checkpointed layer runs again in the backward pass: its first result is the one in the loss.
        self.by_layer.setdefault(layer, result)

    def _once(self, of: tuple, describe: Callable[[], Visibility]) -> Visibility:
        """The visibility of an earlier layer, if it comes `of` the same objects."""
        for known, visibility in self._described:
            if all(a is b for a, b in zip(known, of, strict=True)):
                return visibility
        self._described.append((of, describe()))
        return self._described[-1][1]

    def _visibility(self, attention_mask, positions_BQ, arguments, layer) -> Visibility:
        if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 4:
            if attention_mask.shape[1] != 1:
                raise ValueError(
                    f"attention masses need one mask for all heads; got a mask of shape {tuple(attention_mask.shape)} "
                    f"in layer {layer}. Leave this layer out of `layers`."
                )
            mask_BSS = attention_mask[:, 0].expand(positions_BQ.shape[0], -1, -1)
            rows_BQS = mask_BSS.gather(1, positions_BQ[:, :, None].expand(-1, -1, mask_BSS.shape[-1]))
            # An additive mask hides with the smallest number of its type, a boolean mask with False.
            visible = rows_BQS if rows_BQS.dtype == torch.bool else rows_BQS > torch.finfo(rows_BQS.dtype).min / 2
            return Visibility(positions_BQ, rows_BQS=visible)
        if isinstance(attention_mask, BlockMask):
            # FlexAttention's mask is a function of indices: ask it for the rows of the selected queries.
            B, S = self.request.roles.shape
            device = positions_BQ.device
            sample_B11, key_11S = torch.arange(B, device=device)[:, None, None], torch.arange(S, device=device)
            head_B11 = torch.zeros_like(sample_B11)
            rows_BQS = attention_mask.mask_mod(sample_B11, head_B11, positions_BQ[:, :, None], key_11S)
            return Visibility(positions_BQ, rows_BQS=rows_BQS.expand(B, positions_BQ.shape[1], S))
        key_mask_BS = None
        if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
            key_mask_BS = attention_mask.bool()
        elif attention_mask is not None:
            raise ValueError(
                f"attention masses read 4-D, 2-D and block masks or none; got {type(attention_mask).__name__} with "
                f"attn_implementation={self.request.attention!r}. Use sdpa, eager, flex_attention or "
                "flash_attention_2."
            )
        # Without a mask, sdpa and eager see the whole row: a packed row gets a mask, unless there is a cache. Flash
        # attention reads the position ids of a single row (modeling_flash_attention_utils.py `_is_packed_sequence`).
        segments_BS = None
        if key_mask_BS is None and "flash" in self.request.attention and positions_BQ.shape[0] == 1:
            segments_BS = packed_segments(arguments.get("position_ids"))
        return Visibility(positions_BQ, key_mask_BS, segments_BS, arguments.get("sliding_window"))


class CapturedMass:
    """Result of `capture_mass`, filled by the forward pass inside its `with` block.

    `roles` (B, S), `layers`, `positions` (B, Q) of the queries and `valid` (B, Q), False on padding, None for all
    positions without a padding mask.
    """

    def __init__(self, request: _Request):
        self._request = request
        self._forward: _Forward | None = None

    roles = property(lambda self: self._request.roles)
    layers = property(lambda self: self._request.layers)
    positions = property(lambda self: self._request.positions)
    valid = property(lambda self: self._request.valid)

    def begin(self) -> _Forward:
        if self._forward is not None:
            raise ValueError("capture_mass holds one forward pass; got a second. Open a new block for every forward.")
        self._forward = _Forward(self._request)
        return self._forward

    def per_layer(self) -> list[torch.Tensor]:
        """Results of the captured layers: (B, H, Q, R) masses, or their reduction, in the order of `layers`."""
        if self._forward is None:
            raise ValueError("capture_mass has seen no forward pass. Call the model inside the `with` block.")
        missing = [layer for layer in self.layers if layer not in self._forward.by_layer]
        if missing:
            raise ValueError(
                f"every captured layer must call transformers' attention interface; layers {missing} did not "
                f"(attn_implementation={self._request.attention!r}). An attention that is patched to bypass it, "
                "as verl does for packed rows in some families, cannot be captured: set model.use_remove_padding=False."
            )
        return [self._forward.by_layer[layer] for layer in self.layers]

    @property
    def mass(self) -> torch.Tensor:
        """(B, L, H, S, R) float32 masses, L in ascending order of layers; rows of other queries are 0."""
        mass_BLHQR = torch.stack(self.per_layer(), dim=1)
        if self._request.all_queries:
            return mass_BLHQR
        B, L, H, Q, R = mass_BLHQR.shape
        index = self.positions[:, None, None, :, None].expand(-1, L, H, -1, R)
        # Padding rows are 0 and their positions are not those of real queries, so adding them changes nothing.
        return mass_BLHQR.new_zeros(B, L, H, self.roles.shape[1], R).scatter_add(3, index, mass_BLHQR)


def _eager_of(module) -> Callable:
    """The eager attention function of the class of `module`.

    transformers passes it to `get_interface` as a default instead of registering it. There is one per file, or in a few
    files one for text and one for vision (models/llama4/modeling_llama4.py); the class's own forward says which.
    """
    for cls in type(module).__mro__:
        if "forward" not in vars(cls):
            continue
        forward = inspect.unwrap(vars(cls)["forward"])
        for name in forward.__code__.co_names:
            if name.endswith("eager_attention_forward"):
                return forward.__globals__[name]
    for cls in type(module).__mro__:  # The forward may have been replaced.
        function = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if function is not None:
            return function
    raise ValueError(
        "eager attention must be defined in the file of the attention class; got "
        f"{type(module).__qualname__} without one. Use attn_implementation='sdpa'."
    )


def _wrap(name: str) -> None:
    """Register the attention function `name` again with the capture around it. Idempotent."""
    original = None if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
    if name == "eager" and name in ALL_ATTENTION_FUNCTIONS or getattr(original, "_avar_capture", False):
        return

    def attention(module, query, key, value, attention_mask, *args, **kwargs):
        forward = kwargs.pop(KWARG, None)
        function = original if original is not None else _eager_of(module)
        if forward is not None and forward.wants_lse(module.layer_idx, query):
            with LseTap() as tap:
                out = function(module, query, key, value, attention_mask, *args, **kwargs)
            forward.observe(module, query, key, attention_mask, kwargs, tap)
            return out
        if (
            forward is not None
        ):  # Before attention, so that in the backward pass its gradients are added to those of attention.
            forward.observe(module, query, key, attention_mask, kwargs)
        return function(module, query, key, value, attention_mask, *args, **kwargs)

    attention._avar_capture = True
    AttentionInterface.register(name, attention)


def find_decoder(model: torch.nn.Module) -> torch.nn.Module:
    """The text decoder of a (possibly wrapped) vision-language model: the module that calls the attention layers.

    It is the module with `layers` whose config is the text config of the outermost model.

    Raises:
        ValueError: no or several such modules.
    """
    models = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    kind = models[0].config.get_text_config().model_type if models else None
    found = [
        part
        for part in models
        if isinstance(getattr(part, "layers", None), torch.nn.ModuleList) and part.config.model_type == kind
    ]
    if len(found) != 1:
        raise ValueError(
            f"attention is captured in the one text decoder of the model; got {len(found)} in {type(model).__name__}. "
            f"Pass a transformers model with one module that has `layers` and the text config ({kind})."
        )
    return found[0]


def _check_groups(key_groups: torch.Tensor, num_groups: int | None, roles: torch.Tensor) -> None:
    if key_groups.shape != roles.shape or num_groups is None or num_groups < 1:
        raise ValueError(
            f"key_groups must be (B, S) like roles, with num_groups >= 1; got {tuple(key_groups.shape)} for roles "
            f"{tuple(roles.shape)} and num_groups={num_groups}. Give every position a group."
        )
    if key_groups.numel() and not 0 <= int(key_groups.min()) <= int(key_groups.max()) < num_groups:
        raise ValueError(
            f"key_groups must be integers in [0, {num_groups}); got {int(key_groups.min())} to "
            f"{int(key_groups.max())}. Count the groups from 0."
        )


@contextmanager
def capture_mass(
    model: torch.nn.Module,
    roles: torch.Tensor,
    layers: Sequence[int] | None = None,
    query_role: int | Sequence[int] | None = None,
    reduction: Reduction | None = None,
    key_groups: torch.Tensor | None = None,
    num_groups: int | None = None,
    packed_offsets: torch.Tensor | None = None,
    columns: Sequence[int] | None = None,
    implementation: str = "auto",
):
    """Capture the attention masses of one forward pass.

    Args:
        model: a transformers vision-language model, bare or wrapped (FSDP, FSDP2, PEFT). Gradient checkpointing must be
            non-reentrant, as in verl.
        roles: (B, S) `TokenRole` of the positions the decoder sees, from a `RoleMap`.
        layers: decoder layers to capture; negative indices count from the end. Default: those with a full softmax
            over system and image keys (`model.layers.full_softmax_layers`). Layers with a window may be named.
        query_role: a `TokenRole`, or several, whose queries are measured; default all positions.
        reduction: `reduction(mass_BHQR, valid_BQ) -> tensor`, applied in every layer to the masses, which are then
            dropped; `valid_BQ` (None without a query_role) is False on padding.
        key_groups: (B, S) integers in [0, num_groups); sums attention by group instead of by role, for example one
            group per image token. R is then num_groups.
        packed_offsets: (B + 1,) starts of the samples and end of the last one, if the model runs on one packed row
            instead of padded samples. `roles`, `key_groups` and the masses keep the layout (B, S), with samples padded
            on the right.
        columns: roles (or groups) whose masses will be read, default all. The others are undefined (they may be nan);
            without gradients, leaving them out can save time.
        implementation: how masses are computed (`attention.mass.choose_implementation`).

    Yields:
        `CapturedMass`; its `mass` is (B, L, H, S, R) after the forward pass, with gradients if the pass has them.

    Raises:
        ValueError: a layer that is unknown or has no softmax, roles of another shape, a key/value cache, reentrant
            gradient checkpointing, an attention function that bypasses transformers' attention interface.

    >>> with capture_mass(model, roles, query_role=TokenRole.RESPONSE) as captured:  # doctest: +SKIP
    ...     model(**inputs)
    >>> share = captured.mass[..., TokenRole.IMAGE]  # doctest: +SKIP
    """
    if key_groups is not None:
        _check_groups(key_groups, num_groups, roles)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation must be one of {IMPLEMENTATIONS}; got {implementation!r}. Leave it at 'auto'."
        )
    decoder: Any = find_decoder(model)
    attention = decoder.config._attn_implementation
    request = _Request(
        roles,
        select_layers(decoder.config, layers, windowed=True),
        query_role,
        attention,
        reduction=reduction,
        key_groups=key_groups,
        num_groups=num_groups,
        offsets=packed_offsets,
        columns=None if columns is None else tuple(int(column) for column in columns),
        implementation=implementation,
    )
    captured = CapturedMass(request)
    _wrap(attention)

    def attach(_module, args, kwargs):
        forward = captured.begin()
        mask = kwargs.get("attention_mask")
        if isinstance(mask, dict):  # Made before the decoder, one for every kind of layer (Gemma 3).
            mask = mask.get("full_attention")
            if isinstance(mask, torch.Tensor) and mask.dim() == 4:
                # With padding on either side, the last row sees every real position.
                last_BS = mask[:, 0, -1].expand(roles.shape[0], -1)
                mask = last_BS if last_BS.dtype == torch.bool else last_BS > torch.finfo(last_BS.dtype).min / 2
        if isinstance(mask, torch.Tensor) and mask.dim() == 2:
            request.hide_padding(mask.bool())
        return args, {**kwargs, KWARG: forward}

    handle = decoder.register_forward_pre_hook(attach, with_kwargs=True)
    try:
        yield captured
    finally:
        handle.remove()


__all__ = [
    "CapturedMass",
    "TokenRole",
    "capture_mass",
    "find_decoder",
    "resolve_indices",
    "select_queries",
]
