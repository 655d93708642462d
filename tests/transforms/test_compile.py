"""torch.compile and torch.export: one operator for each layer, for any batch and length."""

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim
from torch.library import opcheck
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils._triton import has_triton

import lstm_fused
from lstm_fused import ops
from tests.helpers.compare_modules import state_for, states_of
from tests.helpers.oracle import CELLS, Problem, has_cell_state, on_default_device

pytestmark = pytest.mark.usefixtures("real_device")

FORWARD = torch.ops.lstm_fused.recurrent_forward.default
BACKWARD = torch.ops.lstm_fused.recurrent_backward.default

MODULES = {
    "plain": ("lstm", {}),
    "nobias-batch_first": ("lstm", {"bias": False, "batch_first": True}),
    "proj": ("lstm", {"proj_size": 2}),
    "both": ("lstm", {"bidirectional": True}),
    "deep": ("lstm", {"num_layers": 2, "bidirectional": True, "proj_size": 2}),
    "float64": ("lstm", {"dtype": torch.float64}),
    "bfloat16": ("lstm", {"dtype": torch.bfloat16}),
}
OTHERS = [cell for cell in CELLS if cell != "lstm"]
MODULES |= {cell: (cell, {}) for cell in OTHERS}
MODULES["deep gru"] = "gru", {"num_layers": 2, "bidirectional": True}
PLAIN, DEEP = ["plain", *OTHERS], ["deep", "deep gru"]
SIZES = ((6, 5), (9, 4), (33, 2), (11, 17))  # T, N; none is a size of the modules
LENGTHS = ((4, 6, 2, 5, 1), (9, 3, 7), (8, 8, 8, 8), (1, 2, 3, 5, 4, 2, 12))


class Graphs:
    """A torch.compile backend that runs graphs as they are and counts the operators in them."""

    def __init__(self):
        self.forward, self.backward = [], []
        self.compile = aot_autograd(
            fw_compiler=self.keep(self.forward), bw_compiler=self.keep(self.backward)
        )

    @staticmethod
    def keep(graphs):
        def compiler(module, _inputs):
            graphs.append([n.target for n in module.graph.nodes if n.op == "call_function"])
            return make_boxed_func(module.forward)

        return compiler

    def __call__(self, module, inputs):
        return self.compile(module, inputs)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make(name):
    cell, options = MODULES[name]
    kind, more = CELLS[cell]
    return getattr(lstm_fused, kind)(3, 7, **more | options)


def input_of(module, T, N):
    shape = (N, T, 3) if module.batch_first else (T, N, 3)
    return torch.randn(shape, dtype=module.weight_ih_l0.dtype)


def state_of(module, N):
    """The states of N rows, as a tuple."""
    given = states_of(state_for(module, N, module.weight_ih_l0.dtype))
    return tuple(s.detach() for s in given)


def as_hx(states):
    """What the module takes: no states, one tensor, or a pair."""
    return (states if len(states) > 1 else states[0]) if states else None


def leaves(*tensors):
    return [t.clone().requires_grad_() for t in tensors]


def flat(out):
    y, ends = out
    return [y.data if isinstance(y, PackedSequence) else y, *states_of(ends)]


def gradients(call, module, inputs):
    out = flat(call(*inputs))
    loss = sum((o * torch.arange(o.numel()).view(o.shape).cos()).sum() for o in out)
    return out, torch.autograd.grad(loss, [*inputs, *module.parameters()])


@pytest.mark.parametrize("name", MODULES)
def test_compiles_to_one_operator_a_layer(name):
    module, graphs = make(name), Graphs()

    def call(x, *states):
        return module(x * 2, as_hx(states))

    compiled = torch.compile(call, backend=graphs, fullgraph=True, dynamic=True)
    for T, N in SIZES:
        inputs = leaves(input_of(module, T, N), *state_of(module, N))
        torch.testing.assert_close(
            gradients(compiled, module, inputs), gradients(call, module, inputs)
        )
    assert [graph.count(FORWARD) for graph in graphs.forward] == [module.num_layers]
    assert [graph.count(BACKWARD) for graph in graphs.backward] == [module.num_layers]
    assert len(graphs.forward[0]) < 40  # the length of the sequence is nowhere in it


@pytest.mark.parametrize("name", PLAIN + DEEP)
def test_compiles_without_gradients(name):
    module, graphs = make(name).requires_grad_(False), Graphs()
    compiled = torch.compile(module, backend=graphs, fullgraph=True, dynamic=True)
    for T, N in SIZES:
        x = input_of(module, T, N)
        torch.testing.assert_close(compiled(x), module(x))
    assert [graph.count(FORWARD) for graph in graphs.forward] == [module.num_layers]


