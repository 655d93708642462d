"""Who is measured: a provider turns a problem into a run with `step()` and `results()`."""

import copy

import torch

import lstm_fused
from bench.problem import ModuleRun, Problem, data_of
from lstm_fused import ops

BASELINE = "nn.LSTM"


def torch_lstm(problem: Problem):
    return ModuleRun(copy.deepcopy(problem.module), problem)


class FusedRun(ModuleRun):
    def kernels(self) -> list[dict]:
        """What forward, then backward if there is one, ran: for the record."""
        with torch.set_grad_enabled(self.training):
            y, _ = self.module(self.x, self.state)
            ran = [ops.last_run()]
            if self.training:
                data_of(y).sum().backward()
                ran.append(ops.last_run())
        return ran


def fused(problem: Problem):
    return FusedRun(lstm_fused.replace(copy.deepcopy(problem.module)), problem)


PROVIDERS = {BASELINE: torch_lstm, "lstm_fused": fused}
