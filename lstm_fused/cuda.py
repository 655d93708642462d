"""Whether there are CUDA kernels, which plan a layer runs there, and what ran last.

Sizes: T steps, N rows, H hidden units, R recurrent width, D directions.
"""

import warnings
from functools import lru_cache
from pathlib import Path

import torch

from lstm_fused import _plan
from lstm_fused.observed import is_captured, is_transformed

_PLAN = Path(_plan.__file__)
_LIBRARY = _PLAN.with_name(_PLAN.name.replace("_plan", "_C_cuda"))  # by the same suffix
KINDS = _plan.cuda_kinds()  # of plans: csrc/cuda/plan.h
CHOICES = (*KINDS, "fused", "cudnn")  # what set_plan takes
_SAVED = _plan.saved_layouts()
# By number, csrc/cells/cells.h.
CELLS = {cell["id"]: {"name": name, **cell} for name, cell in _plan.cells().items()}
_BUILT_IN = frozenset(cell["name"] for cell in CELLS.values())

# To be taken out when docs/cuda.md's first line is.
_NEVER_RUN = (
    "lstm_fused's CUDA kernels have been checked in an emulation only, never on a GPU: run "
    "`make gpu-check` before you rely on them (docs/cuda.md)"
)

operators = torch.ops.lstm_fused  # tests put the emulation's here
_choice = ""  # of set_plan
_load_error = None


def available():
    """Whether the CUDA kernels were built, and this torch has CUDA to run them with."""
    return absence_reason() is None


def load():
    """Load the operators' CUDA implementation, where it is available.

    Where that fails, CUDA calls run through torch, and their warning says so.
    """
    global _load_error
    if available():
        try:
            torch.ops.load_library(_LIBRARY)
        except OSError as error:
            _load_error = str(error.__cause__ or error)


def built():
    """Whether the CUDA library is beside the other compiled modules."""
    return _LIBRARY.exists()


def absence_reason():
    """Why there are no CUDA kernels in this process, or None where there are."""
    if torch.version.cuda is None:
        return "torch has no CUDA"
    if not built():
        return "the CUDA kernels were not built"
    return _load_error and f"the CUDA kernels cannot be loaded: {_load_error}"


def serves(x):
    """Whether the CUDA kernels are those of x's device."""
    return x.device.type == "cuda"


def saved_layout(x):
    """The dimensions of "gates" and "saved_states" as x's device lays them out, by name."""
    return _SAVED["cuda" if serves(x) else "cpu"]


def unsupported_reason(device):
    """Why the kernels do not run on a CUDA device, or None where they do."""
    if reason := absence_reason():
        return reason
    properties, error = _read_device(index_of(device))
    if error:
        return f"the fused kernels cannot run on it: {error}"
    major, minor = properties[:2]
    if major < 8:
        return f"the fused kernels need compute capability 8.0 or later, not {major}.{minor}"
    say_never_run()
    return None


def has_cell(name):
    """Whether the kernels have a cell; those of compile_cell are compiled for the CPU."""
    return name in _BUILT_IN


def set_plan(kind=None):
    """Force a plan, one of CHOICES; None takes the best again. For tests and measurements.

    "fused" is the best of our plans, "cudnn" what torch.nn itself runs; both concern calls that may
    run either, see cudnn_reason. A layer that does not fit the forced plan runs the step plan, one
    of a described cell the gemm plan.
    """
    global _choice
    if kind not in (None, *CHOICES):
        raise ValueError(f"kind is {kind!r} but must be one of {', '.join(CHOICES)} or None")
    _choice = kind or ""
    if available() or operators is not torch.ops.lstm_fused:
        operators.cuda_force_plan(forced_kind())


def forced_kind():
    """That of KINDS which set_plan was given, "" for the best."""
    return _choice if _choice in KINDS else ""


