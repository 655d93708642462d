"""Types as a user's checker sees them: mypy, the package installed as a wheel installs it."""

import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from lstm_fused import _C, _plan

ROOT = Path(__file__).parents[2]
PROGRAMS = Path(__file__).parent / "typed"


def mypy(*arguments, cache, cwd):
    """(file, line, code) of each error."""
    command = [sys.executable, "-m", "mypy", f"--cache-dir={ROOT / 'build' / cache}", *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    found = re.findall(r"^(.+?):(\d+): error: .*\[([\w-]+)\]$", done.stdout, re.MULTILINE)
    assert len(found) == done.stdout.count("error: "), done.stdout
    return {(Path(file).name, int(line), code) for file, line, code in found}


@pytest.fixture
def installed(tmp_path):
    """A Python with this one's packages, and the package where a checker wants a py.typed."""
    venv.create(tmp_path / "venv", symlinks=True)
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (site / "others.pth").write_text(sysconfig.get_path("purelib"))
    without = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "lstm_fused", site / "lstm_fused", ignore=without)
    return tmp_path / "venv" / "bin" / "python"


def test_programs(installed, tmp_path):
    """A user's program has no error in strict mode, one with mistakes has those that it marks."""
    programs = [shutil.copy(PROGRAMS / name, tmp_path) for name in ("user.py", "wrong.py")]
    options = "--strict", "--config-file=", f"--python-executable={installed}"
    marked = {
        ("wrong.py", k, line.rpartition("# error: ")[2])
        for k, line in enumerate((tmp_path / "wrong.py").read_text().splitlines(), 1)
        if "# error: " in line
    }
    assert len(marked) > 20
    assert mypy(*options, *programs, cache="mypy_strict", cwd=tmp_path) == marked


def test_package():
    """By the options in pyproject.toml."""
    assert mypy(cache="mypy", cwd=ROOT) == set()


@pytest.mark.parametrize("module", [_plan, _C])
def test_stubs_name_what_the_extension_modules_have(module):
    stub = (ROOT / "lstm_fused" / f"{module.__name__.rpartition('.')[2]}.pyi").read_text()
    named = set(re.findall(r"^(?:def |class )?(\w+)[(:]", stub, re.MULTILINE))
    typed_dicts = set(re.findall(r"^class (\w+)\(TypedDict\)", stub, re.MULTILINE))
    assert named - typed_dicts == {name for name in dir(module) if not name.startswith("__")}
