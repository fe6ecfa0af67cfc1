"""Runs side by side as a table: for a terminal, a page, or a spreadsheet."""

from csv import DictWriter
from pathlib import Path

from recipes.utils.comparison import Run, against, not_comparable
from recipes.utils.console import out
from recipes.utils.scores import SCORES, show

from rich.table import Table

SHOWN = ("loss", "token_accuracy", "exact_match", "rouge_l", "chrf", "valid_json", "stopped")
ACROSS = 4  # runs that stand beside each other on a terminal


def row_of(one: Run, runs: list[Run], keys: list[str]) -> dict[str, str]:
    """A line of the table; settings that are equal everywhere and figures that no run has are left out."""
    other, results = not_comparable(one, runs[0]), one.results
    row = {"run": one.name + ("" if one.status == "finished" else f" ({one.status})")}
    row |= {key.split(".", 1)[-1] if _alone(key, keys) else key: _text(one.settings.get(key)) for key in keys}
    mark = {part: " †" if part in other else "" for part in ("validation", "test")}
    row["validation loss"] = _number(results["best_validation_loss"], ".4f", mark["validation"])
    for name in SHOWN:
        if name in one.scores:
            value, low, high = one.scores[name]
            interval = f" ({show(name, low)} to {show(name, high)})" if low is not None else ""
            row[("test loss" if name == "loss" else SCORES[name].label)] = show(name, value) + interval + mark["test"]
    if one.scores and one is not runs[0]:
        row[f"against {runs[0].name}"] = against(one, runs[0])
    row["tokens/s"] = _number(results["tokens_per_second"], ",.0f")
    row["memory, GB"] = _number(results["peak_memory_gb"], ".2f")
    row["time, s"] = _number(results["seconds"], ",.0f")
    row["not comparable"] = ", ".join(f"other {part} rows" for part in other)
    return {name: text for name, text in row.items() if text or name in ("run", "validation loss")}


def _alone(key: str, keys: list[str]) -> bool:
    """True if the key's last word is enough to name it among `keys`."""
    return sum(other.split(".", 1)[-1] == key.split(".", 1)[-1] for other in keys) == 1


def _text(value) -> str:
    return "–" if value is None else ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _number(value, form: str, mark: str = "") -> str:
    return "" if value is None else format(value, form) + mark


def notes_of(runs: list[Run]) -> list[str]:
    """A line for each run that may not be compared in full."""
    notes = []
    for one in runs[1:]:
        for part, what in (("validation", "its validation loss is"), ("test", "its scores are")):
            if part in not_comparable(one, runs[0]):
                notes.append(f"† {one.name}: other {part} rows than {runs[0].name}, so {what} not comparable")
        if "train" in not_comparable(one, runs[0]):
            notes.append(f"{one.name}: trained on other rows than {runs[0].name}, so more than its settings differ")
    return notes


def columns_of(table: list[dict]) -> list[str]:
    """The figures that any run has, in the order of the fullest row."""
    fullest = max(table, key=len)
    names = dict.fromkeys([*fullest, *(name for row in table for name in row)])
    return [name for name in names if name != "not comparable"] + ["not comparable"] * ("not comparable" in names)


def print_runs(table: list[dict]) -> None:
    """A line a run where they fit the terminal; else a column a run, some at a time."""
    columns, gap = columns_of(table), 4
    width = sum(gap + max(len(name), *(len(row.get(name, "")) for row in table)) for name in columns)
    if width <= out.width:
        _print_table(columns, [[row.get(name, "") for name in columns] for row in table])
        return
    for start in range(0, len(table), ACROSS):
        rows = table[start : start + ACROSS]
        lines = [[name, *(row.get(name, "") for row in rows)] for name in columns[1:]]
        _print_table(["", *(row["run"] for row in rows)], lines)


def _print_table(heads: list[str], lines: list[list[str]]) -> None:
    shown = Table(*heads, box=None, padding=(0, 2), header_style="bold")
    for line in lines:
        shown.add_row(*line)
    out.print(shown, markup=False)


def write_csv(path: Path, runs: list[Run], keys: list[str]) -> None:
    rows = []
    for one in runs:
        row = {
            "run": str(one.folder),
            "status": one.status,
            **{key: one.settings.get(key) for key in keys},
            **one.results,
        }
        for name, (value, low, high) in one.scores.items():
            row |= {name: value, f"{name}_low": low, f"{name}_high": high}
        rows.append(row | {"not_comparable": " ".join(not_comparable(one, runs[0]))})
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = DictWriter(file, dict.fromkeys(name for row in rows for name in row))
        writer.writeheader()
        writer.writerows(rows)
