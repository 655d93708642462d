"""sLSTM beside the packages that have it: the blocks of xlstm with our layer in place of theirs."""

import copy
import io
import json
import pickle
import warnings
from pathlib import Path

import pytest
import torch

from lstm_fused import by_reference
from lstm_fused.cells import SLSTM, replace_slstm, restore_slstm, slstm, xlstm
from lstm_fused.testing import oracle, parity

TIREX = Path(__file__).parents[1] / "data" / "tirex_slstm.json"  # made by tirex_slstm.py beside it


@pytest.fixture(scope="module")
def package():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of CUDA's headers, which are not asked for
        return pytest.importorskip("xlstm")


def layer_of(package, width=32, heads=2, **options):
    """Their layer with weights that no gate ignores."""
    config = {"conv1d_kernel_size": 0, "backend": "vanilla"} | options
    config = package.sLSTMLayerConfig(embedding_dim=width, num_heads=heads, **config)
    layer = package.sLSTMLayer(config)
    with torch.no_grad():
        layer.slstm_cell._recurrent_kernel_.normal_(std=width**-0.5)
        layer.slstm_cell._bias_.add_(torch.randn(4 * width), alpha=0.1)
    return layer


def results_of(module, x, **options):
    """Outputs and gradients of a call, by the names that parity.model_row knows."""
    x = x.clone().requires_grad_()
    found = module(x, **options)
    outputs = found if isinstance(found, tuple) else (found,)
    tensors = {"y": outputs[0]}
    if len(outputs) > 1:
        tensors["state"] = outputs[1]["slstm_state"]
    weights = torch.linspace(-1, 1, x.shape[-1], dtype=x.dtype)
    sum((t * weights).sum() for t in tensors.values()).backward()
    tensors |= {"d input": x.grad}
    return tensors | {f"d {name}": p.grad for name, p in module.named_parameters()}


def assert_equal(theirs, ours, x, **options):
    """Ours may be off from theirs in float64 by twice what theirs is."""
    exact = results_of(oracle.in_float64(theirs), x.double(), **oracle.in_float64(options))
    verdicts = parity.compare(
        results_of(ours, x, **options), results_of(theirs, x, **options), exact, parity.model_row
    )
    assert parity.worst(verdicts).ok, parity.worst(verdicts)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("width, heads", ((64, 4), (36, 4), (24, 1)))
def test_layer(package, width, heads, dtype):
    """The heads of 9 units are none of the kernels' blocks."""
    theirs = layer_of(package, width, heads).to(dtype)
    ours = replace_slstm(copy.deepcopy(theirs))
    x = torch.randn(3, 9, width, dtype=dtype)
    assert_equal(theirs, ours, x, return_last_state=True)
    with torch.no_grad():
        _, state = theirs(x, return_last_state=True)
    assert_equal(theirs, ours, x, return_last_state=True, **state)


def test_step(package):
    """Their layer's step carries the state of its convolution beside ours."""
    theirs = layer_of(package, conv1d_kernel_size=4)
    ours = replace_slstm(copy.deepcopy(theirs))
    state = {module: {} for module in (theirs, ours)}
    for x in torch.randn(4, 2, 1, 32).unbind(0):
        y = {}
        for module in (theirs, ours):
            y[module], state[module] = module.step(x, **state[module])
        torch.testing.assert_close(y[ours], y[theirs])
        torch.testing.assert_close(state[ours], state[theirs])


def test_block_stack(package):
    config = package.xLSTMBlockStackConfig(
        slstm_block=package.sLSTMBlockConfig(
            slstm=package.sLSTMLayerConfig(backend="vanilla", num_heads=2),
            feedforward=package.FeedForwardConfig(proj_factor=1.3),
        ),
        num_blocks=2,
        embedding_dim=32,
        slstm_at="all",
        context_length=16,
    )
    theirs = package.xLSTMBlockStack(config)
    ours = replace_slstm(copy.deepcopy(theirs))
    assert_equal(theirs, ours, torch.randn(2, 7, 32))


def test_weights_in_the_layout_of_their_cuda_kernels(package):
    from xlstm.blocks.slstm.cell import sLSTMCell_cuda

    vanilla = layer_of(package).slstm_cell
    cuda = sLSTMCell_cuda(copy.deepcopy(vanilla.config), skip_backend_init=True)
    cuda.recurrent_kernel[:] = vanilla.recurrent_kernel[:]
    cuda.bias[:] = vanilla.bias[:]
    x = torch.randn(2, 5, 128)
    torch.testing.assert_close(replace_slstm(cuda)(x), vanilla(x))


