"""How much data: nested sets of rows, a power law with a floor through what runs on them reach, what it foretells."""

import hashlib
import json
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from recipes.utils.console import UserError, say
from recipes.utils.data import (
    Chat,
    DataOptions,
    Reading,
    fingerprint,
    held_out,
    stream_chats,
    train_entries,
    train_paths,
    without_excluded,
)

FEWEST_POINTS = 4  # three numbers make a law
LEVEL = 0.90  # of the intervals
DRAWS = 4000
BEYOND = 64  # times the most rows that were seen: up to there a law must stay above zero
EXPONENTS = np.geomspace(0.05, 3, 60)  # that are thought possible, each as likely beforehand on a logarithmic scale
# What is thought of a run's own noise (its seed, the order of its rows) before any was seen: 0.7 % of its loss, as if
# two runs had shown it.
NOISE, RUNS = 0.007, 2


class Forecast(NamedTuple):
    """What a law foretells at `rows`: the middle, and the ends of the 90 % interval, of a new run there; of the law
    alone what it brings against the last point, `gain` with its ends."""

    rows: int
    value: float
    low: float
    high: float
    gain: float
    gain_low: float
    gain_high: float
    tells: bool


def read_shares(text: str) -> list[Fraction]:
    """1/8,1/4,1/2,1 as fractions, rising. Raises `UserError` for what is no share."""
    try:
        shares = [Fraction(part.strip()) for part in text.split(",")]
    except (ValueError, ZeroDivisionError):
        raise UserError(f"--shares {text}: expected fractions of the rows, such as 1/8,1/4,1/2,1") from None
    if any(not 0 < share <= 1 for share in shares) or len(set(shares)) < len(shares):
        raise UserError(f"--shares {text}: each must be above 0 and at most 1, and stand there once")
    return sorted(shares)


def name_of_share(share: Fraction) -> str:
    return "all" if share == 1 else f"{share.numerator}-of-{share.denominator}"


def split_rows(options: DataOptions, seed: int, shares: list[Fraction]) -> tuple[dict[str, list[str]], list[str]]:
    """({name of a share: its train rows}, the validation rows), each a line of JSON. A share
    holds those before it: rows are taken by a digest of their own text. No validation row is among the train rows, but
    for case, space and punctuation. Raises `UserError` for bad rows, unless they are to be skipped, and for no rows."""
    reading, merge = Reading(), options.system == "merge"
    validated = options.validation
    share = validated if isinstance(validated, float) else None
    train: list[Chat] = []
    validation: list[Chat] = []
    if any(entry.get("repeat") != 1 for entry in train_entries(options.train)):
        raise UserError("data.train: a curve is of whole files; leave shares and repeats out")
    streamed = stream_chats(train_paths(options.train), reading, merge)
    for chat in without_excluded(streamed, options.exclude, reading):
        (validation if share and held_out(chat, share, seed) else train).append(chat)
    if isinstance(validated, (str, list)):
        validation = list(stream_chats(validated, reading, merge))
    if options.on_bad_row == "error":
        reading.raise_if_bad()
    prints = [fingerprint(chat) for chat in train]
    known = set(prints)
    kept = [chat for chat in validation if fingerprint(chat) not in known]
    if len(kept) < len(validation):
        say(f"left out: {len(validation) - len(kept):,} of {len(validation):,} validation rows are in training")
    if not kept or not train:
        raise UserError(f"no {'train' if kept else 'validation'} row is left for a curve")
    digests = [hashlib.blake2b(f"{seed} {one}".encode(), digest_size=8).digest() for one in prints]
    order, sets = sorted(range(len(train)), key=lambda place: digests[place]), {}
    for part in shares:
        if not (count := round(part * len(train))):
            raise UserError(f"--shares: {part} of {len(train):,} rows is none")
        sets[name_of_share(part)] = [_on_a_line(train[place]) for place in sorted(order[:count])]
    return sets, [_on_a_line(chat) for chat in kept]


def _on_a_line(chat: Chat) -> str:
    """The row as a line of JSON; in a JSON array, it may stand on several."""
    return json.dumps(json.loads(chat.line), ensure_ascii=False) if "\n" in chat.line else chat.line


