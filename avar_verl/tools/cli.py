# SPDX-License-Identifier: Apache-2.0
"""The console script `avar`."""

import importlib
import inspect
import sys

import tyro

from avar_verl.tools.options import Command

# Command -> its module under `avar_verl.tools`, and the class that holds its options and runs it.
COMMANDS = {
    "demo": ("demo.command", "Demo"),
    "doctor": ("doctor.command", "Doctor"),
    "data check": ("check.command", "Check"),
    "rewards score": ("rewards.command", "Score"),
    "vas": ("vas.command", "Vas"),
    "vas compare": ("vas.command", "Compare"),
    "generate": ("generate.command", "Generate"),
    "intervene sweep": ("generate.command", "Sweep"),
    "eval": ("evaluate.command", "Eval"),
    "eval compare": ("evaluate.command", "Compare"),
    "eval ablation": ("evaluate.command", "Ablation"),
    "synth run": ("synth.command", "Run"),
    "synth estimate": ("synth.command", "Estimate"),
    "synth inspect": ("synth.command", "Inspect"),
    "synth hashes": ("synth.command", "Hashes"),
}


def load(name: str) -> type[Command]:
    """The class of a command."""
    module, cls = COMMANDS[name]
    return getattr(importlib.import_module(f"avar_verl.tools.{module}"), cls)


def overview(names: list[str]) -> str:
    """One line for each command: the first one of its docstring, without the page of the documentation."""
    summaries = {name: inspect.getdoc(load(name)).splitlines()[0].split(" (docs/")[0].rstrip(".") for name in names}
    return "\n".join(f"  avar {name:16} {summary}" for name, summary in summaries.items())


def parse(words: list[str]) -> tuple[str, Command]:
    """The command of a command line, by its name and with its options.

    Raises:
        SystemExit: 0 for `--help`, 2 for what is no command or no value of an option.
    """
    name = next((name for name in (" ".join(words[:2]), *words[:1]) if name in COMMANDS), "")
    inner = [known for known in COMMANDS if known.startswith(f"{name or ' '.join(words[:1])} ")]
    if not name:
        rest = words[1:] if inner else words
        helps = rest[:1] in (["-h"], ["--help"])
        file = sys.stdout if helps else sys.stderr
        if not helps:
            print(f"avar: a command is needed; got {' '.join(words) or 'none'}. Name one.\n", file=file)
        print(overview(inner or list(COMMANDS)), "Each one has --help.", sep="\n\n", file=file)
        sys.exit(0 if helps else 2)
    cls = load(name)
    description = inspect.getdoc(cls) + (f"\n\n{overview(inner)}" if inner else "")
    config = (tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone)
    rest = words[len(name.split()) :]
    return name, tyro.cli(cls, prog=f"avar {name}", description=description, args=rest, config=config)


def main() -> None:
    """Entry point. Exit code 0 only on success; a rule that was broken is one line, not a traceback."""
    name, command = parse(sys.argv[1:])
    try:
        command.run()
    except (ValueError, RuntimeError, FileNotFoundError) as error:
        sys.exit(f"avar {name}: {error}")


if __name__ == "__main__":
    main()
