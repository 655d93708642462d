"""Models of other libraries: what is measured, what is said, what is kept."""

import pytest
import torch

from bench import __main__ as cli
from bench import clients, pages, report
from bench.timing import Sampling


class Inline:
    """A worker that calls in this process."""

    def __init__(self, **_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def call(self, function, *args):
        return function(*args)


@pytest.fixture
def two(monkeypatch):
    """A table of one library that is here, torch, and one that is not."""
    build = lambda: (torch.nn.GRU(3, 4), torch.randn(5, 2, 3))  # noqa: E731
    here = clients.Client("torch", "layer", build)
    table = {"torch: layer": here, "nowhere: layer": clients.Client("no-such-library", "x", build)}
    monkeypatch.setattr(clients, "CLIENTS", table)
    monkeypatch.setattr(clients, "SAMPLING", Sampling(rounds=2, seconds=0.0))
    monkeypatch.setattr(clients, "Worker", Inline)
    return table


def test_measured_merged_and_shown(two, tmp_path, capsys):
    out = tmp_path / "clients.json"
    command = ["--threads", "1", "--json", str(out), "clients"]
    assert cli.main(command) == 0
    printed = capsys.readouterr()
    assert "nowhere: layer\n  not installed: pip install no-such-library" in printed.err
    assert (
        f"**torch {clients.importlib.metadata.version('torch')}, torch {torch.__version__}**"
        in (printed.out)
    )
    assert "| layer, training " in printed.out and "| 6 tensors |" in printed.out
    two["torch: more"] = two["torch: layer"]
    assert cli.main([*command, "more"]) == 0
    rows = report.load(out)["rows"]
    assert [row["client"] for row in rows] == ["torch: layer"] * 2 + ["torch: more"] * 2
    first = [row["providers"] for row in rows[:2]]
    assert cli.main([*command, "more"]) == 0
    assert [row["providers"] for row in report.load(out)["rows"][:2]] == first


def test_a_model_without_recurrent_modules_is_refused(two, monkeypatch):
    two["torch: layer"] = clients.Client("torch", "x", lambda: (torch.nn.Linear(3, 4), None))
    with pytest.raises(clients.model.ModelError, match="no module"):
        clients.measure_client("torch: layer")


def test_the_table():
    for key, client in clients.CLIENTS.items():
        assert key == f"{client.library}: {client.model}"
        assert client.modes in (clients.BOTH, ("forward",))


def test_results_go_to_their_own_page(two, tmp_path, monkeypatch):
    page, other, out = tmp_path / "works_with.md", tmp_path / "other.md", tmp_path / "c.json"
    for path in (page, other):
        path.write_text(f"{pages.BEGIN}\n{pages.END}\n")
    monkeypatch.setattr(pages, "WORKS_WITH", page)
    monkeypatch.setattr(pages, "README", other)
    monkeypatch.setattr(pages, "DOCS", other)
    assert cli.main(["--threads", "1", "--json", str(out), "clients"]) == 0
    assert cli.main(["report", str(out), "--readme"]) == 0
    assert "| layer, forward " in page.read_text() and "layer" not in other.read_text()


def test_every_client_has_committed_results():
    shown = pages.paths_in(pages.WORKS_WITH.read_text(), pages.WORKS_WITH)
    rows = [row for path in shown for row in report.load(path)["rows"]]
    assert {row["client"] for row in rows} == set(clients.CLIENTS)
    for row in rows:
        assert row["providers"]["lstm_fused"].keys() & {"parity", "unjudged"}
