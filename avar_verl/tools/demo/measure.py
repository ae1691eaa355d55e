# SPDX-License-Identifier: Apache-2.0
"""Measurements of a checkpoint for the demo: greedy answers, VAS as in `avar vas`, and the attention of answers.

Shape suffixes: S = positions, I = image tokens, L = layers, H = query heads
"""

from collections.abc import Sequence
from typing import Any

import torch

from avar_verl.model.checkpoint import Checkpoint
from avar_verl.objectives.vas import STATISTICS
from avar_verl.tools.demo.photo_grid import Sample
from avar_verl.tools.progress import progress
from avar_verl.tools.rows import conversation
from avar_verl.tools.stats import Bootstrap
from avar_verl.tools.vas.score import QUERIES, Scorer
from avar_verl.tools.vas.statistics import summarize_query
from avar_verl.tools.vas.words import attention_to_image_tokens

# `vas.json` -> the demo's stage files.
HEATMAPS = {"share": "image_share", "ratio": "vas", "image": "image_mass", "system": "system_mass"}


def answers(checkpoint: Checkpoint, samples: Sequence[Sample], max_new_tokens: int, batch_size: int = 48) -> list[str]:
    """Greedy responses to the questions, decoded without special tokens."""
    scorer = Scorer(checkpoint, max_new_tokens=max_new_tokens)
    out = []
    for start in progress(range(0, len(samples), batch_size), "generate", unit="batch", leave=False):
        batch = samples[start : start + batch_size]
        ids = [one.response_ids for one in scorer.prepare([conversation(sample.row) for sample in batch])]
        out += checkpoint.processor.tokenizer.batch_decode(ids, skip_special_tokens=True)
    return out


def measure_vas(checkpoint: Checkpoint, samples: Sequence[Sample], batch_size: int = 16) -> dict[str, dict[str, Any]]:
    """Results of `avar vas` on the reference responses, by query role (`summarize_query`).

    Raises:
        ValueError: no sample has an image, a system turn and a query.
    """
    scorer, records = Scorer(checkpoint), []
    for start in progress(range(0, len(samples), batch_size), "VAS", unit="batch", leave=False):
        batch = samples[start : start + batch_size]
        records += scorer.score(scorer.prepare([conversation(sample.row) for sample in batch]))
    return {query: summarize_query(query, records, scorer.layers, Bootstrap()) for query in QUERIES}


def headline(summary: dict[str, Any]) -> dict[str, float]:
    """The STATISTICS of one query role, with the numbers of counted and skipped samples."""
    values = {key: summary["overall"][key]["value"] for key in STATISTICS}
    return {**values, "num_samples": summary["num_samples"], "num_skipped": sum(summary["skipped"].values())}


def heatmap(summary: dict[str, Any]) -> dict[str, list]:
    """(L, H) means over queries of one query role."""
    return {name: summary["heads"][key]["value"] for name, key in HEATMAPS.items()}


def answer_attention(checkpoint: Checkpoint, sample: Sample, response: str) -> torch.Tensor:
    """Attention of the tokens that predict the last answer, from its opening tag up to the token before its closing
    tag, to every image token: (I,) float32, mean over these tokens, layers and heads.

    Raises:
        ValueError: a response without an answer.
    """
    prepared = Scorer(checkpoint).prepare([conversation({**sample.row, "response": response})])[0]
    ids_S = prepared.rendered.ids_S
    opening, closing = checkpoint.processor.tokenizer.convert_tokens_to_ids(["<answer>", "</answer>"])
    chosen_S = torch.zeros_like(ids_S, dtype=torch.bool)
    starts, ends = (ids_S == opening).nonzero().flatten(), (ids_S == closing).nonzero().flatten()
    if len(starts) and len(ends):
        chosen_S[int(starts[-1]) : int(ends[-1])] = True
    return attention_to_image_tokens(checkpoint, prepared.rendered, prepared.roles_S, chosen_S).mean(0)
