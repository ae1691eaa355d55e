# SPDX-License-Identifier: Apache-2.0
"""The parts of the intervention in vLLM, without an engine, and what they rely on in vLLM's source."""

import ast
import functools
import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from avar_verl.intervention import vllm_hook
from avar_verl.intervention.spec import InterventionSpec
from avar_verl.intervention.vllm_hook import (
    REQUEST_KEY,
    RUNS_KEY,
    KeyScaler,
    check_engine,
    check_layer,
    engine_arguments,
    engine_default,
    head_of_rank,
    key_runs,
    patch_input_processor,
    patch_model_runner,
    plan_request,
    request_arguments,
    requested,
)
from avar_verl.roles import TokenRole

SYSTEM, IMAGE = int(TokenRole.SYSTEM), int(TokenRole.IMAGE)
SPEC = "alpha_img=0.25,alpha_sys=0.5"

# ---- what engines and requests are given ---------------------------------------------------------------------------


def test_arguments_come_out_as_they_went_in():
    for default in (None, InterventionSpec(), SPEC, InterventionSpec(0.1, 0.0, (1,), (0, 1))):
        found = engine_default(engine_arguments(default)["additional_config"])
        assert found == InterventionSpec.of(default)
        assert requested(None, found) == found
    assert requested(request_arguments(SPEC), InterventionSpec()) == InterventionSpec(0.25, 0.5)
    # What a request asks for goes before the default, also if that is nothing.
    assert requested(request_arguments("alpha_img=0"), InterventionSpec(0.25)).is_identity
    assert request_arguments(None) == {}


@pytest.mark.parametrize("config", [{}, {"gdn_prefill_backend": "auto"}, {"avar_intervention": False}, object()])
def test_engines_that_were_not_started_for_it(config):
    assert engine_default(config) is None
    assert requested(None, None).is_identity and requested({REQUEST_KEY: "layers=1"}, None).is_identity
    with pytest.raises(ValueError, match="needs an engine that was started for it; got avar_intervene='alpha_img=0.25"):
        requested(request_arguments(SPEC), None)


def test_values_of_other_kinds_are_refused():
    with pytest.raises(ValueError, match="must be true or a spec; got 1.5"):
        engine_default({"avar_intervention": 1.5})
    with pytest.raises(ValueError, match="must be the text of a spec; got 0.15"):
        requested({REQUEST_KEY: 0.15}, InterventionSpec())


def test_runs_by_hand():
    roles = [1, 1, 0, 3, 2, 2, 3, 2, 1, 2, 4]
    assert key_runs(roles, InterventionSpec.parse(SPEC)) == [[0, 2, 1], [4, 6, 2], [7, 8, 2], [8, 9, 1], [9, 10, 2]]
    assert key_runs(roles, InterventionSpec(alpha_img=1)) == [[4, 6, 2], [7, 8, 2], [9, 10, 2]]
    assert key_runs(roles, InterventionSpec(alpha_sys=1)) == [[0, 2, 1], [8, 9, 1]]
    assert key_runs([], InterventionSpec(alpha_img=1)) == []


MODEL = SimpleNamespace(
    hf_text_config=SimpleNamespace(num_hidden_layers=3),
    get_total_num_kv_heads=lambda: 2,
    model_arch_config=SimpleNamespace(total_num_attention_heads=4),
)


def roles_are_ids(ids_BS, mask_BS):
    """A role map for prompts of roles."""
    assert mask_BS.all()
    return ids_BS


def new_request(ids=(1, 2, 2, 3), **fields):
    values = {
        "prompt_token_ids": list(ids),
        "prompt_embeds": None,
        "resumable": False,
        "cache_salt": None,
        "sampling_params": SimpleNamespace(extra_args=None),
    }
    return SimpleNamespace(**values | fields)


