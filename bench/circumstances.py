"""Circumstances a measurement is made under on purpose: an older processor, busy neighbours."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

# What holds each library to the instruction set: read when it is loaded, so set before that.
LIMITS = {
    "avx2": {
        "LSTM_FUSED_ISA": "avx2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
}
MARCH = {"avx2": "x86-64-v3"}  # the compiler's name of it
MARK = "LSTM_FUSED_BENCH_ISA"
ROOT = Path(__file__).resolve().parent.parent


def isa() -> str | None:
    """The instruction set that everybody is held to, None for this machine's own."""
    return os.environ.get(MARK)


def march() -> str:
    return MARCH.get(isa(), "native")


def restart_with(name: str, arguments: list[str]) -> int:
    """Runs `python -m bench` anew where every library is held to the instruction set."""
    environment = os.environ | LIMITS[name] | {MARK: name}
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(path)
    return subprocess.run([sys.executable, "-m", "bench", *arguments], env=environment).returncode


@contextlib.contextmanager
def neighbours(count: int):
    """So many processes that do nothing but use a processor, while the context lasts."""
    started = []
    try:
        for _ in range(count):
            started.append(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()
