"""Builds the two extension modules. Needs torch, ninja and pybind11 installed beforehand:

    pip install --no-build-isolation .

`lstm_fused._C`     operators and CPU kernels, on torch's stable ABI (any torch >= 2.10 loads it)
`lstm_fused._plan`  plans and build information, on pybind11 alone
`lstm_fused._C_cuda` operators and CUDA kernels, on the stable ABI too, where nvcc is found; also
                    beside a torch without CUDA. TORCH_CUDA_ARCH_LIST chooses the architectures.
                    LSTM_FUSED_CUDA=0 leaves it out, LSTM_FUSED_CUDA=1 fails without nvcc.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup

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


def find_nvcc():
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return next(
        filter(
            None,
            map(
                shutil.which,
                [*([f"{home}/bin/nvcc"] if home else []), "nvcc", "/usr/local/cuda/bin/nvcc"],
            ),
        ),
        None,
    )


def nvcc_to_use(wanted, found):
    """The nvcc to build CUDA kernels with, or None; wanted: the value of LSTM_FUSED_CUDA."""
    if wanted not in ("", "0", "1"):
        fail(f"LSTM_FUSED_CUDA is {wanted!r} but must be 0, 1 or not set.")
    if wanted == "1" and found is None:
        fail(
            "LSTM_FUSED_CUDA is 1 but there is no nvcc. Install the CUDA toolkit or set CUDA_HOME."
        )
    return None if wanted == "0" else found


NVCC = nvcc_to_use(os.environ.get("LSTM_FUSED_CUDA", ""), find_nvcc())

COMMON = [
    "-std=c++20",
    "-O3",
    "-fvisibility=hidden",
    "-Wall",
    "-g0",  # setuptools asks for debugging information: five times the object files
    "-Wno-psabi",
    f"-ffile-prefix-map={ROOT.resolve()}/=",  # torch's list of operators names csrc/
]
# The kernels rely on no trap and no errno, and on a * b + c becoming one instruction; not on any
# option that would change NaN, infinity or rounding.
# -Wno-maybe-uninitialized: of the headers that g++ 12 itself brings.
KERNEL = [
    "-Wno-maybe-uninitialized",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-fopenmp",
]


# The cells' constexpr functions are called from
# kernels.
CUDA = [
    "-std=c++20",
    "-O3",
    "--expt-relaxed-constexpr",
    "-DUSE_CUDA",  # torch's shims for streams
    f"-DTORCH_TARGET_VERSION={STABLE_ABI}",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
]
ARCHITECTURES = ROOT / "csrc" / "cuda" / "architectures.h"  # a row for each
CUDA_ARCHS = ";".join(re.findall(r'^    {"([^"]+)"', ARCHITECTURES.read_text(), re.MULTILINE))


def gencode(archs):
    """nvcc's options for a list as TORCH_CUDA_ARCH_LIST has it, such as "8.0;9.0a;12.0+PTX"."""
    options = []
    for arch in archs.replace(" ", ";").split(";"):
        found = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", arch)
        if arch and not found:
            fail(f"TORCH_CUDA_ARCH_LIST holds {arch!r}, which is not like 9.0, 9.0a or 12.0+PTX.")
        if found:
            number = found[1] + found[2]
            options.append(f"-gencode=arch=compute_{number},code=sm_{number}")
            if found[3]:
                options.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return options


def sources(*folders, suffix="cpp"):
    return sorted(
        str(p.relative_to(ROOT)) for f in folders for p in (ROOT / "csrc" / f).glob(f"*.{suffix}")
    )


def extensions():
    operators = CppExtension(
        "lstm_fused._C",
        sources("cpu", "torch"),  # the files of an ISA first: they compile longest
        extra_compile_args=[*COMMON, *KERNEL, f"-DTORCH_TARGET_VERSION={STABLE_ABI}"],
        extra_link_args=["-fopenmp"],
        py_limited_api=False,
    )
    # Neither libtorch_python nor libc10 is used: the stable ABI lies in libtorch.
    operators.libraries = ["torch", "torch_cpu"]
    plan = CppExtension(
        "lstm_fused._plan",
        [
            *sources("plan_module"),
            *(f"csrc/cpu/{name}.cpp" for name in ("plan", "cost", "topology", "load")),
            "csrc/cuda/plan.cpp",
        ],
        extra_compile_args=[
            *COMMON,
            f'-DLSTM_FUSED_VERSION="{VERSION}"',
            f'-DLSTM_FUSED_BUILT_WITH_TORCH="{torch.__version__}"',
            f"-DLSTM_FUSED_CUDA={int(NVCC is not None)}",
        ],
    )
    plan.include_dirs = [pybind11.get_include()]
    plan.libraries = []
    # Compiled by Build below: setuptools knows no nvcc, and torch's own rules want a CUDA torch.
    return [operators, plan, *([Extension("lstm_fused._C_cuda", sources=[])] if NVCC else [])]


NINJA = """\
rule compile
  command = {nvcc} {flags} -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = {nvcc} -shared -cudart static $in -o $out {libraries}
"""


def build_cuda(folder, target):
    """Compile csrc/cuda into the library `target`, with what is to be kept between builds in
    `folder`."""
    folder, target = Path(folder).resolve(), Path(target).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    torch_folder = Path(torch.__file__).parent
    archs = os.environ.get("TORCH_CUDA_ARCH_LIST") or CUDA_ARCHS
    includes = [
        torch_folder / "include",
        torch_folder / "include/torch/csrc/api/include",
        sysconfig.get_path("include"),
    ]
    libraries = ["-Xlinker", "--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]
    rules = NINJA.format(
        nvcc=shlex.quote(NVCC),
        flags=shlex.join([*CUDA, *gencode(archs), *(f"-I{path}" for path in includes)]),
        libraries=shlex.join([f"-L{torch_folder / 'lib'}", *libraries]),
    )
    objects = []
    for source in map(
        ROOT.resolve().joinpath, (*sources("cuda", "torch", suffix="cu"), "csrc/cuda/plan.cpp")
    ):
        objects.append(f"{source.stem}.o")
        rules += f"build {source.stem}.o: compile {escaped(source)}\n"
    rules += f"build {escaped(target)}: link {' '.join(objects)}\n"
    (folder / "build.ninja").write_text(rules)
    jobs = os.environ.get("MAX_JOBS")
    subprocess.run(["ninja", "-C", str(folder), *(["-j", jobs] if jobs else [])], check=True)


def escaped(path):
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class Build(BuildExtension):
    """ninja for compiling in parallel; says what is left out."""

    def finalize_options(self):
        super().finalize_options()
        if self.inplace:  # set for an editable install too: object files are kept for the next one
            self.build_temp = str(ROOT / "build" / "temp")

    def build_extensions(self):
        if NVCC is None:
            print("lstm_fused: without nvcc or with LSTM_FUSED_CUDA=0, building the CPU part only")
        super().build_extensions()

    def build_extension(self, ext):
        if ext.name != "lstm_fused._C_cuda":
            return super().build_extension(ext)
        build_cuda(Path(self.build_temp) / "cuda", self.get_ext_fullpath(ext.name))


setup(version=VERSION, ext_modules=extensions(), cmdclass={"build_ext": Build})
