"""What an answer is worth against the expected one, and what a difference between two models is worth."""

import functools
import json
import math
import re
from typing import NamedTuple

import numpy as np

# Scripts written without blanks between words: each character counts as a word.
UNSPACED = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
WORDS = re.compile(rf"[{UNSPACED}]|(?:(?![{UNSPACED}])[^\W_])+")
MOST_DRAWS, FEWEST_DRAWS = 9999, 999
NUMBERS, NUMBERS_AT_ONCE = 20_000_000, 5_000_000  # resampled: in all, so that it takes seconds; at a time, in 40 MB
# Below these no verdict is given, whatever the interval says. The percentile interval is too narrow on few rows, and
# with fewer than six rows that differ even a sign test could not reach 5 % (2 * 0.5**5 = 0.06).
FEWEST_ROWS, FEWEST_DIFFERENT = 20, 6


class Score(NamedTuple):
    """A figure: its name for people, how it is written, and which way is better (+1 up, -1 down, 0 neither)."""

    label: str
    form: str
    better: int


SCORES = {
    "loss": Score("loss", ".4f", -1), "perplexity": Score("perplexity", ".4f", -1),
    "token_accuracy": Score("token accuracy", ".1%", 1), "exact_match": Score("exact match", ".1%", 1),
    "rouge_l": Score("ROUGE-L", ".1%", 1), "chrf": Score("chrF", ".1f", 1),
    "valid_json": Score("valid JSON", ".1%", 1), "stopped": Score("stopped", ".1%", 1),
    "answer_tokens": Score("answer tokens", ".1f", 0),
}  # fmt: skip
BY_TOKEN = ("loss", "perplexity", "token_accuracy")  # weighted by a row's answer tokens; the others count rows


class _Words:
    """Words of any script. The library's tokenizer keeps a-z and 0-9 alone: all else scores 0. They agree on ASCII."""

    def tokenize(self, text: str) -> list[str]:
        return WORDS.findall(text.lower())


@functools.cache
def _scorers() -> tuple:
    from rouge_score.rouge_scorer import RougeScorer  # here: these take a second, and a merge scores nothing
    from sacrebleu.metrics import CHRF

    return RougeScorer(["rougeL"], tokenizer=_Words()), CHRF()


def score_text(expected: str, answer: str) -> dict:
    """`exact_match` (blanks at the ends aside), `rouge_l` (F1 of the longest common subsequence of words, 0 to 1),
    `chrf` (of the row, 0 to 100, sacrebleu's default settings: characters up to 6, no words, beta 2) and, where
    `expected` is a JSON object or array, `valid_json`: `answer` is one too."""
    expected, answer = expected.strip(), answer.strip()
    rouge, chrf = _scorers()
    scores = {"exact_match": answer == expected, "rouge_l": rouge.score(expected, answer)["rougeL"].fmeasure}
    scores["chrf"] = chrf.sentence_score(answer, [expected]).score
    return scores | ({"valid_json": _is_json(answer)} if _is_json(expected) else {})


def _is_json(text: str) -> bool:
    """True for an object or an array: a bare number or word in quotes is JSON by chance."""
    try:
        return isinstance(json.loads(text), (dict, list))
    except (ValueError, RecursionError):
        return False


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
    found = {name: float(figure(*column(rows, name), name)) for name in SCORES if len(column(rows, name)[0])}
    generated = [row["expected_tokens"] for row in rows if "answer" in row]
    found |= {"expected_tokens": float(np.mean(generated))} if generated else {}
    return found | {"rows": len(rows), "generated_rows": len(generated)}


