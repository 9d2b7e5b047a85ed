"""Small functions, few arguments, short files: what is longer is named here, with the reason."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = sorted(path for folder in ("cdpo", "launch") for path in (ROOT / folder).rglob("*.py"))
ALL = [*OURS, *sorted((ROOT / "tests").rglob("*.py"))]
MANY = {  # functions with more than 5 arguments
    "cdpo/model/attention.py tree_attention": "transformers' attention interface",
    "cdpo/model/fused_head.py FusedLogProbs.forward": "torch.autograd.Function: what is differentiated is an argument",
    "cdpo/model/head.py _LogProbs.forward": "the same",
}


def functions(path: Path) -> list[tuple[str, ast.FunctionDef]]:
    """Every function of a file, methods as Class.method."""
    found = []

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                found.append((prefix + child.name, child))
            visit(child, f"{child.name}." if isinstance(child, ast.ClassDef) else prefix)

    visit(ast.parse(path.read_text()), "")
    return found


def arguments(function: ast.FunctionDef) -> list[str]:
    """Its arguments by name, without those that Python fills."""
    given = function.args
    names = [argument.arg for argument in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return [name for name in names if name not in ("self", "cls", "ctx")]


def known_as(path: Path, name: str) -> str:
    return f"{path.relative_to(ROOT).as_posix()} {name}"


@pytest.mark.parametrize("path", OURS, ids=[str(path.relative_to(ROOT)) for path in OURS])
def test_functions_are_small(path):
    for name, function in functions(path):
        given = len(arguments(function))
        assert given <= 5 or known_as(path, name) in MANY, f"{name} has {given} arguments"
        lines = function.end_lineno - function.lineno + 1
        assert lines <= 40, f"{name} has {lines} lines"


def test_the_exempt_are_there_and_need_it():
    many = [known_as(path, name) for path in OURS for name, function in functions(path) if len(arguments(function)) > 5]
    assert sorted(many) == sorted(MANY)


@pytest.mark.parametrize("path", ALL, ids=[str(path.relative_to(ROOT)) for path in ALL])
def test_files_are_short(path):
    assert len(path.read_text().splitlines()) <= 300
