"""Poison is on in every test: what a kernel should write and does not comes out as NaN."""

import os

os.environ["LSTM_FUSED_POISON"] = "1"  # read once, when the first layer runs

import pytest
import torch
from hypothesis import settings

import lstm_fused.recurrent
from lstm_fused import ops

# `--hypothesis-profile=search` looks further than the examples that everybody runs.
settings.register_profile(
    "repeatable", derandomize=True, deadline=None, database=None, max_examples=150
)
settings.register_profile("search", deadline=None, max_examples=2000)
settings.load_profile("repeatable")


def pytest_configure(config):
    config.addinivalue_line(
        "filterwarnings", "ignore:LSTM with projections is not supported with oneDNN"
    )
    # A test that means to run a kernel must not pass because torch stood in.
    config.addinivalue_line("filterwarnings", "error:lstm_fused.* ran through torch")


@pytest.fixture(autouse=True)
def same_start():
    """Each test starts from one seed, one thread, and the ISA that the machine would choose.

    Small layers are run faster by one thread; tests of sharing work out ask for more.
    """
    torch.manual_seed(0)
    torch.set_num_threads(1)
    ops.set_isa(None)
    lstm_fused.recurrent._warned.clear()
