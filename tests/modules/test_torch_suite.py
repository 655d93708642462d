"""PyTorch's own tests of nn.LSTM, nn.GRU, nn.RNN and their cells, applied to ours.

The inputs are those of torch.testing._internal.common_modules. The checks are those of PyTorch's
test_modules.py and, for LSTMs, test_nn.py.
"""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils.rnn import (
    pack_padded_sequence,
    pack_sequence,
    pad_packed_sequence,
    pad_sequence,
)

import lstm_fused
from lstm_fused import runtime
from tests.helpers.compare_modules import changed, states_of

pytest.importorskip("expecttest")
pytest.importorskip("numpy")

from torch.testing._internal import common_modules

pytestmark = pytest.mark.usefixtures("real_device")

NAMES = [kind.__name__ for kind in (*lstm_fused.nn.MODULES, *lstm_fused.single_step.MODULES)]
INFOS = {i.module_cls.__name__: copy.copy(i) for i in common_modules.module_db}
for each in NAMES:
    INFOS[each].module_cls = getattr(lstm_fused, each)
MODES = (True, False)
each_name = pytest.mark.parametrize("name", NAMES)
each_mode = pytest.mark.parametrize("training", MODES, ids=("train", "eval"))
each_dtype = pytest.mark.parametrize("dtype", INFOS["LSTM"].dtypes, ids=str)


def samples(name, dtype, training=True, requires_grad=False):
    """A module, its inputs and torch's reference, for each of torch's samples."""
    info, device = INFOS[name], torch.get_default_device()
    for sample in info.module_inputs_func(
        info, device=device, dtype=dtype, requires_grad=requires_grad, training=training
    ):
        made = sample.constructor_input
        module = info.module_cls(*made.args, **made.kwargs, dtype=dtype).train(training)
        given = sample.forward_input
        yield module, given.args, given.kwargs, sample.reference_fn


def tensors(result):
    """Every tensor of an output or of states, as a flat tuple."""
    if isinstance(result, torch.Tensor):
        return (result,)
    return tuple(t for part in result for t in tensors(part))


@each_name
@each_mode
@each_dtype
def test_forward(dtype, training, name):
    for module, args, kwargs, reference in samples(name, dtype, training):
        found = module(*args, **kwargs)
        assert runtime.last_run()["pass"] == "forward"
        torch.testing.assert_close(found, reference(module, *args, **kwargs))


@each_name
@each_dtype
def test_factory_kwargs(dtype, name):
    for module, _, _, _ in samples(name, dtype):
        assert {p.dtype for p in module.parameters()} == {dtype}
    info, device = INFOS[name], torch.get_default_device()
    for sample in info.module_inputs_func(info, device, dtype, False, True):
        made = sample.constructor_input
        on_meta = info.module_cls(*made.args, **made.kwargs, dtype=dtype, device="meta")
        assert all(p.is_meta and p.dtype is dtype for p in on_meta.parameters())
        with torch.device("meta"):
            assert all(p.is_meta for p in info.module_cls(*made.args, **made.kwargs).parameters())


@each_name
@each_mode
def test_repr_and_pickle(training, name):
    for module, args, kwargs, _ in samples(name, torch.float64, training):
        assert repr(module) == str(module) != ""
        expected = module(*args, **kwargs)
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        for twin in (pickle.loads(pickle.dumps(module)), torch.load(file, weights_only=False)):
            assert twin.training is training
            torch.testing.assert_close(twin(*args, **kwargs), expected, rtol=0, atol=0)


def goals_of(name, training):
    """gradgradcheck of a layer in training mode takes long, and is a test of test_autograd too."""
    return set() if training and not name.endswith("Cell") else {name}


@pytest.mark.covering(goals=goals_of)
@each_name
@each_mode
def test_gradients(training, name):
    """gradcheck over inputs and parameters; gradgradcheck where a state is given, and once."""
    for module, args, _, _ in samples(name, torch.float64, training, requires_grad=True):
        parameters = dict(module.named_parameters())
        inputs = tensors(args)
        count = len(inputs)

        def call(*given, module=module, names=tuple(parameters), n=count):
            x, *state = given[:n]
            weights = dict(zip(names, given[n:], strict=True))
            rest = (tuple(state) if len(state) > 1 else state[0],) if state else ()
            return tensors(torch.func.functional_call(module, weights, (x, *rest)))

        leaves = (*inputs, *parameters.values())
        assert gradcheck(call, leaves, fast_mode=True)
        sum(t.sum() for t in call(*leaves)).backward()
        assert runtime.last_run()["pass"] == "backward"
        if training and count > 1:
            assert gradgradcheck(call, leaves, fast_mode=True)


