"""The packages depend on each other in one direction."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FORBIDDEN = {
    "lstm_fused": {"bench", "examples", "tests"},
    "examples": {"bench", "tests"},
    "bench": {"tests"},
}


def imported(path):
    """The first names of all modules that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.partition(".")[0]


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_form_a_line(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    wrong = [(f.name, name) for f in files for name in imported(f) if name in FORBIDDEN[package]]
    assert not wrong
