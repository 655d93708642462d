"""A new cell takes what CONTRIBUTING says: a header, and a row in csrc/cells/cells.h."""

import re
import shutil
import subprocess
from pathlib import Path

from lstm_fused import runtime

ROOT = Path(__file__).parents[2]
RECIPE = Path(__file__).parent / "recipe"
ISA = runtime.available_isas()[0]
FLAGS = ["-std=c++20", "-O1", "-fopenmp", "-ffp-contract=fast", "-Wno-psabi"]


def test_a_cell_is_a_header_and_a_row(tmp_path):
    csrc = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    shutil.copy(RECIPE / "leaky.h", csrc / "cells")
    cells = csrc / "cells" / "cells.h"
    text = cells.read_text().replace('#include "lstm.h"', '#include "leaky.h"\n#include "lstm.h"')
    row = "#define LSTM_FUSED_CELLS(CELL) CELL(leaky, Leaky)"
    # The other rows would be compiled too, which takes a minute.
    cells.write_text(re.sub(r"#define LSTM_FUSED_CELLS\(CELL\)(.*\\\n)*.*", row, text))
    sources = [
        csrc / "cpu" / f"{name}.cpp"
        for name in (f"isa_{ISA}", "plan", "cost", "team", "topology", "system")
    ]
    program = tmp_path / "driver"
    sources.append(RECIPE / "driver.cpp")
    options = [*FLAGS, f"-DKERNELS=kernels_{ISA}", f"-I{csrc}"]
    command = ["g++", *options, *sources, "-o", program]
    subprocess.run(command, check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=True)
    assert all(float(error) < 1e-6 for error in done.stdout.split()), done.stdout
