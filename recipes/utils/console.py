"""What a person sees: the run table, one-line errors, exit codes."""

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

# A log file or a pipe has no width of its own.
out = Console(highlight=False, width=None if sys.stdout.isatty() else 120)


class UserError(Exception):
    """Something the user can mend: a config, a data file, a path. The message says what, where and how, in a line or
    two; `run` prints it without a traceback and exits with status 2."""


def is_main_process() -> bool:
    """True in the one process that prints and writes (always, without a launcher)."""
    return int(os.environ.get("RANK", 0)) == 0


def say(message: str) -> None:
    """Print a line for the person at the terminal, once however many processes there are."""
    if is_main_process():
        out.print(message, markup=False, soft_wrap=True)


def print_run_table(config, trainer, train: dict, validation: dict, notes: dict, reasons: dict) -> None:
    """The table before training: what is about to be trained on what, worked out.

    `train` and `validation` are the counts of `tokenize_chats`, `notes` those of `load_chats`; `reasons` are further
    rows that say what was chosen and why.
    """
    args, processes = trainer.args, trainer.args.world_size
    steps_an_epoch = max(1, math.ceil(len(trainer.get_train_dataloader()) / args.gradient_accumulation_steps))
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_an_epoch)
    chats_a_step = train["rows"] / steps_an_epoch
    effective = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
    trainable, total = trainer.model.get_nb_trainable_parameters()
    fill = train["tokens"] / (len(trainer.train_dataset) * args.max_length) if args.packing else None
    adapter = trainer.model.peft_config["default"]
    targets = (
        adapter.target_modules if isinstance(adapter.target_modules, str) else ", ".join(sorted(adapter.target_modules))
    )
    if config.model.adapter:
        targets += f"; goes on from {config.model.adapter} with its settings, not those of the section `lora`"
    shapes = ", ".join(f"{count:,} {shape}" for shape, count in notes["shapes"].items())
    print_table(
        f"{config.name} · {config.method}",
        {
            "model": config.model.name_or_path,
            "precision": config.model.dtype + (", base in 4 bit" if config.method == "qlora" else ""),
            "device": device_name(args.use_cpu) + (f" × {processes}" if processes > 1 else ""),
            **reasons,
            "files": f"{shapes} rows"
            + (f"; ignored keys: {', '.join(notes['ignored keys'])}" if notes["ignored keys"] else ""),
            "rows": f"{train['rows']:,} train, {validation['rows']:,} validation",
            "not used": _left_out(train, validation, notes, args.max_length, config.data.over_length),
            "tokens": f"{train['tokens']:,}, trained on {train['trained_tokens']:,} ({train['trained_tokens'] / train['tokens']:.0%})",
            "packing": f"{len(trainer.train_dataset):,} rows of {args.max_length}, {fill:.1%} filled"
            if fill
            else "off",
            "effective batch": f"{args.per_device_train_batch_size} rows × {args.gradient_accumulation_steps} accumulation × "
            f"{processes} process{'es' * (processes > 1)} = {effective} rows, {chats_a_step:.1f} chats a step",
            "steps": f"{steps:,} ({steps_an_epoch:,} an epoch)",
            "adapter": f"rank {adapter.r}, alpha {adapter.lora_alpha}, on {targets}",
            "trainable": f"{trainable:,} of {total:,} parameters ({trainable / total:.2%})",
            "output": config.run_folder,
        },
    )
    if steps < 100:
        rows = max(1, int(len(trainer.train_dataset) * args.num_train_epochs / processes) // 100)
        micro = min(rows, args.per_device_train_batch_size)
        say(
            f"few steps ({steps}): an adapter wants 100 or more. Smaller batches give more: "
            f"--training.per_device_train_batch_size {micro} --training.gradient_accumulation_steps {max(1, rows // micro)}"
            + (" --training.packing false" if rows == 1 and args.packing else "")
        )


def _left_out(train: dict, validation: dict, notes: dict, max_length: int, over_length: str) -> str | None:
    """What is in the files and is not learnt from, so that nothing is lost in silence."""
    lost = []
    for part, counts in (("train", train), ("validation", validation)):
        if counts["over_length"]:
            done = {"drop": "dropped", "truncate": "cut"}[over_length]
            lost.append(f"{counts['over_length']:,} {part} rows over max_length {max_length} ({done})")
    if train["masked_answers"]:
        lost.append(
            f"{train['masked_answers']:,} answers carry no loss: in their row they do not follow the prompt that "
            "inference would send"
        )
    if notes["unanswered turns trimmed"]:
        lost.append(f"{notes['unanswered turns trimmed']:,} rows end without an answer (trimmed)")
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


def run(main, argv: list[str] | None = None) -> int:
    """Call `main(argv)` and turn what it raises into an exit status: 0 done, 2 a `UserError`, 1 anything else.

    With `--traceback` among the arguments a `UserError` shows where in the code it arose.
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
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("interrupted: the last complete checkpoint is in the run folder; go on with --resume", file=sys.stderr)
        return FAILED
