"""Streams: each step gives the bits of the module's own call, and nothing stale or odd passes."""

import ctypes
import gc
import itertools
import os
import pickle
import sys
import threading
import time
import weakref
from copy import deepcopy

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations, prune

import lstm_fused
from lstm_fused import runtime
from tests.helpers.compare_modules import STEPS, states_of
from tests.helpers.oracle import CELLS
from tests.helpers.plan_coverage import DTYPES, isas_for

I, H, N = 7, 18, 2  # noqa: E741


def layers(cell, *sizes, **options):
    name, more = CELLS[cell]
    return getattr(lstm_fused, name)(*(sizes or (I, H)), **more | options)


def assert_steps_equal(stream, module, state, steps=3):
    """Steps of both, the module's from `state`, on the same inputs."""
    one_step = isinstance(module, lstm_fused.single_step.Cell)
    dtype = torch.float32 if module.weights_dtype else next(module.parameters()).dtype
    for _ in range(steps):
        x = torch.randn(stream.batch, module.input_size).to(dtype)
        with torch.no_grad():
            if one_step:
                state = module(x, state)
                expected = states_of(state)[0]
            else:
                y, state = module(x[None] if not module.batch_first else x[:, None], state)
                expected = y.reshape(stream.batch, -1)
        ran = runtime.last_run()
        out = torch.full_like(expected, torch.nan)
        assert stream(x, out=out) is out
        assert runtime.last_run() == ran
        assert torch.equal(out, expected)
        for one, other in zip(states_of(stream.state), states_of(state), strict=True):
            assert one.shape == other.shape and torch.equal(one, other)
    return state


