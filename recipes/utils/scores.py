"""What an answer is worth against the expected one, and what the figures are called."""

import json
import re
from typing import NamedTuple

import numpy as np
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer
from sacrebleu.metrics import CHRF

# Scripts written without blanks between words: each character counts as a word.
WORDS = re.compile(
    r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|(?:(?![\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff])[^\W_])+"
)


class Score(NamedTuple):
    """A figure: its name for people, how it is written, and which way is better (+1 up, -1 down, 0 neither)."""

    label: str
    form: str
    better: int


SCORES = {
    "loss": Score("loss", ".4f", -1),
    "perplexity": Score("perplexity", ".4f", -1),
    "token_accuracy": Score("token accuracy", ".1%", 1),
    "exact_match": Score("exact match", ".1%", 1),
    "rouge_l": Score("ROUGE-L", ".1%", 1),
    "chrf": Score("chrF", ".1f", 1),
    "valid_json": Score("valid JSON", ".1%", 1),
    "stopped": Score("stopped", ".1%", 1),
    "answer_tokens": Score("answer tokens", ".1f", 0),
}
BY_TOKEN = ("loss", "perplexity", "token_accuracy")  # weighted by a row's answer tokens; the others count rows


class _Words(Tokenizer):
    """Words of any script. The library's own tokenizer keeps a-z and 0-9 alone: in other scripts every answer would be
    empty and score 0. On ASCII text the two agree."""

    def tokenize(self, text):
        return WORDS.findall(text.lower())


_rouge = RougeScorer(["rougeL"], tokenizer=_Words())
_chrf = CHRF()


def score_text(expected: str, answer: str) -> dict:
    """`exact_match` (blanks at the ends aside), `rouge_l` (F1 of the longest common subsequence of words, 0 to 1), `chrf`
    (of the row, 0 to 100, sacrebleu's default settings: characters up to 6, no words, beta 2) and, where `expected` is a
    JSON object or array, `valid_json`: `answer` is one too."""
    expected, answer = expected.strip(), answer.strip()
    scores = {
        "exact_match": answer == expected,
        "rouge_l": _rouge.score(expected, answer)["rougeL"].fmeasure,
        "chrf": _chrf.sentence_score(answer, [expected]).score,
    }
    return scores | ({"valid_json": _is_json(answer)} if _is_json(expected) else {})


def _is_json(text: str) -> bool:
    """True for an object or an array: a bare number or word in quotes is JSON by chance."""
    try:
        return isinstance(json.loads(text), (dict, list))
    except (ValueError, RecursionError):
        return False


def column(rows: list[dict], name: str) -> tuple[np.ndarray, np.ndarray]:
    """(values, weights) of the score `name` over the rows that have it: the figure is their weighted mean (for the
    perplexity, its exponential)."""
    key = "loss" if name == "perplexity" else name
    having = [row for row in rows if key in row]
    weights = [row["tokens"] if name in BY_TOKEN else 1 for row in having]
    return np.array([row[key] for row in having], dtype=float), np.array(weights, dtype=float)


def figure(values, weights, name: str, axis=-1):
    """The figure that a `column` of the score `name` comes to, along `axis`."""
    mean = (values * weights).sum(axis) / weights.sum(axis)
    if name != "perplexity":
        return mean
    with np.errstate(over="ignore"):
        return np.exp(mean)


def figures(rows: list[dict]) -> dict:
    """All figures of one model on `rows`, as `evaluation.evaluate` gives them, with counts: `rows`, `generated_rows` and,
    for the length of answers, `expected_tokens` (mean of those rows)."""
    found = {name: float(figure(*column(rows, name), name)) for name in SCORES if len(column(rows, name)[0])}
    generated = [row for row in rows if "answer" in row]
    if generated:
        found["expected_tokens"] = float(np.mean([row["expected_tokens"] for row in generated]))
    return found | {"rows": len(rows), "generated_rows": len(generated)}


def show(name: str, value: float) -> str:
    """A figure as text."""
    return format(value, SCORES[name].form)


def show_difference(name: str, value: float) -> str:
    """A difference of two figures as text: signed, shares in percentage points without the sign of per cent."""
    form = SCORES[name].form
    text = f"{100 * value:+.1f}" if form.endswith("%") else format(value, "+" + form)
    return text.replace("-", "\N{MINUS SIGN}")
