# SPDX-License-Identifier: Apache-2.0
"""What the runs of a study say: means over seeds, paired differences, correlations over checkpoints, and verdicts.

Seeds are the samples: every seed has its own model and data, and differences are paired by seed. Intervals of means are
Student's t over seeds, those of correlations a bootstrap over runs.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from avar_verl.tools.stats import Bootstrap, correlate
from avar_verl.tools.study.cells import CHAINS, GUIDANCE, INTERVENTIONS, OTHERS, REWARDS, SUMMED

Record = dict[str, Any]
# Statistics of a checkpoint that may go with its accuracy.
STATISTICS = (
    *("log10_vas_user", "log10_vas_response", "log_ratio_user", "log_ratio_response"),
    *("image_share_user", "image_share_response", "image_mass_user", "image_mass_response", "dependency"),
)
KINDS = ("pearson", "spearman")


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` seeds with its 95 % interval (Student's t); the ends are nan for one seed."""

    mean: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Iterable[float]) -> "Estimate":
        from scipy import stats  # Takes seconds to import.

        array = np.array(list(values), dtype=float)
        if len(array) == 0:
            return cls(math.nan, math.nan, math.nan, 0)
        mean = float(array.mean())
        if len(array) == 1:
            return cls(mean, math.nan, math.nan, 1)
        half = stats.t.ppf(0.975, len(array) - 1) * array.std(ddof=1) / math.sqrt(len(array))
        return cls(mean, mean - float(half), mean + float(half), len(array))

    @property
    def sign(self) -> str:
        """`+` or `-` if the interval lies on one side of 0, else `0`."""
        return "+" if self.low > 0 else "-" if self.high < 0 else "0"


def derived(record: Record) -> Record:
    """The record with logarithms of its ratios: VAS spans nine orders of magnitude on a tiny model."""
    out = dict(record)
    for query in ("user", "response"):
        vas, masses = float(record[f"vas_{query}"]), [record[f"{role}_mass_{query}"] for role in ("image", "system")]
        out[f"log10_vas_{query}"] = math.log10(vas) if vas > 0 else math.nan
        out[f"log_ratio_{query}"] = math.log(masses[0] / masses[1]) if min(masses) > 0 else math.nan
    return out


class Runs:
    """The records of a study, looked up by what they are."""

    def __init__(self, records: Iterable[Record]):
        self.all = [derived(record) for record in records]

    def find(self, **fields: Any) -> dict[int, Record]:
        """Records with these fields, by seed."""
        return {one["seed"]: one for one in self.all if all(one[key] == value for key, value in fields.items())}

    def mean(self, key: str, **fields: Any) -> Estimate:
        return Estimate.of(record[key] for record in self.find(**fields).values())

    def difference(self, key: str, after: dict[str, Any], before: dict[str, Any]) -> Estimate:
        """Of `key`, paired by seed."""
        a, b = self.find(**after), self.find(**before)
        return Estimate.of(a[seed][key] - b[seed][key] for seed in sorted(a.keys() & b.keys()))


def cold(guidance: str, chains: str) -> dict[str, Any]:
    """Fields of a cold start."""
    return {"stage": "cold", "guidance": guidance, "chains": chains}


def rl(guidance: str, reward: str, normalization: str = SUMMED) -> dict[str, Any]:
    """Fields of a GRPO run."""
    return {"stage": "grpo", "guidance": guidance, "reward": reward, "normalization": normalization}


# ---- tables --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """Rows of text under a title, for the terminal, Markdown and HTML."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def estimate_text(one: Estimate, scale: float = 1.0, digits: int = 1, signed: bool = False) -> str:
    """`85.7 [80.1, 91.3]`; without an interval for one seed, `none` without a run."""
    if one.n == 0:
        return "none"
    form = f"{{:{'+' if signed else ''}.{digits}f}}"
    text = form.format(scale * one.mean)
    if math.isfinite(one.low):
        text += f" [{form.format(scale * one.low)}, {form.format(scale * one.high)}]"
    return text


