# SPDX-License-Identifier: Apache-2.0
"""Worker of `benchmarks/gpu.py`: three guided steps of verl's SFT engine and one measured log-prob pass, in float32.

    python -m benchmarks.gpu_engine RESULT.json padded|packed ...

The demo's tiny Qwen2.5-VL on 24 samples of the photo grid. Packed on a GPU goes through flash-attn, which has no
float32: there the forward pass is bfloat16.
"""

import json
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
import verl.workers.engine  # noqa: F401  registers the engines
from omegaconf import OmegaConf
from tensordict.tensorclass import NonTensorData
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils as tu
from verl.utils.dataset.dataset_utils import SFTTensorCollator
from verl.utils.dataset.multiturn_sft_dataset import MultiTurnSFTDataset
from verl.utils.device import get_device_name
from verl.utils.distributed import initialize_global_process_group
from verl.workers.config import FSDPOptimizerConfig, HFModelConfig
from verl.workers.engine_workers import TrainingWorker, TrainingWorkerConfig
from verl.workers.utils.losses import sft_loss

from avar_verl.objectives.vars import MASS_FIELDS
from avar_verl.plugin.config import MEASURE_FLAG, VISUAL_OUTPUT, AgtoConfig, VarsConfig
from avar_verl.plugin.engine.config import AvarFSDPEngineConfig
from avar_verl.tools.demo import photo_grid
from avar_verl.tools.demo.tiny_model import build_tiny_model

STEPS, BATCH = 3, 8


def main() -> None:
    file, layouts = Path(sys.argv[1]), sys.argv[2:]
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.set_num_threads(2)
    initialize_global_process_group()
    file.write_text(json.dumps({layout: steps(layout == "packed") for layout in layouts}))
    torch.distributed.destroy_process_group()


def steps(packed: bool) -> dict:
    on_gpu = get_device_name() != "cpu"
    dtype = "bf16" if packed and on_gpu else "fp32"
    with tempfile.TemporaryDirectory() as folder:
        path = build_tiny_model(Path(folder) / "model")
        data_file = Path(folder) / "sft.parquet"
        photo_grid.make_sft_parquet(data_file, STEPS * BATCH, 0, "train")
        attention = "flash_attention_2" if packed and on_gpu else "sdpa"
        model = HFModelConfig(
            path=str(path),
            use_remove_padding=packed,
            enable_gradient_checkpointing=True,
            override_config={"attn_implementation": attention},
        )
        dataset = MultiTurnSFTDataset(
            str(data_file),
            model.tokenizer,
            OmegaConf.create({"pad_mode": "no_padding", "max_length": 512}),
            model.processor,
        )

        def build(**fields) -> TrainingWorker:
            worker = TrainingWorker(
                TrainingWorkerConfig(
                    model_type="language_model",
                    model_config=model,
                    engine_config=AvarFSDPEngineConfig(
                        strategy="fsdp2",
                        use_torch_compile=False,
                        mixed_precision={"param_dtype": dtype, "reduce_dtype": "fp32"},
                        **fields,
                    ),
                    optimizer_config=FSDPOptimizerConfig(
                        lr=1e-3,
                        total_training_steps=10,
                        lr_scheduler_type="constant",
                        override_optimizer_config={"eps": 1e-6},
                    ),
                    checkpoint_config=CheckpointConfig(),
                    profiler_config=None,
                )
            )
            worker.set_loss_fn(partial(sft_loss, config=None))
            worker.reset()
            return worker

        def batch(step: int, **flags):
            meta = {
                "use_remove_padding": packed,
                "use_dynamic_bsz": False,
                "max_token_len_per_gpu": 4096,
                "micro_batch_size_per_gpu": 4,
                "temperature": 1.0,
                "global_batch_size": BATCH,
                "pad_mode": "no_padding",
                "pad_token_id": model.tokenizer.pad_token_id,
            }
            rows = [dataset[step * BATCH + index] for index in range(BATCH)]
            data = tu.get_tensordict(tensor_dict=SFTTensorCollator("no_padding")(rows), non_tensor_dict=meta)
            tokens = data["input_ids"].offsets().diff().tolist()
            tu.assign_non_tensor(data, update_lr_scheduler=True, global_token_num=NonTensorData(tokens), **flags)
            return data

        measured = build(vars=VarsConfig()).infer_batch(batch(0, compute_loss=False, **{MEASURE_FLAG: True}))
        visual = torch.stack(list(measured[VISUAL_OUTPUT].unbind()))[:, : len(MASS_FIELDS)]
        worker = build(agto=AgtoConfig(alpha=0.15, beta=0.1))
        losses = []
        for step in range(STEPS):
            metrics = dict(tu.get(worker.train_batch(batch(step)), "metrics"))
            losses.append(
                [float(metrics[name]) for name in ("avar/lm_loss", "avar/enhance", "avar/suppress", "grad_norm")]
            )
    return {"losses": losses, "visual": visual.float().flatten().tolist(), "dtype": dtype}


if __name__ == "__main__":
    main()
