# SPDX-License-Identifier: Apache-2.0
"""Trains verl's TrainingWorker on a few fixed batches, once for every scenario, and writes down what happened.

Run by torchrun from test_fsdp_engine.py: verl patches transformers' classes for the whole process, which other tests
must not see. Usage: -m tests.plugin.engine.scenarios WORK_DIR, with WORK_DIR/spec.json a list of scenarios (see `run`);
rank 0 writes WORK_DIR/result.pt.
"""

import json
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import verl.workers.engine  # noqa: F401  registers the engines
from omegaconf import OmegaConf
from tensordict.tensorclass import NonTensorData
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils as tu
from verl.utils.dataset.dataset_utils import SFTTensorCollator
from verl.utils.dataset.multiturn_sft_dataset import MultiTurnSFTDataset
from verl.utils.distributed import initialize_global_process_group
from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
from verl.workers.engine_workers import TrainingWorker, TrainingWorkerConfig
from verl.workers.utils.losses import sft_loss

from avar_verl.model.corrupt import first_rows, partners
from avar_verl.plugin.config import (
    DEPENDENCY_OUTPUT,
    MEASURE_FLAG,
    PARTNER,
    PROMPT_ROWS,
    VISUAL_OUTPUT,
    AgtoConfig,
    VarsConfig,
)
from avar_verl.plugin.datasets.sft import AvarSFTDataset
from avar_verl.plugin.engine import fsdp
from avar_verl.plugin.engine.config import AvarFSDPEngineConfig
from avar_verl.plugin.engine.fsdp import AvarFSDPEngine
from tests.plugin.engine import grpo_scenarios

STEPS = 3
FP32 = {"param_dtype": "fp32", "reduce_dtype": "fp32"}


def build_worker(scenario: dict, model_path: str) -> TrainingWorker:
    model = HFModelConfig(
        path=model_path,
        use_remove_padding=scenario.get("use_remove_padding", False),
        enable_gradient_checkpointing=scenario.get("checkpointing", False),
        override_config={"attn_implementation": scenario.get("attention", "sdpa")},
        **scenario.get("model", {}),
    )
    common = dict(strategy=scenario.get("strategy", "fsdp2"), use_torch_compile=False, mixed_precision=FP32)
    stock = scenario.get("stock", False)
    EngineRegistry._engines["language_model"]["fsdp2"]["cpu"] = FSDPEngineWithLMHead if stock else AvarFSDPEngine
    if stock:
        engine = FSDPEngineConfig(**common, **scenario.get("engine", {}))
    else:
        vars_ = VarsConfig(**scenario["vars"]) if "vars" in scenario else None
        agto = AgtoConfig(**scenario["agto"]) if "agto" in scenario else None
        engine = AvarFSDPEngineConfig(**common, **scenario.get("engine", {}), agto=agto, vars=vars_)
    optimizer = FSDPOptimizerConfig(
        lr=1e-3, total_training_steps=10, lr_scheduler_type="constant", override_optimizer_config={"eps": 1e-6}
    )
    worker = TrainingWorker(
        TrainingWorkerConfig(
            model_type="language_model",
            model_config=model,
            engine_config=engine,
            optimizer_config=optimizer,
            checkpoint_config=CheckpointConfig(),
            profiler_config=None,
        )
    )
    worker.set_loss_fn(partial(sft_loss, config=None))
    worker.reset()
    return worker


