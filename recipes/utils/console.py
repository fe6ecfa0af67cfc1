"""What a person sees: lines, tables, one-line errors, exit codes. Imports none of the libraries, which take seconds."""

import os
import sys
import traceback

from rich.console import Console
from rich.table import Table

OK, FAILED, USER_ERROR = 0, 1, 2
# How a run can end before its end: the word in run.json, and the exit status.
ENDS = {"failed": FAILED, "diverged": 3, "stopped": 75}

# A log file or a pipe has no width of its own.
out = Console(highlight=False, width=None if sys.stdout.isatty() else 120)


class UserError(Exception):
    """Something the user can mend: a config, a data file, a path. The message says what, where and how, in a line or
    two; `run` prints it without a traceback and exits with status 2."""


class RunEnded(Exception):
    """A run that began and did not reach its end: the `word` for run.json, and what happened and what to do next."""

    def __init__(self, word: str, message: str):
        super().__init__(message)
        self.word = word


def is_main_process() -> bool:
    """True in the one process that prints and writes (always, without a launcher)."""
    return int(os.environ.get("RANK", 0)) == 0


def say(message: str) -> None:
    """Print a line for the person at the terminal, once however many processes there are."""
    if is_main_process():
        out.print(message, markup=False, soft_wrap=True)


def print_table(title: str, rows: dict[str, object]) -> None:
    """A two-column table of `rows`; entries that are None are left out."""
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None, padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        if value is not None:
            table.add_row(name, str(value))
    if is_main_process():
        out.print(table, markup=False)


def run(main, argv: list[str] | None = None) -> int:
    """Call `main(argv)`, with the command line where `argv` is None, and turn what it raises into an exit status, as `exit_status` does. Only long
    work shows progress, and that is the recipes' own: the libraries' bars are off."""
    import datasets  # here: what is answered before the libraries are there does without them
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    return exit_status(main, list(sys.argv[1:] if argv is None else argv))


def exit_status(main, argv: list[str]) -> int:
    """Call `main(argv)` and turn what it raises into an exit status: 0 done, 2 a `UserError`, 3
    diverged, 75 stopped after a checkpoint, 1 anything else. (Launchers turn all of them into 1: see run.json.)

    With `--traceback` among the arguments a `UserError` or `RunEnded` shows where in the code it arose.
    """
    show_traceback = "--traceback" in argv
    argv = [word for word in argv if word != "--traceback"]
    try:
        main(argv)
        return OK
    except UserError as error:
        if show_traceback:
            traceback.print_exc()
        _complain(f"error: {error}")
        return USER_ERROR
    except RunEnded as ended:
        if show_traceback:
            traceback.print_exc()
        if ended.word != "stopped":
            _complain(f"{ended.word}: {ended}")
        elif is_main_process():  # all processes agreed on it
            print(ended, file=sys.stderr)
        return ENDS[ended.word]
    except KeyboardInterrupt:
        print("interrupted; a training run goes on from its last complete checkpoint with --resume", file=sys.stderr)
        return FAILED


def _complain(message: str) -> None:
    """Print to standard error; each further process says which one it is, since one alone may have met the fault."""
    print(message if is_main_process() else f"[process {os.environ['RANK']}] {message}", file=sys.stderr)
