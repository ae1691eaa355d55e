# SPDX-License-Identifier: Apache-2.0
"""Fails when verl, vLLM or transformers change what the patches and the glue rely on, and checks the patches."""

import ast
import importlib.metadata
import inspect
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from tensordict import TensorDict

from avar_verl.plugin import vllm_plugin
from avar_verl.plugin.compat.cpu import detect, process_group
from avar_verl.plugin.compat.cpu import flash as cpu_flash
from avar_verl.plugin.compat.cpu import platform as cpu_platform
from avar_verl.plugin.compat.cpu import vllm as vllm_cpu
from avar_verl.plugin.compat.verl import metrics, packed_attention, position_ids, text_only, weight_socket

SITE = Path(importlib.metadata.distribution("verl").locate_file("verl"))
needs_cpu_build = pytest.mark.skipif(detect.cpu_vllm_version() is None, reason="vLLM's CPU build is not installed")


def source(path: str, name: str | None = None) -> str:
    """Text of a file of verl, or of one function or class in it, `Class.method` included."""
    text = (SITE / path).read_text()
    if name is None:
        return text
    node = ast.parse(text)
    for part in name.split("."):
        node = next(child for child in node.body if getattr(child, "name", None) == part)
    return ast.get_source_segment(text, node)


def nested(matrices):
    return torch.nested.as_nested_tensor(matrices, layout=torch.jagged)


# ---- what the modules say about upstream ---------------------------------------------------------------------------


def test_the_trainer_mode_is_compared_with_sync_in_six_places():
    """`VarsMixin` answers each of them with the name of verl's trainer; nobody else may ask the configured name."""
    text = source("trainer/ppo/v1/trainer_base.py")
    assert len(re.findall(r'trainer_mode [!=]= "sync"', text)) == 6
    assert "self.trainer_mode = self.config.trainer.v1.trainer_mode" in text
    elsewhere = [path for path in SITE.rglob("*.py") if re.search(r"trainer_mode [!=]=", path.read_text())]
    assert elsewhere == [SITE / "trainer/ppo/v1/trainer_base.py"]


STOCK_FIX = """\
def maybe_fix_3d_position_ids(data: TensorDict):
    # note for tensordict with pickle/unpickle. nested tensor in tensordict after consolidate and pickle/unpickle
    # will incur indexing error for ragged tensor. This only happens when using 3D position ids in VLMs.
    # This is likely a bug in tensordict. As a workaround, we manually set _ragged_index.
    if "position_ids" in data.keys() and data["position_ids"].dim() == 3 and data["position_ids"].is_nested:
        data["position_ids"]._ragged_idx = 2"""


