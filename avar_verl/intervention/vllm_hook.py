# SPDX-License-Identifier: Apache-2.0
"""The intervention in vLLM 0.24 (V1 engine, V1 model runner): keys are scaled as they enter the key/value cache.

An engine must be started for it, with a default setting for requests without one of their own:

    LLM(model, additional_config={"avar_intervention": True})
    vllm serve MODEL --additional-config '{"avar_intervention": "alpha_img=0.15,alpha_sys=0.4"}'

A request sets it with `SamplingParams(extra_args={"avar_intervene": "alpha_img=0.15"})`, or over HTTP with
`"vllm_xargs": {"avar_intervene": "alpha_img=0.15"}`. Requests in one batch may have different settings.

There are two patches, which `avar_verl.plugin.vllm_plugin` applies when vLLM imports the modules:

1. `InputProcessor.process_inputs` (vllm/v1/engine/input_processor.py:242): every prompt becomes an engine request here.
   Placeholders are expanded, errors reach the caller, and the cache salt can still be set.
2. `GPUModelRunner.initialize_kv_cache` (vllm/v1/worker/gpu_model_runner.py:7309), which the CPU runner inherits. At
   this point the model is loaded, and no CUDA graph has been captured.

In an engine that was not started for it, the only cost is one look-up in `extra_args` per request. Otherwise, a
`KeyScaler` hooks the runner's `_prepare_inputs` (gpu_model_runner.py:1889), which knows the tokens of the step, and
runs before `do_kv_cache_update` and `forward` of every layer's `AttentionImpl`
(vllm/model_executor/layers/attention/attention.py, `unified_kv_cache_update`, `unified_attention_with_output`). This is
inside vLLM's opaque operators, so compiled graphs stay those of vLLM. Both methods get the key as the model made it,
and a backend may write it to the cache in either or both (cpu_attn.py does), so both get the scaled key. The factors of
the tokens are in buffers with fixed addresses. A captured CUDA graph contains the multiplication and reads them; other
steps multiply only if they have tokens to scale.

Blocks of the prefix cache hold scaled keys, so the setting is part of the request's cache salt. (A response is never
scaled. If it becomes part of a later prompt and contains a system turn or a placeholder, those blocks stay unscaled
while they are cached.)

Shape suffixes: L = layers of this rank, T = tokens of a step, G = settings of a step by role, K = key/value heads of
this rank, D = head size
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from avar_verl.intervention.spec import InterventionSpec, scale_keys
from avar_verl.model.families import get_family
from avar_verl.model.layers import key_value_heads
from avar_verl.model.roles import RoleMap, TokenRole

ENGINE_KEY = "avar_intervention"
REQUEST_KEY = "avar_intervene"
# In extra_args of a running request: [first, stop, role] of the prompt's tokens that are scaled.
RUNS_KEY = "avar_key_runs"


# ---- for whoever starts an engine or sends a request --------------------------------------------------------------


def engine_arguments(default: InterventionSpec | str | None = None) -> dict[str, Any]:
    """Keyword arguments of `vllm.LLM` (or `AsyncEngineArgs`) that let requests ask for the intervention.

    Args:
        default: setting of requests without one of their own; None scales nothing.

    >>> engine_arguments("alpha_img=0.15")
    {'additional_config': {'avar_intervention': 'alpha_img=0.15,alpha_sys=0.0'}}
    """
    spec = InterventionSpec.of(default)
    return {"additional_config": {ENGINE_KEY: True if spec.is_identity else str(spec)}}


def request_arguments(spec: InterventionSpec | str | None) -> dict[str, Any]:
    """`extra_args` of `SamplingParams`, or `vllm_xargs` of an HTTP request, for a setting.

    None means the engine's default; `InterventionSpec()` means no intervention.

    >>> request_arguments("alpha_img=0.15")
    {'avar_intervene': 'alpha_img=0.15,alpha_sys=0.0'}
    """
    return {} if spec is None else {REQUEST_KEY: str(InterventionSpec.of(spec))}


# ---- the process that takes requests ------------------------------------------------------------------------------


def engine_default(additional_config: Any) -> InterventionSpec | None:
    """The default setting of an engine; None if it was not started for the intervention.

    Raises:
        ValueError: a value that is neither true nor a spec.
    """
    value = additional_config.get(ENGINE_KEY) if isinstance(additional_config, dict) else None
    if value is None or value is False:
        return None
    if value is True:
        return InterventionSpec()
    if not isinstance(value, str):
        raise ValueError(
            f"additional_config[{ENGINE_KEY!r}] must be true or a spec; got {value!r}. Use "
            "avar_verl.intervention.vllm_hook.engine_arguments."
        )
    return InterventionSpec.parse(value)


def requested(extra_args: dict | None, default: InterventionSpec | None) -> InterventionSpec:
    """The setting of a request: its own, or else the engine's default.

    Raises:
        ValueError: a spec that cannot be parsed, or one for an engine that was not started for it.
    """
    text = (extra_args or {}).get(REQUEST_KEY)
    if text is not None and not isinstance(text, str):
        raise ValueError(f"{REQUEST_KEY} must be the text of a spec; got {text!r}. Write alpha_img=0.15.")
    spec = default or InterventionSpec() if text is None else InterventionSpec.parse(text)
    if default is None and not spec.is_identity:
        raise ValueError(
            f"an intervention needs an engine that was started for it; got {REQUEST_KEY}={text!r} in one that was not. "
            f'Start it with additional_config={{"{ENGINE_KEY}": true}}.'
        )
    return spec


def key_runs(roles_S: Sequence[int], spec: InterventionSpec) -> list[list[int]]:
    """[first, stop, role] of the consecutive tokens of a role whose keys the spec changes, in order.

    >>> key_runs([1, 1, 3, 2, 2, 2, 3], InterventionSpec(alpha_img=0.15))
    [[3, 6, 2]]
    """
    changed: dict[int, bool] = {TokenRole.IMAGE: spec.alpha_img != 0, TokenRole.SYSTEM: spec.alpha_sys != 0}
    runs: list[list[int]] = []
    for position, role in enumerate(roles_S):
        if not changed.get(role, False):
            continue
        if runs and runs[-1][1:] == [position, role]:
            runs[-1][1] += 1
        else:
            runs.append([position, position + 1, int(role)])
    return runs


def plan_request(request: Any, spec: InterventionSpec, role_map: RoleMap, model_config: Any) -> None:
    """Tell the workers which keys of a request to scale, and separate its blocks in the prefix cache.

    Raises:
        ValueError: layers or heads that the model does not have or that cannot be selected, a prompt of embeddings, or
            one that arrives in parts.
    """
    spec.chosen_layers(model_config.hf_text_config)
    spec.key_factors(model_config.model_arch_config.total_num_attention_heads, model_config.get_total_num_kv_heads())
    if request.prompt_token_ids is None or request.prompt_embeds is not None or request.resumable:
        what = "one that arrives in parts" if request.resumable else "embeddings"
        raise ValueError(
            f"an intervention reads the roles of a prompt from its token ids; got {what}. Send text or token ids, all "
            "at once."
        )
    ids_1S = torch.tensor([request.prompt_token_ids])
    runs = key_runs(role_map(ids_1S, torch.ones_like(ids_1S))[0].tolist(), spec)
    params = request.sampling_params
    rest = {key: value for key, value in (params.extra_args or {}).items() if key != REQUEST_KEY}
    params.extra_args = {**rest, **request_arguments(spec), RUNS_KEY: runs}
    request.cache_salt = f"{request.cache_salt or ''}|{REQUEST_KEY}:{spec}"


def _patch(cls: type, name: str, around: Callable) -> None:
    """Replace a method by `around(original, self, *args, **kwargs)`. Idempotent."""
    original = getattr(cls, name)
    if hasattr(original, "_avar_intervention"):
        return

    @functools.wraps(original)
    def patched(self, *args, **kwargs):
        return around(original, self, *args, **kwargs)

    patched._avar_intervention = True  # pyright: ignore[reportAttributeAccessIssue]
    setattr(cls, name, patched)


def patch_input_processor(module: Any) -> None:
    """Plan requests where vLLM makes them. Idempotent."""

    def process_inputs(original, self, *args, **kwargs):
        request = original(self, *args, **kwargs)
        params = request.sampling_params
        if params is None:  # Pooling.
            return request
        if RUNS_KEY in (params.extra_args or {}):
            raise ValueError(f"{RUNS_KEY} belongs to the engine; got it in a request. Send only {REQUEST_KEY}.")
        default = engine_default(self.vllm_config.additional_config)
        spec = requested(params.extra_args, default)
        if not spec.is_identity:
            if not hasattr(self, "_avar_role_map"):
                self._avar_role_map = RoleMap.from_pretrained(self.get_tokenizer(), self.model_config.hf_config)
            plan_request(request, spec, self._avar_role_map, self.model_config)
        return request

    _patch(module.InputProcessor, "process_inputs", process_inputs)


# ---- the processes that compute -----------------------------------------------------------------------------------


def check_engine(vllm_config: Any) -> None:
    """Refuse engines in which the tokens of a step are not where `KeyScaler` looks for them, or keys go another way.

    Raises:
        ValueError: with the option to leave out.
    """
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    refused = {
        "the V2 model runner (set VLLM_USE_V2_MODEL_RUNNER=0)": vllm_config.use_v2_model_runner,
        "speculative_config": vllm_config.speculative_config is not None,
        "kv_transfer_config": vllm_config.kv_transfer_config is not None,
        "enable_dbo or ubatch_size": parallel.use_ubatching,
        "prefill_context_parallel_size": parallel.prefill_context_parallel_size > 1,
        "enable_sleep_mode": model.enable_sleep_mode,
        "fuse_rope_kvcache": bool(vllm_config.compilation_config.pass_config.fuse_rope_kvcache),
        "multi-head latent attention (another model)": model.use_mla,
    }
    found = [name for name, is_on in refused.items() if is_on]
    if found:
        raise ValueError(
            f"an engine with {ENGINE_KEY} must run without {', '.join(refused)}; got {', '.join(found)}. Leave it out."
        )
    if get_family(model.hf_config.model_type).cross_attention:
        raise ValueError(
            "the intervention weighs image keys against other keys of the same softmax; got "
            f"{model.hf_config.model_type}, which reads images in cross-attention layers. Use a model that reads them "
            "in its self-attention."
        )


def check_layer(name: str, layer: Any) -> None:
    """Refuse layers whose logits are not linear in the keys they are given.

    Raises:
        ValueError: a cap on the logits, a bias by position, or keys of another layer.
    """
    for what, found in (
        ("logits_soft_cap", getattr(layer.impl, "logits_soft_cap", None)),
        ("alibi_slopes", getattr(layer.impl, "alibi_slopes", None)),
        ("kv_sharing_target_layer_name", layer.kv_sharing_target_layer_name),
    ):
        if found is not None and not (isinstance(found, int | float) and found == 0):
            raise ValueError(
                f"rescaling keys rescales logits only in plain attention; got {what}={found} in {name}. Use another "
                "model."
            )


def head_of_rank(head: int, rank: int, size: int, num_kv_heads: int, num_of_rank: int) -> int:
    """Index in the model of the key/value head that is `head` on a tensor-parallel rank. vLLM splits heads in order
    and, with more ranks than heads, repeats each one.

    >>> [head_of_rank(head, 1, 2, 4, 2) for head in range(2)], [head_of_rank(0, rank, 4, 2, 1) for rank in range(4)]
    ([2, 3], [0, 0, 1, 1])
    """
    return (rank * num_of_rank + head) * num_kv_heads // (size * num_of_rank)


def is_capturing(tensor: torch.Tensor) -> bool:
    """Whether operations on the tensor are being captured in a CUDA graph."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


