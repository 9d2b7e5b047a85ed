"""Data flows one way: a module imports only from modules above it, and nobody imports the command line."""

from __future__ import annotations

import ast
from pathlib import Path

import cdpo

PACKAGE = Path(cdpo.__file__).parent
ABOVE_TO_BELOW = """
    errors rendezvous distributed batch files candidates losses objective diagnostics bradley_terry preemption progress
    lock cache metrics logger
    compressive_sensing rows records formats data worlds
    tokenise tokens config packing attention head logps fingerprint reference model tabular change constraints optim
    switches memory checkpoint evaluate run engine checks directory job report sweep work local slurm status compose
    estimate train
"""
ORDER = ABOVE_TO_BELOW.split()


def unit(path: Path) -> str:
    """losses and constraints are packages of equals; every other module stands for itself."""
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = PACKAGE / Path(*path.relative_to(PACKAGE).parts[: -node.level])
            inside = base.relative_to(PACKAGE).parts
            found = [inside[0]] if inside else [(node.module or "").split(".")[0]]
            names |= set(found) if node.module or inside else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "cdpo":
            parts = (node.module or "").split(".")
            names |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
    return names - {"__version__"}


def test_every_module_has_a_place_in_the_order():
    found = {unit(path) for path in PACKAGE.rglob("*.py") if path.name != "__init__.py" or path.parent != PACKAGE}
    assert found == set(ORDER)


def test_modules_import_only_from_above():
    for path in PACKAGE.rglob("*.py"):
        if path == PACKAGE / "__init__.py":
            continue
        own = unit(path)
        below = {name for name in imported(path) - {own} if ORDER.index(name) > ORDER.index(own)}
        assert not below, f"{path.name} imports {below}, which stand below it"
