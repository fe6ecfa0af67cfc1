"""report.html: what a run was, how it went, what came of it, in one file; its plots are SVG in the page's colours."""

import contextlib
import io
import re
from pathlib import Path

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from transformers import TrainerCallback

from recipes.utils.console import UserError, is_main_process, say
from recipes.utils.files import evaluation_of, read_json, read_jsonl, record_of
from recipes.utils.monitoring.ledger import Row, read_ledger
from recipes.utils.page import write_page

WORST, POINTS = 20, 200  # rows of the ledger that are shown; points of a curve that can be told apart
LONGEST = 3000  # characters of an answer that are shown
CURVES = [  # title, unit, axis, {key of metrics.jsonl: name}
    ("Loss", "nats a token", "log", {"loss": "training", "eval_loss": "validation"}),
    ("Token accuracy", "", "share", {"mean_token_accuracy": "training", "eval_mean_token_accuracy": "validation"}),
    ("Throughput", "tokens a second", "zero", {"tokens_per_second": "all", "trained_tokens_per_second": "trained on"}),
    ("Memory", "GB", "zero", {"peak_memory_gb": "peak", "process_memory_gb": "process"}),
    ("MFU", "", "zero share", {"mfu": "MFU"}),
    ("GPU", "% of the time busy", "zero", {"gpu_utilization": "busy"}),
    ("Gradient norm", "", "log", {"grad_norm": "gradient norm"}),
    ("Learning rate", "", "zero", {"learning_rate": "learning rate"}),
]
# Stand-ins that matplotlib draws with, and the colours of the page that take their place.
COLOURS = {"#010203": "var(--ink)", "#010204": "var(--soft)", "#010205": "var(--line)", "#010206": "var(--a)",
           "#010207": "var(--b)", "#010208": "var(--c)"}  # fmt: skip
INK, SOFT, LINE, *SERIES = COLOURS
STYLE = {  # in inches, and points of 1/72 inch: text is read on a phone
    "figure.figsize": (4.7, 2.75), "figure.constrained_layout.use": True, "svg.fonttype": "none", "font.size": 9.5,
    "axes.titlelocation": "left", "axes.titlesize": 10.5, "axes.titleweight": "bold", "axes.xmargin": 0.01,
    "axes.edgecolor": LINE, "axes.labelcolor": SOFT, "xtick.color": LINE, "ytick.color": LINE, "text.color": INK,
    "xtick.labelcolor": SOFT, "ytick.labelcolor": SOFT, "xtick.major.size": 0, "ytick.major.size": 0,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.grid.axis": "y", "grid.color": LINE,
    "grid.linewidth": 0.6, "legend.frameon": False, "legend.labelcolor": INK, "lines.linewidth": 1.6,
}  # fmt: skip


class Report(contextlib.AbstractContextManager, TrainerCallback):
    """Writes `folder`/report.html at each evaluation, so that a run can be looked at while it goes on, and when it is
    left as a context manager, however the run ended."""

    def __init__(self, folder: Path):
        self.folder, self.path = Path(folder), Path(folder) / "report.html"

    def on_evaluate(self, args, state, control, **kwargs):
        refresh_report(self.folder)

    def __exit__(self, *error):
        refresh_report(self.folder)


def refresh_report(folder: Path) -> None:
    """Write the report, or say in a line why there is none: neither a full disk nor an odd figure may cost the run."""
    try:
        if is_main_process():
            write_report(folder)
    except Exception as error:
        say(f"warning: {Path(folder) / 'report.html'} could not be written: {type(error).__name__}: {error}")


