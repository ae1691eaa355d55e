# SPDX-License-Identifier: Apache-2.0
"""Installed is not switched on: verl stays verl until a run names avar."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from avar_verl.plugin import switch, vllm_plugin
from avar_verl.plugin.compat.cpu import detect
from avar_verl.tools.demo import photo_grid

REPOSITORY = Path(__file__).parents[2]
# What a machine without an accelerator needs to run verl at all (`compat.cpu`).
CPU_ONLY = {"torch.distributed.all_to_all", "torch.distributed.init_process_group"}
OWN = "FSDPEngineWithLMHead"


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("AVAR_VERL", "VERL_"))}
    path = os.pathsep.join([*environment.pop("first_on_path", "").split(os.pathsep), str(REPOSITORY)]).strip(os.pathsep)
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=REPOSITORY,
        env=inherited | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


def report(*arguments: str, **environment: str) -> dict:
    done = python("-m", "tests.plugin.changes", *arguments, **environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def another_verl(folder: Path) -> str:
    """A folder that tells `importlib.metadata` of another version, as an upgrade would."""
    info = folder / "verl-9.9.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: verl\nVersion: 9.9.9\n")
    return str(folder)


@pytest.mark.e2e
def test_off_nothing_of_verl_is_changed():
    found = report(VERL_PLATFORM="nvidia")
    assert found["changed"] == [] and not found["flops"]
    assert set(found["engines"].values()) == {OWN}


@pytest.mark.e2e
def test_on_every_patch_is_everywhere_however_late():
    """Also where verl has imported the name of a patched function before."""
    early, late = report(VERL_PLATFORM="nvidia", AVAR_VERL="1"), report("switch_on", VERL_PLATFORM="nvidia")
    assert early == late
    assert set(early["changed"]) >= {
        "verl.utils.tensordict_utils.maybe_fix_3d_position_ids",
        "verl.workers.engine.base.maybe_fix_3d_position_ids",
        "verl.workers.engine_workers.maybe_fix_3d_position_ids",
        "verl.utils.tokenizer.hf_processor",
        "verl.utils.tokenizer.tokenizer.hf_processor",
        "verl.utils.fsdp_utils._select_fsdp2_wrap_targets",
        "verl.utils.model.get_hf_auto_model_class",
        "verl.models.transformers.qwen2_vl._get_input_embeds",
        "verl.models.transformers.qwen2_vl.qwen2_vl_attn_forward",
        "verl.models.transformers.glm4v._get_input_embeds",
        "verl.workers.engine_workers.TrainingWorker._postprocess_output",
        "verl.experimental.agent_loop.agent_loop.AgentLoopWorker._compute_multi_modal_inputs",
        "verl.utils.transferqueue_utils._async_meta_to_realdata",
    }
    assert early["flops"]
    # A key of device and vendor wins over that of a device (verl/workers/engine/base.py).
    engines = {key: name for key, name in early["engines"].items() if key.split()[1] not in ("cuda", "npu")}
    assert len(engines) == 8 and set(engines.values()) == {"AvarFSDPEngine"}


@pytest.mark.e2e
def test_another_version_of_verl_is_left_alone_until_avar_is_named(tmp_path):
    path = another_verl(tmp_path)
    names = "import verl.trainer.ppo.v1 as v1; print(sorted(v1.trainer_base.TRAINER_REGISTRY))"
    dormant = python("-c", names, first_on_path=path)
    assert dormant.returncode == 0, dormant.stderr[-2000:]
    assert "avar_sync" not in dormant.stdout

    named = python("-c", "import verl", first_on_path=path, AVAR_VERL="1")
    assert named.returncode == 1
    assert "avar_verl plugs into verl 0.9.1; got verl 9.9.9" in named.stderr
    used = python("-c", "import avar_verl.plugin.engine.config", first_on_path=path)
    assert used.returncode == 1
    assert "avar_verl plugs into verl 0.9.1; got verl 9.9.9" in used.stderr


@pytest.mark.e2e
def test_a_stock_cold_start_is_that_of_verl_without_the_plugin(tmp_path, tiny_model_path):
    """The same losses to the bit, verl's engine class, nothing changed but what a CPU needs."""
    data = tmp_path / "sft.parquet"
    photo_grid.make_sft_parquet(data, 16, 0, "train")

    def train(name: str, **environment: str) -> tuple[list[float], dict]:
        metrics, result = tmp_path / f"{name}.jsonl", tmp_path / f"{name}.json"
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
        overrides = [
            *("engine.strategy=fsdp2", "engine.use_torch_compile=false", "engine.dtype=float32"),
            "+engine.mixed_precision={param_dtype:fp32,reduce_dtype:fp32}",
            *(f"model.path={tiny_model_path}", "+model.override_config.attn_implementation=sdpa"),
            *("model.use_remove_padding=false", "model.enable_gradient_checkpointing=false"),
            *(f"data.train_files={data}", "data.train_batch_size=8", "data.micro_batch_size_per_gpu=4"),
            *("data.max_length=512", "data.num_workers=0", "data.use_dynamic_bsz=false", "optim.lr=1e-3"),
            *("trainer.device=cpu", "trainer.logger=[file]", "trainer.total_epochs=2", "trainer.test_freq=-1"),
            *("trainer.save_freq=-1", f"trainer.default_local_dir={tmp_path / name}"),
            f"hydra.run.dir={tmp_path / 'hydra'}",
        ]
        done = python(
            *launcher,
            *("-m", "tests.plugin.stock_sft"),
            str(result),
            "sft_trainer_engine",
            *overrides,
            VERL_FILE_LOGGER_PATH=str(metrics),
            **environment,
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
        rows = [json.loads(line)["data"] for line in metrics.read_text().splitlines()]
        return [row["train/loss"] for row in rows if "train/loss" in row], json.loads(result.read_text())

    losses, found = train("installed")
    expected, _ = train("without", PLAIN_CPU="1", VERL_USE_EXTERNAL_PLUGINS="none")
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert losses == expected
    assert found["engine"].endswith(f"transformer_impl.{OWN}")
    flash = {name for name in found["changed"] if name.startswith("verl.models.transformers.qwen2_vl.")}
    assert set(found["changed"]) - flash == CPU_ONLY


def test_the_environment_says_on_or_off(monkeypatch):
    monkeypatch.delenv("AVAR_VERL", raising=False)
    assert not switch.is_wanted()
    monkeypatch.setenv("AVAR_VERL", "1")
    assert switch.is_wanted()
    monkeypatch.setenv("AVAR_VERL", "yes")
    with pytest.raises(ValueError, match="must be 0 or 1; got 'yes'"):
        switch.is_wanted()


def test_the_trainer_refuses_workers_that_are_off(monkeypatch):
    from avar_verl.plugin.trainer.ppo import AvarPPOTrainer

    monkeypatch.delenv("AVAR_VERL", raising=False)
    with pytest.raises(ValueError, match="runtime_env.env_vars.AVAR_VERL='1'"):
        AvarPPOTrainer(None)


def test_the_trainer_refuses_workers_that_do_not_know_the_family(monkeypatch):
    from avar_verl.plugin.trainer.ppo import check_workers_know

    monkeypatch.setenv("AVAR_FAMILY", "")
    check_workers_know("")
    with pytest.raises(ValueError, match="got avar.family='mine:FAMILY' with AVAR_FAMILY=''.*runtime_env.env_vars"):
        check_workers_know("mine:FAMILY")
    monkeypatch.setenv("AVAR_FAMILY", "mine:FAMILY")
    check_workers_know("mine:FAMILY")


@pytest.mark.parametrize(
    "wanted, hook, verl, marked, expected",
    [
        (True, False, True, None, False),  # a verl run that names avar
        (False, False, True, None, True),  # one that does not
        (False, False, False, "1", True),  # a process that its engine has started
        (False, False, False, None, False),  # vLLM without verl
        (False, True, True, None, False),  # somebody who has imported the intervention
        (False, False, True, "0", False),  # a process that their engine has started
    ],
)
def test_vllm_of_a_stock_verl_run_is_not_patched(monkeypatch, wanted, hook, verl, marked, expected):
    modules = {name: m for name, m in sys.modules.items() if name not in ("verl", vllm_plugin.HOOK)}
    modules |= {"verl": object()} if verl else {}
    modules |= {vllm_plugin.HOOK: object()} if hook else {}
    monkeypatch.setattr(vllm_plugin, "sys", type("sys", (), {"modules": modules}))
    monkeypatch.setenv("AVAR_VERL", str(int(wanted)))
    monkeypatch.setenv(vllm_plugin.STOCK, marked or "")
    if marked is None:
        monkeypatch.delenv(vllm_plugin.STOCK)
    assert vllm_plugin.in_stock_verl() == expected
    assert os.environ.get(vllm_plugin.STOCK) == (None if wanted else str(int(expected)))


@pytest.mark.e2e
@pytest.mark.skipif(detect.cpu_vllm_version() is None, reason="vLLM's CPU build is not installed")
def test_the_cpu_platform_says_so_in_one_line():
    done = python("-c", "import verl, subprocess, sys; subprocess.run([sys.executable, '-c', 'import verl'])")
    assert done.stderr.count("avar_verl: no accelerator, so verl runs on the CPU") == 1