@pytest.mark.parametrize(
    "path, name, expected, count",
    [
        # compat.verl.position_ids
        ("utils/tensordict_utils.py", "maybe_fix_3d_position_ids", STOCK_FIX, 1),
        ("workers/engine/base.py", None, "maybe_fix_3d_position_ids(data)", 2),
        ("workers/engine_workers.py", None, "maybe_fix_3d_position_ids(", 2),
        # compat.cpu.process_group
        ("utils/distributed.py", None, 'f"cpu:gloo,{get_device_name()}:{get_nccl_backend()}"', 2),
        ("utils/ulysses.py", None, "comm = dist.all_to_all(output_list, input_list, group=group", 1),
        # compat.verl.packed_attention: who calls whom, with which names
        (
            "models/transformers/qwen2_vl.py",
            "qwen2_vl_attn_forward",
            "attn_output = _custom_flash_attention_forward(",
            1,
        ),
        ("models/transformers/qwen2_vl.py", "qwen2_vl_attn_forward", "key_states = repeat_kv(key_states,", 1),
        (
            "models/transformers/qwen2_vl.py",
            "_custom_flash_attention_forward",
            "attn_output = flash_attn_varlen_func(\n            q=q,\n            k=k,\n            v=v,\n"
            "            cu_seqlens_q=cu_seqlens_q,",
            1,
        ),
        (
            "models/transformers/qwen2_vl.py",
            "_custom_flash_attention_forward",
            "attn_output = _flash_attention_forward(\n            query_states,\n            key_states,",
            1,
        ),
        (
            "models/transformers/monkey_patch.py",
            "apply_monkey_patch",
            "            from verl.models.transformers.qwen2_vl import qwen2_vl_attn_forward\n\n"
            "            Qwen2_5_VLAttention.forward = qwen2_vl_attn_forward",
            1,
        ),
        # plugin.trainer.ppo, AvarPPOTrainerSeparateAsync: delete its `_setup` when this is gone
        ("trainer/ppo/v1/trainer_separate_async.py", "PPOTrainerSeparateAsync._setup", "flush=True,", 1),
        # compat.cpu.saved_policy
        ("utils/fsdp_utils.py", "fsdp2_sharded_save_to_cpu", "local_gpu_tensor.detach().cpu()\n", 1),
        # compat.cpu.flash
        ("models/transformers/qwen2_vl.py", "_custom_flash_attention_forward", "= fa_peft_integration_check(", 1),
        ("models/transformers/qwen2_vl.py", None, "    _flash_use_top_left_mask = not is_flash_attn", 1),
        # compat.verl.metrics
        (
            "workers/engine_workers.py",
            "TrainingWorker._postprocess_output",
            "final_metrics = allgather_dict_into_dict(data=metrics, group=dp_group)",
            1,
        ),
        # compat.verl.weight_socket
        (
            "workers/rollout/vllm_rollout/vllm_rollout.py",
            "ServerAdapter.__init__",
            'self.zmq_handle = f"ipc:///tmp/rl-colocate-zmq-{job_id}-replica-{self.replica_rank}-rank-{local_rank}.sock"',
            1,
        ),
        (
            "workers/rollout/vllm_rollout/utils.py",
            "vLLMColocateWorkerExtension._get_zmq_handle",
            'return f"ipc:///tmp/rl-colocate-zmq-{job_id}-replica-{replica_rank}-rank-{trainer_rank}.sock"',
            1,
        ),
        ("workers/rollout/vllm_rollout/utils.py", None, "zmq_handle=self._get_zmq_handle()", 1),
        # compat.verl.text_only
        (
            "models/transformers/qwen2_vl.py",
            "_get_input_embeds",
            "image_embeds = model.visual(pixel_values, grid_thw=image_grid_thw)\n"
            "        inputs_embeds = inputs_embeds + 0.0 * image_embeds.mean()",
            1,
        ),
        # compat.verl.processor
        ("utils/tokenizer/tokenizer.py", "hf_processor", 'raise ValueError(f"Unsupported processor type:', 1),
        ("utils/tokenizer/tokenizer.py", "hf_processor", "except Exception as e:\n        processor = None", 1),
        # compat.verl.glm4v
        (
            "models/transformers/glm4v.py",
            "_get_input_embeds",
            "image_embeds = model.visual(pixel_values, grid_thw=image_grid_thw)\n        n_image_tokens",
            1,
        ),
        # compat.verl.qwen3_5
        ("models/transformers/qwen3_5.py", "_call_accepts_kwarg", "or any(param.kind == param.VAR_KEYWORD", 1),
        (
            "models/transformers/qwen3_5.py",
            "_packed_chunk_gated_delta_rule",
            'if _call_accepts_kwarg(self.chunk_gated_delta_rule, "cu_seqlens"):',
            1,
        ),
        ("models/transformers/glm4v.py", "glm4v_base_forward", "= _get_input_embeds(\n        self, input_ids", 1),
        ("utils/flops_counter.py", None, '"glm4v": _estimate_qwen2_flops', 1),
        ("utils/flops_counter.py", "_estimate_qwen2_flops", "hidden_size = config.hidden_size", 1),
        # compat.verl.rollout_features
        (
            "experimental/agent_loop/agent_loop.py",
            "AgentLoopWorker._compute_multi_modal_inputs",
            "current_text = self.tokenizer.decode(collapsed_ids, skip_special_tokens=True)",
            1,
        ),
        (
            "experimental/agent_loop/agent_loop.py",
            "AgentLoopWorker._compute_position_ids",
            'if multi_modal_inputs.pop("mm_token_type_ids", None) is not None:',
            1,
        ),
        ("trainer/ppo/v1/agent_loop_tq.py", None, 'field.pop("multi_modal_data", None)', 1),
        (
            "trainer/ppo/v1/agent_loop_tq.py",
            None,
            "multi_modal_inputs = self._compute_multi_modal_inputs(output, input_ids)",
            1,
        ),
        # compat.verl.fsdp2_targets
        ("utils/fsdp_utils.py", "_select_fsdp2_wrap_targets", "or (isinstance(module, nn.Embedding) and not _tie)", 1),
        # engine.inputs
        ("workers/engine/fsdp/transformer_impl.py", None, "extract_multi_modal_inputs(micro_batch.get(", 1),
        ("utils/model.py", "extract_multi_modal_inputs", "multi_modal_inputs[key] = torch.cat(values, dim=0)", 1),
        # compat.verl.loading
        (
            "workers/engine/fsdp/transformer_impl.py",
            "FSDPEngine._build_module",
            "get_hf_auto_model_class(hf_config=",
            1,
        ),
        (
            "workers/engine/fsdp/transformer_impl.py",
            "FSDPEngine._build_module",
            "module = auto_class.from_pretrained(",
            1,
        ),
        # compat.verl.shared_features: where workers read rows, and what clears those of a prompt
        ("utils/transferqueue_utils.py", None, "_async_meta_to_realdata(", 3),
        ("trainer/ppo/v1/replay_buffer.py", "ReplayBuffer._clear_groups", "keys=[*uids, *trajectory_keys],", 1),
        ("trainer/ppo/v1/replay_buffer.py", "ReplayBuffer._materialize_batch", "if uid in selected:", 1),
        ("trainer/ppo/v1/trainer_base.py", None, "tq.kv_clear(keys=batch.keys, partition_id=batch.partition_id)", 2),
        # plugin.rollout.worker: one task for the rollouts of a prompt, a score that is there is not computed again
        ("trainer/ppo/v1/agent_loop_tq.py", "AgentLoopWorkerTQ.generate_sequences", "self._run_prompt(prompt,", 1),
        ("trainer/ppo/v1/agent_loop_tq.py", "AgentLoopWorkerTQ._run_prompt", "session_id=i, **prompt", 1),
        (
            "trainer/ppo/v1/agent_loop_tq.py",
            "AgentLoopWorkerTQ._agent_loop_postprocess",
            'keys.append(f"{uid}_{session_id}_{i}")',
            1,
        ),
        (
            "experimental/agent_loop/agent_loop.py",
            "AgentLoopWorker._compute_score",
            "if final_output.reward_score is None and enable_async_reward:",
            1,
        ),
        # plugin.datasets.rl: the picture beside the bytes, and the first step after the rows are read
        ("utils/dataset/rl_dataset.py", "RLHFDataset._build_messages", 'image["image"] = Image.open(BytesIO(', 1),
        (
            "utils/dataset/rl_dataset.py",
            "RLHFDataset._read_files_and_tokenize",
            "self.dataframe = self.maybe_filter_out_long_prompts(self.dataframe)",
            1,
        ),
        # rollout.agent_loop: one placeholder an image, for only one image processor
        ("workers/rollout/utils.py", "qwen2_5_vl_dedup_image_tokens", '"Qwen2VLImageProcessor" in processor', 1),
        ("utils/dataset/dataset_utils.py", None, "if isinstance(batch[0][key], torch.Tensor):", 1),
        # compat.cpu.vllm
        ("third_party/vllm/__init__.py", None, 'package_name = "vllm"', 1),
        # compat.cpu.platform
        ("plugin/platform/platform_manager.py", "_detect_platform_name", 'return "nvidia"', 1),
        # register: a failing entry point is no more than a debug message, SystemExit is no Exception
        ("__init__.py", None, "except Exception as _e:", 1),
        ("__init__.py", None, 'logging.getLogger(__name__).debug("Failed to load plugin', 1),
        # engine: who builds the loss, and which class an engine is
        ("trainer/sft_trainer.py", None, "partial(sft_loss, config=None)", 1),
        ("trainer/sft_trainer.py", None, 'model_type="language_model"', 1),
        # trainer: padding rows copy the fields of a real row, and have no response
        ("trainer/ppo/padding_utils.py", None, "response_mask = torch.zeros_like(responses)", 1),
        ("trainer/ppo/padding_utils.py", None, "loss_mask=response_mask", 1),
        ("trainer/ppo/padding_utils.py", None, "is_padding=True", 1),
    ],
)
def test_upstream_lines_of_verl(path, name, expected, count):
    assert source(path, name).count(expected) == count


