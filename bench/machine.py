"""Where and with what a measurement was made."""

import os
import platform
import re
import subprocess
import time
from datetime import datetime, timezone
from pathlib import Path

import torch

from lstm_fused import ops


def cpu_model() -> str:
    """The processor's name, with the family and model where the name alone says little."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    fields = dict(re.findall(r"^([^\t:]+)\s*: (.*)$", info.read_text(), re.MULTILINE))
    name = fields.get("model name", platform.machine())
    if "cpu family" in fields:
        name += f" (family {fields['cpu family']} model {fields.get('model', '?')})"
    return name


def revision() -> str:
    """The git revision of the working tree, marked where files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


class Others:
    """How many CPUs other programs used since this was made; 0 where that is not known."""

    def __init__(self):
        self.begin = self._now()

    @staticmethod
    def _now() -> tuple[float, float]:
        """The wall clock, and CPU seconds the machine spent on anything but this process."""
        stat = Path("/proc/stat")
        if not stat.exists():
            return time.monotonic(), 0.0
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(
            int, stat.read_text().split("\n", 1)[0].split()[1:9]
        )
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return time.monotonic(), busy - time.process_time()

    def cpus(self) -> float:
        wall, others = (now - begin for now, begin in zip(self._now(), self.begin, strict=True))
        return round(max(0.0, others / max(wall, 1e-9)), 2)


def describe() -> dict:
    return {
        "cpu": cpu_model(),
        "cpus": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "isa": ops.available_isas()[-1],
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "build": ops.build_info(),
        "revision": revision(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def slug(machine: dict) -> str:
    """A file name for the results of a machine."""
    words = re.sub(r"[^a-z0-9]+", "-", machine["cpu"].lower()).strip("-")
    return f"{words}-{machine['threads']}t"
