"""gradient_flow agrees with autograd through torch.nn's cells called step by step; its errors."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import lstm_fused
from lstm_fused import runtime
from lstm_fused.testing import tolerance
from tests.helpers.compare_modules import each_cell, fitting
from tests.helpers.oracle import CELLS, has_cell_state

pytestmark = pytest.mark.usefixtures("real_device")

T, N, I, H = 6, 3, 4, 5  # noqa: E741

OPTIONS = {
    "plain": {},
    "layers": {"num_layers": 2},
    "both": {"num_layers": 2, "bidirectional": True},
    "no bias": {"bias": False},
    "batch_first": {"batch_first": True},
    "float64": {"dtype": torch.float64},
    # Masks are drawn by dtype, and the cells are in float64.
    "dropout": {"num_layers": 2, "dropout": 0.5, "dtype": torch.float64},
}


def make(source, cell, **options):
    name, more = CELLS[cell]
    return getattr(source, name)(I, H, **more | fitting(cell, options))


def states_for(module, cell, x):
    rows = module.num_layers * (2 if module.bidirectional else 1)
    size = (rows, x.shape[0 if module.batch_first else 1], H)
    h, c = (torch.randn(size, dtype=x.dtype) for _ in range(2))
    return (h, c) if has_cell_state(cell) else h


def cell_of(module, row, width):
    """torch.nn's cell of one layer and direction, in float64, with the module's weights."""
    kind = {nn.LSTM: nn.LSTMCell, nn.GRU: nn.GRUCell, nn.RNN: nn.RNNCell}
    base = next(k for k in kind if isinstance(module, k))
    more = {"nonlinearity": module.nonlinearity} if base is nn.RNN else {}
    with torch.random.fork_rng(devices=[]):
        cell = kind[base](width, H, module.bias, dtype=torch.float64, device="cpu", **more)
    cell.to(module.weight_ih_l0.device)
    layers = [getattr(module, name) for name in module._all_weights[row]]
    with torch.no_grad():
        for parameter, weight in zip(cell.parameters(), layers, strict=True):
            parameter.copy_(weight)
    return cell


def by_cells(module, x, hx, loss):
    """(T, L*D, N, H) in float64: the cells in turn, retain_grad on each state, and backward."""
    directions = 2 if module.bidirectional else 1
    x = x.double().transpose(0, 1) if module.batch_first else x.double()
    kept = []
    for row in range(module.num_layers * directions):
        if row % directions == 0:
            below = x if not row else torch.cat([torch.stack(h) for h in kept[-directions:]], -1)
            if row:
                below = nn.functional.dropout(below, module.dropout, module.training)
        cell = cell_of(module, row, below.shape[-1])
        start = hx if isinstance(hx, tuple) else (hx,)
        state = tuple(s[row].double() for s in start)
        hs = [None] * T
        for t in reversed(range(T)) if row % directions else range(T):
            state = cell(below[t], state if len(state) > 1 else state[0])
            state = state if isinstance(state, tuple) else (state,)
            hs[t] = state[0]
            hs[t].retain_grad()
        kept.append(hs)
    output = torch.cat([torch.stack(h) for h in kept[-directions:]], dim=-1)
    loss(output.transpose(0, 1) if module.batch_first else output).backward()
    zero = torch.zeros(N, H, dtype=torch.float64)
    return torch.stack(
        [torch.stack([zero if h[t].grad is None else h[t].grad for h in kept]) for t in range(T)]
    )


def weighted(y):
    """Every element counts, each by another weight, and no gradient is a constant."""
    weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)
    return (weights * y.square()).sum()


def flow_of(module, x, hx):
    torch.manual_seed(7)  # dropout draws the same masks each time
    return lstm_fused.gradient_flow(module, x, hx, loss=weighted)


@each_cell
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_agrees_with_unrolled_cells(options, cell):
    dtype = options.get("dtype", torch.float32)
    theirs, ours = (make(source, cell, **options) for source in (nn, lstm_fused))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn((N, T, I) if theirs.batch_first else (T, N, I), dtype=dtype)
    hx = states_for(theirs, cell, x)
    torch.manual_seed(7)
    exact = by_cells(theirs, x, hx, weighted)
    largest = exact.abs().max().item()
    baseline = flow_of(theirs, x, hx)
    found = flow_of(ours, x, hx)
    assert baseline.dtype is found.dtype is dtype
    torch_error = tolerance.error_of(baseline, exact)
    assert torch_error <= tolerance.allowed("d_h0", dtype, 0, largest)
    assert tolerance.error_of(found, exact) <= tolerance.allowed(
        "d_h0", dtype, torch_error, largest
    )


@each_cell
def test_fused_steps_run_fused(cell):
    make(lstm_fused, cell)(torch.randn(T, N, I))
    assert runtime.last_run()["pass"] == "forward"
    lstm_fused.gradient_flow(make(lstm_fused, cell), torch.randn(T, N, I))
    assert runtime.last_run()["pass"] == "backward"


@each_cell
@pytest.mark.parametrize("batch_first", (False, True))
def test_loss_left_out_is_the_sum_of_the_last_output(cell, batch_first):
    module = make(lstm_fused, cell, batch_first=batch_first)
    x = torch.randn((N, T, I) if batch_first else (T, N, I))
    flow = lstm_fused.gradient_flow(module, x)
    torch.testing.assert_close(flow[-1], torch.ones(1, N, H), rtol=0, atol=0)
    last = lstm_fused.gradient_flow(
        module, x, loss=lambda y: (y[:, -1] if batch_first else y[-1]).sum()
    )
    torch.testing.assert_close(flow, last, rtol=0, atol=0)


def test_projection():
    # The whole layer called on the steps after t, its h_0 the h_t in question.
    module = lstm_fused.LSTM(I, H, proj_size=2)
    x = torch.randn(T, N, I)
    flow = lstm_fused.gradient_flow(module, x)
    assert flow.shape == (T, 1, N, 2)
    _, (h, c) = module(x[:2])
    h = h.detach().requires_grad_()
    y, _ = module(x[2:], (h, c))
    (expected,) = torch.autograd.grad(y[-1].sum(), h)
    torch.testing.assert_close(flow[1], expected)


def test_unbatched_and_no_side_effects(real_device):
    states = [torch.get_rng_state, *([torch.cuda.get_rng_state] if real_device == "cuda" else [])]
    module = lstm_fused.GRU(I, H, num_layers=2, bidirectional=True).requires_grad_(False)
    x = torch.randn(T, I)
    random = [state() for state in states]
    with torch.inference_mode():
        flow = lstm_fused.gradient_flow(module, x)
    assert flow.shape == (T, 4, H)
    batched = lstm_fused.gradient_flow(module, x[:, None])
    torch.testing.assert_close(flow, batched[:, :, 0], rtol=0, atol=0)
    assert all(torch.equal(old, state()) for old, state in zip(random, states, strict=True))
    assert all(p.grad is None for p in module.parameters())
    assert not x.requires_grad


def test_zero_gradient_at_steps_outside_the_loss():
    flow = lstm_fused.gradient_flow(nn.RNN(I, H), torch.randn(T, N, I), loss=lambda y: y[2].sum())
    assert flow[3:].eq(0).all()
    assert flow[:3].ne(0).any(-1).all()


def draw(*shape):
    return torch.randn(*shape or (T, N, I))


def packed():
    return pack_padded_sequence(draw(T, 1, I), [T])


@pytest.mark.parametrize(
    "error, kind, input, options",
    [
        (TypeError, nn.Linear, draw, {}),
        (TypeError, nn.GRU, packed, {}),
        (ValueError, nn.GRU, lambda: draw(0, N, I), {}),
        (ValueError, nn.GRU, draw, {"loss": lambda y: y[-1]}),
        (ValueError, nn.GRU, draw, {"loss": lambda y: 1.0}),
        (ValueError, nn.GRU, draw, {"loss": lambda y: y.detach().sum()}),
        (RuntimeError, nn.GRU, lambda: draw(T, N, I + 1), {}),
        (RuntimeError, lstm_fused.GRU, lambda: draw(T, N, I + 1), {}),
        (RuntimeError, nn.GRU, draw, {"hx": (2, N, H)}),
        (ValueError, nn.GRU, lambda: draw(I), {}),
    ],
)
def test_error_messages(error, kind, input, options):
    if "hx" in options:
        options = {"hx": draw(*options["hx"])}
    with pytest.raises(error):
        lstm_fused.gradient_flow(kind(I, H), input(), **options)


def begins_at(*steps, rows=N):
    mask = torch.zeros(T, rows, dtype=torch.bool)
    mask[list(steps)] = True
    return mask


@each_cell
@pytest.mark.parametrize("library", (nn, lstm_fused), ids=("torch.nn", "ours"))
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
def test_resets_are_separate_sequences(options, library, cell):
    """Each part by itself, from the initial state or that of the reset, by its direction."""
    module = make(library, cell, dtype=torch.float64, **options)
    x = torch.randn(T, N, I, dtype=torch.float64)
    directions = 2 if module.bidirectional else 1
    hx, reset = (states_for(module, cell, x) for _ in range(2))

    def mixed(starts):
        """Per direction the states of one of the two, as hx."""
        pairs = zip(states(hx), states(reset), strict=True)
        found = []
        for pair in pairs:
            each = [pair[starts[k % directions]][k] for k in range(len(pair[0]))]
            found.append(torch.stack(each))
        return tuple(found) if len(found) > 1 else found[0]

    def states(given):
        return given if isinstance(given, tuple) else (given,)

    def loss(y):
        return y.square().sum()

    # Reads the parts 0:2, 2:3 and 3:T; the forward direction begins the first with hx, the reverse
    # direction the last.
    expected = [
        lstm_fused.gradient_flow(module, part, mixed(starts), loss=loss)
        for part, starts in zip(x.split([2, 1, T - 3]), ((0, 1), (1, 1), (1, 0)), strict=True)
    ]
    flow = lstm_fused.gradient_flow(
        module, x, hx, loss=loss, resets=begins_at(2, 3), reset_state=reset
    )
    torch.testing.assert_close(flow, torch.cat(expected))


@pytest.mark.parametrize("batch_first", (False, True))
def test_gradient_stops_at_a_reset(batch_first):
    module = lstm_fused.LSTM(I, H, batch_first=batch_first)
    x = torch.randn(N, T, I) if batch_first else torch.randn(T, N, I)
    mask = begins_at()
    mask[4, 1] = True
    flow = lstm_fused.gradient_flow(module, x, resets=mask.t() if batch_first else mask)
    plain = lstm_fused.gradient_flow(module, x)
    assert flow[:4, :, 1].eq(0).all() and flow[4:, :, 1].ne(0).any(-1).all()
    torch.testing.assert_close(flow[:, :, ::2], plain[:, :, ::2], rtol=0, atol=0)


@pytest.mark.parametrize("single", (False, True))
def test_flow_of_a_learned_initial_state(single):
    module = lstm_fused.LSTM(I, H, 2, learned_initial_state=True)
    for p in (module.initial_h, module.initial_c):
        nn.init.normal_(p)
    x = torch.randn(T, I) if single else torch.randn(T, N, I)
    mask = torch.rand(x.shape[:-1]) < 0.5
    state = module.init_state(None if single else N)
    plain = lstm_fused.LSTM(I, H, 2)
    plain.load_state_dict(module.state_dict(), strict=False)
    expected = lstm_fused.gradient_flow(plain, x, state, resets=mask, reset_state=state)
    flow = lstm_fused.gradient_flow(module, x, resets=mask)
    torch.testing.assert_close(flow, expected, rtol=0, atol=0)


def test_bad_resets():
    for resets, error in (
        (torch.zeros(N, T).bool(), ValueError),
        (torch.zeros(T, N), TypeError),
    ):
        with pytest.raises(error, match="resets must"):
            lstm_fused.gradient_flow(nn.GRU(I, H), draw(T, N, I), resets=resets)
