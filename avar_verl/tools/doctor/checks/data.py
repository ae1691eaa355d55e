# SPDX-License-Identifier: Apache-2.0
"""The rows to train on, rendered by this model."""

from collections import Counter

from avar_verl.tools.doctor.check import Finding, Skip, check
from avar_verl.tools.doctor.subject import Subject


@check(
    "data",
    prevents="One row that cannot be read or rendered ends a run in the middle of an epoch.",
    fix="Correct or leave out the rows that `avar data check FILE --model PATH` lists.",
    needs=["processor"],
)
def data(subject: Subject) -> Finding | str:
    if subject.options.data is None:
        raise Skip("no --data FILE")
    from avar_verl.data.check import Settings, check_files  # Imports pandas and verl, which takes seconds.
    from avar_verl.plugin.datasets.check_rendered import Rendering

    report = check_files([subject.options.data], Settings(model=subject.options.model), Rendering)
    first = {}
    for finding in report.findings:
        first.setdefault((finding.level, finding.check), finding)
    counts = Counter((finding.level, finding.check) for finding in report.findings)

    def told(level: str) -> str:
        return "; ".join(
            f"{counts[key]} {key[1]} (row {finding.row}: {finding.message})"
            for key, finding in first.items()
            if key[0] == level
        )

    total = sum(report.rows.values())
    if report.count("error"):
        raise ValueError(
            f"every row must be readable and trainable; got {report.count('error')} errors: {told('error')}"
        )
    if not total:
        raise ValueError(f"a data file must have rows; got none in {subject.options.data}.")
    longest = max(report.num_tokens, default=0)
    detail = f"{total} rows without an error, {longest} tokens at most"
    if report.count("warning"):
        return Finding(detail, f"{told('warning')} See avar data check.")
    return detail
