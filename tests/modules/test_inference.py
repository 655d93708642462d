"""The fast path for inference: when it is taken, and that its results are the operator's."""

import multiprocessing

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations
from torch.overrides import TorchFunctionMode

import lstm_fused
from lstm_fused import inference, runtime
from tests.helpers.compare_modules import STEPS, Watching, states_of
from tests.helpers.oracle import Problem, run_module
from tests.helpers.plan_coverage import DTYPES, isas_for

PROBLEMS = (
    Problem(1, 1, 7, 7, hx=True),
    Problem(1, 3, 7, 17),
    Problem(5, 2, 17, 17, layers=3, directions=2, hx=True),
    Problem(5, 2, 6, 9, layers=2, directions=2, proj=4, bias=False, hx=True),
    Problem(4, 3, 5, 100, batch_first=True, hx=True),
    *(Problem(3, 2, 6, 18, layers=2, hx=True, cell=cell) for cell in ("gru", "rnn_tanh")),
    Problem(3, 2, 6, 18, directions=2, cell="rnn_relu"),
)


@pytest.fixture
def fast_path(monkeypatch):
    """Every result of inference.infer and inference.infer_step, None included."""
    taken = []

    def recording(infer):
        def recorded(*args):
            taken.append(infer(*args))
            return taken[-1]

        return recorded

    for name in ("infer", "infer_step"):
        monkeypatch.setattr(inference, name, recording(getattr(inference, name)))
    return taken


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_equals_the_operator(problem, dtype, fast_path, monkeypatch):
    problem = Problem(**vars(problem) | {"dtype": dtype})
    for isa in isas_for(dtype):
        runtime.set_isa(isa)
        quick = run_module(problem, lstm_fused, gradients=False)
        assert fast_path.pop() is not None
        with monkeypatch.context() as patch:
            patch.setattr(inference, "infer", lambda *_: None)
            usual = run_module(problem, lstm_fused, gradients=False)
        assert quick.forward_run == usual.forward_run
        assert quick.tensors.keys() == usual.tensors.keys()
        for name, t in usual.tensors.items():
            assert torch.equal(quick.tensors[name], t), (isa, name)
            assert quick.tensors[name].stride() == t.stride(), (isa, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", STEPS)
def test_cells_equal_the_operator(cell, dtype, fast_path, monkeypatch):
    for bias, state, rows, threads in (
        (True, True, (3,), 1),
        (False, True, (7,), 2),
        (True, False, (1,), 1),
        (True, True, (), 1),
    ):
        torch.set_num_threads(threads)
        module = STEPS[cell](9, 17, bias=bias, dtype=dtype).requires_grad_(False)
        x = torch.randn(*rows, 9).to(dtype)
        h, c = torch.randn(2, *rows, 17).to(dtype)
        hx = None if not state else (h, c) if cell == "lstm" else h
        quick = module(x, hx)
        assert fast_path.pop() is not None
        with monkeypatch.context() as patch:
            patch.setattr(inference, "infer_step", lambda *_: None)
            usual = module(x, hx)
        assert type(quick) is type(usual)
        for one, other in zip(states_of(quick), states_of(usual), strict=True):
            assert torch.equal(one, other) and one.stride() == other.stride()
            assert one.untyped_storage().data_ptr() not in [t.data_ptr() for t in (x, h, c)]


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", ["lstm", "projection", "gru", "cell"])
def test_quantized_weights_equal_the_operator(make, dtype, fast_path, monkeypatch):
    if make == "cell":
        module, x = lstm_fused.GRUCell(9, 17, bias=False), torch.randn(3, 9)
    else:
        name, more = ("GRU", {}) if make == "gru" else ("LSTM", {})
        more = {"proj_size": 5} if make == "projection" else more
        options = {"num_layers": 2, "bidirectional": True, "batch_first": True}
        module, x = getattr(lstm_fused, name)(9, 17, **options, **more), torch.randn(3, 4, 9)
    module = lstm_fused.quantize_(module, dtype)
    quick = module(x)
    assert fast_path.pop() is not None
    assert runtime.last_run()["kernel"] == str(dtype).removeprefix("torch.")
    with monkeypatch.context() as patch:
        for path in ("infer", "infer_step"):
            patch.setattr(inference, path, lambda *_: None)
        usual = module(x)
    if make == "cell":
        quick, usual = (quick, ()), (usual, ())
    pairs = zip((quick[0], *states_of(quick[1])), (usual[0], *states_of(usual[1])), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)
    module(x.clone().requires_grad_())
    assert fast_path.pop() is None


def test_cells_use_the_operator(fast_path):
    module, x = lstm_fused.LSTMCell(4, 6), torch.randn(3, 4)
    assert module(x)[0].requires_grad
    module.requires_grad_(False)
    h, c = torch.zeros(2, 3, 6)
    for odd in ([h, c], (h, c.expand(2, 3, 6)[1].t().contiguous().t())):
        module(x, odd)
    with pytest.raises(RuntimeError):
        module(x, (h, c[:2]))
    with pytest.raises(RuntimeError):
        module(torch.randn(3, 5), (h, c))
    assert type(fast_path.pop(0)) is list  # of the tensors, found fit for the autograd.Function
    assert fast_path == [None] * 4


def small(**options):
    return lstm_fused.LSTM(4, 6, **options).requires_grad_(False), torch.randn(3, 2, 4)


def test_fast_path_needs_no_grad(fast_path):
    module, x = lstm_fused.LSTM(4, 6), torch.randn(3, 2, 4)
    assert module(x)[0].requires_grad
    assert type(fast_path.pop()) is list
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y, _ = module(x)
        assert type(fast_path.pop()) is tuple
        assert not y.requires_grad and y.is_inference() == (mode is torch.inference_mode)
    module.requires_grad_(False)
    module(x)
    assert type(fast_path.pop()) is tuple
    assert module(x.requires_grad_())[0].requires_grad
    assert type(fast_path.pop()) is list
    state = torch.zeros(1, 2, 6), torch.zeros(1, 2, 6, requires_grad=True)
    assert module(x.detach(), state)[0].requires_grad
    assert type(fast_path.pop()) is list


def test_outputs_do_not_alias_inputs():
    module, x = small()
    state = torch.zeros(1, 2, 6), torch.zeros(1, 2, 6)
    y, (h_n, c_n) = module(x, state)
    pointers = [t.untyped_storage().data_ptr() for t in (x, *state, y, h_n, c_n)]
    assert len(set(pointers)) == len(pointers)
    y.resize_(2, 2)


class Overriding(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_uses_the_operator_under_dispatch_mode(fast_path):
    module, x = small()
    with Watching() as mode:
        module(x)
    assert fast_path.pop() is None
    assert "lstm_fused.recurrent_forward.default" in mode.seen
    with Overriding():
        module(x)
    assert fast_path.pop() is None
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x)[0].dtype is torch.bfloat16
    assert fast_path.pop() is None
    with torch.profiler.profile() as profile:
        module(x)
    assert fast_path.pop() is None
    assert "lstm_fused::recurrent_forward" in {event.key for event in profile.key_averages()}


@pytest.mark.filterwarnings("ignore:lstm_fused.* ran through", "ignore::DeprecationWarning")
def test_falls_back_to_torch(fast_path):
    """Forward-mode tangents use the operator; tracing uses torch.nn."""
    module, x = lstm_fused.GRU(4, 6).requires_grad_(False), torch.randn(3, 2, 4)
    with forward_ad.dual_level():
        y, _ = module(forward_ad.make_dual(x, torch.ones_like(x)))
        assert forward_ad.unpack_dual(y).tangent is not None
    traced = torch.jit.trace(module, x, check_trace=False)
    assert fast_path and set(map(type, fast_path)) == {type(None)}
    torch.testing.assert_close(traced(x)[0], module(x)[0])


def odd_calls():
    """Calls that are no mistake, but not plain either: (module, input, hx)."""
    module, x = small()
    h, c = torch.zeros(1, 2, 6), torch.zeros(1, 2, 6)
    yield "unbatched", module, x[:, 0], None
    yield "list", module, x, [h, c]
    yield "strided state", module, x, (h.transpose(1, 2).contiguous().transpose(1, 2), c)
    yield "strided input", module, torch.randn(3, 2, 8)[..., ::2], None
    yield "packed", module, torch.nn.utils.rnn.pack_padded_sequence(x, [3, 2]), None
    strided, _ = small()
    strided.weight_hh_l0 = torch.nn.Parameter(torch.randn(24, 12)[:, ::2], requires_grad=False)
    yield "strided weight", strided, x, None
    parametrized = parametrizations.weight_norm(small()[0], "weight_hh_l0")
    yield "parametrized", parametrized.requires_grad_(False), x, None
    deep = lstm_fused.LSTM(4, 6, 2, dropout=0.5).requires_grad_(False)
    yield "dropout", deep, x, None


@pytest.mark.parametrize("case", list(odd_calls()), ids=lambda case: case[0])
def test_uses_the_operator(case, fast_path):
    _, module, x, hx = case
    torch.manual_seed(0)
    expected = lstm_fused.restore(module)(x, hx)
    torch.manual_seed(0)
    found = lstm_fused.replace(module)(x, hx)
    assert set(map(type, fast_path)) == {type(None)}
    torch.testing.assert_close(found, expected)


def test_strided_input(fast_path):
    """Any strides between rows are accepted as long as each row is contiguous."""
    module, _ = small()
    for x in (torch.randn(2, 3, 4).transpose(0, 1), torch.randn(6, 2, 9)[::2, :, 3:7]):
        y, _ = module(x)
        assert fast_path.pop() is not None
        torch.testing.assert_close(y, module(x.contiguous())[0], rtol=0, atol=0)


@pytest.mark.parametrize("bad", ["width", "dtype", "state", "rows"])
def test_error_messages(bad, fast_path):
    module, x = small()
    state = torch.zeros(1, 2, 6), torch.zeros(1, 2, 6)
    if bad == "width":
        x = torch.randn(3, 2, 5)
    elif bad == "dtype":
        x = x.double()
    elif bad == "state":
        state = state[0], torch.zeros(1, 2, 7)
    else:
        state = torch.zeros(1, 3, 6), state[1]
    with pytest.raises((RuntimeError, ValueError)):
        module(x, state)
    assert fast_path == [None]


def change(module, how):
    w = module.weight_hh_l0
    if how == "in place":
        w.mul_(2)
    elif how == "data":
        w.data.mul_(2)
    elif how == "new data":
        w.data = w.data * 2
    elif how == "swapped":
        module.weight_hh_l0 = torch.nn.Parameter(w * 2)
    elif how == "state_dict":
        state = module.state_dict()
        module.load_state_dict(state | {"weight_hh_l0": state["weight_hh_l0"] * 2})
    elif how == "numpy":
        w.detach().numpy()[:] *= 2
    elif how == "optimizer":
        w.grad = -w.clone()
        torch.optim.SGD([w], lr=1.0).step()


@pytest.mark.parametrize(
    "how", ["in place", "data", "new data", "swapped", "state_dict", "numpy", "optimizer"]
)
@pytest.mark.parametrize("T", [1, 9])
def test_weight_changes_take_effect(how, T, fast_path):
    """No cached value is stale after a change of the weights."""
    module, x = lstm_fused.LSTM(4, 6), torch.randn(T, 2, 4)
    with torch.no_grad():
        hx = torch.randn(1, 2, 6), torch.randn(1, 2, 6)
        before, _ = module(x, hx)
        change(module, how)
        after, _ = module(x, hx)
        assert all(result is not None for result in fast_path)
        twin = torch.nn.LSTM(4, 6)
        twin.load_state_dict(module.state_dict())
        torch.testing.assert_close(after, twin(x, hx)[0])
    assert not torch.allclose(before, after)


def double(t):
    t.mul_(2)


def test_weights_in_shared_memory(fast_path):
    module, x = small()
    module.share_memory()
    before, _ = module(x)
    process = multiprocessing.get_context("spawn").Process(
        target=double, args=(module.weight_ih_l0.detach(),)
    )
    process.start()
    process.join()
    after, _ = module(x)
    assert fast_path[-1] is not None and not torch.allclose(before, after)


def test_threads_share_a_module():
    """The GIL is released while a kernel runs."""
    from concurrent.futures import ThreadPoolExecutor

    module, x = small()
    expected, _ = module(x)
    with ThreadPoolExecutor(4) as pool:
        for y, _ in pool.map(module, [x] * 200):
            assert torch.equal(y, expected)
