"""Builds csrc/cpu and a driver under both sanitizers: python -m tests.kernels.sanitize.build"""

import sys
from pathlib import Path

from tests.kernels.standalone import build as standalone

FOLDER = standalone.ROOT / "build" / "sanitize"
DRIVER = FOLDER / "driver"

# Unoptimised, because compiling takes longest. The checks left out are the address sanitizer's
# too, or of classes, of which there are none.
FLAGS = [
    *("-O0", "-g1", "-fopenmp", "-Wno-psabi"),
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "-fno-sanitize=null,object-size,vptr",
]


def build():
    """The finished process of ninja, which leaves DRIVER."""
    return standalone.build(FOLDER, ["g++"], FLAGS, driver=Path(__file__).parent / "driver.cpp")


if __name__ == "__main__":
    done = build()
    sys.exit(f"{done.stdout}{done.stderr}" if done.returncode else 0)
