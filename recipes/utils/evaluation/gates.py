"""Gates: may this adapter replace what there is? Decided by the interval of the difference, not by the point."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from recipes.utils.console import UserError, near, say
from recipes.utils.evaluation.scores import BY_TOKEN, METRIC, SCORES, score_of
from recipes.utils.evaluation.statistics import FEWEST_ROWS, column, compare_score, figure, own_interval
from recipes.utils.evaluation.verdicts import BEST, FEW, show_interval, unseen
from recipes.utils.files import evaluation_of, read_json, read_jsonl

PASS, FAIL = "pass", "fail"
FORM = "SCORE >= REFERENCE + MARGIN, such as 'exact_match >= base + 0.05' or 'loss <= runs/last + 0.01'"
PARTS = {  # by how a gate on them begins: the rows, and what brings them
    "forgetting.": ("forgetting", "the rows of another kind: --forgetting FILE"),
    "old_test.": ("old test", "the test rows of an older run: --against OLD_RUN"),
}
NUMBER = r"\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+"


class Gate(NamedTuple):
    """`score` of the adapter on the rows `part` is to be at least (else at most) that of `reference` + `margin`: a
    baseline, "best" of them, "old" (the adapter of --against), a run's folder, or "" for the number `margin` itself."""

    text: str
    part: str  # predictions, or one of PARTS
    score: str
    at_least: bool
    reference: str
    margin: float


def read_gate(text: str, baselines: list[str], metrics: list[str], fields: list[str], part: str | None = None) -> Gate:
    """The gate that `text` says. `baselines` are the models that it may be held against, `metrics` the user's own
    (metric.NAME), `fields` those that the expected JSON answers have (field.PATH), `part` which of `PARTS` is scored
    too. Raises `UserError` for a slip, with the mend."""

    def slip(what: str) -> UserError:
        return UserError(f"--gate {text!r}: {what}")

    parts = re.fullmatch(r"\s*([^\s<>=!]+)\s*([<>=!]+)\s*(.+?)\s*", text)
    if not parts:
        raise slip(f"expected {FORM}")
    name, sign, rest = parts.groups()
    if sign not in (">=", "<="):
        raise slip(f"write >= or <=, not {sign}")
    prefix = next((prefix for prefix in PARTS if name.startswith(prefix)), "")
    rows, needs = PARTS.get(prefix, ("predictions", ""))
    if prefix and rows != part:
        raise slip(f"{prefix}* needs {needs}")
    name, forgetting = name.removeprefix(prefix), rows == "forgetting"
    name = METRIC + name if METRIC + name in metrics else name
    if name not in SCORES and name not in metrics and (name not in fields or forgetting):
        known = [*SCORES, *(metric.removeprefix(METRIC) for metric in metrics), *fields]
        meant = near(name, known)
        mend = f"did you mean {meant!r}?" if meant else f"known: {', '.join(known[:20])}"
        raise slip(f"unknown score {name!r}; {mend}")
    if name in ("valid_json", "field_accuracy") and not fields and not forgetting:
        raise slip("no expected answer is a JSON object or array")
    score, at_least = score_of(name), sign == ">="
    if score.better and (score.better > 0) != at_least:
        way, mend = ("more", ">=") if score.better > 0 else ("less", "<=")
        raise slip(f"of {name}, {way} is better: write {mend}")
    reference, margin = _reference(rest, baselines)
    if score.most == 1 and abs(margin) > 1:
        raise slip(f"{name} is a share between 0 and 1: write 0.05 for five points")
    folder = Path(reference)
    if reference and reference not in baselines and not (folder / "run.json").is_file():
        flags = {"shots": "--shots 4", "system": "--system TEXT", "system_shots": "both --shots and --system"}
        flags["old"] = "--against OLD_RUN"
        if reference in flags:
            raise slip(f"{reference} is a baseline that was not asked for: add {flags[reference]}")
        meant = near(reference, baselines)
        mend = f"did you mean {meant!r}?" if meant else f"known: {', '.join(baselines)}, a run's folder, or a number"
        raise slip(f"{reference!r} is no baseline, no run folder and no number; {mend}")
    return Gate(text, rows, name, at_least, reference, margin)


