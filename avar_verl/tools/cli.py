# SPDX-License-Identifier: Apache-2.0
"""The console script `avar`."""

import ast
import importlib.util
import inspect
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from avar_verl.tools.options import Command

# Command -> its module under `avar_verl.tools`, and the class with its options and its `run`.
COMMANDS = {
    "demo": ("demo.command", "Demo"),
    "doctor": ("doctor.command", "Doctor"),
    "data check": ("check.command", "Check"),
    "rewards score": ("rewards.command", "Score"),
    "rollouts show": ("rollouts.command", "Show"),
    "vas": ("vas.command", "Vas"),
    "vas compare": ("vas.command", "Compare"),
    "generate": ("generate.command", "Generate"),
    "intervene sweep": ("generate.command", "Sweep"),
    "eval": ("evaluate.command", "Eval"),
    "eval compare": ("evaluate.command", "Compare"),
    "eval ablation": ("evaluate.command", "Ablation"),
    "study run": ("study.command", "Run"),
    "study report": ("study.command", "Report"),
    "synth run": ("synth.command", "Run"),
    "synth estimate": ("synth.command", "Estimate"),
    "synth inspect": ("synth.command", "Inspect"),
    "synth hashes": ("synth.command", "Hashes"),
}


def load(name: str) -> "type[Command]":
    """The class of a command."""
    module, cls = COMMANDS[name]
    return getattr(importlib.import_module(f"avar_verl.tools.{module}"), cls)


def summary(name: str) -> str:
    """First line of a command's docstring, without the reference to the docs. Parsed instead of imported, which is
    faster.
    """
    module, cls = COMMANDS[name]
    tree = ast.parse(Path(importlib.util.find_spec(f"avar_verl.tools.{module}").origin).read_text())
    (node,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == cls]
    return ast.get_docstring(node).splitlines()[0].split(" (docs/")[0].rstrip(".")


def overview(names: list[str]) -> str:
    """One line per command."""
    return "\n".join(f"  avar {name:16} {summary(name)}" for name in names)


def parse(words: list[str]) -> "tuple[str, Command]":
    """The name and the parsed command of a command line.

    Raises:
        SystemExit: 0 for `--help`, 2 for an unknown command or an invalid option.
    """
    name = next((name for name in (" ".join(words[:2]), *words[:1]) if name in COMMANDS), "")
    inner = [known for known in COMMANDS if known.startswith(f"{name or ' '.join(words[:1])} ")]
    if not name:
        rest, prog = (words[1:], f"avar {words[0]}") if inner else (words, "avar")
        helps = rest[:1] in (["-h"], ["--help"])
        wrong = "" if helps else f"avar: a command is needed; got {' '.join(words) or 'none'}. Name one.\n\n"
        text = f"{wrong}usage: {prog} COMMAND [OPTIONS]; each has --help\n\n{overview(inner or list(COMMANDS))}"
        print(text, file=sys.stdout if helps else sys.stderr)
        sys.exit(0 if helps else 2)
    import tyro

    cls = load(name)
    description = inspect.getdoc(cls) + (f"\n\n{overview(inner)}" if inner else "")
    config = (tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone)
    rest = words[len(name.split()) :]
    return name, tyro.cli(cls, prog=f"avar {name}", description=description, args=rest, config=config)


def main() -> None:
    """Entry point. Exit code 0 only on success; a ValueError is printed as one line, not a traceback."""
    name, command = parse(sys.argv[1:])
    try:
        command.run()
    except (ValueError, RuntimeError, FileNotFoundError) as error:
        sys.exit(f"avar {name}: {error}")


if __name__ == "__main__":
    main()
