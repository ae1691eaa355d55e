# SPDX-License-Identifier: Apache-2.0
"""The page docs/compatibility.md is the table that tests run, and the table is complete and consistent."""

import pytest

from tests.compatibility import PAGE, ROWS, RUNS, TESTS, page, reason
from tests.plugin.test_refusals import grpo


def test_the_page_is_printed_from_the_table():
    """After a change: python -m tests.compatibility > docs/compatibility.md"""
    assert PAGE.read_text() == page()


@pytest.mark.parametrize("row", [row for row in ROWS if row.test], ids=lambda row: row.what)
def test_what_works_is_tested_and_is_not_refused(row):
    assert row.test in TESTS
    grpo(*row.with_, *row.settings)
    if row.test == "run":
        assert any(set(row.settings) <= set(overrides) for overrides in RUNS.values())


def test_what_is_refused_says_what_to_set():
    refused = [row for row in ROWS if not row.test]
    assert len(refused) > 10
    for row in refused:
        rule, found, fix = reason(row).partition("; got ")
        assert found and any(word in fix for word in ("Set ", "Leave ", "Filter on ")), (row, fix)
