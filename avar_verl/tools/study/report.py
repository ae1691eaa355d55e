# SPDX-License-Identifier: Apache-2.0
"""`avar study report`: the tables on the terminal, `tables.md`, `report.html` and two pictures, from the records alone.

A study that is not finished has a report too: every number says of how many seeds it is.
"""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console

from avar_verl.tools.figures import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION, drawing, save_png, svg
from avar_verl.tools.report import page
from avar_verl.tools.runs import RECORDS, read_records
from avar_verl.tools.stats import Bootstrap
from avar_verl.tools.study.cells import GUIDANCE, OTHERS, REWARDS
from avar_verl.tools.study.claims import (
    Claim,
    Runs,
    Table,
    checkpoints,
    claims,
    claims_table,
    cold,
    cold_start_table,
    correlation_table,
    correlations,
    intervention_table,
    rl,
    rl_table,
)
from avar_verl.tools.text import numbers_table

REWARD_COLORS = dict(zip(REWARDS, (VERMILION, GREY, SKY, BLUE, GREEN, PURPLE), strict=True))
SCATTERS = {"log10_vas_user": "log10 VAS, user tokens", "image_share_response": "image share, response tokens"}
SCATTERS["dependency"] = "dependency, nats per token"


def markdown(table: Table) -> str:
    """A table with its title as a heading."""
    lines = [f"### {table.title}", ""] if table.title else []
    lines += [f"| {' | '.join(table.columns)} |", f"|{' --- |' * len(table.columns)}"]
    lines += [f"| {' | '.join(row)} |" for row in table.rows]
    return "\n".join(lines + (["", table.note] if table.note else []))


def rewards_figure(runs: Runs) -> Figure:
    """Accuracy on unbiased hints of every GRPO run, a point per seed, beside its start."""
    with drawing(10, 3.4) as figure:
        panels = figure.subplots(1, len(GUIDANCE), sharey=True)
        for axes, guidance in zip(panels, GUIDANCE, strict=True):
            columns = [("start", BLACK, cold(guidance, "mixture"))]
            columns += [(reward, REWARD_COLORS[reward], rl(guidance, reward)) for reward in REWARDS]
            columns += [
                (f"{reward}\n{normalization}", REWARD_COLORS[reward], rl(guidance, reward, normalization))
                for normalization in OTHERS
                for reward in REWARDS
                if runs.find(**rl(guidance, reward, normalization))
            ]
            for at, (_, color, fields) in enumerate(columns):
                values = [100 * one["accuracy"] for one in runs.find(**fields).values()]
                axes.plot([at] * len(values), values, "o", color=color, markersize=4, alpha=0.7)
                if values:
                    axes.hlines(sum(values) / len(values), at - 0.3, at + 0.3, color, linewidth=2)
            axes.axhline(10, color=BLACK, linestyle="dashed", linewidth=0.8)
            names = [name for name, _, _ in columns]
            axes.set_xticks(range(len(names)), names, rotation=35, ha="right", fontsize=7)
            axes.set_title(f"GRPO from the {guidance} cold start")
            axes.set_ylim(0, 100)
        panels[0].set_ylabel("right answers, unbiased hints (%)")
        figure.subplots_adjust(left=0.06, right=0.99, bottom=0.26, top=0.92, wspace=0.05)
        return figure


def scatter_figure(runs: Runs) -> Figure:
    """Accuracy over three statistics of attention and use, a point per checkpoint."""
    points = checkpoints(runs)
    with drawing(10, 3.0) as figure:
        panels = figure.subplots(1, len(SCATTERS), sharey=True)
        for axes, (key, label) in zip(panels, SCATTERS.items(), strict=True):
            for stage, color in (("cold", ORANGE), ("grpo", BLUE)):
                chosen = [one for one in points if one["stage"] == stage]
                x, y = [one[key] for one in chosen], [100 * one["accuracy"] for one in chosen]
                axes.plot(
                    x, y, "o", color=color, markersize=3.5, alpha=0.7, label={"cold": "cold starts"}.get(stage, "GRPO")
                )
            axes.set_xlabel(label)
        panels[0].set_ylabel("right answers, unbiased hints (%)")
        panels[-1].legend(loc="lower right")
        figure.subplots_adjust(left=0.06, right=0.99, bottom=0.18, top=0.96, wspace=0.05)
        return figure


def write_report(folder: Path, bootstrap: Bootstrap | None = None) -> Sequence[Claim]:
    """Print the tables and write `tables.md`, `report.html`, `rewards.png` and `scatter.png` into a study's folder.

    Raises:
        ValueError: no records, or too few for a correlation.
    """
    records = read_records(folder / RECORDS, "name")
    runs = Runs(records.values())
    if len(checkpoints(runs)) < 3:
        raise ValueError(
            f"a report needs at least three trained checkpoints; got {len(checkpoints(runs))} in {folder}. Run the "
            "study for longer."
        )
    found = correlations(runs, bootstrap or Bootstrap())
    answers = claims(runs, found)
    tables = [claims_table(answers), rl_table(runs), cold_start_table(runs), intervention_table(runs)]
    tables.append(correlation_table(found))
    console = Console()
    for table in tables:
        shown = numbers_table(table.title, table.columns)
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)
    (folder / "tables.md").write_text("\n\n".join(map(markdown, tables)) + "\n", encoding="utf-8")
    figures = [rewards_figure(runs), scatter_figure(runs)]
    save_png(figures[0], folder / "rewards.png")
    save_png(figures[1], folder / "scatter.png")
    words = ("Right answers by reward and seed", "Right answers over statistics of attention")
    html = page(
        "study/report.html.j2",
        num_runs=len(records),
        tables=tables,
        figures=[
            svg(figure, f"study{index}", alt) for index, (figure, alt) in enumerate(zip(figures, words, strict=True))
        ],
    )
    (folder / "report.html").write_text(html, encoding="utf-8")
    return answers
