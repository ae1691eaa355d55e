# SPDX-License-Identifier: Apache-2.0
import os
import signal
import subprocess
import sys

import pytest

from avar_verl.tools.synth.store import JOURNAL, Call, Failure, Journal, Store, call_key


def call(key: str, usd: float = 0.0, stage: str = "describe", tokens: int = 10) -> Call:
    return Call(key, "item", stage, "model", "prompt", "text", "stop", 5, tokens, usd, 1, 0.1, 0.0)


def test_what_is_put_is_got_and_counted(tmp_path):
    store = Store(tmp_path / "cache.sqlite")
    store.put([call("a", 0.5), call("b", 0.25), Failure("c", "item", "reason", "why", 3, False)])
    assert store.get(["a", "c", "x"]) == {"a": call("a", 0.5), "c": Failure("c", "item", "reason", "why", 3, False)}
    assert store.totals() == {"new_calls": 2, "hits": 1, "failures": 1, "usd": 0.75}
    store.close()
    again = Store(tmp_path / "cache.sqlite")
    assert again.get(["b"]) == {"b": call("b", 0.25)} and again.totals()["usd"] == 0.75


def test_a_new_run_forgets_what_may_have_failed_by_chance(tmp_path):
    store = Store(tmp_path / "cache.sqlite")
    store.put([Failure("a", "i", "s", "500", 6, False), Failure("b", "i", "s", "400", 1, True)])
    store.begin()
    assert list(store.get(["a", "b"])) == ["b"]


def test_an_answer_takes_the_place_of_a_failure(tmp_path):
    store = Store(tmp_path / "cache.sqlite")
    store.put([Failure("a", "i", "s", "500", 6, False)])
    store.put([call("a")])
    assert store.get(["a"]) == {"a": call("a")}


def test_many_keys(tmp_path):
    store = Store(tmp_path / "cache.sqlite")
    store.put([call(str(number)) for number in range(1200)])
    assert len(store.get([str(number) for number in range(1300)])) == 1200


def test_one_run_at_a_time(tmp_path):
    path = tmp_path / "cache.sqlite"
    store = Store(path)
    code = f"from avar_verl.tools.synth.store import Store; Store({str(path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ValueError: one run at a time may use a folder" in done.stderr
    store.close()
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_killed_without_warning_after_put(tmp_path):
    """What `put` has returned for is there, and the lock of the dead is not."""
    path = tmp_path / "cache.sqlite"
    code = (
        "import os, signal; from tests.tools.synth.test_store import call\n"
        "from avar_verl.tools.synth.store import Store\n"
        f"s = Store({str(path)!r}); s.put([call('a')]); os.kill(os.getpid(), {int(signal.SIGKILL)})"
    )
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": os.getcwd()})
    assert done.returncode == -signal.SIGKILL
    assert Store(path).get(["a"]) == {"a": call("a")}


def test_every_commit_is_synced(tmp_path):
    store = Store(tmp_path / "cache.sqlite")
    modes = [store.db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("synchronous", "journal_mode")]
    assert modes == [2, "wal"]  # FULL


def test_budget(tmp_path):
    store = Store(tmp_path / "cache.sqlite", budget_usd=1.0)
    assert store.reserve(0.6) == "yes"
    assert store.reserve(0.6) == "wait"  # the first may cost less
    store.put([call("a", 0.3)], released=0.6)
    assert store.reserve(0.6) == "yes"
    store.put([call("b", 0.6)], released=0.6)
    assert store.reserve(0.2) == "no"
    assert store.reserve(0.05) == "yes"
    assert store.reserve(2.0) == "no"  # no answer can make room for it


def test_means(tmp_path):
    store = Store(tmp_path / "cache.sqlite")
    store.put([call("a", tokens=10), call("b", tokens=20), call("c", stage="reason", tokens=7)])
    assert store.means() == {("describe", "model"): (2, 5.0, 15.0), ("reason", "model"): (1, 5.0, 7.0)}
    assert [row[0:4] for row in store.by_stage()] == [
        ("describe", "model", "prompt", 2),
        ("reason", "model", "prompt", 1),
    ]


def test_keys_do_not_depend_on_the_order_of_parameters():
    a = call_key("m", "p", [{"role": "user", "content": "x"}], [], {"seed": 0, "top_p": 1.0})
    assert a == call_key("m", "p", [{"role": "user", "content": "x"}], [], {"top_p": 1.0, "seed": 0})


@pytest.mark.parametrize("budget", [None, 5.0])
def test_spent_counts_earlier_runs(tmp_path, budget):
    store = Store(tmp_path / "cache.sqlite")
    store.put([call("a", 4.0)])
    store.close()
    again = Store(tmp_path / "cache.sqlite", budget)
    assert again.reserve(2.0) == ("yes" if budget is None else "no")


def test_journals_of_the_dead_are_taken_in(tmp_path):
    store = Store(tmp_path / "cache.sqlite")
    store.put([call("a", 1.0)])
    journal = Journal(tmp_path / JOURNAL)
    for key in ("a", "b"):
        journal.add(call(key, 2.0))
    journal.file.write(b'{"key": "cut o')
    store.begin()
    assert sorted(store.get(["a", "b"])) == ["a", "b"] and store.get(["a"])["a"].usd == 1.0
    assert store.totals()["usd"] == 3.0 and store.totals()["new_calls"] == 0
    assert not list((tmp_path / JOURNAL).iterdir())
