# SPDX-License-Identifier: Apache-2.0
"""Fails when verl, vLLM or transformers change what the patches and the glue rely on, and checks the patches."""

import importlib.metadata
import inspect
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict

from avar_verl.compat import detect, position_ids, process_group, vllm_cpu

SITE = Path(importlib.metadata.distribution("verl").locate_file("verl"))
needs_cpu_build = pytest.mark.skipif(detect.cpu_vllm_version() is None, reason="vLLM's CPU build is not installed")


def source(path: str) -> str:
    return (SITE / path).read_text()


def nested(matrices):
    return torch.nested.as_nested_tensor(matrices, layout=torch.jagged)


# ---- what the modules of compat say about upstream -----------------------------------------------------------------


def test_the_trainer_mode_is_compared_with_sync_in_six_places():
    text = source("trainer/ppo/v1/trainer_base.py")
    assert len(re.findall(r'trainer_mode [!=]= "sync"', text)) == 6
    assert "self.trainer_mode = self.config.trainer.v1.trainer_mode" in text


def test_upstream_lines_of_the_patches():
    body = source("utils/tensordict_utils.py").split("def maybe_fix_3d_position_ids")[1].split("\ndef ")[0]
    assert 'data["position_ids"]._ragged_idx = 2' in body and "offsets" not in body
    assert source("utils/distributed.py").count('f"cpu:gloo,{get_device_name()}:{get_nccl_backend()}"') == 2
    worker = source("workers/engine_workers.py")
    assert "final_metrics = allgather_dict_into_dict(data=metrics, group=dp_group)" in worker
    assert "inputs_embeds + 0.0 * image_embeds.mean()" in source("models/transformers/qwen2_vl.py")
    assert "partial(sft_loss, config=None)" in source("trainer/sft_trainer.py")
    assert 'logging.getLogger(__name__).debug("Failed to load plugin' in source("__init__.py")


@needs_cpu_build
def test_upstream_lines_of_vllm():
    vllm = Path(importlib.metadata.distribution("vllm-cpu").locate_file("vllm"))
    utils = (vllm / "model_executor/layers/utils.py").read_text()
    assert "def dispatch_cpu_unquantized_gemm(\n    layer: torch.nn.Module,\n    remove_weight: bool,\n)" in utils
    assert "layer.cpu_linear(x, weight, bias)" in utils
    assert (
        "dispatch_cpu_unquantized_gemm(layer, remove_weight=True)"
        in (vllm / "model_executor/layers/linear.py").read_text()
    )
    assert '+ "+cpu"' in (vllm / "platforms/__init__.py").read_text()


def test_attention_interface():
    from transformers.modeling_utils import AttentionInterface

    assert list(inspect.signature(AttentionInterface.get_interface).parameters) == [
        "self",
        "attn_implementation",
        "default",
    ]


# ---- the patches ---------------------------------------------------------------------------------------------------


def positions(lengths):
    rows = [torch.arange(4 * n).reshape(4, n) + 1000 * i for i, n in enumerate(lengths)]
    ids = nested([torch.zeros(n, dtype=torch.long) for n in lengths])
    return rows, TensorDict({"position_ids": nested(rows), "input_ids": ids}, batch_size=len(lengths))


@pytest.mark.parametrize("lengths", [[5, 5, 5], [3, 5], [4], [4, 4], [7]])
def test_position_ids_belong_to_their_tokens(lengths):
    rows, data = positions(lengths)
    position_ids.fix_3d_position_ids(data)
    fixed = data["position_ids"]
    assert fixed._ragged_idx == 2 and torch.equal(fixed.offsets(), data["input_ids"].offsets())
    assert torch.equal(fixed.values(), torch.cat(rows, dim=1))
    position_ids.fix_3d_position_ids(data)  # again, as verl does
    assert torch.equal(data["position_ids"].values(), torch.cat(rows, dim=1))


def test_stock_verl_gets_equal_lengths_wrong():
    rows, data = positions([5, 5, 5])
    data["position_ids"]._ragged_idx = 2  # all that verl's function does
    assert data["position_ids"].values().shape != torch.cat(rows, dim=1).shape


def test_position_ids_of_text_and_of_other_layouts():
    dense = TensorDict({"position_ids": torch.zeros(2, 4, 3)}, batch_size=2)
    position_ids.fix_3d_position_ids(dense)
    position_ids.fix_3d_position_ids(TensorDict({}, batch_size=2))
    flat = TensorDict({"position_ids": nested([torch.zeros(2), torch.zeros(3)])}, batch_size=2)
    position_ids.fix_3d_position_ids(flat)
    _, data = positions([5, 5])
    data["input_ids"] = nested([torch.zeros(4), torch.zeros(6)])
    with pytest.raises(ValueError, match="one row of positions for every token"):
        position_ids.fix_3d_position_ids(data)


