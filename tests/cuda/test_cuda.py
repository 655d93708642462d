"""Tests that need a CUDA device: parity of every plan, streams, graphs, TF32, autocast, DDP."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import lstm_fused
from lstm_fused import cuda, ops, runtime
from lstm_fused.testing import tolerance
from tests.helpers import oracle
from tests.helpers.cuda_cases import (
    DESCRIBED,
    KINDS,
    LARGE,
    PROJECTED,
    RESIDENT,
    SMALL,
    STEPWISE,
    cases,
    check_layouts,
    expected,
    tf32,
)
from tests.helpers.oracle import CELLS, Problem, check, run_module
from tests.helpers.plan_coverage import DEVICES

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif("cuda" not in DEVICES, reason="no CUDA device, or built without nvcc"),
]


each_kind = pytest.mark.parametrize("kind", KINDS)
each_cell = pytest.mark.parametrize("cell", CELLS)
# Of cells beyond torch.nn: a CTA for each row, heads, one launch for all steps, masks.
OTHERS = {
    "LayerNormLSTM": {},
    "LayerNormGRU": {},
    "SLSTM": {"num_heads": 4},
    "SRU": {},
    "IndRNN": {},
    "RegularizedGRU": {"zoneout": 0.2},
}
each_other = pytest.mark.parametrize("name", OTHERS)


@pytest.fixture(autouse=True)
def best_plan_after():
    yield
    cuda.set_plan(None)


def on_device(kind, problem):
    return pytest.param(kind, replace(problem, device="cuda"), id=f"{kind}-{problem}")


@pytest.mark.parametrize(
    ("kind", "problem"), [on_device(*case) for case in cases(SMALL, PROJECTED, RESIDENT, DESCRIBED)]
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


@each_kind
@pytest.mark.parametrize("problem", [SMALL[1], LARGE[0], LARGE[2]], ids=str)
def test_tf32(kind, problem):
    """Against nn.LSTM in TF32 too; a floor of TF32's ten bits, where cuDNN takes more for little
    layers."""
    problem = replace(problem, device="cuda")
    cuda.set_plan(kind)
    oracle.expected_outcomes.cache_clear()
    with tf32(True):
        theirs, exact = (outcomes[0].tensors for outcomes in oracle.expected_outcomes(problem))
        found = run_module(problem, lstm_fused)
    oracle.expected_outcomes.cache_clear()  # other tests expect outcomes without TF32
    assert found.forward_run["tf32"] == found.backward_run["tf32"] == 1
    for name, truth in exact.items():
        error, largest = tolerance.error_of(found.tensors[name], truth), truth.abs().max().item()
        torch_error = tolerance.error_of(theirs[name], truth)
        assert error <= tolerance.allowed(name, torch.float16, torch_error, largest), name


def test_layouts_of_x():
    check_layouts("cuda")


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bitwise_reproducible(kind, dtype):
    """Twenty runs: a race between SMs does not occur in every one."""
    problem = Problem(50, 19, 6, 300, dtype, form="unsorted", directions=2, hx=True, device="cuda")
    cuda.set_plan(kind)
    first, *others = (run_module(problem, lstm_fused).tensors for _ in range(20))
    for again in others:
        assert all(torch.equal(first[name], again[name]) for name in first)


def layer(cell="lstm", dtype=torch.float32, hidden=100, **options):
    """A module and its input (T, N, I), of 30 steps and 19 rows."""
    torch.manual_seed(1)
    name, more = CELLS[cell]
    options = {"device": "cuda", "dtype": dtype} | more | options
    module = getattr(lstm_fused, name)(12, hidden, **options)
    return module, torch.randn(30, 19, 12, device="cuda", dtype=dtype)


LENGTHS = torch.arange(12, 31).flip(0)


def packed_of(x):
    """x (T, N, I) cut to LENGTHS, its data a leaf of its own."""
    packed = pack_padded_sequence(x, LENGTHS)
    return PackedSequence(packed.data.detach().clone(), packed.batch_sizes)


def with_resets(module, x, form="dense", **more):
    """Outputs and gradients of a call with resets, a reset state and all cell states of an LSTM;
    the same numbers on every device."""
    generator = torch.Generator().manual_seed(3)
    T, N, _ = x.shape
    mask = (torch.rand(T, N, generator=generator) < 0.3).to(x.device)
    own = isinstance(module, lstm_fused.LSTM)
    states = [
        torch.randn(2, N, module.hidden_size, generator=generator).to(x).requires_grad_()
        for _ in range(2 + 2 * own)
    ]
    hx, reset_state = (states[:2], states[2:]) if own else states
    data = x if form == "dense" else pack_padded_sequence(x, LENGTHS)
    more |= {"return_cell_states": True} if own else {}
    out = module(data, hx, resets=mask, reset_state=reset_state, **more)
    outputs = [t if form == "dense" else t.data for t in (out[0], *out[2:])]
    outputs += out[1] if own else out[1:2]
    loss = sum((t * t.detach().cos()).sum() for t in outputs)
    return [*outputs, *torch.autograd.grad(loss, [x, *states, *module.parameters()])]


@each_cell
@each_kind
@pytest.mark.parametrize("form", ["dense", "packed"])
def test_resets(form, kind, cell):
    """Against the CPU's kernels."""
    cuda.set_plan(kind)
    module, x = layer(cell, bidirectional=True)
    copied = copy.deepcopy(module).cpu(), x.cpu().requires_grad_()
    found = with_resets(module, x.requires_grad_(), form)
    assert runtime.last_run("cuda")["kernel"] == kind
    wanted = with_resets(*copied, form)
    torch.testing.assert_close([t.cpu() for t in found], wanted, rtol=1e-4, atol=1e-4)


