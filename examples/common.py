"""Shared by the examples: arguments, seeds, the training loop, reports as text, tables and plots.

rich and matplotlib are optional: without rich, tables are plain text and there is no progress bar;
without matplotlib there are no plots.
"""

import argparse
import csv
import itertools
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from examples.layers import BACKENDS

try:
    import rich.console
    import rich.progress
    import rich.table
except ImportError:
    rich = None
try:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot
except ImportError:
    pyplot = None

BUILT_IN = Path(__file__).parent / "data"
UNKNOWN = "\N{REPLACEMENT CHARACTER}"
STYLE = {
    "font.size": 9,
    "figure.titlesize": 10,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "figure.constrained_layout.h_pad": 0.06,
}


class DataError(Exception):
    """The data cannot be used; the message gives the reason in one line."""


class Report:
    """The output of an example: text on the terminal, tables and plots in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.console = rich.console.Console() if rich else None
        folder.mkdir(parents=True, exist_ok=True)

    def say(self, text: str = "") -> None:
        if self.console:
            self.console.print(text, markup=False, highlight=False)
        else:
            print(text)

    def table(self, name: str, columns: list[str], rows: list[list], title: str = "") -> None:
        """Print the rows and write them to NAME.csv."""
        rows = [[f"{x:.4g}" if isinstance(x, float) else str(x) for x in row] for row in rows]
        with (self.folder / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([columns, *rows])
        if self.console:
            table = rich.table.Table(title=title or None)
            for k, column in enumerate(columns):
                table.add_column(column, justify="right" if k else "left")
            for row in rows:
                table.add_row(*(rich.markup.escape(cell) for cell in row))
            self.console.print(table)
            return
        widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
        print(title)
        for row in [columns, *rows]:
            print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))

    @contextmanager
    def plot(self, name: str, title: str, rows: int = 1, columns: int = 1, **options):
        """Yields the axes of a figure (one or an array), which is then written to NAME.png.

        At most 7 inches wide (770 pixels) it is readable in a README. Yields None where matplotlib
        is not installed.
        """
        if pyplot is None:
            self.say(f"no plot {name}: matplotlib is not installed")
            yield None
            return
        options = {"layout": "constrained", "figsize": (7, 3.6)} | options
        with matplotlib.rc_context(STYLE):
            figure, axes = pyplot.subplots(rows, columns, **options)
            figure.suptitle(title)
            try:
                yield axes
                figure.savefig(self.folder / f"{name}.png", dpi=110)
            finally:
                pyplot.close(figure)
        self.say(f"plot: {self.folder / name}.png")

    def progress(self, items, total: int, what: str):
        """Yields each item of pairs (item, status text), with a progress bar on a terminal."""
        if not (self.console and self.console.is_terminal):
            yield from (item for item, _ in items)
            return
        columns = (
            rich.progress.TextColumn(what),
            rich.progress.BarColumn(),
            rich.progress.TextColumn("{task.completed}/{task.total}  {task.fields[status]}"),
            rich.progress.TimeRemainingColumn(),
        )
        with rich.progress.Progress(*columns, console=self.console, transient=True) as progress:
            bar = progress.add_task("", total=total, status="")
            for item, status in items:
                progress.update(bar, advance=1, status=status)
                yield item


@dataclass
class Training:
    """The loss of every step and the total time in seconds."""

    losses: list[float]
    seconds: float

    def __str__(self):
        first, last = self.losses[0], self.last
        return f"loss {first:.3f} -> {last:.3f} in {len(self.losses)} steps, {self.seconds:.1f} s"

    @property
    def last(self) -> float:
        """The mean loss of the last tenth of the steps."""
        tail = self.losses[-max(1, len(self.losses) // 10) :]
        return sum(tail) / len(tail)


def train(
    model: nn.Module,
    batches,
    loss_of: Callable,
    steps: int,
    report: Report,
    lr: float = 3e-3,
    what: str = "training",
) -> Training:
    """Adam with clipped gradients; batches yields the arguments of loss_of(model, ...)."""
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)

    def losses():
        for batch in itertools.islice(batches, steps):
            optimizer.zero_grad()
            loss = loss_of(model, *batch)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            yield loss.item(), f"loss {loss.item():.3f}"

    begin = time.perf_counter()
    found = list(report.progress(losses(), steps, what))
    training = Training(found, time.perf_counter() - begin)
    model.eval()
    report.say(f"{what}: {training}")
    return training


def minibatches(tensors, size: int, seed: int):
    """Endless minibatches of rows, shuffled anew each epoch by a generator with the seed."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(tensors[0]), generator=generator)
        for rows in order.split(size):
            yield tuple(t[rows] for t in tensors)


