# SPDX-License-Identifier: Apache-2.0
"""The command line as a whole: every command answers `--help`, every documented line parses."""

import inspect
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

import pytest

from avar_verl.tools.cli import COMMANDS, load, parse
from avar_verl.tools.options import AtLeast, Command, Json, Numbers, Pairs

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "examples" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Without a flag.
POSITIONAL = {
    *((name, "files") for name in ("data check", "vas compare", "synth hashes")),
    *((name, "runs") for name in ("eval compare", "eval ablation")),
    *((name, "overrides") for name in ("synth run", "synth estimate")),
    ("rewards score", "data"),
    ("rollouts show", "data"),
    ("study report", "folder"),
    ("synth inspect", "out"),
}


def documented() -> list[str]:
    """The lines of code blocks that start with `avar`."""
    lines = []
    for page in PAGES:
        for block in re.findall(r"```\w*\n(.*?)```", page.read_text(), re.DOTALL):
            lines += [line for line in block.replace("\\\n", " ").splitlines() if line.startswith("avar ")]
    return lines


def parsed(line: str) -> Command:
    return parse(shlex.split(line))[1]


@pytest.mark.parametrize("line", documented())
def test_a_documented_line_is_a_command(line):
    assert isinstance(parsed(shlex.join(shlex.split(line, comments=True)[1:])), Command)


def test_lines_are_found_in_the_pages():
    assert len(documented()) > 25


@pytest.mark.parametrize("name", COMMANDS)
def test_help_names_every_option_and_says_what_it_does(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit, match="0"):
        parse([*name.split(), "--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert inspect.getdoc(load(name)).splitlines()[0] in text
    for field in fields(load(name)):
        flag = f"--{field.name.replace('_', '-')}"
        if field.name != "sampling" and flag in text:
            said = re.search(rf"{flag} (.*?) \((?:default|required|repeatable)", text)[1]
            assert len(said.split()) >= 3, f"{flag} of {name} has no help"
        else:
            assert (name, field.name) in POSITIONAL or field.name == "sampling"


@pytest.mark.parametrize(
    "line, code",
    [
        ("--help", 0),
        ("synth --help", 0),
        ("", 2),
        ("synth", 2),
        ("frobnicate", 2),
        *((f"{name} --frobnicate 3", 2) for name in COMMANDS),
        ("vas --model m", 2),
        ("vas --model m --data d --n many", 2),
        ("vas --model m --data d --n -1", 2),
        ("vas --model m --data d --query image", 2),
        ("vas --model m --data d --columns question", 2),
        ("vas --model m --data d --layers", 2),
        ("vas --model m --data d --split None --n None", 2),
        ("vas compare one", 2),
        ("eval --tasks mmstar", 2),
        ("eval ablation a b c", 2),
        ("data check", 2),
        ("rewards score a.jsonl --settings [1]", 2),
        ("rewards score a.jsonl --settings {", 2),
        ("intervene sweep --model m --data d --alpha-img 0,x --alpha-sys 0", 2),
    ],
)
def test_exit_codes(line, code, capsys):
    with pytest.raises(SystemExit) as stop:
        parsed(line)
    printed = capsys.readouterr()
    assert stop.value.code == code and bool(printed.out) == (code == 0) and bool(printed.err) == (code == 2)


def test_a_bad_value_is_named(capsys):
    with pytest.raises(SystemExit):
        parsed("vas --model m --data d --n -1")
    assert "n must be at least 0; got -1" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line, values",
    [
        ("vas --model m --data d --layers 0 -1", {"layers": (0, -1), "response_tokens": None}),
        ("vas --model m --data d --columns question=a image=b=c", {"columns": {"question": "a", "image": "b=c"}}),
        ("vas --model m --data d --generate --max_new_tokens 5", {"response_tokens": 5, "query": "both"}),
        ("generate --model m --prompt p --image a.png --image b.png", {"image": ("a.png", "b.png")}),
        ("intervene sweep --model m --data d --alpha-img=-0.5,0 --alpha-sys 0,1e-1", {"alpha_img": (-0.5, 0)}),
        ("synth run --config c.yaml --limit 2 a=1 b=2", {"overrides": ("a=1", "b=2"), "limit": 2}),
        ("synth run a=1 b=2 --config c.yaml --dry-run", {"overrides": ("a=1", "b=2"), "dry_run": True}),
        ("synth inspect out --gate accepted", {"out": Path("out"), "gate": "accepted"}),
        ("eval --model a/b --data x y", {"folder": Path("outputs/eval/b"), "data": (Path("x"), Path("y"))}),
        ("eval --model a --server-args='--dtype half'", {"server_arguments": ["--dtype", "half"]}),
        ("eval --dry-run --tasks all", {"dry_run": True}),
        ("eval ablation a b c d --vas 1 2 3 4", {"vas": tuple(map(Path, "1234"))}),
        ("rewards score a.jsonl --settings '{\"scale\": 3}'", {"settings": {"scale": 3}}),
        ("demo --fresh", {"fresh": True, "settings": {}, "out": Path("outputs/demo")}),
    ],
)
def test_what_a_line_means(line, values):
    command = parsed(line)
    assert {name: getattr(command, name) for name in values} == values


def test_the_command_line_is_parsed_without_torch():
    code = (
        "import sys; from avar_verl.tools.cli import COMMANDS, load, overview; overview(list(COMMANDS)); "
        "assert not {'torch', 'verl', 'transformers', 'openai'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_an_option_is_declared_once():
    """By its field: no module builds a parser of its own."""
    found = {
        path
        for folder in ("avar_verl", "recipes")
        for path in (ROOT / folder).rglob("*.py")
        if re.search(r"^\s*(?:import|from) argparse\b|add_argument\(", path.read_text(), re.MULTILINE)
    }
    assert not found


@dataclass(frozen=True)
class Example(Command):
    size: Annotated[float, AtLeast(0.5)] | None = None
    kind: Literal["a", "b"] = "a"
    names: Annotated[tuple[str, ...], AtLeast(1)] = ("x",)
    pairs: Pairs = None
    numbers: Numbers = ()
    settings: Json = None


def test_limits_of_fields():
    Example(), Example(size=0.5)
    for values, message in (
        ({"size": 0.4}, "size must be at least 0.5; got 0.4"),
        ({"kind": "c"}, r"kind must be one of \['a', 'b'\]; got 'c'"),
        ({"names": ()}, "names must be at least 1; got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            Example(**values)
    with pytest.raises(NotImplementedError):
        Example().run()