@each_cell
@each_kind
@pytest.mark.parametrize("every", [7, 15])
def test_checkpoints(every, kind, cell):
    """Of 30 steps; against the pass that keeps every step."""
    cuda.set_plan(kind)
    module, x = layer(cell, bidirectional=True)
    x.requires_grad_()
    found, wanted = (with_resets(module, x, checkpoint_every=k) for k in (every, None))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def other_layer(name):
    """A module of OTHERS in evaluation mode, without random masks, and its input (T, N, I)."""
    torch.manual_seed(1)
    module = getattr(lstm_fused, name)(12, 64, bidirectional=True, device="cuda", **OTHERS[name])
    for p in module.parameters():  # some begin as zeros
        torch.nn.init.uniform_(p, -0.2, 0.2)
    return module.eval(), torch.randn(30, 19, 12, device="cuda", requires_grad=True)


def gradients_of(module, x, packed=False):
    """y and the gradients of all leaves."""
    y = module(packed_of(x) if packed else x)[0]
    y = y.data if packed else y
    leaves = [*module.parameters()] if packed else [x, *module.parameters()]
    return y, *torch.autograd.grad(y.square().sum(), leaves)


@each_other
@pytest.mark.parametrize("packed", [False, True])
def test_other_cells(packed, name):
    """Against the CPU's kernels."""
    module, x = other_layer(name)
    found = gradients_of(module, x, packed)
    assert runtime.last_run("cuda")["kernel"] == "gemm"
    wanted = gradients_of(copy.deepcopy(module).cpu(), x.detach().cpu().requires_grad_(), packed)
    torch.testing.assert_close([t.cpu() for t in found], [*wanted], rtol=1e-3, atol=1e-3)


def capture(run):
    """A graph of run, and what it gives there; first run outside, as torch asks of a capture.

    Once by the step plan, which a graph may take where another runs outside of it: a kernel that
    was never launched would be loaded in the middle of the capture.
    """
    kind = cuda.forced_kind()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for each in ("step", kind):
            cuda.set_plan(each or "fused")
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    return graph, found


@each_cell
@each_kind
def test_graph(kind, cell):
    """A captured forward pass, replayed on other numbers."""
    cuda.set_plan(kind)
    module, x = layer(cell, bidirectional=True)
    with torch.no_grad():
        graph, found = capture(lambda: module(x)[0])
        assert runtime.last_run("cuda")["kernel"] == kind
        for _ in range(2):
            x.normal_()
            graph.replay()
            assert torch.equal(found, module(x)[0])


@each_cell
def test_graph_of_packed_data(cell):
    """Whatever plan it runs in a graph, the result is that of the same plan outside."""
    module, x = layer(cell)
    packed = packed_of(x)
    with torch.no_grad():
        graph, found = capture(lambda: module(packed)[0].data)
        cuda.set_plan(runtime.last_run("cuda")["kernel"])
        packed.data.normal_()
        graph.replay()
        assert torch.equal(found, module(packed)[0].data)


