"""Figures, differences and what they mean as text: for a person who asks whether to ship."""

import math
import re

from recipes.utils.evaluation.scores import FIELD, score_of

SAME, FEW, LUCK, BOTH_ZERO = "the same", "too few rows to say", "may be luck", "0 % for both"
# Scores that say what another one says, or that are neither good nor bad.
ASIDE = ("perplexity", "answer_tokens")
BEST = "best"  # of the base as it is and as it was prompted


def show(name: str, value: float) -> str:
    """A figure as text."""
    return format(value, score_of(name).form)


def show_difference(name: str, value: float) -> str:
    """A difference of two figures as text: signed, shares in percentage points without the sign of per cent."""
    form = score_of(name).form
    text = f"{100 * value:+.1f}" if form.endswith("%") else format(value, "+" + form)
    return text.replace("-", "\N{MINUS SIGN}")


def show_interval(name: str, found: dict, lead: str = "") -> str:
    """A difference and its interval as text; with a `lead` as a sentence has it, so with the unit of shares."""
    text = show_difference(name, found["difference"])
    text += " points" if lead and score_of(name).form.endswith("%") else ""
    if found["low"] is None or not math.isfinite(found["low"]):
        return text
    return f"{text}, {lead}{show_difference(name, found['low'])} to {show_difference(name, found['high'])}"


def unseen(name: str, found: dict) -> str:
    """How large a difference must be to be seen on these rows; "" where that is not known, or is nothing."""
    half, share = found.get("unseen"), score_of(name).form.endswith("%")
    if half is None or not math.isfinite(half):
        return ""
    if share:  # the sampling of rows allows no finer figure
        text = f"{100 * half:.0f} points" if half > 0.02 else f"{100 * half:.1f} points"
    else:
        text = show(name, half)
    return f"under {text}" if re.search("[1-9]", text) else ""


def note_of(name: str, found: dict) -> str:
    """What stands beside a verdict of a table."""
    return f"{small} unseen" if found["verdict"] == FEW and (small := unseen(name, found)) else ""


def _few(name: str, found: dict) -> str:
    label, small = score_of(name).label, unseen(name, found)
    rows = f"{found['rows']:,} row{'s' * (found['rows'] > 1)}"
    return f"{label} (with {rows}, {small} cannot be seen)" if small else f"{label} (of {rows})"


def _listed(names: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _who(pair: str) -> list[str]:
    """The two of a pair ("adapter against base") as a sentence has them."""
    names = {BEST: "the best baseline", "merged": "the merged model"}
    return [names.get(name, f"the {name}") for name in pair.split(" against ")]


def sentence(pair: str, comparison: dict) -> str:
    """What `compare` found of a pair ("adapter against base") in plain words: "The adapter is better than the base in
    loss (−3.24, 95 % interval −3.28 to −3.20) and exact match; gives longer answers; too few rows to say: stopped
    (with 50 rows, under 11 points cannot be seen)."."""
    ours, theirs = _who(pair)
    named: dict[str, list[str]] = {}
    for name, found in comparison.items():
        if name == "perplexity" or name.startswith(FIELD):  # the first says what the loss says
            continue
        text = f" ({show_interval(name, found, '95 % interval ')})" if name == "loss" else ""
        few = found["verdict"] == FEW
        named.setdefault(found["verdict"], []).append(_few(name, found) if few else score_of(name).label + text)
    leads = {"better": f"is better than {theirs} in ", "worse": f"is worse than {theirs} in "}
    leads |= {"longer": "gives longer answers", "shorter": "gives shorter answers"}
    leads |= {SAME: f"is the same as {theirs} in "}
    parts = [lead + _listed(named[word]) * lead.endswith(" ") for word, lead in leads.items() if word in named]
    if both := named.get(BOTH_ZERO):
        parts.append(f"has, like {theirs}, 0 % in {_listed(both)}")
    if few := named.get(FEW):
        parts.append(f"against {theirs}: " * (not parts) + f"too few rows to say: {', '.join(few)}")
    text = f"{ours} {'; '.join(parts)}."
    return text[0].upper() + text[1:]


def in_short(pair: str, comparison: dict) -> str:
    """The verdict on the first of a pair, for who reads one line: better, worse, mixed, the same, or too few rows."""
    _, theirs = _who(pair)
    judged = {name: one for name, one in comparison.items() if name not in ASIDE and not name.startswith(FIELD)}
    words = "better", "worse", FEW
    by_verdict = {word: [name for name, one in judged.items() if one["verdict"] == word] for word in words}

    def listed(word: str) -> str:
        """The names, with the interval of the one that matters most: the user's own, exact match, or the first."""
        names = by_verdict[word]
        first = next((name for name in names if name not in ("loss", "token_accuracy")), names[0])
        lead = [f"{score_of(first).label} ({show_interval(first, judged[first], '95 % interval ')})"]
        return _listed(lead + [score_of(name).label for name in names if name != first])

    better, worse, few = by_verdict.values()
    if better and worse:
        return f"MIXED: better than {theirs} in {listed('better')}, worse in {listed('worse')}"
    if worse:
        return f"WORSE than {theirs} in {listed('worse')}, better in nothing"
    answers = [name for name in few if name not in ("loss", "token_accuracy")]
    if better:
        open_ = f"; too few rows to say of {_listed([score_of(name).label for name in answers])}" if answers else ""
        return f"BETTER than {theirs} in {listed('better')}, worse in nothing{open_}"
    if few:
        shown = next((name for name in answers + few if unseen(name, judged[name])), few[0])
        small, rows = unseen(shown, judged[shown]), judged[shown]["rows"]
        limit = f": with {rows:,} rows, no difference {small} of {score_of(shown).label} can be seen" if small else ""
        return f"TOO FEW ROWS TO SAY whether it is better or worse than {theirs}{limit}; score more rows"
    return f"THE SAME as {theirs} on these rows"
