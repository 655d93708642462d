"""The pages: their code runs, what they link to and the files they name exist."""

import doctest
import re

import pytest
import torch

import lstm_fused
from tests.helpers import line_links

ROOT = line_links.ROOT
PAGES = line_links.PAGES
FOLDERS = ("bench", "csrc", "docs", "examples", "lstm_fused", "tests")
FILE = re.compile(r"[\w.-]+\.(?:h|inc|cpp|cu|cuh|py|md|json|toml|svg|ninja|cff)")
# Not files of this repository: torch's headers, what a build or a run writes.
FOREIGN = ("torch/", "build/", "lstm_fused/_C")


def page_id(page):
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("library", [torch.nn, lstm_fused], ids=["torch.nn", "lstm_fused"])
def test_outputs(library):
    torch.manual_seed(0)
    with torch.no_grad():
        failed, tried = doctest.testfile(
            str(ROOT / "docs" / "outputs.md"),
            module_relative=False,
            encoding="utf-8",
            globs={"nn": library},
        )
    assert failed == 0 and tried > 25


def code_words(text: str) -> list[str]:
    """The words of what stands in backticks, without fenced blocks."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    return [word for span in re.findall(r"`([^`\n]+)`", text) for word in span.split()]


def is_path(word: str) -> bool:
    if word.startswith(FOREIGN):
        return False
    return word.startswith(tuple(f"{f}/" for f in FOLDERS)) or bool(FILE.fullmatch(word))


def exists(word: str) -> bool:
    """Whether there is such a file, anywhere if the word has no folder; <name> is any name."""
    pattern = re.sub(r"<\w+>", "*", word.rstrip("/"))
    if "/" in pattern:
        return any(ROOT.glob(pattern))
    return any(any((ROOT / f).rglob(pattern)) for f in FOLDERS) or any(ROOT.glob(pattern))


def test_paths_are_recognised():
    assert is_path("csrc/params.h") and is_path("params.h") and is_path("bench/results")
    assert not is_path("torch.nn") and not is_path("torch/csrc/stable") and not is_path("a/b")
    assert exists("csrc/cells/<cell>.h") and exists("params.h") and not exists("csrc/missing.h")


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_named_files_exist(page):
    missing = [word for word in code_words(page.read_text()) if is_path(word) and not exists(word)]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_exist(page):
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    local = [t.partition("#")[0] for t in targets if "://" not in t]
    missing = [t for t in local if t and not (page.parent / t).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_line_links(page):
    """If this fails: python -m tests.helpers.line_links --write"""
    wrong = [
        str(link)
        for link in line_links.links_of(page)
        if link.line != line_links.expected_line(link)
    ]
    assert not wrong


def test_line_of():
    text = "\n".join(
        [
            "// run() is below",
            "struct Plan;",
            "struct Plan {",
            "  run(1);",
            "  return run(2);",
            "inline const char* run(int i) {",
            "def forward(x):",
            "  k.finish(1)",
            "kSizes = (1, 2)",
        ]
    )
    names = {"Plan": 3, "run": 6, "forward": 7, "k.finish": 8, "kSizes": 9, "return run": 5}
    assert {name: line_links.line_of(name, text) for name in names} == names
    assert line_links.line_of("missing", text) is None


def test_rewrite(tmp_path):
    code, page = tmp_path / "code.py", tmp_path / "page.md"
    code.write_text("\n\ndef found():\n    pass\n")
    page.write_text("[`found`](code.py#L1) and [`lost`](code.py#L2)")
    assert [link.name for link in line_links.rewrite(page)] == ["lost"]
    assert page.read_text() == "[`found`](code.py#L3) and [`lost`](code.py#L2)"


def test_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 9000


@pytest.mark.parametrize("name", ["README.md", "docs/one_time_step.md"])
def test_code_runs(name):
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / name).read_text(), re.S | re.M)
    assert blocks
    for block in blocks:
        exec(block, {"torch": torch, "lstm_fused": lstm_fused})
