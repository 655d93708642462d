"""Loads torch and the compiled modules; where that fails, ImportError says in a line why.

The package imports this first. `python -m lstm_fused` ends with that line, and without a traceback.
"""

import importlib
import platform
import re
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

FOLDER = Path(__file__).parent
OLDEST_TORCH = (2, 10)
_REINSTALL = (
    "install lstm_fused again beside this torch (in its sources: `make build`, or "
    "`pip install --no-build-isolation .`)"
)


def _load():
    try:
        import torch
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "torch":
            _fail("torch is not installed", "`pip install torch`")
        _fail(f"torch cannot be imported ({_line(error)})", "mend torch first")
    version = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if version and tuple(map(int, version.groups())) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        _fail(f"it needs torch {oldest} or later", f"`pip install 'torch>={oldest}'`")
    for name in ("_plan", "_C"):
        try:
            importlib.import_module(f"lstm_fused.{name}")
        except ImportError as error:
            _fail(*_failure(name, error))


def _failure(name, error):
    """Why a compiled module cannot be imported, and what to do."""
    if not any((FOLDER / (name + suffix)).exists() for suffix in EXTENSION_SUFFIXES):
        others = ", ".join(sorted(path.name for path in FOLDER.glob(f"{name}.*.so")))
        beside = f", there is {others} of another Python" if others else ""
        return f"the compiled module {name} is missing in {FOLDER}{beside}", _REINSTALL
    plan = sys.modules.get("lstm_fused._plan")
    built = f", built with torch {plan.build_info()['torch']}," if plan else ""
    return f"the compiled module {name}{built} cannot be loaded ({_line(error)})", _REINSTALL


def _fail(cause, remedy):
    """ImportError, or for `python -m lstm_fused` the end of the process."""
    torch = getattr(sys.modules.get("torch"), "__version__", "none")
    here = f"torch {torch}, Python {platform.python_version()}, {platform.platform()}"
    message = f"lstm_fused cannot be imported: {cause}; {remedy} [{here}]"
    # While a package is imported for -m, argv[0] is "-m".
    if sys.argv[:1] == ["-m"] and {"lstm_fused", "-mlstm_fused"} & set(sys.orig_argv):
        sys.exit(message)
    raise ImportError(message, name="lstm_fused") from None


def _line(error):
    return " ".join(str(error).split())


_load()
