# SPDX-License-Identifier: Apache-2.0
"""The seven benchmarks: their files, their prompts, and that these follow lmms-eval's."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from avar_verl.tools import cli
from avar_verl.tools.evaluate import benchmarks
from avar_verl.tools.evaluate.benchmarks import (
    COMMIT,
    INSTRUCTION,
    NAMES,
    READERS,
    TASK_DIR,
    expand,
    load_benchmark,
    make_item,
    question_text,
    resolve_revision,
)
from avar_verl.tools.evaluate.dry_run import example_docs, show_tasks
from avar_verl.tools.grade import find_answer, is_correct

TASKS = expand(",".join(NAMES))
# Items of the published splits.
NUM_ITEMS = {
    "mathvista": 1000,
    "mathvision": 3040,
    "mathverse_vo": 788,
    "mmmu_val": 900,
    "mmmu_pro_standard": 1730,
    "mmmu_pro_vision": 1730,
    "mmstar": 1500,
    "hallusionbench": 951,
}
# The prompts on the made-up rows, as they are sent but for INSTRUCTION. Whoever changes one changes prompt_version.
PROMPTS = {
    "mathvista": [
        "<image>Question: Which triangle is larger?\nChoices:\n(A) the red one\n(B) the blue one\n(C) neither\nHint: "
        "Please answer the question and provide the correct option letter, e.g., A, B, C, D, at the end.",
        "<image>Question: How long is the bar? (Unit: cm)\nHint: Please answer the question requiring a floating-point "
        "number with one decimal place and provide the final value, e.g., 1.2, 1.3, 1.4, at the end.",
        "<image>Question: How many dots are there?\nHint: Please answer the question requiring an integer answer and "
        "provide the final value, e.g., 1, 2, 3, at the end.",
        "<image>Question: Which years are marked?\nHint: Please answer the question requiring a Python list as an "
        "answer and provide the final list, e.g., [1, 2, 3], [1.2, 1.3, 1.4], at the end.",
        "<image>Question: What is the mean?\nHint: Please answer the question requiring a floating-point number with "
        "two decimal places and provide the final value, e.g., 1.23, 1.34, 1.45, at the end.",
    ],
    "mathvision": [
        "<image>Which picture shows the path?\n<image1>\nChoices: A. A\nB. B\nC. C\nD. D\nE. E",
        "<image>How many squares are there?\n<image1>",
    ],
    "mathverse_vo": [
        "<image>Please first conduct reasoning, and then answer the question and provide the correct option letter, "
        "e.g., A, B, C, D, at the end.",
    ],
    "mmmu_val": [
        "Which style does <image> show, next to <image>?\nA. Cubism\nB. Baroque <image>\nC. Pop Art\n\nAnswer with the "
        "option's letter from the given choices.",
        "What is the area in <image>?\n\nAnswer the question using a single word or phrase.",
    ],
    "mmmu_pro_standard": [
        "Which circuit is <image>?\nA. series\nB. parallel\nC. bridge\nD. ladder\nE. star\nF. delta\nG. ring\nH. tree\n"
        "I. open\nJ. short\n\nAnswer with the option letter from the given choices.",
    ],
    "mmmu_pro_vision": ["<image>Answer with the option letter from the given choices."],
    "mmstar": [
        "<image>Which option describes the object?\nOptions: A: A chair, B: A table, C: A lamp, D: A bed\nAnswer with "
        "the option's letter from the given choices",
    ],
    "hallusionbench": ["<image>Is the left bar the highest?\nAnswer with yes or no."] * 2,
}
PROMPT_IDS = {
    "mathvista": "v1-9fe9d842fa7c",
    "mathvision": "v1-a1d17ab622e3",
    "mathverse_vo": "v1-e8880e6dae15",
    "mmmu_val": "v1-115d81609c91",
    "mmmu_pro_standard": "v1-6edc60d98cd1",
    "mmmu_pro_vision": "v1-9829965c4b0f",
    "mmstar": "v1-4f493b9ed386",
    "hallusionbench": "v1-737c999505cc",
}


def test_every_file_is_a_task_and_has_a_reader():
    assert sorted(TASKS) == sorted(READERS) == sorted(path.stem for path in TASK_DIR.glob("*.yaml"))
    assert {name: load_benchmark(name).num_items for name in TASKS} == NUM_ITEMS


@pytest.mark.parametrize("name", TASKS)
def test_prompts(name):
    benchmark = load_benchmark(name)
    items = [make_item(benchmark, doc) for doc in example_docs(name)]
    assert [item.messages[0]["content"] for item in items] == [prompt + INSTRUCTION for prompt in PROMPTS[name]]
    assert max(len(item.sources) for item in items) <= benchmark.max_images
    assert len({item.id for item in items}) == len(items)
    assert benchmark.prompt_id() == PROMPT_IDS[name], "a changed prompt needs another prompt_version"


def test_the_prompt_id_is_that_of_the_text(monkeypatch):
    benchmark = load_benchmark("mmstar")
    assert replace(benchmark, prompt=benchmark.prompt + ".").prompt_id() != benchmark.prompt_id()
    before = benchmark.prompt_id()
    monkeypatch.setattr(benchmarks, "INSTRUCTION", INSTRUCTION + ".")
    assert benchmark.prompt_id() != before


@pytest.mark.parametrize(
    ("name", "number", "right", "wrong"),
    [
        ("mathvista", 0, ["B", "(B) the blue one", "the blue one"], ["A", "the red one"]),
        ("mathvista", 1, ["1.2", "1.2 cm"], ["1.3"]),
        ("mathvista", 3, ["[1990, 2000]"], ["[1990, 2001]"]),
        ("mathvision", 0, ["D"], ["E"]),
        ("mathvision", 1, ["9", r"\boxed{9}"], ["8"]),
        ("mathverse_vo", 0, ["D"], ["A"]),
        ("mmmu_val", 0, ["A", "Cubism"], ["Pop Art", "B"]),
        ("mmmu_val", 1, ["8", "eight"], ["9"]),
        ("mmmu_pro_standard", 0, ["J", "short"], ["I", "series"]),
        ("mmmu_pro_vision", 0, ["C", "bridge"], ["A", "series"]),
        ("mmstar", 0, ["A", "A: A chair"], ["B"]),
        ("hallusionbench", 0, ["No", "no."], ["Yes"]),
        ("hallusionbench", 1, ["YES"], ["no"]),
    ],
)
def test_what_is_right(name, number, right, wrong):
    item = make_item(load_benchmark(name), example_docs(name)[number])

    def grade(answer):
        return is_correct(
            find_answer(f"<think>I see.</think><answer>{answer}</answer>"), item.ground_truth, item.options
        )

    assert [answer for answer in right if not grade(answer)] == []
    assert [answer for answer in wrong if grade(answer)] == []


def test_images_stand_where_a_question_names_them():
    doc = example_docs("mmmu_val")[0]
    doc["image_1"], doc["image_2"] = {"bytes": b"one"}, {"bytes": b"two"}
    assert make_item(load_benchmark("mmmu_val"), doc).sources == (b"one", b"two", b"two")


def test_hallusionbench_has_figures_and_questions():
    first, second = (make_item(load_benchmark("hallusionbench"), doc) for doc in example_docs("hallusionbench"))
    assert first.groups == {"fAcc": "VD_chart_0_1", "qAcc": "VD_chart_0_2"}
    assert second.groups == {"fAcc": "VD_chart_0_0", "qAcc": "VD_chart_0_2"}


def test_rows_that_cannot_be_asked_are_refused():
    mathvista, mmmu = load_benchmark("mathvista"), load_benchmark("mmmu_val")
    doc = example_docs("mathvista")[0]
    with pytest.raises(ValueError, match="must be one of the choices; got 'the green one'"):
        make_item(mathvista, {**doc, "answer": "the green one"})
    with pytest.raises(ValueError, match="images must have bytes; got none in \\['decoded_image'\\] of item 1"):
        make_item(mathvista, {**doc, "decoded_image": None})
    with pytest.raises(ValueError, match="no hint for this kind of answer"):
        make_item(mathvista, {**example_docs("mathvista")[1], "precision": 3.0})
    with pytest.raises(ValueError, match="letter of one of 3 options; got 'D'"):
        make_item(mmmu, {**example_docs("mmmu_val")[0], "answer": "D"})


def test_unknown_tasks_and_fields(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="must name benchmarks among .*'mmmu_pro'.*; got 'mmvet'"):
        load_benchmark("mmvet")
    for names in ("mmstar,mmstar", "mmmu_pro,mmmu_pro_vision", ","):
        with pytest.raises(ValueError, match="each once"):
            expand(names)
    monkeypatch.setattr(benchmarks, "TASK_DIR", tmp_path)
    (tmp_path / "x.yaml").write_text("title: x\nprompts: y\n")
    with pytest.raises(ValueError, match="must have the fields"):
        load_benchmark("x")


def test_a_branch_is_looked_up_and_a_commit_is_not(monkeypatch):
    import huggingface_hub

    def refuse(self, *args, **kwargs):
        raise huggingface_hub.errors.OfflineModeIsEnabled("offline")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", refuse)
    assert COMMIT.fullmatch(resolve_revision(load_benchmark("mathvista")))
    with pytest.raises(ValueError, match="MathLLMs/MathVision@main is looked up on the Hugging Face hub"):
        resolve_revision(load_benchmark("mathvision"))


def test_a_split_of_another_size_is_refused(monkeypatch):
    import datasets

    doc = {key: value for key, value in example_docs("mmstar")[0].items() if key != "image"}
    rows = datasets.Dataset.from_list([{**doc, "image": example_docs("mmstar")[0]["image"]["bytes"]}])
    rows = rows.map(lambda row: {"image": {"bytes": row["image"], "path": None}}, remove_columns=["image"])
    rows = rows.cast_column("image", datasets.Image())
    asked = {}

    def load(path, name, **kwargs):
        asked.update(kwargs, path=path, name=name)
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load)
    benchmark = load_benchmark("mmstar")
    with pytest.raises(ValueError, match="must have 1500 rows; got 1"):
        list(benchmarks.benchmark_items(benchmark, "a" * 40))
    (item,) = benchmarks.benchmark_items(replace(benchmark, num_items=1), "a" * 40)
    assert asked == {"path": "Lin-Chen/MMStar", "name": None, "split": "val", "revision": "a" * 40}
    assert item.sources == (example_docs("mmstar")[0]["image"]["bytes"],)  # Exact bytes, not decoded and encoded again.


def test_without_the_hub_the_error_says_what_is_needed(monkeypatch):
    import datasets

    def load(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'Lin-Chen/MMStar' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(ValueError, match="is loaded from the Hugging Face hub; got ConnectionError"):
        next(benchmarks.benchmark_items(load_benchmark("mmstar"), "a" * 40))


def test_dry_run_shows_everything(tmp_path, digests, capsys, monkeypatch):
    data = digests(3)
    monkeypatch.setattr("sys.argv", ["avar", "eval", "--dry-run", "--tasks", "all", "--data", str(data)])
    cli.main()
    text = capsys.readouterr().out
    for name in TASKS:
        benchmark = load_benchmark(name)
        for part in (benchmark.dataset, benchmark.revision, str(benchmark.num_items), benchmark.prompt_id()):
            assert part in text
        for line in PROMPTS[name][0].splitlines():
            assert line in text
    assert text.count("needs hub  for the data set") == 7 and text.count("needs hub  for the commit, and") == 1
    assert "<image>Question 0?" in text and re.search(r"items +3\n", text)
    with pytest.raises(ValueError, match="needs --tasks or --data"):
        show_tasks("", [], Console())


# What the prompts leave out of lmms-eval's, or say otherwise (docs/eval.md).
BOXED = 'Please solve the problem step by step and put your answer in one "\\boxed{}".'


@pytest.mark.parametrize("name", TASKS)
def test_prompts_follow_lmms_eval(name, monkeypatch):
    """Against the library itself, where it is installed (docs/eval.md says how)."""
    pytest.importorskip("lmms_eval")
    monkeypatch.setenv("OPENAI_API_KEY", "none")  # Importing a task makes a client for its judge.
    from importlib import import_module

    def text(module: str, function: str, doc: dict, kwargs: dict | None) -> str:
        return getattr(import_module(f"lmms_eval.tasks.{module}"), function)(doc, kwargs)

    mc, direct = "Answer with the option{} letter from the given choices.", " directly"
    for doc in example_docs(name):
        if name == "mathvista":
            kwargs = {"shot_type": "step-by-step", "shot": 0, "use_caption": False, "use_ocr": False}
            upstream = text("mathvista.utils", "mathvista_doc_to_text", doc, kwargs)
        elif name == "mathvision":
            upstream = text("mathvision.utils", "mathvision_doc_to_text", doc, None).removeprefix(BOXED)
        elif name == "mathverse_vo":
            kwargs = {"shot_type": "format-prompt", "query_type": "query_cot"}
            upstream = text("mathverse.utils", "mathverse_doc_to_text", doc, kwargs)
        elif name == "mmmu_val":
            kwargs = {
                "multiple_choice_prompt": mc.format("'s"),
                "open_ended_prompt": "Answer the question using a single word or phrase.",
                "prompt_type": "format",
            }
            upstream = text("mmmu.utils", "mmmu_doc_to_text", doc, kwargs)
        elif name in ("mmmu_pro_standard", "mmmu_pro_vision"):
            doc = {key: value for key, value in doc.items() if name == "mmmu_pro_standard" or key != "question"}
            upstream = text("mmmu_pro.utils", "mmmu_pro_doc_to_text", doc, {"post_prompt": mc.format("")})
        elif name == "mmstar":
            post = "\n" + mc.format("'s").rstrip(".")
            upstream = text("mmstar.utils", "mmstar_doc_to_text", doc, {"pre_prompt": "", "post_prompt": post})
        else:
            post = "\nAnswer with yes or no."
            upstream = text("hallusion_bench.evaluate_hb", "hb_doc_to_text", doc, {"post_prompt": post})
        ours = question_text(load_benchmark(name), doc)
        assert ours.removeprefix("<image>") == re.sub(r"<image \d+>", "<image>", upstream)
    task = load_benchmark(name).upstream.split(",")[0]
    root = Path(import_module("lmms_eval").__file__).parents[1]
    lines = (root / task).read_text()
    if name in ("mmmu_val", "mmmu_pro_standard", "mmmu_pro_vision", "mmstar"):
        lines += (root / task).parent.joinpath("_default_template_yaml").read_text()
        assert direct in lines  # The word that is left out: the models reason first.
    # Where the data come from; two data sets have moved since their commits.
    moved = load_benchmark(name).dataset.replace("lmms-lab/", "lmms-lab-encoder/")
    assert f"dataset_path: {moved}\n" in lines