def test_the_plan_of_a_request():
    request = new_request(cache_salt="mine", sampling_params=SimpleNamespace(extra_args={"other": 1}))
    plan_request(request, InterventionSpec.parse(SPEC), roles_are_ids, MODEL)
    assert request.sampling_params.extra_args == {"other": 1, REQUEST_KEY: SPEC, RUNS_KEY: [[0, 1, 1], [1, 3, 2]]}
    assert request.cache_salt == f"mine|avar_intervene:{SPEC}"
    salts = set()
    for text in (SPEC, "alpha_img=0.25", "alpha_sys=0.5", f"{SPEC},layers=1", f"{SPEC},heads=0-1"):
        request = new_request()
        plan_request(request, InterventionSpec.parse(text), roles_are_ids, MODEL)
        salts.add(request.cache_salt)
    assert len(salts) == 5


@pytest.mark.parametrize(
    "spec, fields, message",
    [
        ("alpha_img=1,layers=3", {}, "layers must be among the 3"),
        ("alpha_img=1,heads=1", {}, "must be chosen together: 0 to 1"),
        (SPEC, {"prompt_token_ids": None}, "token ids; got embeddings"),
        (SPEC, {"prompt_embeds": torch.zeros(4, 2)}, "token ids; got embeddings"),
        (SPEC, {"resumable": True}, "token ids; got one that arrives in parts"),
    ],
)
def test_requests_that_cannot_be_planned_are_refused(spec, fields, message):
    with pytest.raises(ValueError, match=message):
        plan_request(new_request(**fields), InterventionSpec.parse(spec), roles_are_ids, MODEL)


class InputProcessor:
    """Stands for vLLM's."""

    def __init__(self, config):
        self.vllm_config = SimpleNamespace(additional_config=config)
        self.model_config = SimpleNamespace(**vars(MODEL), hf_config="config")

    def get_tokenizer(self):
        return "tokenizer"

    def process_inputs(self, request_id, prompt, params):
        return new_request(prompt, sampling_params=params)


@pytest.fixture
def make_processor(monkeypatch):
    """`make_processor(additional_config)` -> an input processor that is patched."""
    asked = []
    monkeypatch.setattr(vllm_hook.RoleMap, "from_pretrained", lambda *args: asked.append(args) or roles_are_ids)

    class Patched(InputProcessor):
        process_inputs = InputProcessor.process_inputs

    module = SimpleNamespace(InputProcessor=Patched)
    patch_input_processor(module)
    patched = Patched.process_inputs
    patch_input_processor(module)
    assert Patched.process_inputs is patched is not InputProcessor.process_inputs  # Patched once.
    yield Patched
    assert len(asked) <= 1


def test_requests_are_planned_where_they_are_made(make_processor):
    processor = make_processor(engine_arguments("alpha_sys=0.5")["additional_config"])
    ask = lambda **extra: processor.process_inputs("id", (1, 2), SimpleNamespace(extra_args=extra or None))  # noqa: E731
    assert ask().sampling_params.extra_args[RUNS_KEY] == [[0, 1, 1]]
    assert ask(avar_intervene="alpha_img=1").sampling_params.extra_args[RUNS_KEY] == [[1, 2, 2]]
    alone = ask(avar_intervene="alpha_img=0", other=2)
    assert alone.cache_salt is None and RUNS_KEY not in alone.sampling_params.extra_args
    with pytest.raises(ValueError, match="avar_key_runs belongs to the engine"):
        ask(avar_key_runs=[])


def test_an_engine_that_was_not_told_is_left_alone(make_processor):
    processor = make_processor({})
    request = processor.process_inputs("id", (1, 2), params := SimpleNamespace(extra_args=None))
    assert request.cache_salt is None and request.sampling_params is params and params.extra_args is None
    assert processor.process_inputs("id", (1, 2), None).sampling_params is None  # Pooling.
    with pytest.raises(ValueError, match="needs an engine that was started for it"):
        processor.process_inputs("id", (1, 2), SimpleNamespace(extra_args=request_arguments(SPEC)))


# ---- what workers do -----------------------------------------------------------------------------------------------


class Buffer:
    """Stands for vLLM's `CpuGpuBuffer`; `copies` counts."""

    def __init__(self, *size, dtype):
        self.cpu, self.gpu = torch.zeros(size, dtype=dtype), torch.zeros(size, dtype=dtype)
        self.np, self.copies = self.cpu.numpy(), 0

    def copy_to_gpu(self):
        self.copies += 1
        self.gpu.copy_(self.cpu)


