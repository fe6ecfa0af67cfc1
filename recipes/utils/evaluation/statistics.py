"""What a difference between two models on the same rows is worth: intervals that hold for few rows, and verdicts."""

import math
import re

import numpy as np

from recipes.utils.evaluation.scores import BY_TOKEN, score_names, score_of
from recipes.utils.evaluation.verdicts import BOTH_ZERO, FEW, LUCK, SAME, show_difference

LEVEL = 0.95  # of the intervals
MOST_DRAWS, FEWEST_DRAWS = 9999, 999
NUMBERS, NUMBERS_AT_ONCE = 20_000_000, 5_000_000  # resampled: in all, so that it takes seconds; at a time, in 40 MB
SMOOTHED = 200  # rows: below, the draws of a numeric score are smoothed
FEWEST_ROWS = 20  # below these no verdict is given, whatever the interval says: nobody has shown that it holds
FEWEST_DIFFERENT = 6  # rows, of a numeric score: with fewer, not even a sign test could reach 5 % (2 * 0.5**5 = 0.06)
SEEN, SHARE_SEEN = 30, 2 / 3  # rows that differ, and their share of all, from which on they show how a score differs
FALSE_DISCOVERIES = 0.05  # of the verdicts over tags, or over the fields of JSON answers


def column(rows: list[dict], name: str) -> tuple[np.ndarray, np.ndarray]:
    """(values, weights) of the score `name` over the rows that have it, for `figure`."""
    key = "loss" if name == "perplexity" else name
    having = [row for row in rows if key in row]
    weights = [row["tokens"] if name in BY_TOKEN else 1 for row in having]
    return np.array([row[key] for row in having], dtype=float), np.array(weights, dtype=float)


def figure(values, weights, name: str, axis: int = -1):
    """The weighted mean of a `column` of the score `name`, along `axis` (for the perplexity, its exponential)."""
    mean = (values * weights).sum(axis) / weights.sum(axis)
    with np.errstate(over="ignore"):
        return np.exp(mean) if name == "perplexity" else mean


def figures(rows: list[dict]) -> dict:
    """All figures of a model on `rows` of `evaluate`, with `rows`, `generated_rows` and the mean `expected_tokens`."""
    found = {name: float(figure(*column(rows, name), name)) for name in score_names(rows)}
    generated = [row["expected_tokens"] for row in rows if "answer" in row]
    found |= {"expected_tokens": float(np.mean(generated))} if generated else {}
    return found | {"rows": len(rows), "generated_rows": len(generated)}


def paired_shares_interval(better: float, worse: float, rows: int) -> tuple[float, float]:
    """The 95 % score interval of the difference of two shares on the same `rows`, of which `better` are yes in the
    first alone and `worse` in the second alone: T. Tango, Statistics in Medicine 17 (1998), 891-908. It holds for a
    handful of rows and at shares of 0 and 1 (docs/decide.md), where no row differs too."""
    from scipy.optimize import bisect  # here, as below: scipy takes a second, and a merge compares nothing
    from scipy.stats import norm

    point, z = (better - worse) / rows, norm.ppf((1 + LEVEL) / 2)

    def statistic(delta: float) -> float:
        a, c = 2 * rows, -worse * delta * (1 - delta)
        b = -better - worse + (2 * rows - better + worse) * delta
        # the most likely share of rows that are yes in the second alone, where the difference is `delta`
        share = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
        distance, variance = rows * (point - delta), rows * (2 * share + delta * (1 - delta))
        if variance < 1e-12:
            return math.copysign(math.inf, distance) if abs(distance) > 1e-9 else 0.0
        return distance / math.sqrt(variance)

    low = bisect(lambda delta: statistic(delta) - z, -1.0, point) if point > -1 else -1.0
    return low, bisect(lambda delta: statistic(delta) + z, point, 1.0) if point < 1 else 1.0


def share_interval(count: float, rows: int) -> tuple[float, float]:
    """The 95 % interval of a share, by Wilson's score (1927)."""
    from scipy.stats import binomtest

    found = binomtest(round(count), rows).proportion_ci(LEVEL, method="wilson")
    return float(found.low), float(found.high)