OPTIONS = {
    "plain": {},
    "three layers": {"num_layers": 3, "bias": False, "batch_first": True},
    "projection": {"num_layers": 2, "proj_size": 5},
    "learned": {"num_layers": 2, "learned_initial_state": True},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("cell", CELLS)
def test_equals_the_module(cell, options, dtype):
    more = OPTIONS[options]
    if "proj_size" in more and cell != "lstm":
        more = {"num_layers": 2}
    module = layers(cell, dtype=dtype, **more)
    for name in module._learned:
        torch.nn.init.normal_(getattr(module, name))
    for isa, rows in itertools.product(isas_for(dtype), (1, N, 11)):
        runtime.set_isa(isa)
        stream = lstm_fused.stream(module, batch=rows)
        assert_steps_equal(stream, module, None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", STEPS)
def test_equals_the_cell(cell, dtype):
    for bias, rows in ((True, 1), (False, 3)):
        module = STEPS[cell](I, H, bias=bias, dtype=dtype)
        assert_steps_equal(lstm_fused.stream(module, rows), module, None)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cell", [*CELLS, "projection", *(f"{cell} step" for cell in STEPS)])
def test_quantized(cell, dtype):
    cell, _, step = cell.partition(" ")
    if step:
        module = STEPS[cell](I, H)
    elif cell == "projection":
        module = layers("lstm", num_layers=2, proj_size=5)
    else:
        module = layers(cell, num_layers=2, learned_initial_state=True)
    saved = []  # of two models
    for _ in range(2):
        for p in module.parameters():
            torch.nn.init.uniform_(p, -0.5, 0.5)
        saved.append(lstm_fused.quantize_(deepcopy(module), dtype).state_dict())
    module = lstm_fused.quantize_(module, dtype)
    for isa, rows in itertools.product(isas_for(torch.float32), (1, N, 11)):
        runtime.set_isa(isa)
        module.load_state_dict(saved[0])
        stream = lstm_fused.stream(module, rows)
        state = assert_steps_equal(stream, module, None)
        assert runtime.last_run()["kernel"] == str(dtype).removeprefix("torch.")
        module.load_state_dict(saved[1])
        assert_steps_equal(stream, module, state)
    x = torch.randn(N, I)
    with pytest.raises(ValueError, match="x must be float32"):
        lstm_fused.stream(module, N)(x.bfloat16())


def test_result_is_new_unless_given():
    stream = lstm_fused.stream(layers("gru"), N)
    x = torch.randn(N, I)
    first, second = stream(x), stream(x)
    assert first.shape == (N, H) and not torch.equal(first, second)
    assert first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr()
    assert not first.requires_grad and torch.equal(second, stream.state[0])
    first.resize_(1)
    with torch.inference_mode():
        assert stream(x).is_inference()
        made = lstm_fused.stream(layers("gru"), N)
    made(x)
    made.reset()


def test_strided_rows():
    module = layers("lstm")
    x = torch.randn(N, 3 * I)[:, I : 2 * I]
    assert torch.equal(lstm_fused.stream(module, N)(x), module(x[None])[0][0])
    one = torch.randn(1, I)
    expected = lstm_fused.stream(module, N)(one.repeat(N, 1))
    assert torch.equal(lstm_fused.stream(module, N)(one.expand(N, I)), expected)
    narrow = layers("lstm", 1, H)
    audio = torch.randn(5, N).t()
    assert torch.equal(
        lstm_fused.stream(narrow, N)(audio[:, 2:3]), narrow(audio[:, 2:3].contiguous()[None])[0][0]
    )


def test_negative_view():
    """Whose memory holds the negative of its values."""
    module = layers("lstm", 1, H)
    view = torch.complex(torch.zeros(1, 1), torch.full((1, 1), -2.0)).conj().imag
    assert view.is_neg() and view.item() == 2
    with pytest.raises(TypeError, match="no view of negatives"):
        lstm_fused.stream(module)(view)
    assert torch.equal(module(view[None])[0], module(torch.full((1, 1, 1), 2.0))[0])


def test_threads():
    torch.set_num_threads(2)
    module = layers("lstm", 300, 512)
    stream = lstm_fused.stream(module, 4, threads=2)
    assert_steps_equal(stream, module, None)
    assert runtime.last_run()["threads"] == 2
    torch.set_num_threads(1)
    stream(torch.randn(4, 300))
    assert runtime.last_run()["threads"] == 1
    assert lstm_fused.stream(module, 4).threads == 1


def test_isa_of_the_next_step():
    module = layers("lstm")
    stream = lstm_fused.stream(module, N)
    state = None
    for isa in isas_for(torch.float32):
        runtime.set_isa(isa)
        state = assert_steps_equal(stream, module, state)
        assert runtime.last_run()["isa"] == isa


# The state.


@pytest.mark.parametrize("make", [*CELLS, *(f"{cell} step" for cell in STEPS)])
def test_state_is_a_copy_and_can_be_put_in(make):
    cell, _, step = make.partition(" ")
    module = STEPS[cell](I, H) if step else layers(cell, num_layers=2)
    stream = lstm_fused.stream(module, N)
    xs = torch.randn(5, N, I)
    stream(xs[0])
    state = stream.state
    expected = [stream(x) for x in xs]
    stream.state = state
    for x, y in zip(xs, expected, strict=True):
        assert torch.equal(stream(x), y)
    for one, other in zip(states_of(state), states_of(stream.state), strict=True):
        assert not torch.equal(one, other)
    for s in states_of(stream.state):
        s.zero_()
    after = states_of(stream.state)
    assert all(s.any() for s in after)


def test_reset():
    module = layers("lstm", num_layers=2, learned_initial_state=True)
    torch.nn.init.normal_(module.initial_c)
    stream, x = lstm_fused.stream(module, 4), torch.randn(4, I)
    first = stream(x)
    second = stream(x)
    stream.reset()
    assert torch.equal(stream(x), first)
    for rows in ([1, 3], torch.tensor([1, 3]), torch.tensor([False, True, False, True])):
        stream.reset(rows)
        found = stream(x)
        assert torch.equal(found[1::2], first[1::2])
        assert torch.equal(found[::2], second[::2])
        stream.reset()
        stream(x)
    with pytest.raises(IndexError):
        stream.reset([4])
    torch.nn.init.zeros_(module.initial_c)  # the learned state as it is now
    stream.reset()
    assert not states_of(stream.state)[1].any()


def test_wrong_states():
    stream = lstm_fused.stream(layers("lstm", num_layers=2), N)
    h, c = stream.state
    with pytest.raises(TypeError, match="must be a Tensor or a tuple of them"):
        stream.state = None
    for wrong in (h, (h, c[:1]), (h, c.double()), (h[:, :1], c)):
        with pytest.raises(ValueError, match=r"state must be torch.float32 \(2, 2, 18\), torch"):
            stream.state = wrong
    grown = lstm_fused.stream(layers("gru"), N)
    with pytest.raises(ValueError, match="state must be"):
        grown.state = (h, c)


def test_copies_and_pickles():
    stream, x = lstm_fused.stream(layers("lstm"), N), torch.randn(N, I)
    stream(x)
    for twin in (deepcopy(stream), pickle.loads(pickle.dumps(stream))):
        assert twin.module is not stream.module
        assert repr(twin) == repr(stream)
        assert repr(twin) == f"lstm_fused.stream({stream.module}, batch=2, threads=1)"
        for one, other in zip(twin.state, stream.state, strict=True):
            assert torch.equal(one, other)
    before = stream.state
    assert torch.equal(twin(x), stream(x))
    assert not torch.equal(before[0], stream.state[0])


# The weights.


def swap(module):
    module.weight_hh_l0 = torch.nn.Parameter(module.weight_hh_l0 * 2)


def assign(module):
    state = module.state_dict()
    state["weight_hh_l0"] = state["weight_hh_l0"] * 2
    module.load_state_dict(state, assign=True)


def give_data(module):
    module.weight_hh_l0.data = module.weight_hh_l0.data * 2


CHANGES = {
    "in place": lambda module: module.weight_hh_l0.mul_(2),
    "new data": give_data,
    "swapped": swap,
    "assigned": assign,
    "numpy": lambda module: module.weight_hh_l0.detach().numpy().__imul__(2),
}


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_weight_changes_take_effect(change):
    module = layers("lstm", num_layers=2)
    stream = lstm_fused.stream(module, N)
    state = assert_steps_equal(stream, module, None)
    old = deepcopy(stream)
    change(module)
    assert_steps_equal(stream, module, state)
    x = torch.randn(N, I)
    assert not torch.equal(old(x), stream(x))


def test_weights_of_the_caller_from_c_stay():
    """Memory that the module no longer has is the stream's until its next step from Python."""
    module = layers("lstm")
    stream = lstm_fused.stream(module, N)
    step, x = c_step(stream), torch.randn(N, I)
    expected = lstm_fused.stream(deepcopy(module), N)(x)
    with torch.no_grad():
        module.weight_hh_l0.data = torch.full_like(module.weight_hh_l0, torch.nan)
        module.weight_ih_l0 = torch.nn.Parameter(torch.full((4 * H, I), torch.nan))
    assert torch.equal(step(x), expected)
    stream.reset()
    assert c_step(stream)(x).isnan().all()


def test_functional_call():
    module = layers("gru")
    stream, x = lstm_fused.stream(module, N), torch.randn(N, I)
    first = stream(x)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.module = module

        def forward(self, x):
            return stream(x)

    stream.reset()
    zeros = {f"module.{name}": torch.zeros_like(p) for name, p in module.named_parameters()}
    assert not torch.func.functional_call(Model(), zeros, (x,)).any()
    stream.reset()
    assert torch.equal(stream(x), first)


UNFIT = {
    "shape": lambda m: setattr(m, "weight_hh_l0", torch.nn.Parameter(torch.zeros(4 * H, H + 1))),
    "all shapes": lambda m: grow(m),
    "dtype": lambda m: m.double(),
    "one dtype": lambda m: setattr(m, "bias_hh_l0", torch.nn.Parameter(m.bias_hh_l0.double())),
    "device": lambda m: m.to("meta"),
    "strides": lambda m: setattr(
        m, "weight_hh_l0", torch.nn.Parameter(torch.zeros(H, 4 * H).t(), requires_grad=False)
    ),
    "parametrized": lambda m: parametrizations.weight_norm(m, "weight_hh_l0"),
    "pruned": lambda m: prune.l1_unstructured(m, "weight_hh_l0", 1),
    "subclass": lambda m: setattr(
        m, "weight_hh_l0", torch.nn.Parameter(m.weight_hh_l0.as_subclass(Wrapped))
    ),
}


def grow(module):
    module._parameters.update(layers("lstm", I, H + 1)._parameters)


class Wrapped(torch.Tensor):
    pass


@pytest.mark.parametrize("change", UNFIT.values(), ids=UNFIT)
def test_weights_that_no_longer_fit(change):
    """Until they do again."""
    module = layers("lstm")
    stream = lstm_fused.stream(module, N)
    weights, x = dict(module._parameters), torch.randn(N, I)
    state = assert_steps_equal(stream, module, None)
    change(module)
    for _ in range(2):
        with pytest.raises(RuntimeError):
            stream(x)
        with pytest.raises(RuntimeError):
            stream.c_step()
    if change is UNFIT["dtype"]:
        module.float()
    module._forward_pre_hooks.clear()  # of the pruned one
    module._parameters.update(weights)
    assert_steps_equal(stream, module, state)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16], ids=str)
