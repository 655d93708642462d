"""Compiles a described cell into libraries, one for each ISA, and loads them; see compile_cell.

Libraries are kept under torch's folder for extensions (TORCH_EXTENSIONS_DIR), by the content of all
that goes into them, the compiler's version included.
"""

import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from lstm_fused import runtime, traces

# As setup.py compiles the kernels: a * b + c becomes one instruction.
_ARITHMETIC = ("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")
_FLAGS = ("-std=c++20", "-O3", "-Wno-psabi", *_ARITHMETIC, "-fPIC", "-shared")
_INCLUDE = re.compile(r'\s*#\s*include\s*"([^"]+)"')
_LINE = re.compile(r'^#line \d+ "(.*)"$', re.M)
_STRUCT = re.compile(r"\bstruct\s+(\w+)\s*(?:final\s*)?:\s*(?:public\s+)?(?:\w+::)*DescribedCell\b")
_HEADERS = ("compiler.h", "params.h", "cells/*.h", "cpu/activations.h", "cpu/simd*.h")
_ERROR_LINES = 30


@dataclass(frozen=True)
class Library:
    """A compiled cell: its struct, a name made of that and of its content, its trace, and for each
    ISA the addresses of its UnitFunctions (csrc/cells/unit.h) in float and in double."""

    struct: str
    name: str
    trace: traces.Trace
    functions: dict[str, tuple[int, int]]
    handles: tuple[ctypes.CDLL, ...]  # what keeps the functions loaded


def headers() -> Path:
    """The folder of the headers that a cell is compiled against, csrc of the sources."""
    here = Path(__file__).parent
    for folder in (here / "csrc", here.parent / "csrc"):
        if (folder / "cells" / "library.h").exists():
            return folder
    raise RuntimeError(f"the headers for compile_cell are missing in {here / 'csrc'}")


def struct_of(text: str, struct: str | None) -> str:
    """The name of the cell's struct: the one that derives from DescribedCell."""
    found = _STRUCT.findall(text)
    if not found:
        raise ValueError("the source has no struct that derives from DescribedCell")
    if struct is None and len(found) > 1:
        cells = ", ".join(found)
        raise ValueError(f"the source has several cells, {cells}: name one by struct=")
    if struct is not None and struct not in found:
        raise ValueError(f"the source has no {struct} but {', '.join(found)}")
    return struct or str(found[0])


def compiler() -> tuple[list[str], str]:
    """The command of the C++ compiler and what it says of its version."""
    command = shlex.split(os.environ.get("CXX") or "c++")
    if shutil.which(command[0]) is None:
        raise RuntimeError(
            f"compile_cell needs a C++ compiler and there is no {command[0]}: install g++ 11 or "
            "newer, or set CXX"
        )
    return command, _version(tuple(command))


@functools.cache
def _version(command: tuple[str, ...]) -> str:
    return subprocess.run([*command, "--version"], capture_output=True, text=True).stdout


def read(path: Path) -> str:
    """The text of a header with what it includes from beside it, each line with its place."""
    return _with_includes(path, set())


def _with_includes(path, seen):
    seen.add(path)
    lines = [f'#line 1 "{path}"']
    for number, line in enumerate(path.read_text().splitlines(), 1):
        found = _INCLUDE.match(line)
        other = (path.parent / found[1]).absolute() if found else None
        ours = found and (headers() / "cells" / found[1]).exists()
        if other is None or ours or not other.is_file():
            lines.append(line)
        elif other not in seen:
            lines += [_with_includes(other, seen), f'#line {number + 1} "{path}"']
        else:
            lines.append("")
    return "\n".join(lines)


