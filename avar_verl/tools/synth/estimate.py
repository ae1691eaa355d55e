# SPDX-License-Identifier: Apache-2.0
"""`avar synth estimate`: calls, tokens and dollars of a run before anything is spent. No Ray, no network.

Stage 1 is counted exactly: every prompt is rendered. Later stages get the output of the previous one; if it is not in
the cache yet, its length is the mean of the cached answers, or `expected_tokens`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass

from rich.console import Console

from avar_verl.tools.synth.chain import advance, make_request
from avar_verl.tools.synth.config import STAGES, SynthConfig
from avar_verl.tools.synth.duplicates import Overlap
from avar_verl.tools.synth.items import Item
from avar_verl.tools.synth.store import Call, Failure, Store
from avar_verl.tools.text import numbers_table


@dataclass
class StageEstimate:
    """Of the calls still to be made: number, tokens, dollars; `most_usd` if every answer has max_tokens tokens;
    `cached`: calls not made; `measured`: answers that the mean length is based on.
    """

    calls: int = 0
    cached: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    usd: float = 0.0
    most_usd: float = 0.0
    measured: int = 0


@dataclass
class Estimate:
    """Estimate of a run. `skipped`: unusable inputs, or inputs in a test set; `ended`: inputs that are already done."""

    stages: dict[str, StageEstimate]
    inputs: int = 0
    skipped: int = 0
    ended: int = 0

    @property
    def usd(self) -> float:
        """Dollars of all stages."""
        return sum(stage.usd for stage in self.stages.values())


def estimate(config: SynthConfig, items: Iterable[Item], store: Store, overlap: Overlap | None = None) -> Estimate:
    """Count the calls of a run over these items, assuming that every item passes every stage."""
    means = store.means()
    out = Estimate({stage: StageEstimate() for stage in STAGES})
    lengths = {}
    for stage in STAGES:
        measured = means.get((stage, config.model(stage).model))
        lengths[stage] = measured[2] if measured else config.stage(stage).expected_tokens
        out.stages[stage].measured = measured[0] if measured else 0
    seen: set[str] = set()

    async def get(key: str) -> Call | Failure | None:
        return store.get([key]).get(key)

    for item in items:
        out.inputs += 1
        if item.problem or (overlap is not None and overlap.find(item)):
            out.skipped += 1
            continue
        progress = asyncio.run(advance(config, item, get))
        for stage in progress.calls:
            out.stages[stage].cached += 1
        if progress.request is None:
            out.ended += 1
            continue
        first = STAGES.index(progress.request.stage)
        _add(
            config,
            out.stages[STAGES[first]],
            progress.request.stage,
            progress.request.input_tokens,
            lengths,
            seen,
            progress.request.key,
        )
        for stage in STAGES[first + 1 :]:
            before = STAGES[STAGES.index(stage) - 1]
            chars = lengths[before] * config.model(before).chars_per_token
            blank = {"description": "", "reasoning": "", "final_answer": ""}
            request = make_request(config, stage, item, blank)
            tokens = request.input_tokens + round(chars / config.model(stage).chars_per_token)
            _add(config, out.stages[stage], stage, tokens, lengths, seen, f"{stage}:{item.id}")
    return out


def _add(
    config: SynthConfig, part: StageEstimate, stage: str, input_tokens: int, lengths: dict, seen: set[str], key: str
) -> None:
    if key in seen:  # the same request twice is made once
        return
    seen.add(key)
    model = config.model(stage)
    part.calls += 1
    part.input_tokens += input_tokens
    part.output_tokens += round(lengths[stage])
    part.usd += model.cost(input_tokens, lengths[stage])
    part.most_usd += model.cost(input_tokens, config.stage(stage).max_tokens)


def print_estimate(config: SynthConfig, found: Estimate, spent: float, console: Console) -> None:
    """A table of the stages and a line of totals."""
    title = f"{found.inputs} inputs, {found.skipped} unusable, {found.ended} done already"
    table = numbers_table(title, ("stage", "calls", "cached", "tokens in", "tokens out", "USD", "at most"))
    for stage, part in found.stages.items():
        numbers = (part.calls, part.cached, part.input_tokens, part.output_tokens)
        table.add_row(stage, *(f"{n:,}" for n in numbers), f"{part.usd:.4f}", f"{part.most_usd:.4f}")
    console.print(table)
    for stage, part in found.stages.items():
        source = f"the mean of {part.measured} answers" if part.measured else "expected_tokens"
        console.print(f"{stage}: {config.model(stage).model}, length by {source}", highlight=False)
    calls = sum(part.calls for part in found.stages.values())
    most = sum(part.most_usd for part in found.stages.values())
    line = f"{calls:,} calls, {found.usd:.4f} USD, at most {most:.4f}; {spent:.4f} spent already"
    if config.budget_usd is not None:
        line += f"; budget {config.budget_usd:g}" + (
            ", which is not enough" if spent + found.usd > config.budget_usd else ""
        )
    console.print(line, highlight=False)
    for name, endpoint in config.endpoints.items():
        parts = [found.stages[stage] for stage in STAGES if config.model(stage).endpoint == name]
        minutes = []
        if endpoint.requests_per_minute:
            minutes.append(sum(part.calls for part in parts) / endpoint.requests_per_minute)
        if endpoint.tokens_per_minute:
            reserved = [
                part.input_tokens + part.calls * config.stage(stage).max_tokens
                for stage, part in found.stages.items()
                if config.model(stage).endpoint == name
            ]
            minutes.append(sum(reserved) / endpoint.tokens_per_minute)
        if minutes:
            console.print(f"{name}: {max(minutes):.1f} minutes by its rate limits", highlight=False)
