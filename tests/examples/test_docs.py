"""The pages whose code must keep running, with torch.nn and with ours."""

import doctest
from pathlib import Path

import pytest
import torch

import lstm_fused

PAGE = Path(__file__).parents[2] / "docs" / "outputs.md"


@pytest.mark.parametrize("library", [torch.nn, lstm_fused], ids=["torch.nn", "lstm_fused"])
def test_outputs(library):
    torch.manual_seed(0)
    with torch.no_grad():
        failed, tried = doctest.testfile(
            str(PAGE), module_relative=False, encoding="utf-8", globs={"nn": library}
        )
    assert failed == 0 and tried > 25