def cudnn_reason(cell, x, sizes, directions, tensors):
    """Why a call on a CUDA device runs torch.nn's forward by plan, or None.

    It may where it has no option beyond torch.nn, records no gradient (cuDNN has no second
    derivatives, and none in evaluation mode) and nothing traces or transforms it. Of such calls
    those do for which our kernels are not predicted to be clearly ahead. cell: one of CELLS; x: of
    the input; sizes: (T, N, H, R); tensors: states and weights.
    """
    if _choice == "fused" or forced_kind() or not (x.is_cuda and torch.backends.cudnn.enabled):
        return None
    if cell["described"] or not _is_plain_inference((x, *tensors)):
        return None
    if _choice == "cudnn":
        return "set_plan has forced it"
    problem = _problem(cell, x.dtype, *sizes, directions)
    return _reason_of_sizes(*problem, device_properties(index_of(x.device)))


def _is_plain_inference(tensors):
    """Whether a call records no gradient, and nothing traces or transforms it."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return False
    return not (is_captured() or is_transformed() or torch.is_autocast_enabled("cuda"))


@lru_cache(maxsize=4096)
def _reason_of_sizes(*sizes):
    return _plan.cuda_cudnn_reason(*sizes)


def last_run():
    """What the newest forward or backward call ran, as a dict; empty before any."""
    return _plan.cuda_run_of(operators.cuda_last_run())


@lru_cache
def say_never_run():
    """A warning, the first time."""
    if torch.version.cuda is not None:
        warnings.warn(_NEVER_RUN, stacklevel=4)


def device_properties(index):
    """(major, minor, SMs, bytes of shared memory a block may have, CTAs of the largest cluster,
    clusters of that size that run at once)."""
    properties, error = _read_device(index)
    if error:
        raise RuntimeError(error)
    say_never_run()
    return properties


@lru_cache
def _read_device(index):
    """(its properties or None, why the kernels cannot run on it or None).

    They cannot under a driver older than their CUDA runtime, on an architecture that they were not
    built for, or beside a torch whose cuBLAS is older.
    """
    try:
        return tuple(operators.cuda_device_properties(index)), None
    except RuntimeError as error:
        return None, str(error).partition("\n")[0]


def index_of(device):
    return torch.cuda.current_device() if device.index is None else device.index


def tf32_allowed():
    """Torch's switch for TF32 in recurrent layers, that of nn.LSTM on cuDNN."""
    return torch.backends.cudnn.rnn.fp32_precision == "tf32"


@lru_cache(maxsize=4096)
def plan(
    dtype,
    T,
    N,
    H,
    R,
    D,
    gates,
    projection,
    tf32,
    device,
    backward,
    kind="",
    described=False,
    normalizes=False,
):
    """The plan of one layer's forward or backward pass, as a printable object.

    dtype: a torch.dtype's name; device: as device_properties gives it; kind: "" for the best;
    described, normalizes: of the cell.
    """
    sizes = (dtype, T, N, H, R, D, gates, projection, tf32, device, backward)
    cell = {"described": described, "normalizes": normalizes}
    every = "gemm" if described else "step"  # the plan that every such problem has
    return _plan.cuda_plan(*sizes, kind, **cell) or _plan.cuda_plan(*sizes, every, **cell)


def plan_on(device, cell, dtype, T, N, H, R, directions):
    """The forward plan of a layer on a CUDA device now; dtype: a torch.dtype or its name."""
    info = CELLS[cell]
    problem = _problem(info, dtype, T, N, H, R, directions)
    of_cell = info["described"], info["groups"] > 0
    return plan(*problem, device_properties(index_of(device)), False, forced_kind(), *of_cell)


def _problem(cell, dtype, T, N, H, R, directions):
    """The first arguments of `plan` for a layer now; cell: one of CELLS; dtype: as of plan_on."""
    name = str(dtype).removeprefix("torch.")
    tf32 = name == "float32" and tf32_allowed()
    return name, T, N, H, R, directions, cell["gates"], R != H, tf32