def test_gloo_alone(monkeypatch):
    seen = []
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend=None, **kwargs: seen.append(backend))
    process_group.apply()
    process_group.apply()
    for backend in ("cpu:gloo,cpu:gloo", "cpu:gloo,cuda:nccl", None):
        torch.distributed.init_process_group(backend=backend)
    assert seen == ["gloo", "cpu:gloo,cuda:nccl", None]


@needs_cpu_build
def test_the_cpu_build_answers_to_its_name(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    vllm_cpu.alias_distribution()
    vllm_cpu.alias_distribution()
    assert sum(finder is vllm_cpu._VllmCpuFinder for finder in sys.meta_path) == 1
    assert importlib.metadata.version("vllm") == f"{importlib.metadata.version('vllm-cpu')}+cpu"
    names = [entry.value for entry in importlib.metadata.entry_points(group="vllm.general_plugins")]
    assert names.count("avar_verl.vllm_plugin:register") == 1
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("vllm-rocm")


@pytest.mark.parametrize(
    "forced, build, accelerator, expected",
    [
        ("", "0.24.0", False, True),
        ("", "0.24.0", True, False),
        ("", None, False, False),  # the head node of a GPU cluster
        ("cpu", None, True, True),
        ("nvidia", "0.24.0", False, False),
    ],
)
def test_when_the_cpu_platform_is_active(monkeypatch, forced, build, accelerator, expected):
    monkeypatch.setenv("VERL_PLATFORM", forced)
    monkeypatch.setattr(detect, "cpu_vllm_version", lambda: build)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: accelerator)
    assert detect.is_active() is expected


# ---- registration, in a process of its own -------------------------------------------------------------------------


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    import os

    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=300,
    )


def test_verl_finds_everything_and_import_stays_light():
    done = python(
        """
        import sys
        import verl
        light = [name for name in ("verl.workers.engine", "verl.trainer.ppo.v1", "vllm") if name in sys.modules]
        assert not light, light
        from verl.plugin.platform import get_platform
        assert get_platform().device_name == "cpu"
        import verl.workers.engine
        from verl.workers.engine.base import EngineRegistry
        from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
        engines = EngineRegistry._engines["language_model"]
        for backend in ("fsdp", "fsdp2"):
            for key in ("cpu", ("cuda", "nvidia"), ("cuda", "amd"), ("npu", "huawei")):
                assert engines[backend][key].__name__ == "AvarFSDPEngine", key
            assert engines[backend]["cuda"] is FSDPEngineWithLMHead
        assert EngineRegistry.get_engine_cls("language_model", "fsdp2").__name__ == "AvarFSDPEngine"
        from verl.utils import tensordict_utils
        from verl.workers import engine_workers
        assert tensordict_utils.maybe_fix_3d_position_ids.__name__ == "fix_3d_position_ids"
        assert engine_workers.maybe_fix_3d_position_ids.__name__ == "fix_3d_position_ids"
        from verl.trainer.ppo.v1 import get_trainer_cls
        assert get_trainer_cls("avar_sync").__name__ == "AvarPPOTrainer"
        import verl.experimental.agent_loop
        from verl.experimental.agent_loop.agent_loop import _agent_loop_registry
        target = _agent_loop_registry["avar_single_turn"]["_target_"]
        assert target == "avar_verl.rollout.agent_loop.AvarSingleTurnAgentLoop"
        """,
        VERL_PLATFORM="cpu",
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_another_verl_ends_the_process_loudly():
    done = python(
        """
        import importlib.metadata
        original = importlib.metadata.version
        importlib.metadata.version = lambda name: "0.9.2" if name == "verl" else original(name)
        import verl
        print("went on")
        """
    )
    assert done.returncode != 0 and "went on" not in done.stdout
    assert "plugs into verl 0.9.1; got verl 0.9.2" in done.stderr


def test_the_core_imports_neither_verl_nor_vllm():
    done = python(
        """
        import sys
        import avar_verl.attention, avar_verl.config, avar_verl.measure, avar_verl.objectives.agto
        import avar_verl.objectives.reward, avar_verl.objectives.vas, avar_verl.rewards.accuracy, avar_verl.roles
        import avar_verl.families
        loaded = [name for name in ("verl", "vllm") if name in sys.modules]
        assert not loaded, loaded
        """
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_no_matrix_of_all_heads_outside_tests():
    root = Path(__file__).parents[2]
    for path in [*root.glob("avar_verl/**/*.py"), *root.glob("reward_fns/*.py"), *root.glob("recipes/**/*.py")]:
        assert "output_attentions" not in path.read_text(), path
