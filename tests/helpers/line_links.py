"""Links from pages to lines of code, and the line each of them should have.

Such a link is `[name](../path#L123)`. The name, without backticks, is what must stand on that line:
an identifier, which is linked to its definition, or a piece of code, which is linked to the first
line that contains it.

    python -m tests.helpers.line_links --write    # corrects the line numbers of all pages
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")], key=lambda path: path.relative_to(ROOT)
)
LINK = re.compile(r"\[`?([^\]`]+)`?\]\(([^)#\s]+)#L(\d+)\)")
# What stands before a name in the line that defines it, in Python and in C++.
KEYWORD = r"(?:def|class|struct|enum class|using)\s+"
FUNCTION = r"(?:[\w:&*<>,]+\s+)+[&*]?(?:\w+::)?"
NO_TYPE = re.compile(r"\s*(?://|#|return\b|if\b|for\b|else\b|case\b)")


@dataclass(frozen=True)
class LineLink:
    page: Path
    name: str
    target: str  # relative to the page
    line: int

    @property
    def path(self) -> Path:
        return (self.page.parent / self.target).resolve()

    def __str__(self):
        return f"{self.page.name}: {self.name} in {self.target}#L{self.line}"


def links_of(page: Path) -> list[LineLink]:
    found = LINK.findall(page.read_text())
    return [LineLink(page, name, target, int(line)) for name, target, line in found]


def line_of(name: str, text: str) -> int | None:
    """The number of the line of text that name is to be linked to, None if it is in no line."""
    lines = text.splitlines()
    word = re.compile(rf"(?<!\w){re.escape(name)}(?!\w)")
    patterns = [word]
    if name.isidentifier():
        defined = re.compile(rf"\s*{KEYWORD}{name}\b(?!.*;$)")
        function = re.compile(rf"\s*(?:inline |static |constexpr )*{FUNCTION}{name}\(")
        assigned = re.compile(rf"\s*(?:{FUNCTION})?{name}(?:\[\])? = ")
        patterns = [defined, function, assigned, word]
    for pattern in patterns:
        match = pattern.search if pattern is word else pattern.match
        for number, line in enumerate(lines, 1):
            if match(line) and (pattern is word or not NO_TYPE.match(line)):
                return number
    return None


def expected_line(link: LineLink) -> int | None:
    return line_of(link.name, link.path.read_text()) if link.path.is_file() else None


def rewrite(page: Path) -> list[LineLink]:
    """Correct the page's line numbers; returns the links whose name is not found."""
    lost = []

    def corrected(match):
        link = LineLink(page, match[1], match[2], int(match[3]))
        line = expected_line(link)
        if line is None:
            lost.append(link)
            return match[0]
        return match[0].replace(f"#L{match[3]})", f"#L{line})")

    text = page.read_text()
    new = LINK.sub(corrected, text)
    if new != text:
        page.write_text(new)
    return lost


def main(argv) -> int:
    if argv == ["--write"]:
        wrong = [link for page in PAGES for link in rewrite(page)]
    else:
        links = [link for page in PAGES for link in links_of(page)]
        wrong = [link for link in links if link.line != expected_line(link)]
    for link in wrong:
        print(link)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
