# SPDX-License-Identifier: Apache-2.0
"""Trains one run after the other through verl's SFT trainer, in the same processes.

Run by torchrun from conftest.py. Usage: sft_runs.py WORK_DIR, with WORK_DIR/runs.json {name: overrides}. verl patches
the classes of one family at a time, so families do not meet.
"""

import json
import os
import sys
import traceback
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from verl.trainer.sft_trainer import SFTTrainer
from verl.utils.distributed import destroy_global_process_group, initialize_global_process_group

from tests.e2e.launch import CONFIG


def main() -> None:
    work = Path(sys.argv[1])
    torch.set_num_threads(1)
    errors = {}
    initialize_global_process_group()
    with initialize_config_dir(str(Path(CONFIG[1]).resolve()), version_base=None):
        for name, overrides in json.loads((work / "runs.json").read_text()).items():
            os.environ["VERL_FILE_LOGGER_PATH"] = str(work / f"{name}.jsonl")
            try:
                SFTTrainer(config=compose("avar_sft", overrides)).fit()
            except Exception as error:  # One run's failure is that run's; every rank raises the same.
                traceback.print_exc()
                errors[name] = f"{type(error).__name__}: {error}"
    destroy_global_process_group()
    if os.environ["RANK"] == "0":
        (work / "errors.json").write_text(json.dumps(errors))


if __name__ == "__main__":
    main()
