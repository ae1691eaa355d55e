# SPDX-License-Identifier: Apache-2.0
"""How `--intervene` reaches vLLM: the only file of this package that imports `avar_verl.intervention`."""

import json
from dataclasses import dataclass, field
from typing import Any

import openai


@dataclass(frozen=True)
class Intervention:
    """The intervention of an evaluation; the default is none."""

    text: str = ""
    """The spec in its shortest form, part of the settings of the records."""

    extra_body: dict[str, Any] = field(default_factory=dict)
    """Fields of every request."""

    server_arguments: tuple[str, ...] = ()
    """Arguments of a vLLM that this command starts."""


def make_intervention(text: str | None) -> Intervention:
    """The intervention of `--intervene`; None means none.

    Raises:
        ValueError: not a spec.
    """
    if text is None:
        return Intervention()
    from avar_verl.intervention.spec import InterventionSpec
    from avar_verl.intervention.vllm_hook import engine_arguments, request_arguments

    spec = InterventionSpec.parse(text)
    # The engine only enables interventions; the request sets one, and the records' settings have it.
    return Intervention(
        text=str(spec),
        extra_body={"vllm_xargs": request_arguments(spec)},
        server_arguments=("--additional-config", json.dumps(engine_arguments()["additional_config"])),
    )


async def check_server(client: openai.AsyncOpenAI, model: str, intervention: Intervention) -> None:
    """Check that a server reads the field: a vLLM without this package's plugin would silently ignore it.

    Raises:
        ValueError: the server answers a request with an invalid spec.
    """
    if not intervention.text:
        return
    from avar_verl.intervention.vllm_hook import REQUEST_KEY

    try:
        await client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": "-"}],
            max_tokens=1,
            extra_body={"vllm_xargs": {REQUEST_KEY: "no spec"}},
        )
    except openai.BadRequestError:
        return
    raise ValueError(
        f"--intervene needs a vLLM with the plugin of avar_verl; got a server that ignores {REQUEST_KEY}. Install "
        "avar_verl where vLLM runs, or leave --server-url out."
    )
