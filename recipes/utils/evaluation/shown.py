"""What report.html shows of an evaluation beside its tables: answers next to the expected ones, and distributions."""

import re
from difflib import SequenceMatcher

import numpy as np

MODELS = ("base", "adapter", "merged")
FURTHEST, OTHERS = 8, 4  # rows whose answers are shown
LONGEST = 3000  # characters of an answer that are compared and shown
ALIKE = 0.4  # below this share of common words, marks would say no more than that it is another text


def examples(lines: list[dict]) -> list[dict]:
    """Of the `lines` of predictions.jsonl, those whose answer by the adapter is furthest from the expected one, then a
    few others: {"where", "tag", "prompt", "expected", "furthest", "sides": [[model, score, stopped, pieces]]}."""
    generated = [line for line in lines if "answer" in line.get("adapter", {})]
    wrong = [line for line in generated if not line["adapter"]["exact_match"]]
    wrong = sorted(wrong, key=lambda line: line["adapter"]["chrf"])[:FURTHEST]
    found = []
    for line in wrong + [line for line in generated if line not in wrong][:OTHERS]:
        sides = []
        for name in (name for name in MODELS if name in line):
            own = line[name]
            score = "exact" if own["exact_match"] else f"chrF {own['chrf']:.0f}"
            sides.append([name, score, own["stopped"], mark_differences(line["expected"], own["answer"])])
        kept = {key: line[key] for key in ("where", "tag", "prompt", "expected")}
        found.append({**kept, "furthest": line in wrong, "sides": sides})
    return found


def mark_differences(expected: str, answer: str) -> list[list[str]]:
    """[[text, "same" | "extra" | "missing"]]: `answer` in pieces, between them the words of `expected` it lacks."""
    ours, theirs = (re.findall(r"\s+|\w+|[^\w\s]", text.strip()[:LONGEST]) for text in (answer, expected))
    matcher = SequenceMatcher(None, theirs, ours, autojunk=False)
    if matcher.ratio() < ALIKE:
        return [["".join(ours), "extra"]]
    pieces = []
    for kind, start, end, own_start, own_end in matcher.get_opcodes():
        if kind != "equal":
            pieces.append(["".join(theirs[start:end]), "missing"])
        pieces.append(["".join(ours[own_start:own_end]), "same" if kind == "equal" else "extra"])
    return [piece for piece in pieces if piece[0]]


def distributions(lines: list[dict]) -> list[dict]:
    """The losses of the rows, and the lengths of their answers, of the first two models: what `binned` gives."""
    models = [name for name in MODELS if name in lines[0]][:2]
    losses = {name: [line[name]["loss"] for line in lines] for name in models}
    generated = [line for line in lines if "answer" in line[models[0]]]
    lengths = {name: [line[name]["answer_tokens"] for line in generated] for name in models}
    lengths["expected"] = [line["expected_tokens"] for line in generated]
    plots = binned("Loss of test rows", "nats a token", losses), binned("Length of answers", "tokens", lengths)
    return [plot for plot in plots if plot]


def binned(title: str, unit: str, series: dict[str, list[float]]) -> dict | None:
    """{"title", "unit", "edges", "series"}: how many rows have which value, for each of `series`, over the same bins;
    None where no value is a number."""
    finite = {name: np.asarray(values, float)[np.isfinite(values)] for name, values in series.items()}
    every = np.concatenate(list(finite.values()))
    if not every.size:
        return None
    edges = np.histogram_bin_edges(every, bins=24)
    if (every == every.round()).all() and np.ptp(every) < 24:
        edges = np.arange(every.min() - 0.5, every.max() + 1)
    counted = {name: np.histogram(values, edges)[0].tolist() for name, values in finite.items()}
    return {"title": title, "unit": unit, "edges": edges.tolist(), "series": counted}