def compile_and_load(source: str, struct: str) -> Library:
    """The library of the cell `struct` in `source`, which may be what `read` gives."""
    command, version = compiler()
    flags = [*_FLAGS]
    if (platform.system(), platform.machine()) == ("Linux", "aarch64"):
        flags += [] if "clang" in version else ["-msve-vector-bits=256"]
    files = {isa: _source_for(isa, struct) for isa in _isas()}
    content = [_LINE.sub("", source), *flags, *command, version, *files.values()]
    content += [path.read_text() for part in _HEADERS for path in sorted(headers().glob(part))]
    digest = hashlib.sha256("\0".join(content).encode()).hexdigest()[:16]
    name = f"{struct}_{digest}"
    place = _cache() / name
    place.mkdir(parents=True, exist_ok=True)
    with open(place / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        missing = {k: v for k, v in files.items() if not (place / f"{k}.so").exists()}
        if missing:
            (place / "cell.h").write_text(source)
            includes = [f"-I{path}" for path in (place, headers(), headers() / "cells")]
            if said := _compile(missing, place, [*command, *flags, *includes]):
                own = {"cell.h", *_LINE.findall(source)}
                what = f"{struct} does not compile with {command[0]}:\n"
                raise RuntimeError(what + _errors(said.replace(f"{place}{os.sep}", ""), own))
    return _load(struct, name, {isa: place / f"{isa}.so" for isa in files})


def _cache() -> Path:
    if root := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(root) / "lstm_fused"
    user = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(user) / "torch_extensions" / "lstm_fused"


def _isas() -> list[str]:
    """Those of this machine with code for all products."""
    return [isa for isa in runtime.available_isas() if not isa.endswith(("_vnni", "_bf16"))]


def _source_for(isa: str, struct: str) -> str:
    """csrc/cpu's file of the ISA with the cell in place of the kernels."""
    text = (headers() / "cpu" / f"isa_{isa}.cpp").read_text().replace('"../', '"')
    cell = (
        '#include "cpu/activations.h"\n\n#include "cells/described.h"\n'
        "using namespace lstm_fused;  // as the cells of csrc/cells are\n"
        f'#include "cell.h"\n#define LSTM_FUSED_USER_CELL ::{struct}\n'
        '#include "cells/library.h"\n'
    )
    kernels = re.compile(r'^#include "instantiate.h"\n.*^}\n', re.S | re.M)
    return kernels.sub(lambda _: cell, text)


def _compile(files: dict[str, str], place: Path, command: list[str]) -> str | None:
    """Compile each ISA's file into place/<isa>.so, all at a time; or what the compiler says."""
    running = {}
    for isa, text in files.items():
        source = place / f"{isa}.cpp"
        source.write_text(text)
        output = [str(source), "-o", str(place / f"{isa}.part")]
        running[isa] = subprocess.Popen(
            [*command, *output], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    said = {isa: process.communicate()[0] for isa, process in running.items()}
    for isa, process in running.items():
        if process.returncode:
            return said[isa] or f"error: it ended with status {process.returncode}"
    for isa in files:  # a library is there in full or not at all
        os.replace(place / f"{isa}.part", place / f"{isa}.so")
    return None


def _errors(said: str, own: set[str]) -> str:
    """What the compiler says of the cell's own lines, and what a static_assert says; if that is
    nothing, all it says from its first error on. own: what it calls the cell's files."""
    blocks = re.split(r"^(?=\S+:\d+:\d+: (?:fatal )?(?:error|note|warning): )", said, flags=re.M)
    found = []
    for block in blocks:
        head, *shown = block.splitlines() or [""]
        if failed := re.search(r"static.assert.*?(the cell[^\"]*)", head):
            found.append(failed[1])
        elif head.partition(":")[0] in own and re.search(r": (fatal )?(error|note): ", head):
            found += [head, *(line for line in shown if re.match(r" (?!\s*from )", line))]
    if not any("error: " in line or line.startswith("the cell") for line in found):
        # It complains of a header that uses the cell, and names the cell's line in a note.
        cause = re.search(r"(?:error|note): (.*non-.?constexpr.*)", said)
        found = (
            [f"error: {cause[1]}", *found] if cause else said[said.find("error:") :].splitlines()
        )
    return "\n".join(found[:_ERROR_LINES])


def _load(struct: str, name: str, paths: dict[str, Path]) -> Library:
    handles = {isa: ctypes.CDLL(str(path)) for isa, path in paths.items()}
    functions = {}
    for isa, handle in handles.items():
        addresses = (ctypes.c_uint64 * 2)()
        handle.lstm_fused_cell_functions(addresses)
        functions[isa] = addresses[0], addresses[1]
    for isa in runtime.available_isas():
        if isa.endswith("_bf16"):  # vectors of the same length
            functions[isa] = functions[isa.removesuffix("_bf16")]
    trace = traces.read(next(iter(handles.values())))
    return Library(struct, name, trace, functions, tuple(handles.values()))