def test_narrow_input_is_computed_in_the_dtype_of_the_weights(package):
    cell = replace_slstm(layer_of(package)).slstm_cell
    x = torch.randn(2, 5, 128).bfloat16()
    y, state = cell(x.float())
    for found in (cell(x), torch.autocast("cpu")(cell)(x)):
        assert found[0].equal(y.bfloat16()) and found[1].equal(state.bfloat16())


def test_replaced_cells_stay_what_they_are(package):
    theirs = layer_of(package)
    cell, names = theirs.slstm_cell, list(theirs.state_dict())
    parameters, cls = list(theirs.parameters()), type(cell)
    x = torch.randn(2, 5, 32)
    expected = theirs(x)
    ours = replace_slstm(theirs)
    assert ours is theirs and ours.slstm_cell is cell and isinstance(cell, cls)
    assert list(ours.state_dict()) == names and repr(cell).startswith("sLSTMCell_vanilla")
    assert all(a is b for a, b in zip(ours.parameters(), parameters, strict=True))
    replaced = type(cell)
    assert replaced is not cls and type(replace_slstm(ours).slstm_cell) is replaced
    first = copy.deepcopy(ours)  # a layer as they build it cannot be pickled
    for copied in (first, pickle.loads(pickle.dumps(first))):
        assert type(copied.slstm_cell) is replaced
        torch.testing.assert_close(copied(x), expected)
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    assert type(restore_slstm(ours).slstm_cell) is cls
    file.seek(0)
    ours.load_state_dict(torch.load(file))
    assert ours(x).equal(expected)


def test_cells_that_are_left_alone(package, capsys):
    from xlstm.blocks.slstm.cell import sLSTMCell_cuda, sLSTMCell_vanilla

    class Own(sLSTMCell_vanilla):
        def forward(self, input, state=None, lengths=None):
            return super().forward(input * 2, state)

    config = layer_of(package).slstm_cell.config
    clipped = copy.deepcopy(config)
    clipped.gradient_recurrent_clipval = 1.0
    model = torch.nn.ModuleDict(
        {
            "own": Own(copy.deepcopy(config)),
            "lstm": layer_of(package, function="lstm"),
            "clipped": sLSTMCell_cuda(clipped, skip_backend_init=True),
            "plain": sLSTMCell_vanilla(copy.deepcopy(config)),
        }
    )
    before = {name: type(m) for name, m in model.named_modules()}
    with pytest.warns(UserWarning, match="replace_slstm left alone") as found:
        replace_slstm(model)
    changed = [name for name, m in model.named_modules() if type(m) is not before[name]]
    assert changed == ["plain"]
    text = str(found[0].message)
    for words in ("own, a Own with its own forward", 'lstm.slstm_cell, whose function is "lstm"'):
        assert words in text
    assert "clipped, which has gradient_recurrent_clipval" in text
    replace_slstm(restore_slstm(model), verbose=True)
    assert "1 replaced, 3 left alone" in capsys.readouterr().out
    with pytest.raises(TypeError, match="must be a torch.nn.Module"):
        replace_slstm(None)


def test_a_state_of_another_shape(package):
    theirs = layer_of(package).slstm_cell
    ours = replace_slstm(copy.deepcopy(theirs))
    for cell in (theirs, ours):
        with pytest.raises(AssertionError):
            cell(torch.randn(2, 5, 128), torch.zeros(4, 3, 32))
        with pytest.raises(AssertionError, match="Input size mismatch"):
            cell(torch.randn(2, 5, 64))


def test_module_is_their_cell_behind_a_dense_projection(package):
    """SLSTM begins as their cell does, and computes what that does of W x."""
    theirs = layer_of(package, 48, 3).slstm_cell
    ours = SLSTM(5, 48, num_heads=3, batch_first=True)
    fresh = type(theirs)(theirs.config)
    torch.testing.assert_close(ours.bias_ih_l0, fresh._bias_)
    assert not ours.weight_hh_l0.any() and not ours.bias_hh_l0.any()
    R = theirs._recurrent_kernel_.view(3, 4, 16, 16)
    with torch.no_grad():
        ours.weight_hh_l0.copy_(R.transpose(0, 1).flatten(0, 2))
        ours.bias_ih_l0.copy_(theirs._bias_)
    x = torch.randn(2, 7, 5)
    y, state = ours(x)
    expected, ends = theirs(x @ ours.weight_ih_l0.t())
    torch.testing.assert_close(y, expected.transpose(1, 2).flatten(2))
    torch.testing.assert_close(torch.cat(state), ends)
    y, _ = ours(x, state)
    expected, _ = theirs(x @ ours.weight_ih_l0.t(), ends)
    torch.testing.assert_close(y, expected.transpose(1, 2).flatten(2))


