"""What a measurement depends on: the machine, its software, and conditions that are set for it."""

import contextlib
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import torch

from lstm_fused import runtime

ROOT = Path(__file__).resolve().parent.parent
PEERS = ("onnxruntime", "onnx", "numpy", "haste_pytorch", "flashrnn", "triton")

# What holds each library to an instruction set: read when the library is loaded.
ISA_LIMITS = {
    "avx2": {
        "LSTM_FUSED_ISA": "avx2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
}
MARCH = {"avx2": "x86-64-v3"}  # the compiler's name of it
ISA_VARIABLE = "LSTM_FUSED_BENCH_ISA"

# glibc's malloc asks the system for large blocks anew each time, until a larger one has been freed:
# from then on it keeps such blocks. These keep all that is freed, and return all at once.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 40), "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
RETURN_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


def isa() -> str | None:
    """The instruction set that every library is held to, None for this machine's own."""
    return os.environ.get(ISA_VARIABLE)


def march() -> str:
    return MARCH.get(isa(), "native")


def restart_with(name: str, arguments: list[str]) -> int:
    """Runs `python -m bench` anew where every library is held to the instruction set."""
    variables = os.environ | ISA_LIMITS[name] | {ISA_VARIABLE: name}
    variables["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run([sys.executable, "-m", "bench", *arguments], env=variables).returncode


@contextlib.contextmanager
def busy_processes(count: int):
    """So many processes that do nothing but use a processor, while the context lasts."""
    busy = [sys.executable, "-c", "while True: pass"]
    started = [subprocess.Popen(busy) for _ in range(count)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def background_cpu_seconds() -> float:
    """CPU seconds the machine spent so far on anything but this process and the children it has
    waited for; 0 where that is not known."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(
        int, stat.read_text().split("\n", 1)[0].split()[1:9]
    )
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return busy - sum(os.times()[:4])


def cpu_model() -> str:
    """The processor's name, with the family and model where the name alone says little."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    fields = dict(re.findall(r"^([^\t:]+)\s*: (.*)$", text, re.MULTILINE))
    name = fields.get("model name", platform.processor() or platform.machine())
    if "cpu family" in fields:
        name += f" (family {fields['cpu family']} model {fields.get('model', '?')})"
    return name


def output_of(*command: str) -> str:
    """What a command prints, "unknown" where it is missing or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def gpu() -> dict:
    """The current CUDA device, its driver and libraries."""
    p = torch.cuda.get_device_properties(0)
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    hardware = {"name": p.name, "capability": f"{p.major}.{p.minor}", "memory": p.total_memory}
    versions = {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    driver = output_of(*query).split("\n")[0]
    return hardware | {"multiprocessors": p.multi_processor_count, "driver": driver} | versions


def describe(device: str = "cpu") -> dict:
    """Where and with what a measurement is made."""
    installed = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    revision = ("git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
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
        "versions": {name: installed[name] for name in PEERS if name in installed},
        "build": runtime.build_info(),
        "revision": output_of(*revision),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def title(machine: dict) -> str:
    """The machine in a few words; machine: what describe() gave."""
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