@each_cell
@each_kind
@pytest.mark.parametrize("form", ["dense", "packed"])
def test_graph_of_training(form, kind, cell):
    """A captured forward and backward pass, replayed on other numbers."""
    cuda.set_plan(kind)
    module, x = layer(cell, bidirectional=True)
    given = packed_of(x) if form == "packed" else x
    data = (given.data if form == "packed" else x).requires_grad_()

    def gradients():
        y = module(given)[0]
        y = y.data if form == "packed" else y
        return torch.autograd.grad(y.square().sum(), [data, *module.parameters()])

    graph, found = capture(gradients)
    cuda.set_plan(runtime.last_run("cuda")["kernel"])
    for _ in range(2):
        data.detach().normal_()
        graph.replay()
        torch.testing.assert_close(found, gradients())


@each_other
def test_graph_of_other_cells(name):
    """A captured forward and backward pass, replayed on other numbers."""
    module, x = other_layer(name)
    graph, found = capture(lambda: gradients_of(module, x))
    for _ in range(2):
        x.detach().normal_()
        graph.replay()
        torch.testing.assert_close(found, gradients_of(module, x))


@each_cell
def test_graphed_callable(cell):
    """Against a copy: torch.cuda.make_graphed_callables puts the graph into the module itself."""
    module, x = layer(cell)
    plain = copy.deepcopy(module)
    graphed = torch.cuda.make_graphed_callables(module, (x.clone().requires_grad_(),))
    x.normal_().requires_grad_()
    found, wanted = (
        torch.autograd.grad(m(x)[0].square().sum(), [x, *m.parameters()]) for m in (graphed, plain)
    )
    torch.testing.assert_close(found, wanted)


# The second takes 128 CTAs, which no device runs twice at once.
@pytest.mark.parametrize(("dtype", "hidden"), [(torch.float32, 100), (torch.bfloat16, 1024)])
@each_kind
def test_streams(kind, dtype, hidden):
    """Layers on two streams at a time, whose CTAs may not wait for each other."""
    cuda.set_plan(kind)
    module, x = layer(dtype=dtype, hidden=hidden, bidirectional=True)
    with torch.no_grad():
        expected_y = module(x)[0]
        large_fits = kind in STEPWISE or kind == "grid" and cuda.device_properties(0)[2] >= 128
        assert hidden == 100 or not large_fits or runtime.last_run("cuda")["kernel"] == kind
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
    """In autocast's dtype, where cuDNN's layer gives float16 even if that is bfloat16."""
    module, x = layer()
    theirs = torch.nn.LSTM(12, 100, device="cuda")
    theirs.load_state_dict(module.state_dict())
    with torch.autocast("cuda", dtype):
        (y, states), (their_y, their_states) = module(x), theirs(x)
    found, wanted = (y, *states), (their_y, *their_states)
    assert {t.dtype for t in found} == {dtype}
    for ours, torchs in zip(found, wanted, strict=True):
        assert torch.allclose(ours.float(), torchs.float(), atol=8 * torch.finfo(dtype).eps)
    y.float().sum().backward()
    assert all(p.grad.dtype is torch.float32 for p in module.parameters())


@each_kind
def test_long(kind):
    """More steps than cuDNN takes, 65,535; against the CPU's kernel."""
    cuda.set_plan(kind)
    module = lstm_fused.LSTM(2, 40)
    x = torch.randn(70_000, 1, 2)
    with torch.no_grad():
        wanted = module(x)[0]
        found = module.cuda()(x.cuda())[0].cpu()
    assert runtime.last_run("cuda")["kernel"] == kind
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


def test_explain():
    module, x = layer()
    text = str(lstm_fused.explain(module, x))
    assert "plan" in text and "CTAs" in text


@pytest.fixture
def process_group(tmp_path):
    """Of this process alone, through NCCL."""
    if not (distributed.is_available() and distributed.is_nccl_available()):
        pytest.skip("torch without NCCL")
    store = {"init_method": f"file://{tmp_path / 'store'}", "rank": 0, "world_size": 1}
    distributed.init_process_group("nccl", device_id=torch.device("cuda", 0), **store)
    yield
    distributed.destroy_process_group()


def test_distributed(process_group):
    """Gradients under DistributedDataParallel are those of the plain module."""
    for cell in CELLS:
        module, x = layer(cell, num_layers=2, bidirectional=True)
        plain = copy.deepcopy(module)
        for each in (DistributedDataParallel(module, device_ids=[0]), plain):
            each(x)[0].square().sum().backward()
        found, wanted = ({n: p.grad for n, p in m.named_parameters()} for m in (module, plain))
        torch.testing.assert_close(found, wanted)
