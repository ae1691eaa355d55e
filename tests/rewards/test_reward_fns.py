# SPDX-License-Identifier: Apache-2.0
"""The adapters in `reward_fns/`: verl's signature, the keys and weights of the result, and how verl loads them."""

import doctest
import importlib
import importlib.util
import inspect
import math
import pickle
import re
from pathlib import Path

import pytest

import reward_fns.accuracy
import reward_fns.avar
import reward_fns.format
import reward_fns.grounding_iou
import reward_fns.visual_anchor

REPOSITORY = Path(__file__).resolve().parents[2]
MODULES = {
    "avar": reward_fns.avar,
    "accuracy": reward_fns.accuracy,
    "format": reward_fns.format,
    "grounding_iou": reward_fns.grounding_iou,
    "visual_anchor": reward_fns.visual_anchor,
}
# What grounding_iou compares with; the others do not look.
INFO = {"boxes": [], "boxes_size": [10, 10]}

# (response, accuracy, format, answer found) for the ground truth "4"
RESPONSES = {
    "right": ("<think>2 + 2</think>\n<answer>4</answer>", 1.0, 1.0, 1.0),
    "right, boxed": ("<think>2 + 2</think>\n<answer>\n\\boxed{4}\n</answer>\n", 1.0, 1.0, 1.0),
    "right, other layout": ("<think>2 + 2</think> It is \\boxed{4}.", 1.0, 0.0, 1.0),
    "wrong": ("<think>2 + 2</think><answer>5</answer>", 0.0, 1.0, 1.0),
    "wrong, other layout": ("5 <answer>5</answer>", 0.0, 0.0, 1.0),
    "in the reasoning only": ("<think>2 + 2 <answer>4</answer></think>", 0.0, 0.0, 0.0),
    "truncated": ("<think>2 + 2", 0.0, 0.0, 0.0),
    "empty": ("", 0.0, 0.0, 0.0),
}


@pytest.mark.parametrize("name", RESPONSES)
def test_avar_parts_and_total(name):
    response, acc, layout, found = RESPONSES[name]
    result = reward_fns.avar.compute_score("geo3k", response, "4")
    assert result == {"score": pytest.approx(acc + 0.1 * layout), "acc": acc, "format": layout, "pred_found": found}


@pytest.mark.parametrize("name", RESPONSES)
def test_accuracy_parts_and_total(name):
    response, acc, _, found = RESPONSES[name]
    assert reward_fns.accuracy.compute_score("geo3k", response, "4") == {"score": acc, "acc": acc, "pred_found": found}


@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
def test_keys_are_constant_and_values_are_floats(module):
    # verl reads every sample with the keys of sample 0 and fills the key "reward" itself.
    results = [module.compute_score("geo3k", response, "4", INFO) for response, *_ in RESPONSES.values()]
    assert len({tuple(result) for result in results}) == 1
    assert "score" in results[0] and "reward" not in results[0]
    assert all(type(value) is float and math.isfinite(value) for result in results for value in result.values())


@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
def test_called_as_verl_calls_it(module):
    # NaiveRewardManager passes everything by keyword, plus two more if there is a reward router.
    result = module.compute_score(
        data_source="geo3k",
        solution_str="<think>2 + 2</think><answer>4</answer>",
        ground_truth=["4", "four"],
        extra_info={"index": 0, "num_turns": None, "rollout_reward_scores": {}, **INFO},
        reward_router_address="127.0.0.1:1",
        reward_model_tokenizer=None,
    )
    assert result["acc"] == 1.0
    parameters = list(inspect.signature(module.compute_score).parameters)
    assert parameters[:4] == ["data_source", "solution_str", "ground_truth", "extra_info"]


@pytest.mark.parametrize("weight, score", [(0, 1.0), (0.1, 1.1), (0.5, 1.5), (2, 3.0)])
def test_format_weight(weight, score):
    result = reward_fns.avar.compute_score("geo3k", RESPONSES["right"][0], "4", format_weight=weight)
    assert result["score"] == pytest.approx(score) and type(result["score"]) is float
    assert result["format"] == 1.0, "parts are not weighted"


@pytest.mark.parametrize(
    "name, option",
    [
        ("avar", "format_weight"),
        ("visual_anchor", "format_weight"),
        ("visual_anchor", "anchor_weight"),
        ("grounding_iou", "grounding_weight"),
    ],
)
@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf"), "0.1", None, True])
def test_weights_are_validated(name, option, weight):
    with pytest.raises(ValueError, match=f"{option} must be a finite number >= 0; got {re.escape(repr(weight))}. Set"):
        MODULES[name].compute_score("geo3k", "", "4", INFO, **{option: weight})


def test_think_in_prompt():
    response = "2 + 2</think><answer>4</answer>"
    assert reward_fns.avar.compute_score("geo3k", response, "4")["format"] == 0.0
    assert reward_fns.avar.compute_score("geo3k", response, "4", think_in_prompt=True)["score"] == pytest.approx(1.1)


@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
@pytest.mark.parametrize("extra_info, index", [({"index": 3}, "3"), ({}, "None"), (None, "None")])
def test_ground_truth_none_names_the_sample(module, extra_info, index):
    # Even where there is no answer to grade: the dataset is at fault, not the response.
    with pytest.raises(ValueError, match=f"got None for data_source 'geo3k', index {index}\\. Set"):
        module.compute_score("geo3k", "", None, extra_info)


@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
def test_wrong_types(module):
    with pytest.raises(TypeError, match="text must be a str; got NoneType"):
        module.compute_score("geo3k", None, "4")
    with pytest.raises(TypeError, match="got dict for data_source 'geo3k', index 3"):
        module.compute_score("geo3k", "", {"answer": "4"}, {"index": 3})


@pytest.fixture(scope="module")
def import_utils():
    # verl/utils/import_utils.py imports nothing of verl: run from its file, it spares the 10 s of `import verl`.
    package = Path(importlib.util.find_spec("verl").origin).parent
    spec = importlib.util.spec_from_file_location("import_utils_of_verl", package / "utils" / "import_utils.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("form", ["pkg", "path", "file"])
def test_loads_as_verl_loads_it(import_utils, name, form, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # Ray workers have another working directory
    path = {
        "pkg": f"pkg://reward_fns.{name}",
        "path": str(REPOSITORY / "reward_fns" / f"{name}.py"),
        "file": f"file://{REPOSITORY / 'reward_fns' / f'{name}.py'}",
    }[form]
    compute_score = import_utils.load_extern_object(path, "compute_score")
    assert compute_score("geo3k", RESPONSES["right"][0], "4", INFO)["acc"] == 1.0


@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
def test_pickles(module):
    assert pickle.loads(pickle.dumps(module.compute_score)) is module.compute_score


@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
def test_doctests(module):
    results = doctest.testmod(module)
    assert results.attempted >= 1 and results.failed == 0