@needs_cpu_build
def test_upstream_lines_of_vllm():
    """The function is looked up at every call, in the module where `keep_linear_weights` replaces it."""
    vllm = Path(importlib.metadata.distribution("vllm-cpu").locate_file("vllm"))
    utils = (vllm / "model_executor/layers/utils.py").read_text()
    assert "def dispatch_cpu_unquantized_gemm(\n    layer: torch.nn.Module,\n    remove_weight: bool,\n)" in utils
    assert "layer.cpu_linear(x, weight, bias)" in utils
    for file, remove in [("linear.py", True), ("vocab_parallel_embedding.py", False)]:
        text = (vllm / "model_executor/layers" / file).read_text()
        call = re.search(
            r"\n            from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm\n\n"
            rf"            dispatch_cpu_unquantized_gemm\(layer, remove_weight={remove}\)",
            text,
        )
        assert call, file
    assert "vllm-cpu" in (vllm / "platforms/__init__.py").read_text()
    experts = (vllm / "model_executor/layers/fused_moe/cpu_fused_moe.py").read_text()
    assert "MoEActivation.SILU: lambda x: SiluAndMul(compile_native=False).forward_native(x)," in experts
    # Experts are packed where this says so, and only there; the other way reads the live parameter.
    assert (
        "use_grouped_gemm, isa = self.check_grouped_gemm(layer)\n        self.isa = isa\n        if use_grouped_gemm:"
        in experts
    )
    packing = experts[experts.index("def init_moe_grouped_gemm(") : experts.index("def init_moe_torch(")]
    assert experts.count("cpu_prepack_moe_weight(") == packing.count("cpu_prepack_moe_weight(") == 2
    assert "lambda x, w=layer_w13_weight, b=layer_w13_bias: F.linear(x, w, b)" in experts
    runner = (vllm / "v1/worker/cpu_model_runner.py").read_text()
    nothing = runner[runner.index("def _zero_block_ids(self, block_ids: list[int]) -> None:") :].splitlines()[1:4]
    assert [line.strip() for line in nothing if "#" not in line] == ["pass"]
    zeroer = (vllm / "v1/worker/utils.py").read_text()
    assert "if not isinstance(spec, FullAttentionSpec):" in zeroer and "dp + off_bytes" in zeroer
    activation = (vllm / "model_executor/layers/activation.py").read_text()
    layer = activation[activation.index("class SiluAndMul(") :]
    assert layer.index("@staticmethod") < layer.index("def forward_native(") < layer.index("def forward_cuda(")


def test_experts_are_not_packed_and_their_activation_is_the_one_of_the_layer():
    class Layer:
        @staticmethod
        def forward_native(x):
            return x + 1

    silu = object()
    module = SimpleNamespace(
        MoEActivation=SimpleNamespace(SILU=silu),
        SiluAndMul=Layer,
        _CPU_MOE_ACT_FN={silu: None, "other": 7},
        CPUFusedMOE=type("CPUFusedMOE", (), {"check_grouped_gemm": lambda self, layer: (True, "vec")}),
    )
    vllm_cpu.keep_experts(module)
    assert module.CPUFusedMOE().check_grouped_gemm(None) == (False, "none")
    assert module._CPU_MOE_ACT_FN[silu](1) == 2 and module._CPU_MOE_ACT_FN["other"] == 7


