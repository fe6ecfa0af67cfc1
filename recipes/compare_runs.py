"""Runs side by side: what differs in settings and data, what came out, what it took.

    python recipes/compare_runs.py runs/mistral-lora runs/mistral-lora-2 runs/mistral-qlora
    python recipes/compare_runs.py                                    all runs in runs/
    python recipes/compare_runs.py runs/* --html comparison.html --csv comparison.csv

Scores and intervals are those of evaluate_adapter.py, for the runs that it has scored. Runs are measured against the
first one, on the rows that both were scored on; what was validated or tested on other rows is marked.
"""

import json
import sys
from argparse import ArgumentParser
from collections import Counter
from fnmatch import filter as matching
from pathlib import Path

from recipes.utils.console import CommandLine, UserError, first_look, out, recipe_parser, run_main, say


def command_line() -> ArgumentParser:
    parser = recipe_parser(__doc__)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="run folders; all in runs/ without one")
    parser.add_argument("--html", metavar="FILE", help="write the table as a page that opens from disk")
    parser.add_argument("--csv", metavar="FILE", help="write it as CSV, with plain numbers")
    return parser


if __name__ == "__main__":
    given = first_look(command_line())  # --help and slips are answered before the imports below, which take seconds

import pandas
from rich.table import Table

from recipes.utils.evaluation import (
    SCORES,
    compare,
    figures,
    own_interval,
    read_record,
    read_rows,
    score_of,
    show,
    show_interval,
)
from recipes.utils.files import evaluation_of, read_json, read_jsonl
from recipes.utils.page import write_page

IGNORED = ("output_dir", "bf16", "fp16", "use_cpu", "report_to")  # follow from others or the machine, or name the run
RESULTS = {"eval_loss": ("min", "validation loss", ".4f"), "tokens_per_second": ("median", "tokens/s", ",.0f"),
           "peak_memory_gb": ("max", "memory, GB", ".2f"), "seconds": ("max", "time, s", ",.0f")}  # fmt: skip
SHOWN = ("loss", "token_accuracy", "exact_match", "rouge_l", "chrf", "valid_json", "stopped")
NOTES = {
    "train": "{}: trained on other rows than {}, so more than its settings differ",
    "validation": "† {}: other validation rows than {}, so its validation loss is not comparable",
    "test": "† {}: other test rows than {}, so its scores are not comparable",
    "common": "† {}: other test rows than {}; it is held against that on the {:,} rows in common",
    "answers": "{}: answers to {:,} rows, {} to {:,}; held against each other on those in common",
}
ACROSS = 4  # runs that stand beside each other on a terminal


def compare_runs(runs=None, html=None, csv=None) -> list[dict[str, str]]:
    """Print the runs in the folders `runs` (those in runs/ without it) as one table, and return it as text: a dict a
    run. `html` and `csv` (plain numbers) are files to write it to. Raises `UserError` for a folder without a run."""
    folders = [Path(folder) for folder in runs or sorted(path.parent for path in Path("runs").glob("*/run.json"))]
    if not folders:
        raise UserError("no run under runs/; name the folders of runs")
    for path in (html, csv):
        if path and not Path(path).absolute().parent.is_dir():
            raise UserError(f"{path}: there is no such folder")
    found, names = [read_whole(folder) for folder in folders], [folder.resolve().name for folder in folders]
    for one, name in zip(found, names, strict=True):
        one["name"] = name if names.count(name) == 1 else one["run"]
        one["other"] = [part for part, own in one["data"].items() if found[0]["data"].get(part, own) != own]
    settings = pandas.DataFrame([one["settings"] for one in found], dtype=object)
    values = settings.map(lambda value: json.dumps(value, default=str), na_action="ignore")
    # of the 4-bit base, among the runs that have one
    keys = [key for key in settings if values[key].nunique(dropna=key.startswith("quantization.")) > 1]
    table = pandas.DataFrame([row_of(one, found[0], keys) for one in found]).fillna("")
    table = table[[name for name in table if name in ("run", "validation loss") or table[name].any()]]
    print_runs(table)
    notes = [note for one in found for note in notes_on(one, found[0])]
    for note in notes:
        say(note)
    rows = [line[(line != "") | (line.index == "validation loss")].to_dict() for _, line in table.iterrows()]
    if csv:
        lines = pandas.DataFrame([one["numbers"] | {"not_comparable": " ".join(one["other"])} for one in found])
        lines = pandas.concat([pandas.DataFrame(found)[["run", "status"]], settings[keys], lines], axis=1)
        lines = lines.rename(columns={"eval_loss": "best_validation_loss"}).map(as_text)
        lines.to_csv(csv, index=False)
        say(f"written: {csv}")
    if html:
        write_page(Path(html), "compare_runs.html", table=rows, columns=list(table), notes=notes)
        say(f"written: {html}")
    return rows


