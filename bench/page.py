"""One HTML page of results, with nothing to load from elsewhere."""

import base64
import html
import json
from pathlib import Path

from bench import machine, report, roofline

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem;
       color: #1c2429; background: #fff }
table { border-collapse: collapse; font-size: 14px }
td, th { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #e3e7ea;
         white-space: nowrap }
td:first-child, th:first-child { text-align: left }
tr.group td { font-weight: 600; padding-top: 1rem }
tr.missed td { background: #fff6dc }
tr.red td { background: #fde4e0 }
img { max-width: 100% }
pre { overflow-x: auto; background: #f4f6f7; padding: .8rem }
.scroll { overflow-x: auto }
"""


def html_table(result: dict) -> str:
    """The report's table; red rows where a provider was wrong, yellow where a goal was missed."""
    heading, groups = report.cells(result)
    parts = ["<tr>", *(f"<th>{html.escape(name)}</th>" for name in heading), "</tr>"]
    for name, rows in groups:
        parts.append(
            f'<tr class="group"><td colspan="{len(heading)}">{html.escape(name)}</td></tr>'
        )
        for row in rows:
            red = any(cell.startswith(("wrong", "failed")) for cell in row)
            missed = any("missed" in cell for cell in row)
            kind = ' class="red"' if red else ' class="missed"' if missed else ""
            parts.append(f"<tr{kind}>{''.join(f'<td>{html.escape(c)}</td>' for c in row)}</tr>")
    return f'<div class="scroll"><table>{"".join(parts)}</table></div>'


def sources(result: dict) -> str:
    """Who published the shapes, where somebody did."""
    pairs = {
        (row["workload"]["name"], row["workload"]["source"])
        for row in result["rows"]
        if row["workload"]["source"]
    }
    items = "".join(f"<li>{html.escape(f'{n}: {s}')}</li>" for n, s in sorted(pairs))
    return f"<h3>Sources of the shapes</h3><ul>{items}</ul>" if items else ""


def section(result: dict, svg: Path | None) -> str:
    m = result["machine"]
    facts = dict(m)
    parts = [
        f"<h2>{html.escape(machine.title(m))}, set {html.escape(result['set'])}</h2>",
        f"<p>{html.escape(report.caption(result))}</p>",
    ]
    if svg is not None:
        data = base64.b64encode(svg.read_bytes()).decode()
        parts.append(f'<img alt="chart" src="data:image/svg+xml;base64,{data}">')
    parts += [html_table(result), sources(result)]
    if result.get("roofline"):
        lines = "\n".join(roofline.lines(roofline.from_json(result["roofline"])))
        parts.append(f"<h3>The machine's limits</h3><pre>{html.escape(lines)}</pre>")
    text = html.escape(json.dumps(facts, indent=1))
    parts.append(f"<details><summary>Machine and versions</summary><pre>{text}</pre></details>")
    return "\n".join(parts)


def page(results: list[dict], svgs: list[Path | None]) -> str:
    sections = [section(result, svg) for result, svg in zip(results, svgs, strict=True)]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>lstm_fused, measured</title><style>{STYLE}</style></head><body>\n"
        "<h1>lstm_fused, measured</h1>\n" + "\n".join(sections) + "\n</body></html>\n"
    )
