"""CUDA plans over a table of devices: none exceeds the resources of its device."""

import re
from itertools import product

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import lstm_fused
from lstm_fused import _plan, cuda
from tests.helpers import plan_coverage

# As lstm_fused.cuda.device_properties gives them.
ARCHITECTURES = {gpu: device for _, gpu, device in _plan.cuda_architectures()}
DEVICES = ARCHITECTURES | {
    "H100 PCIe": (9, 0, 114, 227 << 10, 16, 6),
    "one SM": (9, 0, 1, 227 << 10, 1, 0),
}
DTYPES = {str(d).removeprefix("torch."): d.itemsize for d in plan_coverage.DTYPES}
ROWS = (1, 8, 9, 16, 33, 64, 128, 300, 4096, 10**6, 10**7)
UNITS = (1, 7, 16, 64, 100, 256, 512, 640, 768, 800, 1024, 1500, 1900, 2048, 4096, 10**5)
REGISTERS = 64 << 10  # of every SM since 7.0
MAX_REGISTERS = 255  # of a thread
RESIDENT = 128 * 4  # bytes of weights a thread has in registers, at most


def plans():
    for name, dtype, N, H, D, gates, backward in product(
        DEVICES, DTYPES, ROWS, UNITS, (1, 2), (1, 3, 4), (False, True)
    ):
        for T, kind in ((1, ""), (100, ""), *((100, kind) for kind in cuda.KINDS)):
            sizes = (dtype, T, N, H, H, D, gates, False, True, DEVICES[name], backward)
            plan = _plan.cuda_plan(*sizes, kind)
            if plan is not None:
                yield (name, *sizes, kind), plan