def held_out(items: list, share: float, seed: int) -> tuple[list, list]:
    """Shuffled items, split into a training set and a test set that is `share` of them."""
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed)).tolist()
    count = max(1, round(share * len(items)))
    return [items[k] for k in order[count:]], [items[k] for k in order[:count]]


def read_pairs(path: Path) -> list[tuple[str, str]]:
    """(text, label) of each row of a CSV file whose header is `text,label`."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if not {"text", "label"} <= set(reader.fieldnames or ()):
                raise DataError(f"{path} has no columns text and label")
            pairs = [(row["text"] or "", row["label"] or "") for row in reader]
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is not a CSV file in UTF-8: {error}") from None
    pairs = [(text, label) for text, label in pairs if text and label]
    if len({label for _, label in pairs}) < 2:
        raise DataError(f"{path} has fewer than two labels")
    return pairs


def read_numbers(path: Path) -> torch.Tensor:
    """The numbers of a CSV file, (rows, columns); a header line is skipped."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.reader(file) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: {error}") from None
    for begin in (0, 1):
        try:
            numbers = torch.tensor([[float(x) for x in row] for row in rows[begin:]])
        except ValueError:  # not a number, or rows of different lengths
            continue
        if numbers.dim() == 2 and numbers.isfinite().all():
            return numbers
    raise DataError(f"{path} does not hold numbers in rows of one length")


@dataclass(frozen=True)
class Example:
    """A runnable example. `run(args, report)` returns its results by name, for the tests."""

    name: str
    doc: str
    run: Callable
    steps: int
    quick: int
    data: str
    options: Callable = lambda parser: None

    def parse(self, argv=None):
        parser = argparse.ArgumentParser(
            prog=f"python -m examples.{self.name}",
            description=self.doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add = parser.add_argument
        add("--backend", choices=BACKENDS, default="fused")
        add("--data", type=Path, help=self.data)
        add("--seed", type=int, default=0)
        add("--steps", type=int, help=f"training steps (default: {self.steps})")
        add("--quick", action="store_true", help=f"a small run: {self.quick} steps")
        add(
            "--out",
            type=Path,
            help=f"folder to write to (default: build/examples/{self.name})",
        )
        add("--threads", type=int, default=1, help="more than one is no faster at these sizes")
        self.options(parser)
        args = parser.parse_args(argv)
        args.steps = args.steps or (self.quick if args.quick else self.steps)
        args.out = args.out or Path("build/examples") / self.name
        if args.steps < 1 or args.threads < 1:
            parser.error("--steps and --threads must be at least 1")
        return args

    def results(self, argv=None) -> dict:
        """Run with these arguments. The seed determines data, initial weights and batches."""
        args = self.parse(argv)
        torch.set_num_threads(args.threads)
        torch.manual_seed(args.seed)
        begin = time.perf_counter()
        report = Report(args.out)
        found = self.run(args, report)
        seconds = time.perf_counter() - begin
        report.say(f"{self.name}: backend {args.backend}, {seconds:.1f} s, see {args.out}")
        return found

    def main(self, argv=None) -> int:
        try:
            self.results(argv)
        except DataError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        return 0
