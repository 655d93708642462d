"""`make gpu-check`: every check that needs a CUDA device, each in a process with a time limit.

    python tests/cuda/gpu_check.py [--out FOLDER] [PART ...]

Parts, in this order: build, smoke, kernels, parity, sanitizer, plans, bench. FOLDER (default
build/gpu-check) receives log.txt and results.json, and bench.json, which is what `python -m bench
report` reads. Without a CUDA device the emulation runs instead. Exits 1 if a part failed. After a
fault of a kernel, such as an access outside of memory, the process can use the device no more: its
part ends there, and the parts after it are left out. Wrong numbers end nothing. Needs torch, ninja,
pybind11 and pytest; no network. Tests that need more are skipped without it.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
PYTHON = sys.executable
ARCHITECTURES = ROOT / "csrc" / "cuda" / "architectures.h"  # what nvcc calls them
LIMITS = {  # seconds, half an hour in all: a kernel that hangs must not take the others' time
    "build": 180,
    "smoke": 120,
    "kernels": 220,
    "parity": 360,
    "sanitizer": 200,
    "plans": 180,
    "bench": 530,  # of which the benchmark's rows take up to 420
}

FAULT = 42  # the exit code of a part that a kernel's fault ended
FAULTED = "a kernel faulted"


def test_files(folder, *names):
    return [f"tests/{folder}/test_{name}.py" for name in names]


KERNELS = test_files("cuda", "cuda")
PARITY = (  # one process per group: a CUDA error persists until its process ends
    test_files("kernels", "layer_parity"),
    test_files("modules", "module", "module_inputs", "module_interop"),
    test_files("modules", "resets", "cell_states", "documents", "checkpointing"),
    test_files("modules", "cells", "gradient_flow", "quantization")
    + test_files("transforms", "autograd", "autocast"),
    test_files("modules", "errors", "replace", "torch_suite") + test_files("transforms", "compile"),
)


def has(module):
    return importlib.util.find_spec(module) is not None


def commands(part, out):
    """The commands of a part; none if a tool it needs is missing."""
    check = [PYTHON, "tests/cuda/gpu_check.py"]
    if part == "build":
        return [[PYTHON, "setup.py", "build_ext", "--inplace"]]
    if part == "smoke":
        return [[*check, "--inside", "smoke"]]
    pytest = [PYTHON, "-m", "pytest", "-m", "cuda", "--maxfail=20", "-o", "faulthandler_timeout=60"]
    if part == "kernels":
        return [[*pytest, "-vv", *KERNELS]]  # prints each name, to identify a test that hangs
    if part == "parity":
        parallel = ["-n", "8"] if has("xdist") else []
        return [[*pytest, *parallel, *files] for files in PARITY]
    if part == "sanitizer":
        name = "compute-sanitizer"
        tool = shutil.which(name) or shutil.which(f"/usr/local/cuda/bin/{name}")
        # Each allocation by itself, so that an access beyond one is an error.
        run = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", tool, "--error-exitcode", "9"]
        inside = [*check, "--inside", "tiny"]
        kinds = (["memcheck", "--report-api-errors", "no"], ["racecheck"])
        return [[*run, "--tool", *kind, *inside] for kind in kinds if tool]
    if part == "plans":
        options = {"roofline": ["--roofline", "--device", "cuda"], "plans": ["--set", "plans"]}
        bench = [PYTHON, "-m", "bench"]
        return [[*bench, *o, "--json", str(out / f"{name}.json")] for name, o in options.items()]
    return [[PYTHON, "-m", "bench", "--set", "gpu", "--json", str(out / "bench.json")]]


def run_part(part, out, log, environment):
    """Run the part; returns a description of how it ended, and the seconds it took."""
    started = time.monotonic()
    words = "passed"
    found = commands(part, out)
    for command in found:
        line = f"== {part}: {' '.join(map(str, command))}"
        print(line, flush=True)
        log.write(line + "\n")
        left = LIMITS[part] - (time.monotonic() - started)
        signal = "INT" if "pytest" in command else "TERM"  # pytest then reports the failures so far
        process = subprocess.Popen(
            ["timeout", "-s", signal, "-k", "10", str(max(1, int(left))), *map(str, command)],
            cwd=ROOT,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for text in process.stdout:
            log.write(text)
            log.flush()
            print(text, end="", flush=True)
        if code := process.wait():
            words = "ran out of time" if code in (124, 137) else f"failed, exit code {code}"
        if code == FAULT:
            words = FAULTED
            break
    return (words if found else "left out: what it needs is not here"), time.monotonic() - started


def sticky_fault():
    """What CUDA says since a kernel has faulted, which it says of every call in this process from
    then on; or None."""
    try:
        torch.cuda.synchronize()
        torch.ones(1, device="cuda").add(1).item()
    except torch.OutOfMemoryError:
        return None
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    return None


def judge(runs, fault=sticky_fault):
    """Run each of (name, function), a line of output each. Returns 0, 1 if one fails, or FAULT,
    which ends it."""
    code = 0
    for name, run in runs:
        try:
            print(f"ok     {name}: {run()}", flush=True)
        except Exception as error:
            code = 1
            print(f"WRONG  {name}: {type(error).__name__}: {error}", flush=True)
            if said := fault():
                print(f"FAULT  {name}: {said}", flush=True)
                return FAULT
    return code


def smoke():
    """Each plan and dtype on one small problem."""
    from dataclasses import replace

    from lstm_fused import cuda
    from tests.helpers.cuda_cases import DESCRIBED, SMALL, cases
    from tests.helpers.oracle import check

    torch.backends.cudnn.allow_tf32 = False

    def run(kind, problem):
        cuda.set_plan(kind)
        return check(replace(problem, device="cuda")).forward_run

    return judge((f"{k} {p}", partial(run, k, p)) for k, p in cases(SMALL[:2], own=DESCRIBED))


def tiny():
    """Very small problems for the sanitizer, which slows kernels down a hundredfold."""
    import lstm_fused
    from lstm_fused import cuda

    for kind in cuda.KINDS:
        cuda.set_plan(kind)
        for dtype in (torch.float32, torch.bfloat16):
            module = lstm_fused.LSTM(6, 40, bidirectional=True, device="cuda", dtype=dtype)
            x = torch.randn(4, 19, 6, device="cuda", dtype=dtype, requires_grad=True)
            resets = torch.rand(4, 19, device="cuda") < 0.3
            reset_state = tuple(torch.randn(2, 2, 40, device="cuda", dtype=dtype))
            more = {"resets": resets, "reset_state": reset_state, "return_cell_states": True}
            y, states, cells = module(x, **more)
            (y.sum() + states[0].sum() + states[1].sum() + cells.sum()).backward()
            torch.cuda.synchronize()
            print(kind, dtype, cuda.last_run(), flush=True)
    for name in ("LayerNormLSTM", "SLSTM", "SRU"):  # a CTA for each row, products, one launch
        module = getattr(lstm_fused, name)(6, 40, bidirectional=True, device="cuda")
        x = torch.randn(4, 19, 6, device="cuda", requires_grad=True)
        module(x, resets=torch.rand(4, 19, device="cuda") < 0.3)[0].sum().backward()
        torch.cuda.synchronize()
        print(name, cuda.last_run(), flush=True)
    return 0


def emulation():
    print("no CUDA device here: the emulation runs instead")
    tests = test_files("cuda", "cuda_plan", "cuda_build", "cuda_emulation")
    return subprocess.run([PYTHON, "-m", "pytest", *tests], cwd=ROOT).returncode


def device():
    major, minor = torch.cuda.get_device_capability()
    properties = torch.cuda.get_device_properties(0)
    target = re.search(rf'"({major}\.{minor}[af]?)', ARCHITECTURES.read_text())
    return {
        "name": properties.name,
        "capability": target[1] if target else f"{major}.{minor}",
        "sms": properties.multi_processor_count,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(LIMITS))
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-check")
    parser.add_argument("--inside", choices=("smoke", "tiny"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        sys.path.insert(0, str(ROOT))
        os.environ.setdefault("LSTM_FUSED_POISON", "1")
        return {"smoke": smoke, "tiny": tiny}[args.inside]()
    if unknown := set(args.parts) - set(LIMITS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    if not torch.cuda.is_available():
        return emulation()
    args.out = args.out.resolve()  # parts run in the repository's root
    args.out.mkdir(parents=True, exist_ok=True)
    found = device()
    environment = dict(os.environ, PYTHONUNBUFFERED="1")
    environment.setdefault("TORCH_CUDA_ARCH_LIST", found["capability"])
    result = {"device": found, "parts": {}}
    with (args.out / "log.txt").open("w") as log:
        log.write(f"{found}\n")
        for part in args.parts or LIMITS:
            words, seconds = run_part(part, args.out, log, environment)
            result["parts"][part] = {"result": words, "seconds": round(seconds, 1)}
            for name in ("roofline", "plans"):
                written = args.out / f"{name}.json"
                if part == "plans" and written.exists():
                    result[name] = json.loads(written.read_text())
            (args.out / "results.json").write_text(json.dumps(result, indent=1) + "\n")
            if words == FAULTED:
                break
    for part, ended in result["parts"].items():
        print(f"{part}: {ended['result']}, {ended['seconds']} s")
    print(f"written to {args.out}/log.txt and results.json")
    good = ("passed", "left out: what it needs is not here")
    return 0 if all(p["result"] in good for p in result["parts"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