def as_text(value):
    """A cell that a spreadsheet shows and does not compute: texts that begin with =, +, -, @ come behind a quote."""
    return f"'{value}" if isinstance(value, str) and value[:1] in tuple("=+-@\t\r") else value


def read_whole(folder: Path) -> dict:
    """What `read` finds. Raises `UserError` where something in the files is not what a run writes there."""
    try:
        return read(folder)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{folder}: its run.json, metrics or evaluation are not a run's: {error!r}") from error


def read(folder: Path) -> dict:
    """Of a run: `settings`, `numbers` (losses in nats, tokens a second, GB, seconds; scores with 95 % intervals), its
    `rows` as they were scored, and by what its `data` is known: file hashes, counts of rows and of trained tokens."""
    if not (folder / "run.json").is_file():
        raise UserError(f"{folder}: is no run folder (it has no run.json)")
    record, scored = read_record(folder / "run.json"), evaluation_of(folder)
    counts, options, files = record["rows"], record["data"], record["data_sha256"]
    settings = {key: record[key] for key in ("method", "seed", "device")}
    for section in ("model", "data", "lora", "quantization", "training", "run"):
        settings |= {f"{section}.{key}": value for key, value in record.get(section, {}).items() if key not in IGNORED}
    settings |= {"model.revision": record["commit"]} if record.get("commit") else {}
    settings |= {"train rows": (counts.get("train") or {}).get("rows")}
    metrics = pandas.DataFrame(read_jsonl(folder / "metrics.jsonl"), columns=list(RESULTS), dtype=float)
    numbers = metrics.agg({name: how for name, (how, *_) in RESULTS.items()}).dropna().to_dict()
    if "train" in record and not record.get("resumed"):  # that of one session; metrics.jsonl counts on
        numbers |= {"seconds": record["train"]["train_runtime"]}
    data, rows, keys = {}, [], []
    for part in [part for part in ("train", "validation") if counts.get(part)]:
        share = [options[part], record["seed"]] if isinstance(options[part], float) else []
        paths = options["train" if share else part]
        names = [str(Path(path)) for path in ([paths] if isinstance(paths, str) else paths or ())]
        hashes = {str(files.get(path)) for name in names for path in matching(files, name) or [name]}
        data[part] = [*sorted(hashes), *share, counts[part]["rows"], counts[part]["trained_tokens"]]
    if scored and (rows := read_rows(scored / "predictions.jsonl").get("adapter", [])):
        keys = row_keys(read_jsonl(scored / "predictions.jsonl"))
        for name, value in [(name, value) for name, value in figures(rows).items() if shown(name)]:
            low, high = own_interval(rows, name) or (None, None)
            numbers |= {name: value, f"{name}_low": low, f"{name}_high": high}
        digest = read_json(scored / "metrics.json")["of"]["rows_sha256"]
        data["test"] = [digest, sum(row["tokens"] for row in rows), len(rows)]
    start = {"run": str(folder), "status": record["status"], "settings": settings}
    return start | {"numbers": numbers, "rows": rows, "keys": keys, "data": data}


def shown(name: str) -> bool:
    return name in SCORES or name.startswith("metric.")