@each_name
def test_non_contiguous(name):
    """Inputs and gradients of any strides give what contiguous ones do."""

    def strided(t):
        apart = t.detach().repeat_interleave(2, dim=-1)[..., ::2]
        assert t.shape[-1] < 2 or not apart.is_contiguous()
        return apart.requires_grad_()

    for module, args, _, _ in samples(name, torch.float64, requires_grad=True):
        outcomes = []
        for change in (lambda t: t.detach().clone().requires_grad_(), strided):
            x, *rest = args
            x, hx = change(x), changed(change, rest[0] if rest else None)
            outputs = tensors(module(x, hx))
            torch.manual_seed(0)
            grads = [change(torch.randn_like(t)) for t in outputs]
            leaves = (x, *states_of(hx), *module.parameters())
            outcomes.append((outputs, torch.autograd.grad(outputs, leaves, grads)))
        torch.testing.assert_close(outcomes[0], outcomes[1])


@each_name
def test_moves_and_state_dict(name):
    """A cast and back, and loading a state_dict into a new module, keep the results."""
    for module, args, kwargs, _ in samples(name, torch.float64):
        expected = module(*args, **kwargs)
        twin = copy.deepcopy(module)
        for p in twin.parameters():
            nn.init.zeros_(p)
        twin.load_state_dict(module.state_dict())
        torch.testing.assert_close(twin(*args, **kwargs), expected, rtol=0, atol=0)
        module.float().double()
        torch.testing.assert_close(module(*args, **kwargs), expected, rtol=1e-5, atol=1e-6)


@each_name
@each_dtype
def test_error_inputs(dtype, name):
    count, info, device = 0, INFOS[name], torch.get_default_device()
    for error in info.module_error_inputs_func(info, device, dtype, False, True):
        made = error.module_error_input.constructor_input
        given = error.module_error_input.forward_input
        if error.error_on is common_modules.ModuleErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(error.error_type, match=error.error_regex):
                info.module_cls(*made.args, **made.kwargs)
        else:
            module = info.module_cls(*made.args, **{"dtype": dtype} | made.kwargs)
            with pytest.raises(error.error_type, match=error.error_regex):
                module(*given.args, **given.kwargs)
        count += 1
    assert count


@pytest.mark.parametrize("directions", (1, 2))
@pytest.mark.parametrize("proj", (0, 5))
def test_wrong_state_sizes(directions, proj):
    lstm = lstm_fused.LSTM(10, 20, 2, bidirectional=directions == 2, proj_size=proj)
    x, layers, width = torch.randn(5, 3, 10), 2 * directions, proj or 20
    good = torch.randn(layers, 3, width), torch.randn(layers, 3, 20)
    for at, name in enumerate(("hidden[0]", "hidden[1]")):
        for dim in range(3):
            bad = list(good)
            shape = list(good[at].shape)
            shape[dim] += 1
            bad[at] = torch.randn(shape)
            with pytest.raises(RuntimeError) as error:
                lstm(x, tuple(bad))
            expected, got = tuple(good[at].shape), list(shape)
            assert str(error.value) == f"Expected {name} size {expected}, got {got}"
    with pytest.raises(RuntimeError, match="input.size.-1. must be equal to input_size"):
        lstm(torch.randn(5, 3, 11), good)


@pytest.mark.parametrize("proj, words", ((-1, "positive integer or zero"), (20, "smaller than")))
def test_projection_sizes(proj, words):
    with pytest.raises(ValueError, match=words):
        lstm_fused.LSTM(10, 20, proj_size=proj)
    lstm = lstm_fused.LSTM(10, 20, 2, proj_size=5, bidirectional=True)
    shapes = {name: tuple(p.shape) for name, p in lstm.named_parameters()}
    assert shapes["weight_hh_l0"] == (80, 5) and shapes["weight_hr_l1_reverse"] == (5, 20)
    assert shapes["weight_ih_l1"] == (80, 10)
    assert len(lstm.all_weights) == 4 and len(lstm.all_weights[0]) == 5


@pytest.mark.parametrize("p", (0.0, 1.0))
def test_dropout_probability_zero_and_one(p):
    """Ones for weights: the second layer sees either what the first gave, or nothing."""
    lstm = lstm_fused.LSTM(10, 100, 2, bias=False, dropout=p)
    with torch.no_grad():
        lstm.weight_ih_l0.fill_(1)
        lstm.weight_hh_l0.fill_(1)
        lstm.weight_ih_l1.fill_(1)
        lstm.weight_hh_l1.fill_(1)
    x = torch.ones(1, 1, 10)
    y, (h_n, _) = lstm(x)
    assert h_n[0].all()
    assert bool(y.any()) is (p == 0)
    torch.testing.assert_close(lstm.eval()(x)[0], lstm_without_dropout(lstm)(x)[0])


