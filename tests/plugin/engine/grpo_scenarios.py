# SPDX-License-Identifier: Apache-2.0
"""One GRPO step of verl's actor worker on fixed rollouts, for several settings of the recipe.

Run by torchrun from test_compatibility.py, with WORK_DIR/spec.json a list of scenarios (see `run`); rank 0 writes
WORK_DIR/result.pt. scenarios.py runs one of them, too. Usage: -m tests.plugin.engine.grpo_scenarios WORK_DIR
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import verl.workers.engine  # noqa: F401  registers the engines
from omegaconf import OmegaConf, open_dict
from tensordict.tensorclass import NonTensorData
from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage
from verl.utils import tensordict_utils as tu
from verl.utils.dataset.dataset_utils import SFTTensorCollator
from verl.utils.dataset.multiturn_sft_dataset import MultiTurnSFTDataset
from verl.utils.distributed import initialize_global_process_group
from verl.workers.config import HFModelConfig
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
from verl.workers.engine_workers import ActorRolloutRefWorker
from verl.workers.utils.padding import response_from_nested

from avar_verl.objectives.vars import VISUAL_FIELDS, shape_visual_reward
from avar_verl.plugin.config import MEASURE_FLAG, VISUAL_OUTPUT, VarsConfig
from avar_verl.plugin.engine.fsdp import AvarFSDPEngine
from tests.plugin.test_config import recipe

NUM = 8
COMMON = [
    "machine=cpu_grpo",
    "actor_rollout_ref.model.use_remove_padding=false",
    "actor_rollout_ref.actor.ppo_mini_batch_size=8",
    "actor_rollout_ref.rollout.n=1",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=4",
    "actor_rollout_ref.actor.optim.lr=1e-4",
    "actor_rollout_ref.actor.optim.lr_scheduler_type=constant",
    # Adam divides a gradient by its own size: without this, rounding of one near zero would be a whole step.
    "+actor_rollout_ref.actor.optim.override_optimizer_config.eps=1e-6",
]


def nested(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def rollouts(rows: list[dict]):
    """Rows of the cold start as verl's agent loop stores rollouts: the last turn is the response."""
    tensors = SFTTensorCollator("no_padding")(rows)
    first = [int(row["loss_mask"].argmax()) for row in rows]
    tensors["prompts"] = nested([row["input_ids"][:start] for row, start in zip(rows, first, strict=True)])
    tensors["responses"] = nested([row["input_ids"][start:] for row, start in zip(rows, first, strict=True)])
    masks = [row["loss_mask"][start:] for row, start in zip(rows, first, strict=True)]
    tensors["response_mask"] = tensors["loss_mask"] = nested(masks)
    data = tu.get_tensordict(tensor_dict=tensors, non_tensor_dict={"pad_mode": "no_padding", "pad_token_id": 0})
    tu.assign_non_tensor(data, global_token_num=NonTensorData(data["input_ids"].offsets().diff().tolist()))
    return data, masks


