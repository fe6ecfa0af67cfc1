"""Imported, it makes runs of a few steps quick in this process: reports are pages without plots, which take more than
half of such a run, and each full garbage collection of the libraries' leaves out what their imports have made. True
processes, runs that tests share, and the tests of the report draw their plots."""

import gc

from markupsafe import Markup

from recipes.utils.monitoring import report

DRAWN = {name: getattr(report, name) for name in ("curves", "bars")}


def blank(title: str, *_, **__) -> Markup:
    return Markup(f'<svg role="img" aria-label="{title}"></svg>')


def draw(plots: bool) -> None:
    for name, function in DRAWN.items():
        setattr(report, name, function if plots else blank)


draw(False)
gc.freeze()
