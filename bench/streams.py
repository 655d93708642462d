"""Runs of a prepared step (`lstm_fused.stream`), called from Python and from C."""

import ctypes
import functools
from pathlib import Path

import torch

import lstm_fused
from bench.compiled import compiled, compiler
from bench.runs import Case, ModuleRun, named

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ["-O2", "-std=c++17", "-fPIC", "-shared"]
int64, pointer = ctypes.c_int64, ctypes.c_void_p


class StreamRun(ModuleRun):
    """A step is `stream(x, out=y)`, x (N, I) and y (N, R); dtype: of quantized weights, or None."""

    def __init__(self, dtype, case: Case):
        super().__init__(case.fused(), case)
        module = lstm_fused.quantize_(self.module, dtype) if dtype else self.module
        work = case.workload
        threads = torch.get_num_threads()
        self.stream = lstm_fused.stream(module, batch=work.N, threads=threads)
        self.row, self.y = self.x[0].contiguous(), torch.empty(work.N, work.R)
        self.step = functools.partial(self.stream, self.row, out=self.y)

    def results(self):
        self.stream.state = self.case.state if len(self.case.state) > 1 else self.case.state[0]
        self.step()
        return named(self.y[None], self.stream.state)

    def kernels(self) -> list[dict]:
        return []


class CStep:
    """The stream's step as a C function; `repeat` and `stamps` call it in a loop in C."""

    def __init__(self, stream, x, y):
        address, handle = stream.c_step()
        self.library = ctypes.CDLL(str(compiled(SOURCE, [*compiler(), *FLAGS])))
        self.tensors = stream, x, y  # the addresses are theirs
        given = address, handle, x.data_ptr(), y.data_ptr()
        self.arguments = tuple(map(pointer, given))

    def __call__(self):
        self.repeat(1)

    def repeat(self, count: int) -> None:
        self._in_c(self.library.repeat_step, int64(count))

    def stamps(self, calls: int) -> torch.Tensor:
        """The clock in nanoseconds before the first call and after each, (calls + 1,)."""
        found = torch.zeros(calls + 1, dtype=torch.int64)
        self._in_c(self.library.time_step, int64(calls), pointer(found.data_ptr()))
        return found

    def _in_c(self, function, *more) -> None:
        function.restype = int64
        if failed := function(*self.arguments, *more):
            raise RuntimeError(f"{failed} steps in C computed nothing")


class CStreamRun(StreamRun):
    """A step is a call of the function that `stream.c_step()` gives, from C."""

    def __init__(self, dtype, case: Case):
        super().__init__(dtype, case)
        self.step = CStep(self.stream, self.row, self.y)


class Arithmetic:
    """Multiplications that take about so many seconds: what the machine itself delays, it delays
    too."""

    def __init__(self, seconds: float):
        self.library = ctypes.CDLL(str(compiled(SOURCE, [*compiler(), *FLAGS])))
        self.loops = trial = 100_000
        stamps = self.stamps(100)
        self.loops = max(1, round(trial * seconds / (stamps.diff().median().item() * 1e-9)))

    def stamps(self, calls: int) -> torch.Tensor:
        found = torch.zeros(calls + 1, dtype=torch.int64)
        self.library.time_arithmetic(int64(self.loops), int64(calls), pointer(found.data_ptr()))
        return found
