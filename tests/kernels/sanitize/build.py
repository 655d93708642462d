"""Builds csrc/cpu and a driver under both sanitizers: python tests/kernels/sanitize/build.py"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "build" / "sanitize"
DRIVER = FOLDER / "driver"

# Unoptimised, because compiling takes longest. The checks left out are the address sanitizer's
# too, or of classes, of which there are none.
RULES = """\
cxx = g++
flags = -std=c++20 -O0 -g1 -fopenmp -fno-math-errno -fno-trapping-math -ffp-contract=fast $
  -Wno-psabi -fsanitize=address,undefined -fno-sanitize-recover=all $
  -fno-sanitize=null,object-size,vptr
rule compile
  command = $cxx $flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = $cxx $flags $in -o $out
"""


def ninja_file():
    """Every source of csrc/cpu, so that a new ISA needs no change of this file."""
    sources = [*sorted((ROOT / "csrc" / "cpu").glob("*.cpp")), Path(__file__).parent / "driver.cpp"]
    lines = [f"build {source.stem}.o: compile {source}" for source in sources]
    objects = " ".join(f"{source.stem}.o" for source in sources)
    return "\n".join([RULES, *lines, f"build driver: link {objects}", ""])


def build():
    """The finished process of ninja, which leaves DRIVER."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "build.ninja").write_text(ninja_file())
    ninja = [sys.executable, "-m", "ninja", "-C", str(FOLDER)]
    return subprocess.run(ninja, capture_output=True, text=True)


if __name__ == "__main__":
    done = build()
    sys.exit(f"{done.stdout}{done.stderr}" if done.returncode else 0)
