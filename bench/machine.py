"""Where and with what a measurement was made."""

import importlib.metadata
import os
import platform
import re
import subprocess
import time
from datetime import datetime, timezone
from pathlib import Path

import torch

from lstm_fused import runtime

PEERS = ("onnxruntime", "onnx", "numpy", "haste_pytorch", "flashrnn", "triton")


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


def output_of(*command: str) -> str | None:
    """What a command prints, None where it is missing or fails."""
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def revision() -> str:
    """The git revision of the working tree, marked where files differ from it."""
    describe = ("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    return output_of("git", *describe) or "unknown"


def versions() -> dict[str, str]:
    """Versions of the peers that are installed."""
    found = {}
    for name in PEERS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def gpu() -> dict:
    """Name, driver and libraries of the current CUDA device."""
    properties = torch.cuda.get_device_properties(0)
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory": properties.total_memory,
        "driver": (output_of(*query) or "unknown").split("\n")[0],
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


class Others:
    """How many CPUs other programs used since this was made; 0 where that is not known."""

    def __init__(self):
        self.begin = self._now()

    @staticmethod
    def _now() -> tuple[float, float]:
        """The wall clock, and CPU seconds the machine spent on anything but this process and the
        children it has waited for."""
        stat = Path("/proc/stat")
        if not stat.exists():
            return time.monotonic(), 0.0
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(
            int, stat.read_text().split("\n", 1)[0].split()[1:9]
        )
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return time.monotonic(), busy - sum(os.times()[:4])

    def cpus(self) -> float:
        wall, others = (now - begin for now, begin in zip(self._now(), self.begin, strict=True))
        return round(max(0.0, others / max(wall, 1e-9)), 2)


def describe(device: str = "cpu") -> dict:
    return {
        "device": device,
        "cpu": cpu_model(),
        "cpus": len(os.sched_getaffinity(0)),
        "gpu": gpu() if device == "cuda" else None,
        "threads": torch.get_num_threads(),
        "isa": runtime.available_isas()[-1],
        "forced_isa": os.environ.get("LSTM_FUSED_ISA"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "versions": versions(),
        "build": runtime.build_info(),
        "revision": revision(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def title(machine: dict) -> str:
    """The machine in a few words."""
    if machine.get("gpu"):
        return machine["gpu"]["name"]
    threads = machine["threads"]
    return f"{machine['cpu']}, {threads} thread{'s' if threads > 1 else ''}"


def slug(machine: dict) -> str:
    """A file name for the results of a machine."""
    name = machine["gpu"]["name"] if machine.get("gpu") else machine["cpu"]
    words = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if machine.get("gpu"):
        return words
    forced = machine.get("forced_isa")
    return f"{words}-{machine['threads']}t" + (f"-{forced}" if forced else "")
