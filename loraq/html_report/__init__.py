"""The HTML report of a suite: one file that needs no network, with tables, plots, layers, pictures and recipes.

`summary` makes the table's columns and rows, `strip` the layers' figures, `embedding` the pictures, `page` puts them
into `templates/report.html.j2`; `assets` has the style sheet and the scripts, which are written into the file. Plots
are drawn by these scripts (40 kB) as SVG and canvas: a plotting library would add 0.8 MB (Vega-Lite) to 4.8 MB (Plotly)
to each report.
"""

from __future__ import annotations

from pathlib import Path

from loraq.checkpoint import write_text
from loraq.html_report.page import page
from loraq.results import SuiteResult

REPORT = "report.html"


def write_report(result: SuiteResult, folder: Path) -> Path:
    """Write the report into `folder`, below which the result's pictures lie. Returns the file's path.

    The same result and pictures give the same bytes. Pictures that cannot be read are left out.
    """
    path = folder / REPORT
    write_text(path, page(result, folder))
    return path
