"""Several runs side by side: what differs between them, what came out, and what of it may be compared."""

import fnmatch
import json
import statistics
from pathlib import Path
from typing import NamedTuple

from recipes.utils.console import UserError
from recipes.utils.evaluation_record import read_rows
from recipes.utils.intervals import compare, own_interval, show_interval
from recipes.utils.jsonl import read_json
from recipes.utils.scores import SCORES

# Follow from other settings or from the machine, or name the run itself.
NOT_SETTINGS = ("training.output_dir", "training.bf16", "training.fp16", "training.use_cpu", "training.report_to")


class Run(NamedTuple):
    """What is compared of a run. `results` are numbers (or None): best_validation_loss (nats a token), tokens_per_second
    (median), peak_memory_gb (1e9 bytes), seconds; `scores` are {name: (figure, low, high)} of the adapter on the test rows,
    with 95 % intervals; `rows` are those scores row by row; `data` are digests of the train, validation and test rows."""

    name: str
    folder: Path
    status: str
    settings: dict
    results: dict
    scores: dict
    rows: list[dict]
    data: dict


def read_runs(folders: list[Path]) -> list[Run]:
    """The runs in `folders`, finished or not. Raises `UserError` for a folder that holds none."""
    names = [folder.resolve().name for folder in folders]
    return [
        _read(folder, name if names.count(name) == 1 else str(folder))
        for folder, name in zip(folders, names, strict=True)
    ]


def _read(folder: Path, name: str) -> Run:
    if not (folder / "run.json").is_file():
        raise UserError(f"{folder}: is no run folder (it has no run.json)")
    record = read_json(folder / "run.json")
    metrics = []
    if (folder / "metrics.jsonl").is_file():
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
        metrics = [json.loads(line) for line in lines]
    evaluated, rows = folder / "evaluation" / "predictions.jsonl", []
    if evaluated.is_file():
        rows = read_rows(evaluated).get("adapter", [])

    def column(key):
        return [line[key] for line in metrics if line.get(key) is not None]

    training = record.get("train", {})
    results = {
        "best_validation_loss": min(column("eval_loss"), default=None),
        "tokens_per_second": statistics.median(column("tokens_per_second") or [0]) or None,
        "peak_memory_gb": max(column("peak_memory_gb"), default=None),
        "seconds": training.get("train_runtime", max(column("seconds"), default=None)),
    }
    figures = {}
    if rows:
        written = json.loads((folder / "evaluation" / "metrics.json").read_text(encoding="utf-8"))
        figures = {
            score: (written["adapter"][score], *(own_interval(rows, score) or (None, None)))
            for score in SCORES if score in written["adapter"]
        }  # fmt: skip
        tested = [written["of"]["rows_sha256"], sum(row["tokens"] for row in rows), len(rows)]
    data = {"train": _train_data(record), "validation": _validation_data(record), "test": tested if rows else None}
    return Run(name, folder, record["status"], _settings(record), results, figures, rows, data)


def _settings(record: dict) -> dict:
    settings = {"method": record["method"]}
    for section in ("model", "data", "lora", "quantization", "training"):
        settings |= {f"{section}.{key}": value for key, value in record[section].items()}
    settings |= {"seed": record["seed"], "device": record["device"], "train rows": record["rows"]["train"]["rows"]}
    return {key: value for key, value in settings.items() if key not in NOT_SETTINGS}


def _train_data(record: dict) -> list:
    counts = record["rows"]["train"]
    return [*_hashes(record, record["data"]["train"]), counts["rows"], counts["trained_tokens"]]


def _validation_data(record: dict) -> list | None:
    """What the validation loss is of: rows, and their tokens, since a loss a token depends on what the tokens are."""
    counts, validation = record["rows"].get("validation"), record["data"]["validation"]
    if counts is None:
        return None
    if isinstance(validation, float):
        of = [*_hashes(record, record["data"]["train"]), validation, record["seed"]]
    else:
        of = _hashes(record, validation)
    return [*of, counts["rows"], counts["trained_tokens"]]


def _hashes(record: dict, paths: str | list[str]) -> list[str]:
    patterns = [str(Path(path)) for path in ([paths] if isinstance(paths, str) else paths)]
    return sorted(
        digest
        for path, digest in record["data_sha256"].items()
        if any(path == pattern or fnmatch.fnmatch(path, pattern) for pattern in patterns)
    )


def differing(runs: list[Run]) -> list[str]:
    """The settings that are not equal in all of `runs`; those of the 4-bit base, in all that have one."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)

    def values(key):
        having = [run for run in runs if key in run.settings or not key.startswith("quantization.")]
        return {json.dumps(run.settings.get(key), default=str) for run in having}

    return [key for key in keys if len(values(key)) > 1]


def not_comparable(run: Run, first: Run) -> list[str]:
    """What `run` does not share with `first`: "train", "validation", "test" rows. Validation losses and scores of other
    rows say nothing about each other; other train rows are a difference as any other, and must be known."""
    return [
        part for part in ("train", "validation", "test")
        if run.data[part] != first.data[part] and None not in (run.data[part], first.data[part])
    ]  # fmt: skip


def against(run: Run, first: Run) -> str:
    """Whether `run` is better on the test rows than `first`, by paired intervals of loss and exact match."""
    if run is first or not run.rows or not first.rows or "test" in not_comparable(run, first):
        return ""
    found = compare(run.rows, first.rows)
    return "; ".join(
        f"{SCORES[name].label} {found[name]['verdict']} ({show_interval(name, found[name])})"
        for name in ("loss", "exact_match")
    )
