"""Builds the extension modules. Needs torch, setuptools and ninja installed beforehand:

    pip install --no-build-isolation -v .

`lstm_fused._C`       operators and CPU kernels, on torch's stable ABI
`lstm_fused._plan`    plans and build information, without torch
`lstm_fused._C_cuda`  operators and CUDA kernels, where nvcc is found; also beside a torch without
                      CUDA

All are in CPython's limited API: one build serves Python 3.10 and later, and torch 2.10 and later.

Environment variables:
    LSTM_FUSED_CUDA       0 leaves the CUDA library out, 1 fails without nvcc
    CUDA_HOME             the CUDA toolkit to use, before an nvcc on the PATH
    TORCH_CUDA_ARCH_LIST  GPU architectures, such as "8.0;9.0a"; by default those of the GPUs that
                          are there, else SHORT_LIST
    MAX_JOBS              compilers at a time, by default as many as there are CPUs
    CXX                   the C++ compiler
"""

import importlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "lstm_fused" / "__init__.py").read_text())[1]
STABLE_ABI = "0x020a000000000000"  # torch 2.10
LIMITED_API = "0x030A0000"  # Python 3.10
SHORT_LIST = "8.0;9.0a"  # A100 and every other GPU of 8.x; H100, H200


def fail(message):
    sys.exit(f"lstm_fused cannot be built: {message}")


def require(package, oldest):
    """The package, which must be `oldest` or newer; ends the build with one line otherwise."""
    install = f"`pip install '{package}>={oldest}'`, then `pip install --no-build-isolation .`"
    try:
        found = importlib.import_module(package)
    except ImportError:
        fail(f"{package} is not installed. {install}")
    numbers = [int(number) for number in re.findall(r"\d+", found.__version__)[:2]]
    if numbers < [int(number) for number in oldest.split(".")]:
        fail(f"{package} {found.__version__} is too old. {install}")
    return found


setuptools = require("setuptools", "77")
torch = require("torch", "2.10")
from setuptools.command.build_py import build_py  # noqa: E402
from torch.utils.cpp_extension import BuildExtension, CppExtension  # noqa: E402


def require_tools():
    """Ends the build with one line for what is missing, before anything is compiled."""
    if platform.system() not in ("Linux", "Darwin"):
        fail(f"only Linux is supported, and macOS untried; not {platform.system()}.")
    if shutil.which("ninja") is None:
        fail("ninja is not installed. `pip install ninja`, then try again.")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        fail("Python.h is missing. Debian and Ubuntu: `apt install python3-dev`.")
    compiler = os.environ.get("CXX", "c++")
    found = shutil.which(shlex.split(compiler)[0])
    if found is None:
        fail(f"no C++ compiler {compiler}. Install g++ 11 or newer, or set CXX.")
    check = [*shlex.split(compiler), "-std=c++20", "-fsyntax-only", "-x", "c++", "-"]
    done = subprocess.run(check, input="#include <version>\n", capture_output=True, text=True)
    if done.returncode:
        fail(f"{compiler} does not compile C++20. Install g++ 11 or newer, or set CXX.")


def find_nvcc():
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:  # no other toolkit than the one asked for
        return shutil.which(f"{home}/bin/nvcc")
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


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


def version():
    """The version, for a build with CUDA kernels with a local part: 0.1.0+cu130. A source
    distribution has none."""
    if NVCC is None or {"sdist", "egg_info"} & set(sys.argv):
        return VERSION
    says = subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=True).stdout
    major, minor = re.search(r"release (\d+)\.(\d+)", says).groups()
    return f"{VERSION}+cu{major}{minor}"


# What a cell of a user is compiled against: cell_library.py.
CELL_HEADERS = (
    *("compiler.h", "params.h", "cells/*.h"),
    *("cpu/activations.h", "cpu/simd*.h", "cpu/isa_*.cpp"),
)

OPENMP = ["-fopenmp"] if platform.system() == "Linux" else []  # Apple's clang has none
# Without effect outside of csrc/cpu/isa_sve256*.cpp.
ON_ARM64_LINUX = (platform.system(), platform.machine()) == ("Linux", "aarch64")
SVE = ["-msve-vector-bits=256"] if ON_ARM64_LINUX else []
COMMON = [
    "-std=c++20",
    f"-DPy_LIMITED_API={LIMITED_API}",
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
    *OPENMP,
    *SVE,
]


