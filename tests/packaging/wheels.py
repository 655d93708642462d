"""Runs the steps of pyproject.toml's [tool.cibuildwheel] on this machine, without its images:

    python tests/packaging/wheels.py [--python PYTHON ...]

builds the wheel, repairs and audits it, installs it beside the torch of each PYTHON that is named
(each needs torch, pytest and numpy; by default the one that runs this) and runs the tests there.
The wheel is left in build/wheels. Its tag names the oldest C library that this
machine's compiler lets it run on: the images' compilers make it manylinux_2_28.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

try:
    import tomllib
except ImportError:  # Python 3.10
    from pip._vendor import tomli as tomllib

ROOT = Path(__file__).parents[2]
OUT = ROOT / "build" / "wheels"


def run(command, **options):
    print("+", command if isinstance(command, str) else shlex.join(map(str, command)), flush=True)
    subprocess.run(command, check=True, shell=isinstance(command, str), **options)


def built(config):
    """The repaired wheel."""
    environment = {**os.environ, **config["environment"]}
    shutil.rmtree(OUT, ignore_errors=True)
    (OUT / "as_built").mkdir(parents=True)
    frontend = config["build-frontend"]
    command = [sys.executable, "-m", frontend["name"], "wheel", *frontend["args"], "--no-deps"]
    run([*command, "--wheel-dir", OUT / "as_built", ROOT], env=environment)
    (wheel,) = (OUT / "as_built").glob("*.whl")
    repair = config["repair-wheel-command"].format(dest_dir=OUT, wheel=wheel)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    run(repair, env=dict(os.environ, PATH=path))
    (repaired,) = OUT.glob("*.whl")
    run([sys.executable, "-m", "auditwheel", "show", repaired])
    return repaired


def test(config, wheel, python):
    """The configuration's tests, on the wheel and nothing else of the repository."""
    with tempfile.TemporaryDirectory() as folder:
        for name in config["test-sources"]:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, Path(folder) / name)
        target = ["--target", f"{folder}/installed", "--no-deps", "--quiet"]
        run([python, "-m", "pip", "install", *target, wheel])
        environment = dict(os.environ, PYTHONPATH=f"{folder}/installed")
        versions = "import sys, torch; print('Python', sys.version, 'torch', torch.__version__)"
        run([python, "-c", versions])
        # An absolute path, and no link resolved: that would leave a virtual environment.
        command = config["test-command"].replace("python", shlex.quote(os.path.abspath(python)), 1)
        run(command, cwd=folder, env=environment)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", action="append", help="test with this one; may be repeated")
    options = parser.parse_args()
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["cibuildwheel"]
    wheel = built(config)
    for python in options.python or [sys.executable]:
        test(config, wheel, python)
    print(f"{wheel} passed")


if __name__ == "__main__":
    main()