def test_tirex():
    """TiRex rounds to bfloat16 at each step: ours is what its function gives in float32."""
    data = json.loads(TIREX.read_text())
    exact = {name: torch.tensor(data[name], dtype=torch.float64) for name in data}
    heads, D = exact["recurrent_kernel"].shape[:2]
    config = type("Config", (), {"num_heads": heads, "head_dim": D})
    blocks, bias = xlstm._by_gate_from_cuda(config, exact["recurrent_kernel"], exact["bias"])
    x = exact["input"].transpose(0, 1)
    y, (h_n, c_n) = slstm.recurrence(x, (), blocks, bias, by_reference.layer)
    y = y.unflatten(-1, (heads, D)).permute(1, 2, 0, 3)
    found = {"output": y, "state": torch.stack((h_n[0], *c_n[0].chunk(3, -1)))}
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, exact[f"float32_{name}"], rtol=1e-5, atol=1e-5)
        assert 1e-3 < parity.max_error(exact[f"bfloat16_{name}"].float(), tensor) < 0.1


def test_tirex_in_place():
    """In the package itself, which brings a dozen others, where it is installed."""
    tirex = pytest.importorskip("tirex.models.slstm.layer")
    layer = tirex.sLSTMLayer(tirex.sLSTMBlockConfig(embedding_dim=32, num_heads=2), "torch")
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.2)
    x = torch.randn(2, 6, 32)
    ours = replace_slstm(copy.deepcopy(layer))
    assert type(ours.slstm_cell) is not type(layer.slstm_cell)
    torch.testing.assert_close(ours(x), layer(x), rtol=0.05, atol=0.05)
    _, state = ours.slstm_cell(torch.randn(2, 6, 128), None)
    torch.testing.assert_close(
        ours(x, slstm_state=state), layer(x, slstm_state=state), rtol=0.05, atol=0.05
    )


@pytest.mark.parametrize("heads", (0, -2, 5, 2.0, True, None))
def test_heads_divide_the_units(heads):
    with pytest.raises(ValueError, match="num_heads must be a divisor of hidden_size"):
        SLSTM(3, 32, num_heads=heads)


def test_states_of_a_call():
    module = SLSTM(3, 32, num_heads=2)
    y, state = module(torch.randn(4, 2, 3))
    h, c, n, m = state
    assert all(s.shape == (1, 2, 32) for s in state) and h.squeeze(0).equal(y[-1])
    assert module(torch.randn(4, 2, 3), state)[0].shape == y.shape
    for wrong in ((h, c), h, None):
        if wrong is not None:
            with pytest.raises(TypeError, match=r"hx must be a tuple \(h, c, n, m\)"):
                module(torch.randn(4, 2, 3), wrong)
    with pytest.raises(RuntimeError, match="Expected hidden size"):
        module(torch.randn(4, 2, 3), (h, c, n, m[..., :8]))


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_reset_state(learned, bidirectional):
    """As two calls, of which the second begins in the same four states."""
    options = {"bidirectional": bidirectional, "learned_initial_state": learned}
    layer = SLSTM(5, 32, num_heads=2, dtype=torch.float64, **options)
    with torch.no_grad():
        for w in layer.parameters():
            w.uniform_(0.1, 0.2)
    state = None
    if not learned:
        state = tuple(torch.rand(1 + bidirectional, 3, 32, dtype=torch.float64) for _ in range(4))
    x = torch.randn(7, 3, 5, dtype=torch.float64)
    resets = torch.zeros(7, 3, dtype=torch.bool)
    resets[4] = True
    y, _ = layer(x, state, resets=resets, reset_state=state)
    torch.testing.assert_close(y, torch.cat([layer(part, state)[0] for part in x.split(4)]))


def test_reset_state_of_another_kind():
    layer, x = SLSTM(5, 32, num_heads=2), torch.randn(7, 3, 5)
    resets = torch.zeros(7, 3, dtype=torch.bool)
    with pytest.raises(TypeError, match=r"\(h, c, n, m\) of four tensors"):
        layer(x, resets=resets, reset_state=(torch.zeros(1, 32), torch.zeros(1, 32)))
