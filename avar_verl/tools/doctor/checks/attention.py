# SPDX-License-Identifier: Apache-2.0
"""Whether masses, guidance and freezing work on this model.

Shape suffixes: B = samples, L = layers, H = query heads, Q = queries, S = positions, R = token roles.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from avar_verl.attention.capture import capture_mass, find_decoder
from avar_verl.model.freeze import freeze_vision
from avar_verl.model.layers import full_softmax_layers, refused_layers
from avar_verl.model.roles import TokenRole
from avar_verl.objectives.agto import agto_terms, mean_over_queries
from avar_verl.tools.doctor.check import check
from avar_verl.tools.doctor.subject import Subject

# For masses, and for outputs relative to the largest. Sound models are below 1e-5, unless their scores reach the
# hundreds, where float32 is less precise; a different mask or softmax is off by 1e-2 or more.
TOLERANCE, OUTPUT_TOLERANCE = 1e-4, 1e-3
# A batch with one image, with several, and without any; two samples are padded.
BATCH = ("one image", "two images of different shapes", "text only")


@contextmanager
def attention(model: torch.nn.Module, name: str) -> Iterator[None]:
    """Use another attention of the model inside the block."""
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    before = {key: config._attn_implementation for key, config in configs.items()}
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = before[key]


@dataclass
class Trace:
    """By layer: its input, and what its self-attention returned, (output, weights or None)."""

    inputs: dict[int, torch.Tensor] = field(default_factory=dict)
    outputs: dict[int, tuple] = field(default_factory=dict)


@contextmanager
def traced(decoder: torch.nn.Module, again: Trace | None = None) -> Iterator[Trace]:
    """Trace a forward pass; with `again`, every layer gets its input from that pass.

    Without `again`, rounding differences of two attentions add up over the vision tower and the layers, to 1e-3 and
    more.
    """
    trace = Trace()

    def enter(layer: int):
        def hook(_module, args, kwargs):
            if again is None:
                trace.inputs[layer] = args[0] if args else kwargs["hidden_states"]
                return args, kwargs
            entering = again.inputs[layer]
            return ((entering, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": entering})

        return hook

    def leave(layer: int):
        return lambda _module, _args, output: trace.outputs.update({layer: output})

    handles = []
    for index, layer in enumerate(decoder.layers):
        handles.append(layer.register_forward_pre_hook(enter(index), with_kwargs=True))
        if hasattr(layer, "self_attn"):
            handles.append(layer.self_attn.register_forward_hook(leave(index)))
    try:
        yield trace
    finally:
        for handle in handles:
            handle.remove()


def compare_with_eager(subject: Subject, inputs: dict[str, torch.Tensor], name: str) -> tuple[float, int]:
    """Compare masses and outputs of the attention `name` with those of the full matrices that eager attention returns.

    Returns:
        The largest difference between masses, and the number of layers.

    Raises:
        ValueError: the two differ, or masses do not sum to 1.
    """
    model, mask_BS = subject.model, inputs["attention_mask"]
    roles_BS, decoder = subject.role_map(inputs["input_ids"], mask_BS), find_decoder(model)
    with attention(model, name), traced(decoder) as trace, capture_mass(model, roles_BS) as captured:
        model(**inputs, use_cache=False)
    with attention(model, "eager"), traced(decoder, again=trace) as eager:
        model(**inputs, use_cache=False)
    mass_BLHSR, real_BS1 = captured.mass, mask_BS[..., None].float()
    off = float((mass_BLHSR.sum(-1) - mask_BS[:, None, None].float()).abs().max())
    if not off <= TOLERANCE:
        raise ValueError(f"the masses of a real query must sum to 1; got {off:.1e} off under {name}.")
    onehot_B1SR = torch.nn.functional.one_hot(roles_BS, len(TokenRole)).float()[:, None]
    worst = 0.0
    for index, layer in enumerate(captured.layers):
        output_BSD, weights_BHSS = eager.outputs[layer][:2]
        expected_BHSR = (weights_BHSS @ onehot_B1SR) * real_BS1[:, None]
        difference = float((mass_BLHSR[:, index] - expected_BHSR).abs().max())
        if not difference <= TOLERANCE:
            raise ValueError(
                f"masses must equal the sums of eager attention; got a difference of {difference:.1e} in layer {layer} "
                f"under {name}."
            )
        worst = max(worst, difference)
        apart = float(((trace.outputs[layer][0] - output_BSD) * real_BS1).abs().max() / output_BSD.abs().max())
        if not apart <= OUTPUT_TOLERANCE:
            raise ValueError(
                f"{name} must compute the softmax that eager attention does; got outputs {apart:.1e} of the largest "
                f"apart in layer {layer}."
            )
    return worst, len(captured.layers)


@check(
    "masses",
    prevents="Guidance and reward are functions of attention masses. An attention that hides its softmax, or masks in "
    "an unusual way, yields masses that are not the model's.",
    fix="Run the model with attn_implementation=sdpa, or leave the named layers out (avar.agto.layers, "
    "avar.vars.layers).",
    needs=["roles", "images"],
)
@torch.no_grad()
def masses(subject: Subject) -> str:
    samples = [subject.samples[name] for name in BATCH]
    default = find_decoder(subject.model).config._attn_implementation
    names = list(dict.fromkeys(("sdpa", default)))
    found = [
        compare_with_eager(subject, subject.inputs(samples, side), name) for side in ("left", "right") for name in names
    ]
    worst, num_layers = max(found)
    note = "; only self-attention layers, no VAS: images are in other layers" if subject.family.cross_attention else ""
    return (
        f"{num_layers} layers under {' and '.join(names)}, padded on either side: max |difference| {worst:.0e} from "
        f"eager{note}"
    )


def projections(model: torch.nn.Module, layer: int) -> dict[str, torch.nn.Parameter]:
    """Weights of a layer that produce queries and keys."""
    named = dict(find_decoder(model).layers[layer].self_attn.named_parameters())
    chosen = {name: value for name, value in named.items() if name in ("q_proj.weight", "k_proj.weight")}
    return chosen or {name: value for name, value in named.items() if "qkv" in name}


@check(
    "guidance",
    prevents="A guidance term without a gradient teaches nothing; one that is not finite destroys the model.",
    fix="Leave out the named layers (avar.agto.layers); a model whose q and k carry no gradient cannot be guided.",
    needs=["masses"],
)
def guidance(subject: Subject) -> str:
    model = subject.model
    inputs = subject.inputs([subject.samples[name] for name in BATCH])
    roles_BS = subject.role_map(inputs["input_ids"], inputs["attention_mask"])
    layers = full_softmax_layers(model.config.get_text_config())
    wanted = {(layer, name): weight for layer in layers for name, weight in projections(model, layer).items()}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for weight in wanted.values():
        weight.requires_grad_(True)
    try:
        with capture_mass(model, roles_BS, query_role=TokenRole.USER, reduction=mean_over_queries) as captured:
            model(**inputs, use_cache=False)
        mean_BLHR = torch.stack(captured.per_layer(), dim=1)
        has_image_B = None
        if subject.family.cross_attention:
            has_image_B = torch.tensor([bool(subject.samples[name].features) for name in BATCH], device=roles_BS.device)
        terms = agto_terms(mean_BLHR, roles_BS, captured.valid, has_image_B=has_image_B)
        parts = {"L_suppress": (terms.suppress_B, terms.has_suppress_B, TokenRole.SYSTEM)}
        if not subject.family.cross_attention:
            parts["L_enhance"] = (terms.enhance_B, terms.has_enhance_B, TokenRole.IMAGE)
        told, blind = [], []
        for term, (loss_B, has_B, role) in parts.items():
            if not bool(has_B.any()):
                raise ValueError(
                    f"{term} needs a sample with {role.name} keys and a question; got none in the samples."
                )
            # In a layer with a window, no query may see the keys; then there is no gradient.
            sees_L = (mean_BLHR[has_B][..., role] > 0).any(-1).any(0).tolist()
            blind += [
                f"layer {layer} sees no {role.name}" for layer, sees in zip(layers, sees_L, strict=True) if not sees
            ]
            gradients = torch.autograd.grad(loss_B.sum(), list(wanted.values()), retain_graph=True, allow_unused=True)
            norms = []
            for (layer, name), gradient in zip(wanted, gradients, strict=True):
                norm = 0.0 if gradient is None else float(gradient.norm())
                if not (0.0 < norm < float("inf")) and sees_L[layers.index(layer)]:
                    raise ValueError(
                        f"{term} must have a finite, nonzero gradient in every layer; got norm {norm} in "
                        f"{name} of layer {layer}."
                    )
                norms.append(norm)
            told.append(f"|d {term}| {min(norms):.0e} to {max(norms):.0e}")
        loss = 0.0 * terms.suppress_B.sum() + 0.0 * terms.enhance_B.sum()
        nothing = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
        left = max(float(gradient.abs().max()) for gradient in nothing if gradient is not None)
        if left != 0.0:
            raise ValueError(f"guidance with weights of 0 must have no gradient; got {left}.")
    finally:
        for parameter in model.parameters():
            parameter.requires_grad_(True)
    detail = f"{', '.join(told)} in {len(wanted)} projections of q and k; none with weights of 0"
    detail = f"{detail}; {', '.join(blind)}" if blind else detail
    others: dict[str, list[int]] = {}
    for layer, reason in refused_layers(subject.config.get_text_config()).items():
        others.setdefault(reason, []).append(layer)
    left = "".join(f"; left out: layers {numbers}, {reason}" for reason, numbers in others.items())
    return detail + left


def _response_loss(subject: Subject) -> torch.Tensor:
    """Cross-entropy of the responses of a sample with an image."""
    inputs = subject.inputs([subject.samples["one image"]])
    logits_BSV = subject.model(**inputs, use_cache=False).logits
    response_BS = subject.role_map(inputs["input_ids"], inputs["attention_mask"]) == TokenRole.RESPONSE
    targets_BS = inputs["input_ids"].masked_fill(~response_BS, -100)
    return torch.nn.functional.cross_entropy(logits_BSV[0, :-1].float(), targets_BS[0, 1:])


@check(
    "freezing",
    prevents="A wrong parameter name freezes nothing, only a part, or the language model, and training continues.",
    fix="Correct vision_tower and projectors of the family in avar_verl/model/families.",
    needs=["weights", "roles"],
)
def freezing(subject: Subject) -> str:
    model, model_type = subject.model, subject.config.model_type
    try:
        named = dict(model.named_parameters())
        decoder = find_decoder(model)
        language = {id(parameter) for parameter in decoder.parameters()}
        output = model.get_output_embeddings()
        language |= {id(parameter) for parameter in output.parameters()} if output is not None else set()
        decoder_name = next(name for name, module in model.named_modules() if module is decoder)
        parts = {}
        for part in ("tower", "projector"):
            parts[part] = set(freeze_vision(model, model_type, tower=part == "tower", projector=part == "projector"))
        frozen = {name for name, parameter in named.items() if not parameter.requires_grad}
        if frozen != parts["tower"] | parts["projector"] or parts["tower"] & parts["projector"]:
            raise ValueError("tower and projector must be two parts, and freezing must name them; got others frozen.")
        wrong = sorted(name for name in frozen if id(named[name]) in language)
        if wrong:
            raise ValueError(f"freezing the vision part must not freeze the language model; got {wrong[:3]} frozen.")
        # A parameter without its own module (image_newline) belongs to neither part.
        others = sorted(name for name, value in named.items() if name not in frozen and id(value) not in language)
        loose = [name for name in others if decoder_name.startswith(name.rpartition(".")[0] + ".")]
        if len(loose) < len(others):
            left = [name for name in others if name not in loose]
            raise ValueError(
                f"freezing tower and projector must freeze all of the vision part; got {len(left)} parameters that "
                f"train on: {', '.join(left[:3])}."
            )
        before = {name: named[name].detach().clone() for name in frozen}
        _response_loss(subject).backward()
        trained = [parameter for parameter in named.values() if parameter.grad is not None]
        old = [parameter.detach().clone() for parameter in trained]
        torch.optim.SGD([parameter for parameter in named.values() if parameter.requires_grad], lr=1.0).step()
        moved = [name for name in sorted(frozen) if not torch.equal(named[name], before[name])]
        if moved:
            raise ValueError(f"a step must not change frozen parameters; got changes in {', '.join(moved[:3])}.")
        num_moved = sum(not torch.equal(one, other) for one, other in zip(trained, old, strict=True))
        if not num_moved:
            raise ValueError("a step must change the language model; got no change.")
    finally:
        subject.forget_model()
    note = f"; {', '.join(loose)} belongs to neither" if loose else ""
    return (
        f"{len(parts['tower'])} tensors of the tower and {len(parts['projector'])} of the projector stay, {num_moved} "
        f"of the language model move{note}"
    )
