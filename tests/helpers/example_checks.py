"""Checks that an example gives the same with both backends, and that its small run succeeds."""

import copy
from unittest import mock

import torch

from examples import common
from lstm_fused import runtime
from lstm_fused.testing import oracle, parity, tolerance

STEPS = 5


def loss_and_gradients(model, loss_of, batch):
    """Of one batch, by name as the table of tolerances knows them."""
    model.zero_grad()
    loss = loss_of(model, *batch)
    loss.backward()
    found = {"y": loss.detach()}
    return found | {f"d {name}": p.grad.clone() for name, p in model.named_parameters()}


def assert_accurate(fused, original, loss_of, batch):
    """Loss and every gradient of the fused model, by the rule of all parity tests."""
    fused, original = copy.deepcopy(fused), copy.deepcopy(original)
    fused.load_state_dict(original.state_dict())
    baseline = loss_and_gradients(original, loss_of, batch)
    exact = loss_and_gradients(oracle.in_float64(original), loss_of, oracle.in_float64(batch))
    found = loss_and_gradients(fused, loss_of, batch)
    assert runtime.last_run()["pass"] == "backward"
    wrong = [v for v in parity.compare(found, baseline, exact, parity.model_row) if not v.ok]
    assert not wrong


def assert_agree(example, folder, *arguments):
    """The same seed gives both backends the same first losses, outputs and gradients."""

    def results(backend):
        more = ["--backend", backend, "--steps", str(STEPS), "--out", str(folder / backend)]
        return example.results([*arguments, *more])

    fused, theirs = results("fused"), results("torch")
    losses = [torch.tensor(each["losses"]) for each in (fused, theirs)]
    for found, expected in (losses, (fused["outputs"], theirs["outputs"])):
        assert found.shape == expected.shape
        apart = (found.double() - expected.double()).abs().max().item()
        assert apart <= tolerance.TRAINED * expected.abs().max().item()
    assert_accurate(fused["problem"][0], *theirs["problem"])


def assert_readable(figure):
    """A picture has a title, fits a README, and names both quantities of each plot."""
    assert figure.get_suptitle()
    assert figure.get_size_inches()[0] <= 7
    plots = [axis for axis in figure.axes if axis.axison]
    for labels in zip(*((axis.get_xlabel(), axis.get_ylabel()) for axis in plots), strict=True):
        assert any(labels)  # plots that share an axis name it once


def learn(example, folder, *arguments):
    """What the example finds with the fused layers in its small run; it must leave files."""
    close, closed = common.pyplot.close, []
    with mock.patch.object(common.pyplot, "close", lambda figure: closed.append(figure)):
        found = example.results(["--quick", "--out", str(folder), *arguments])
    assert sorted(folder.glob("*.csv"))
    assert len(list(folder.glob("*.png"))) == len(closed) > 0
    for figure in closed:
        assert_readable(figure)
        close(figure)
    return found
