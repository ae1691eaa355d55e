# SPDX-License-Identifier: Apache-2.0
"""The scripts of recipes/avar/cluster: what they start, on which node."""

import os
import socket
import subprocess
from pathlib import Path

import pytest
import yaml

CLUSTER = Path(__file__).parents[1] / "recipes" / "avar" / "cluster"
# Stands for srun, which runs a command on every node, and for scontrol, which lists them.
SRUN = """#!/usr/bin/env bash
[ "$1" = --kill-on-bad-exit=1 ] && shift
for SLURM_NODEID in 0 1; do SLURM_NODEID=$SLURM_NODEID "$@"; done
"""
SCONTROL = '#!/usr/bin/env bash\n[ "$*" = "show hostnames n[0-1]" ] && printf "n0\\nn1\\n"\n'
# Stands for the script of the stage.
STAGE = '#!/usr/bin/env bash\necho "$(basename "$0") $NODE_RANK $NNODES $GPUS $HEAD $MASTER_ADDR $*"\n'


@pytest.mark.parametrize("stage, script", [("sft", "run_sft_qwen2_5_vl_7b.sh"), ("grpo", "on_every_node.sh")])
def test_slurm_runs_the_stage_on_every_node(tmp_path, stage, script):
    recipe = tmp_path / "recipe"
    (recipe / "cluster").mkdir(parents=True)
    python = f'#!/usr/bin/env bash\n[ "$*" = "-m recipes.avar" ] && echo {recipe}\n'
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("python", python)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (recipe / ("cluster" if stage == "grpo" else "") / script).write_text(STAGE)
    slurm = {"SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_NODELIST": "n[0-1]"}
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "STAGE": stage, **slurm}
    command = ["bash", CLUSTER / "slurm.sh", "a=1", "b=2 3"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines() == [f"{script} {rank} 2 4 n0 n0 a=1 b=2 3" for rank in (0, 1)], done.stderr
    refused = subprocess.run(command, env={**environment, "STAGE": "rl"}, capture_output=True, text=True)
    assert refused.returncode == 2 and "STAGE must be sft or grpo; got rl" in refused.stderr


@pytest.mark.parametrize(
    "own, mode",
    [
        ({}, ""),
        ({"RAY_AUTH_TOKEN": "abc"}, "token"),
        ({"RAY_AUTH_TOKEN_PATH": "{home}/.ray/auth_token"}, "token"),
        ({"HOME": "{home}"}, "token"),
        ({"RAY_AUTH_TOKEN": "abc", "RAY_AUTH_MODE": "disabled"}, "disabled"),
    ],
)
def test_a_node_that_joins_sends_the_token_that_the_head_asks_for(tmp_path, own, mode):
    """Ray's head asks for it wherever there is one; Ray sends it to an address only in the mode `token`."""
    (tmp_path / "ray").write_text('#!/usr/bin/env bash\necho "${RAY_AUTH_MODE:-} $*"\n')
    (tmp_path / "ray").chmod(0o755)
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("abc")
    own = {name: value.format(home=tmp_path) for name, value in own.items()}
    with socket.create_server(("127.0.0.1", 0)) as head:
        port = str(head.getsockname()[1])
        nodes = {"HEAD": "127.0.0.1", "PORT": port, "NODE_RANK": "1", "NNODES": "2", "GPUS": "4"}
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": "/nowhere", **nodes, **own}
        command = ["bash", CLUSTER / "on_every_node.sh"]
        environment["RAY_OPTIONS"] = "--num-cpus=32 --verbose"
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    address = f"start --address=127.0.0.1:{port} --num-gpus=4 --block --num-cpus=32 --verbose"
    assert done.stdout.splitlines() == [f"{mode} {address}"], done.stderr


def test_skypilot_runs_the_same_script():
    task = yaml.safe_load((CLUSTER / "skypilot.yaml").read_text())
    assert set(task) == {"name", "num_nodes", "workdir", "resources", "envs", "secrets", "file_mounts", "setup", "run"}
    assert task["envs"]["OUT"].startswith(tuple(task["file_mounts"]))
    script = task["run"].split()[-1]
    assert (CLUSTER.parents[2] / script).exists()
    for variable in ("HEAD", "NODE_RANK", "NNODES", "GPUS", "PORT"):
        assert f"{variable}=" in task["run"] and variable in (CLUSTER / "on_every_node.sh").read_text()
