"""What only a CUDA device can show: every plan on it, and torch's streams, graphs and switches."""

from dataclasses import replace

import oracle
import pytest
import tolerance
import torch
from cuda_cases import HELD, KINDS, LARGE, PROJECTED, SMALL, cases, expected, tf32
from oracle import Problem, check, run_module
from paths import DEVICES

import lstm_fused
from lstm_fused import cuda, ops

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif("cuda" not in DEVICES, reason="no CUDA device, or built without nvcc"),
]


@pytest.fixture(autouse=True)
def full_float32():
    with tf32(False):
        yield
    cuda.set_plan(None)
    oracle.judges.cache_clear()


def on_device(kind, problem):
    return pytest.param(kind, replace(problem, device="cuda"), id=f"{kind}-{problem}")


@pytest.mark.parametrize(
    ("kind", "problem"), [on_device(*case) for case in cases(SMALL, PROJECTED, HELD)]
)
def test_agrees(kind, problem):
    cuda.set_plan(kind)
    outcome = check(problem)
    wanted = expected(kind, problem)
    no_clusters = cuda.device_properties(0)[4] < 2
    wanted = "step" if wanted == "cluster" and no_clusters else wanted
    assert outcome.forward_run["kernel"] == outcome.backward_run["kernel"] == wanted


@pytest.mark.parametrize(("kind", "problem"), [on_device(*case) for case in cases(LARGE)])
def test_agrees_large(kind, problem):
    cuda.set_plan(kind)
    check(problem)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("problem", [SMALL[1], LARGE[0], LARGE[2]], ids=str)
def test_tf32(kind, problem):
    """Against nn.LSTM in TF32 too; a floor of TF32's ten bits, where cuDNN takes more for little
    layers."""
    problem = replace(problem, device="cuda")
    cuda.set_plan(kind)
    oracle.judges.cache_clear()
    with tf32(True):
        theirs, exact = (tensors[0] for tensors in oracle.judges(problem))
        found = run_module(problem, lstm_fused)
    assert found.forward_run["tf32"] == found.backward_run["tf32"] == 1
    for name, truth in exact.items():
        error, largest = tolerance.error_of(found.tensors[name], truth), truth.abs().max().item()
        torch_error = tolerance.error_of(theirs[name], truth)
        assert error <= tolerance.allowed(name, torch.float16, torch_error, largest), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_repeats_to_the_bit(kind, dtype):
    """Twenty times: a race between SMs does not show each time."""
    problem = Problem(50, 19, 6, 300, dtype, form="unsorted", directions=2, hx=True, device="cuda")
    cuda.set_plan(kind)
    first, *others = (run_module(problem, lstm_fused).tensors for _ in range(20))
    for again in others:
        assert all(torch.equal(first[name], again[name]) for name in first)


def layer(dtype=torch.float32, **options):
    torch.manual_seed(1)
    module = lstm_fused.LSTM(12, 100, device="cuda", dtype=dtype, **options)
    return module, torch.randn(30, 19, 12, device="cuda", dtype=dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_graph(kind):
    """A captured forward pass, replayed on other numbers."""
    cuda.set_plan(kind)
    module, x = layer(bidirectional=True)
    with torch.no_grad():
        module(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = module(x)[0]
        for _ in range(2):
            x.normal_()
            graph.replay()
            assert torch.equal(captured, module(x)[0])


def test_graph_of_training():
    module, x = layer()
    graphed = torch.cuda.make_graphed_callables(module, (x.clone().requires_grad_(),))
    x.requires_grad_()
    graphed(x)[0].square().sum().backward()
    found = [p.grad.clone() for p in (x, *module.parameters())]
    module.zero_grad()
    x.grad = None
    module(x)[0].square().sum().backward()
    for grad, p in zip(found, (x, *module.parameters()), strict=True):
        assert torch.allclose(grad, p.grad)


def test_graph_of_packed_data():
    """Captured in the step plan: its sizes are part of the launches."""
    module, x = layer()
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, torch.arange(12, 31).flip(0))
    with torch.no_grad():
        module(packed)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = module(packed)[0].data
        assert ops.last_run("cuda")["kernel"] == "step"
        graph.replay()
        cuda.set_plan("step")
        assert torch.equal(captured, module(packed)[0].data)


@pytest.mark.parametrize("kind", KINDS)
def test_streams(kind):
    """Layers on two streams at a time, whose CTAs may not wait for each other."""
    cuda.set_plan(kind)
    module, x = layer(bidirectional=True)
    with torch.no_grad():
        expected_y = module(x)[0]
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in range(2)]
        found = []
        for _ in range(10):
            for stream in streams:
                with torch.cuda.stream(stream):
                    found.append(module(x)[0])
        torch.cuda.synchronize()
    assert all(torch.equal(y, expected_y) for y in found)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_second_device():
    module, x = layer()
    expected_y = module(x)[0]
    found = module.to("cuda:1")(x.to("cuda:1"))[0]
    assert found.device.index == 1 and torch.cuda.current_device() == 0
    assert torch.equal(found.cpu(), expected_y.cpu())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    module, x = layer()
    theirs = torch.nn.LSTM(12, 100, device="cuda")
    theirs.load_state_dict(module.state_dict())
    with torch.autocast("cuda", dtype):
        (y, states), (their_y, their_states) = module(x), theirs(x)
    found, wanted = (y, *states), (their_y, *their_states)
    assert [t.dtype for t in found] == [t.dtype for t in wanted]
    for ours, torchs in zip(found, wanted, strict=True):
        assert torch.allclose(ours.float(), torchs.float(), atol=8 * torch.finfo(dtype).eps)
    y.float().sum().backward()
    assert all(p.grad.dtype is torch.float32 for p in module.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_long(kind):
    """More steps than cuDNN takes, 65,535; against the CPU's kernel."""
    cuda.set_plan(kind)
    module = lstm_fused.LSTM(2, 40)
    x = torch.randn(70_000, 1, 2)
    with torch.no_grad():
        wanted = module(x)[0]
        found = module.cuda()(x.cuda())[0].cpu()
    assert ops.last_run("cuda")["kernel"] == kind
    assert (found - wanted).abs().max() < 1e-5


def test_gradients_in_evaluation_mode():
    module, x = layer()
    module.eval()
    module(x.requires_grad_())[0].sum().backward()
    assert x.grad.isfinite().all() and x.grad.any()


def test_double_backward():
    module = lstm_fused.LSTM(3, 5, dtype=torch.float64, device="cuda")
    x = torch.randn(3, 2, 3, dtype=torch.float64, device="cuda", requires_grad=True)

    def run(x, *weights):
        return ops.layer(x, None, (), weights)[0]

    assert torch.autograd.gradgradcheck(run, (x, *module.parameters()))


def test_compiles():
    module, x = layer()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    ours, theirs = (m(x)[0] for m in (compiled, module))
    assert torch.equal(ours, theirs)
    ours.sum().backward()


def test_explains():
    module, x = layer()
    text = str(lstm_fused.explain(module, x))
    assert "plan" in text and "CTAs" in text