def interval(statistic, *columns: np.ndarray) -> tuple[float, float]:
    """The 95 % percentile-bootstrap interval of `statistic(*columns, axis=-1)`, the same for the same input; a draw
    takes the same rows from every column, two at least. 9,999 draws, over 2,000 rows fewer (999 at least)."""
    from scipy.stats import bootstrap  # here: as above

    rows = len(columns[0])
    how = {"paired": True, "vectorized": True, "method": "percentile", "rng": 0}
    how |= {"n_resamples": min(MOST_DRAWS, max(FEWEST_DRAWS, NUMBERS // rows))}
    found = bootstrap(columns, statistic, batch=max(1, NUMBERS_AT_ONCE // rows), **how).confidence_interval
    return float(found.low), float(found.high)


def own_interval(rows: list[dict], name: str) -> tuple[float, float] | None:
    """The 95 % interval of one model's figure `name` on `rows`; None for fewer than two rows."""
    values, weights = column(rows, name)
    return interval(functools.partial(figure, name=name), values, weights) if len(values) > 1 else None


def compare(ours: list[dict], theirs: list[dict]) -> dict:
    """By score: {"difference" (ours - theirs), "low", "high" (95 % interval), "rows", "verdict"}; the two lists are of
    the same rows in the same order. Low and high are None for fewer than two rows."""
    found: dict[str, dict] = {}
    for name in SCORES:
        (our_values, weights), (their_values, _) = column(ours, name), column(theirs, name)
        if not len(weights):
            continue

        def difference(ours, theirs, weights, axis=-1, name=name):
            return figure(ours, weights, name, axis) - figure(theirs, weights, name, axis)

        columns = our_values, their_values, weights
        low, high = interval(difference, *columns) if len(weights) > 1 else (None, None)
        verdict = _verdict(name, low, high, len(weights), int((our_values != their_values).sum()))
        value = float(difference(*columns))
        found[name] = {"difference": value, "low": low, "high": high, "rows": len(weights), "verdict": verdict}
    return found


def _verdict(name: str, low, high, rows: int, different: int) -> str:
    few = rows < FEWEST_ROWS
    # Also where the interval is zero in the figures that are shown: rounding, such as that of a merge.
    if not different or not (few or any(re.search("[1-9]|nan|inf", show_difference(name, end)) for end in (low, high))):
        return "the same"
    if few or different < FEWEST_DIFFERENT or not (low > 0 or high < 0):  # NaN says nothing either
        return "too few rows to say"
    if not SCORES[name].better:
        return "longer" if low > 0 else "shorter"
    return "better" if (low > 0) == (SCORES[name].better > 0) else "worse"


def sentence(pair: str, comparison: dict) -> str:
    """What `compare` found of a pair ("adapter against base") in plain words: "The adapter is better than the base in
    loss (−3.24, 95 % interval −3.28 to −3.20) and exact match; gives longer answers; too few rows to say: stopped."."""
    ours, theirs = (f"the {name}" + " model" * (name == "merged") for name in pair.split(" against "))
    named: dict[str, list[str]] = {}
    for name, found in comparison.items():
        text = f" ({show_interval(name, found, '95 % interval ')})" if name == "loss" else ""
        if name != "perplexity":  # which says what the loss says
            named.setdefault(found["verdict"], []).append(SCORES[name].label + text)
    lists = {word: " and ".join(filter(None, (", ".join(names[:-1]), names[-1]))) for word, names in named.items()}
    leads = {"better": f"is better than {theirs} in ", "worse": f"is worse than {theirs} in "}
    leads |= {"longer": "gives longer answers", "shorter": "gives shorter answers"}
    leads |= {"the same": f"is the same as {theirs} in "}
    parts = [lead + lists[word] * lead.endswith(" ") for word, lead in leads.items() if word in named]
    if few := named.get("too few rows to say"):
        parts.append(f"against {theirs}: " * (not parts) + f"too few rows to say: {', '.join(few)}")
    text = f"{ours} {'; '.join(parts)}."
    return text[0].upper() + text[1:]


def show(name: str, value: float) -> str:
    """A figure as text."""
    return format(value, SCORES[name].form)


def show_difference(name: str, value: float) -> str:
    """A difference of two figures as text: signed, shares in percentage points without the sign of per cent."""
    form = SCORES[name].form
    text = f"{100 * value:+.1f}" if form.endswith("%") else format(value, "+" + form)
    return text.replace("-", "\N{MINUS SIGN}")


def show_interval(name: str, found: dict, lead: str = "") -> str:
    """A difference and its interval as text."""
    text = show_difference(name, found["difference"])
    if found["low"] is None or not math.isfinite(found["low"]):
        return text
    return f"{text}, {lead}{show_difference(name, found['low'])} to {show_difference(name, found['high'])}"
