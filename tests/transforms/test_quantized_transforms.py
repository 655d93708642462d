"""Layers with int8 and bfloat16 weights under torch's transforms, compiler and exporters."""

import io
import itertools
import warnings

import pytest
import torch
from torch.func import functional_call, grad, jvp, stack_module_state, vjp, vmap
from torch.utils.flop_counter import FlopCounterMode

import lstm_fused
from lstm_fused import by_reference, inference, operators, ops, padded, panels, quantized_ops
from tests.helpers.oracle import CELLS, has_cell_state
from tests.helpers.quantized import FORMATS, module

every_format = pytest.mark.parametrize("dtype", FORMATS, ids=str)
every_cell = pytest.mark.parametrize("cell", CELLS)
FEW = {("lstm", torch.int8), ("gru", torch.bfloat16)}
few = pytest.mark.parametrize(
    ("cell", "dtype"),
    [
        pytest.param(*case, marks=[] if case in FEW else [pytest.mark.full])
        for case in itertools.product(CELLS, FORMATS)
    ],
    ids=str,
)
QUANTIZED = "lstm_fused.quantized_forward.default"
# Of float32 with the values of the weights: int8 rounds activations as well.
CLOSE = {torch.int8: {"rtol": 0, "atol": 1e-2}, torch.bfloat16: {"rtol": 1e-5, "atol": 1e-6}}


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()


def layers(cell, dtype, **options):
    torch.manual_seed(0)
    more = {"num_layers": 2, "bidirectional": True} | options
    if has_cell_state(cell):
        more = {"proj_size": 5} | more
    return module(cell, 7, 20, dtype, **more).eval()


def output(q, x, *args, **options):
    return q(x, *args, **options)[0]


def calls(T=6, N=3):
    """{form: (positional arguments, keywords)}."""
    x = torch.randn(T, N, 7)
    resets = torch.rand(T, N) < 0.3
    return {
        "dense": ((x,), {}),
        "resets": ((x,), {"resets": resets}),
        "lengths": ((x,), {"lengths": torch.tensor([T, 0, 2])[:N]}),
        "documents": ((x[:, 0],), {"cu_seqlens": torch.tensor([0, 2, T])}),
    }


# torch.func.


@every_format
@every_cell
@pytest.mark.parametrize("form", ["dense", "resets", "documents"])
def test_vmap_over_inputs(cell, dtype, form):
    q = layers(cell, dtype)
    (x,), options = calls()[form]
    xs = torch.stack([x, x.flip(0), 2 * x])
    found = vmap(lambda x: output(q, x, **options))(xs)
    assert torch.equal(found, torch.stack([output(q, x, **options) for x in xs]))


@every_format
@every_cell
def test_vmap_over_weights_and_states(cell, dtype):
    """An ensemble, each from its own state."""
    models = [layers(cell, dtype) for _ in range(3)]
    for k, q in enumerate(models):
        torch.manual_seed(k)
        q.load_state_dict(module(cell, 7, 20, dtype, **options_of(q)).state_dict())
    params, buffers = stack_module_state(models)
    x = torch.randn(4, 2, 7)
    ends = [q(x)[1] for q in models]
    hx = tuple(map(torch.stack, zip(*ends, strict=True))) if has_cell_state(cell) else None
    hx = torch.stack(ends) if hx is None else hx

    def run(params, buffers, hx):
        return functional_call(models[0], (params, buffers), (x, hx))[0]

    found = vmap(run)(params, buffers, hx)
    expected = torch.stack([output(q, x, h) for q, h in zip(models, ends, strict=True)])
    assert torch.equal(found, expected)
    assert not torch.equal(found[0], found[1])


def options_of(q):
    names = ("num_layers", "bidirectional") + (("proj_size",) if q.proj_size else ())
    return {name: getattr(q, name) for name in names}


@pytest.mark.parametrize("transform", ["backward", "grad", "vjp", "jvp", "vmap of grad"])
@every_format
def test_derivatives_raise(dtype, transform):
    q, x = layers("lstm", dtype), torch.randn(4, 2, 7)

    def loss(x):
        return output(q, x).sum()

    calls = {
        "backward": lambda: loss(x.clone().requires_grad_()).backward(),
        "grad": lambda: grad(loss)(x),
        "vjp": lambda: vjp(loss, x)[1](torch.tensor(1.0)),
        "jvp": lambda: jvp(loss, (x,), (x,)),
        "vmap of grad": lambda: vmap(grad(loss))(torch.stack([x, x])),
    }
    with pytest.raises(RuntimeError, match="for inference.*dequantize_"):
        calls[transform]()


def test_derivatives_of_other_parts():
    """A layer whose result does not count stands in no way, nor one behind detach."""
    q, x = layers("gru", torch.int8), torch.randn(4, 2, 7, requires_grad=True)
    y = output(q, x)
    (x.square().sum() + y.detach().sum()).backward()
    torch.testing.assert_close(x.grad, 2 * x.detach())