def test_quantize_after_preparing(dtype):
    module, x = layers("lstm"), torch.randn(N, I)
    stream = lstm_fused.stream(module, N)
    stream(x)
    lstm_fused.quantize_(module, dtype)
    with pytest.raises(RuntimeError, match="parameters of the module itself"):
        stream(x)
    quantized = lstm_fused.stream(module, N)
    quantized(x)
    lstm_fused.dequantize_(module)
    with pytest.raises(RuntimeError, match="a stream needs weights"):
        quantized(x)
    stream(x)


# Errors.


def test_wrong_modules():
    class Own(lstm_fused.GRU):
        def forward(self, x):
            return x

    for module in (torch.nn.LSTM(I, H), torch.nn.Linear(I, H), Own(I, H), None):
        with pytest.raises(TypeError, match="module must be an LSTM|has a forward of its own"):
            lstm_fused.stream(module)
    with pytest.raises(ValueError, match="one direction"):
        lstm_fused.stream(layers("gru", bidirectional=True))
    deep = layers("gru", num_layers=2, dropout=0.5)
    with pytest.raises(ValueError, match="module.eval()"):
        lstm_fused.stream(deep)
    assert_steps_equal(lstm_fused.stream(deep.eval()), deep, None)
    for name, wrong in itertools.product(("batch", "threads"), (0, -1, True, 1.0, None)):
        with pytest.raises(ValueError, match=f"{name} must be an int of at least 1"):
            lstm_fused.stream(layers("gru"), **{name: wrong})
    with pytest.raises(RuntimeError, match="on the CPU"):
        lstm_fused.stream(layers("gru", device="meta"))
    with pytest.raises(RuntimeError, match="neither parametrized nor"):
        lstm_fused.stream(parametrizations.weight_norm(layers("gru"), "weight_hh_l0"))
    with pytest.raises(RuntimeError, match="not been prepared"):
        lstm_fused.streams.Stream.__new__(lstm_fused.streams.Stream)(torch.zeros(1, I))


