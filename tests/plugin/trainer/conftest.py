# SPDX-License-Identifier: Apache-2.0
"""The TransferQueue of the trainer tests."""

import pytest
from omegaconf import OmegaConf


@pytest.fixture(scope="package")
def queue():
    """A TransferQueue of one storage unit on a local Ray."""
    import ray
    import transfer_queue as tq

    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False)
    from hydra import compose, initialize_config_module

    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer").transfer_queue
    OmegaConf.update(config, "backend.SimpleStorage.num_data_storage_units", 1)
    tq.init(config)
    yield tq
    tq.close()
    ray.shutdown()
