"""`python -m lstm_fused`: what is installed, what the machine has, and which kernels would run."""

import os
import platform
import sys

import torch

import lstm_fused
from lstm_fused import _loaded, _plan, cuda, runtime

# Ours, and those of others that decide how many threads there are and how they wait.
VARIABLES = ("LSTM_FUSED_", "OMP_", "MKL_NUM_THREADS", "KMP_", "GOMP_")


def report() -> str:
    """Every fact on a line of its own, and the essential ones in a last line for a bug report.

    Raises RuntimeError where LSTM_FUSED_ISA names what is unknown or does not run here.
    """
    built, isa = runtime.build_info(), torch.ops.lstm_fused.active_isa()
    forced = " (LSTM_FUSED_ISA)" if os.environ.get("LSTM_FUSED_ISA") else ""
    threads = torch.get_num_threads()
    system = f"Python {platform.python_version()}, {platform.platform()}"
    version = f"{torch.__version__}, built with {built['torch']}"
    facts = {
        "lstm_fused": f"{built['version']} in {_loaded.FOLDER}",
        "torch": version,
        "compiler": built["compiler"],
        "system": system,
        "ISAs compiled": ", ".join(built["isas"]),
        "ISAs available": ", ".join(runtime.available_isas()),
        "ISA in use": isa + forced,
        "threads": f"{threads} (torch.get_num_threads)",
        "topology": _topology(),
        "CUDA": _cuda(),
        "environment": _environment(),
    }
    width = max(map(len, facts)) + 2
    lines = [f"{name:{width}}{text}" for name, text in facts.items()]
    essential = (
        f"lstm_fused {lstm_fused.__version__}, torch {version}, {system}, "
        f"ISA {isa}{forced} of {'/'.join(runtime.available_isas())}, {threads} threads, "
        f"{facts['topology']}, CUDA {facts['CUDA']}, environment: {facts['environment']}"
    )
    return "\n".join([*lines, "", "For a bug report:", essential])


def _topology():
    """The cores and caches that plans for several threads are made for."""
    _, *numbers = torch.ops.lstm_fused.machine(2)
    found = _plan.Topology(*numbers)
    if not found.cores:
        return "not used (LSTM_FUSED_FIXED_PLANS)"
    return (
        f"{found.cores} cores, {found.cache_cores} to a last-level cache, {found.socket_cores} to "
        f"a socket; L2 {found.l2 >> 10} KiB, L3 {found.l3 >> 10} KiB, {found.mhz} MHz"
    )


def _cuda():
    if not cuda.built():
        return "not built"
    if reason := cuda.absence_reason():
        return f"built, not loaded: {reason}"
    names = [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]
    gpus = ", ".join(names) or "none"
    return f"built and loaded; torch has CUDA {torch.version.cuda}, GPUs: {gpus}"


def _environment():
    found = [f"{name}={value}" for name, value in os.environ.items() if name.startswith(VARIABLES)]
    return " ".join(sorted(found)) or "no variable of ours or of OpenMP"


if __name__ == "__main__":
    try:
        print(report())
    except RuntimeError as error:
        sys.exit(f"lstm_fused: {' '.join(str(error).splitlines()[:1])}")
