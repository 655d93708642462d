"""How far a measurement is: a bar where rich is installed, a line a row where it is not."""

import contextlib
import sys
import time

try:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table
except ImportError:  # timing and JSON need no more than torch
    Console = Progress = Table = None


def clock_text(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


class Estimate:
    """Time left, from rows done so far and the part of the present one."""

    def __init__(self, rows: int, now=time.monotonic):
        self.rows = rows
        self.now = now
        self.begin = now()
        self.done = 0.0

    def left(self) -> float | None:
        """Seconds, None before anything is done."""
        if not self.done:
            return None
        return (self.now() - self.begin) * (self.rows - self.done) / self.done

    def text(self) -> str:
        left = self.left()
        return "" if left is None else f"about {clock_text(left)} left"


class Silent:
    """Tells nobody; the interface of the others."""

    def row(self, index: int, name: str) -> None:
        """A row begins."""

    def part(self, fraction: float) -> None:
        """So much of the row is done."""


class Lines(Silent):
    def __init__(self, rows: int, out=None):
        self.estimate = Estimate(rows)
        self.out = out or sys.stderr

    def row(self, index, name):
        self.estimate.done = index
        print(f"{index + 1}/{self.estimate.rows} {name}  {self.estimate.text()}", file=self.out)

    def part(self, fraction):
        pass


class Bar(Silent):
    def __init__(self, progress, rows: int):
        self.estimate = Estimate(rows)
        self.progress = progress
        self.task = progress.add_task("", total=rows, left="")
        self.index = 0

    def row(self, index, name):
        self.index = index
        self.progress.update(self.task, description=name)
        self.part(0.0)

    def part(self, fraction):
        self.estimate.done = self.index + fraction
        self.progress.update(self.task, completed=self.estimate.done, left=self.estimate.text())


@contextlib.contextmanager
def shown(rows: int, console=None):
    """A progress display for so many rows; console is rich's, or None for plain lines."""
    if console is None or Progress is None:
        yield Lines(rows)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        yield Bar(progress, rows)
