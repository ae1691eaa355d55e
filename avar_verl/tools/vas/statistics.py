# SPDX-License-Identifier: Apache-2.0
"""From records to statistics with intervals: VAS and its companions, overall and by layer, head, position and image;
visual dependency, overall and by position.

Every number is a function of sums over the queries of all counted samples. Its interval is the bootstrap of
`tools.stats`, from the sums of each draw. Samples are drawn, not queries, because queries of one sample are dependent.
A single sample has no interval.

Shape suffixes: N = samples, D = draws, the first of which takes every sample once; L = layers, H = query heads,
    P = bins of positions, X = anything
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from avar_verl.objectives.dependency import mean_dependency
from avar_verl.objectives.vas import STATISTICS, band, vas_statistics
from avar_verl.tools.stats import Bootstrap, with_interval
from avar_verl.tools.vas.score import BIN_STARTS, DEPENDENCY, SUMS

# Statistics that can be computed from means over heads; the median over heads cannot.
MEAN_STATISTICS = tuple(name for name in STATISTICS if name != "vas_median")
HEAD_STATISTICS = ("vas", "image_share", "image_mass", "system_mass")


def totals(counts_DN: torch.Tensor, values_NX: torch.Tensor) -> torch.Tensor:
    """(D, ...) sums of the samples in each draw; inf and nan affect only the draws that contain them."""
    flat_NX = values_NX.reshape(len(values_NX), -1)
    finite_NX = torch.isfinite(flat_NX)
    out_DX = counts_DN @ flat_NX.where(finite_NX, 0.0)
    if not bool(finite_NX.all()):  # 0 times inf is nan, so non-finite values are counted separately and put back.
        for is_special_NX, special in ((flat_NX == math.inf, math.inf), (flat_NX.isnan(), math.nan)):
            out_DX = out_DX.masked_fill(counts_DN @ is_special_NX.double() > 0, special)
    return out_DX.reshape(len(counts_DN), *values_NX.shape[1:])


def means(
    counts_DN: torch.Tensor, queries_N: torch.Tensor, sums: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """(D, ...) mean over the queries of each draw, for each of `sums` (N, ...)."""
    queries_D = counts_DN @ queries_N.double()
    return {
        name: totals(counts_DN, sum_NX) / queries_D.reshape(-1, *[1] * (sum_NX.dim() - 1))
        for name, sum_NX in sums.items()
    }


def _stacked(parts: Sequence[Mapping[str, Any]]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(N,) queries and SUMS (N, L, H) of the records of one query role."""
    queries_N = torch.tensor([part["queries"] for part in parts])
    return queries_N, {name: _tensor([part[name] for part in parts]) for name in SUMS}


def _counts(bootstrap: Bootstrap, samples: Sequence) -> torch.Tensor:
    return torch.from_numpy(bootstrap.counts(len(samples)))


def _tensor(values: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(values, dtype=np.float64))  # numpy reads "inf" and "nan".