def batches(dataset, scenario: dict, pad_token_id: int):
    """The same global batches of 8 samples for every number of processes."""
    rank, world = dist.get_rank(), dist.get_world_size()
    if scenario.get("engine", {}).get("ulysses_sequence_parallel_size", 1) == world:
        rank, world = 0, 1  # Every process has a share of every sample.
    meta = {
        "use_remove_padding": scenario.get("use_remove_padding", False),
        "use_dynamic_bsz": "dynamic" in scenario,
        "max_token_len_per_gpu": scenario.get("dynamic", 4096),
        "micro_batch_size_per_gpu": scenario.get("micro", 8 // world),
        "temperature": 1.0,
        "global_batch_size": 8,
        "pad_mode": "no_padding",
        "pad_token_id": pad_token_id,
    }
    for step in range(STEPS):
        rows = [dataset[step * 8 + index] for index in range(rank, 8, world)]
        tensors = SFTTensorCollator("no_padding")(rows)
        if scenario.get("vars", {}).get("corruption") == "swap":
            features = [dataset[step * 8 + index].get("multi_modal_inputs") or {} for index in range(8)]
            features = [first_rows(own, scenario.get("prompt_rows")) for own in features]
            # There is no TransferQueue here: the keys are indices, and the engine is given what it would fetch.
            chosen = ["" if index is None else str(index) for index in partners(features)]
            tensors[PARTNER] = [chosen[index] for index in range(rank, 8, world)]
            fsdp.partner_features = lambda data, own=features: {"": {}, **{str(i): f for i, f in enumerate(own)}}
        if "prompt_rows" in scenario:  # As the agent loop stores it.
            tensors["extra_fields"] = [{PROMPT_ROWS: scenario["prompt_rows"]} for _ in rows]
        if "boxes" in scenario:  # As verl's RL data set hands it through.
            tensors["extra_info"] = [
                {"index": i, "boxes": scenario["boxes"], "boxes_size": [112, 112]} for i in range(8)
            ]
        data = tu.get_tensordict(tensor_dict=tensors, non_tensor_dict=meta)
        tokens = data["input_ids"].offsets().diff().tolist()
        tu.assign_non_tensor(data, update_lr_scheduler=True, global_token_num=NonTensorData(tokens))
        yield data


def run(scenario: dict, model_path: str, dataset, pad_token_id: int) -> dict:
    """One scenario: metrics of every step, parameters at the end, measured masses where `vars` asks for them."""
    if "grpo" in scenario:
        rows = [dataset[index] for index in range(dist.get_rank(), grpo_scenarios.NUM, dist.get_world_size())]
        return grpo_scenarios.run(scenario["grpo"], model_path, rows)
    torch.manual_seed(0)  # the adapters' weights
    try:
        worker = build_worker(scenario, model_path)
    except ValueError as error:
        return {"error": str(error)}
    out = {"metrics": []}
    if scenario.get("update"):
        try:
            worker.train_batch(next(batches(dataset, scenario, pad_token_id)))
        except ValueError as error:
            out["refused"] = str(error)
        # As with LoRA's reference: a pass that is not flagged is no measurement, and none is one of an update.
        for flag in (False, True):
            data = next(batches(dataset, scenario, pad_token_id))
            tu.assign_non_tensor(data, compute_loss=False, **{MEASURE_FLAG: flag})
            worker.infer_batch(data)
            out[f"may_update_{flag}"] = worker.engine._has_measured
        worker.train_batch(next(batches(dataset, scenario, pad_token_id)))
        return out
    if "vars" in scenario:
        data = next(batches(dataset, scenario, pad_token_id))
        tu.assign_non_tensor(data, compute_loss=False, **{MEASURE_FLAG: True})
        output = worker.infer_batch(data)
        if output is None:
            return out
        rows = [dataset[index] for index in range(8)]
        out["samples"] = [
            {key: row.get(key) for key in ("input_ids", "loss_mask", "multi_modal_inputs")} for row in rows
        ]
        if VISUAL_OUTPUT in output.keys():
            out["visual"] = torch.stack(list(output[VISUAL_OUTPUT].unbind()))
        if DEPENDENCY_OUTPUT in output.keys():
            out["dependency"] = list(output[DEPENDENCY_OUTPUT].unbind())
        out["log_probs"] = output["log_probs"].values()
        return out
    for data in batches(dataset, scenario, pad_token_id):
        output = worker.train_batch(data)
        if output is not None:  # Under sequence parallelism one rank of a group answers.
            out["metrics"].append(dict(tu.get(output, "metrics")))
    out["parameters"] = {name: p.full_tensor().clone() for name, p in worker.engine.module.named_parameters()}
    return out


def main() -> None:
    work = Path(sys.argv[1])
    torch.set_num_threads(1)
    initialize_global_process_group()
    spec = json.loads((work / "spec.json").read_text())
    config = HFModelConfig(path=spec["model"], override_config={"attn_implementation": "sdpa"})
    dataset = MultiTurnSFTDataset(
        spec["data"],
        config.tokenizer,
        OmegaConf.create({"pad_mode": "no_padding", "max_length": 512}),
        config.processor,
    )
    result = {}
    for scenario in spec["scenarios"]:
        path, own, pad_id = spec["model"], dataset, config.tokenizer.pad_token_id
        if "path" in scenario:
            path = scenario["path"]
            family = HFModelConfig(path=path)
            kwargs = scenario.get("template_kwargs", {})
            settings = OmegaConf.create({"max_length": 1024, "apply_chat_template_kwargs": kwargs})
            own = AvarSFTDataset(scenario["data"], family.tokenizer, settings, family.processor)
            pad_id = family.tokenizer.pad_token_id
        result[scenario["name"]] = run(scenario, path, own, pad_id)
    if dist.get_rank() == 0:
        torch.save(result, work / "result.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