# The cells' constexpr functions are called from kernels.
CUDA = [
    "-std=c++20",
    "-O3",
    "--expt-relaxed-constexpr",
    "-Xptxas=-v",  # registers and spills of each kernel, which test_no_spills reads
    "-DUSE_CUDA",  # torch's shims for streams
    f"-DTORCH_TARGET_VERSION={STABLE_ABI}",
    f"-DPy_LIMITED_API={LIMITED_API}",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
]


def known_architectures():
    """Every architecture that the kernels are written for: csrc/cuda/architectures.h."""
    table = (ROOT / "csrc" / "cuda" / "architectures.h").read_text()
    return re.findall(r'^    {"([^"]+)"', table, re.MULTILINE)


def architecture_of(capability):
    """The known architecture for a GPU of this compute capability ("8.6"), or None: code for an
    older GPU of the same major capability runs on it."""
    major, minor = map(int, capability.split("."))
    known = ((arch, *map(int, re.findall(r"\d+", arch))) for arch in known_architectures())
    fitting = [arch for arch, at, least in known if at == major and least <= minor]
    return fitting[-1] if fitting else None


def architectures():
    """The GPU architectures to compile for, as TORCH_CUDA_ARCH_LIST has them."""
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return os.environ["TORCH_CUDA_ARCH_LIST"]
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    says = ""
    if shutil.which("nvidia-smi"):
        says = subprocess.run(query, capture_output=True, text=True).stdout
    present = map(architecture_of, re.findall(r"^\d+\.\d+$", says, re.MULTILINE))
    return ";".join(sorted({arch for arch in present if arch})) or SHORT_LIST


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
        extra_link_args=OPENMP,
        py_limited_api=True,
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
        py_limited_api=True,
    )
    plan.include_dirs = plan.libraries = []
    # Compiled by Build below: setuptools knows no nvcc, and torch's own rules want a CUDA torch.
    cuda = setuptools.Extension("lstm_fused._C_cuda", sources=[], py_limited_api=True)
    return [operators, plan, *([cuda] if NVCC else [])]


NINJA = """\
rule compile
  command = {nvcc} {flags} -MD -MF $out.d -c $in -o $out 2> $out.log || {{ cat $out.log; exit 1; }}
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
    includes = [
        torch_folder / "include",
        torch_folder / "include/torch/csrc/api/include",
        sysconfig.get_path("include"),
    ]
    libraries = ["-Xlinker", "--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]
    rules = NINJA.format(
        nvcc=shlex.quote(NVCC),
        flags=shlex.join([*CUDA, *gencode(architectures()), *(f"-I{path}" for path in includes)]),
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
            # One that is named for a version of Python would be imported instead.
            for earlier in (ROOT / "lstm_fused").glob("_*.cpython-*"):
                earlier.unlink()

    def build_extensions(self):
        require_tools()
        say("compiling the CPU kernels: 3 to 7 minutes on two cores")
        if NVCC:
            say(f"then the CUDA kernels for {architectures()}: 1 to 4 minutes for each of them")
        else:
            say("no CUDA kernels: there is no nvcc, or LSTM_FUSED_CUDA=0")
        super().build_extensions()

    def build_extension(self, ext):
        if ext.name != "lstm_fused._C_cuda":
            return super().build_extension(ext)
        build_cuda(Path(self.build_temp) / "cuda", self.get_ext_fullpath(ext.name))


class BuildPython(build_py):
    """Puts the headers for lstm_fused.compile_cell into the package, as lstm_fused/csrc."""

    def _headers(self):
        """{file in the package: file here}; an editable install reads csrc itself."""
        if self.editable_mode:
            return {}
        csrc, to = ROOT / "csrc", Path(self.build_lib, "lstm_fused", "csrc")
        found = [path for part in CELL_HEADERS for path in sorted(csrc.glob(part))]
        return {str(to / path.relative_to(csrc)): str(path) for path in found}

    def run(self):
        super().run()
        for target, source in self._headers().items():
            self.mkpath(str(Path(target).parent))
            self.copy_file(source, target)

    def get_outputs(self, include_bytecode=True):
        return [*super().get_outputs(include_bytecode), *self._headers()]


def say(what):
    print(f"lstm_fused: {what}", flush=True)


if __name__ == "__main__":
    setuptools.setup(
        version=version(),
        ext_modules=extensions(),
        cmdclass={"build_ext": Build, "build_py": BuildPython},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