@pytest.fixture
def scaler():
    """Layers 1 and 2 of three, both key/value heads of four query heads; 12 tokens and three requests a step."""
    config = MODEL.hf_text_config
    return KeyScaler((1, 2), (0, 1), config, 4, 2, Buffer(12, dtype=torch.int64), Buffer(2, 7, 2, dtype=torch.float32))


def planned(text: str, runs: list) -> dict:
    return {REQUEST_KEY: str(InterventionSpec.parse(text)), RUNS_KEY: runs}


def step(scaler, extra_args, computed, scheduled) -> torch.Tensor:
    """What keys of one are in both layers, (L, T, K)."""
    scaler.write(extra_args, np.array(computed), np.array(scheduled, dtype=np.int32))
    ones = torch.ones(sum(scheduled), 2, 5)
    return torch.stack([scaler.scale(at, ones)[..., 0] for at in range(2)])


def test_a_step_by_hand(scaler):
    requests = [
        planned("alpha_img=1,alpha_sys=0.5", [[0, 2, SYSTEM], [3, 5, IMAGE]]),
        None,
        planned("alpha_img=2,layers=2,heads=2-3", [[1, 4, IMAGE]]),
    ]
    # Tokens 1 to 3 of the first, one of the second, 0 to 1 of the third.
    factors_LTK = step(scaler, requests, [1, 4, 0], [3, 1, 2])
    assert factors_LTK[0].tolist() == [[0.5, 0.5], [1, 1], [2, 2], [1, 1], [1, 1], [1, 1]]
    assert factors_LTK[1].tolist() == [[0.5, 0.5], [1, 1], [2, 2], [1, 1], [1, 1], [1, 3]]
    # The last image token of the first, then its answer; of the third the rest, more than its prompt.
    factors_LTK = step(scaler, requests, [4, 9, 2], [3, 1, 4])
    assert factors_LTK[0].tolist() == [[2, 2], *[[1, 1]] * 7]
    assert factors_LTK[1].tolist() == [[2, 2], *[[1, 1]] * 3, [1, 3], [1, 3], [1, 1], [1, 1]]
    assert scaler.active


def test_a_step_of_responses_costs_nothing(scaler):
    request = planned(SPEC, [[0, 3, IMAGE]])
    step(scaler, [request], [0], [3])
    copies = scaler.index_T.copies
    keys = torch.ones(1, 2, 5)
    scaler.write([request], np.array([3]), np.array([1]))
    assert not scaler.active and scaler.scale(0, keys) is keys
    # Once more, so that a captured graph multiplies by one.
    assert scaler.index_T.copies == copies + 1 and not scaler.index_T.gpu.any()
    scaler.write([request], np.array([4]), np.array([1]))
    assert scaler.index_T.copies == copies + 1
    assert scaler.scale(0, None) is None


def test_a_captured_graph_always_multiplies(scaler, monkeypatch):
    """Padded to its size; what it multiplies by is read at a fixed address."""
    keys = torch.ones(8, 2, 5)
    monkeypatch.setattr(vllm_hook, "is_capturing", lambda tensor: tensor is keys)
    read = (scaler.index_T.gpu.data_ptr(), scaler.table_LGK.gpu.data_ptr())
    assert torch.equal(scaler.scale(0, keys), keys) and scaler.scale(0, keys) is not keys
    scaler.write([planned(SPEC, [[0, 3, IMAGE]])], np.array([0]), np.array([3]))
    assert scaler.scale(0, keys)[:, 0, 0].tolist() == [1.25] * 3 + [1.0] * 5
    scaler.write([None], np.array([7]), np.array([1]))
    assert torch.equal(scaler.scale(0, keys), keys)
    assert read == (scaler.index_T.gpu.data_ptr(), scaler.table_LGK.gpu.data_ptr())


