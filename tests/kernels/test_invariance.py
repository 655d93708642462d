"""What the bits of a row's results do not depend on, and how little they depend on the rest."""

import pytest
import torch

import lstm_fused
from lstm_fused import runtime
from tests.helpers.plan_coverage import DTYPES, isas_for

MODULES = {"LSTM": lstm_fused.LSTM, "GRU": lstm_fused.GRU, "RNN": lstm_fused.RNN}
T, N, I, H = 19, 21, 13, 83  # noqa: E741


def made(name, dtype, **options):
    torch.manual_seed(0)
    layer = MODULES[name](I, H, dtype=dtype, **options).requires_grad_(False)
    return layer, torch.randn(T, N, I).to(dtype)


def outputs(layer, x, hx=None, **options):
    """y and the final states, of the persistent kernel."""
    y, states = layer(x, hx, **options)
    assert runtime.last_run()["kernel"] == "persistent"
    return y, states


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads(dtype):
    """An LSTM's forward pass, as long as no thread has a single row of several."""
    layer, x = made("LSTM", dtype, bidirectional=True)
    for isa in isas_for(dtype):
        runtime.set_isa(isa)
        found, partitions = [], set()
        for threads in (1, 2, 3, 5, 8):
            torch.set_num_threads(threads)
            found.append(outputs(layer, x)[0])
            run = runtime.last_run()
            partitions.add((run["direction_groups"], run["row_groups"], run["unit_groups"]))
        assert len(partitions) > 2
        assert all(torch.equal(y, found[0]) for y in found), isa


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_chunks(name, dtype):
    """A sequence in parts of more than four steps, with the state carried from part to part."""
    layer, x = made(name, dtype)
    for isa in isas_for(dtype):
        runtime.set_isa(isa)
        whole, end = outputs(layer, x)
        hx, parts = None, []
        for part in x.split(7):
            y, hx = outputs(layer, part, hx)
            parts.append(y)
        assert torch.equal(torch.cat(parts), whole), isa
        for one, other in zip(hx, end, strict=True):
            assert torch.equal(one, other), isa


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_other_rows(name, dtype):
    """The rows beside it, their number and their lengths, move a row by a few roundings at most."""
    layer, x = made(name, dtype)
    atol = 16 * torch.finfo(dtype).eps
    for isa in isas_for(dtype):
        runtime.set_isa(isa)
        whole, _ = outputs(layer, x)
        for rows in (1, 2, 3, 5, 8, 13, 16, 20):
            y, _ = outputs(layer, x[:, :rows].contiguous())
            torch.testing.assert_close(y, whole[:, :rows], rtol=0, atol=atol)
        lengths = [T - n % 7 for n in range(N)]
        padded, _ = outputs(layer, x, lengths=lengths)
        for n, length in enumerate(lengths):
            torch.testing.assert_close(padded[:length, n], whole[:length, n], rtol=0, atol=atol)
