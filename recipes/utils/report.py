"""report.html: what a run was, how it went and what came of it, in one file that opens anywhere."""

import json
import math
import statistics
from pathlib import Path

from recipes.utils.console import UserError, is_main_process, say
from recipes.utils.evaluation_record import MODELS
from recipes.utils.intervals import sentence, show_interval
from recipes.utils.ledger import read_ledger
from recipes.utils.page import write_page
from recipes.utils.plots import bars, curves, histogram
from recipes.utils.scores import SCORES, show
from recipes.utils.text_marks import LONGEST, mark_differences

from transformers import TrainerCallback

WRONG, OTHERS, WORST = 8, 4, 20  # rows that are shown
CURVES = [  # title, unit, axis, {key of metrics.jsonl: name}
    ("Loss", "nats a token", "log", {"loss": "training", "eval_loss": "validation"}),
    ("Token accuracy", "", "auto", {"mean_token_accuracy": "training", "eval_mean_token_accuracy": "validation"}),
    ("Throughput", "tokens a second", "zero", {"tokens_per_second": "all", "trained_tokens_per_second": "trained on"}),
    ("Memory", "GB", "zero", {"peak_memory_gb": "peak", "process_memory_gb": "process"}),
    ("MFU", "", "zero", {"mfu": "MFU"}),
    ("GPU", "% of the time busy", "zero", {"gpu_utilization": "busy"}),
    ("Gradient norm", "", "log", {"grad_norm": "gradient norm"}),
    ("Learning rate", "", "zero", {"learning_rate": "learning rate"}),
]
SHARES = ("Token accuracy", "MFU")


class ReportWriter(TrainerCallback):
    """Writes report.html at each evaluation, so that a run can be looked at while it goes on."""

    def __init__(self, run_folder: Path):
        self.run_folder = run_folder

    def on_evaluate(self, args, state, control, **kwargs):
        refresh_report(self.run_folder)


def refresh_report(run_folder: Path) -> str:
    """Write the report and return its path, or say in a line why there is none and return that: a full disk, or a figure
    that nobody thought of, must not cost the run."""
    path = Path(run_folder) / "report.html"
    try:
        if is_main_process():
            write_report(run_folder)
        return str(path)
    except Exception as error:
        reason = f"{path} could not be written: {type(error).__name__}: {error}"
        say(f"warning: {reason}")
        return reason


def write_report(run_folder: Path) -> None:
    """Write RUN/report.html from the files that are in RUN by now; only run.json must be."""
    folder = Path(run_folder)
    record, metrics = _json(folder / "run.json"), _lines(folder / "metrics.jsonl")
    evaluation, answers = (
        _json(folder / "evaluation" / "metrics.json"),
        _lines(folder / "evaluation" / "predictions.jsonl"),
    )
    ledger, differences = _lines(folder / "ledger.jsonl"), evaluation.get("differences", {})
    write_page(
        folder / "report.html", "report.html", folder=folder.resolve().name, record=record,
        tiles=_tiles(record, metrics), curves=_curves(metrics), distributions=_distributions(record, answers, ledger),
        verdicts=[sentence(pair, found) for pair, found in differences.items()],
        tables=_tables(evaluation), examples=_examples(answers), samples=_samples(_lines(folder / "samples.jsonl")),
        worst=_worst_rows(folder), longest=LONGEST,
    )  # fmt: skip


