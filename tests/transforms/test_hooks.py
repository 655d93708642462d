"""when_imported runs functions once the named module is imported."""

import importlib
import importlib.util
import sys

import pytest

from lstm_fused.hooks import when_imported


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package with a module in it, not imported yet."""
    (tmp_path / "late_package").mkdir()
    (tmp_path / "late_package" / "__init__.py").write_text("")
    (tmp_path / "late_package" / "part.py").write_text("value = 1")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    yield
    for name in ("late_package", "late_package.part"):
        sys.modules.pop(name, None)


def test_called_once_per_callback(package):
    seen = []
    when_imported("late_package.part", lambda module: seen.append(("first", module.value)))
    when_imported("late_package.part", lambda module: seen.append(("second", module.value)))
    assert importlib.util.find_spec("late_package.part") and not seen  # finding is not importing
    importlib.import_module("late_package.part")
    assert sorted(seen) == [("first", 1), ("second", 1)]
    importlib.reload(sys.modules["late_package.part"])
    assert len(seen) == 2


def test_called_at_once_if_imported():
    seen = []
    when_imported("sys", seen.append)
    assert seen == [sys]


def test_import_error_propagates(package):
    seen, before = [], len(sys.meta_path)
    when_imported("late_package.missing", seen.append)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("late_package.missing")
    assert not seen and len(sys.meta_path) == before + 1