def bootstrap_interval(name: str, weights, *values: np.ndarray) -> tuple[float, float, float]:
    """(low, high, p) of the figure `name` of one column of `values` (one a row), or of the difference of two: the 95 %
    interval and the two-sided p-value against 0, by the bootstrap over rows, the same for the same input.

    A draw takes the same rows from every column (9,999 draws, over 2,000 rows fewer). As it comes, the percentile
    interval is too narrow on few rows; three things mend it (T. Hesterberg, The American Statistician 69 (2015),
    371-386): the percentiles are those that Student's t asks for; under 200 rows the draws are smoothed with a normal
    kernel, whose standard deviation is that of the rows over the root of their number; and of a bounded score that is
    alike in many rows and differs in few, two made-up rows stand for what was not seen, one up and one down by half of
    what it can be (as A. Agresti and Y. Min, Statistics in Medicine 24 (2005), 729-740, add to matched pairs)."""
    from scipy.stats import bootstrap, norm, t

    most, own = score_of(name).most, len(values) == 1
    middle = _commonest(values[0]) if own else 0.0
    differing = int(((values[0] if own else values[0] - values[1]) != middle).sum())
    if most and differing < min(SEEN, SHARE_SEEN * len(weights)):
        made_up = ([0.0, most],) if own else ([most / 2, 0.0], [0.0, most / 2])
        values = tuple(np.append(column, more) for column, more in zip(values, made_up, strict=True))
        weights = np.append(weights, [weights.mean()] * 2)
    rows = len(weights)
    # Of rows that weigh unequally, fewer count: Kish's number.
    counting = max(2.0, weights.sum() ** 2 / (weights**2).sum())
    spread = np.atleast_2d(np.cov(np.stack(values), aweights=weights, ddof=0)) * counting / (counting - 1)
    rng, smooth = np.random.default_rng(0), rows < SMOOTHED and np.isfinite(spread).all()

    def statistic(*columns, axis=-1):
        *drawn, weights = columns
        means = np.stack([figure(column, weights, "", axis) for column in drawn], -1)
        if smooth:  # the mean of as many normal numbers, each of the variance spread / counting
            means = means + rng.multivariate_normal(np.zeros(len(drawn)), spread, means.shape[:-1]) / counting
        means = np.exp(means) if name == "perplexity" else means
        return means[..., 0] if own else means[..., 0] - means[..., 1]

    with np.errstate(over="ignore", invalid="ignore"):
        draws = bootstrap(
            (*values, weights), statistic, paired=True, vectorized=True, method="percentile", rng=0,
            n_resamples=min(MOST_DRAWS, max(FEWEST_DRAWS, NUMBERS // rows)), batch=max(1, NUMBERS_AT_ONCE // rows),
        ).bootstrap_distribution  # fmt: skip
    # Rows are skewed, so their spread is known less well than that of normal numbers: as well as that of half as many
    # where the kurtosis is 5.
    freedom = max(1.0, (counting - 1) / 2)
    tails = norm.cdf(t.ppf([(1 - LEVEL) / 2, (1 + LEVEL) / 2], freedom))
    low, high = (float(np.quantile(draws, tail)) for tail in tails)
    below = np.clip((draws < 0).mean() + (draws == 0).mean() / 2, 0.5 / len(draws), 1 - 0.5 / len(draws))
    return low, high, float(2 * t.cdf(-abs(norm.ppf(below)), freedom))


def _commonest(values: np.ndarray) -> float:
    found, counts = np.unique(values, return_counts=True)
    return float(found[counts.argmax()])


def _yes_or_no(name: str, *columns: np.ndarray) -> bool:
    """True for scores that are 0 or 1 in each row, and count rows."""
    return name not in BY_TOKEN and all(np.isin(column, (0, 1)).all() for column in columns)


def own_interval(rows: list[dict], name: str) -> tuple[float, float] | None:
    """The 95 % interval of one model's figure `name` on `rows`; None for fewer than two rows."""
    values, weights = column(rows, name)
    if len(values) < 2:
        return None
    if _yes_or_no(name, values):
        return share_interval(values.sum(), len(values))
    return bootstrap_interval(name, weights, values)[:2]


def compare(ours: list[dict], theirs: list[dict]) -> dict:
    """By score: {"difference" (ours - theirs), "low", "high" (95 % interval), "p" (against no difference), "rows",
    "unseen" (half the interval: a smaller difference cannot be told from none), "verdict"}; the two lists are of the
    same rows in the same order, and are compared where both have the score. Low, high, p and unseen are None for fewer
    than two rows."""
    return {name: found for name in score_names(ours) if (found := compare_score(ours, theirs, name))}


def compare_score(ours: list[dict], theirs: list[dict], name: str) -> dict | None:
    """What `compare` gives for the score `name`; None where no row has it in both."""
    key = "loss" if name == "perplexity" else name
    pairs = [pair for pair in zip(ours, theirs, strict=True) if key in pair[0] and key in pair[1]]
    if not pairs:
        return None
    (ours, theirs), rows = zip(*pairs, strict=True), len(pairs)
    (our_values, weights), (their_values, _) = column(ours, name), column(theirs, name)
    differing, yes_or_no = int((our_values != their_values).sum()), _yes_or_no(name, our_values, their_values)
    found: dict = {"difference": float(figure(our_values, weights, name) - figure(their_values, weights, name))}
    if rows < 2:
        found |= {"low": None, "high": None, "p": None, "unseen": None}
    elif yes_or_no:
        better, worse = int((our_values > their_values).sum()), int((our_values < their_values).sum())
        low, high = paired_shares_interval(better, worse, rows)
        found |= {"low": low, "high": high, "p": _two_sided((better - worse) / math.sqrt(max(1, differing)))}
    else:
        ends = bootstrap_interval(name, weights, our_values, their_values)
        found |= dict(zip(("low", "high", "p"), ends, strict=True))
    if rows > 1:
        found["unseen"] = (found["high"] - found["low"]) / 2
    few = rows < FEWEST_ROWS or (0 < differing < FEWEST_DIFFERENT and not yes_or_no)
    none_has_it = not differing and name in ("exact_match", "valid_json", "stopped") and not our_values.any()
    return found | {"rows": rows, "verdict": _verdict(name, found, few, differing, none_has_it)}


def _two_sided(z: float) -> float:
    """The p-value of McNemar's statistic, which is Tango's where there is no difference."""
    return math.erfc(abs(z) / math.sqrt(2))


def _verdict(name: str, found: dict, few: bool, differing: int, none_has_it: bool) -> str:
    low, high, better = found["low"], found["high"], score_of(name).better
    if few:
        return FEW
    if none_has_it:
        return BOTH_ZERO
    # Also where the interval is zero in the figures that are shown: rounding, such as that of a merge.
    if not differing or not any(re.search("[1-9]|nan|inf", show_difference(name, end)) for end in (low, high)):
        return SAME
    if not (low > 0 or high < 0):  # NaN says nothing either
        return FEW
    if not better:
        return "longer" if low > 0 else "shorter"
    return "better" if (low > 0) == (better > 0) else "worse"


def mark_luck(comparisons: list[dict]) -> None:
    """Take back the verdicts that may be luck where many slices of the rows (`comparisons`, one a tag) are looked at:
    of those that stay, 5 % at most are false on average, score by score (Y. Benjamini and Y. Hochberg, Journal of the
    Royal Statistical Society B 57 (1995), 289-300)."""
    from scipy.stats import false_discovery_control

    for name in {name for comparison in comparisons for name in comparison}:
        # a slice too small for a verdict makes none, so it is no chance of a false one
        judged = [one[name] for one in comparisons if name in one and one[name]["rows"] >= FEWEST_ROWS]
        judged = [found for found in judged if found["p"] is not None and math.isfinite(found["p"])]
        if not judged:
            continue
        for found, p in zip(judged, false_discovery_control([found["p"] for found in judged]), strict=True):
            if p > FALSE_DISCOVERIES and found["verdict"] in ("better", "worse", "longer", "shorter"):
                found["verdict"] = LUCK
