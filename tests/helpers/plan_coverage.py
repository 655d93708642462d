"""The kernels to test, and assertions that the planned one ran."""

import torch

from lstm_fused import _plan, runtime
from tests.helpers import described

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DEVICES = (
    ("cpu", "cuda") if torch.cuda.is_available() and runtime.build_info()["cuda"] else ("cpu",)
)
# Those with code for plain weights.
FLOAT_ISAS = tuple(isa for isa in runtime.available_isas() if not isa.endswith("_vnni"))


def isas_for(dtype, device="cpu"):
    """The ISAs whose code differs for a dtype; None where there are none to choose from."""
    if device != "cpu":
        return (None,)
    return tuple(isa for isa in FLOAT_ISAS if not isa.endswith("_bf16") or dtype is torch.bfloat16)


def planned(problem, isa, threads, backward):
    """The plan of the layer that runs last: the top one in the forward pass, else the lowest."""
    p = problem
    first = backward or p.layers == 1
    return _plan.plan(
        str(p.dtype).removeprefix("torch."),
        isa,
        threads,
        p.T,
        p.N,
        p.I if first else p.directions * p.R,
        p.H,
        described.columns_of(p.cell, p.H, p.R),
        p.directions,
        projection=p.proj > 0,
        training=True,
        backward=backward,
        cell=p.cell,
    )


def assert_ran(problem, isa, outcome):
    """The kernels of this ISA and dtype ran, forward and backward, as planned for this machine."""
    for pass_name, run in (("forward", outcome.forward_run), ("backward", outcome.backward_run)):
        assert (run["pass"], run["dtype"]) == (pass_name, str(problem.dtype).removeprefix("torch."))
        if problem.device != "cpu":
            continue
        plan = planned(problem, isa, torch.get_num_threads(), pass_name == "backward")
        for key in run.keys() - {"pass"}:
            assert run[key] == getattr(plan, key), (pass_name, key, run, str(plan))
        # The direct kernel multiplies no pairs of bfloat16.
        paired = run["kernel"] == "persistent"
        expected = "avx512" if isa == "avx512_bf16" and not paired else isa
        assert run["isa"] == expected, (pass_name, run)