def row_keys(lines: list[dict]) -> list[tuple]:
    """By what a row of predictions.jsonl is known in those of another run: what was asked, its number of answer tokens,
    and how often it came before."""
    seen: Counter = Counter()
    keys = []
    for line in lines:
        asked = json.dumps([line["prompt"], line["tokens"]], sort_keys=True)
        keys.append((asked, seen[asked]))
        seen[asked] += 1
    return keys


def in_common(one: dict, other: dict) -> tuple[list[dict], list[dict]]:
    """The rows that both runs were scored on, each run's, in the order of the first; none where the expected answers
    differ."""
    theirs = dict(zip(other["keys"], other["rows"], strict=True))
    both = [(row, theirs[key]) for key, row in zip(one["keys"], one["rows"], strict=True) if key in theirs]
    both = [pair for pair in both if len({row["expected"] for row in pair if "expected" in row}) < 2]
    return [ours for ours, _ in both], [others for _, others in both]


def notes_on(one: dict, first: dict) -> list[str]:
    """What a reader has to know before holding a run against the first one."""
    common, _ = in_common(one, first)
    notes = []
    for part in one["other"]:
        kind = "common" if part == "test" and common else part
        notes.append(NOTES[kind].format(one["name"], first["name"], len(common)))
    answers = [sum("answer" in row for row in run["rows"]) for run in (one, first)]
    if all(run["rows"] for run in (one, first)) and answers[0] != answers[1] and "test" not in one["other"]:
        notes.append(NOTES["answers"].format(one["name"], answers[0], first["name"], answers[1]))
    return notes


def row_of(one: dict, first: dict, keys: list[str]) -> dict[str, str]:
    """A line of the table; "" is what the run has not."""
    numbers, short = one["numbers"], [key.split(".", 1)[-1] for key in keys]
    row = {"run": one["name"] + ("" if one["status"] == "finished" else f" ({one['status']})")}
    for key, name in zip(keys, short, strict=True):
        value = one["settings"].get(key)
        text = "–" if value is None else ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        row[name if short.count(name) == 1 else key] = text
    last = {label: format(numbers[name], form) if name in numbers else "" for name, (_, label, form) in RESULTS.items()}
    mark = " †" * ("eval_loss" in numbers and "validation" in one["other"])
    row["validation loss"] = last.pop("validation loss") + mark
    of_the_user = [name for name in numbers if name.startswith("metric.") and f"{name}_low" in numbers]
    for name in (*of_the_user, *SHOWN):
        value, low, high = (numbers.get(name + end) for end in ("", "_low", "_high"))
        interval = "" if low is None else f" ({show(name, low)} to {show(name, high)})"
        text = "" if value is None else show(name, value) + interval + " †" * ("test" in one["other"])
        row["test loss" if name == "loss" else score_of(name).label] = text
    found = compare(*in_common(one, first)) if one is not first else {}
    judged = [(name, found[name]) for name in ("loss", *of_the_user, "exact_match") if name in found]
    words = [f"{score_of(name).label} {score['verdict']} ({show_interval(name, score)})" for name, score in judged]
    row |= {f"against {first['name']}": "; ".join(words), **last}
    return row | {"not comparable": ", ".join(f"other {part} rows" for part in one["other"])}


def print_runs(table: pandas.DataFrame) -> None:
    """A line a run where they fit the terminal; else a column a run, some at a time."""
    across = max(1, min(ACROSS, (out.width - 32) // 12))
    parts, starts = [table], range(0, len(table), across)
    if sum(4 + max(len(name), table[name].str.len().max()) for name in table) > out.width:
        parts = [table[start : start + across].set_index("run").T.reset_index(names="") for start in starts]
    for part in parts:
        shown = Table(*part, box=None, padding=(0, 2), header_style="bold")
        for line in part.to_numpy():
            shown.add_row(*line)
        out.print(shown, markup=False)


def main(given: CommandLine) -> None:
    compare_runs(given.options["runs"], given.options["html"], given.options["csv"])


if __name__ == "__main__":
    sys.exit(run_main(main, given))
