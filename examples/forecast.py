"""N to 1: the next value of a time series from the values before it.

The recurrent layer reads a window of years, and a linear layer predicts the next year's value from
its last state. The series is statsmodels' sunspots: yearly means of 1700 to 2008. The last fifth is
held out.

Two forecasts are plotted beside the truth: one year ahead, always from true values, and all
held-out years at once, where each forecast is the next input.
"""

import sys

import torch
from torch import nn

from examples import common
from examples.layers import KINDS, hidden_of, layer

HIDDEN, WINDOW = 32, 24


class Forecaster(nn.Module):
    """Windows (N, T) of a series -> (N,), the next value of each."""

    def __init__(self, kind, backend):
        super().__init__()
        self.years = layer(kind, backend)(1, HIDDEN, batch_first=True)
        self.head = nn.Linear(HIDDEN, 1)

    def forward(self, values):
        _, state = self.years(values[:, :, None])
        return values[:, -1] + self.head(hidden_of(state)[-1])[:, 0]  # predicts the difference


def load(path):
    """The series (S,), and the year or index of its first value."""
    if path is None:
        from statsmodels.datasets import sunspots

        years = sunspots.load_pandas().data
        return torch.tensor(years["SUNACTIVITY"].to_numpy(float)), int(years["YEAR"][0])
    series = common.read_numbers(path)[:, -1]
    if len(series) < 4 * WINDOW:
        raise common.DataError(f"{path} holds {len(series)} values, {4 * WINDOW} are needed")
    return series.double(), 0


def loss_of(model, windows, targets):
    return nn.functional.mse_loss(model(windows), targets)


@torch.no_grad()
def free_run(model, window, count):
    """count forecasts (count,) from a window (T,), each appended to the window of the next."""
    found = []
    for _ in range(count):
        found.append(model(window[None]))
        window = torch.cat([window[1:], found[-1]])
    return torch.cat(found)


def options(parser):
    parser.add_argument("--layer", choices=KINDS, default="lstm")


def run(args, report):
    series, begin = load(args.data)
    known = len(series) - len(series) // 5
    mean, deviation = series[:known].mean(), series[:known].std()
    if not deviation > 0:
        raise common.DataError(f"{args.data} is constant, there is nothing to learn")
    scaled = ((series - mean) / deviation).to(torch.get_default_dtype())
    windows = scaled.unfold(0, WINDOW, 1)[:-1]
    targets = scaled[WINDOW:]
    split = known - WINDOW
    model = Forecaster(args.layer, args.backend)
    batches = common.minibatches((windows[:split], targets[:split]), 32, args.seed)
    training = common.train(model, batches, loss_of, args.steps, report)
    with torch.no_grad():
        ahead = model(windows[split:])
    free = free_run(model, windows[split], len(ahead))

    def error(forecast):
        return ((forecast - targets[split:]).square().mean().sqrt() * deviation).item()

    errors = {
        "one step ahead": error(ahead),
        "all steps at once": error(free),
        "always the value before": error(windows[split:, -1]),
        "always the mean": error(torch.zeros_like(ahead)),
    }
    report.table("errors", ["forecast", "rms error"], list(errors.items()), "on values held out")
    plot_forecast(report, series, begin, known, ahead * deviation + mean, free * deviation + mean)
    return {
        "losses": training.losses,
        "errors": errors,
        "outputs": ahead,
        "problem": (model, loss_of, (windows[:16], targets[:16])),
    }


def plot_forecast(report, series, begin, known, ahead, free):
    years = range(begin, begin + len(series))
    with report.plot("forecast", figsize=(10, 4)) as axis:
        if axis is not None:
            axis.plot(years, series.tolist(), color="0.6", label="truth")
            axis.plot(years[known:], ahead.tolist(), label="one step ahead")
            axis.plot(years[known:], free.tolist(), "--", label="all steps at once")
            axis.axvline(years[known], color="black", linewidth=0.5)
            axis.legend()


EXAMPLE = common.Example(
    "forecast", __doc__, run, steps=300, quick=300, options=options,
    data="CSV whose last column is the series (default: statsmodels' sunspots)",
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(EXAMPLE.main())