def wrong_calls():
    x, y = torch.zeros(N, I), torch.zeros(N, H)
    both = torch.zeros(100)
    yield TypeError, "called as", (), {}
    yield TypeError, "called as", (x, y, y), {}
    yield TypeError, "called as", (x, y), {"out": y}
    yield TypeError, "called as", (x,), {"into": y}
    yield TypeError, "x must be a torch.Tensor", (None,), {}
    yield TypeError, "x must be a torch.Tensor", ([0.0] * I,), {}
    yield TypeError, "x must be a torch.Tensor", (x.to("meta"),), {}
    yield TypeError, "x must be a torch.Tensor", (x.as_subclass(Wrapped),), {}
    yield TypeError, "x must be a torch.Tensor", (x.to_sparse(),), {}
    yield TypeError, "out must be a torch.Tensor", (x, "y"), {}
    yield ValueError, r"x has shape \(7\) but must be \(2, 7\)", (x[0],), {}
    yield ValueError, r"x has shape \(1, 2, 7\) but must be \(2, 7\)", (x[None],), {}
    yield ValueError, r"x has shape \(2, 6\)", (x[:, 1:],), {}
    yield ValueError, r"x has shape \(1, 7\)", (x[:1],), {}
    yield ValueError, "x must be float32 as the module is", (x.double(),), {}
    yield ValueError, "x must be float32 as the module is", (x.long(),), {}
    yield ValueError, "x's rows must be contiguous", (torch.zeros(I, N).t(),), {}
    yield ValueError, r"out has shape \(2, 7\) but must be \(2, 18\)", (x, torch.zeros(N, I)), {}
    yield ValueError, "out must be float32", (x, y.half()), {}
    yield ValueError, "out must be contiguous", (x, torch.zeros(H, N).t()), {}
    yield ValueError, "out must be contiguous", (x, y[:1].expand(N, H)), {}
    shared = both[: N * I].view(N, I), both[N * I - 1 :][: N * H].view(N, H)
    yield ValueError, "out must not share memory with x", shared, {}
    yield RuntimeError, "x may require a gradient", (x.clone().requires_grad_(),), {}
    yield RuntimeError, "out may require a gradient", (x, y.clone().requires_grad_()), {}


