"""Builds csrc/cpu and a driver under both sanitizers: python -m tests.kernels.sanitize.build

By clang where its sanitizers and its OpenMP are installed (Debian: libclang-rt-14-dev and
libomp-14-dev), which takes a fifth of g++'s time.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from tests.kernels.standalone import build as standalone

FOLDER = standalone.ROOT / "build" / "sanitize"
DRIVER = FOLDER / "driver"

# Unoptimised, because compiling takes longest. The checks left out are the address sanitizer's
# too, or of classes, of which there are none; or of offsets to the null pointers of buffers that a
# call does not have and does not read.
FLAGS = [
    *("-O0", "-g1", "-fopenmp", "-Wno-psabi"),
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "-fno-sanitize=null,object-size,vptr,pointer-overflow",
]


def links(compiler):
    """Whether the compiler has all that FLAGS need."""
    with tempfile.TemporaryDirectory() as folder:
        command = [compiler, *FLAGS, "-x", "c++", "-", "-o", str(Path(folder, "program"))]
        source = "#include <omp.h>\nint main() { return omp_get_max_threads() == 0; }"
        return subprocess.run(command, input=source, capture_output=True, text=True).returncode == 0


def build():
    """The finished process of ninja, which leaves DRIVER."""
    compiler = standalone.CLANG if standalone.CLANG and links(standalone.CLANG) else "g++"
    return standalone.build(FOLDER, [compiler], FLAGS, driver=Path(__file__).parent / "driver.cpp")


if __name__ == "__main__":
    done = build()
    sys.exit(f"{done.stdout}{done.stderr}" if done.returncode else 0)
