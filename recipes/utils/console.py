"""What a person sees: the run table, one-line errors, exit codes."""

import contextlib
import math
import os
import sys
import traceback

import datasets
import torch
import transformers
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


def print_run_table(config, trainer, train: dict, validation: dict | None, reasons: dict) -> None:
    """The table before training: what is about to be trained on what, worked out.

    `train` and `validation` are the counts of `prepare`; `reasons` are further rows that say what was chosen and why.
    """
    args, processes = trainer.args, trainer.args.world_size
    steps, steps_an_epoch = steps_of(args, len(trainer.train_dataset))
    effective = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
    trainable, total = trainer.model.get_nb_trainable_parameters()
    fill = train["tokens"] / (len(trainer.train_dataset) * args.max_length) if args.packing else None
    adapter = trainer.model.peft_config["default"]
    targets = adapter.target_modules
    targets = targets if isinstance(targets, str) else ", ".join(sorted(targets))
    if config.model.adapter:
        targets += f"; goes on from {config.model.adapter} with its settings, not those of the section `lora`"
    shapes = ", ".join(f"{count:,} {shape}" for shape, count in train["shapes"].items())
    ignored = f"; ignored keys: {', '.join(train['ignored_keys'])}" if train["ignored_keys"] else ""
    table = {
        "model": config.model.name_or_path,
        "precision": config.model.dtype + (", base in 4 bit" if config.method == "qlora" else ""),
        "device": device_name(args.use_cpu) + (f" × {processes}" if processes > 1 else ""),
        **reasons,
        "files": f"{shapes} rows{ignored}",
        "rows": f"{train['rows']:,} train, {validation['rows'] if validation else 0:,} validation",
        "split": f"{train['split']:,} of them are one answer of a chat: in its row it would not follow the prompt that "
        "inference sends"
        if train["split"]
        else None,
        "not used": _left_out(train, validation, args.max_length, config.data.over_length),
        "tokens": f"{train['tokens']:,}, trained on {train['trained_tokens']:,} "
        f"({train['trained_tokens'] / train['tokens']:.0%}: {config.data.train_on} answers)",
        "packing": f"{len(trainer.train_dataset):,} rows of {args.max_length}, {fill:.1%} filled" if fill else "off",
        "effective batch": f"{args.per_device_train_batch_size} rows × {args.gradient_accumulation_steps} accumulation × "
        f"{processes} process{'es' * (processes > 1)} = {effective} rows, {train['rows'] / steps_an_epoch:.1f} chats a step",
        "steps": f"{steps:,} ({steps_an_epoch:,} an epoch)",
        "adapter": f"rank {adapter.r}, alpha {adapter.lora_alpha}, on {targets}",
        "trainable": f"{trainable:,} of {total:,} parameters ({trainable / total:.2%})",
        "output": config.run_folder,
    }
    print_table(f"{config.name} · {config.method}", table)


def steps_of(args, rows: int) -> tuple[int, int]:
    """(optimizer steps of the run, of an epoch) for `rows` rows, packed ones where packing is on."""
    batches = math.ceil(rows / (args.per_device_train_batch_size * args.world_size))
    steps_an_epoch = max(1, math.ceil(batches / args.gradient_accumulation_steps))
    return (args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_an_epoch)), steps_an_epoch


def _left_out(train: dict, validation: dict | None, max_length: int, over_length: str) -> str | None:
    """What is in the files and is not learnt from, so that nothing is lost in silence."""
    lost = []
    for part, counts in (("train", train), ("validation", validation or {})):
        if counts.get("over_length"):
            done = {"drop": "dropped", "truncate": "cut"}[over_length]
            lost.append(f"{counts['over_length']:,} {part} rows over max_length {max_length} ({done})")
        if counts.get("bad"):
            lost.append(f"{len(counts['bad']):,} bad {part} rows (listed in bad_rows.jsonl)")
    if train["trimmed"]:
        lost.append(f"{train['trimmed']:,} rows end without an answer (trimmed)")
    return "; ".join(lost) or None


def device_name(use_cpu: bool) -> str:
    """What the run computes on."""
    threads = torch.get_num_threads()
    if use_cpu or not torch.cuda.is_available():
        return f"CPU, {threads} thread{'s' * (threads > 1)}"
    return f"{torch.cuda.get_device_name()}, {torch.cuda.get_device_properties(0).total_memory / 1e9:.0f} GB"


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


@contextlib.contextmanager
def settings_judged(new_folders):
    """Turn what the libraries raise about settings that only they can judge (a target module that the model lacks, a
    tracker that is not installed) into a `UserError`; the `new_folders` that they made meanwhile go."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except UserError:
        discard_empty(new_folders)
        raise
    except (ValueError, TypeError, KeyError, ImportError, RuntimeError, OSError) as error:
        discard_empty(new_folders)
        raise UserError(f"the settings cannot be used: {str(error).splitlines()[0]}") from error


def discard_empty(folders) -> None:
    """Remove folders that hold nothing, the innermost first: of a run that was not begun, nothing stays."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def run(main, argv: list[str] | None = None) -> int:
    """Call `main(argv)` and turn what it raises into an exit status: 0 done, 2 a `UserError`, 3
    diverged, 75 stopped after a checkpoint, 1 anything else. (Launchers turn all of them into 1: see run.json.)

    With `--traceback` among the arguments a `UserError` or `RunEnded` shows where in the code it arose.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    show_traceback = "--traceback" in argv
    argv = [word for word in argv if word != "--traceback"]
    # Only long work shows progress, and that is the recipes' own.
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
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
