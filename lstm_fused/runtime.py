"""Which kernels there are, which ones a call would run, and which ones the last call ran."""

from typing import Any

import torch

from lstm_fused import _plan, cuda, operators  # noqa: F401  loads the operators


def set_isa(name: str | None = None) -> None:
    """Force the instruction set kernels use, for every thread; None goes back to the best one.

    Raises RuntimeError for a name that is unknown or that this machine cannot run. The environment
    variable LSTM_FUSED_ISA does the same when the package is imported.
    """
    torch.ops.lstm_fused.force_isa(name or "")


def available_isas() -> tuple[str, ...]:
    """Names of the instruction sets this machine can run, slowest first."""
    compiled = _plan.build_info()["isas"]
    return tuple(compiled[k] for k in torch.ops.lstm_fused.available_isas())


def last_run(device: str = "cpu") -> dict[str, Any]:
    """What the newest forward or backward call ran, as a dict; empty before any.

    On the CPU that is this thread's; on "cuda" any thread's, as autograd has its own there.
    """
    if device == "cuda":
        return cuda.last_run()
    return _plan.run_of(torch.ops.lstm_fused.last_run())


def plan(
    cell: str,
    dtype: torch.dtype | str,
    T: int,
    N: int,
    I: int,  # noqa: E741
    H: int,
    R: int,
    directions: int,
    threads: int | None = None,
    training: bool = False,
    device: torch.device | None = None,
    backward: bool = False,
    weights: torch.dtype | None = None,
) -> _plan.Plan | Any:  # Any: CudaPlan, where device says so
    """The plan a forward call with these sizes would run now, or with backward the call of its
    backward pass, as a printable object. Its ``nanoseconds`` are what the call is predicted to take
    on the CPU.

    cell is as for ``layer``; dtype is a torch.dtype or its name; threads is
    torch.get_num_threads() unless given; device is a torch.device, the CPU unless given; weights is
    torch.int8 or torch.bfloat16 of quantized weights. Raises ValueError for a name that is unknown.
    """
    if device is not None and device.type == "cuda":
        return cuda.plan_on(device, _plan.cells()[cell]["id"], dtype, T, N, H, R, directions)
    threads = torch.get_num_threads() if threads is None else threads
    undisturbed, *topology = torch.ops.lstm_fused.machine(threads)
    return _plan.plan(
        str(dtype).removeprefix("torch."),
        torch.ops.lstm_fused.active_isa(),
        threads,
        T,
        N,
        I,
        H,
        R,
        directions,
        projection=R != H,
        training=training or backward,
        backward=backward,
        cell=cell,
        undisturbed=undisturbed,
        topology=_plan.Topology(*topology),
        weights="plain" if weights is None else str(weights).removeprefix("torch."),
    )


def build_info() -> "_plan.BuildInfo":
    """Version, compiler, the torch built against, ISAs compiled in, whether CUDA kernels are."""
    return _plan.build_info()
