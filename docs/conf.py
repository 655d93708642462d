"""Sphinx: `make docs` builds the site from these pages, into build/docs.

The pages are plain Markdown that also reads in a repository browser. What they link to outside of
this folder becomes a page of the site: source files with line numbers, CONTRIBUTING and CHANGELOG.
"""

import html
import re
import sys
from pathlib import Path

from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import TextLexer, get_lexer_for_filename
from pygments.util import ClassNotFound

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT))

import lstm_fused  # noqa: E402

project = "lstm_fused"
author = "the lstm_fused authors"
copyright = author  # noqa: A001
release = version = lstm_fused.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
nitpicky = True
# Torch's and Python's own names, whose documentation is not read here; types in signatures of ours.
nitpick_ignore_regex = [
    (
        "py:.*",
        r"(torch|collections|typing|types|os)\..*|\w+"
        r"|lstm_fused\.(replace|explain|states|rl|fallback|quantization)\.\w+",
    )
]

myst_heading_anchors = 3
myst_url_schemes = {
    "http": None,
    "https": None,
    "source": {"url": "source/{{path}}.html#{{fragment}}"},
}
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_use_rtype = False  # "Returns:" begins with a shape, not with a type

html_theme = "furo"
html_title = "lstm_fused"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
pygments_style = "tango"
pygments_dark_style = "github-dark"

# A link (no picture) to a file outside of this folder, with or without a line.
OUTSIDE = re.compile(r"(?<!!)\[([^\]]*)\]\(\.\./([^)#\s]+)(?:#(L\d+))?\)")
# Files of the repository that are pages here, by what this folder calls them.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}


def to_site(match) -> str:
    """A link of OUTSIDE as the site needs it."""
    text, path, line = match.groups()
    if path in PAGES:
        return f"[{text}]({PAGES[path]})"
    return f"[{text}](source:{path}#{line or ''})" if (ROOT / path).is_file() else match[0]


def source_pages(app):
    """A page for each file that a page links to: its text, with an anchor for each line."""
    texts = (page.read_text() for page in DOCS.glob("*.md"))
    paths = {match[2] for text in texts for match in OUTSIDE.finditer(text)}
    for path in sorted(p for p in paths - set(PAGES) if (ROOT / p).is_file()):
        try:
            lexer = get_lexer_for_filename(path, stripnl=False)
        except ClassNotFound:
            lexer = TextLexer(stripnl=False)
        layout = HtmlFormatter(linenos="inline", lineanchors="L", anchorlinenos=True)
        code = highlight((ROOT / path).read_text(), lexer, layout)
        # Pygments' anchors are L-1; links to lines say L1.
        code = code.replace('"L-', '"L').replace('"#L-', '"#L')
        title = html.escape(path)
        yield f"source/{path}", {"title": title, "body": f"<h1>{title}</h1>{code}"}, "page.html"


def setup(app):
    def read(app, name, source):
        source[0] = OUTSIDE.sub(to_site, source[0])

    app.connect("source-read", read)
    app.connect("html-collect-pages", source_pages)
    return {"parallel_read_safe": True}