@pytest.mark.parametrize("name", ["both", *OTHERS])
def test_automatic_dynamic_shapes(name):
    """Without dynamic=True torch compiles once for the first size and once for all others."""
    module = make(name)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    for N in (5, 4, 11, 2):
        for T in (6, 9, 33, 12):
            x = input_of(module, T, N)
            torch.testing.assert_close(compiled(x), module(x))
    assert counter.frame_count <= 3  # sizes as they were, another T, another N


@pytest.mark.covering(goals=lambda name, hx: {name, hx})
@pytest.mark.parametrize("name", [*PLAIN, "proj", *DEEP])
@pytest.mark.parametrize("hx", [True, False])
def test_compiles_packed(name, hx):
    module, graphs = make(name), Graphs()

    def call(data, *states):
        rows = PackedSequence(data, *packed[1:])
        return module(rows, as_hx(states))

    def compiled_call(data, *states):
        return compiled(PackedSequence(data, *packed[1:]), as_hx(states))

    compiled = torch.compile(module, backend=graphs, fullgraph=True, dynamic=True)
    for lengths in LENGTHS:
        x = input_of(module, max(lengths), len(lengths))
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        inputs = leaves(packed.data, *(state_of(module, len(lengths)) if hx else ()))
        torch.testing.assert_close(
            gradients(compiled_call, module, inputs), gradients(call, module, inputs)
        )
    assert {graph.count(FORWARD) for graph in graphs.forward} == {module.num_layers}
    assert {graph.count(BACKWARD) for graph in graphs.backward} == {module.num_layers}
    assert len(graphs.forward) == 1


@pytest.mark.covering(goals=lambda real_device: {real_device})
@pytest.mark.parametrize("name", PLAIN)
def test_compiles_with_inductor(name, real_device):
    if real_device == "cuda" and not has_triton():
        pytest.skip("no Triton, which Inductor writes CUDA's kernels in")
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), make(name))

    def call(x):
        y, ends = model(x.sin())
        return y.relu(), ends

    compiled = torch.compile(call, fullgraph=True, dynamic=True)
    for T, N in SIZES[:2]:
        inputs = leaves(torch.randn(T, N, 3))
        torch.testing.assert_close(
            gradients(compiled, model, inputs), gradients(call, model, inputs)
        )


def test_compiles_a_replaced_model():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(10, 3)
            self.lstm = torch.nn.LSTM(3, 7, 2)
            self.gru = torch.nn.GRU(7, 7)
            self.rnn = torch.nn.RNN(7, 7)
            self.cells = torch.nn.ModuleList(
                [torch.nn.LSTMCell(7, 7), torch.nn.GRUCell(7, 7), torch.nn.RNNCell(7, 7)]
            )
            self.out = torch.nn.Linear(7, 10)

        def forward(self, words):
            x = self.rnn(self.gru(self.lstm(self.embed(words))[0])[0])[0]
            lstm, gru, rnn = self.cells
            return self.out(rnn(gru(lstm(x[-1])[0])))

    model, graphs = Model(), Graphs()
    words = torch.randint(10, (6, 4))
    expected = model(words)
    compiled = torch.compile(lstm_fused.replace(model), backend=graphs, fullgraph=True)
    torch.testing.assert_close(compiled(words), expected)
    assert graphs.forward[0].count(FORWARD) == 7


def test_torch_modules_still_refuse_compile():
    """Compiling ours does not change how Dynamo treats torch.nn's modules."""
    for name in PLAIN:
        module = make(name)
        torch.compile(module, backend="eager", fullgraph=True)(torch.randn(2, 2, 3))
        assert not torch._dynamo.config.allow_rnn
        theirs = torch.compile(lstm_fused.restore(module), backend="eager", fullgraph=True)
        with pytest.raises(torch._dynamo.exc.Unsupported):
            theirs(torch.randn(2, 2, 3))


@pytest.mark.covering(goals=lambda name, hx: {name, hx})
@pytest.mark.parametrize("name", [*PLAIN, "nobias-batch_first", *DEEP])
@pytest.mark.parametrize("hx", [True, False])
def test_exports(name, hx):
    module = make(name)
    at = 0 if module.batch_first else 1
    N, T = Dim("N"), Dim("T")

    def arguments(t, n):
        x = input_of(module, t, n)
        return (x, as_hx(state_of(module, n))) if hx else (x,)

    of_states = as_hx(tuple({1: N} for _ in state_of(module, 1)))
    shapes = ({at: N, 1 - at: T}, *([of_states] if hx else []))
    program = torch.export.export(module, arguments(6, 5), dynamic_shapes=shapes)
    for exported in (program, program.run_decompositions()):
        targets = [n.target for n in exported.graph.nodes if n.op == "call_function"]
        assert targets.count(FORWARD) == module.num_layers
        for t, n in (*SIZES, (1, 1)):
            given = arguments(t, n)
            torch.testing.assert_close(exported.module()(*given), module(*given))


