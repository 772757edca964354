"""Draw learning curves: ``python -m scripts.plot RUN_DIR... --output FILE.png``."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from agents import curves, rundir
from agents.errors import UsageError
from scripts import console

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PROG = "python -m scripts.plot"
_FORMATS = (".png", ".pdf", ".svg")


@dataclass(frozen=True)
class Arguments:
    """Options of the program."""

    sources: Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN_DIR...")]
    """Run directories, folders of them, or CSV files of curves."""
    output: Path | None = None
    """Picture to write: .png, .pdf or .svg."""
    csv: Path | None = None
    """CSV file of the curves to write."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
        argv: Its arguments; None takes the process's.

    Returns:
        The exit status.
    """
    return console.run(_main, argv)


def _main(argv: Sequence[str]) -> int:
    about = "Draw learning curves: interquartile mean over seeds, with 95 % bootstrap bands."
    arguments = console.parse(Arguments, argv, prog=_PROG, about=about)
    _check(arguments)
    found = [curve for source in arguments.sources for curve in curves.read(source)]
    if arguments.csv is not None:
        rundir.write_text(arguments.csv, curves.to_csv(found))
        print(f"{arguments.csv}: {len(found)} curves")
    if arguments.output is not None:
        figure, form = draw(found), arguments.output.suffix[1:]
        rundir.write_whole(arguments.output, lambda stream: figure.savefig(stream, format=form, dpi=150))
        print(f"{arguments.output}: {len(found)} curves")
    return console.DONE


def draw(found: Sequence[curves.Curve]) -> Figure:
    """Draw curves, one panel per environment and one line per label.

    Args:
        found: The curves.

    Returns:
        The figure.

    Raises:
        UsageError: If matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("plotting needs matplotlib; install it with: pip install matplotlib") from None
    panels = curves.by_panel(found)
    labels = sorted({curve.label for curve in found})
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.2 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for axis, (env_id, groups) in zip(axes, panels.items(), strict=False):
        _draw_panel(axis, env_id, groups, labels)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    return figure


def _draw_panel(axis: Any, env_id: str, groups: Mapping[str, list[curves.Curve]], labels: list[str]) -> None:
    for label, runs in groups.items():
        band, colour = curves.summarise(runs), f"C{labels.index(label) % 10}"
        axis.plot(band.timesteps, band.centre, color=colour, label=f"{label} ({band.seeds})")
        if band.seeds > 1:
            axis.fill_between(band.timesteps, band.low, band.high, color=colour, alpha=0.2, linewidth=0)
    axis.set_title(env_id)
    axis.set_xlabel("environment steps")
    axis.set_ylabel("return")
    axis.ticklabel_format(axis="x", style="sci", scilimits=(3, 3))
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small", title="label (seeds)", title_fontsize="x-small")


def _check(arguments: Arguments) -> None:
    if not arguments.sources:
        raise UsageError("there is nothing to plot; name run directories or CSV files of curves")
    if arguments.output is None and arguments.csv is None:
        raise UsageError("there is nowhere to put the plot; give --output FILE.png or --csv FILE.csv")
    if arguments.output is not None and arguments.output.suffix not in _FORMATS:
        raise UsageError(f"--output must end in one of {', '.join(_FORMATS)}, got {arguments.output}")
    for path in (arguments.output, arguments.csv):
        if path is not None:
            console.check_output(path)


if __name__ == "__main__":
    sys.exit(main())
