# SPDX-License-Identifier: Apache-2.0
"""Trains one family after the other through verl's SFT trainer, in the same processes.

Run by torchrun from test_families.py. Usage: sft_families.py WORK_DIR, with WORK_DIR/spec.json a list of
{"name": run, "overrides": [...]}. verl patches the classes of one family at a time, so they do not meet.
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
        for run in json.loads((work / "spec.json").read_text()):
            os.environ["VERL_FILE_LOGGER_PATH"] = str(work / f"{run['name']}.jsonl")
            try:
                SFTTrainer(config=compose("avar_sft", run["overrides"])).fit()
            except Exception as error:  # One family's failure is that family's; every rank raises the same.
                traceback.print_exc()
                errors[run["name"]] = f"{type(error).__name__}: {error}"
    destroy_global_process_group()
    if os.environ["RANK"] == "0":
        (work / "errors.json").write_text(json.dumps(errors))


if __name__ == "__main__":
    main()
