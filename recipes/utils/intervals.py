"""What a difference between two models is worth: paired bootstrap intervals over rows, and the word for it."""

import math
import re

from recipes.utils.scores import SCORES, column, figure, show_difference

import numpy as np
from scipy.stats import bootstrap

MOST_DRAWS, FEWEST_DRAWS = 9999, 999
NUMBERS = 20_000_000  # resampled values in all, so that many rows take seconds
NUMBERS_AT_ONCE = 5_000_000  # held at a time: 40 MB
# Below these no verdict is given, whatever the interval says. The percentile interval is too narrow on few rows, and with
# fewer than six rows that differ even a sign test could not reach 5 % (2 * 0.5**5 = 0.06).
FEWEST_ROWS, FEWEST_DIFFERENT = 20, 6


def interval(statistic, *columns: np.ndarray) -> tuple[float, float]:
    """The 95 % percentile-bootstrap interval of `statistic(*columns, axis=-1)`; a draw takes the same rows from every
    column. Two rows at least. The same input gives the same interval. 9,999 draws, over 2,000 rows fewer (999 at least)."""
    rows = len(columns[0])
    draws = min(MOST_DRAWS, max(FEWEST_DRAWS, NUMBERS // rows))
    found = bootstrap(
        columns, statistic, paired=True, vectorized=True, method="percentile", n_resamples=draws, rng=0,
        batch=max(1, NUMBERS_AT_ONCE // rows),
    )  # fmt: skip
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def own_interval(rows: list[dict], name: str) -> tuple[float, float] | None:
    """The 95 % interval of one model's figure `name` on `rows`; None for fewer than two rows."""
    values, weights = column(rows, name)
    if len(values) < 2:
        return None
    return interval(lambda values, weights, axis=-1: figure(values, weights, name, axis), values, weights)


def compare(ours: list[dict], theirs: list[dict]) -> dict:
    """By score: {"difference" (ours - theirs), "low", "high" (95 % interval), "rows", "verdict"}; the two lists are of the
    same rows in the same order. Low and high are None for fewer than two rows."""
    found = {}
    for name in SCORES:
        (our_values, weights), (their_values, _) = column(ours, name), column(theirs, name)
        if not len(weights):
            continue

        def difference(ours, theirs, weights, axis=-1, name=name):
            return figure(ours, weights, name, axis) - figure(theirs, weights, name, axis)

        value = float(difference(our_values, their_values, weights))
        low = high = None
        if len(weights) > 1:
            low, high = interval(difference, our_values, their_values, weights)
        verdict = _verdict(name, low, high, len(weights), int((our_values != their_values).sum()))
        found[name] = {"difference": value, "low": low, "high": high, "rows": len(weights), "verdict": verdict}
    return found


def _verdict(name: str, low: float | None, high: float | None, rows: int, different: int) -> str:
    if not different or (rows >= FEWEST_ROWS and all(_is_zero(name, end) for end in (low, high))):
        return "the same"
    if rows < FEWEST_ROWS or different < FEWEST_DIFFERENT or not (low > 0 or high < 0):  # NaN says nothing either
        return "too few rows to say"
    if not SCORES[name].better:
        return "longer" if low > 0 else "shorter"
    return "better" if (low > 0) == (SCORES[name].better > 0) else "worse"


def _is_zero(name: str, value: float) -> bool:
    """True for a difference that is zero in the figures that are shown: rounding, such as that of a merge."""
    return not re.search("[1-9]|nan|inf", show_difference(name, value))


def sentence(pair: str, comparison: dict) -> str:
    """What `compare` found of a pair ("adapter against base") in plain words: "The adapter is better than the base in loss (−3.24, 95 % interval −3.28 to
    −3.20) and exact match; its answers are longer; too few rows to say: stopped."."""
    ours, theirs = (f"the {name}" + " model" * (name == "merged") for name in pair.split(" against "))
    named = {}
    for name, found in comparison.items():
        if name == "loss":
            named.setdefault(found["verdict"], []).append(f"loss ({show_interval(name, found, '95 % interval ')})")
        elif name != "perplexity":  # which says what the loss says
            named.setdefault(found["verdict"], []).append(SCORES[name].label)
    leads = {"better": "is better than {theirs} in {names}", "worse": "is worse than {theirs} in {names}",
             "longer": "gives longer answers", "shorter": "gives shorter answers",
             "the same": "is the same as {theirs} in {names}"}  # fmt: skip
    parts = [
        lead.format(theirs=theirs, names=_and(named[verdict])) for verdict, lead in leads.items() if verdict in named
    ]
    if "too few rows to say" in named:
        few = f"too few rows to say: {', '.join(named['too few rows to say'])}"
        parts = [*parts, few] if parts else [f"against {theirs}: {few}"]
    text = f"{ours} {'; '.join(parts)}."
    return text[0].upper() + text[1:]


def _and(names: list[str]) -> str:
    return " and ".join([*([", ".join(names[:-1])] if names[:-1] else []), names[-1]])


def show_interval(name: str, found: dict, lead: str = "") -> str:
    """A difference and its interval as text."""
    text = show_difference(name, found["difference"])
    if found["low"] is None or not math.isfinite(found["low"]):
        return text
    return f"{text}, {lead}{show_difference(name, found['low'])} to {show_difference(name, found['high'])}"