def test_new_blocks_of_attention_are_zeroed():
    """Two layers of one group, whose blocks of 4 are two of the kernel's each."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    module = SimpleNamespace(CPUModelRunner=type("CPUModelRunner", (), {}))
    vllm_cpu.zero_reused_blocks(module)
    spec = FullAttentionSpec(block_size=4, num_kv_heads=1, head_size=1, dtype=torch.float32)
    backend = SimpleNamespace(get_kv_cache_block_dim=lambda *sizes, cache_dtype_str: 1)
    attention = SimpleNamespace(kv_cache_spec=spec, kv_cache_group_id=0, backend=backend, layer_names=["a", "b"])
    state = SimpleNamespace(kv_cache_spec=object(), kv_cache_group_id=1, layer_names=["c"])
    layers = {name: SimpleNamespace(kv_cache=torch.full((2, 8, 3), float("nan"))) for name in "abc"}
    runner = module.CPUModelRunner()
    runner._kv_cache_spec_attn_group_iterator = lambda: [attention, state]
    runner._kernel_block_sizes = [2, 2]
    runner.cache_config = SimpleNamespace(cache_dtype="auto")
    runner.compilation_config = SimpleNamespace(static_forward_context=layers)
    runner._zero_block_ids([1, 3])
    for name in "ab":
        assert [bool((block == 0).all()) for block in layers[name].kv_cache.unbind(1)] == [False, False, True, True] * 2
    assert layers["c"].kv_cache.isnan().all()


def test_attention_interface():
    from transformers.modeling_utils import AttentionInterface

    parameters = inspect.signature(AttentionInterface.get_interface).parameters
    assert list(parameters) == ["self", "attn_implementation", "default"]
    # "eager" is looked up before the default is taken, which is how a registered one comes to be used.
    assert "return super().get(attn_implementation, default)" in inspect.getsource(AttentionInterface.get_interface)


def test_engine_lookup_asks_for_the_vendor_first():
    text = source("workers/engine/base.py", "EngineRegistry.get_engine_cls")
    vendor, device = text.index("if vendor_key in registry"), text.index("if device in registry")
    assert "vendor_key = (device, vendor)" in text and vendor < device


# ---- compat.verl.position_ids ---------------------------------------------------------------------------------------


def positions(lengths, rows=4):
    """B matrices (P, S_i), no number twice in a sample, and the TensorDict that verl would carry."""
    matrices = [torch.arange(rows * n).reshape(rows, n) + 1000 * i for i, n in enumerate(lengths)]
    ids = nested([torch.zeros(n, dtype=torch.long) for n in lengths])
    return matrices, TensorDict({"position_ids": nested(matrices), "input_ids": ids}, batch_size=len(lengths))


def stock_fix(data: TensorDict) -> None:
    scope = {"TensorDict": TensorDict}
    exec(source("utils/tensordict_utils.py", "maybe_fix_3d_position_ids"), scope)
    scope["maybe_fix_3d_position_ids"](data)


def belongs_to_the_tokens(data: TensorDict, matrices: list) -> bool:
    fixed = data["position_ids"]
    same_layout = fixed._ragged_idx == 2 and torch.equal(fixed.offsets(), data["input_ids"].offsets())
    return same_layout and torch.equal(fixed.values(), torch.cat(matrices, dim=1))


# 4 is also the number of rows, which nothing but the values tells from a length.
@pytest.mark.parametrize("lengths", [[5, 5, 5], [3, 5], [5, 3, 3], [4], [4, 4], [4, 4, 4, 4], [3, 4], [7], [1], [1, 1]])
@pytest.mark.parametrize("rows", [3, 4])
def test_position_ids_belong_to_their_tokens(lengths, rows):
    matrices, data = positions(lengths, rows)
    position_ids.fix_3d_position_ids(data)
    assert belongs_to_the_tokens(data, matrices)
    position_ids.fix_3d_position_ids(data)  # again, as verl does
    assert belongs_to_the_tokens(data, matrices)
    for row, matrix in zip(data["position_ids"].unbind(), matrices, strict=True):
        assert torch.equal(row, matrix)


def test_stock_verl_gets_equal_lengths_wrong_and_different_ones_right():
    matrices, data = positions([5, 5, 5])
    stock_fix(data)
    assert not belongs_to_the_tokens(data, matrices)
    matrices, data = positions([3, 5])
    stock_fix(data)
    assert belongs_to_the_tokens(data, matrices)


def test_position_ids_of_text_and_of_other_layouts_are_left_alone():
    dense = torch.arange(24).reshape(2, 4, 3)
    text = nested([torch.arange(2), torch.arange(3)])
    for given in (dense, text):
        data = TensorDict({"position_ids": given, "input_ids": text}, batch_size=2)
        position_ids.fix_3d_position_ids(data)
        assert data["position_ids"] is given
    position_ids.fix_3d_position_ids(TensorDict({}, batch_size=2))
    _, data = positions([3, 5])
    del data["input_ids"]
    position_ids.fix_3d_position_ids(data)  # nothing to compare with: what verl does
    assert data["position_ids"]._ragged_idx == 2


@pytest.mark.parametrize("lengths", [[4, 6], [6, 6], [5, 5, 5]])
def test_position_ids_that_fit_no_token_are_refused(lengths):
    _, data = positions([5, 5])
    data = TensorDict({"position_ids": data["position_ids"]}, batch_size=[])
    data["input_ids"] = nested([torch.zeros(n) for n in lengths])
    with pytest.raises(ValueError, match="one row of positions for every token"):
        position_ids.fix_3d_position_ids(data)


def test_the_fix_takes_the_place_of_the_stock_function():
    module = SimpleNamespace(maybe_fix_3d_position_ids=None)
    position_ids.apply(module)
    assert module.maybe_fix_3d_position_ids is position_ids.fix_3d_position_ids


# ---- compat.verl.weight_socket --------------------------------------------------------------------------------------


def ends(monkeypatch, raylet: str) -> tuple[str, str]:
    """The socket of the actor and that of the vLLM worker, in a job 01000000 of the Ray with this raylet."""

    class ServerAdapter:
        def __init__(self):
            self.zmq_handle = "ipc:///tmp/rl-colocate-zmq-01000000-replica-0-rank-1.sock"

    class Extension:
        def _get_zmq_handle(self):
            return "ipc:///tmp/rl-colocate-zmq-01000000-replica-0-rank-1.sock"

    weight_socket.apply_sender(SimpleNamespace(ServerAdapter=ServerAdapter))
    weight_socket.apply_receiver(SimpleNamespace(vLLMColocateWorkerExtension=Extension))
    monkeypatch.setenv(weight_socket.RAYLET, raylet)
    return ServerAdapter().zmq_handle, Extension()._get_zmq_handle()


def test_the_socket_of_weights_belongs_to_one_ray(monkeypatch):
    sender, receiver = ends(monkeypatch, "123")
    assert sender == receiver == "ipc:///tmp/rl-colocate-zmq-123-01000000-replica-0-rank-1.sock"
    assert ends(monkeypatch, "124")[0] != sender


def test_a_socket_outside_of_a_ray_is_refused(monkeypatch):
    monkeypatch.delenv(weight_socket.RAYLET, raising=False)
    with pytest.raises(ValueError, match="which names itself in RAY_RAYLET_PID; got none"):
        weight_socket.own("ipc:///tmp/rl-colocate-zmq-01000000-replica-0-rank-1.sock")


# ---- compat.cpu.process_group ---------------------------------------------------------------------------------------


def test_gloo_alone(monkeypatch):
    seen = []

    def init_process_group(backend=None, init_method=None, **kwargs):
        seen.append((backend, init_method, kwargs))
        return "result"

    monkeypatch.setattr(torch.distributed, "init_process_group", init_process_group)
    monkeypatch.setattr(torch.distributed, "all_to_all", torch.distributed.all_to_all)
    process_group.apply()
    wrapped = torch.distributed.init_process_group
    process_group.apply()
    assert torch.distributed.init_process_group is wrapped is not init_process_group  # wrapped once
    assert wrapped(backend="cpu:gloo,cpu:gloo", rank=1) == "result"
    wrapped("cpu:gloo,cpu:gloo", "file://x")
    wrapped(backend="cpu:gloo,cuda:nccl")
    wrapped()
    assert seen == [("gloo", None, {"rank": 1}), ("gloo", "file://x", {}), ("cpu:gloo,cuda:nccl", None, {})] + [
        (None, None, {})
    ]


def test_torch_refuses_the_string_that_verl_builds_on_the_cpu():
    """What the wrapper is for; when torch accepts it, the wrapper can go."""
    with pytest.raises(ValueError, match="[Dd]uplicate"):
        torch.distributed.distributed_c10d.BackendConfig(torch.distributed.Backend(process_group.DUPLICATE))


@pytest.mark.parametrize("shapes, asynchronous", [([(2,), (3,)], False), ([(2,), (2,)], True)])
def test_all_to_all_of_what_gloo_cannot_exchange_is_refused(shapes, asynchronous):
    tensors = [torch.zeros(shape) for shape in shapes]
    with pytest.raises(ValueError, match="all_to_all on gloo takes tensors of one shape and waits for them"):
        process_group.all_to_all(tensors, tensors, async_op=asynchronous)


# ---- compat.cpu.flash and compat.verl.packed_attention --------------------------------------------------------------


def test_packed_attention_on_the_cpu_is_attention_of_every_segment():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 9, 2, 4).unbind()
    bounds = torch.tensor([0, 4, 9], dtype=torch.int32)
    out = cpu_flash.flash_attn_varlen_func(q, k, v, bounds, bounds, 5, 5, softmax_scale=0.3, causal=True)
    for start, stop in ((0, 4), (4, 9)):
        scores = torch.einsum("shd,thd->hst", q[start:stop], k[start:stop]) * 0.3
        weights = scores.masked_fill(torch.ones(stop - start, stop - start).triu(1).bool(), -torch.inf).softmax(-1)
        torch.testing.assert_close(out[start:stop], torch.einsum("hst,thd->shd", weights, v[start:stop]))
    whole = cpu_flash.flash_attention_forward(q[None], k[None], v[None], None, 9, True, softmax_scale=0.3)
    one = torch.tensor([0, 9], dtype=torch.int32)
    expected = cpu_flash.flash_attn_varlen_func(q, k, v, one, one, 9, 9, softmax_scale=0.3, causal=True)
    torch.testing.assert_close(whole[0], expected)


def test_packed_attention_on_the_cpu_refuses_what_it_would_ignore():
    q = torch.zeros(4, 2, 4)
    with pytest.raises(ValueError, match=r"needs the same segments for queries and keys; got \[0, 4\] and \[0, 2, 4\]"):
        cpu_flash.flash_attn_varlen_func(q, q, q, torch.tensor([0, 4]), torch.tensor([0, 2, 4]), 4, 4)
    with pytest.raises(ValueError, match="takes no padding mask and no sliding window; got attention_mask=None"):
        cpu_flash.flash_attention_forward(q[None], q[None], q[None], None, 4, True, sliding_window=2)
    with pytest.raises(ValueError, match=r"takes no padding mask and no sliding window; got attention_mask=\(1, 4\)"):
        cpu_flash.flash_attention_forward(q[None], q[None], q[None], torch.ones(1, 4), 4, True)


def test_flash_attention_shows_its_window_and_segments_to_the_capture():
    """The kernels that flash-attn brings are called as verl calls them; what they compute is none of the wrapper's."""
    seen = []
    capture = SimpleNamespace(
        wants_lse=lambda layer, q: False,
        observe_packed=lambda module, q, k, bounds, arguments, tap: seen.append((k, bounds, arguments)),
    )
    kernel = packed_attention.wrap_varlen(lambda **kwargs: "packed")
    flash = packed_attention.wrap_flash(lambda *args, **kwargs: "whole")
    q, k = torch.zeros(6, 4, 8), torch.arange(6.0 * 4 * 8).reshape(6, 4, 8)

    def stock_forward(self, **kwargs):
        assert not kwargs  # verl's function never sees the capture
        bounds = torch.tensor([0, 2, 6])
        assert kernel(q=q, k=k, cu_seqlens_q=bounds, softmax_scale=0.5, window_size=(3, 3)) == "packed"
        return flash(q[None], k[None], None, 6, sliding_window=None)

    forward = packed_attention.wrap_attention(stock_forward)
    module = SimpleNamespace(num_key_value_groups=2, layer_idx=0)
    assert forward(module, avar_capture=capture) == "whole"
    (packed_k, bounds, arguments), (_, none, whole) = seen
    assert torch.equal(packed_k, k[:, ::2]) and bounds.tolist() == [0, 2, 6] and none is None
    assert arguments == {"sliding_window": 4, "scaling": 0.5}  # (3, 3) is three keys to the left and the query's own
    assert whole == {"sliding_window": None, "scaling": None}
    assert forward(module) == "whole" and len(seen) == 2  # no capture, nothing is shown
    with pytest.raises(ValueError, match="packed attention has one row; got 2"):
        packed_attention.wrap_attention(lambda self: flash(q[None].expand(2, -1, -1, -1), k[None]))(
            module, avar_capture=capture
        )


