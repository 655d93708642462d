"""Two processes train as one does on the joined batch; resuming is bitwise identical."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers import example_checks

pytest.importorskip("rich")

from examples import distributed

ROOT = Path(__file__).parents[2]
STEPS = 40


def losses_of(folder):
    with (folder / "loss.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def torchrun(processes, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={processes}", "-m", "examples.distributed", *map(str, arguments)]
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_processes_are_as_one(tmp_path):
    arguments = ["--steps", STEPS]
    torchrun(2, *arguments, "--out", tmp_path / "two")
    distributed.EXAMPLE.results([*map(str, arguments), "--out", str(tmp_path / "one")])
    one, two = losses_of(tmp_path / "one"), losses_of(tmp_path / "two")
    assert two == pytest.approx(one, rel=2e-3)  # the table has four digits
    assert one[-1] < one[0] - 0.8  # nats; what a broken gradient leaves is below 0.1
    alone, shared = (torch.load(tmp_path / d / "model.pt") for d in ("one", "two"))
    for name, w in alone.items():
        torch.testing.assert_close(shared[name], w, rtol=1e-3, atol=1e-3)


def test_resume_is_bitwise_identical(tmp_path):
    whole = distributed.EXAMPLE.results(["--steps", "12", "--out", str(tmp_path / "whole")])
    rest = distributed.EXAMPLE.results(
        ["--steps", "12", "--out", str(tmp_path / "rest"),
         "--resume", str(tmp_path / "whole" / "checkpoint.pt")]
    )  # fmt: skip
    assert rest["losses"] == whole["losses"][6:]
    first, second = (torch.load(tmp_path / d / "model.pt") for d in ("whole", "rest"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_backends_agree(tmp_path):
    example_checks.assert_agree(distributed.EXAMPLE, tmp_path)
