"""Curves and histograms as SVG that stands in a page and takes its colours: no script, no font, light and dark."""

import io
import re

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

# Stand-ins that matplotlib draws with, and the colours of the page that take their place.
COLOURS = {"#010203": "var(--ink)", "#010204": "var(--soft)", "#010205": "var(--line)", "#010206": "var(--a)",
           "#010207": "var(--b)", "#010208": "var(--c)"}  # fmt: skip
INK, SOFT, LINE, *SERIES = COLOURS
STYLE = {
    "svg.fonttype": "none", "font.size": 9.5, "axes.edgecolor": LINE, "axes.labelcolor": SOFT, "xtick.color": LINE,
    "ytick.color": LINE, "xtick.labelcolor": SOFT, "ytick.labelcolor": SOFT, "text.color": INK, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "axes.grid.axis": "y", "grid.color": LINE, "grid.linewidth": 0.6,
    "legend.frameon": False, "legend.labelcolor": INK, "lines.linewidth": 1.6,
}  # fmt: skip
POINTS = 200  # a curve: more could not be told apart


def curves(title: str, unit: str, series: dict[str, tuple[list, list]], axis: str = "auto", share=False) -> Markup:
    """Lines over optimizer steps: `series` is {name: (steps, values)}. A curve of very many points is drawn as their mean
    in stretches, with the range of values as a band. `axis` may be "zero" to begin there, or "log" to be logarithmic where
    values span two powers of ten; a `share` is written in per cent."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(title, unit, "step")
        for colour, (name, (steps, values)) in zip(SERIES, series.items(), strict=False):
            steps, values = np.asarray(steps, float), np.asarray(values, float)
            parts = np.array_split(np.arange(len(steps)), min(POINTS, len(steps)))
            middle = [values[part].mean() for part in parts]
            at = [steps[part].mean() for part in parts]
            marker = "o" if len(parts) <= 12 else None
            axes.plot(at, middle, color=colour, label=name, marker=marker, markersize=3.5)
            if len(steps) > POINTS:
                low, high = zip(*((values[part].min(), values[part].max()) for part in parts), strict=True)
                axes.fill_between(at, low, high, color=colour, alpha=0.2, linewidth=0)
        every = np.concatenate([np.asarray(values, float) for _, values in series.values()])
        every = every[np.isfinite(every)]
        if axis == "log" and len(every) and every.min() > 0 and every.max() > 100 * every.min():
            axes.set_yscale("log")
        else:
            axes.yaxis.set_major_locator(MaxNLocator(5))
        if axis == "zero":
            axes.set_ylim(bottom=0)
        if share:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
        elif len(every) and every.max() >= 1000:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if len(series) > 1:
            axes.legend(loc="best", handlelength=1.2)
        return _svg(figure, title)


def histogram(title: str, unit: str, series: dict[str, list[float]]) -> Markup:
    """How many rows have which value, for each of `series`, over the same bins."""
    finite = {name: np.asarray(values, float)[np.isfinite(values)] for name, values in series.items()}
    every = np.concatenate(list(finite.values()))
    whole = (every == every.round()).all()
    bins = np.histogram_bin_edges(every, bins=24)
    if whole and np.ptp(every) < 24:
        bins = np.arange(every.min() - 0.5, every.max() + 1)
    counts = {name: np.histogram(values, bins)[0] for name, values in finite.items()}
    return bars(title, unit, list(bins), counts)


def bars(title: str, unit: str, edges: list[float], series: dict[str, list[int]]) -> Markup:
    """The same for rows that are counted already: `series` is {name: rows from one of `edges` to the next}."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(title, "rows", unit)
        for colour, (name, rows) in zip(SERIES, series.items(), strict=False):
            axes.stairs(rows, edges, fill=True, color=colour, alpha=0.3, linewidth=0)
            axes.stairs(rows, edges, color=colour, label=name, linewidth=1.4)
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.set_ylim(bottom=0)
        if len(series) > 1:
            axes.legend(loc="best", handlelength=1.2)
        return _svg(figure, title)


def _axes(title: str, y_label: str, x_label: str):
    figure = Figure(
        figsize=(4.7, 2.75), layout="constrained"
    )  # so many points of 1/72 inch that text is read on a phone
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=10.5, fontweight="bold")
    axes.set_ylabel(y_label)
    axes.set_xlabel(x_label)
    axes.tick_params(length=0)
    axes.margins(x=0.01)
    return figure, axes


def _svg(figure: Figure, title: str) -> Markup:
    file = io.StringIO()
    figure.savefig(
        file, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
    )
    text = file.getvalue()
    text = text[text.index("<svg") :]
    for stand_in, colour in COLOURS.items():
        text = text.replace(stand_in, colour)
    text = re.sub(
        r' id="(figure|axes|patch|text|line2d|matplotlib\.axis|xtick|ytick|legend|\w+Collection)_\d+"', "", text
    )
    text = re.sub(
        r'<svg[^>]*viewBox="([^"]*)"[^>]*>', rf'<svg role="img" aria-label="{title}" viewBox="\1">', text, count=1
    )
    text = re.sub(r"<metadata>.*?</metadata>\s*|<defs>\s*<style.*?</style>\s*</defs>\s*", "", text, flags=re.S)
    return Markup(re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", text))
