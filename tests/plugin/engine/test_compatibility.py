# SPDX-License-Identifier: Apache-2.0
"""One update of verl's actor worker with every setting of docs/compatibility.md that the actor reads."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from avar_verl.objectives.vars import VISUAL_FIELDS
from avar_verl.tools.demo import photo_grid
from tests.compatibility import ACTOR, ROWS

# A minute of CPU.
pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[3]
ENGINE_ROWS = [row for row in ROWS if row.test == "engine"]
LOSS_ROWS = [row for row in ROWS if row.test == "loss"]
LOSS_MODE = f"{ACTOR}.policy_loss.loss_mode="
MODES = [row.settings[0].removeprefix(LOSS_MODE) for row in LOSS_ROWS if row.settings[0].startswith(LOSS_MODE)]
# As in test_fsdp_engine.py.
TOLERANCE = dict(rtol=2e-4, atol=2e-5)


def name_of(row) -> str:
    return " ".join([*row.with_, *row.settings])


@pytest.fixture(scope="module")
def results(tmp_path_factory, tiny_model_path) -> dict:
    """Every scenario once; packed ones last, for which verl replaces the process's attention, fused ones after them."""
    work = tmp_path_factory.mktemp("actor")
    photo_grid.make_sft_parquet(work / "sft.parquet", 8, 0, "train")
    scenarios = {"": {"overrides": []}}
    for row in ENGINE_ROWS:
        scenarios[" ".join(row.with_)] = {"overrides": list(row.with_)}
        scenarios[name_of(row)] = {"overrides": [*row.with_, *row.settings]}
    for stock in (True, False):
        kind = "stock" if stock else "ours"
        scenarios[f"{kind} modes"] = {"overrides": [], "losses": MODES, "stock": stock}
        for row in LOSS_ROWS:
            if not row.settings[0].startswith(LOSS_MODE):
                weighted = "rollout_is" in name_of(row)
                own = {"overrides": list(row.settings), "stock": stock, "weighted": weighted}
                scenarios[f"{kind} {name_of(row)}"] = own
    order = sorted(scenarios, key=lambda name: ("use_fused" in name, "use_remove_padding=true" in name))
    spec = {"model": str(tiny_model_path), "data": str(work / "sft.parquet")}
    spec["scenarios"] = [{"name": name, **scenarios[name]} for name in order]
    (work / "spec.json").write_text(json.dumps(spec))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    command += ["-m", "tests.plugin.engine.grpo_scenarios", str(work)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(work / "result.pt", weights_only=False)


@pytest.mark.parametrize("row", ENGINE_ROWS, ids=lambda row: row.what)
def test_a_setting_of_the_engine_changes_neither_masses_nor_the_update(results, row):
    got, expected = results[name_of(row)], results[" ".join(row.with_)]
    assert "error" not in got, got
    assert got["visual"].shape == (8, len(VISUAL_FIELDS)) and bool(got["visual"][:, 0].isfinite().all())
    for name in ("visual", "log_probs", "entropy"):
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-5, equal_nan=True)
    for name, parameter in expected["parameters"].items():
        torch.testing.assert_close(got["parameters"][name], parameter, **TOLERANCE, msg=lambda t, n=name: f"{n}: {t}")


@pytest.mark.parametrize("row", LOSS_ROWS, ids=lambda row: row.what)
def test_a_policy_loss_is_that_of_verls_engine_to_the_bit(results, row):
    is_mode = row.settings[0].startswith(LOSS_MODE)
    ours, verls = (results[f"{kind} {'modes' if is_mode else name_of(row)}"] for kind in ("ours", "stock"))
    assert "visual" in ours and "visual" not in verls
    index = MODES.index(row.settings[0].removeprefix(LOSS_MODE)) if is_mode else 0
    got, expected = ours["metrics"][index], verls["metrics"][index]
    assert got == expected and expected["grad_norm"][0] > 0
    for name, parameter in verls["parameters"].items():
        assert torch.equal(ours["parameters"][name], parameter), name


def test_settings_of_the_loss_have_an_effect(results):
    """Every loss but those that add to the same one: the updates differ."""
    plain = results[""]["parameters"]
    for row in LOSS_ROWS:
        if not row.settings[0].startswith(LOSS_MODE):
            other = results[f"ours {name_of(row)}"]["parameters"]
            assert any(not torch.equal(plain[name], other[name]) for name in plain), row.what
    losses = [metrics["actor/pg_loss"] for metrics in results["ours modes"]["metrics"]]
    assert len({str(value) for value in losses}) == len(MODES)