# ---- compat.verl.metrics --------------------------------------------------------------------------------------------


def test_engine_metrics_are_logged_as_numbers():
    from verl.utils import tensordict_utils as tu

    class TrainingWorker:
        def _postprocess_output(self, output, **kwargs):
            assert kwargs == {"forward_only": False}
            return tu.get_tensordict(tensor_dict={}, non_tensor_dict={"metrics": output["metrics"]})

    module = SimpleNamespace(TrainingWorker=TrainingWorker)
    metrics.apply(module)
    given = {"avar/vas": [7.5, 7.5], "avar/schedule": 0.5, "other": [1.0, 2.0], "loss": 3.0}
    out = tu.get(module.TrainingWorker()._postprocess_output({"metrics": given}, forward_only=False), "metrics")
    assert out == {"avar/vas": 7.5, "avar/schedule": 0.5, "other": [1.0, 2.0], "loss": 3.0}


# ---- compat.verl.text_only ------------------------------------------------------------------------------------------


def test_text_only_micro_batches(load_tiny, encode):
    """verl's function dies on them; the wrapped one returns the text's embeddings and keeps the vision tower in the
    graph with gradients of 0, so that every rank takes part in its collectives."""
    from verl.models.transformers import qwen2_vl

    stock = inspect.unwrap(qwen2_vl._get_input_embeds)
    module = SimpleNamespace(_get_input_embeds=stock)
    text_only.apply(module)
    model = load_tiny("sdpa").model
    ids, mask = torch.tensor([[1, 2, 3]]), torch.ones(1, 3)
    with pytest.raises(AttributeError, match="mean"):
        stock(model, ids, mask)
    embeds, out_mask = module._get_input_embeds(model, ids, mask)
    assert out_mask is mask and torch.equal(embeds, model.get_input_embeddings()(ids))
    embeds.sum().backward()
    gradients = [parameter.grad for parameter in model.visual.parameters()]
    assert gradients and not any(gradient is None or gradient.any() for gradient in gradients)

    inputs = encode(1)  # With an image nothing changes.
    arguments = (inputs["input_ids"], inputs["attention_mask"], inputs["pixel_values"], None, inputs["image_grid_thw"])
    with torch.no_grad():
        for a, b in zip(module._get_input_embeds(model, *arguments), stock(model, *arguments), strict=True):
            assert torch.equal(a, b)