def _reference(rest: str, baselines: list[str]) -> tuple[str, float]:
    """("base", 0.05) of "base + 0.05"; a folder may hold a sign in its name, so that one of a run goes before."""
    if re.fullmatch(rf"[+-]?(?:{NUMBER})", rest):
        return "", float(rest)
    if (Path(rest) / "run.json").is_file():
        return rest, 0.0
    if with_margin := re.fullmatch(rf"(.+?)\s*([+\N{{MINUS SIGN}}-])\s*({NUMBER})", rest):
        name, sign, number = with_margin.groups()
        if name in baselines or re.search(r"\s", rest):
            return name, float(number) * (1 if sign == "+" else -1)
    return rest, 0.0


def rows_of_runs(gates: list[Gate], digests: dict[str, str], tokens: Callable[[str], int]) -> dict[Gate, list[dict]]:
    """For each gate that is held against a run: the rows of that run's adapter. `digests` are those of the rows to
    score, by part; `tokens` gives how many answer tokens a part has. Raises `UserError` where that run was not scored,
    or on other rows, and for losses where it counted other tokens."""
    found = {}
    for gate in gates:
        folder, what = Path(gate.reference) / "evaluation", f"--gate {gate.text!r}: {gate.reference}"
        if gate.reference and (Path(gate.reference) / "run.json").is_file():
            path = folder / f"{gate.part}.jsonl"
            if evaluation_of(Path(gate.reference)) is None or not path.is_file():
                again = "--forgetting FILE " * (gate.part == "forgetting")
                mend = f"python recipes/evaluate_adapter.py {gate.reference} {again}".strip()
                raise UserError(
                    f"--gate {gate.text!r}: {path} is not there, or of another adapter; score that run first: {mend}"
                )
            metrics = read_json(folder / "metrics.json")
            of = (metrics if gate.part == "predictions" else metrics["forgetting"])["of"]["rows_sha256"]
            if of != digests[gate.part]:
                raise UserError(f"{what} was scored on other rows; score both on the same")
            lines = read_jsonl(path)
            rows = [{**line["adapter"], "tokens": line["tokens"]} for line in lines]
            if gate.score in BY_TOKEN and sum(row["tokens"] for row in rows) != tokens(gate.part):
                raise UserError(f"{what} has other tokens (another tokenizer or template)")
            key = "loss" if gate.score == "perplexity" else gate.score
            if not any(key in row for row in rows):
                raise UserError(f"{what} was scored without {gate.score}")
            found[gate] = rows
    return found


def decide(gate: Gate, scored: dict[str, list[dict]], best: dict[str, str], run: list[dict] | None) -> dict:
    """{"gate", "verdict" (pass, fail or too few rows to say), "difference", "low", "high", "rows", "text"}: `scored`
    has the rows by model of the gate's part, `best` which baseline is, by score, `run` those of another run."""
    ours = scored["adapter"]
    if gate.reference:
        name = best.get(gate.score, "base") if gate.reference == BEST else gate.reference
        found, limit = compare_score(ours, scored[name] if run is None else run, gate.score), gate.margin
    else:
        found, limit = _against_number(ours, gate.score, gate.margin), 0.0
    if found is None:
        return {"gate": gate.text, "verdict": FEW, "rows": 0, "text": f"{gate.text}: no row has this score"}
    verdict = FEW
    if found["difference"] != found["difference"]:  # a figure that is no number keeps nothing
        verdict = FAIL
    elif found["rows"] >= FEWEST_ROWS:
        ends = [(1 if gate.at_least else -1) * (found[end] - limit) for end in ("low", "high")]
        verdict = PASS if min(ends) >= -1e-12 else FAIL if max(ends) < 0 else FEW
    size = f"; {small} cannot be seen" if verdict == FEW and (small := unseen(gate.score, found)) else ""
    shown = f"{show_interval(gate.score, found, '95 % interval ')}, {found['rows']:,} rows{size}"
    kept = {key: found[key] for key in ("difference", "low", "high", "rows")}
    return {"gate": gate.text, "verdict": verdict, **kept, "text": f"{gate.text}  ({shown})"}


def print_gates(decided: list[dict]) -> None:
    """Print what `decide` returned, a line a gate."""
    for one in decided:
        say(f"gate:    {one['verdict'].upper()}: {one['text']}")


def _against_number(rows: list[dict], name: str, number: float) -> dict | None:
    """The model's own figure less `number`, in the form of `compare_score`."""
    values, weights = column(rows, name)
    if not len(values):
        return None
    low, high = own_interval(rows, name) or (math.nan, math.nan)
    found = {"difference": float(figure(values, weights, name)) - number, "rows": len(values)}
    return found | {"low": low - number, "high": high - number, "unseen": (high - low) / 2}
