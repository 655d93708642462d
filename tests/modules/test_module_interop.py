"""torch.nn's tools (parametrizations, functional_call, copies ...) work, and calls stay fused."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence
from torch.utils.checkpoint import checkpoint

import lstm_fused
from tests.helpers.compare_modules import H, I, N, T, ones

pytestmark = pytest.mark.usefixtures("device")


class Doubled(nn.Module):
    def forward(self, w):
        return 2 * w


def sums_of(result):
    """The sum of every output of a layer or a cell."""
    if isinstance(result, PackedSequence):
        return result.data.sum()
    return result.sum() if isinstance(result, torch.Tensor) else sum(map(sums_of, result))


def gradients(module, result):
    module.zero_grad()
    sums_of(result).backward()
    return [w.grad for w in module.parameters()]


def copied_within_a_graph(m, x):
    """The copy has weights of its own, and the graph goes on with the first ones."""
    result = m(x)
    twin = copy.deepcopy(m)
    return [gradients(m, result), gradients(twin, twin(x))]


def parametrized(m, x):
    parametrize.register_parametrization(m, weight_of(m), Doubled())
    with parametrize.cached():
        results = [m(x), m(x)]
    return [*results, gradients(m, results[0]), m(x)]


def replica(m, x):
    """As nn.DataParallel makes them: its weights are plain attributes."""
    twin = m._replicate_for_data_parallel()
    for name, w in m._parameters.items():
        setattr(twin, name, w if w is None else 2 * w)
    result = twin(x)
    return [result, gradients(m, result), m(x)]


def called_with_others(m, x):
    weights = {name: (2 * w).detach().requires_grad_() for name, w in m.named_parameters()}
    result = torch.func.functional_call(m, weights, (x,))
    sums_of(result).backward()
    one = {weight_of(m): weights[weight_of(m)].detach()}
    return [result, [w.grad for w in weights.values()], torch.func.functional_call(m, one, (x,))]


def out_of_an_old_pickle(m, x):
    """Of before there were projections, and of when all_weights held the weights themselves."""
    if isinstance(m, nn.RNNCellBase):
        return m(x)
    old = m.__getstate__()
    del old["proj_size"]
    older = dict(old, all_weights=m.all_weights)
    del older["_all_weights"]
    twins = [type(m).__new__(type(m)) for _ in range(2)]
    for twin, state in zip(twins, (old, older), strict=True):
        twin.__setstate__(state)
    return [twin(x) for twin in twins]


def shared_memory(m, x):
    assert all(w.is_shared() for w in m.share_memory().parameters())
    return m(x)


def empty_and_filled(m, x):
    return filled(m.to("meta").to_empty(device=x.device))(x)


def filled(module):
    for w in module.parameters():
        nn.init.constant_(w, 0.1)
    return module


def not_initialised(m, x):
    if isinstance(m, nn.RNNCellBase):
        return filled(nn.utils.skip_init(type(m), I, H, dtype=x.dtype, device=x.device))(x)
    with pytest.raises(RuntimeError, match="must support a 'device' arg"):
        nn.utils.skip_init(type(m), I, H)
    return x


def assigned_on_meta(m, x):
    with torch.device("meta"):
        twin = type(m)(I, H)
    twin.load_state_dict(m.state_dict(), assign=True)
    return twin(x)


def unpacked(m, x):
    if isinstance(m, nn.RNNCellBase):
        return m(x)
    return unpack_sequence(m(pack_sequence([x[:, 0], x[:2, 1]]))[0])


def swapped(m, x):
    """Weights that are exchanged by module.to instead of written to."""
    m(x)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        return m.float()(x.float())
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def recomputed(m, x):
    results = [
        checkpoint(m, x.requires_grad_(), use_reentrant=reentrant) for reentrant in (True, False)
    ]
    return [gradients(m, result) for result in results]


def flattened(m, x):
    flatten = getattr(m, "flatten_parameters", lambda: None)
    assert flatten() is None
    return m(x)


def stateless_call(m, x):
    weights = {name: 2 * w.detach() for name, w in m.named_parameters()}
    with pytest.warns(FutureWarning, match="functional_call"):
        return nn.utils.stateless.functional_call(m, weights, (x,))


AROUND = {
    "flatten_parameters": flattened,
    "deepcopy within a graph": copied_within_a_graph,
    "parametrize.cached": parametrized,
    "spectral_norm": lambda m, x: [
        nn.utils.spectral_norm(m, weight_of(m))(x),
        m(x),
        m.eval()(x),
        gradients(m, m(x)),
    ],
    "replica": replica,
    "functional_call": called_with_others,
    "stateless": stateless_call,
    "old pickle": out_of_an_old_pickle,
    "share_memory": shared_memory,
    "to_empty": empty_and_filled,
    "skip_init": not_initialised,
    "meta": assigned_on_meta,
    "unpack_sequence": unpacked,
    "swap": swapped,
    "checkpoint": recomputed,
}


def weight_of(module):
    return "weight_hh" if isinstance(module, nn.RNNCellBase) else "weight_hh_l0"


def plain(results):
    """Tensors alone, in lists."""
    if isinstance(results, torch.Tensor):
        return results.detach()
    return [plain(each) for each in results]


@pytest.mark.parametrize("name", ("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"))
@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
def test_module_interop(around, name):
    """The result is that of torch.nn's module with the same weights, and the call is fused."""
    x = ones(T, N, I) if not name.endswith("Cell") else ones(N, I)
    results = []
    for library in (nn, lstm_fused):
        torch.manual_seed(1)
        module = getattr(library, name)(I, H, dtype=torch.float64)
        torch.manual_seed(2)
        results.append(plain(around(module, x)))
    torch.testing.assert_close(*results)