def run(scenario: dict, model_path: str, rows: list[dict]) -> dict:
    """Masses, log-probabilities and entropy of the rollouts; metrics and parameters after an update for every loss.

    rows: of the NUM rollouts every world size-th, from that of the rank. scenario: `overrides` of the recipe; `stock`:
    verl's engine; `losses`: names of policy losses, one update each; `rewarded`: advantages are those of an accuracy
    and r_visual, as the trainer computes them from the measurements of all processes, and `rewards` are returned.
    """
    torch.manual_seed(0)
    indices = range(dist.get_rank(), NUM, dist.get_world_size())
    stock = scenario.get("stock", False)
    EngineRegistry._engines["language_model"]["fsdp2"]["cpu"] = FSDPEngineWithLMHead if stock else AvarFSDPEngine
    overrides = [*COMMON, f"actor_rollout_ref.model.path={model_path}", *scenario["overrides"]]
    config = recipe("avar_grpo", *overrides)
    OmegaConf.resolve(config)
    own = config.actor_rollout_ref
    if stock:
        with open_dict(own.actor.fsdp_config) as engine:
            engine["_target_"] = "verl.workers.config.FSDPEngineConfig"
            for name in ("vars", "freeze_vision_tower", "freeze_projector"):
                del engine[name]
    worker = ActorRolloutRefWorker(own, role="actor")
    try:
        worker.init_model()
    except ValueError as error:
        return {"error": str(error)}
    data, masks = rollouts(rows)
    meta = {"compute_loss": False, "calculate_entropy": True, "temperature": 1.0, MEASURE_FLAG: not stock}
    tu.assign_non_tensor(data, **meta)
    measured = worker.compute_log_prob(data.copy())
    out = {name: measured[name].values() for name in ("log_probs", "entropy")}
    if VISUAL_OUTPUT in measured.keys():
        out["visual"] = torch.stack(list(measured[VISUAL_OUTPUT].unbind()))
    old = response_from_nested(measured["log_probs"], data["response_mask"])
    # Other than the policy's, so that ratios are not 1 and clipping has something to clip.
    shifts = (torch.Generator().manual_seed(index) for index in indices)
    old = [row + 0.3 * torch.randn(row.shape, generator=one) for row, one in zip(old.unbind(), shifts, strict=True)]
    data["old_log_probs"] = nested(old)
    data["ref_log_prob"] = nested([row - 0.1 for row in old])
    weights = (0.5 + 0.1 * index for index in indices)
    data["rollout_is_weights"] = nested([torch.full_like(row, one) for row, one in zip(old, weights, strict=True)])
    advantages = torch.arange(NUM) % 3 - 1.0
    if scenario.get("rewarded", False):
        out["rewards"], advantages = rewards(out["visual"], worker.actor.engine.engine_config.vars)
    data["advantages"] = nested([advantages[i] * mask.float() for i, mask in zip(indices, masks, strict=True)])
    if not scenario.get("weighted", False):
        data.pop("rollout_is_weights")
    actor = own.actor
    size = actor.ppo_mini_batch_size * own.rollout.n
    meta = {
        "calculate_entropy": actor.calculate_entropy or actor.entropy_coeff != 0,
        "global_batch_size": size,
        "mini_batch_size": size,
        "epochs": actor.ppo_epochs,
        "seed": actor.data_loader_seed,
        "dataloader_kwargs": {"shuffle": actor.shuffle},
        MEASURE_FLAG: False,
    }
    tu.assign_non_tensor(data, **meta)
    out["metrics"] = []
    for loss in scenario.get("losses", [actor.policy_loss.loss_mode]):
        loss_config = worker.loss_fn.keywords["config"].policy_loss
        object.__setattr__(loss_config, "loss_mode", loss)
        output = worker.update_actor(data.copy())
        if output is not None:
            metrics = tu.get(output, "metrics").items()
            metrics = {key: value for key, value in metrics if key != "mfu" and not key.startswith("perf/")}
            out["metrics"].append({"name": loss, **metrics})
    out["parameters"] = {name: p.full_tensor().clone() for name, p in worker.actor.engine.module.named_parameters()}
    return out


def rewards(visual: torch.Tensor, settings: VarsConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards and GRPO's advantages of all NUM rollouts, two prompts of four; the first three of each are right."""
    parts = [torch.empty(0)] * dist.get_world_size()
    dist.all_gather_object(parts, visual)
    visual_BF = torch.stack(parts, dim=1).flatten(0, 1)
    uids = [index // 4 for index in range(NUM)]
    correct_B = torch.tensor([index % 4 < 3 for index in range(NUM)])
    raw_B = visual_BF[:, VISUAL_FIELDS.index(settings.statistic)]
    reward_B = correct_B + settings.lambda_v * shape_visual_reward(raw_B, correct_B, uids)
    one = torch.ones(NUM, 1)
    advantage_B, _ = compute_grpo_outcome_advantage(reward_B[:, None], one, np.array(uids))
    return reward_B, advantage_B[:, 0]


def main() -> None:
    work = Path(sys.argv[1])
    torch.set_num_threads(1)
    initialize_global_process_group()
    spec = json.loads((work / "spec.json").read_text())
    model = HFModelConfig(path=spec["model"])
    settings = OmegaConf.create({"pad_mode": "no_padding", "max_length": 512})
    dataset = MultiTurnSFTDataset(spec["data"], model.tokenizer, settings, model.processor)
    rank, world = dist.get_rank(), dist.get_world_size()
    rows = [dataset[index] for index in range(rank, NUM, world)]
    result = {one["name"]: run(one, spec["model"], rows) for one in spec["scenarios"]}
    if rank == 0:
        torch.save(result, work / "result.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