@pytest.mark.parametrize("case", list(wrong_calls()), ids=lambda case: case[1])
def test_wrong_calls(case):
    error, message, args, options = case
    module = layers("lstm")
    stream = lstm_fused.stream(module, N)
    state = assert_steps_equal(stream, module, None)
    with pytest.raises(error, match=message):
        stream(*args, **options)
    assert_steps_equal(stream, module, state)


def test_memory_side_by_side():
    stream, memory = lstm_fused.stream(layers("lstm"), N), torch.randn(N * (I + H))
    x, y = memory[: N * I].view(N, I), memory[N * I :].view(N, H)
    expected = stream(x)
    stream.reset()
    assert torch.equal(stream(x, out=y), expected)
    wide = torch.zeros(N, I + H)  # rows of x between those of nothing else
    stream.reset()
    assert torch.equal(stream(wide[:, :I]), lstm_fused.stream(stream.module, N)(torch.zeros(N, I)))


def test_gradients_off():
    stream = lstm_fused.stream(layers("lstm"), N)
    x, y = torch.randn(N, I, requires_grad=True), torch.zeros(N, H, requires_grad=True)
    with torch.no_grad():
        assert stream(x, out=y) is y and y.any()
        stream.reset()
        found = stream(x)
    assert torch.equal(found, y) and not found.requires_grad


def test_transforms_are_refused():
    stream, x = lstm_fused.stream(layers("lstm"), N), torch.randn(3, N, I)
    before = stream.state
    with pytest.raises(TypeError, match="in no transform of torch.func"):
        torch.vmap(stream)(x)
    with pytest.raises((TypeError, RuntimeError), match="transform|gradient"):
        torch.func.grad(lambda x: stream(x).sum())(x[0])
    with pytest.raises((TypeError, RuntimeError), match="transform|gradient"):
        torch.func.jvp(stream, (x[0],), (x[0],))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="gradient"):
        stream(forward_ad.make_dual(x[0], x[0]))
    assert all(torch.equal(*pair) for pair in zip(before, stream.state, strict=True))


