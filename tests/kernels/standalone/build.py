"""Builds csrc/cpu and a driver into a program, without Python and torch."""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
DRIVER = Path(__file__).parent / "driver.cpp"
# What setup.py gives the kernels; the products of a * b + c would otherwise round twice. All
# described cells would take minutes to compile.
ARITHMETIC = ("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")
FEW_CELLS = "-DLSTM_FUSED_FEW_CELLS"

# The newest of 14 and later, or None.
CLANG = next(filter(shutil.which, ("clang++", *(f"clang++-{n}" for n in range(30, 13, -1)))), None)

RULES = """\
rule compile
  command = {compiler} {flags} -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = {compiler} {flags} {link} $in -o $out
"""


def build(folder, compiler, flags, link=(), driver=DRIVER):
    """The finished process of ninja, which leaves the program `driver` in the folder. Every source
    of csrc/cpu is compiled, so that a new ISA needs no change here. driver: None for none, and
    object files alone."""
    folder.mkdir(parents=True, exist_ok=True)
    sources = [*sorted((ROOT / "csrc" / "cpu").glob("*.cpp")), *([driver] if driver else [])]
    text = RULES.format(
        compiler=shlex.join(compiler),
        flags=shlex.join(["-std=c++20", FEW_CELLS, *ARITHMETIC, *flags]),
        link=shlex.join(link),
    )
    lines = [f"build {source.stem}.o: compile {source}" for source in sources]
    if driver:
        objects = " ".join(f"{source.stem}.o" for source in sources)
        lines.append(f"build driver: link {objects}")
    (folder / "build.ninja").write_text("\n".join([text, *lines, ""]))
    ninja = [sys.executable, "-m", "ninja", "-C", str(folder)]
    return subprocess.run(ninja, capture_output=True, text=True)
