# SPDX-License-Identifier: Apache-2.0
"""verl's agent-loop workers, in which the rollouts of a prompt share its rendering and its image features.

actor_rollout_ref.rollout.agent.agent_loop_manager_class=avar_verl.plugin.rollout.worker.AvarAgentLoopManager
"""

from typing import Any

import ray
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ, AgentLoopWorkerTQ

from avar_verl.plugin.compat.verl.rollout_features import FEATURES
from avar_verl.plugin.compat.verl.shared_features import holds_pixels
from avar_verl.plugin.rollout.shared import CURRENT, SharedPrompt
from avar_verl.plugin.switch import switch_on

# verl's class is a Ray actor (agent_loop_tq.py:49), and Ray lets nobody derive from one.
_AgentLoopWorker: Any = AgentLoopWorkerTQ.__ray_metadata__.modified_class.__ray_actor_class__


class AvarAgentLoopWorker(_AgentLoopWorker):
    """`AgentLoopWorkerTQ` that stores the pixels of a prompt with the first of its rollouts, and its name in all.

    Scores are computed side by side, as in verl's worker; until the first rollout is stored, the others wait for it.
    Features that are not the prompt's own, such as those of tool images, are stored with every rollout.
    """

    def __init__(self, *args, **kwargs):
        # Ray sends the methods that it finds, and an inherited one whose class cannot be imported as a copy, to which
        # the class of the actor is a stranger. Of the inherited ones, only this one asks for its class.
        super().__init__(*args, **kwargs)

    async def _run_prompt(self, prompt: dict, sampling_params: dict, trajectory: dict, trace: bool = False) -> None:
        shared = SharedPrompt(prompt["raw_prompt"], "val" if trajectory["validate"] else "train")
        CURRENT.set(shared)  # Seen by this task, the one of the prompt, and by those that it starts.
        try:
            await super()._run_prompt(prompt, sampling_params, trajectory, trace)
        finally:
            shared.drop()

    async def _agent_loop_postprocess(self, output, validate, **kwargs) -> None:
        outputs = output if isinstance(output, list) else [output]
        shared = CURRENT.get()
        sharing = {
            f"{kwargs['uid']}_{kwargs['session_id']}_{index}": one
            for index, one in enumerate(outputs)
            if shared.features is not None and (one.multi_modal_data or {}).get(FEATURES) is shared.features
        }
        if not sharing or not holds_pixels(shared.features):
            return await super()._agent_loop_postprocess(output, validate, **kwargs)
        await self._compute_score(outputs, kwargs=kwargs)  # verl's own call finds the score.

        async def store() -> None:
            for key, one in sharing.items():
                one.multi_modal_data = {**one.multi_modal_data, FEATURES: shared.named(key)}
            await super(AvarAgentLoopWorker, self)._agent_loop_postprocess(output, validate, **kwargs)

        if shared.holder is None:
            async with shared.lock:
                if shared.holder is None:
                    await store()
                    shared.holder = next(iter(sharing))
                    return
        await store()


class AvarAgentLoopManager(AgentLoopManagerTQ):
    """`AgentLoopManagerTQ` with `AvarAgentLoopWorker`s."""

    def __init__(self, *args, **kwargs):
        switch_on()
        super().__init__(*args, **kwargs)
        self.agent_loop_workers_class = ray.remote(AvarAgentLoopWorker)