# ---- compat.cpu.vllm ------------------------------------------------------------------------------------------------


@pytest.fixture
def no_alias(monkeypatch):
    """sys.meta_path as it is in a process without the plugin."""
    monkeypatch.setattr(sys, "meta_path", [finder for finder in sys.meta_path if finder is not vllm_cpu._VllmCpuFinder])


@needs_cpu_build
def test_the_cpu_build_answers_to_its_name(no_alias):
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("vllm")
    vllm_cpu.alias_distribution()
    vllm_cpu.alias_distribution()
    assert sum(finder is vllm_cpu._VllmCpuFinder for finder in sys.meta_path) == 1
    assert importlib.metadata.version("vllm") == f"{importlib.metadata.version('vllm-cpu')}+cpu"
    metadata = importlib.metadata.metadata("vllm")
    assert metadata["Name"] == "vllm" and metadata["Version"].endswith("+cpu")
    assert importlib.metadata.version("vllm-cpu") == detect.cpu_vllm_version()
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("vllm-rocm")


@needs_cpu_build
def test_the_alias_adds_no_entry_point_and_no_distribution(no_alias):
    def listed():
        names = [distribution.metadata["Name"] for distribution in importlib.metadata.distributions()]
        groups = ("vllm.general_plugins", "verl.plugins", "console_scripts")
        entries = [entry.value for group in groups for entry in importlib.metadata.entry_points(group=group)]
        return sorted(names), sorted(entries)

    before = listed()
    vllm_cpu.alias_distribution()
    assert listed() == before
    plugins = [entry.value for entry in importlib.metadata.entry_points(group="vllm.general_plugins")]
    assert plugins.count("avar_verl.plugin.vllm_plugin:register") == 1


@pytest.mark.parametrize("cpu_build, vllm_build", [(None, None), ("0.24.0", "0.24.0")])
def test_there_is_no_alias_where_it_is_not_needed(no_alias, monkeypatch, cpu_build, vllm_build):
    """vLLM's CPU build is not installed, or a distribution of the real name is."""
    monkeypatch.setattr(vllm_cpu, "cpu_vllm_version", lambda: cpu_build)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: vllm_build)
    vllm_cpu.alias_distribution()
    assert vllm_cpu._VllmCpuFinder not in sys.meta_path