def test_plan_fits_the_device():
    seen = set()
    for case, p in plans():
        name, dtype, T, N, H, _, D, gates, _, _, _, backward, kind = case
        *_, sms, shared, cluster, _ = DEVICES[name]
        seen.add((p.kind, backward))
        assert p.kind == kind or not kind, case
        assert p.shared_bytes <= shared, (case, p)
        assert p.threads % 32 == 0 and p.threads <= 1024, (case, p)
        assert p.tile_rows in (8, 16, 32) and p.row_groups <= 65535, (case, p)
        used = -(-H // (p.unit_tiles * 16))
        assert used <= p.unit_ctas, (case, p)
        if p.kind == "gemm":
            assert p.shared_bytes == 0 and p.threads == 16 * p.unit_tiles * p.tile_rows, (case, p)
        assert used > p.unit_ctas // 2 if p.kind == "cluster" else used == p.unit_ctas, (case, p)
        assert p.tf32 == (dtype == "float32"), (case, p)
        if p.kind == "grid":
            assert p.unit_ctas * p.row_groups * D <= sms, (case, p)
            assert p.threads * MAX_REGISTERS <= REGISTERS, (case, p)
        if p.kind == "cluster":
            assert DEVICES[name][0] >= 9 and p.unit_ctas <= cluster, (case, p)
            assert p.threads <= 512, (case, p)
            assert p.row_groups * p.tile_rows >= N, (case, p)
        if p.kind in ("grid", "cluster"):
            assert dtype != "float64", case
            # The weights, a row of A for each gate and unit, are somewhere.
            weights = p.unit_tiles * 16 * gates * H * DTYPES[dtype]
            assert weights <= p.shared_bytes + RESIDENT * p.threads, (case, p)
            assert T > 1 or kind, case
    assert seen == set(product(cuda.KINDS, (False, True)))


def test_targets_are_of_the_devices():
    for target, gpu, (major, minor, *_) in _plan.cuda_architectures():
        assert re.fullmatch(rf"{major}\.{minor}[af]?(\+PTX)?", target), gpu


def test_unsupported_capability():
    with pytest.raises(ValueError, match="compute capability 8.0 or later, this is 7.5"):
        _plan.cuda_plan("float32", 9, 1, 8, 8, 1, 4, False, True, (7, 5, 40, 64 << 10, 1, 0))


def kind_on(name, dtype, T, N, H, D=1, projection=False, backward=False):
    R = H // 2 if projection else H
    sizes = (dtype, T, N, H, R, D, 4, projection, True)
    return cuda.plan(*sizes, DEVICES[name], backward).kind


def test_plans_of_known_problems():
    assert kind_on("H200", "bfloat16", 100, 16, 256) == "cluster"
    assert kind_on("H200", "bfloat16", 100, 16, 768) == "cluster"
    assert kind_on("H200", "bfloat16", 100, 16, 768, backward=True) == "grid"
    assert kind_on("H200", "bfloat16", 100, 16, 1024) == "grid"
    assert kind_on("H200", "bfloat16", 100, 32, 2048) == "grid"
    assert kind_on("H200", "bfloat16", 100, 2048, 512) == "gemm"
    assert kind_on("H200", "bfloat16", 100, 16, 1024, D=2) == "grid"
    assert kind_on("A100", "float16", 100, 16, 512) == "grid"
    assert kind_on("H200", "bfloat16", 100, 16, 4096) == "step"
    assert kind_on("H200", "bfloat16", 1, 16, 256) == "step"
    assert kind_on("H200", "float64", 100, 16, 256) == "step"
    assert kind_on("H200", "bfloat16", 100, 16, 256, projection=True) == "step"
    assert kind_on("H200", "bfloat16", 32, 10**5, 256) == "gemm"
    assert kind_on("H200", "bfloat16", 1, 64, 256) == "step"
    assert kind_on("H200", "bfloat16", 1, 512, 1024) == "gemm"
    assert kind_on("H200", "float64", 100, 512, 1024, projection=True) == "gemm"
    assert kind_on("H200", "bfloat16", 100, 16, 8192) == "step"  # the weights are read once a step


def test_a_forced_plan_without_room_is_the_step_plan():
    sizes = ("float64", 9, 4, 40, 40, 1, 4, False, False, DEVICES["H200"], False)
    assert cuda.plan(*sizes, "grid").kind == cuda.plan(*sizes, "cluster").kind == "step"
    with pytest.raises(ValueError, match="kind is 'gird' but must be"):
        cuda.set_plan("gird")


@pytest.mark.parametrize("normalizes", (False, True))
def test_plans_of_described_cells(normalizes):
    """The gemm plan, whichever is forced; of cells that normalize, a CTA has a row."""
    for name, dtype, N, H, kind in product(DEVICES, DTYPES, ROWS, UNITS, ("", *cuda.KINDS)):
        sizes = (dtype, 100, N, H, H, 2, 4, False, False, DEVICES[name], True)
        p = cuda.plan(*sizes, kind, True, normalizes)
        assert p.kind == "gemm" and p.threads == 16 * p.unit_tiles * p.tile_rows
        assert p.threads % 32 == 0 and p.threads <= 256
        assert p.tile_rows == (1 if normalizes else 8)
        assert p.row_groups == min(65535, -(-N // p.tile_rows))
        assert p.unit_ctas == (1 if normalizes else -(-H // 32))
        # Without an attribute of the kernel, a CTA may have 48 KB.
        assert p.shared_bytes < 48 << 10 if normalizes else p.shared_bytes == 0


def test_plan_text():
    text = str(cuda.plan("float32", 9, 4, 40, 40, 1, 4, False, True, DEVICES["H200"], False))
    assert "plan" in text and "CTAs" in text and "TF32" in text


def reason_on(name, dtype, T, N, H, **more):
    sizes = (dtype, T, N, H, H, 1, 4, False, True, DEVICES[name])
    return _plan.cuda_cudnn_reason(*sizes, **more)


def test_cudnn_runs_where_a_plan_is_not_predicted_to_be_ahead():
    """Those with launches for each step; of torch.nn's cells alone."""
    assert reason_on("H200", "bfloat16", 100, 16, 512) is None
    assert reason_on("H200", "bfloat16", 100, 16, 1024) is None
    assert reason_on("A100", "float16", 100, 16, 512) is None
    assert reason_on("H200", "bfloat16", 100, 16, 4096).startswith("the step plan")
    assert reason_on("H200", "bfloat16", 100, 2048, 512).startswith("the gemm plan")
    assert reason_on("H200", "float64", 100, 16, 256).startswith("the step plan")
    assert reason_on("H200", "float64", 100, 16, 256, described=True) is None


class OnCuda:
    """A tensor that says it is on a CUDA device."""

    is_cuda = True
    device = torch.device("cuda", 0)

    def __init__(self, dtype=torch.bfloat16, requires_grad=False):
        self.dtype, self.requires_grad = dtype, requires_grad


@pytest.fixture
def h200(monkeypatch):
    """A function that says why a call runs cuDNN on an H200."""
    monkeypatch.setattr(cuda, "device_properties", lambda index: DEVICES["H200"])
    cell = cuda.CELLS[_plan.cells()["lstm"]["id"]]

    def reason(H, x=None, weight=None):
        x, weight = x or OnCuda(), weight or OnCuda()
        return cuda.cudnn_reason(cell, x, (100, 16, H, H), 1, (weight,))

    cuda.set_plan(None)
    return reason


def test_set_plan_chooses_cudnn_or_our_kernels(h200):
    assert h200(256) is None and h200(4096).startswith("the step plan")
    cuda.set_plan("cudnn")
    assert h200(256) == h200(4096) == "set_plan has forced it"
    for kind in ("fused", *cuda.KINDS):
        cuda.set_plan(kind)
        assert h200(4096) is None
        assert cuda.forced_kind() == ("" if kind == "fused" else kind)


def test_cudnn_runs_plain_inference_alone(h200):
    """Second derivatives, evaluation mode's gradients and transforms are ours."""
    weight = OnCuda(requires_grad=True)
    assert h200(4096, weight=weight) is None
    with torch.no_grad():
        assert h200(4096, weight=weight) is not None
        with torch.backends.cudnn.flags(enabled=False):
            assert h200(4096) is None
    assert torch.func.vmap(lambda t: t + bool(h200(4096)))(torch.zeros(2)).tolist() == [0, 0]


def test_module_runs_torchs_forward_by_plan(monkeypatch):
    """And explain says so. The tensors are fake ones: no device is needed."""
    monkeypatch.setattr(cuda, "unsupported_reason", lambda device: None)
    monkeypatch.setattr(cuda, "device_properties", lambda index: DEVICES["H200"])
    monkeypatch.setattr(torch.nn.LSTM, "reset_parameters", lambda module: None)
    monkeypatch.setattr(torch.nn.LSTM, "forward", lambda module, input, hx: "torch's")
    cuda.set_plan(None)
    with FakeTensorMode(), torch.no_grad():
        for H, ours in ((64, True), (4096, False)):
            module = lstm_fused.LSTM(8, H, device="cuda", dtype=torch.bfloat16)
            x = torch.empty(100, 16, 8, device="cuda", dtype=torch.bfloat16)
            said = str(lstm_fused.explain(module, x))
            assert ("plan cudnn: the step plan" in said) == (not ours), said
            if not ours:
                assert module(x) == "torch's"
                resets = torch.zeros(100, 16, dtype=torch.bool, device="cuda")
                assert module(x, resets=resets)[0].shape == (100, 16, H)


def test_plan_counts_the_clusters_that_are_active_at_once():
    """A device may have fewer of 16 CTAs than its SMs would make: each lies within one GPC."""

    def kind(N, clusters):
        device = (9, 0, 132, 227 << 10, 16, clusters)
        return cuda.plan("bfloat16", 100, N, 512, 512, 1, 4, False, False, device, False).kind

    # Two waves at most, of clusters that have 16 rows each.
    assert kind(96, 3) == kind(112, 8) == kind(256, 8) == "cluster"
    assert kind(112, 3) != "cluster" and kind(272, 8) != "cluster"
