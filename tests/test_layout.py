# SPDX-License-Identifier: Apache-2.0
"""Who may import whom, read from the source: imports in functions and under TYPE_CHECKING count too."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "avar_verl"
CORE = ("model", "attention", "objectives", "intervention", "anchors", "rewards", "data")
LAYERS = ("plugin", "tools")


def name_of(path: Path) -> str:
    """`avar_verl/model/roles.py` -> "model.roles"; of a package, the package."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")


MODULES = {name_of(path): path for path in PACKAGE.rglob("*.py")}


def imports(path: Path) -> Iterator[str]:
    """Full names of the modules that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports are absolute"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner.removeprefix("avar_verl.") in MODULES else node.module


IMPORTS = {
    module: {name.removeprefix("avar_verl.") for name in imports(path) if name.startswith("avar_verl.")}
    for module, path in MODULES.items()
}


def room(module: str) -> str:
    """The folder that a module is in, in `plugin` and `tools` the folder in these; a module in no folder is a room."""
    parts = module.split(".")
    return ".".join(parts[: 2 if parts[0] in LAYERS else 1])


def is_tool(name: str) -> bool:
    """Whether a room is a package of `tools`, and no module that tools share."""
    return name.startswith("tools.") and (PACKAGE / name.replace(".", "/")).is_dir()


PAIRS = {
    (room(module), room(name)) for module, names in IMPORTS.items() for name in names if room(module) != room(name)
}


def test_every_folder_has_its_layer():
    folders = {path.parent.name for path in PACKAGE.glob("*/*.py")}
    assert folders == {*CORE, *LAYERS}


def test_the_core_imports_no_layer_above_it():
    assert not [(a, b) for a, b in PAIRS if a in (*CORE, "roles") and b.split(".")[0] in LAYERS]


def test_the_plugin_imports_no_tool():
    assert not [(a, b) for a, b in PAIRS if a.startswith("plugin") and b.startswith("tools")]


def test_verl_is_imported_by_the_plugin_only():
    found = {module for module, path in MODULES.items() for name in imports(path) if name.split(".")[0] == "verl"}
    assert not {module for module in found if not module.startswith("plugin.")}


def test_no_tool_imports_another_but_the_demo():
    """The study is of the demo's task and model."""
    allowed = {("tools.study", "tools.demo")}
    assert not [
        (a, b) for a, b in PAIRS if is_tool(b) and a not in ("tools.demo", "tools.cli") and (a, b) not in allowed
    ]


@pytest.mark.parametrize(
    "package, place", [("tqdm", ["tools.progress"]), ("rich.progress", []), ("fcntl", ["tools.runs"])]
)
def test_what_tools_share_has_one_place(package, place):
    assert [module for module, path in MODULES.items() if package in set(imports(path))] == place


@pytest.mark.parametrize(
    ("text", "places"),
    [
        ('"<image>"', ["data.messages"]),
        ("import process_image", ["plugin.datasets.images"]),
        ("AutoModelForImageTextToText.from_pretrained", []),
        ("auto_class.from_pretrained", ["model.checkpoint"]),
        ("AutoProcessor.from_pretrained", ["model.checkpoint"]),
    ],
)
def test_conversations_images_and_checkpoints_have_one_reader(text, places):
    assert sorted(module for module, path in MODULES.items() if text in path.read_text()) == places


@pytest.mark.parametrize("layer", ["", *LAYERS])
def test_no_cycle_between_rooms(layer):
    """Between the folders of the package, and between the rooms of `plugin` and of `tools`."""
    graph: dict[str, set[str]] = {}
    for a, b in PAIRS:
        if not layer:
            a, b = a.split(".")[0], b.split(".")[0]
        elif not (a.startswith(f"{layer}.") and b.startswith(f"{layer}.")):
            continue
        if a != b:
            graph.setdefault(a, set()).add(b)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"rooms import each other: {' -> '.join(error.args[1])}")