class KeyScaler:
    """Scales keys in one model runner.

    Args:
        layers: indices in the model of this rank's layers, ascending.
        heads: indices in the model of this rank's key/value heads.
        text_config, num_heads, num_kv_heads: of the whole model.
        index_T: buffer (T,) of int64; the table row of each token of the step. Row 0 is all ones.
        table_LGK: buffer (L, G, K) of float32, with two rows (one per role) for each request that a step can have.

    Buffers are vLLM's `CpuGpuBuffer`. They are rewritten in every step that has tokens to scale.
    """

    def __init__(
        self,
        layers: Sequence[int],
        heads: Sequence[int],
        text_config: Any,
        num_heads: int,
        num_kv_heads: int,
        index_T: Any,
        table_LGK: Any,
    ):
        self.layers, self.heads = list(layers), list(heads)
        self.text_config, self.num_heads, self.num_kv_heads = text_config, num_heads, num_kv_heads
        self.index_T, self.table_LGK = index_T, table_LGK
        self.table_LGK.np[:, 0] = 1.0
        self.table_LGK.copy_to_gpu()
        self.active = False
        self.rows_of = functools.lru_cache(maxsize=1024)(self._rows_of)

    def _rows_of(self, text: str) -> tuple[list[int], np.ndarray]:
        """Table indices of this rank's selected layers, and (K, R) factors of this rank's heads."""
        spec = InterventionSpec.parse(text)
        chosen = set(spec.chosen_layers(self.text_config))
        factors_KR = spec.key_factors(self.num_heads, self.num_kv_heads)[self.heads].numpy()
        return [at for at, layer in enumerate(self.layers) if layer in chosen], factors_KR

    def stand_before(self, impl: Any, at: int) -> None:
        """Give scaled keys to both methods of the `AttentionImpl` of the layer with table index `at`."""
        forward: Any = impl.forward
        update: Any = getattr(impl, "do_kv_cache_update", None)

        def scaled_forward(layer, query, key, *args, **kwargs):
            return forward(layer, query, self.scale(at, key), *args, **kwargs)

        def scaled_update(layer, key, *args, **kwargs):
            return update(layer, self.scale(at, key), *args, **kwargs)

        impl.forward = scaled_forward
        if update is not None:
            impl.do_kv_cache_update = scaled_update

    def prepare(self, batch: Any, requests: dict[str, Any], num_scheduled: np.ndarray) -> None:
        """Prepare a step with the requests of the runner's input batch and their numbers of tokens."""
        num_computed = batch.num_computed_tokens_cpu[: batch.num_reqs]
        # In most steps, all tokens are response tokens.
        if self.active or bool((num_computed < batch.num_prompt_tokens[: batch.num_reqs]).any()):
            params = [requests[name].sampling_params for name in batch.req_ids]
            self.write([None if p is None else p.extra_args for p in params], num_computed, num_scheduled)

    def write(self, extra_args: Sequence[dict | None], num_computed: np.ndarray, num_scheduled: np.ndarray) -> None:
        """Fill the buffers for a step with the tokens of these requests, in order."""
        rows: dict[str, int] = {}
        index_T, table_LGK = self.index_T.np, self.table_LGK.np
        was_active, self.active = self.active, False
        index_T[:] = 0  # Also after the last token, where vLLM pads.
        start = 0
        for asked, computed, count in zip(extra_args, num_computed.tolist(), num_scheduled.tolist(), strict=True):
            extra = asked or {}
            for first, stop, role in extra.get(RUNS_KEY, ()):
                first, stop = max(first, computed), min(stop, computed + count)
                if first < stop:
                    text = extra[REQUEST_KEY]
                    row = rows.setdefault(text, 1 + 2 * len(rows)) + (role == TokenRole.SYSTEM)
                    index_T[start + first - computed : start + stop - computed] = row
                    self.active = True
            start += count
        for text, row in rows.items():
            layers, factors_KR = self.rows_of(text)
            for offset, role in enumerate((TokenRole.IMAGE, TokenRole.SYSTEM)):
                table_LGK[:, row + offset] = 1.0
                table_LGK[layers, row + offset] = factors_KR[:, role]
        if self.active:
            self.table_LGK.copy_to_gpu()
        if self.active or was_active:
            self.index_T.copy_to_gpu()

    def scale(self, at: int, key_TKD: torch.Tensor | None) -> torch.Tensor | None:
        """The scaled keys of a step in the layer with table index `at`.

        A captured CUDA graph is replayed in steps with and without tokens to scale, so it always multiplies.
        """
        if key_TKD is None or not (self.active or is_capturing(key_TKD)):
            return key_TKD
        factors_TK = self.table_LGK.gpu[at].index_select(0, self.index_T.gpu[: key_TKD.shape[0]])
        return scale_keys(key_TKD, factors_TK[..., None])