def cold_start_table(runs: Runs) -> Table:
    """Accuracy and attention of every base model and cold start."""
    rows = []
    places = [("base", {"stage": "base"})]
    places += [(f"{guidance}, {chains}", cold(guidance, chains)) for guidance in GUIDANCE for chains in CHAINS]
    for name, fields in places:
        if not runs.find(**fields):
            continue
        percent = [runs.mean(key, **fields) for key in ("accuracy", "accuracy_biased", "looks")]
        shares = [runs.mean(key, **fields) for key in ("image_share_user", "image_share_response")]
        logs = [runs.mean(key, **fields) for key in ("log10_vas_user", "log10_vas_response")]
        rows.append(
            [
                name,
                str(percent[0].n),
                *(estimate_text(one, 100) for one in percent),
                *(estimate_text(one, digits=2) for one in (*shares, *logs, runs.mean("dependency", **fields))),
            ]
        )
    columns = ["cold start", "seeds", "unbiased %", "biased %", "looks %", "image share, user", "image share, response"]
    return Table("Cold starts", [*columns, "log10 VAS, user", "log10 VAS, response", "dependency"], rows)


def rl_table(runs: Runs) -> Table:
    """Accuracy and looks after GRPO, by start, reward and normalisation, and the change by the visual reward."""
    rows = []
    for guidance in GUIDANCE:
        for normalization in (SUMMED, *OTHERS):
            for reward in REWARDS:
                fields = rl(guidance, reward, normalization)
                if not runs.find(**fields):
                    continue
                accuracy, looks = (runs.mean(key, **fields) for key in ("accuracy", "looks"))
                values = [100 * one["accuracy"] for one in runs.find(**fields).values()]
                gain = runs.difference("accuracy", fields, rl(guidance, "accuracy"))
                change = runs.difference("accuracy", fields, cold(guidance, "mixture"))
                rows.append(
                    [
                        *(guidance, reward, normalization, str(accuracy.n), estimate_text(accuracy, 100)),
                        f"{min(values):.0f} to {max(values):.0f}",
                        estimate_text(looks, 100),
                        estimate_text(change, 100, signed=True),
                        "" if reward == "accuracy" else estimate_text(gain, 100, signed=True),
                    ]
                )
    columns = ["start", "reward", "normalization", "seeds", "unbiased %", "range", "looks %", "over the start"]
    return Table("GRPO from the mixtures", [*columns, "over accuracy alone"], rows)


def intervention_table(runs: Runs) -> Table:
    """Change of accuracy by the intervention on every cold start, in points."""
    rows = []
    for guidance in GUIDANCE:
        for chains in CHAINS:
            found = runs.find(**cold(guidance, chains))
            if found:
                changes = [
                    Estimate.of(one["interventions"][spec] - one["accuracy"] for one in found.values())
                    for spec in INTERVENTIONS
                ]
                rows.append([f"{guidance}, {chains}", *(estimate_text(change, 100, signed=True) for change in changes)])
    return Table(
        "Intervention on cold starts: change of accuracy with unbiased hints, points", ["", *INTERVENTIONS], rows
    )


def checkpoints(runs: Runs) -> list[Record]:
    """What correlations are over: every cold start and every GRPO run."""
    return [one for one in runs.all if one["stage"] != "base"]


def correlations(runs: Runs, bootstrap: Bootstrap) -> dict[str, dict[str, Any]]:
    """`correlate` of every statistic with the accuracy on unbiased questions, over checkpoints."""
    chosen = checkpoints(runs)
    accuracy = [one["accuracy"] for one in chosen]
    return {key: correlate([one[key] for one in chosen], accuracy, bootstrap) for key in STATISTICS}


def correlation_table(found: dict[str, dict[str, Any]]) -> Table:
    """Pearson and Spearman with intervals."""
    rows = [
        [key, *(f"{one[kind]['value']:+.2f} [{one[kind]['low']:+.2f}, {one[kind]['high']:+.2f}]" for kind in KINDS)]
        for key, one in found.items()
    ]
    n = next(iter(found.values()))["num_models"]
    return Table(f"Correlation with accuracy on unbiased hints, {n} checkpoints", ["statistic", *KINDS], rows)