# torch.compile.


@pytest.mark.parametrize(
    ("form", "dtype"), [(form, FORMATS[k % 2]) for k, form in enumerate(calls())], ids=str
)
def test_compiled(form, dtype):
    q = layers("lstm", dtype)
    (x,), options = calls()[form]
    run = torch.compile(q, fullgraph=True, backend="aot_eager")
    assert torch.equal(output(run, x, **options), output(q, x, **options))
    assert torch.equal(output(run, x.half(), **options), output(q, x.half(), **options))


@every_cell
def test_compiled_steps(cell):
    q, x = module(cell, 7, 20, torch.int8, step=True), torch.randn(3, 7)
    run = torch.compile(q, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(x, run(x)), q(x, q(x)), rtol=0, atol=0)


def test_compiled_sees_weights_loaded_later():
    q, other = (module("lstm", 7, 20, torch.int8) for _ in range(2))
    x = torch.randn(4, 2, 7)
    run = torch.compile(q, fullgraph=True, backend="aot_eager")
    before = output(run, x)
    q.load_state_dict(other.state_dict())
    assert torch.equal(output(run, x), output(other, x)) and not torch.equal(output(run, x), before)


@pytest.mark.full
def test_compiled_by_inductor_with_a_gradient_upstream():
    """Raises where backward runs, not where the compiler traces it."""
    model = torch.nn.Sequential(torch.nn.Linear(7, 7), layers("lstm", torch.int8))
    x = torch.randn(4, 2, 7)
    run = torch.compile(model, fullgraph=True)
    y = output(run, x)
    torch.testing.assert_close(y, output(model, x))
    with pytest.raises(RuntimeError, match="for inference.*dequantize_"):
        y.sum().backward()


def test_compiled_with_a_gradient_upstream():
    q, x = layers("gru", torch.bfloat16), torch.randn(4, 2, 7, requires_grad=True)
    y = output(torch.compile(q, fullgraph=True, backend="aot_eager"), x)
    assert torch.equal(y, output(q, x))
    with pytest.raises(RuntimeError, match="for inference.*dequantize_"):
        y.sum().backward()


# The operator.


@every_format
@every_cell
@pytest.mark.parametrize("rows", ["dense", "packed", "documents"])
def test_operator_by_torchs_own_checks(cell, dtype, rows):
    q = module(cell, 7, 20, dtype, bidirectional=True)
    sizes = (20, 0, ops.CELLS[cell]["id"], 2, has_cell_state(cell))
    x, batch_sizes, resets = torch.randn(4, 3, 7), None, None
    if rows != "dense":
        x = torch.randn(9, 7)
        batch_sizes = torch.tensor([3, 3, 2, 1] if rows == "packed" else [[0, 4, 4, 9]])
    else:
        resets = (torch.rand(4, 3, 1) < 0.3).to(torch.uint8)
    states = [torch.randn(2, 3, 20) for _ in range(q._states)]
    args = (x, batch_sizes, resets, states, q._weights(), *sizes)
    torch.library.opcheck(operators.quantized_op, args)


@every_format
@pytest.mark.parametrize("form", calls())
@every_cell
def test_devices_without_the_kernel(monkeypatch, cell, dtype, form):
    """Where there is none, the weights are dequantized for the float kernel."""
    q = layers(cell, dtype)
    (x,), options = calls()[form]
    expected = q(x, **options)
    op = operators.run_directly
    seen = []

    def run(called, *args):
        if called is operators.quantized_op:
            seen.append(called)
            return quantized_ops._by_dequantizing(*args)
        return op(called, *args)

    monkeypatch.setattr(quantized_ops, "run_directly", run)
    monkeypatch.setattr(inference, "infer", lambda *args: None)  # the CPU's fast path
    with torch.no_grad():
        found = q(x, **options)
    assert len(seen) == 2
    torch.testing.assert_close(found, expected, **CLOSE[dtype])