def lstm_without_dropout(lstm):
    twin = nn.LSTM(10, 100, 2, bias=False)
    twin.load_state_dict(lstm.state_dict())
    return twin


def test_dropout_follows_the_seed(real_device):
    random = torch.cuda if real_device == "cuda" else torch
    lstm, x = lstm_fused.LSTM(10, 20, 2, dropout=0.5), torch.ones(3, 2, 10)
    state = random.get_rng_state()
    first, second = lstm(x)[0], lstm(x)[0]
    random.set_rng_state(state)
    again = lstm(x)[0]
    assert torch.equal(first, again) and not torch.equal(first, second)


def test_batches_and_padding_agree():
    """A packed batch gives each sequence what it gets alone, its padding nothing."""
    lengths = [10, 10, 6, 2, 2, 1, 1]
    lstm = lstm_fused.LSTM(3, 4, 2, bidirectional=True, dtype=torch.float64)
    sequences = [torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in lengths]
    with torch.device("cpu"):  # where pack_sequence must make its lengths
        packed = pack_sequence(sequences)
    y, (h_n, c_n) = lstm(packed)
    padded, found_lengths = pad_packed_sequence(y)
    assert found_lengths.tolist() == lengths
    from_padded = lstm(pack_padded_sequence(pad_sequence(sequences), lengths))[0]
    torch.testing.assert_close(from_padded.data, y.data)
    packed_grads = torch.autograd.grad(padded.sum() + c_n.sum(), sequences)
    for n, x in enumerate(sequences):
        alone, (h, c) = lstm(x)
        torch.testing.assert_close(padded[: lengths[n], n], alone)
        assert not padded[lengths[n] :, n].any()
        torch.testing.assert_close((h_n[:, n], c_n[:, n]), (h, c))
        (grad,) = torch.autograd.grad(alone.sum() + c.sum(), x)
        torch.testing.assert_close(packed_grads[n], grad)


@pytest.mark.parametrize("bidirectional", (False, True))
def test_batch_first_is_a_transpose(bidirectional):
    first = lstm_fused.LSTM(10, 20, 2, batch_first=True, bidirectional=bidirectional)
    second = lstm_fused.LSTM(10, 20, 2, bidirectional=bidirectional)
    second.load_state_dict(first.state_dict())
    x = torch.randn(3, 7, 10)
    (y, ends), (y2, ends2) = first(x), second(x.transpose(0, 1))
    torch.testing.assert_close((y, ends), (y2.transpose(0, 1), ends2))
    packed = pack_padded_sequence(x, [7, 4, 2], batch_first=True)
    torch.testing.assert_close(first(packed)[0].data, second(packed)[0].data)


def test_directions_mirror_each_other():
    """With weights and input constant, a palindrome, the two directions mirror each other."""
    lstm = lstm_fused.LSTM(2, 3, bidirectional=True)
    for p in lstm.parameters():
        nn.init.constant_(p, 0.1)
    forward, backward = lstm(torch.ones(6, 2, 2))[0].split(3, dim=-1)
    torch.testing.assert_close(forward, backward.flip(0))


def test_parameters_may_share_or_change_storage():
    """Unlike cuDNN, nothing depends on a flat weight buffer."""
    lstm = lstm_fused.LSTM(10, 20)
    x = torch.randn(4, 2, 10)
    expected = lstm(x)
    lstm.flatten_parameters()
    lstm.weight_ih_l0 = nn.Parameter(lstm.weight_ih_l0.detach().mT.contiguous().mT)
    lstm.weight_hh_l0 = nn.Parameter(torch.cat([lstm.weight_hh_l0.detach()] * 2)[80:])
    torch.testing.assert_close(lstm(x), expected)
    assert all(isinstance(name, str) for name in lstm._flat_weights_names)
    with pytest.raises(TypeError, match="cannot assign"):
        lstm.weight_ih_l0 = torch.zeros(80, 10)


@each_name
@pytest.mark.filterwarnings("ignore:lstm_fused.* ran through torch")
def test_meta_shapes(name):
    """Shapes on the meta device are those on the CPU."""
    for module, args, _, _ in samples(name, torch.float64):
        expected = tensors(module(*args))
        on_meta = [changed(lambda t: t.to("meta"), a) for a in args]
        found = tensors(module.to("meta")(*on_meta))
        assert [t.shape for t in found] == [t.shape for t in expected]