def test_preparing_skips_decoding_steps(scaler, monkeypatch):
    written = []
    monkeypatch.setattr(scaler, "write", lambda *args: written.append(args))
    requests = {
        "a": SimpleNamespace(sampling_params=SimpleNamespace(extra_args={"b": 1})),
        "c": SimpleNamespace(sampling_params=None),
    }
    batch = SimpleNamespace(
        num_reqs=2,
        req_ids=["a", "c"],
        num_computed_tokens_cpu=np.array([5, 9, 0]),
        num_prompt_tokens=np.array([5, 4, 7]),
    )
    scaler.prepare(batch, requests, np.array([1, 1]))
    assert not written
    batch.num_computed_tokens_cpu[0] = 4
    scaler.prepare(batch, requests, np.array([1, 1]))
    assert written[0][0] == [{"b": 1}, None] and written[0][1].tolist() == [4, 9]
    batch.num_computed_tokens_cpu[0] = 5
    scaler.active = True  # The step before had tokens to scale.
    scaler.prepare(batch, requests, np.array([1, 1]))
    assert len(written) == 2


class Impl:
    """Stands for an `AttentionImpl`; returns the key it was given."""

    def forward(self, layer, query, key, value, kv_cache, attn_metadata, output):
        return key

    def do_kv_cache_update(self, layer, key, value, kv_cache, slot_mapping):
        return key


def test_both_methods_of_an_implementation_get_scaled_keys(scaler):
    impl, keys = Impl(), torch.ones(3, 2, 5)
    scaler.stand_before(impl, 0)
    assert impl.forward(None, None, keys, None, None, None, output=None) is keys
    scaler.write([planned(SPEC, [[0, 1, SYSTEM]])], np.array([0]), np.array([3]))
    assert impl.forward(None, None, keys, None, None, None, output=None)[:, 0, 0].tolist() == [0.5, 1, 1]
    assert impl.do_kv_cache_update(None, keys, None, None, None)[:, 0, 0].tolist() == [0.5, 1, 1]
    without = SimpleNamespace(forward=Impl().forward)
    scaler.stand_before(without, 0)
    assert not hasattr(without, "do_kv_cache_update")


