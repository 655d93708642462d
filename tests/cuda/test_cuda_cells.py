"""Layers of described cells with the CUDA kernels emulated, against the CPU's kernels.

Parity of the cells is in test_cuda_emulation.py and test_cuda_sequences.py; here is what their
modules give the operator.
"""

import pytest
import torch

from lstm_fused import cells, cuda, ops, runtime
from lstm_fused.operators import forward_op
from tests.helpers import cell_modules, emulated, loops
from tests.helpers.compare_modules import I, T, changed, draw, states_of

N, H = 4, 6
MODULES = cell_modules.MODULES | {
    "SLSTM": (cells.SLSTM, {"num_heads": 2, "hidden": 32}),  # heads of whole blocks
    # More units than a CTA has threads, and a row that has no space for what forward saves of it.
    "LayerNormLSTM wide": (cells.LayerNormLSTM, {"hidden": 300}),
    "LayerNormLSTM one unit": (cells.LayerNormLSTM, {"hidden": 1}),
    "LayerNormGRU one unit": (cells.LayerNormGRU, {"hidden": 1}),
    "variational": (cells.RegularizedLSTM, {"recurrent_dropout": 0.4, "clip": 0.6}),
    "GRU variational": (cells.RegularizedGRU, {"recurrent_dropout": 0.4, "zoneout": 0.2}),
}


def make(name, **options):
    cls, own = MODULES[name]
    own = dict(own)
    module = cls(I, own.pop("hidden", H), dtype=torch.float64, **own, **options)
    for p in module.parameters():  # some begin as zeros
        torch.nn.init.uniform_(p, -0.5, 0.5)
    return module


def state_of(module):
    """A state (h[, c, ...]) whose numbers are from 1 to 2: an sLSTM divides by one of them."""
    return states_of(changed(lambda s: 1 + torch.rand_like(s), module.init_state(N)))


def given(kernels, cell, run):
    """What run() gives with the CUDA kernels emulated, or with the CPU's."""
    torch.manual_seed(7)  # of masks
    if not kernels:
        return run()
    with emulated.kernels():
        found = run()
        assert (cuda.last_run()["kernel"] == "gemm") == ops.CELLS[cell]["described"]
        return found


@pytest.mark.covering
@pytest.mark.parametrize("resets", (False, True))
@pytest.mark.parametrize("form", loops.FORMS)
@pytest.mark.parametrize("name", MODULES)
def test_modules(name, form, resets):
    """In training where the same masks are drawn for the same rows whoever computes."""
    module = make(name, num_layers=2, bidirectional=True).train(form == "dense")
    call, lengths = loops.FORMS[form]
    x, mask = draw(T, N, I), torch.rand(T, N) < 0.4 if resets else None
    state, reset = state_of(module), state_of(module) if resets else None
    reset = None if isinstance(module, cells.SLSTM) else reset  # it takes two states alone
    leaves = {"x": x, **dict(module.named_parameters())}

    def run():
        args, own = (module, x, state, mask, reset, lengths), module._has_cell_state()
        return loops.results(call, *args, leaves=leaves, cells=own)

    torch.testing.assert_close(*(given(k, module._cell(), run) for k in (True, False)))


@pytest.mark.parametrize("every", (2, 5))
@pytest.mark.parametrize("name", MODULES)
def test_checkpoints(name, every):
    """Of 5 steps, bit for bit what is computed where every step is kept."""
    module, x = make(name, bidirectional=True), draw(T, N, I)
    state = state_of(module)
    leaves = {"x": x, **dict(module.named_parameters())}

    def run(**more):
        return loops.results(loops.dense, module, x, state, leaves=leaves, **more)

    found, wanted = (
        given(True, module._cell(), lambda k=k: run(checkpoint_every=k)) for k in (every, None)
    )
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


@pytest.mark.parametrize("every", (1, 2))
@pytest.mark.parametrize("cell", ("coupled_lstm", "regularized_gru", "slstm"))
def test_input_of_preactivations(cell, every):
    """x is the input's part of the pre-activations, so that W_ih has no columns."""
    info = ops.CELLS[cell]
    rows = info["gates"] * H
    weights = [torch.empty(rows, 0), torch.randn(rows, H), torch.randn(rows), torch.randn(rows)]
    weights += [torch.rand(info["vectors"], H)] if info["vectors"] else []
    weights = [w.double().requires_grad_() for w in weights]
    x = draw(T, N, rows)

    def run():
        masks = [torch.rand(T, N, info["masks"] * H).double()] if info["masks"] else []
        y, ends = ops.layer(x, None, (), [*weights, *masks], cell, save_every=every)
        loss = sum((t * t.detach().cos()).sum() for t in (y, *ends))
        return y, *ends, *torch.autograd.grad(loss, [x, *weights])

    torch.testing.assert_close(*(given(k, cell, run) for k in (True, False)))


@pytest.mark.parametrize("kind", (None, "step"))
def test_plans(kind):
    """As explain shows them."""
    with emulated.kernels():
        cuda.set_plan(kind)
        for cell, shape in (("slstm", (13, 38, 8)), ("layer_norm_lstm", (1, 300, 1))):
            sizes = (cell, torch.float32, 9, 300, 5, 400, 400, 2)
            p = runtime.plan(*sizes, device=torch.device("cuda"))
            assert p.kind == "gemm" and (p.unit_ctas, p.row_groups, p.tile_rows) == shape
            assert str(p).startswith("gemm plan, products by cuBLAS")


def test_cells_of_the_user_have_no_kernels():
    assert cuda.has_cell("slstm") and not cuda.has_cell("my_cell")
    with emulated.kernels(), pytest.raises(RuntimeError, match="unknown cell 999"):
        forward_op(torch.zeros(1, 1, 1), None, None, [], [], 999, 1, False, 0)