def _json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _lines(path: Path) -> list[dict]:
    """The objects of a JSONL file that may be being written: a last line that is cut off is left out."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
    return [json.loads(line) for line in lines]


def _column(metrics: list[dict], key: str) -> tuple[list, list]:
    having = [line for line in metrics if line.get(key) is not None]
    return [line["step"] for line in having], [line[key] for line in having]


def _tiles(record: dict, metrics: list[dict]) -> list[tuple[str, str]]:
    """(figure, what it is) of the run as a whole."""
    tiles, losses = [], [(line["eval_loss"], line["step"]) for line in metrics if "eval_loss" in line]
    if losses:
        best, step = min(losses, key=lambda pair: (math.isnan(pair[0]), pair))
        tiles.append((f"{best:.4f}", f"best validation loss, at step {step:,}"))
    if metrics:
        tiles.append((f"{metrics[-1]['step']:,}", f"steps, {metrics[-1]['epoch']:.2f} epochs"))
        tiles.append((_duration(metrics[-1]["seconds"]), "of training"))
    for key, name in (
        ("tokens_per_second", "tokens a second"),
        ("trained_tokens_per_second", "tokens trained on a second"),
    ):
        if values := _column(metrics, key)[1]:
            tiles.append((f"{statistics.median(values):,.0f}", f"{name}, in the middle"))
    if memory := _column(metrics, "peak_memory_gb")[1]:
        tiles.append((f"{max(memory):.1f} GB", "peak memory"))
    if rows := record["rows"].get("train"):
        tiles.append((f"{rows['rows']:,}", f"train rows, {rows['tokens']:,} tokens, {rows['trained_tokens'] / rows['tokens']:.0%} trained on"))  # fmt: skip
    return tiles


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min {seconds:02} s"


def _curves(metrics: list[dict]) -> list:
    plots = []
    for title, unit, axis, keys in CURVES:
        series = {name: _column(metrics, key) for key, name in keys.items()}
        series = {name: pair for name, pair in series.items() if pair[0]}
        if series:
            plots.append(curves(title, unit, series, axis, title in SHARES))
    return plots


def _distributions(record: dict, answers: list[dict], ledger: list[dict]) -> list:
    plots = []
    if lengths := record["rows"].get("train", {}).get("length_histogram"):
        plots.append(bars("Length of train rows", "tokens", lengths["edges"], {"rows": lengths["rows"]}))
    if ledger:
        losses = {line["where"]: line["loss"] for line in ledger}  # the latest of each row
        plots.append(histogram("Loss of train rows, when last seen", "nats a token", {"rows": list(losses.values())}))
    if answers:
        models = [name for name in MODELS if name in answers[0]][:2]
        losses = {name: [line[name]["loss"] for line in answers] for name in models}
        plots.append(histogram("Loss of test rows", "nats a token", losses))
        generated = [line for line in answers if "answer" in line[models[0]]]
        lengths = {name: [line[name]["answer_tokens"] for line in generated] for name in models}
        expected = [line["expected_tokens"] for line in generated]
        plots.append(histogram("Length of answers", "tokens", {**lengths, "expected": expected}))
    return plots


def _tables(evaluation: dict) -> list[dict]:
    """Tables of figures: of all rows, of each tag, of the rows that the base is good at."""
    parts = [("", evaluation)] if evaluation else []
    parts += [(f"tag {tag}", part) for tag, part in evaluation.get("tags", {}).items()]
    parts += [(f"forgetting: {part['data']}", part) for part in [evaluation.get("forgetting")] if part]
    tables = []
    for title, part in parts:
        models = [name for name in MODELS if name in part]
        rows = []
        for name, score in SCORES.items():
            if name in part[models[0]]:
                found = [differences[name] for differences in part["differences"].values()]
                cells = [(show_interval(name, one), one["verdict"]) for one in found]
                expected = f" (expected {part[models[0]]['expected_tokens']:.1f})" if name == "answer_tokens" else ""
                rows.append((score.label + expected, [show(name, part[model][name]) for model in models], cells))
        tables.append({
            "title": title, "models": models, "pairs": list(part["differences"]), "rows": rows,
            "counts": f"{part[models[0]]['rows']:,} rows, answers to {part[models[0]]['generated_rows']:,}",
        })  # fmt: skip
    return tables


def _examples(answers: list[dict]) -> list[dict]:
    """Rows with their answers marked: those that the tuned model got most wrong, then others as they come."""
    generated = [line for line in answers if "answer" in line.get("adapter", {})]
    ranked = sorted(generated, key=lambda line: line["adapter"]["chrf"])
    wrong = [line for line in ranked if not line["adapter"]["exact_match"]][:WRONG]
    others = [line for line in generated if line not in wrong][:OTHERS]
    return [
        {
            "where": line["where"], "tag": line["tag"], "prompt": line["prompt"], "expected": line["expected"].strip(),
            "kind": "furthest from the expected answer" if line in wrong else "",
            "answers": [
                (name, mark_differences(line["expected"], line[name]["answer"]), line[name])
                for name in MODELS if name in line
            ],
        }
        for line in wrong + others
    ]  # fmt: skip


def _samples(lines: list[dict]) -> list[dict]:
    """The answers to each sampled prompt, the latest first."""
    prompts = {}
    for line in lines:
        prompts.setdefault(line["where"], []).append(line)
    return [
        {"where": where, "prompt": own[0]["prompt"], "expected": own[-1]["expected"], "answers": own[::-1]}
        for where, own in prompts.items()
    ]


def _worst_rows(folder: Path) -> list:
    """The rows of the ledger that stay worst; none where there is no ledger, or its data files have changed."""
    try:
        return read_ledger(folder)[:WORST]
    except UserError:
        return []
