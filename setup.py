"""Builds the two extension modules. Needs torch, ninja and pybind11 installed beforehand:

    pip install --no-build-isolation .

`lstm_fused._C`     operators and CPU kernels, on torch's stable ABI (any torch >= 2.10 loads it)
`lstm_fused._plan`  plans and build information, on pybind11 alone
`lstm_fused._C_cuda` will be built here too, where nvcc is found; the CPU part never depends on it.
"""

import os
import platform
import re
import shutil
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "lstm_fused" / "__init__.py").read_text())[1]
STABLE_ABI = "0x020a000000000000"


def fail(message):
    sys.exit(f"lstm_fused cannot be built: {message}")


try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError:
    fail("torch is not installed. `pip install torch`, then `pip install --no-build-isolation .`")
try:
    import pybind11
except ImportError:
    fail("pybind11 is not installed. `pip install pybind11 ninja`, then try again.")
if platform.system() != "Linux":
    fail(f"only Linux is supported so far, not {platform.system()}.")
if shutil.which(os.environ.get("CXX", "g++").split()[0]) is None:
    fail("no C++ compiler. Install g++ 11 or newer (or set CXX).")

COMMON = [
    "-std=c++20",
    "-O3",
    "-fvisibility=hidden",
    "-Wall",
    "-g0",  # setuptools asks for debugging information: five times the object files
    "-Wno-psabi",
    f"-ffile-prefix-map={ROOT.resolve()}/=",  # messages name csrc/, not our folders
]
# The kernels rely on no trap and no errno, and on a * b + c becoming one instruction; not on any
# option that would change NaN, infinity or rounding.
KERNEL = ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fopenmp"]


def extensions():
    kernels = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / "cpu").glob("*.cpp"))
    operators = CppExtension(
        "lstm_fused._C",
        ["csrc/module.cpp", "csrc/ops.cpp", "csrc/launch.cpp", "csrc/call.cpp", *kernels],
        extra_compile_args=[*COMMON, *KERNEL, f"-DTORCH_TARGET_VERSION={STABLE_ABI}"],
        extra_link_args=["-fopenmp"],
        py_limited_api=False,
    )
    # Neither libtorch_python nor libc10 is used: the stable ABI lies in libtorch.
    operators.libraries = ["torch", "torch_cpu"]
    plan = CppExtension(
        "lstm_fused._plan",
        ["csrc/plan_module.cpp", "csrc/cpu/plan.cpp"],
        extra_compile_args=[
            *COMMON,
            f'-DLSTM_FUSED_VERSION="{VERSION}"',
            f'-DLSTM_FUSED_BUILT_WITH_TORCH="{torch.__version__}"',
            "-DLSTM_FUSED_CUDA=0",
        ],
    )
    plan.include_dirs = [pybind11.get_include()]
    plan.libraries = []
    return [operators, plan]


class Build(BuildExtension):
    """ninja for compiling in parallel; says what is left out."""

    def build_extensions(self):
        if shutil.which("nvcc") is None:
            print("lstm_fused: nvcc not found, building the CPU part only")
        super().build_extensions()


setup(version=VERSION, ext_modules=extensions(), cmdclass={"build_ext": Build})