@pytest.mark.parametrize("size, num_kv_heads", [(1, 4), (2, 4), (4, 4), (8, 4), (8, 1)])
def test_heads_of_ranks(size, num_kv_heads):
    """As vLLM's QKVParallelLinear cuts them: in order, or each one on several ranks."""
    of_rank = max(1, num_kv_heads // size)
    for rank in range(size):
        shard = rank // max(1, size // num_kv_heads)  # vllm/model_executor/layers/linear.py, `shard_id`
        heads = [head_of_rank(head, rank, size, num_kv_heads, of_rank) for head in range(of_rank)]
        assert heads == list(range(shard * of_rank, (shard + 1) * of_rank))


def engine(**changes):
    """A config of vLLM that `check_engine` takes; `changes` by dotted name, with _ for the dot."""
    config = SimpleNamespace(
        use_v2_model_runner=False,
        speculative_config=None,
        kv_transfer_config=None,
        parallel_config=SimpleNamespace(use_ubatching=False, prefill_context_parallel_size=1),
        model_config=SimpleNamespace(
            enable_sleep_mode=False, use_mla=False, hf_config=SimpleNamespace(model_type="qwen2_5_vl")
        ),
        compilation_config=SimpleNamespace(pass_config=SimpleNamespace(fuse_rope_kvcache=None)),
    )
    for name, value in changes.items():
        *path, last = name.split("__")
        node = config
        for part in path:
            node = getattr(node, part)
        setattr(node, last, value)
    return config


@pytest.mark.parametrize(
    "change, value, message",
    [
        ("use_v2_model_runner", True, "got the V2 model runner"),
        ("speculative_config", object(), "got speculative_config"),
        ("kv_transfer_config", object(), "got kv_transfer_config"),
        ("parallel_config__use_ubatching", True, "got enable_dbo or ubatch_size"),
        ("parallel_config__prefill_context_parallel_size", 2, "got prefill_context_parallel_size"),
        ("model_config__enable_sleep_mode", True, "got enable_sleep_mode"),
        ("model_config__use_mla", True, "got multi-head latent attention"),
        ("compilation_config__pass_config__fuse_rope_kvcache", True, "got fuse_rope_kvcache"),
        ("model_config__hf_config", SimpleNamespace(model_type="mllama"), "got mllama, which reads images in cross"),
        ("model_config__hf_config", SimpleNamespace(model_type="opt"), "a known model family; got model_type='opt'"),
    ],
)
def test_engines_that_cannot_do_it_are_refused(change, value, message):
    check_engine(engine())
    with pytest.raises(ValueError, match=message):
        check_engine(engine(**{change: value}))


@pytest.mark.parametrize(
    "impl, shared, message",
    [
        ({"logits_soft_cap": 30.0}, None, "got logits_soft_cap=30.0 in model.layers.0.attn"),
        ({"alibi_slopes": torch.ones(2)}, None, "got alibi_slopes="),
        ({}, "model.layers.1.attn", "got kv_sharing_target_layer_name=model.layers.1.attn"),
    ],
)
def test_layers_that_key_rescaling_does_not_fit_are_refused(impl, shared, message):
    plain = {"logits_soft_cap": 0, "alibi_slopes": None}
    check_layer("layer", SimpleNamespace(impl=SimpleNamespace(**plain), kv_sharing_target_layer_name=None))
    layer = SimpleNamespace(impl=SimpleNamespace(**plain | impl), kv_sharing_target_layer_name=shared)
    with pytest.raises(ValueError, match=message):
        check_layer("model.layers.0.attn", layer)


def test_runners_get_a_scaler_once_and_where_it_is_wanted(monkeypatch):
    class GPUModelRunner:
        def __init__(self, config):
            self.vllm_config = SimpleNamespace(additional_config=config)
            self.seen = []

        def initialize_kv_cache(self, kv_cache_config, is_profiling=False):
            self.seen.append((kv_cache_config, is_profiling))

    attached = []
    monkeypatch.setattr(vllm_hook, "attach", lambda runner: attached.append(runner) or "scaler")
    module = SimpleNamespace(GPUModelRunner=GPUModelRunner)
    patch_model_runner(module)
    patched = GPUModelRunner.initialize_kv_cache
    patch_model_runner(module)
    assert GPUModelRunner.initialize_kv_cache is patched
    stock, runner = GPUModelRunner({}), GPUModelRunner(engine_arguments()["additional_config"])
    stock.initialize_kv_cache("a")
    runner.initialize_kv_cache("b", is_profiling=True)
    assert not attached
    runner.initialize_kv_cache("c")
    runner.initialize_kv_cache("d")
    assert attached == [runner] and runner.avar_key_scaler == "scaler"
    assert stock.seen == [("a", False)] and runner.seen == [("b", True), ("c", False), ("d", False)]


# ---- what they rely on in vLLM 0.24.0 ------------------------------------------------------------------------------

spec = importlib.util.find_spec("vllm")
VLLM = Path(spec.submodule_search_locations[0]) if spec else None
needs_vllm = pytest.mark.skipif(VLLM is None, reason="vLLM is not installed")


@functools.cache
def parsed(path: str) -> tuple[str, ast.Module]:
    text = (VLLM / path).read_text()
    return text, ast.parse(text)


@functools.cache
def source(path: str, name: str) -> ast.AST:
    """The node of a function or class, `Class.method` included, of a file of vLLM; its text in `.text`."""
    text, node = parsed(path)
    for part in name.split("."):
        node = next(child for child in node.body if getattr(child, "name", None) == part)
    node.text = ast.get_source_segment(text, node)
    return node


@needs_vllm
@pytest.mark.parametrize(
    "path, name",
    [
        ("v1/engine/input_processor.py", "InputProcessor.process_inputs"),
        ("v1/worker/gpu_model_runner.py", "GPUModelRunner.initialize_kv_cache"),
        ("v1/worker/gpu_model_runner.py", "GPUModelRunner._prepare_inputs"),
    ],
)
def test_the_lines_that_the_module_names(path, name):
    assert f"{Path(path).name}:{source(path, name).lineno}" in vllm_hook.__doc__


@needs_vllm
@pytest.mark.parametrize(
    "path, name, expected",
    [
        # The request's own copy of its parameters, the prompt with expanded placeholders, and its salt.
        ("v1/engine/input_processor.py", "InputProcessor.process_inputs", "sampling_params = params.clone()"),
        ("v1/engine/input_processor.py", "InputProcessor.process_inputs", 'decoder_inputs["prompt_token_ids"]'),
        ("v1/engine/input_processor.py", "InputProcessor.process_inputs", 'decoder_inputs.get("cache_salt")'),
        ("v1/engine/llm_engine.py", "LLMEngine.add_request", "self.input_processor.process_inputs("),
        ("v1/engine/async_llm.py", "AsyncLLM.add_request", "self.input_processor.process_inputs("),
        # The salt is in the hash of the first block, and the hash of every block in that of the next.
        (
            "v1/core/kv_cache_utils.py",
            "generate_block_hash_extra_keys",
            "[request.cache_salt] if (start_token_idx == 0 and request.cache_salt) else []",
        ),
        # The runner: what the hook reads, and that CPU tensors are free to be written in `_prepare_inputs`.
        (
            "v1/worker/gpu_model_runner.py",
            "GPUModelRunner._prepare_inputs",
            "self.input_batch.num_computed_tokens_cpu[req_indices]\n            + self.query_pos.np",
        ),
        (
            "v1/worker/gpu_model_runner.py",
            "GPUModelRunner._prepare_inputs",
            "req_indices = np.repeat(self.arange_np[:num_reqs], num_scheduled_tokens)",
        ),
        (
            "v1/worker/gpu_model_runner.py",
            "GPUModelRunner.execute_model",
            "tokens = [scheduler_output.num_scheduled_tokens[i] for i in req_ids]",
        ),
        ("v1/worker/gpu_model_runner.py", "GPUModelRunner.execute_model", "self.synchronize_input_prep(),"),
        ("v1/worker/cpu_model_runner.py", "CPUModelRunner.initialize_kv_cache", "super().initialize_kv_cache("),
        # Both places in which an implementation gets keys, with the key where the hook looks for it.
        (
            "model_executor/layers/attention/attention.py",
            "unified_kv_cache_update",
            "attn_layer.impl.do_kv_cache_update(  # type: ignore[attr-defined]\n"
            "            attn_layer,\n            key,\n            value,",
        ),
        (
            "model_executor/layers/attention/attention.py",
            "unified_attention_with_output",
            "self.impl.forward(\n        self,\n        query,\n        key,\n        value,",
        ),
        ("v1/utils.py", "CpuGpuBuffer", "return self.gpu.copy_(self.cpu, non_blocking=True)"),
        (
            "entrypoints/openai/chat_completion/protocol.py",
            "ChatCompletionRequest",
            "self.vllm_xargs if self.vllm_xargs",
        ),
    ],
)
def test_vllm_is_as_the_hook_takes_it(path, name, expected):
    assert source(path, name).text.count(expected) == 1


@needs_vllm
def test_signatures_that_the_hook_replaces():
    runner = "v1/worker/gpu_model_runner.py"
    for name, expected in (
        ("GPUModelRunner._prepare_inputs", ["self", "scheduler_output", "num_scheduled_tokens"]),
        ("GPUModelRunner.initialize_kv_cache", ["self", "kv_cache_config", "is_profiling"]),
    ):
        assert [argument.arg for argument in source(runner, name).args.args] == expected
    calls = re.findall(r"self\._prepare_inputs\(\s*(\w+),\s*(\w+),\s*\)", (VLLM / runner).read_text())
    assert calls == [("scheduler_output", "num_scheduled_tokens_np")]


@needs_vllm
def test_keys_reach_implementations_nowhere_else():
    """`do_rope_and_kv_cache_update` is the fused operator that `check_engine` refuses."""
    found = {
        (str(path.relative_to(VLLM)), call)
        for folder in ("model_executor/layers/attention", "compilation", "v1/worker")
        for path in (VLLM / folder).rglob("*.py")
        for call in re.findall(r"impl\.(\w*(?:forward|update)\w*)\(", path.read_text())
    }
    attention = "model_executor/layers/attention/"
    assert {call for path, call in found if path == f"{attention}attention.py"} == {"do_kv_cache_update", "forward"}
    others = {(path, call) for path, call in found if not path.startswith(attention)}
    assert others == {("compilation/passes/fusion/rope_kvcache_fusion.py", "do_rope_and_kv_cache_update")}
