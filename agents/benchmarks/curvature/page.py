"""A page of what was found: tables in Markdown, and a figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agents import rundir
from agents.benchmarks.curvature.experiment import Curve
from agents.benchmarks.report import Table
from agents.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BEGIN, END = "<!-- measured -->", "<!-- /measured -->"
"""Lines between which a page is written by this program."""


def markdown(table: Table) -> str:
    """Write a table for a page.

    Args:
        table: The table.

    Returns:
        Its title in bold and its rows.
    """
    lines = [table.columns, ["---"] * len(table.columns), *table.rows]
    return "\n".join([f"**{table.title}**", "", *("| " + " | ".join(cells) + " |" for cells in lines)])


def parts(path: Path) -> tuple[str, str]:
    """Cut a page where measurements go.

    Args:
        path: The page.

    Returns:
        What stands before them and after them, the marks included.

    Raises:
        UsageError: If there is no such page, or it has no place for them.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot read --page {path}: {error}") from None
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(END) < text.index(BEGIN):
        raise UsageError(f"--page {path} needs one line {BEGIN} and below it one line {END}, which it has not")
    before, rest = text.split(BEGIN)
    return before + BEGIN, END + rest.split(END)[1]


def rewrite(path: Path, text: str) -> None:
    """Put measurements into a page in place of those that are there.

    Args:
        path: The page.
        text: Markdown.
    """
    before, after = parts(path)
    rundir.write_text(path, f"{before}\n\n{text}\n{after}")


def draw(curves: Sequence[Curve]) -> Figure:
    """Draw curves, one panel for each figure; axes are logarithmic where numbers span a decade.

    Args:
        curves: The curves.

    Returns:
        The figure.

    Raises:
        UsageError: If matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("the figure needs matplotlib; install it with: pip install matplotlib") from None
    panels: dict[str, list[Curve]] = {}
    for curve in curves:
        panels.setdefault(curve.panel, []).append(curve)
    labels = list(dict.fromkeys(curve.label for curve in curves))
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for axis, (title, lines) in zip(axes, panels.items(), strict=False):
        _draw_panel(axis, title, lines, labels)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    return figure


def _draw_panel(axis: Any, title: str, lines: Sequence[Curve], labels: list[str]) -> None:
    for line in lines:
        number = labels.index(line.label)
        style = ("-", "--", ":", "-.")[number // 10 % 4]
        axis.plot(line.x, line.y, label=line.label, color=f"C{number % 10}", linestyle=style)
    for name in ("x", "y"):
        if _spans_a_decade([value for line in lines for value in getattr(line, name)]):
            getattr(axis, f"set_{name}scale")("log")
    axis.set_title(title, fontsize="medium")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="x-small")


def _spans_a_decade(values: Sequence[float]) -> bool:
    finite = [value for value in values if math.isfinite(value)]
    return bool(finite) and min(finite) > 0 and max(finite) > 10 * min(finite)
