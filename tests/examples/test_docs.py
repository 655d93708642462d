"""The pages: their code runs, what they link to and the files they name exist."""

import doctest
import re
import subprocess
import sys
from importlib.util import find_spec
from types import ModuleType

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


# Pages whose code compiles for long.
SLOW = ("deploying.md",)
BLOCK = re.compile(r"^(?:<!-- needs: ([\w ]+) -->\n)?```python\n(.*?)^```", re.S | re.M)


def has(need: str) -> bool:
    """Whether there is what a block needs: a module, or the device `cuda`."""
    return torch.cuda.is_available() if need == "cuda" else find_spec(need) is not None


def run_code(text: str, names: dict, title: str) -> tuple[int, int]:
    """Run the Python blocks of a page in one namespace; (blocks run, examples with `>>>`)."""
    examples, count = 0, 0
    for needs, code in BLOCK.findall(text):
        if not all(map(has, needs.split())):
            continue
        count += 1
        if ">>> " in code:
            test = doctest.DocTestParser().get_doctest(code, names, title, title, 0)
            result = doctest.DocTestRunner().run(test, clear_globs=False)
            assert result.failed == 0
            names.update(test.globs)
            examples += result.attempted
        else:
            exec(compile(code, title, "exec"), names)
    return count, examples


def pages_with_code():
    for page in PAGES:
        if BLOCK.search(page.read_text()):
            marks = [pytest.mark.full] if page.name in SLOW else []
            yield pytest.param(page, id=page_id(page), marks=marks)


def test_needs_are_known():
    """What blocks need is in the development environment, but for what it cannot have."""
    text = (ROOT / "requirements-dev.txt").read_text().replace("-", "_")
    known = set(re.findall(r"^\w+", text, re.M))
    needs = " ".join(needs for page in PAGES for needs, _ in BLOCK.findall(page.read_text()))
    assert set(needs.split()) - known == {"cuda", "executorch"}


@pytest.mark.parametrize("page", list(pages_with_code()))
def test_code_runs(page, monkeypatch, recwarn):
    torch.manual_seed(0)
    text = page.read_text()
    module = ModuleType(f"{page.stem}_page")  # a real one: pickle looks for a page's classes in it
    monkeypatch.setitem(sys.modules, module.__name__, module)
    vars(module).update(torch=torch, lstm_fused=lstm_fused, nn=lstm_fused)
    run, _ = run_code(text, vars(module), page.name)
    assert run or all(needs for needs, _ in BLOCK.findall(text))


def test_outputs_are_torchs():
    """The page on results, with torch.nn in place of ours."""
    torch.manual_seed(0)
    text = (ROOT / "docs" / "outputs.md").read_text()
    assert run_code(text, {"nn": torch.nn}, "outputs.md")[1] > 25


def test_wrong_code_fails():
    with pytest.raises(AssertionError):
        run_code("```python\n>>> 1 + 1\n3\n\n```\n", {}, "page")
    with pytest.raises(ZeroDivisionError):
        run_code("```python\n1 / 0\n```\n", {}, "page")
    skipped = "<!-- needs: no_such -->\n```python\n1 / 0\n```\n"
    assert run_code(f"{skipped}```python\nx = 1\n```\n{skipped}", {}, "page") == (1, 0)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_commands_exist(page):
    """What a page's shell blocks run: make's targets, this repository's modules and scripts."""
    blocks = "".join(re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.S | re.M))
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    assert set(re.findall(r"^make ([\w-]+)", blocks, re.M)) <= set(targets)
    modules = re.findall(r"-m ((?:bench|examples|tests|lstm_fused)[\w.]*)", blocks)
    assert all(find_spec(module) for module in modules)
    scripts = re.findall(r"python[\d.]* ([\w./]+\.py)", blocks)
    assert all((ROOT / script).is_file() for script in scripts)


def without_blocks(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)


def code_words(text: str) -> list[str]:
    """The words of what stands in backticks, without fenced blocks."""
    text = without_blocks(text)
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
    targets = re.findall(r"\]\(([^)\s]+)\)", without_blocks(page.read_text()))
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


@pytest.mark.full
def test_site_builds(tmp_path):
    """As `make docs` builds it: any warning is an error. Each page is in a table of contents."""
    for need in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(need)
    command = re.search(
        r"^docs:.*\n\t@?\$\(BIN\)/python (.*)$", (ROOT / "Makefile").read_text(), re.M
    )
    words = command[1].replace("build/", f"{tmp_path}/").split()
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for page in (ROOT / "docs").glob("*.md"):
        assert (tmp_path / "docs" / f"{page.stem}.html").is_file()
    for link in (link for page in PAGES for link in line_links.links_of(page)):
        if link.page.parent.name == "docs":
            target = link.path.relative_to(ROOT)
            assert f'id="L{link.line}"' in (tmp_path / "docs/source" / f"{target}.html").read_text()
