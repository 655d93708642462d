"""Builds the CUDA kernels for the host (tests/cuda/emulation) and makes the operators call them."""

import ctypes
import fcntl
import subprocess
import sysconfig
import warnings
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import pytest
import torch

from lstm_fused import _C, cuda, inference, runtime

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "emulation"


def ninja(*targets):
    """Build what build.ninja names, for one process at a time; run in tests/cuda/emulation."""
    torch_folder = Path(torch.__file__).parent
    includes = (torch_folder / "include", torch_folder / "include/torch/csrc/api/include")
    FOLDER.mkdir(parents=True, exist_ok=True)
    text = (
        f"torch = -DTORCH_TARGET_VERSION=0x020a000000000000 -I{includes[0]} -I{includes[1]} "
        f"-I{sysconfig.get_path('include')}\n"
        f"torch_link = -Wl,--no-as-needed -L{torch_folder / 'lib'} -ltorch -ltorch_cpu -lc10\n"
    )
    names = sorted(path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu"))
    objects = "".join(f"build $builddir/{n}.o: kernel $csrc/{n}.cu\n" for n in names)
    others = ("operators", "plan", "fibers", "operations", "accesses", "memory", "tensors")
    inputs = " ".join(f"$builddir/{n}.o" for n in (*names, *others))
    objects += f"build $builddir/emulation.so: library {inputs}\n"
    with (FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for name, content in (("torch.ninja", text), ("kernels.ninja", objects)):
            settings = FOLDER / name
            if not settings.exists() or settings.read_text() != content:
                settings.write_text(content)
        command = ["ninja", "-C", str(ROOT / "tests" / "cuda" / "emulation"), *targets]
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@lru_cache
def library():
    ninja()
    torch.ops.load_library(FOLDER / "emulation.so")
    return torch.ops.lstm_fused_emulation


@contextmanager
def strict():
    """A context with guard pages around tensors, and the random order begun anew."""
    engine = ctypes.CDLL(FOLDER / "emulation.so")
    guard = engine.lstm_fused_emulation_guard
    guard.restype = ctypes.c_char_p
    engine.lstm_fused_emulation_restart()
    guard(True)
    yield
    damage = guard(False)
    assert damage is None, damage


@contextmanager
def kernels():
    """A context in which the operators on the CPU run the emulated CUDA kernels."""
    with pytest.MonkeyPatch.context() as patch:
        emulation = library()
        patch.setattr(cuda, "operators", emulation)
        patch.setattr(cuda, "index_of", lambda device: 0)
        patch.setattr(cuda, "serves", lambda x: True)
        patch.setattr(inference, "infer", lambda module, input, hx: None)
        patch.setattr(inference, "infer_step", lambda module, input, hx: None)
        for name in ("forward", "backward"):
            patch.setattr(_C, name, lambda *_: None)
        patch.setattr(runtime, "last_run", lambda device=None: cuda.last_run())
        cuda._read_device.cache_clear()
        registered = torch.library.Library("lstm_fused", "IMPL")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that kernels are overridden
            for name in ("recurrent_forward", "recurrent_backward"):
                run = getattr(emulation, name).default
                registered.impl(name, run, "CPU", allow_override=True)
        with strict():
            yield
        registered._destroy()
        cuda.set_plan(None)
    cuda._read_device.cache_clear()