def test_export_survives_saving(tmp_path):
    module, x = make("deep"), torch.randn(6, 5, 3)
    path = tmp_path / "lstm.pt2"
    torch.export.save(torch.export.export(module, (x,)), path)
    torch.testing.assert_close(torch.export.load(path).module()(x), module(x))


SAMPLES = {  # T, N, or lengths; directions, bias, projection, states, dtype
    "dense": ((6, 5), 1, True, 0, True, torch.float32),
    "no states": ((6, 5), 1, True, 0, False, torch.float32),
    "no bias": ((6, 5), 2, False, 0, True, torch.float32),
    "projected": ((6, 5), 1, True, 3, True, torch.float64),
    "both directions": ((6, 5), 2, True, 2, False, torch.float64),
    "one step": ((1, 1), 1, True, 0, True, torch.float32),
    "no rows": ((4, 0), 1, True, 0, True, torch.float32),
    "packed": ([7, 4, 2], 1, True, 0, True, torch.float32),
    "packed, no states": ([7, 4, 2], 1, True, 0, False, torch.float32),
    "packed projected": ([7, 4, 4, 1], 2, True, 3, True, torch.float64),
    "bfloat16": ((6, 5), 2, True, 2, True, torch.bfloat16),
    "float16": ([5, 3], 1, True, 0, True, torch.float16),
}
OF_EVERY_CELL = ("dense", "no bias", "packed, no states", "float16")
each_sample = pytest.mark.parametrize(
    "cell, name",
    [("lstm", name) for name in SAMPLES]
    + [(cell, name) for cell in OTHERS for name in OF_EVERY_CELL],
)


def each_cell_and_sample(cell, name):
    return {cell, name}


def sample(cell, name):
    """x, batch_sizes, state0, weights and the number of directions."""
    shape, D, bias, proj, states, dtype = SAMPLES[name]
    p = Problem(1, 1, 3, 17, dtype, directions=D, bias=bias, proj=proj, cell=cell)
    module = on_default_device(p).module(lstm_fused)
    if isinstance(shape, list):
        padded = torch.randn(shape[0], len(shape), 3, dtype=dtype)
        x, batch_sizes, *_ = pack_padded_sequence(padded, shape)
        N = len(shape)
    else:
        x, batch_sizes, N = torch.randn(*shape, 3, dtype=dtype), None, shape[1]
    state0 = state_of(module, N) if states else ()
    return x, batch_sizes, list(state0), [w.detach() for w in module.parameters()], D


@pytest.mark.covering(goals=each_cell_and_sample)
@pytest.mark.parametrize("save_every", [1, 0])
@each_sample
def test_opcheck_forward(cell, name, save_every):
    x, batch_sizes, state0, weights, D = sample(cell, name)
    kind = ops.CELLS[cell]["id"]
    opcheck(FORWARD, (x, batch_sizes, None, state0, weights, kind, D, False, save_every))


@pytest.mark.covering(goals=lambda cell, name: {cell, SAMPLES[name][0].__class__})
@each_sample
def test_opcheck_backward(cell, name):
    x, batch_sizes, state0, weights, D = sample(cell, name)
    kind = ops.CELLS[cell]["id"]
    call = (x, batch_sizes, None, state0, weights)
    y, h_n, c_n, gates, cells = FORWARD(*call, kind, D, False, 1)
    count = len(weights)
    d_out = [torch.randn_like(t) for t in (y, h_n)]
    d_out.append(torch.randn_like(c_n) if has_cell_state(cell) else None)
    masks = {
        "all": (d_out, [True] * 2 + [has_cell_state(cell)] + [True] * count),
        "weights only": ([d_out[0], None, None], [False] * 3 + [True] * count),
        "inputs only": ([None, *d_out[1:]], [True] * 2 + [has_cell_state(cell)] + [False] * count),
        "x only": ([d_out[0], None, None], [True] + [False] * (2 + count)),
    }
    for (dy, dh_n, dc_n), mask in masks.values():
        given = (*call, y, gates, cells, dy, dh_n, dc_n, kind, D, 1)
        for preacts in (False, True):
            opcheck(BACKWARD, (*given, [*mask, preacts]))


@pytest.mark.covering(goals=each_cell_and_sample)
@each_sample
def test_opcheck_tangents(cell, name):
    x, batch_sizes, state0, weights, D = sample(cell, name)
    kind = ops.CELLS[cell]["id"]
    call = (x, batch_sizes, None, state0, weights)
    y, _, _, gates, cells = FORWARD(*call, kind, D, False, 1)
    moves = [t.cos() for t in (x, *state0, *weights)]
    if len(weights) // D % 2 == 0:  # without a projection
        given = (*call, y, gates, cells, moves, kind, D)
        opcheck(torch.ops.lstm_fused.recurrent_jvp.default, given)