@pytest.fixture
def fake_vllm(monkeypatch):
    """vLLM's module of linear layers, without vLLM; it packs and drops weights as the real one does."""

    def dispatch_cpu_unquantized_gemm(layer, remove_weight):
        layer.packed = True
        layer.weight = torch.nn.Parameter(torch.empty(0))

    utils = ModuleType("vllm.model_executor.layers.utils")
    utils.dispatch_cpu_unquantized_gemm = dispatch_cpu_unquantized_gemm
    layers = ModuleType("vllm.model_executor.layers")
    layers.utils = utils
    for name in ("vllm", "vllm.model_executor"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, layers.__name__, layers)
    monkeypatch.setitem(sys.modules, utils.__name__, utils)
    return utils


@pytest.mark.parametrize("remove_weight", [True, False])
def test_linear_layers_keep_weights_that_can_be_updated(fake_vllm, remove_weight):
    vllm_cpu.keep_linear_weights()
    wrapped = fake_vllm.dispatch_cpu_unquantized_gemm
    vllm_cpu.keep_linear_weights()
    assert fake_vllm.dispatch_cpu_unquantized_gemm is wrapped  # wrapped once
    layer, x = torch.nn.Linear(3, 2), torch.ones(1, 3)
    fake_vllm.dispatch_cpu_unquantized_gemm(layer, remove_weight=remove_weight)
    with torch.no_grad():
        layer.weight.fill_(2.0)  # what a weight sync does
    assert layer.cpu_linear(x, layer.weight, None).tolist() == [[6.0, 6.0]]
    convolution = torch.nn.Conv1d(2, 2, 3)
    fake_vllm.dispatch_cpu_unquantized_gemm(convolution, remove_weight=True)
    assert convolution.packed and not hasattr(convolution, "cpu_linear")


@pytest.mark.parametrize("active", [True, False])
def test_the_vllm_plugin_acts_on_the_cpu_alone(monkeypatch, active):
    called = []
    monkeypatch.setenv(vllm_plugin.STOCK, "0")  # Else it would say of this process what it is, for those it starts.
    monkeypatch.setattr(detect, "is_active", lambda: active)
    for name in ("alias_distribution", "keep_linear_weights"):
        monkeypatch.setattr(vllm_cpu, name, lambda name=name: called.append(name))
    vllm_plugin.register()
    assert called == (["alias_distribution", "keep_linear_weights"] if active else [])


# ---- compat.cpu.detect and compat.cpu.platform ----------------------------------------------------------------------

ACTIVE = [
    ("", "0.24.0", False, True),
    ("", "0.24.0", True, False),
    ("", None, False, False),  # the head node of a GPU cluster
    ("", None, True, False),
    ("cpu", None, True, True),
    (" CPU ", "0.24.0", False, True),
    ("nvidia", "0.24.0", False, False),
]


@pytest.fixture
def machine(monkeypatch):
    """`machine(forced, build, accelerator)`: the environment that the platform is chosen in."""

    def make(forced: str, build: str | None, accelerator: bool) -> None:
        monkeypatch.setenv("VERL_PLATFORM", forced)
        monkeypatch.setattr(detect, "cpu_vllm_version", lambda: build)
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: accelerator)

    return make


@pytest.mark.parametrize("forced, build, accelerator, expected", ACTIVE)
def test_when_the_cpu_platform_is_active(machine, forced, build, accelerator, expected):
    machine(forced, build, accelerator)
    assert detect.is_active() is expected
    assert cpu_platform.PlatformCPU().is_available() is expected


@pytest.mark.parametrize(
    "forced, build, gpu, expected",
    [
        ("", "0.24.0", False, "cpu"),
        ("", None, False, "nvidia"),  # verl's own fallback
        ("", "0.24.0", True, "nvidia"),  # an accelerator wins, also over an installed CPU build
        ("cpu", None, True, "cpu"),
        ("huawei", "0.24.0", False, "huawei"),
    ],
)
def test_which_platform_verl_picks(machine, monkeypatch, forced, build, gpu, expected):
    from verl.plugin.platform import platform_manager

    registry = platform_manager.PlatformRegistry
    assert registry.registered_names()[-1] == "cpu"  # asked last
    for name in registry.registered_names()[:-1]:
        available = gpu and name == "nvidia"
        monkeypatch.setattr(
            registry.get(name), "is_platform_available", lambda self, use_smi_check=False, a=available: a
        )
    machine(forced, build, gpu)
    assert platform_manager._detect_platform_name() == expected


def test_the_platform_answers_what_verl_asks():
    platform = cpu_platform.PlatformCPU()
    assert platform.device_name == platform.vendor_name == "cpu"
    assert platform.current_device() == torch.device("cpu") and platform.device_count() == 1
    assert platform.communication_backend_name() == "gloo" and platform.ray_resource_name() == "GPU"
    assert not platform.is_ipc_supported() and platform.cudart() is None
    with platform.nvtx_range("x"):
        pass
    module = platform.device_module
    for name in ("max_memory_allocated", "max_memory_reserved", "memory_allocated", "memory_reserved"):
        assert getattr(module, name)() == 0
    free, total = module.mem_get_info()
    assert 0 < free <= total
    assert module.is_available is torch.cpu.is_available  # the rest is torch.cpu
    with pytest.raises(AttributeError):
        module.no_such_thing  # noqa: B018
    for seed in (platform.manual_seed, platform.manual_seed_all, module.manual_seed, module.manual_seed_all):
        with torch.random.fork_rng(devices=[]):
            seed(3)
            drawn = torch.rand(1)
            torch.manual_seed(3)
            assert torch.equal(torch.rand(1), drawn)


# ---- registration, in processes of their own -----------------------------------------------------------------------