@every_format
@every_cell
def test_lengths_that_stay_on_a_device(cell, dtype):
    """All steps are run and the padding dropped, as on a CUDA device: the same bits."""
    q = module(cell, 7, 20, dtype, bidirectional=True)
    x, lengths = torch.randn(6, 4, 7), torch.tensor([3, 6, 0, 1])
    state = [torch.randn(2, 4, 20) for _ in range(q._states)]
    args = x, lengths, state, q._weights(), cell, 2
    found, expected = (
        quantized_ops.LAYERS[run](*args, sizes=(20, 0), cell_states=has_cell_state(cell))
        for run in (padded.masked, padded.layer)
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@every_format
@every_cell
def test_reference(cell, dtype):
    """For resets and the like where neither the kernels nor torch.nn can run."""
    q = module(cell, 7, 20, dtype, bidirectional=True)
    resets = (torch.rand(6, 4, 1) < 0.3).to(torch.uint8)
    args = torch.randn(6, 4, 7), None, (), q._weights(), cell, 2
    found, expected = (
        quantized_ops.LAYERS[run](*args, sizes=(20, 0), resets=resets)
        for run in (by_reference.layer, ops.layer)
    )
    torch.testing.assert_close(found, expected, **CLOSE[dtype])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("proj_size", [0, 5])
@every_format
def test_plain_weights(dtype, bias, proj_size):
    """The operator's weights as those of the module, by torch's names."""
    q = module("lstm", 7, 20, dtype, bias=bias, bidirectional=True, proj_size=proj_size)
    found = panels.plain_weights(q._weights(), 0, 2, 7, 20, proj_size)
    expected = [getattr(q, name) for name in q._flat_weights_names]
    assert len(found) == len(expected)
    assert all(map(torch.equal, found, expected))


@every_format
def test_flops(dtype):
    """Those of the panels, whose units are padded to 16."""
    q, x = module("lstm", 32, 64, dtype), torch.randn(5, 3, 32)
    plain = lstm_fused.LSTM(32, 64)
    counts = []
    for layer in (q, plain):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            # Past the fast path, which no counter sees.
            layer(x, resets=torch.zeros(5, 3, dtype=torch.bool))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


# Exports.


@few
def test_exported_program(cell, dtype):
    """Quantized, and loaded from a file."""
    q = layers(cell, dtype)
    T, N = torch.export.Dim("T", min=2), torch.export.Dim("N", min=2)
    x = torch.randn(6, 3, 7)
    program = torch.export.export(q, (x,), dynamic_shapes={"input": {0: T, 1: N}})
    found = [str(n.target) for n in program.graph.nodes if "fused" in str(n.target)]
    assert found == [QUANTIZED] * 2
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    run = torch.export.load(file).module()
    for given in (x, torch.randn(3, 5, 7)):
        assert torch.equal(output(run, given), output(q, given))


@few
def test_decompositions(cell, dtype):
    q, x = layers(cell, dtype), torch.randn(6, 3, 7)
    program = torch.export.export(q, (x,)).run_decompositions(lstm_fused.decompositions())
    assert not [n for n in program.graph.nodes if "lstm_fused" in str(n.target)]
    torch.testing.assert_close(output(program.module(), x), output(q, x), **CLOSE[dtype])


@pytest.mark.full
@every_format
def test_aotinductor(dtype, tmp_path):
    q, x = layers("lstm", dtype), torch.randn(6, 3, 7)
    with torch.no_grad():
        program = torch.export.export(q, (x,))
        path = tmp_path / "model.pt2"
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))
        run = torch._inductor.aoti_load_package(str(path))
        assert torch.equal(output(run, x), output(q, x))


EXPORTERS = ("dynamo", "traced", "program")
QUICK = {
    ("lstm", torch.int8, "dynamo", True),
    ("gru", torch.bfloat16, "dynamo", False),
    ("gru", torch.int8, "traced", True),
    ("lstm", torch.bfloat16, "traced", False),
}


@pytest.mark.parametrize(
    ("cell", "dtype", "exporter", "lengths"),
    [
        pytest.param(*case, marks=[] if case in QUICK else [pytest.mark.full])
        for case in itertools.product(CELLS, FORMATS, EXPORTERS, (True, False))
    ],
    ids=str,
)
def test_onnx(cell, dtype, exporter, lengths, tmp_path):
    """The graph is float32, with the values that the weights have."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from tests.transforms.test_onnx import export

    q, x = layers(cell, dtype), torch.randn(6, 3, 7)
    args = (x, None, torch.tensor([6, 0, 2])) if lengths else (x,)
    run = export(q, args, tmp_path / "model.onnx", exporter)
    found = run(*(t for t in args if t is not None))
    torch.testing.assert_close(found[0], output(q, *args), **CLOSE[dtype])


@every_format
def test_traced_by_torch_jit(dtype):
    """Torch's own layer with the values of the weights, for programs without lstm_fused."""
    q, x = layers("lstm", dtype), torch.randn(6, 3, 7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = torch.jit.trace(q, (x,), check_trace=False)
    assert "lstm_fused::" not in str(run.inlined_graph)
    torch.testing.assert_close(output(run, x), output(q, x), **CLOSE[dtype])


@every_format
def test_fx_tracing_keeps_the_module(dtype):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = layers("gru", dtype)

        def forward(self, x):
            return self.rnn(x)[0] * 2

    model, x = Model(), torch.randn(6, 3, 7)
    traced = torch.fx.symbolic_trace(model)
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["rnn"]
    assert torch.equal(traced(x), model(x))
