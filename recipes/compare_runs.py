"""Runs side by side: what differs in settings and data, what came out, what it took.

    python recipes/compare_runs.py runs/mistral-lora runs/mistral-lora-2 runs/mistral-qlora
    python recipes/compare_runs.py                                    all runs in runs/
    python recipes/compare_runs.py runs/* --html comparison.html --csv comparison.csv

Scores and intervals are those of evaluate_adapter.py, for the runs that it has scored. Runs are measured against the
first one; what was validated or tested on other rows is marked as not comparable.
"""

import sys
from pathlib import Path

from recipes.utils.command_line import ArgumentParser, first_look, recipe_parser


def command_line() -> ArgumentParser:
    parser = recipe_parser(__doc__)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="run folders; all in runs/ without one")
    parser.add_argument("--html", metavar="FILE", help="write the table as a page that opens from disk")
    parser.add_argument("--csv", metavar="FILE", help="write it as CSV, with plain numbers")
    return parser


if __name__ == "__main__":  # --help and slips are answered before the imports, which take seconds
    first_look(command_line())

from recipes.utils.comparison import differing, read_runs
from recipes.utils.comparison_table import columns_of, notes_of, print_runs, row_of, write_csv
from recipes.utils.console import UserError, run, say
from recipes.utils.page import write_page


def compare_runs(runs=None, html=None, csv=None) -> list[dict]:
    """Print the runs in the folders `runs` (those in runs/ without it) as one table, and return it: a dict a run, by what
    its figures are called, as text. `html` and `csv` are files to write it to; the CSV has plain numbers.

    Raises:
        UserError: for a folder that holds no run.
    """
    folders = [Path(folder) for folder in runs or sorted(path.parent for path in Path("runs").glob("*/run.json"))]
    if not folders:
        raise UserError("no run under runs/; name the folders of runs")
    for path in (html, csv):
        if path and not Path(path).absolute().parent.is_dir():
            raise UserError(f"{path}: there is no such folder")
    found = read_runs(folders)
    keys = differing(found)
    table = [row_of(one, found, keys) for one in found]
    notes = notes_of(found)
    print_runs(table)
    for note in notes:
        say(note)
    if csv:
        write_csv(Path(csv), found, keys)
        say(f"written: {csv}")
    if html:
        write_page(Path(html), "compare_runs.html", table=table, columns=columns_of(table), notes=notes)
        say(f"written: {html}")
    return table


def main(argv: list[str]) -> None:
    compare_runs(**vars(command_line().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(run(main))
