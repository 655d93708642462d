"""The copying task: which cell learns over how many steps, and its gradients over time."""

import pytest
import torch

from examples import gradients
from tests.helpers import example_checks


@pytest.mark.full
def test_learns(tmp_path):
    found = example_checks.learn(gradients.EXAMPLE, tmp_path)
    # By chance 0.25, and so it is over 100 steps with the layers left as they began.
    assert found["accuracy"]["rnn", 20] > 0.9
    assert found["accuracy"]["gru", 100] > 0.9
    assert found["accuracy"]["lstm", 100] > 0.9
    count = found["parameters"]
    assert count["lstm"] == 4 * count["rnn"]
    assert count["gru"] == 3 * count["rnn"]
    for start in gradients.STARTS:
        for kind in gradients.KINDS:
            norms = found["flows"][start, kind]
            assert norms.shape == (gradients.DISTANCE,)
            # The loss is the sum of the last output, of 32 units.
            assert norms[-1].item() == pytest.approx(32**0.5)
    before = {kind: found["flows"][gradients.STARTS[1], kind] for kind in gradients.KINDS}
    assert before["rnn"][-101] < 1e-6 * before["lstm"][-101]
    assert before["rnn"][-101] < 1e-6 * before["gru"][-101]


def test_resets_end_the_gradient():
    """Each row has gradients from its last reset on, the others from its first step."""
    args = gradients.EXAMPLE.parse([])
    x, _ = gradients.Sequences(None).draw(200, 8, torch.Generator().manual_seed(0))
    resets, by_row = gradients.gradients_with_resets(args, 100, x)
    assert by_row["no resets"].gt(0).all()
    assert resets.any(0).sum() > 1
    for row, norm in zip(resets.unbind(1), by_row["resets"].unbind(1), strict=True):
        begin = int(row.nonzero().max()) if row.any() else 0
        assert norm[:begin].eq(0).all() and norm[begin:].gt(0).all()


def test_backends_agree(tmp_path):
    example_checks.assert_agree(gradients.EXAMPLE, tmp_path, "--quick")


@pytest.mark.parametrize("content", [b"too short", b"\xff" * 2000, None])
def test_bad_data_is_one_line(tmp_path, capsys, content):
    path = tmp_path / "noise.txt"
    if content is not None:
        path.write_bytes(content)
    assert gradients.EXAMPLE.main(["--data", str(path), "--out", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1


def test_own_data(tmp_path):
    path = tmp_path / "noise.txt"
    path.write_text("abcd" * 300)
    x, first = gradients.Sequences(path).draw(9, 3, torch.Generator().manual_seed(0))
    assert x.shape == (9, 3, 8)
    assert x.sum(-1).eq(1).all()
    assert x[0].argmax(-1).tolist() == first.tolist()
    codes = x[1:].argmax(-1) - gradients.SYMBOLS
    assert ((codes[1:] - codes[:-1]) % gradients.NOISE).eq(1).all()