# ---- claims --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, what was measured, and whether the interval lies on its side."""

    letter: str
    text: str
    measured: str
    verdict: str


def _verdict(signs: Sequence[str]) -> str:
    """In words, from the side of 0 on which each interval lies; `+` is the claim's."""
    if set(signs) == {"+"}:
        return "holds"
    if "+" in signs and "-" in signs:
        return "depends"
    return "the opposite" if set(signs) == {"-"} else "not shown" if "+" not in signs else "in part"


def _compared(parts: Sequence[tuple[str, Estimate]], scale: float = 100, digits: int = 1) -> tuple[str, str]:
    text = "; ".join(f"{name} {estimate_text(one, scale, digits, signed=True)}" for name, one in parts)
    return text, _verdict([one.sign for _, one in parts])


def claims(runs: Runs, found: dict[str, dict[str, Any]]) -> list[Claim]:
    """The paper's claims at this scale."""
    out = []
    vas, spans = found["log10_vas_user"], []
    for key in ("log10_vas_user", "image_share_response", "dependency"):
        one = found[key]["spearman"]
        spans.append((key, Estimate(one["value"], one["low"], one["high"], vas["num_models"])))
    measured, _ = _compared(spans, 1, 2)
    out.append(Claim("a", "VAS goes with accuracy (Spearman over checkpoints)", measured, _verdict([spans[0][1].sign])))
    base = {"stage": "base"}
    rises = [
        (
            chains,
            Estimate.of(
                runs.find(**cold("plain", "text"))[seed][key] - runs.find(**cold("plain", chains))[seed][key]
                for seed in sorted(
                    runs.find(**cold("plain", "text")).keys() & runs.find(**cold("plain", chains)).keys()
                )
            ),
        )
        for key in ("log10_vas_user",)
        for chains in ("mixture", "look", "lazy")
    ]
    measured, verdict = _compared(rises, 1, 2)
    start = estimate_text(runs.mean("log10_vas_user", **base), digits=2)
    out.append(
        Claim(
            "b",
            "Multimodal cold start raises VAS less than text-only",
            f"log10 VAS of user tokens after text-only chains, minus that after {measured}; before: {start}",
            verdict,
        )
    )
    helped = []
    for guidance in GUIDANCE:
        for spec in INTERVENTIONS[:2]:
            records = runs.find(**cold(guidance, "mixture")).values()
            change = Estimate.of(one["interventions"][spec] - one["accuracy"] for one in records)
            helped.append((f"{guidance}, {spec}:", change))
    measured, verdict = _compared(helped)
    out.append(Claim("c", "More attention to the image helps a lazy model without training, points", measured, verdict))
    agto = [
        (
            f"AGTO over plain, {chains}:",
            runs.difference("accuracy", cold("agto", chains), cold("plain", chains)),
        )
        for chains in ("mixture", "look")
    ]
    measured, verdict = _compared(agto)
    out.append(Claim("d", "Guidance in the cold start helps accuracy, points", measured, verdict))
    for reward in REWARDS[1:]:
        parts = [
            (f"{guidance}:", runs.difference("accuracy", rl(guidance, reward), rl(guidance, "accuracy")))
            for guidance in GUIDANCE
        ]
        measured, verdict = _compared(parts)
        out.append(Claim("e", f"GRPO with {reward} beats GRPO with accuracy alone, points", measured, verdict))
    return out


def claims_table(found: Sequence[Claim]) -> Table:
    """One row per claim."""
    rows = [[one.letter, one.text, one.measured, one.verdict] for one in found]
    note = "holds: every interval lies on the claim's side of 0; in part: some do; depends: some lie on the other side."
    return Table("The paper's claims on this task", ["", "claim", "measured", "verdict"], rows, note)