def draws_of(rows: list[int], losses: np.ndarray, weights: np.ndarray, seed: int = 0) -> np.ndarray:
    """(DRAWS, 3): numbers c, a, b of laws c + a * rows ** -b, with the noise of a run as a share of its loss behind
    them, that the `losses` (runs, rows that are scored), each row of the weight in `weights`, leave open.

    A draw takes other scored rows (the bootstrap, the same rows for every run), an exponent by its marginal likelihood,
    and then c, a and the noise from what a regression with that exponent leaves open (normal and inverse gamma: A.
    Gelman and others, Bayesian Data Analysis, 3rd edition, chapter 14); draws with c or a below zero are taken again.
    Why that law: J. Hestness and others, arXiv 1712.00409; of fine-tuning, B. Zhang and others, arXiv 2402.17193."""
    rng = np.random.default_rng(seed)
    points = len(rows)
    powers = (np.asarray(rows, float)[:, None] / rows[-1]) ** -EXPONENTS  # (points, exponents), 1 at the last point
    found = np.empty((0, 4))
    for _ in range(200):
        count = DRAWS
        index = rng.integers(0, losses.shape[1], (count, losses.shape[1]))
        drawn = weights[index]
        means = np.stack([(one[index] * drawn).sum(1) for one in losses], 1) / drawn.sum(1)[:, None]  # (count, points)
        # What is asked is what a run would score on these very rows: a draw's common level is set to theirs.
        level = (losses * weights).sum(1) / weights.sum()
        means = means / np.exp(np.log(means / level).mean(1, keepdims=True))
        # Each point divided by its own mean, so that the noise is a share of it: y = 1 = c / m + a * power / m.
        first, second = 1 / means[:, :, None], powers[None] / means[:, :, None]
        ab, bb = (first * second).sum(1), (second * second).sum(1)
        aa, ya, yb = np.broadcast_to((first * first).sum(1), ab.shape), first.sum(1), second.sum(1)
        determinant = np.maximum(aa * bb - ab**2, 1e-300)
        c, a = (bb * ya - ab * yb) / determinant, (aa * yb - ab * ya) / determinant
        left = np.maximum(points - c * ya - a * yb, 0.0)  # the sum of squares that is left, (count, exponents)
        freedom = RUNS + points - 2
        scale = RUNS * NOISE**2 + left
        weight = -0.5 * np.log(determinant) - freedom / 2 * np.log(scale)
        weight = np.exp(weight - weight.max(1, keepdims=True))
        chosen = (weight.cumsum(1) / weight.sum(1, keepdims=True) < rng.random((count, 1))).sum(1)
        pick = (np.arange(count), np.minimum(chosen, len(EXPONENTS) - 1))
        noise = np.sqrt(scale[pick] / rng.chisquare(freedom, count))
        # the Cholesky factor of the inverse of [[aa, ab], [ab, bb]]
        one, other = rng.standard_normal((2, count))
        a_drawn = a[pick] + noise * np.sqrt(aa[pick] / determinant[pick]) * one
        c_drawn = c[pick] - ab[pick] / aa[pick] * (a_drawn - a[pick]) + noise / np.sqrt(aa[pick]) * other
        laws = np.stack([c_drawn, a_drawn, EXPONENTS[pick[1]], noise], 1)
        found = np.concatenate([found, laws[(a_drawn >= 0) & (c_drawn + a_drawn * BEYOND ** -EXPONENTS[pick[1]] >= 0)]])
        if len(found) >= DRAWS:
            break
    return found[:DRAWS]


def foretell(rows: list[int], losses: np.ndarray, weights: np.ndarray, at: int) -> Forecast | None:
    """What a run on `at` rows would reach, by runs on as many `rows` (rising) whose `losses` are (runs, scored rows) of
    the weights `weights`; lower is better. None for under four runs, and where no law goes through them. It `tells`
    where the interval is at most half as wide as the fall that was seen."""
    if len(rows) < FEWEST_POINTS or not np.isfinite(losses).all():
        return None
    means = (losses * weights).sum(1) / weights.sum()
    if means.min() <= 0:
        return None
    laws = draws_of(rows, losses, weights)
    if len(laws) < DRAWS / 10:
        return None
    c, a, b, noise = laws.T
    law, last = c + a * (at / rows[-1]) ** -b, c + a
    run = law * (1 + noise * np.random.default_rng(1).standard_normal(len(law)))
    tails = (1 - LEVEL) / 2, 0.5, (1 + LEVEL) / 2
    low, value, high = map(float, np.asarray(np.quantile(run, tails)))
    gain_low, gain, gain_high = map(float, np.asarray(np.quantile(last - law, tails)))
    tells = bool(high - low <= (means[0] - means[-1]) / 2)
    return Forecast(at, value, low, high, gain, gain_low, gain_high, tells)


def twice(
    what: str, rows: list[int], losses: np.ndarray, weights: np.ndarray, form: str
) -> tuple[Forecast | None, str]:
    """(the forecast at twice the last of `rows`, it in a sentence); `what` is the figure, `form` how it is written, of
    which less is better."""
    at = 2 * rows[-1]
    if len(rows) < FEWEST_POINTS:
        return None, f"{what}: {len(rows)} points cannot tell what more rows would bring; {FEWEST_POINTS} at least can"
    found = foretell(rows, losses, weights, at)
    now = (losses[-1] * weights).sum() / weights.sum()
    if found is None:
        return None, f"{what}: these points cannot tell what twice the rows would bring: no law goes through them"
    spread = f"{LEVEL:.0%} interval {found.low:{form}} to {found.high:{form}}".replace("%", " %", 1)
    if not found.tells:
        return None, f"{what}: these points cannot tell what twice the rows would bring ({now:{form}} now; {spread})"
    return found, f"{what}: twice the rows ({at:,}) would bring it from {now:{form}} to {found.value:{form}} ({spread})"
