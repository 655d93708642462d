"""N to 1: the next value of a time series from the values before it.

The recurrent layer reads a window of years, and a linear layer predicts the next year's value from
its last state. The series is statsmodels' sunspots: yearly means of 1700 to 2008. The last fifth is
held out.

Two forecasts are plotted beside the truth: one year ahead, always from true values, and all
held-out years at once, where each forecast is the next input. A forecast is worth something if it
is better than persistence, which repeats the value before.
"""

import sys

import torch
from torch import nn

from examples import common
from examples.layers import KINDS, hidden_of, layer

HIDDEN, WINDOW = 32, 24
PERSISTENCE = "always the value before"


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
        PERSISTENCE: error(windows[split:, -1]),
        "the last known value, kept": error(windows[split, -1].expand_as(ahead)),
        "always the mean": error(torch.zeros_like(ahead)),
    }
    rows = [[name, value, verdict(errors, name)] for name, value in errors.items()]
    report.table(
        "errors", ["forecast", "rms error", "than persistence"], rows, "on values held out"
    )
    forecasts = {"one step ahead": ahead, "all steps at once": free}
    labels = {
        f"{name}: rms error {errors[name]:.3g}, {verdict(errors, name)} than persistence": values
        for name, values in forecasts.items()
    }
    scale = {label: values * deviation + mean for label, values in labels.items()}
    plot_forecast(report, series, begin, known, scale, errors[PERSISTENCE], args.data)
    return {
        "losses": training.losses,
        "errors": errors,
        "outputs": ahead,
        "problem": (model, loss_of, (windows[:16], targets[:16])),
    }


def verdict(errors, name):
    """Whether a forecast is better or worse than persistence."""
    apart = errors[name] - errors[PERSISTENCE]
    return "worse" if apart > 0 else "better" if apart < 0 else "-"


def plot_forecast(report, series, begin, known, forecasts, persistence, path):
    """The held-out values and as many before them, with each forecast under its label."""
    first = max(0, 2 * known - len(series))
    years = range(begin, begin + len(series))
    of_what = f"the last column of {path.name}" if path else "Sunspots"
    error = f"persistence (the value before) has rms error {persistence:.3g}"
    title = f"{of_what}, forecast right of the line; {error}"
    with report.plot("forecast", title, figsize=(7, 4)) as axis:
        if axis is not None:
            axis.plot(years[first:], series[first:].tolist(), color="0.6", label="truth")
            for style, (label, values) in zip(("-", "--"), forecasts.items(), strict=True):
                axis.plot(years[known:], values.tolist(), style, label=label)
            axis.axvline(years[known], color="black", linewidth=0.5)
            axis.set_xlabel("row of the file" if path else "year")
            axis.set_ylabel("value" if path else "sunspot number, yearly mean")
            axis.figure.legend(loc="outside lower center")


EXAMPLE = common.Example(
    "forecast", __doc__, run, steps=300, quick=300, options=options,
    data="CSV whose last column is the series (default: statsmodels' sunspots)",
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(EXAMPLE.main())