def test_compiled_programs():
    """A stream is no operator: a compiled program breaks there, and calls it as any function."""
    module = layers("lstm")
    stream = lstm_fused.stream(module, N)

    @torch.compile(backend="eager")
    def program(x):
        return stream(x * 2) + 1

    x = torch.randn(N, I)
    with torch.no_grad():
        assert torch.equal(program(x), module(2 * x[None])[0][0] + 1)
        assert torch.equal(program(x), module(2 * x[None], module(2 * x[None])[1])[0][0] + 1)


# Callers from C, and threads.


def c_step(stream):
    """A step through the C function: x (N, I) to a new y."""
    address, handle = stream.c_step()
    function = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)(
        address
    )

    def step(x):
        y = x.new_empty(stream.batch, states_of(stream.state)[0].shape[-1])
        assert function(handle, x.data_ptr(), y.data_ptr()) == 0
        return y

    return step


@pytest.mark.parametrize("cell", CELLS)
def test_steps_from_c(cell):
    module = layers(cell, num_layers=2)
    stream, twin = lstm_fused.stream(module, N), lstm_fused.stream(module, N)
    step = c_step(stream)
    for _ in range(3):
        x = torch.randn(N, I)
        assert torch.equal(step(x), twin(x))
    assert torch.equal(states_of(stream.state)[0], states_of(twin.state)[0])
    with torch.no_grad():
        module.weight_hh_l0.mul_(2)
    assert torch.equal(step(x), twin(x))


def counted_meanwhile(stream, x, out):
    """How often another Python thread ran during steps, where none is made to let it."""
    count, stop = [0], threading.Event()
    started = threading.Event()

    def run():
        started.set()
        while not stop.is_set():
            count[0] += 1
            time.sleep(0)  # lets the lock go, and waits for it

    interval = sys.getswitchinterval()
    other = threading.Thread(target=run)
    other.start()
    started.wait()
    sys.setswitchinterval(1000)
    try:
        with torch.no_grad():
            before = count[0]
            for _ in range(100):
                stream(x, out)
            found = count[0] - before
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        other.join()
    return found


def test_interpreter_lock_is_released_where_it_pays():
    for width, released in ((16, False), (512, True)):
        stream = lstm_fused.stream(layers("lstm", width, width))
        found = counted_meanwhile(stream, torch.randn(1, width), torch.empty(1, width))
        assert (found > 0) == released


def test_second_thread_is_refused():
    stream, x = lstm_fused.stream(layers("lstm", 1024, 1024)), torch.randn(1, 1024)
    errors, end = [], time.monotonic() + 20

    def run():
        out = torch.empty(1, 1024)
        while not errors and time.monotonic() < end:
            try:
                stream(x, out)
            except RuntimeError as error:
                errors.append(str(error))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors and set(errors) == {"another thread runs a step of this stream"}
    stream(x)


def test_references():
    """None is kept of the tensors of a call, of weights as long as the stream lives."""
    module = layers("lstm")
    stream, x, y = lstm_fused.stream(module, N), torch.randn(N, I), torch.empty(N, H)
    weight = module.weight_hh_l0
    alive = weakref.ref(stream)

    before = [sys.getrefcount(each) for each in (x, y, weight, stream)]
    for _ in range(10):
        stream(x, out=y)
        stream(x)
        for wrong in ((x, x), (y,), (x, None, None)):
            with pytest.raises((TypeError, ValueError)):
                stream(*wrong)
        stream.c_step()
        del wrong
    assert [sys.getrefcount(each) for each in (x, y, weight, stream)] == before
    storage = weakref.ref(weight.untyped_storage())
    del stream, module, weight
    gc.collect()
    assert alive() is None and storage() is None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system does not fork")
def test_forked_process():
    torch.set_num_threads(2)
    stream, x = lstm_fused.stream(layers("lstm", 300, 512), 4, threads=2), torch.randn(4, 300)
    stream(x)
    before = stream.state
    expected = stream(x)
    stream.state = before
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, b"same" if torch.equal(stream(x), expected) else b"other")
        os._exit(0)
    os.close(writer)
    assert os.read(reader, 10) == b"same"
    os.close(reader)
    os.waitpid(child, 0)
