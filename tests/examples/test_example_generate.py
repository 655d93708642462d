"""Captions of an image: learned with the image fed once or at every step; both backends agree."""

import pytest
import torch

from examples import generate
from tests.helpers import example_checks


@pytest.mark.full
def test_learns_both_ways(tmp_path):
    found = example_checks.learn(generate.EXAMPLE, tmp_path)
    for way in generate.WAYS:
        # With the LSTM's own weights left as they began no caption is right.
        assert found["accuracy"][way] > 0.7
        assert len(found["by step"][way]) == generate.STEPS


@pytest.mark.parametrize("way", generate.WAYS)
def test_backends_agree(tmp_path, way):
    example_checks.assert_agree(generate.EXAMPLE, tmp_path, "--way", way)


@pytest.mark.parametrize("way", generate.WAYS)
def test_input_of_each_method(way):
    model = generate.Captioner(way, "rnn", "fused")
    seen = []
    model.layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    scans = torch.rand(3, 8, 8)
    with torch.no_grad():
        assert model(scans).shape == (3, generate.STEPS, len(generate.LETTERS))
    flat = scans.flatten(1)
    assert seen[0].shape == (3, generate.STEPS, 64)
    assert torch.equal(seen[0][:, 0], flat)
    assert torch.equal(seen[0][:, -1], torch.zeros_like(flat) if way == "fed once" else flat)


def test_captions():
    codes = generate.codes_of("six six.")
    assert codes.shape == (generate.STEPS,)
    assert generate.text_of(codes) == "six six"
    assert len(set(generate.CAPTIONS)) == 10
