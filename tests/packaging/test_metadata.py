"""What says the version, the licence and the authors says the same everywhere."""

import re
import sys
from pathlib import Path

import lstm_fused
from lstm_fused import runtime

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest needs it too

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def citation(key):
    """A scalar of CITATION.cff, which has no nested key of the same name."""
    (found,) = re.findall(rf"^[ -]*{key}: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    return found.strip('"')


def bibtex(key):
    (found,) = re.findall(rf"^  {key} += {{+(.+?)}}+,$", (ROOT / "README.md").read_text(), re.M)
    return found


def test_version():
    version = lstm_fused.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    assert version == citation("version") == bibtex("version")
    assert runtime.build_info()["version"] == version
    assert PROJECT["dynamic"] == ["version"]
    changes = (ROOT / "CHANGELOG.md").read_text()
    newest = re.search(r"^## (.+)$", changes, re.MULTILINE)[1]
    assert version in newest
    if not newest.startswith("Unreleased"):
        assert citation("date-released") in newest


def test_licence():
    text = (ROOT / "LICENSE").read_text()
    assert PROJECT["license"] == citation("license") == "BSD-3-Clause"
    assert PROJECT["license-files"] == ["LICENSE"]
    assert "BSD 3-Clause" in text and "Neither the name of" in text


def test_authors():
    (author,) = PROJECT["authors"]
    assert author["name"].lower() == citation("name").lower() == bibtex("author").lower()
    holder = re.search(r"Copyright \(c\) \d{4}, (.+)", (ROOT / "LICENSE").read_text())[1]
    assert author["name"].lower() == holder.lower()


def test_title():
    assert citation("title") == bibtex("title")
    assert citation("title").startswith(f"{PROJECT['name']}: ")
