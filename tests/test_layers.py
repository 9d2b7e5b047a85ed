"""Data flows one way: a package imports only from those before it, within a package nothing goes in a circle."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import cdpo

PACKAGE = Path(cdpo.__file__).parent
ORDER = [
    "errors", "system", "batch", "config", "data", "losses", "optim", "model", "constraints", "measure",
    "compressive_sensing", "exact", "policy_recovery", "training", "report", "sweep", "train",
]  # fmt: skip


def name_of(path: Path) -> str:
    """`data.rows` for cdpo/data/rows.py, `data` for the face of that package."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem != "__init__"}


def imported(path: Path) -> set[str]:
    """The modules of cdpo that a file imports, also within functions and for types only."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("cdpo.") for alias in node.names if alias.name.startswith("cdpo.")}
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            base = (node.module or "").split(".")
            if base[0] == "cdpo":
                names = [".".join([*base[1:], alias.name]) for alias in node.names]
                found |= {name if name in MODULES else name.rpartition(".")[0] for name in names}
    return found - {""}


def room(module: str) -> str:
    return module.partition(".")[0]


def test_every_package_has_a_place_in_the_order():
    assert {room(module) for module in MODULES} == set(ORDER)


def test_packages_import_only_from_those_before_them():
    for module, path in MODULES.items():
        later = {one for one in imported(path) if ORDER.index(room(one)) > ORDER.index(room(module))}
        assert not later, f"{module} imports {later}"


def test_within_a_package_nothing_goes_in_a_circle():
    graph = {module: {one for one in imported(path) if room(one) == room(module)} for module, path in MODULES.items()}
    list(TopologicalSorter(graph).static_order())  # raises CycleError


def test_nobody_inside_a_package_goes_through_its_face():
    """A face hands on what conf/ can name and what a class of one's own needs; to those within it would be a circle."""
    for module, path in MODULES.items():
        assert room(module) not in imported(path) or module == room(module), module
