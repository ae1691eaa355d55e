# SPDX-License-Identifier: Apache-2.0
"""The scripts of examples/: what they would launch, composed and validated."""

import os
import subprocess
from pathlib import Path

import pytest
from verl.tools.tool_registry import initialize_tools_from_config
from verl.utils.config import omega_conf_to_dataclass

from avar_verl.model.families import FAMILIES
from avar_verl.plugin.engine.config import AvarFSDPEngineConfig
from avar_verl.plugin.refusals import check_command
from avar_verl.plugin.rollout.zoom_in import ImageZoomIn
from tests.plugin.test_config import recipe

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.sh") if path.name != "common.sh")
# Stands for torchrun and python: writes its arguments down, and a checkpoint for the next stage.
RECORDER = """#!/usr/bin/env bash
printf '%s\\n' "$@" > "$CALLS/$(basename "$0")"
for argument in "$@"; do
    case $argument in trainer.default_local_dir=*) out=${argument#*=};; esac
done
mkdir -p "$out" && echo 7 > "$out/latest_checkpointed_iteration.txt"
"""


@pytest.fixture
def calls(tmp_path):
    """`calls(script)` -> {"torchrun": arguments, "python": arguments} of the stages it starts."""

    def run(script: str, **settings: str) -> dict[str, list[str]]:
        for program in ("torchrun", "python"):
            (tmp_path / program).write_text(RECORDER)
            (tmp_path / program).chmod(0o755)
        recorded = tmp_path / "calls"
        recorded.mkdir()
        environment = {
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "CALLS": str(recorded),
            "TRAIN": "sft.parquet",
            "OUT": str(tmp_path / "out"),
            **settings,
        }
        subprocess.run(["bash", str(EXAMPLES / script)], env=environment, check=True, capture_output=True)
        return {path.name: path.read_text().splitlines() for path in recorded.iterdir()}

    return run


def compose(arguments: list[str]):
    name = arguments[arguments.index("--config-name") + 1]
    return recipe(name, *arguments[arguments.index("--config-name") + 2 :])


def test_there_is_a_script_for_each_row_of_the_table():
    table = (EXAMPLES / "README.md").read_text()
    known = ["gemma3_12b", "glm4_6v_flash", "internvl3_5_8b", "llama3_2_11b_vision", "qwen3_5_4b", "qwen3_vl_8b"]
    known += ["qwen3_vl_8b_zoom", "qwen3_5_27b", "gemma4_e4b"]
    assert SCRIPTS == sorted(f"{name}.sh" for name in known)
    for script in SCRIPTS:
        (row,) = [line for line in table.splitlines() if f"`{script}`" in line]
        assert row.split("|")[3].strip(" `") in FAMILIES


@pytest.mark.e2e
@pytest.mark.parametrize("script", SCRIPTS)
def test_stages_compose_and_hand_over(calls, script, tmp_path):
    stages = calls(script)
    for command in stages.values():
        check_command(command)
    cold_start = compose(stages["torchrun"])
    engine = omega_conf_to_dataclass(cold_start.engine)
    assert isinstance(engine, AvarFSDPEngineConfig) and engine.agto.guides
    assert cold_start.data.train_files == "sft.parquet" and cold_start.trainer.n_gpus_per_node == 8
    if script.startswith("llama"):
        assert engine.agto.alpha == 0 and set(stages) == {"torchrun"}
        return
    grpo = compose(stages["python"])
    folder = tmp_path / "out" / "cold_start" / "global_step_7" / "huggingface"
    assert grpo.actor_rollout_ref.model.path == str(folder)
    assert omega_conf_to_dataclass(grpo.actor_rollout_ref.actor.fsdp_config).vars.lambda_v == 0.3
    if script.endswith("zoom.sh"):
        tools = initialize_tools_from_config(grpo.actor_rollout_ref.rollout.multi_turn.tool_config_path)
        assert [type(tool) for tool in tools] == [ImageZoomIn] and tools[0].coordinates == "relative"
    if script.startswith("gemma3"):
        # Every sixth of 48 layers, in both stages.
        assert list(engine.agto.layers) == list(grpo.avar.vars.layers) == list(range(5, 48, 6))
        assert not cold_start.model.use_remove_padding and not grpo.actor_rollout_ref.model.use_remove_padding


SIZES = {"1": {"GPUS": "1"}, "16": {"GPUS": "8", "NNODES": "2"}}  # And 8, above.


def test_a_model_that_does_not_fit_is_refused(calls):
    with pytest.raises(subprocess.CalledProcessError) as error:
        calls("qwen3_5_27b.sh", **SIZES["1"])
    assert b"need at least 8 GPUs; got 1" in error.value.stderr


@pytest.mark.e2e
@pytest.mark.parametrize(
    "script, size",
    [
        ("gemma4_e4b.sh", "1"),
        ("glm4_6v_flash.sh", "1"),
        ("qwen3_5_4b.sh", "1"),
        ("glm4_6v_flash.sh", "16"),
        ("qwen3_5_27b.sh", "16"),
    ],
)
def test_sizes(calls, script, size):
    """Batches divide, offloading is on where the model is large for its GPUs, and rollouts fit into the nodes."""
    stages = calls(script, **SIZES[size])
    for command in stages.values():
        check_command(command)
    cold_start, grpo = (compose(stages[program]) for program in ("torchrun", "python"))
    for trainer in (cold_start.trainer, grpo.trainer):
        assert trainer.nnodes * trainer.n_gpus_per_node == int(size)
    actor, rollout = grpo.actor_rollout_ref.actor, grpo.actor_rollout_ref.rollout
    assert int(size) % rollout.tensor_model_parallel_size == 0
    assert actor.ppo_mini_batch_size * rollout.n % int(size) == cold_start.data.train_batch_size % int(size) == 0
    large = size == "1" or script == "qwen3_5_27b.sh"
    assert actor.fsdp_config.optimizer_offload == large
    assert (cold_start.engine.optimizer_offload or cold_start.engine.offload_policy) == large


def test_a_second_node_leaves_grpo_to_the_first(calls):
    stages = calls("gemma4_e4b.sh", NNODES="2", NODE_RANK="1", MASTER_ADDR="10.0.0.1")
    assert set(stages) == {"torchrun"} and "--node_rank=1" in stages["torchrun"]