def write_report(folder: Path) -> None:
    """Write `folder`/report.html from the files that are in `folder` by now."""
    folder, record, evaluation = Path(folder), record_of(folder), evaluation_of(folder)
    scored = read_json(evaluation / "metrics.json").get("report", {}) if evaluation else {}
    metrics, ledger, samples = (read_jsonl(folder / f"{name}.jsonl") for name in ("metrics", "ledger", "samples"))
    plots = []
    for title, unit, axis, keys in CURVES:
        known = {key: [line for line in metrics if line.get(key) is not None] for key in keys}
        series = {keys[key]: ([at["step"] for at in own], [at[key] for at in own]) for key, own in known.items() if own}
        if series:
            plots.append(curves(title, unit, series, axis))
    worst: list[Row] = []
    with contextlib.suppress(UserError):  # it kept none, or its data files have changed
        worst = read_ledger(folder)[:WORST]
    distributions = []
    if lengths := (record.get("rows", {}).get("train") or {}).get("length_histogram"):
        distributions.append(bars("Length of train rows", "tokens", lengths["edges"], {"rows": lengths["rows"]}))
    if last := {line["where"]: line["loss"] for line in ledger if np.isfinite(line["loss"])}:
        rows, edges = np.histogram(list(last.values()), 24)
        distributions.append(bars("Loss of train rows, when last seen", "nats a token", edges, {"rows": rows}))
    distributions += [bars(**plot) for plot in scored.pop("distributions", [])]
    write_page(
        folder / "report.html", "report.html", folder=folder.resolve().name, record=record, metrics=metrics, **scored,
        curves=plots, distributions=distributions, samples=samples[::-1], worst=worst, longest=LONGEST,
    )  # fmt: skip


def curves(title: str, unit: str, series: dict[str, tuple[list, list]], axis: str = "") -> Markup:
    """Lines over optimizer steps: `series` is {name: (steps, values)}. A curve of very many points is drawn as their
    mean in stretches, with the range of values as a band. Words in `axis`: it begins at "zero", is "log" where values
    span two powers of ten, is a "share", written in per cent."""
    with matplotlib.rc_context(STYLE):
        axes = Figure().add_subplot(title=title, ylabel=unit, xlabel="step")
        for colour, (name, pair) in zip(SERIES, series.items(), strict=False):
            steps, values = (np.asarray(numbers, float) for numbers in pair)
            parts = np.array_split(np.arange(len(steps)), min(POINTS, len(steps)))
            at, middle = ([numbers[part].mean() for part in parts] for numbers in (steps, values))
            axes.plot(at, middle, color=colour, label=name, marker="o" if len(parts) <= 12 else None, markersize=3.5)
            if len(steps) > POINTS:
                ends = np.array([(values[part].min(), values[part].max()) for part in parts])
                axes.fill_between(at, *ends.T, color=colour, alpha=0.2, linewidth=0)
        every = np.concatenate([np.asarray(values, float) for _, values in series.values()])
        every = every[np.isfinite(every)]
        if "log" in axis and len(every) and every.min() > 0 and every.max() > 100 * every.min():
            axes.set_yscale("log")
        else:
            axes.yaxis.set_major_locator(MaxNLocator(5))
        if "zero" in axis:
            axes.set_ylim(bottom=0)
        if "share" in axis:
            axes.yaxis.set_major_formatter(PercentFormatter(1))
        elif len(every) and every.max() >= 1000:
            axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        return _svg(axes, title)


def bars(title: str, unit: str, edges: list[float], series: dict[str, list[int]]) -> Markup:
    """How many rows have which value: `series` is {name: rows from one of `edges` to the next}."""
    with matplotlib.rc_context(STYLE):
        axes = Figure().add_subplot(title=title, ylabel="rows", xlabel=unit)
        for colour, (name, rows) in zip(SERIES, series.items(), strict=False):
            axes.stairs(rows, edges, fill=True, color=colour, alpha=0.3, linewidth=0)
            axes.stairs(rows, edges, color=colour, label=name, linewidth=1.4)
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.set_ylim(bottom=0)
        return _svg(axes, title)


def _svg(axes, title: str) -> Markup:
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(handlelength=1.2)
    file = io.StringIO()
    axes.figure.savefig(file, format="svg", transparent=True)
    text = file.getvalue()
    for stand_in, colour in COLOURS.items():
        text = text.replace(stand_in, colour)
    ids = r"figure|axes|patch|text|line2d|matplotlib\.axis|xtick|ytick|legend|\w+Collection"
    head = rf'<svg role="img" aria-label="{title}" viewBox="\1">'
    text = re.sub(r'^.*?<svg[^>]*viewBox="([^"]*)"[^>]*>', head, text, count=1, flags=re.S)
    needless = rf'<metadata>.*?</metadata>\s*|<defs>\s*<style.*?</style>\s*</defs>\s*| id="({ids})_\d+"'
    text = re.sub(needless, "", text, flags=re.S)
    return Markup(re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", text))
