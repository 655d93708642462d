"""`python -m lstm_fused`, and what it and an import say where something is broken."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

import lstm_fused
from lstm_fused import _plan, cuda, runtime

PACKAGE = Path(lstm_fused.__file__).parent
COMMAND = ("-m", "lstm_fused")


def run(*arguments, path=PACKAGE.parent, **variables):
    """Without the site's .pth files: an editable installation would stand in for missing files."""
    search = os.pathsep.join([str(path), sysconfig.get_path("purelib")])
    # Libraries that other tests import set some of these variables.
    reported = ("LSTM_FUSED_", "KMP_")
    ours = {name: v for name, v in os.environ.items() if not name.startswith(reported)}
    return subprocess.run(
        [sys.executable, "-S", *arguments],
        cwd=path,  # -m looks there first
        env=ours | {"PYTHONPATH": search} | variables,
        capture_output=True,
        text=True,
    )


def facts(done):
    assert done.returncode == 0, done.stderr
    table, _, essential = done.stdout.partition("\n\nFor a bug report:\n")
    assert essential.count("\n") == 1
    rows = [line.split("  ", 1) for line in table.splitlines()]
    return {name: text.strip() for name, text in rows}, essential


def test_report():
    found, essential = facts(run(*COMMAND, OMP_NUM_THREADS="1"))
    assert found["lstm_fused"] == f"{lstm_fused.__version__} in {PACKAGE}"
    built = runtime.build_info()
    assert found["torch"] == f"{torch.__version__}, built with {built['torch']}"
    assert sys.version.split()[0] in found["system"]
    assert found["ISAs compiled"] == ", ".join(built["isas"])
    assert found["ISAs available"] == ", ".join(runtime.available_isas())
    assert found["ISA in use"] == runtime.available_isas()[-1]
    assert found["threads"].startswith("1 ") and found["environment"] == "OMP_NUM_THREADS=1"
    here = _plan.read_topology("", sorted(os.sched_getaffinity(0)))
    assert found["topology"].startswith(f"{here.cores} cores, ")
    assert f"L2 {here.l2 >> 10} KiB, L3 {here.l3 >> 10} KiB" in found["topology"]
    fixed, _ = facts(run(*COMMAND, LSTM_FUSED_FIXED_PLANS="1"))
    assert fixed["topology"] == "not used (LSTM_FUSED_FIXED_PLANS)"
    assert found["CUDA"].startswith("built" if cuda.built() else "not built")
    for name in ("torch", "system", "ISA in use", "topology", "CUDA", "environment"):
        assert found[name] in essential


def test_forced_isa():
    found, essential = facts(run(*COMMAND, LSTM_FUSED_ISA="baseline"))
    assert found["ISA in use"] == "baseline (LSTM_FUSED_ISA)"
    assert "LSTM_FUSED_ISA=baseline" in found["environment"]
    assert "ISA baseline (LSTM_FUSED_ISA) of baseline" in essential
    done = run(*COMMAND, LSTM_FUSED_ISA="nonesuch")
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.startswith("lstm_fused: LSTM_FUSED_ISA is 'nonesuch' but must be one of ")
    assert done.stderr.count("\n") == 1


SUFFIX = "".join(Path(_plan.__file__).suffixes)
NO_TORCH = 'raise ModuleNotFoundError("No module named \'torch\'", name="torch")'
BROKEN = {
    "no operators": ({"_C": None}, "the compiled module _C is missing in "),
    "no plan": ({"_plan": None}, "the compiled module _plan is missing in "),
    "another Python's": (
        {"_C": None, "lstm_fused/_C.cpython-39-of-another.so": ""},
        ", there is _C.cpython-39-of-another.so of another Python; install lstm_fused again",
    ),
    "empty operators": (
        {"_C": ""},
        f"the compiled module _C, built with torch {runtime.build_info()['torch']}, cannot be "
        "loaded (",
    ),
    "empty plan": ({"_plan": ""}, "the compiled module _plan cannot be loaded ("),
    "no torch": ({"torch.py": NO_TORCH}, "torch is not installed; `pip install torch` [torch none"),
    "broken torch": (
        {"torch.py": 'raise OSError("libcudart.so:\\n cannot open")'},
        "torch cannot be imported (libcudart.so: cannot open); mend torch first [",
    ),
    "old torch": (
        {"torch.py": '__version__ = "2.9.1+cpu"'},
        "it needs torch 2.10 or later; `pip install 'torch>=2.10'` [torch 2.9.1+cpu, Python ",
    ),
}


@pytest.mark.parametrize("files, words", BROKEN.values(), ids=BROKEN)
def test_broken(files, words, tmp_path):
    """One line: a command's on stderr, without a traceback; an import's as its ImportError."""
    shutil.copytree(PACKAGE, tmp_path / "lstm_fused", ignore=shutil.ignore_patterns("__pycache__"))
    for name, text in files.items():
        inside = name.startswith("_")
        path = tmp_path / (f"lstm_fused/{name}{SUFFIX}" if inside else name)
        if text is None:
            path.unlink()
        else:
            path.write_text(text)
    done = run(*COMMAND, path=tmp_path)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.startswith("lstm_fused cannot be imported: ") and words in done.stderr
    assert done.stderr.count("\n") == 1
    (tmp_path / "program.py").write_text(
        "try:\n    import lstm_fused\nexcept ImportError as error:\n    print(error, error.name)\n"
    )
    for program in (["-m", "program"], [str(tmp_path / "program.py"), "lstm_fused"]):
        printed = run(*program, path=tmp_path).stdout
        assert printed == f"{done.stderr.strip()} lstm_fused\n"


def test_cuda_library_that_cannot_be_loaded(monkeypatch, tmp_path):
    """The package is imported all the same, and a call on the device says why torch runs it."""
    library = tmp_path / "_C_cuda.so"
    library.touch()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cuda, "_LIBRARY", library)
    monkeypatch.setattr(cuda, "_load_error", None)
    cuda.load()
    reason = cuda.unsupported_reason(torch.device("cuda", 0))
    assert reason == f"the CUDA kernels cannot be loaded: {library}: file too short"
    assert not cuda.available()