EVERYTHING = """
    import sys
    import avar_verl.attention, avar_verl.plugin.config, avar_verl.model.checkpoint, avar_verl.model.families
    import avar_verl.objectives.agto, avar_verl.objectives.vars, avar_verl.objectives.vas
    import avar_verl.rewards.accuracy, avar_verl.roles
    core = [name for name in ("verl", "vllm", "ray") if name in sys.modules]
    assert not core, f"the core imports {core}"

    # In a process of its own: the platform as the first import, which runs into the plugin while it is half made.
    import os
    child = os.fork()
    if not child:
        import avar_verl.plugin.compat.cpu.platform
        from verl.plugin.platform.platform_manager import PlatformRegistry
        os._exit(0 if PlatformRegistry.get("cpu") is avar_verl.plugin.compat.cpu.platform.PlatformCPU else 1)

    import verl
    assert "avar_verl.plugin.register" in sys.modules
    heavy = ("verl.workers.engine", "verl.trainer.ppo.v1", "verl.experimental.agent_loop", "vllm")
    light = [name for name in heavy if name in sys.modules]
    assert not light, f"registering imports {light}"
    from verl.plugin.platform import get_platform
    assert type(get_platform()).__name__ == "PlatformCPU"

    import verl.workers.engine
    from verl.workers.engine.base import EngineRegistry
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead, FSDPEngineWithValueHead
    from avar_verl.plugin.engine.fsdp import AvarFSDPEngine
    engines = EngineRegistry._engines["language_model"]
    for backend in ("fsdp", "fsdp2"):
        for key in ("cpu", ("cuda", "nvidia"), ("cuda", "amd"), ("npu", "huawei")):
            assert engines[backend][key] is AvarFSDPEngine, key
        assert engines[backend]["cuda"] is FSDPEngineWithLMHead
        for device, vendor in [("", ""), ("cuda", "nvidia"), ("cuda", "amd"), ("npu", "huawei")]:
            os.environ.update(VERL_ENGINE_DEVICE=device, VERL_ENGINE_VENDOR=vendor)
            assert EngineRegistry.get_engine_cls("language_model", backend) is AvarFSDPEngine, (device, vendor)
    os.environ.update(VERL_ENGINE_DEVICE="", VERL_ENGINE_VENDOR="")
    assert EngineRegistry.get_engine_cls("value_model", "fsdp2") is FSDPEngineWithValueHead
    assert issubclass(AvarFSDPEngine, FSDPEngineWithLMHead)

    from verl.utils import tensordict_utils
    from verl.workers import engine_workers
    for module in (tensordict_utils, engine_workers, sys.modules["verl.workers.engine.base"]):
        assert module.maybe_fix_3d_position_ids.__name__ == "fix_3d_position_ids", module
    assert engine_workers.TrainingWorker._postprocess_output.__wrapped__
    import torch.distributed
    assert torch.distributed.init_process_group._avar_cpu
    from verl.models.transformers import qwen2_vl
    assert qwen2_vl._get_input_embeds.__wrapped__

    from verl.trainer.ppo.v1 import get_trainer_cls
    from avar_verl.plugin.trainer.ppo import AvarPPOTrainer
    assert get_trainer_cls("avar_sync") is AvarPPOTrainer
    import verl.experimental.agent_loop
    from verl.experimental.agent_loop.agent_loop import _agent_loop_registry
    target = _agent_loop_registry["avar_single_turn"]["_target_"]
    assert target == "avar_verl.plugin.rollout.agent_loop.AvarSingleTurnAgentLoop", target
    target = _agent_loop_registry["avar_tool_agent"]["_target_"]
    assert target == "avar_verl.plugin.rollout.tool_agent_loop.AvarToolAgentLoop", target
    from verl.experimental.reward_loop.reward_manager import get_reward_manager_cls
    from avar_verl.plugin.rollout.reward_manager import AvarRewardManager
    assert get_reward_manager_cls("avar") is AvarRewardManager
    import importlib.metadata
    if importlib.util.find_spec("vllm"):
        assert importlib.metadata.version("vllm").endswith("+cpu")
    assert os.waitpid(child, 0)[1] == 0, "importing the platform first"
    print("everything is registered")
"""

ANOTHER_VERL = """
    import importlib.metadata
    original = importlib.metadata.version
    importlib.metadata.version = lambda name: "0.9.2" if name == "verl" else original(name)
    import verl
    print("went on")
"""


@pytest.fixture(scope="module")
def processes():
    """Both at the same time: most of their time goes into importing verl."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("VERL_")}
    environment |= {"VERL_PLATFORM": "cpu", "AVAR_VERL": "1"}
    started = {
        name: subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for name, code in [("everything", EVERYTHING), ("another verl", ANOTHER_VERL)]
    }
    yield started
    for process in started.values():
        process.kill()
        process.wait()


@pytest.mark.e2e
def test_another_verl_ends_the_process_loudly(processes):
    out, error = processes["another verl"].communicate(timeout=300)
    assert processes["another verl"].returncode not in (0, None) and "went on" not in out
    assert "plugs into verl 0.9.1; got verl 0.9.2" in error
    assert error.rstrip().endswith("avar_verl could not register itself with verl (see the error above).")


@pytest.mark.e2e
def test_verl_finds_everything_and_imports_stay_light(processes):
    out, error = processes["everything"].communicate(timeout=300)
    assert processes["everything"].returncode == 0 and "everything is registered" in out, error[-3000:]


def test_no_matrix_of_all_heads_outside_tests():
    root = Path(__file__).parents[3]
    for path in [*root.glob("avar_verl/**/*.py"), *root.glob("reward_fns/*.py"), *root.glob("recipes/**/*.py")]:
        assert "output_attentions" not in path.read_text(), path
