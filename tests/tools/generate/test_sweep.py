# SPDX-License-Identifier: Apache-2.0
"""The grid of interventions: order, resuming, significance, what is shown."""

import json

import pytest
from PIL import Image
from rich.console import Console

from avar_verl.intervention.spec import InterventionSpec
from avar_verl.tools.generate.sweep import (
    CellResult,
    cell_folder,
    cell_results,
    grid,
    results_table,
    run_sweep,
    write_results,
)
from avar_verl.tools.questions import Question
from avar_verl.tools.records import Record
from avar_verl.tools.runs import RECORDS

NOTHING, MORE, LESS = InterventionSpec(), InterventionSpec(0.15), InterventionSpec(0.0, 0.4)
ITEMS = [
    Question(
        task="file",
        id=str(number),
        messages=({"role": "user", "content": f"{number}?"},),
        sources=(),
        ground_truth=("1",),
    )
    for number in range(4)
]


def record(item: Question, correct: bool = True) -> Record:
    return Record(
        id=item.id,
        task=item.task,
        prompt_hash=item.prompt_hash(),
        response="1",
        answer="1",
        ground_truth=["1"],
        correct=correct,
        prompt_tokens=3,
        response_tokens=1,
        finish_reason="stop",
        seconds=0.1,
    )


class Asked:
    """`ask` that remembers, and fails after `limit` answers."""

    def __init__(self, limit: int = 1000):
        self.calls, self.left = [], limit

    def __call__(self, items, spec):
        for item in items:
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1
            self.calls.append((str(spec), item.id))
            yield record(item, correct=spec.alpha_img > 0 or item.id in "01")


def test_the_order_of_a_grid():
    assert grid([0.15, 0], [0.4, 0]) == [NOTHING, MORE, LESS, InterventionSpec(0.15, 0.4)]
    cells = grid([-0.5, 0.0], [0.0], layers=(1,), heads=(0, 1))
    assert cells[0].is_identity and all(cell.layers == (1,) and cell.heads == (0, 1) for cell in cells)


@pytest.mark.parametrize("imgs, syss, name", [([0.1], [0], "alpha_img"), ([0], [0, 0], "alpha_sys")])
def test_grids_that_cannot_be_compared_are_refused(imgs, syss, name):
    with pytest.raises(ValueError, match=rf"values of {name} must differ, and 0 must be among them.*Change --alpha-"):
        grid(imgs, syss)


def test_a_killed_sweep_goes_on(tmp_path):
    cells = grid([0, 0.15], [0])
    killed, ask = Asked(limit=6), Asked()
    with pytest.raises(KeyboardInterrupt):
        run_sweep(cells, ITEMS, killed, tmp_path, {"model": "a"})
    with (cell_folder(tmp_path, MORE) / RECORDS).open("a") as file:
        file.write('{"id": "2", "ta')  # The kill came in the middle of a line.
    seen = []
    correct = run_sweep(cells, ITEMS, ask, tmp_path, {"model": "a"}, lambda spec, done: seen.append((spec, done)))
    assert killed.calls + ask.calls == [(str(spec), item.id) for spec in cells for item in ITEMS]
    assert correct == {
        NOTHING: {"0": True, "1": True, "2": False, "3": False},
        MORE: dict.fromkeys("0123", True),
    }
    assert seen == [(NOTHING, 4), (MORE, 2), (MORE, 3), (MORE, 4)]
    # A wider grid and more questions keep what is there.
    wider = Asked()
    more = [*ITEMS, Question("file", "4", ({"role": "user", "content": "4?"},), (), ("1",))]
    correct = run_sweep(grid([0, 0.15], [0, 0.4]), more, wider, tmp_path, {"model": "a"})
    assert len(wider.calls) == 2 + 2 * 5 and len(correct) == 4
    # And a narrower one reads a part.
    assert run_sweep(cells, ITEMS[:1], Asked(0), tmp_path, {"model": "a"})[MORE] == {"0": True}


def test_doing_nothing_is_the_same_in_any_layer(tmp_path):
    run_sweep(grid([0], [0]), ITEMS, Asked(), tmp_path, {})
    some = Asked()
    run_sweep(grid([0, 1], [0], layers=(0,)), ITEMS, some, tmp_path, {})
    assert {spec for spec, _ in some.calls} == {"alpha_img=1.0,alpha_sys=0.0,layers=0"}


def test_answers_of_other_settings_are_not_mixed(tmp_path):
    run_sweep([NOTHING], ITEMS, Asked(), tmp_path, {"model": "a"})
    with pytest.raises(ValueError, match="other settings; got model: 'a' there, 'b' now"):
        run_sweep([NOTHING], ITEMS, Asked(), tmp_path, {"model": "b"})
    other = Question("file", "0", ({"role": "user", "content": "another?"},), (), ("1",))
    with pytest.raises(ValueError, match="got another one for item '0' of file"):
        run_sweep([NOTHING], [other], Asked(), tmp_path, {"model": "a"})


def outcomes(right: int, n: int = 40) -> dict[str, bool]:
    return {str(number): number < right for number in range(n)}


def test_results_by_hand():
    """Ten more right and none lost of forty: p = 2 / 2^10; by Holm the smaller of two p-values is doubled."""
    good, same = cell_results({NOTHING: outcomes(20), MORE: outcomes(30), LESS: outcomes(20)})
    assert (good.comparison.only_b, good.comparison.only_a, good.comparison.difference) == (10, 0, 0.25)
    assert good.comparison.p_value == pytest.approx(2 / 2**10) and good.adjusted_p == pytest.approx(4 / 2**10)
    assert good.is_significant and not same.is_significant and same.adjusted_p == 1.0
    assert 0.1 < good.comparison.low < 0.25 < good.comparison.high < 0.42
    assert good.spec is MORE and good.as_dict()["intervene"] == "alpha_img=0.15,alpha_sys=0.0"


def test_what_is_shown(tmp_path):
    results = cell_results(
        {NOTHING: outcomes(20), MORE: outcomes(30), LESS: outcomes(10), InterventionSpec(0.15, 0.4): outcomes(21)}
    )
    console = Console(width=120, record=True)
    console.print(results_table(results))
    text = console.export_text()
    assert "no intervention: 50.0 %" in text and "+25.0" in text and "0.00586 *" in text and "-25.0" in text
    write_results(results, {"model": "a"}, tmp_path)
    written = json.loads((tmp_path / "sweep.json").read_text())
    assert [cell["accuracy_b"] for cell in written["cells"]] == [0.75, 0.25, 0.525]
    with Image.open(tmp_path / "sweep.png") as image:
        colours = image.convert("RGB").getcolors(1 << 20)
    assert len(colours) > 50, "an empty picture"


def test_one_cell_is_enough_for_a_table(tmp_path):
    (result,) = cell_results({NOTHING: outcomes(20), MORE: outcomes(20)})
    assert isinstance(result, CellResult) and result.comparison.p_value == 1.0
    write_results([result], {}, tmp_path)