def _by_statistic(mean_of: Mapping[str, torch.Tensor], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    values = vas_statistics(*(mean_of[name] for name in SUMS))
    return {name: with_interval(values[name]) for name in names}


def bin_range(index: int) -> tuple[int, int | None]:
    """(first, last) position of a bin; last is None for the open one."""
    return BIN_STARTS[index], BIN_STARTS[index + 1] - 1 if index + 1 < len(BIN_STARTS) else None


def summarize_query(
    name: str, records: Sequence[Mapping[str, Any]], layers: Sequence[int], bootstrap: Bootstrap
) -> dict[str, Any]:
    """Content of `vas.json` for one query role.

    Raises:
        ValueError: no sample has VAS for it.
    """
    kept = [record for record in records if name in record]
    skipped = Counter(record["skipped"][name] for record in records if name in record["skipped"])
    if not kept:
        counts = ", ".join(f"{reason}: {count}" for reason, count in skipped.items())
        raise ValueError(
            f"VAS needs samples with an image, a system turn and a query; got none for {name} queries in "
            f"{len(records)} samples ({counts}). Give the rows what they lack (--system writes a system turn), or "
            "measure other queries (--query)."
        )
    parts = [record[name] for record in kept]
    counts_DN = _counts(bootstrap, parts)
    queries_N, sums = _stacked(parts)
    mean_of = means(counts_DN, queries_N, sums)
    by_layer = _by_statistic({key: value_DLH[..., None, :] for key, value_DLH in mean_of.items()}, STATISTICS)
    by_head = _by_statistic({key: value_DLH[..., None, None] for key, value_DLH in mean_of.items()}, HEAD_STATISTICS)
    overall = _by_statistic(mean_of, STATISTICS)
    out = {
        "num_samples": len(kept),
        "num_queries": int(queries_N.sum()),
        "num_queries_before_image": sum(part["before_image"] for part in parts),
        "skipped": dict(sorted(skipped.items())),
        "overall": overall,
        "band": band(overall["vas"]["value"]),
        "layers": {"layer": list(layers), **by_layer},
        "heads": by_head,
        "images": by_image(kept, name, bootstrap),
    }
    if name == "response":
        out["positions"] = by_position([part["positions"] for part in parts], bootstrap)
    return out


def by_position(positions: Sequence[Mapping[str, Any]], bootstrap: Bootstrap) -> list[dict[str, Any]]:
    """For every bin that a response reaches: `first`, `last`, `num_samples`, `num_queries` and MEAN_STATISTICS.

    A bin has the samples whose response reaches it, so later bins describe longer responses.
    """
    out = []
    for index in range(max(len(one["queries"]) for one in positions)):
        there = [one for one in positions if len(one["queries"]) > index and one["queries"][index]]
        if not there:
            continue
        queries_N = torch.tensor([one["queries"][index] for one in there])
        sums = {name: _tensor([one[name][index] for one in there])[:, :, None] for name in SUMS}
        mean_of = means(_counts(bootstrap, there), queries_N, sums)
        first, last = bin_range(index)
        counts = {"num_samples": len(there), "num_queries": int(queries_N.sum())}
        by_layer = {key: value_DLH[..., None, :] for key, value_DLH in mean_of.items()}
        layers = vas_statistics(*(by_layer[key] for key in SUMS))
        out.append(
            {
                **{"first": first, "last": last},
                **counts,
                **_by_statistic(mean_of, MEAN_STATISTICS),
                "image_share_by_layer": layers["image_share"][0].tolist(),
            }
        )
    return out


def by_image(records: Sequence[Mapping[str, Any]], name: str, bootstrap: Bootstrap) -> list[dict[str, Any]]:
    """For the first, second ... image of a sample, over the samples that have one: `num_samples`, mean `tokens`,
    `image_mass` of this image, `mass_per_token` and `vas`, this image's part of the ratio."""
    out = []
    for index in range(max(len(record["images"]) for record in records)):
        there = [record for record in records if len(record["images"]) > index]
        parts = [record[name] for record in there]
        counts_DN = _counts(bootstrap, there)
        queries_N = torch.tensor([part["queries"] for part in parts])
        tokens_N = _tensor([record["images"][index] for record in there])
        mass_N, ratio_N = (_tensor([part[key][index] for part in parts]) for key in ("image_mass", "image_ratio"))
        sums = {"mass": mass_N, "ratio": ratio_N, "token": mass_N / tokens_N}
        mean_of = means(counts_DN, queries_N, sums)
        out.append(
            {
                "num_samples": len(there),
                "tokens": float(tokens_N.mean()),
                "image_mass": with_interval(mean_of["mass"]),
                "mass_per_token": with_interval(mean_of["token"]),
                "vas": with_interval(mean_of["ratio"]),
            }
        )
    return out


def summarize_dependency(records: Sequence[Mapping[str, Any]], bootstrap: Bootstrap) -> dict[str, Any]:
    """Visual dependency in `vas.json`: `overall`, the mean over samples of the mean over a sample's response tokens;
    `positions`, for every bin the mean over its tokens.

    Raises:
        ValueError: no sample has a dependency.
    """
    kept = [record[DEPENDENCY] for record in records if DEPENDENCY in record]
    skipped = Counter(record["skipped"][DEPENDENCY] for record in records if DEPENDENCY in record["skipped"])
    if not kept:
        counts = ", ".join(f"{reason}: {count}" for reason, count in skipped.items())
        raise ValueError(
            f"dependency needs samples with an image and a response; got none in {len(records)} samples ({counts}). "
            "Give the rows what they lack, or leave --dependency out."
        )
    means_N = torch.tensor([_response_mean(values) for values in kept], dtype=torch.float64)
    return {
        "num_samples": len(kept),
        "num_tokens": sum(map(len, kept)),
        "skipped": dict(sorted(skipped.items())),
        "overall": _mean_over_samples(means_N, bootstrap),
        "positions": _dependency_by_position(kept, bootstrap),
    }


def _response_mean(dependency_T: Sequence[float]) -> float:
    value_1T = _tensor([dependency_T])
    return float(mean_dependency(value_1T, torch.ones_like(value_1T))[0])


def _mean_over_samples(values_N: torch.Tensor, bootstrap: Bootstrap) -> dict[str, Any]:
    ones_N = torch.ones(len(values_N))
    return with_interval(means(_counts(bootstrap, values_N), ones_N, {DEPENDENCY: values_N})[DEPENDENCY])


def _dependency_by_position(kept: Sequence[Sequence[float]], bootstrap: Bootstrap) -> list[dict[str, Any]]:
    """As `by_position`, with `dependency`."""
    out = []
    for index in range(len(BIN_STARTS)):
        first, last = bin_range(index)
        there = [values[first : None if last is None else last + 1] for values in kept if len(values) > first]
        if not there:
            break
        counts_N = torch.tensor([len(values) for values in there])
        sums = {DEPENDENCY: _tensor([sum(values) for values in there])}
        mean_D = means(_counts(bootstrap, there), counts_N, sums)[DEPENDENCY]
        span = {"first": first, "last": last, "num_samples": len(there), "num_queries": int(counts_N.sum())}
        out.append({**span, DEPENDENCY: with_interval(mean_D)})
    return out


def by_sample(records: Sequence[Mapping[str, Any]], queries: Sequence[str]) -> dict[str, Any]:
    """Columns with one entry per record, for `avar vas compare`: `row`, `sample`, and by query role `queries` and SUMS,
    mean over layers and heads; None if the sample has no VAS. If it was measured, `dependency` with `queries`, the
    number of response tokens, and their mean `dependency`; None if the sample has none.
    """
    out: dict[str, Any] = {key: [record[key] for record in records] for key in ("row", "sample")}
    for name in queries:
        parts = [record.get(name) for record in records]
        out[name] = {"queries": [None if part is None else part["queries"] for part in parts]}
        for key in SUMS:
            out[name][key] = [None if part is None else float(_tensor(part[key]).mean()) for part in parts]
    if any(DEPENDENCY in record for record in records):
        kept = [record.get(DEPENDENCY) for record in records]
        out[DEPENDENCY] = {
            "queries": [None if values is None else len(values) for values in kept],
            DEPENDENCY: [None if values is None else _response_mean(values) for values in kept],
        }
    return out
