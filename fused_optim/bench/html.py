"""`bench --html`: one file with everything in it, that loads nothing and runs no script."""

import base64
import re
from pathlib import Path

from jinja2 import Environment, FileSystemLoader

from fused_optim.bench import charts, results, tables, timing, words
from fused_optim.bench.charts import Chart
from fused_optim.bench.results import Results

# So many rows, and a reader wants to choose whose details to see.
MOST_OPEN = 6


def save(found: Results, path: Path) -> None:
    """Write the report."""
    path.write_text(page(found), encoding="utf-8")


def page(found: Results) -> str:
    """The report as HTML."""
    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True,
        loader=FileSystemLoader(Path(__file__).parent),
    )  # fmt: skip
    environment.filters |= {
        "chunks": lambda cell: re.split(r" (?=[\[(])", cell),
        "picture": _picture,
    }
    return environment.get_template("report.html.j2").render(
        found=found, charts=charts, tables=tables, words=words, results=results, timing=timing,
        most_open=MOST_OPEN,
    )  # fmt: skip


def _picture(chart: Chart, width: float) -> str:
    """As an address that holds it."""
    drawn = charts.svg(charts.draw(chart, width, titled=False))
    return "data:image/svg+xml;base64," + base64.b64encode(drawn.encode()).decode()