def attach(runner: Any) -> KeyScaler:
    """Attach a `KeyScaler` to a model runner that has its model and its cache.

    Raises:
        ValueError: anything that `check_engine` or `check_layer` refuses, layers of another kind, or with different
            numbers of key/value heads.
    """
    from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
    from vllm.model_executor.layers.attention.attention import Attention
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.model_executor.models.utils import extract_layer_index

    check_engine(runner.vllm_config)
    model_config = runner.model_config
    context = runner.compilation_config.static_forward_context  # Experts are in it too.
    named = {name: layer for name, layer in context.items() if isinstance(layer, AttentionLayerBase)}
    layers = {extract_layer_index(name): layer for name, layer in named.items() if type(layer) is Attention}
    first, stop = model_config.get_layers_start_end_indices(runner.vllm_config.parallel_config)
    if sorted(layers) != list(range(first, stop)) or len(layers) != len(named):
        raise ValueError(
            f"every layer with a key/value cache must be a self-attention layer of the decoder, one for each of "
            f"{first} to {stop - 1}; got {sorted(named)}. Use another model."
        )
    for name, layer in named.items():
        check_layer(name, layer)
    key_value_heads(model_config.hf_text_config, range(first, stop))
    rank, size = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    num_kv_heads, num_of_rank = model_config.get_total_num_kv_heads(), layers[first].num_kv_heads
    scaler = KeyScaler(
        range(first, stop),
        [head_of_rank(head, rank, size, num_kv_heads, num_of_rank) for head in range(num_of_rank)],
        model_config.hf_text_config,
        model_config.model_arch_config.total_num_attention_heads,
        num_kv_heads,
        runner._make_buffer(runner.max_num_tokens, dtype=torch.int64),
        runner._make_buffer(len(layers), 1 + 2 * runner.max_num_reqs, num_of_rank, dtype=torch.float32),
    )
    for at, layer in enumerate(range(first, stop)):
        scaler.stand_before(layers[layer].impl, at)
    original = runner._prepare_inputs

    def prepare_inputs(scheduler_output, num_scheduled_tokens):
        out = original(scheduler_output, num_scheduled_tokens)  # May reorder the batch.
        scaler.prepare(runner.input_batch, runner.requests, num_scheduled_tokens)
        return out

    runner._prepare_inputs = prepare_inputs
    return scaler


def patch_model_runner(module: Any) -> None:
    """Attach a `KeyScaler` to a runner if the engine was started for the intervention. Idempotent."""

    def initialize_kv_cache(original, self, kv_cache_config, is_profiling=False):
        original(self, kv_cache_config, is_profiling)
        wanted = engine_default(self.vllm_config.additional_config) is not None
        if wanted and not is_profiling and not hasattr(self, "avar_key_scaler"):
            self.avar_key_scaler = attach(self)

    _patch(module.GPUModelRunner, "initialize_kv_cache", initialize_kv_cache)
