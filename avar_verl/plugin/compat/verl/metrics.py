# SPDX-License-Identifier: Apache-2.0
"""Engine metrics as numbers in the SFT log.

`TrainingWorker._postprocess_output` (verl/workers/engine_workers.py:193) gathers every engine metric into a list with
one entry a rank, and the SFT trainer logs that list as it is (verl/trainer/sft_trainer.py:385): the console drops it
and tensorboard refuses it. verl's own SFT engines return no metrics, so nobody has noticed. The engine's `avar/*`
metrics are global means already, the same on every rank; the wrapper below logs the first.
"""

import functools

PREFIX = "avar/"


def apply(engine_workers) -> None:
    """Wrap `TrainingWorker._postprocess_output` of `verl.workers.engine_workers`."""
    from verl.utils import tensordict_utils as tu

    original = engine_workers.TrainingWorker._postprocess_output

    @functools.wraps(original)
    def _postprocess_output(self, output, **kwargs):
        final_output = original(self, output, **kwargs)
        metrics = tu.get(final_output, "metrics")
        for key, value in metrics.items():
            if key.startswith(PREFIX) and isinstance(value, list):
                metrics[key] = value[0]
        return final_output

    engine_workers.TrainingWorker._postprocess_output = _postprocess_output
